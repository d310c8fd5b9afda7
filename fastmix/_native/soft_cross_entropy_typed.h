/* soft_cross_entropy of one dtype: included by soft_cross_entropy.c. */
#include "losses_typed.h"

/* Whether the exponentials can wait in the gradient's memory. */
#define KEEPS (sizeof(T) == sizeof(A))

/* Returns the sum of exp(z - max), which go to `out` if that is given and keeps them. */
static double F(exp_sum)(const T *z, T *out, A max, int64_t n) {
    V sum = {0}, second = {0};
    int64_t i = 0;
    int keep = out && KEEPS;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        V a = F(fm_exp)(F(fm_load)(z + i) - max), b = F(fm_exp)(F(fm_load)(z + i + LANES) - max);
        sum += a;
        second += b;
        if (keep) {
            F(fm_store)(out + i, a);
            F(fm_store)(out + i + LANES, b);
        }
    }
    for (; i < n; i += LANES) {
        int64_t part = fm_min(LANES, n - i);
        V a = F(fm_exp)(F(fm_load_part)(z + i, part, max) - max);
        a = F(first_lanes)(a, part); /* beyond the row they are 1, which is quicker than an exp that underflows */
        sum += a;
        if (keep) F(fm_store_part)(out + i, part, a);
    }
    return F(fm_sum)(sum + second);
}

/* The sum of w[c]*(max - z[c]), without the classes of weight 0. */
static double F(scaled_logit_sum)(const T *z, const A *w, A max, int64_t n) {
    V sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t part = fm_min(LANES, n - i);
        V size = max - (part == LANES ? F(fm_load)(z + i) : F(fm_load_part)(z + i, part, max));
        V weight = (V){0} + 1;
        if (w) memcpy(&weight, w + i, (size_t)part * sizeof(A));
        size = F(fm_select)(weight == 0, (V){0}, weight * size);
        sum += F(first_lanes)(size, part);
    }
    return F(fm_sum)(sum);
}

FM_INLINE V F(exps_of)(const T *z, const T *out, A max, int64_t part) {
    if (KEEPS) return part == LANES ? F(fm_load)(out) : F(fm_load_part)(out, part, 0);
    return F(fm_exp)((part == LANES ? F(fm_load)(z) : F(fm_load_part)(z, part, max)) - max);
}

/* out = exp(z - max)*scale - smooth*w */
static void F(write_gradient)(const T *z, T *out, A max, A scale, A smooth, const A *w, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t part = fm_min(LANES, n - i);
        V v = F(exps_of)(z + i, out + i, max, part) * scale;
        if (smooth != 0) {
            V weight = (V){0} + 1;
            if (w) memcpy(&weight, w + i, (size_t)part * sizeof(A));
            v -= smooth * weight;
        }
        if (part == LANES)
            F(fm_store)(out + i, v);
        else
            F(fm_store_part)(out + i, part, v);
    }
}

/* Makes the loss and the gradient of a row NaN, whose class or partner is out of range. */
static void F(wrong_row)(const cross_entropy *m, int64_t row, A max, double sum, A *values, T *out) {
    A *stats = m->stats;
    if (!m->backward) {
        ((A *)m->losses)[row] = (A)NAN;
        stats[row] = max;
        stats[m->rows + row] = (A)sum;
        if (m->dense || m->smoothing > 0) stats[2 * m->rows + row] = (A)NAN;
    }
    for (int64_t k = 0; values && k < m->components; k++) values[k] = (A)NAN;
    if (out) memset(out, 0xff, (size_t)m->classes * sizeof(T)); /* NaN in every dtype */
}

