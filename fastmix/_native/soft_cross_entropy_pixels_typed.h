/* soft_cross_entropy of logits [N, C, I], whose pixels lie side by side, in one dtype: included by soft_cross_entropy_typed.h.
 *
 * A tile of pixels is read once, class by class, and waits in [C, FM_TILE], which stays in the second cache: for its maxima, for the
 * exponentials, which take its place, and for the gradient. */
#define VECTORS (FM_TILE / LANES)

FM_INLINE void F(load_tile)(V *v, const T *z, int64_t count) {
    for (int k = 0; k < VECTORS; k++) {
        int64_t part = fm_min(fm_max(count - k * LANES, 0), LANES);
        v[k] = F(load_lanes)(z + k * LANES, count == FM_TILE ? LANES : part, 0);
    }
}

FM_INLINE void F(store_tile)(T *out, int64_t count, const V *v) {
    for (int k = 0; k < VECTORS; k++) {
        int64_t part = fm_min(fm_max(count - k * LANES, 0), LANES);
        F(store_lanes)(out + k * LANES, count == FM_TILE ? LANES : part, v[k]);
    }
}

FM_INLINE void F(wide_tile)(V *v, const A *from) { memcpy(v, from, FM_TILE * sizeof(A)); }

static void F(add_tile)(double *total, const V *v) {
    A lanes[FM_TILE];
    memcpy(lanes, v, sizeof lanes);
    for (int l = 0; l < FM_TILE; l++) total[l] += (double)lanes[l];
}

/* Copies a tile to `waiting`, and takes each pixel's largest logit; NaN is passed over. */
static void F(tile_max)(const cross_entropy *m, const T *z, int64_t count, A *waiting, A *max) {
    V largest[VECTORS], v[VECTORS];
    for (int k = 0; k < VECTORS; k++) largest[k] = (V){0} - (A)INFINITY;
    for (int64_t c = 0; c < m->classes; c++) {
        F(load_tile)(v, z + c * m->pixels, count);
        memcpy(waiting + c * FM_TILE, v, sizeof v);
        for (int k = 0; k < VECTORS; k++) largest[k] = F(fm_max)(v[k], largest[k]);
    }
    memcpy(max, largest, sizeof largest);
}

/* Replaces what waits by exp(z - max), and sums it. */
static void F(tile_exps)(const cross_entropy *m, const T *z, const T *out, A *waiting, const A *max, double *sum) {
    V top[VECTORS], v[VECTORS];
    F(wide_tile)(top, max);
    memset(sum, 0, FM_TILE * sizeof(double));
    for (int64_t at = 0; at < m->classes; at += FM_GROUP) {
        V group[VECTORS] = {0};
        for (int64_t c = at; c < fm_min(at + FM_GROUP, m->classes); c++) {
            F(wide_tile)(v, waiting + c * FM_TILE);
            for (int64_t l = 0; l < FM_TILE * (int64_t)sizeof(T); l += 64) { /* the tile that comes next, and where the gradient goes */
                __builtin_prefetch((const char *)(z + c * m->pixels + FM_TILE) + l);
                if (out) __builtin_prefetch((const char *)(out + c * m->pixels) + l, 1);
            }
            for (int k = 0; k < VECTORS; k++) {
                v[k] = F(fm_exp)(v[k] - top[k]);
                group[k] += v[k];
            }
            memcpy(waiting + c * FM_TILE, v, sizeof v);
        }
        F(add_tile)(sum, group);
    }
}

/* The sum of w*(max - z) of each pixel, without the classes of weight 0. */
static void F(tile_logit_sums)(const cross_entropy *m, const A *waiting, const A *max, double *sum) {
    const A *w = m->class_weight;
    V top[VECTORS], v[VECTORS];
    F(wide_tile)(top, max);
    memset(sum, 0, FM_TILE * sizeof(double));
    for (int64_t at = 0; at < m->classes; at += FM_GROUP) {
        V group[VECTORS] = {0};
        for (int64_t c = at; c < fm_min(at + FM_GROUP, m->classes); c++) {
            if (w && w[c] == 0) continue;
            F(wide_tile)(v, waiting + c * FM_TILE);
            for (int k = 0; k < VECTORS; k++) group[k] += (w ? w[c] : 1) * (top[k] - v[k]);
        }
        F(add_tile)(sum, group);
    }
}

/* v = exp(z - max) of class c: what waits, or in a backward formed anew. */
FM_INLINE void F(exp_tile)(V *v, const cross_entropy *m, const T *z, int64_t c, int64_t count, const A *waiting, const V *top) {
    if (!m->backward) {
        F(wide_tile)(v, waiting + c * FM_TILE);
        return;
    }
    F(load_tile)(v, z + c * m->pixels, count);
    for (int k = 0; k < VECTORS; k++) v[k] = F(fm_exp)(v[k] - top[k]);
}

