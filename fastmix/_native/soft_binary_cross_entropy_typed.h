/* soft_binary_cross_entropy of one dtype: included by soft_binary_cross_entropy.c. */
#include "losses_typed.h"

/* Replaces t of n classes by t'. */
static void F(smoothed)(const binary *m, A *t, int64_t n) {
    A threshold = (A)m->threshold;
    if (m->smoothing > 0) {
        A keep = (A)(1 - m->smoothing), add = (A)m->smooth;
        for (int64_t i = 0; i < n; i++) t[i] = t[i] * keep + add;
    }
    if (!isnan(m->threshold))
        for (int64_t i = 0; i < n; i++) t[i] = t[i] > threshold ? 1 : 0;
}

/* log(1 + v) of finite v >= 0, to the last bits also where v is small. */
FM_INLINE V F(log1p_of)(V v) {
    V whole = v + 1, lost = v - (whole - 1);
    return F(fm_log)(whole) + lost / whole;
}

/* What a tile of classes is computed with. */
typedef struct {
    const T *z;
    const A *t, *w, *p; /* t'; the weights: NULL for 1 */
    T *out;             /* NULL: no gradient */
    A scale;            /* of the gradient */
    V sum;              /* of the loss */
} F(tile);

/* Adds one vector's loss but for its logarithm to the sum, writes its gradient, and returns q; its weight is *both, where weighted. */
FM_INLINE V F(binary_vector)(F(tile) *m, int64_t i, int64_t part, int weighted, V *both) {
    V z = F(load_lanes)(m->z + i, part, 0), t = F(load_wide)(m->t + i, part), zero = {0}, one = zero + 1;
    __builtin_prefetch(m->z + i + FM_AHEAD);
    if (m->out) __builtin_prefetch(m->out + i + FM_AHEAD, 1);
    V positive = t, negative = 1 - t;
    if (weighted) {
        V w = m->w ? F(load_wide)(m->w + i, part) : one, p = m->p ? F(load_wide)(m->p + i, part) : one;
        positive = F(fm_times)(w, F(fm_times)(p, positive));
        negative = F(fm_times)(w, negative);
        z = F(fm_select)((positive == 0) & (negative == 0), zero, z);
        *both = F(first_lanes)(positive + negative, part);
    }
    V minus_size = F(fm_min)(z, -z), q = F(fm_exp)(minus_size), larger = F(fm_select)(z > 0, negative, positive);
    m->sum -= F(fm_times)(larger, minus_size);
    if (m->out) {
        V smaller_sigmoid = q / (q + 1), g = larger - (weighted ? *both * smaller_sigmoid : smaller_sigmoid);
        g = F(fm_select)(z > 0, g, -g);
        F(store_lanes)(m->out + i, part, F(fm_times)(g, zero + m->scale));
    }
    return part == LANES ? q : F(first_lanes)(q, part);
}

/* Returns the loss of n classes, FM_LOSS_BLOCK at most. Unweighted, the logarithms of a lane are one: (1+a)*(1+b) = 1 + (a + b + a*b). */
FM_INLINE double F(binary_tile)(F(tile) *m, int64_t n, int weighted) {
    V logs = {0}, all = {0}, both;
    m->sum = (V){0};
    for (int64_t i = 0; i < n; i += LANES) {
        V q = F(binary_vector)(m, i, fm_min(LANES, n - i), weighted, &both);
        if (weighted)
            logs += F(fm_times)(both, F(fm_log1p)(q));
        else
            all = F(fm_vfma)(all, q, all + q);
    }
    return F(fm_sum)(m->sum) + F(fm_sum)(weighted ? logs : F(log1p_of)(all));
}

/* Returns the loss of the classes [at, at + n) of a row with the target t. */
static double F(block_loss)(const binary *m, int64_t row, int64_t at, int64_t n, const A *t) {
    A upstream = m->grad_output ? ((const A *)m->grad_output)[row * m->grad_output_stride] : 1;
    F(tile) tile = {.z = (const T *)m->logits + row * m->logits_stride + at, .t = t, .scale = (A)(m->factor * (double)upstream)};
    if (m->class_weight) tile.w = (const A *)m->class_weight + at;
    if (m->positive_weight) tile.p = (const A *)m->positive_weight + at;
    if (m->gradient) tile.out = (T *)m->gradient + row * m->gradient_stride + at;
    return tile.w || tile.p ? F(binary_tile)(&tile, n, 1) : F(binary_tile)(&tile, n, 0);
}

/* Makes the loss and the gradients of a row NaN, whose class or partner is out of range. */
static void F(wrong_row)(const binary *m, int64_t row) {
    if (m->losses) ((A *)m->losses)[row] = (A)NAN;
    for (int64_t k = 0; m->slopes && k < m->components; k++) ((A *)m->slopes)[row * m->components + k] = (A)NAN;
    if (m->gradient) memset((T *)m->gradient + row * m->gradient_stride, 0xff, (size_t)m->classes * sizeof(T)); /* NaN in every dtype */
}