static void F(hot_row)(const cross_entropy *m, int64_t row) {
    int64_t C = m->classes, K = m->components;
    const T *z = (const T *)m->logits + row * m->logits_stride;
    T *out = m->gradient ? (T *)m->gradient + row * m->gradient_stride : NULL;
    const A *w = m->class_weight, *weights = m->weights ? (const A *)m->weights + row * K : NULL;
    const int64_t *named = m->named + row * K;
    A *stats = m->stats, *values = m->per_component ? (A *)m->per_component + row * K : NULL;
    double e = m->smoothing, per_class = e / (double)C, weight_sum = 0, loss = 0, softmax_factor = 0;
    A max = m->backward ? stats[row] : F(row_max)(z, C);
    double sum = m->backward ? (double)stats[m->rows + row] : (double)(A)F(exp_sum)(z, out, max, C);
    if (m->backward && out && KEEPS) F(exp_sum)(z, out, max, C);
    double log_sum = log(sum), smoothing = 0;
    int idle = 1;
    if (e > 0 && !m->backward) smoothing = (F(scaled_logit_sum)(z, w, max, C) + m->class_weight_sum * log_sum) * per_class;
    double upstream = m->grad_output ? (double)((const A *)m->grad_output)[row * m->grad_output_stride] : 1;
    double factor = (1 - e) * upstream / m->denominator;
    for (int64_t k = 0; k < K; k++)
        if (named[k] != m->ignore_index && (named[k] < 0 || named[k] >= C)) {
            F(wrong_row)(m, row, max, sum, values, out);
            return;
        }
    for (int64_t k = 0; k < K; k++) {
        int64_t c = named[k];
        int ignored = c == m->ignore_index;
        double a = ignored ? 0 : weights ? (double)weights[k] : 1, cw = w && !ignored ? (double)w[c] : 1;
        weight_sum += a;
        if (a != 0) idle = 0;
        if (a * cw != 0) softmax_factor += a * cw * factor;
        if (m->backward) continue;
        double value = ignored || cw == 0 ? 0 : cw * (log_sum + (double)(A)(max - F(fm_wide)(z[c])));
        if (e > 0) value = value * (1 - e) + smoothing;
        if (a != 0) loss += a * value;
        if (values) values[k] = ignored ? 0 : (A)value;
    }
    if (!m->backward) {
        ((A *)m->losses)[row] = (A)loss;
        stats[row] = max;
        stats[m->rows + row] = (A)sum;
        if (e > 0) stats[2 * m->rows + row] = (A)weight_sum;
    }
    if (!out) return;
    if (idle) {
        memset(out, 0, (size_t)C * sizeof(T));
        return;
    }
    double smooth = e > 0 ? weight_sum * per_class / m->denominator * upstream : 0;
    softmax_factor += smooth != 0 ? smooth * m->class_weight_sum : 0;
    double of_sum = softmax_factor / sum;
    A scale = (A)of_sum;
    F(write_gradient)(z, out, max, scale, (A)smooth, w, C);
    for (int64_t k = 0; k < K; k++) { /* the first component of a class writes for all of that class */
        int64_t c = named[k], first = 0;
        if (c == m->ignore_index) continue;
        while (named[first] != c) first++;
        if (first < k) continue;
        double hard = 0, cw = w ? (double)w[c] : 1;
        for (int64_t j = k; j < K; j++)
            if (named[j] == c) {
                double a = weights ? (double)weights[j] : 1;
                if (a * cw != 0) hard += a * cw * factor;
            }
        if (hard == 0) continue; /* the class keeps the bits that it has where it is not named */
        V softmax = F(fm_exp)((V){0} + (A)(F(fm_wide)(z[c]) - max));
        A value = (A)((double)softmax[0] * of_sum - (smooth != 0 ? smooth * cw : 0) - hard);
        F(fm_store_part)(out + c, 1, (V){0} + value);
    }
}

static void F(hot_chunk)(void *arg, int64_t chunk) {
    const cross_entropy *m = arg;
    int64_t step = fm_loss_rows(m->classes), last = fm_min((chunk + 1) * step, m->rows);
    for (int64_t row = chunk * step; row < last; row++) F(hot_row)(m, row);
}

/* Dense targets */

/* Writes t' of the classes [at, at + n) to t, and 0 behind them. */
static void F(smoothed_target)(A *t, const cross_entropy *m, int64_t row, int64_t at, int64_t n) {
    F(mixed_target)(t, &m->target, row, at, n);
    if (m->ignore_index >= at && m->ignore_index < at + n) t[m->ignore_index - at] = 0;
    if (m->smoothing > 0) {
        A keep = (A)(1 - m->smoothing), add = (A)(m->smoothing / (double)m->classes);
        for (int64_t i = 0; i < n; i++) t[i] = t[i] * keep + add;
    }
    if (m->class_weight) {
        const A *w = (const A *)m->class_weight + at;
        for (int64_t i = 0; i < n; i++) t[i] = w[i] == 0 ? 0 : w[i] * t[i];
    }
    for (int64_t i = n; i % LANES; i++) t[i] = 0;
}