/* The numbers of each pixel of a tile. */
typedef struct {
    A max[FM_TILE], log[FM_TILE], scale[FM_TILE], smooth[FM_TILE]; /* scale: of the exponentials in the gradient; 0: it is 0 */
    double sum[FM_TILE], more[FM_TILE];           /* of exponentials; more: the sum of w*(max - z) or of the target */
} F(pixel_tile);

/* Rounds the sums as the stats hold them, and takes their logarithms. */
static void F(tile_logs)(F(pixel_tile) *t) {
    V v[VECTORS];
    for (int p = 0; p < FM_TILE; p++) t->log[p] = (A)t->sum[p];
    for (int p = 0; p < FM_TILE; p++) t->sum[p] = (double)t->log[p];
    F(wide_tile)(v, t->log);
    for (int k = 0; k < VECTORS; k++) v[k] = F(fm_log)(v[k]);
    memcpy(t->log, v, sizeof v);
}

static void F(hot_tile)(const cross_entropy *m, int64_t image, int64_t first, int64_t count, A *waiting) {
    int64_t I = m->pixels, row = image * I + first;
    const T *z = (const T *)m->logits + image * m->logits_stride + first;
    T *out = m->gradient ? (T *)m->gradient + image * m->gradient_stride + first : NULL;
    const A *w = m->class_weight, *stats = m->stats;
    F(pixel_tile) t = {0};
    F(hot_slope) slopes[FM_TILE];
    F(hot_place) place;
    V top[VECTORS], scale[VECTORS], smooth[VECTORS], v[VECTORS];
    if (!m->backward) {
        F(tile_max)(m, z, count, waiting, t.max);
        if (m->smoothing > 0) F(tile_logit_sums)(m, waiting, t.max, t.more);
        F(tile_exps)(m, z, out, waiting, t.max, t.sum);
    }
    for (int64_t p = 0; p < count && m->backward; p++) t.max[p] = stats[row + p], t.sum[p] = (double)stats[m->rows + row + p];
    F(tile_logs)(&t);
    for (int64_t p = 0; p < count; p++) {
        F(set_place)(&place, m, z + p, row + p, image, first + p);
        slopes[p] = F(hot_terms)(m, &place, t.max[p], t.sum[p], (double)t.log[p], t.more[p]);
        t.scale[p] = slopes[p].wrong ? (A)NAN : slopes[p].idle ? 0 : (A)slopes[p].of_sum;
        t.smooth[p] = (A)slopes[p].smooth;
    }
    if (!out) return;
    F(wide_tile)(top, t.max), F(wide_tile)(scale, t.scale), F(wide_tile)(smooth, t.smooth);
    for (int64_t c = 0; c < m->classes; c++) {
        F(exp_tile)(v, m, z, c, count, waiting, top);
        for (int k = 0; k < VECTORS; k++) {
            v[k] = F(fm_times)(scale[k], v[k]);
            if (m->smoothing > 0) v[k] -= F(fm_times)(smooth[k], (V){0} + (w ? w[c] : 1));
        }
        F(store_tile)(out + c * I, count, v);
    }
    for (int64_t p = 0; p < count; p++) {
        if (slopes[p].wrong || slopes[p].idle) continue;
        F(set_place)(&place, m, z + p, row + p, image, first + p);
        if (!m->backward) F(keep_exps)(&place, m, waiting + p, FM_TILE);
        F(hot_gradient)(m, &place, &slopes[p], t.max[p], out + p);
    }
}

/* Dense targets */

/* Writes t' of a class to the tile t, and 0 behind its pixels. */
static void F(smoothed_tile)(A *t, const cross_entropy *m, int64_t image, int64_t c, int64_t first, int64_t count) {
    F(mixed_target)(t, &m->target, image, c * m->pixels + first, count);
    A keep = (A)(1 - m->smoothing), add = (A)(m->smoothing / (double)m->classes);
    A w = m->class_weight ? ((const A *)m->class_weight)[c] : 1;
    for (int64_t p = 0; p < count; p++) {
        A value = c == m->ignore_index ? 0 : t[p];
        if (m->smoothing > 0) value = value * keep + add;
        t[p] = w == 0 ? 0 : w * value;
    }
    for (int64_t p = count; p < FM_TILE; p++) t[p] = 0;
}

/* The sums of t' and of t'*(z - max) of each pixel. */
static void F(tile_products)(const cross_entropy *m, const A *targets, const A *waiting, const A *max, double *weights, double *scaled) {
    V top[VECTORS], v[VECTORS], t[VECTORS];
    F(wide_tile)(top, max);
    for (int64_t at = 0; at < m->classes; at += FM_GROUP) {
        V sums[VECTORS] = {0}, products[VECTORS] = {0};
        for (int64_t c = at; c < fm_min(at + FM_GROUP, m->classes); c++) {
            F(wide_tile)(v, waiting + c * FM_TILE), F(wide_tile)(t, targets + c * FM_TILE);
            for (int k = 0; k < VECTORS; k++) {
                sums[k] += t[k];
                products[k] += F(fm_times)(t[k], v[k] - top[k]);
            }
        }
        F(add_tile)(weights, sums), F(add_tile)(scaled, products);
    }
}