/* The loss's derivative by the target of a class: w*(p*softplus(-z) - softplus(z)). */
static double F(slope_of)(const binary *m, A logit, int64_t c) {
    double z = (double)logit, w = m->class_weight ? (double)((const A *)m->class_weight)[c] : 1, slope = -z;
    if (w == 0) return 0;
    if (m->positive_weight) {
        double p = (double)((const A *)m->positive_weight)[c], log_term = log1p(exp(-fabs(z)));
        slope = (p == 0 ? 0 : p * (fmax(-z, 0) + log_term)) - (fmax(z, 0) + log_term);
    }
    return w * slope;
}

/* `t` holds t' of a class that is not named, `rest`, in a block of classes, and holds it again in the end. */
static void F(hot_row)(const binary *m, int64_t row, A *t, A rest) {
    int64_t C = m->classes, K = m->components;
    const T *z = (const T *)m->logits + row * m->logits_stride;
    const A *weights = m->weights ? (const A *)m->weights + row * K : NULL;
    const int64_t *named = m->named + row * K;
    double loss = 0;
    for (int64_t k = 0; k < K; k++)
        if (named[k] < 0 || named[k] >= C) {
            F(wrong_row)(m, row);
            return;
        }
    for (int64_t at = 0; at < C; at += FM_LOSS_BLOCK) {
        int64_t n = fm_min(FM_LOSS_BLOCK, C - at);
        for (int64_t k = 0; k < K; k++) {
            A sum = 0;
            if (named[k] < at || named[k] >= at + n) continue;
            for (int64_t j = 0; j < K; j++)
                if (named[j] == named[k]) sum += weights ? weights[j] : 1;
            F(smoothed)(m, &sum, 1);
            t[named[k] - at] = sum;
        }
        loss += F(block_loss)(m, row, at, n, t);
        for (int64_t k = 0; k < K; k++)
            if (named[k] >= at && named[k] < at + n) t[named[k] - at] = rest;
    }
    if (m->losses) ((A *)m->losses)[row] = (A)(loss * m->class_factor);
    if (!m->slopes) return;
    for (int64_t k = 0; k < K; k++)
        ((A *)m->slopes)[row * K + k] = (A)(F(slope_of)(m, F(fm_wide)(z[named[k]]), named[k]) * (1 - m->smoothing) * m->factor);
}

static void F(hot_chunk)(void *arg, int64_t chunk) {
    const binary *m = arg;
    int64_t step = fm_loss_rows(m->classes), last = fm_min((chunk + 1) * step, m->rows);
    A t[FM_LOSS_BLOCK] __attribute__((aligned(64))), rest = 0;
    F(smoothed)(m, &rest, 1);
    for (int64_t i = 0; i < FM_LOSS_BLOCK && i < m->classes + LANES; i++) t[i] = rest;
    for (int64_t row = chunk * step; row < last; row++) F(hot_row)(m, row, t, rest);
}

/* Dense targets */

static void F(dense_row)(const binary *m, int64_t row) {
    int64_t C = m->classes;
    const fm_dense_target *d = &m->target;
    A t[FM_LOSS_BLOCK];
    double loss = 0;
    if (d->lam && (d->partners[row] < 0 || d->partners[row] >= m->rows || isnan(((const A *)d->lam)[row * d->lam_stride]))) {
        F(wrong_row)(m, row);
        return;
    }
    if (m->losses || m->gradient) {
        for (int64_t at = 0; at < C; at += FM_LOSS_BLOCK) {
            int64_t n = fm_min(FM_LOSS_BLOCK, C - at);
            const A *target = t;
            if (m->smoothing > 0 || !isnan(m->threshold)) {
                F(mixed_target)(t, d, row, at, n);
                F(smoothed)(m, t, n);
            } else {
                target = F(target_of)(t, d, row, at, n);
            }
            loss += F(block_loss)(m, row, at, n, target);
        }
        if (m->losses) ((A *)m->losses)[row] = (A)(loss * m->class_factor);
    }
    if (m->dtarget) {
        const T *z = (const T *)m->logits + row * m->logits_stride;
        double upstream = m->grad_output ? (double)((const A *)m->grad_output)[row * m->grad_output_stride] : 1;
        double factor = upstream * (1 - m->smoothing) * m->factor;
        for (int64_t c = 0; c < C; c++) ((A *)m->dtarget)[row * C + c] = (A)(F(slope_of)(m, F(fm_wide)(z[c]), c) * factor);
    }
}

static void F(dense_chunk)(void *arg, int64_t chunk) {
    const binary *m = arg;
    int64_t step = fm_loss_rows(m->classes), last = fm_min((chunk + 1) * step, m->rows);
    for (int64_t row = chunk * step; row < last; row++) F(dense_row)(m, row);
}

#undef V
#undef LANES