static void F(dense_row)(const cross_entropy *m, int64_t row) {
    int64_t C = m->classes;
    const T *z = (const T *)m->logits + row * m->logits_stride;
    T *out = m->gradient ? (T *)m->gradient + row * m->gradient_stride : NULL;
    A *stats = m->stats, t[FM_LOSS_BLOCK];
    A max = m->backward ? stats[row] : F(row_max)(z, C);
    double sum, weight_sum = 0, scaled = 0;
    if (m->target.lam && (m->target.partners[row] < 0 || m->target.partners[row] >= m->rows)) {
        F(wrong_row)(m, row, max, 1, NULL, out);
        return;
    }
    if (m->backward) {
        sum = (double)stats[m->rows + row];
        weight_sum = (double)stats[2 * m->rows + row];
        if (out && KEEPS) F(exp_sum)(z, out, max, C);
    } else {
        sum = (double)(A)F(exp_sum)(z, out, max, C);
        for (int64_t at = 0; at < C; at += FM_LOSS_BLOCK) {
            int64_t n = fm_min(FM_LOSS_BLOCK, C - at);
            V weights = {0}, products = {0};
            F(smoothed_target)(t, m, row, at, n);
            for (int64_t i = 0; i < n; i += LANES) {
                V v, size;
                memcpy(&v, t + i, sizeof v);
                size = (n - i >= LANES ? F(fm_load)(z + at + i) : F(fm_load_part)(z + at + i, n - i, max)) - max;
                weights += v;
                products += F(fm_select)(v == 0, (V){0}, v * size);
            }
            weight_sum += F(fm_sum)(weights);
            scaled += F(fm_sum)(products);
        }
        weight_sum = (double)(A)weight_sum;
        ((A *)m->losses)[row] = (A)((weight_sum == 0 ? 0 : weight_sum * log(sum)) - scaled);
        stats[row] = max;
        stats[m->rows + row] = (A)sum;
        stats[2 * m->rows + row] = (A)weight_sum;
    }
    double upstream = m->grad_output ? (double)((const A *)m->grad_output)[row * m->grad_output_stride] : 1;
    double factor = upstream / m->denominator;
    if (out) {
        A scale = (A)(weight_sum / sum * factor), by = (A)factor;
        for (int64_t at = 0; at < C; at += FM_LOSS_BLOCK) {
            int64_t n = fm_min(FM_LOSS_BLOCK, C - at);
            F(smoothed_target)(t, m, row, at, n);
            for (int64_t i = 0; i < n; i += LANES) {
                int64_t part = fm_min(LANES, n - i);
                V v, target;
                memcpy(&target, t + i, sizeof target);
                v = F(exps_of)(z + at + i, out + at + i, max, part) * scale;
                if (weight_sum == 0) v = (V){0};
                target = F(fm_select)(target == 0, (V){0}, target * by);
                if (part == LANES)
                    F(fm_store)(out + at + i, v - target);
                else
                    F(fm_store_part)(out + at + i, part, v - target);
            }
        }
    }
    if (m->dtarget) {
        A *dtarget = (A *)m->dtarget + row * C;
        const A *w = m->class_weight;
        double log_sum = log(sum), keep = 1 - m->smoothing;
        for (int64_t c = 0; c < C; c++) {
            double weight = c == m->ignore_index ? 0 : (w ? (double)w[c] : 1) * keep;
            dtarget[c] = weight == 0 ? 0 : (A)(weight * (log_sum + (double)(A)(max - F(fm_wide)(z[c]))) * factor);
        }
    }
}

static void F(dense_chunk)(void *arg, int64_t chunk) {
    const cross_entropy *m = arg;
    int64_t step = fm_loss_rows(m->classes), last = fm_min((chunk + 1) * step, m->rows);
    for (int64_t row = chunk * step; row < last; row++) F(dense_row)(m, row);
}

#undef V
#undef LANES
#undef KEEPS
