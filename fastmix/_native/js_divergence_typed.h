/* js_divergence of one dtype: included by js_divergence.c. */
#include "losses_typed.h"

#define TINY ((A)(sizeof(A) == 8 ? 0x1p-1022 : 0x1p-126))

/* One row of all sets. p and log_ratio = log(p/m) are [K, width], 0 behind the classes. */
typedef struct {
    const T *z[MOST_SETS];
    A max[MOST_SETS], exp_sum[MOST_SETS];
    A *p, *log_ratio;
    int64_t K, C, width;
    double kl[MOST_SETS], loss; /* the sum over sets of KL(p_k || m) */
} F(js_row);

FM_INLINE V F(wide)(const A *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Writes exp(z - max) of a set to p, and returns the sum. What comes next of the logits is fetched meanwhile. */
static double F(js_exps)(const T *z, A *p, A max, int64_t n) {
    V sum = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        int64_t part = fm_min(LANES, n - i);
        V v = F(fm_exp)(F(load_lanes)(z + i, part, max) - max);
        __builtin_prefetch(z + i + FM_AHEAD);
        if (part < LANES) v = F(first_lanes)(v, part);
        memcpy(p + i, &v, sizeof v);
        sum += v;
    }
    return F(fm_sum)(sum);
}

FM_INLINE V F(sum_of_sets)(const F(js_row) *r, int64_t i) {
    V sum = {0};
    for (int64_t k = 0; k < r->K; k++) sum += F(wide)(r->p + k * r->width + i);
    return sum;
}

/* Makes the exponentials of `count` vectors probabilities, and writes their ratios' logarithms. Adds to kl, and widens [*low, *high] to the ratios. */
FM_INLINE void F(js_logs)(const F(js_row) *r, int64_t i, const A *scale, V *kl, V *low, V *high, int count) {
    V sum[4] = {{0}}, inverse[4], ratio[4];
    for (int64_t k = 0; k < r->K; k++)
        for (int j = 0; j < count; j++) {
            V *at = (V *)(r->p + k * r->width + i) + j;
            *at *= scale[k];
            sum[j] += *at;
        }
    /* 1/m: a rounded 1/K would shift all ratios, and K over less is inf */
    for (int j = 0; j < count; j++) inverse[j] = (A)r->K / F(fm_max)((V){0} + TINY * MOST_SETS, sum[j]);
    for (int64_t k = 0; k < r->K; k++) {
        V *p = (V *)(r->p + k * r->width + i), *log_ratio = (V *)(r->log_ratio + k * r->width + i);
        for (int j = 0; j < count; j++) {
            ratio[j] = F(fm_select)(sum[j] == 0, (V){0} + 1, p[j] * inverse[j]);
            *low = F(fm_min)(ratio[j], *low);
            *high = F(fm_max)(ratio[j], *high);
            ratio[j] = F(fm_max)((V){0} + TINY, ratio[j]); /* finite where p is 0, so that p*log_ratio is 0 there; NaN is lost here */
        }
        F(fm_logs)(ratio, (V){0}, count);
        for (int j = 0; j < count; j++) {
            log_ratio[j] = ratio[j];
            kl[k] += p[j] * ratio[j];
        }
    }
}

/* The same of the whole row. Returns whether all ratios are near 1. */
static int F(js_ratios)(F(js_row) *r) {
    V low = (V){0} + 2, high = {0};
    A scale[MOST_SETS];
    for (int64_t k = 0; k < r->K; k++) scale[k] = (A)(1 / (double)r->exp_sum[k]);
    for (int64_t at = 0; at < r->width; at += FM_LOSS_BLOCK) {
        V kl[MOST_SETS] = {{0}};
        int64_t i = at, end = fm_min(at + FM_LOSS_BLOCK, r->width);
        for (; i + 4 * LANES <= end; i += 4 * LANES) F(js_logs)(r, i, scale, kl, &low, &high, 4);
        for (; i < end; i += LANES) F(js_logs)(r, i, scale, kl, &low, &high, 1);
        for (int64_t k = 0; k < r->K; k++) r->kl[k] += F(fm_sum)(kl[k]);
    }
    for (int64_t k = 0; k < r->K; k++) r->loss += r->kl[k];
    for (int64_t k = 0; k < r->K && isnan(r->loss); k++) r->kl[k] = NAN; /* a set with NaN makes all gradients NaN */
    return F(fm_largest)(-low) < (A)-0.8 && F(fm_largest)(high) < (A)1.25;
}

/* u = p/m - 1 gives log(1+u), and *excess = (1+u)*log(1+u) - u, by the series of 2*atanh(s), s = u/(2 + u): nothing cancels. */
FM_INLINE V F(log_series)(V u, V *excess) {
    int terms = sizeof(A) == 8 ? 9 : 4;
    V s = u / (u + 2), square = s * s, sum = (V){0} + (A)(1.0 / (2 * terms + 1));
    for (int n = terms - 1; n > 0; n--) sum = sum * square + (A)(1.0 / (2 * n + 1));
    *excess = ((s + square) * sum + 1) * s * u;
    return (square * sum + 1) * s * 2;
}

