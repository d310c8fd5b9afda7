/* soft_cross_entropy of one dtype: included by soft_cross_entropy.c. */
#include "losses_typed.h"

/* Whether the exponentials wait in the gradient's memory, and not beside it. */
#define KEEPS (sizeof(T) == sizeof(A))

/* Returns the sum of exp(z - max), which go to `exps`, if that is given. What comes next of the logits and
 * of `out` is fetched meanwhile, a cache line at a time. */
FM_INLINE double F(exp_sum)(const T *z, A *exps, const T *out, A max, int64_t n) {
    V sum = {0}, second = {0};
    int64_t i = 0, ahead = fm_min(n, FM_AHEAD);
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        V a = F(fm_exp)(F(fm_load)(z + i) - max), b = F(fm_exp)(F(fm_load)(z + i + LANES) - max);
        sum += a;
        second += b;
        for (int64_t l = 0; l < 2 * LANES; l += (int64_t)(64 / sizeof(T))) {
            __builtin_prefetch(z + i + l + ahead);
            if (exps) __builtin_prefetch(out + i + l + (KEEPS ? ahead : 0), 1);
        }
        if (!exps) continue;
        memcpy(exps + i, &a, sizeof a);
        memcpy(exps + i + LANES, &b, sizeof b);
    }
    for (; i < n; i += LANES) {
        int64_t part = fm_min(LANES, n - i);
        V a = F(fm_exp)(F(load_lanes)(z + i, part, max) - max);
        a = F(first_lanes)(a, part); /* beyond the row they are 1, which is quicker than an exp that underflows */
        sum += a;
        if (exps) F(store_wide)(exps + i, part, a);
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
        sum += F(first_lanes)(F(fm_times)(weight, size), part);
    }
    return F(fm_sum)(sum);
}

/* exp(z - max): those that wait in `exps`, or in a backward formed anew. */
FM_INLINE V F(exps_of)(const T *z, const A *exps, A max, int64_t part) {
    return exps ? F(load_wide)(exps, part) : F(fm_exp)(F(load_lanes)(z, part, max) - max);
}

/* out = exp(z - max)*scale - smooth*w */
static void F(write_gradient)(const T *z, const A *exps, T *out, A max, A scale, A smooth, const A *w, int64_t n) {
    int64_t i = 0;
    if (exps && smooth == 0) /* the loop below takes 1.5 times as long */
        for (; i + LANES <= n; i += LANES) F(fm_store)(out + i, W(fm_load)(exps + i) * scale);
    for (; i < n; i += LANES) {
        int64_t part = fm_min(LANES, n - i);
        V v = F(exps_of)(z + i, exps ? exps + i : NULL, max, part) * scale;
        if (smooth != 0) v -= smooth * (w ? F(load_wide)(w + i, part) : (V){0} + 1);
        F(store_lanes)(out + i, part, v);
    }
}

/* Makes the loss of a row NaN, whose class or partner is out of range. */
static void F(wrong_row)(const cross_entropy *m, int64_t row, A max, double sum) {
    A *stats = m->stats;
    if (m->backward) return;
    ((A *)m->losses)[row] = (A)NAN;
    stats[row] = max;
    stats[m->rows + row] = (A)sum;
    if (m->dense || m->smoothing > 0) stats[2 * m->rows + row] = (A)NAN;
}

static double F(upstream_of)(const cross_entropy *m, int64_t row) {
    return m->grad_output ? (double)((const A *)m->grad_output)[row * m->grad_output_stride] : 1;
}

/* A row of logits, or a pixel, and its target: component k is k*step further, and so is class c. */
typedef struct {
    const T *z;
    const int64_t *named;
    const A *weights; /* NULL: 1 */
    A *values;        /* the loss of each component, or NULL */
    int64_t row, step;
    A exps[FM_NAMED]; /* exp(z - max) at the first components' classes, `kept` of them; the others are formed anew */
    int64_t kept;
} F(hot_place);

/* Its gradient is exp(z - max)*of_sum - smooth*w, and less by a*w*factor at a named class. Without a weight it is 0; with a wrong class NaN. */
typedef struct { double of_sum, smooth, factor; int idle, wrong; } F(hot_slope);

FM_INLINE void F(set_place)(F(hot_place) *p, const cross_entropy *m, const T *z, int64_t row, int64_t image, int64_t pixel) {
    int64_t I = m->pixels, at = image * m->components * I + pixel;
    p->z = z, p->row = row, p->step = I, p->kept = 0;
    p->named = m->named + at;
    p->weights = m->weights ? (const A *)m->weights + at : NULL;
    p->values = m->per_component ? (A *)m->per_component + at : NULL;
}