/* The gradient to the target of a tile. */
static void F(dtarget_tile)(const cross_entropy *m, const T *z, A *dtarget, int64_t count, const F(pixel_tile) *t, const double *factor) {
    for (int64_t c = 0; c < m->classes; c++) {
        double w = m->class_weight ? (double)((const A *)m->class_weight)[c] : 1;
        w = c == m->ignore_index ? 0 : w * (1 - m->smoothing);
        for (int64_t p = 0; p < count; p++) {
            double nll = (double)t->log[p] + (double)(A)(t->max[p] - F(fm_wide)(z[c * m->pixels + p]));
            dtarget[c * m->pixels + p] = w == 0 ? 0 : (A)(w * nll * factor[p]);
        }
    }
}

static void F(dense_tile)(const cross_entropy *m, int64_t image, int64_t first, int64_t count, A *waiting) {
    int64_t I = m->pixels, row = image * I + first, images = m->rows / I;
    const T *z = (const T *)m->logits + image * m->logits_stride + first;
    T *out = m->gradient ? (T *)m->gradient + image * m->gradient_stride + first : NULL;
    A *stats = m->stats, *targets = waiting + m->classes * FM_TILE;
    int wrong = m->target.lam && (m->target.partners[image] < 0 || m->target.partners[image] >= images);
    F(pixel_tile) t = {0};
    double scaled[FM_TILE] = {0}, factor[FM_TILE] = {0};
    V top[VECTORS], scale[VECTORS], by[VECTORS], v[VECTORS], target[VECTORS];
    for (int64_t c = 0; !wrong && (out || !m->backward) && c < m->classes; c++)
        F(smoothed_tile)(targets + c * FM_TILE, m, image, c, first, count);
    if (!m->backward) {
        F(tile_max)(m, z, count, waiting, t.max);
        if (!wrong) F(tile_products)(m, targets, waiting, t.max, t.more, scaled);
        F(tile_exps)(m, z, out, waiting, t.max, t.sum);
    }
    for (int64_t p = 0; p < count && m->backward; p++) {
        t.max[p] = stats[row + p];
        t.sum[p] = (double)stats[m->rows + row + p];
        t.more[p] = (double)stats[2 * m->rows + row + p];
    }
    F(tile_logs)(&t);
    for (int64_t p = 0; p < count; p++) {
        if (!m->backward && wrong) {
            F(wrong_row)(m, row + p, t.max[p], 1);
        } else if (!m->backward) {
            t.more[p] = (double)(A)t.more[p];
            ((A *)m->losses)[row + p] = (A)((t.more[p] == 0 ? 0 : t.more[p] * (double)t.log[p]) - scaled[p]);
            stats[row + p] = t.max[p];
            stats[m->rows + row + p] = (A)t.sum[p];
            stats[2 * m->rows + row + p] = (A)t.more[p];
        }
        factor[p] = F(upstream_of)(m, row + p) / m->denominator;
        t.scale[p] = wrong ? (A)NAN : t.more[p] == 0 ? 0 : (A)(t.more[p] / t.sum[p] * factor[p]);
        t.smooth[p] = (A)factor[p];
    }
    F(wide_tile)(top, t.max), F(wide_tile)(scale, t.scale), F(wide_tile)(by, t.smooth);
    for (int64_t c = 0; out && c < m->classes; c++) {
        F(exp_tile)(v, m, z, c, count, waiting, top);
        if (!wrong) F(wide_tile)(target, targets + c * FM_TILE);
        for (int k = 0; k < VECTORS; k++) {
            v[k] = F(fm_times)(scale[k], v[k]);
            if (!wrong) v[k] -= F(fm_times)(target[k], by[k]);
        }
        F(store_tile)(out + c * I, count, v);
    }
    if (m->dtarget) F(dtarget_tile)(m, z, (A *)m->dtarget + image * m->classes * I + first, count, &t, factor);
}

static void F(pixel_chunk)(void *arg, int64_t chunk) {
    cross_entropy *m = arg;
    int64_t tiles = fm_tiles(m->pixels), step = fm_loss_rows(m->classes * FM_TILE), last = fm_min((chunk + 1) * step, m->rows / m->pixels * tiles);
    A *waiting = fm_scratch(m, m->classes * FM_TILE * (m->dense ? 2 : 1) * (int64_t)sizeof(A));
    if (!waiting) return;
    for (int64_t tile = chunk * step; tile < last; tile++) {
        int64_t first = tile % tiles * FM_TILE, count = fm_min(FM_TILE, m->pixels - first);
        (m->dense ? F(dense_tile) : F(hot_tile))(m, tile / tiles, first, count, waiting);
    }
    free(waiting);
}

#undef VECTORS