/* The same of a row whose sets are nearly equal. The logits are compared with the first set's, with the bits that z - max rounds off; the sums
 * over classes give no more than a factor. */
static void F(js_near)(F(js_row) *r) {
    A more[MOST_SETS], by_sets = (A)(1 / (double)r->K), largest = 0;
    for (int64_t k = 0; k < r->K; k++) largest = r->exp_sum[k] > largest ? r->exp_sum[k] : largest;
    for (int64_t k = 0; k < r->K; k++) {
        more[k] = (A)((double)largest / (double)r->exp_sum[k] - 1);
        r->kl[k] = 0;
    }
    r->loss = 0;
    for (int64_t at = 0; at < r->width; at += FM_LOSS_BLOCK) {
        V kl[MOST_SETS] = {{0}}, loss = {0};
        for (int64_t i = at; i < fm_min(at + FM_LOSS_BLOCK, r->width); i += LANES) {
            int64_t part = fm_min(LANES, r->C - i);
            V m = F(sum_of_sets)(r, i) * by_sets, first = {0}, first_lost = {0}, mean = {0}, v[MOST_SETS];
            for (int64_t k = 0; k < r->K; k++) {
                V z = F(load_lanes)(r->z[k] + i, part, r->max[k]), max = (V){0} + r->max[k];
                V shifted = z - max, back = shifted - z, lost = (z - (shifted - back)) - (max + back);
                if (!k) first = shifted, first_lost = lost;
                v[k] = F(fm_expm1)((shifted - first) + (lost - first_lost));
                v[k] = F(fm_vfma)(v[k] + 1, (V){0} + more[k], v[k]);
                v[k] = F(fm_select)(m == 0, (V){0}, v[k]);
                mean += v[k];
            }
            mean *= by_sets;
            for (int64_t k = 0; k < r->K; k++) {
                V excess, u = (v[k] - mean) / (mean + 1), p = F(fm_vfma)(m, u, m), log_ratio = F(log_series)(u, &excess);
                memcpy(r->p + k * r->width + i, &p, sizeof p);
                memcpy(r->log_ratio + k * r->width + i, &log_ratio, sizeof log_ratio);
                kl[k] += p * log_ratio;
                loss += excess * m;
            }
        }
        for (int64_t k = 0; k < r->K; k++) r->kl[k] += F(fm_sum)(kl[k]);
        r->loss += F(fm_sum)(loss);
    }
}

static void F(js_gradient)(const F(js_row) *r, int64_t k, T *out, A kl, A factor) {
    const A *p = r->p + k * r->width, *log_ratio = r->log_ratio + k * r->width;
    for (int64_t i = 0; i < r->C; i += LANES) {
        V g = (F(wide)(log_ratio + i) - kl) * F(wide)(p + i);
        F(store_lanes)(out + i, fm_min(LANES, r->C - i), F(fm_times)(g, (V){0} + factor));
    }
}

static void F(js_one)(const divergence *m, int64_t row, F(js_row) *r) {
    A *stats = m->stats;
    int64_t K = m->sets, N = m->rows;
    for (int64_t k = 0; k < K; k++) {
        r->z[k] = (const T *)m->logits[k] + row * m->strides[k];
        r->max[k] = m->backward ? stats[k * N + row] : F(row_max)(r->z[k], r->C);
        r->exp_sum[k] = (A)F(js_exps)(r->z[k], r->p + k * r->width, r->max[k], r->C);
        if (m->backward) r->exp_sum[k] = stats[(K + k) * N + row];
        r->kl[k] = 0;
    }
    r->loss = 0;
    if (F(js_ratios)(r)) F(js_near)(r);
    if (!m->backward) ((A *)m->losses)[row] = (A)(r->loss * m->scale / (double)K);
    double upstream = m->grad_output ? (double)((const A *)m->grad_output)[row * m->grad_output_stride] : 1;
    for (int64_t k = 0; k < K; k++) {
        A kl = m->backward ? stats[(2 * K + k) * N + row] : (A)r->kl[k];
        if (stats && !m->backward) {
            stats[k * N + row] = r->max[k];
            stats[(K + k) * N + row] = r->exp_sum[k];
            stats[(2 * K + k) * N + row] = kl;
        }
        if (m->gradients && m->gradients[k])
            F(js_gradient)(r, k, (T *)m->gradients[k] + row * r->C, kl, (A)(m->factor * upstream));
    }
}

static void F(js_chunk)(void *arg, int64_t chunk) {
    divergence *m = arg;
    int64_t step = fm_loss_rows(m->sets * m->classes), last = fm_min((chunk + 1) * step, m->rows);
    F(js_row) r = {.K = m->sets, .C = m->classes, .width = (m->classes + LANES - 1) & -LANES};
    r.p = aligned_alloc(64, (size_t)(2 * r.K * r.width) * sizeof(A));
    r.log_ratio = r.p + r.K * r.width;
    if (!r.p) m->failed = 1;
    for (int64_t row = chunk * step; r.p && row < last; row++) F(js_one)(m, row, &r);
    free(r.p);
}

#undef V
#undef LANES
#undef TINY