/* Keeps the exponentials at the named classes. That of class c is step*c further. */
FM_INLINE void F(keep_exps)(F(hot_place) *p, const cross_entropy *m, const A *exps, int64_t step) {
    p->kept = fm_min(m->components, FM_NAMED);
    for (int64_t k = 0; k < p->kept; k++) {
        int64_t c = p->named[k * p->step];
        if (c != m->ignore_index) p->exps[k] = exps[c * step];
    }
}

/* Writes the loss and the stats, if they are wanted. logit_sum is the sum of w*(max - z). */
static F(hot_slope) F(hot_terms)(const cross_entropy *m, const F(hot_place) *p, A max, double sum, double log_sum, double logit_sum) {
    int64_t C = m->classes, K = m->components, row = p->row;
    const A *w = m->class_weight;
    A *stats = m->stats;
    double e = m->smoothing, weight_sum = 0, loss = 0, softmax_factor = 0, upstream = F(upstream_of)(m, row);
    double smoothing = (logit_sum + m->class_weight_sum * log_sum) * m->per_class;
    F(hot_slope) slope = {.factor = m->hard_factor * upstream, .idle = 1};
    for (int64_t k = 0; k < K; k++) {
        int64_t c = p->named[k * p->step];
        if (c == m->ignore_index || (c >= 0 && c < C)) continue;
        F(wrong_row)(m, row, max, sum);
        for (k = 0; p->values && k < K; k++) p->values[k * p->step] = (A)NAN;
        slope.wrong = 1;
        return slope;
    }
    for (int64_t k = 0; k < K; k++) {
        int64_t c = p->named[k * p->step];
        int ignored = c == m->ignore_index;
        double a = ignored ? 0 : p->weights ? (double)p->weights[k * p->step] : 1, cw = w && !ignored ? (double)w[c] : 1;
        weight_sum += a;
        if (a != 0) slope.idle = 0;
        if (a * cw != 0) softmax_factor += a * cw * slope.factor;
        if (m->backward) continue;
        double value = ignored || cw == 0 ? 0 : cw * (log_sum + (double)(A)(max - F(fm_wide)(p->z[c * p->step])));
        if (e > 0) value = value * (1 - e) + smoothing;
        if (a != 0) loss += a * value;
        if (p->values) p->values[k * p->step] = ignored ? 0 : (A)value;
    }
    if (!m->backward) {
        ((A *)m->losses)[row] = (A)loss;
        stats[row] = max;
        stats[m->rows + row] = (A)sum;
        if (e > 0) stats[2 * m->rows + row] = (A)weight_sum;
    }
    if (slope.idle) return slope; /* a mean over nothing has an infinite factor */
    if (e > 0) slope.smooth = weight_sum * m->smooth_factor * upstream;
    if (slope.smooth != 0) softmax_factor += slope.smooth * m->class_weight_sum;
    slope.of_sum = softmax_factor / sum;
    return slope;
}

/* Writes the gradient at the named classes. */
static void F(hot_gradient)(const cross_entropy *m, const F(hot_place) *p, const F(hot_slope) *slope, A max, T *out) {
    int64_t K = m->components;
    const A *w = m->class_weight;
    for (int64_t k = 0; k < K; k++) { /* the first component of a class writes for all of that class */
        int64_t c = p->named[k * p->step], first = 0;
        if (c == m->ignore_index) continue;
        while (p->named[first * p->step] != c) first++;
        if (first < k) continue;
        double hard = 0, cw = w ? (double)w[c] : 1;
        for (int64_t j = k; j < K; j++)
            if (p->named[j * p->step] == c) {
                double a = p->weights ? (double)p->weights[j * p->step] : 1;
                if (a * cw != 0) hard += a * cw * slope->factor;
            }
        if (hard == 0) continue; /* the class keeps the bits that it has where it is not named */
        A softmax = k < p->kept ? p->exps[k] : F(fm_exp)((V){0} + (A)(F(fm_wide)(p->z[c * p->step]) - max))[0];
        A value = (A)((double)softmax * slope->of_sum - (slope->smooth != 0 ? slope->smooth * cw : 0) - hard);
        F(fm_store_part)(out + c * p->step, 1, (V){0} + value);
    }
}

static void F(hot_row)(const cross_entropy *m, int64_t row, A *waiting) {
    int64_t C = m->classes;
    const T *z = (const T *)m->logits + row * m->logits_stride;
    T *out = m->gradient ? (T *)m->gradient + row * m->gradient_stride : NULL;
    A *stats = m->stats, max, *exps = m->backward || !out ? NULL : KEEPS ? (A *)out : waiting;
    double sum, logit_sum = 0;
    if (m->backward) {
        max = stats[row], sum = (double)stats[m->rows + row];
    } else {
        max = F(row_max)(z, C), sum = (double)(A)F(exp_sum)(z, exps, out, max, C);
        if (m->smoothing > 0) logit_sum = F(scaled_logit_sum)(z, m->class_weight, max, C);
    }
    F(hot_place) place;
    F(set_place)(&place, m, z, row, row, 0);
    F(hot_slope) slope = F(hot_terms)(m, &place, max, sum, log(sum), logit_sum);
    if (!out) return;
    if (slope.wrong || slope.idle) {
        memset(out, slope.wrong ? 0xff : 0, (size_t)C * sizeof(T)); /* 0xff: NaN in every dtype */
        return;
    }
    if (exps) F(keep_exps)(&place, m, exps, 1);
    F(write_gradient)(z, exps, out, max, (A)slope.of_sum, (A)slope.smooth, m->class_weight, C);
    F(hot_gradient)(m, &place, &slope, max, out);
}

/* Dense targets */

/* Returns where t' of the classes [at, at + n) is: in t, or where the target itself lies. */
static const A *F(smoothed_target)(A *t, const cross_entropy *m, int64_t row, int64_t at, int64_t n) {
    int64_t ignored = m->ignore_index - at;
    if (m->smoothing == 0 && !m->class_weight && (ignored < 0 || ignored >= n)) return F(target_of)(t, &m->target, row, at, n);
    F(mixed_target)(t, &m->target, row, at, n);
    if (ignored >= 0 && ignored < n) t[ignored] = 0;
    if (m->smoothing > 0) {
        A keep = (A)(1 - m->smoothing), add = (A)(m->smoothing / (double)m->classes);
        for (int64_t i = 0; i < n; i++) t[i] = t[i] * keep + add;
    }
    if (m->class_weight) {
        const A *w = (const A *)m->class_weight + at;
        for (int64_t i = 0; i < n; i++) t[i] = w[i] == 0 ? 0 : w[i] * t[i];
    }
    return t;
}

static void F(dense_row)(const cross_entropy *m, int64_t row, A *waiting) {
    int64_t C = m->classes;
    const T *z = (const T *)m->logits + row * m->logits_stride;
    T *out = m->gradient ? (T *)m->gradient + row * m->gradient_stride : NULL;
    A *stats = m->stats, *exps = m->backward || !out ? NULL : KEEPS ? (A *)out : waiting, buffer[FM_LOSS_BLOCK];
    A max = m->backward ? stats[row] : F(row_max)(z, C);
    double sum, weight_sum = 0, scaled = 0;
    if (m->target.lam && (m->target.partners[row] < 0 || m->target.partners[row] >= m->rows)) {
        F(wrong_row)(m, row, max, 1);
        if (out) memset(out, 0xff, (size_t)C * sizeof(T)); /* NaN in every dtype */
        return;
    }
    if (m->backward) {
        sum = (double)stats[m->rows + row];
        weight_sum = (double)stats[2 * m->rows + row];
    } else {
        sum = (double)(A)F(exp_sum)(z, exps, out, max, C);
        for (int64_t at = 0; at < C; at += FM_LOSS_BLOCK) {
            int64_t n = fm_min(FM_LOSS_BLOCK, C - at);
            V weights = {0}, products = {0};
            const A *t = F(smoothed_target)(buffer, m, row, at, n);
            for (int64_t i = 0; i < n; i += LANES) {
                int64_t part = fm_min(LANES, n - i);
                V v = F(load_wide)(t + i, part), size = F(load_lanes)(z + at + i, part, max) - max;
                weights += v;
                products += F(fm_times)(v, size);
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
    double factor = F(upstream_of)(m, row) / m->denominator;
    if (out) {
        A scale = (A)(weight_sum / sum * factor), by = (A)factor;
        for (int64_t at = 0; at < C; at += FM_LOSS_BLOCK) {
            int64_t n = fm_min(FM_LOSS_BLOCK, C - at);
            const A *t = F(smoothed_target)(buffer, m, row, at, n);
            for (int64_t i = 0; i < n; i += LANES) {
                int64_t part = fm_min(LANES, n - i);
                V target = F(load_wide)(t + i, part), v = F(exps_of)(z + at + i, exps ? exps + at + i : NULL, max, part) * scale;
                if (weight_sum == 0) v = (V){0};
                target = F(fm_times)(target, (V){0} + by);
                F(store_lanes)(out + at + i, part, v - target);
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

static void F(row_chunk)(void *arg, int64_t chunk) {
    cross_entropy *m = arg;
    int64_t step = fm_loss_rows(m->classes), last = fm_min((chunk + 1) * step, m->rows);
    A few[KEEPS ? 1 : FM_FEW] __attribute__((aligned(64)));
    A *waiting = KEEPS || m->classes <= FM_FEW ? few : fm_scratch(m, m->classes * (int64_t)sizeof(A));
    if (!waiting) return;
    for (int64_t row = chunk * step; row < last; row++) (m->dense ? F(dense_row) : F(hot_row))(m, row, waiting);
    if (waiting != few) free(waiting);
}

#include "soft_cross_entropy_pixels_typed.h"

#undef KEEPS
#undef V
#undef LANES
