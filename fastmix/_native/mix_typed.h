/* mix of one dtype: included by mix.c. */
#include "spans.h"

/* to = fma(a, x, b*y), the one order in which every backend mixes two values; widened and rounded in registers. */
FM_INLINE void F(fm_mix_stored)(T *to, const T *x, const T *y, A a, A b, int64_t n, int streams) {
    const int64_t lanes = 64 / sizeof(A);
    const F(fm_vec) zero = {0}, own = zero + a, other = zero + b;
    int64_t i = F(mix_pairs)(to, x, y, a, b, n, streams);
    for (; i + lanes <= n; i += lanes) {
        F(fm_vec) v = F(fm_vfma)(own, F(fm_load)(x + i), other * F(fm_load)(y + i));
        if (streams)
            F(stream)(to + i, v);
        else
            F(fm_store)(to + i, v);
    }
    if (i < n)
        F(fm_store_part)(to + i, n - i, F(fm_vfma)(own, F(fm_load_part)(x + i, n - i, 0), other * F(fm_load_part)(y + i, n - i, 0)));
}

/* Mixes n elements of a row with those of its partner. A value of weight 0 is not read, and the other one is copied. */
static void F(mix_span)(T *out, const T *x, const T *y, A lam, int64_t n, int streams) {
    A other = 1 - lam;
    if (other == 0 || lam == 0) {
        const T *from = lam == 0 ? y : x;
        if (streams)
            fm_stream(out, from, (size_t)n * sizeof(T));
        else
            memcpy(out, from, (size_t)n * sizeof(T));
        return;
    }
    for (int64_t at = 0; at < n; at += FM_BLOCK) {
        T block[FM_BLOCK], *to = streams ? block : out + at;
        int64_t count = fm_min(FM_BLOCK, n - at);
        if (streams && count == FM_BLOCK && mix_streams(out + at)) {
            F(fm_mix_stored)(out + at, x + at, y + at, lam, other, FM_BLOCK, 1);
            continue;
        }
        F(fm_mix_stored)(to, x + at, y + at, lam, other, count, 0);
        if (streams) fm_stream(out + at, block, (size_t)count * sizeof(T));
    }
}

/* Mixes the elements [first, last) of a row; y is the partner's row. Past the caches whole blocks are written: a cache line that is written in
 * parts there takes 3 times as long. */
static void F(mix_row)(const mixing *m, int64_t row, const T *x, const T *y, T *out, A lam, int64_t first, int64_t last) {
    int64_t from, to;
    int inside;
    if (!m->boxes.boxes) {
        F(mix_span)(out + first, x + first, y + first, lam, last - first, m->streams);
        return;
    }
    for (int64_t end; first < last; first = end) {
        T block[FM_BLOCK], *target = m->streams ? block : out + first;
        end = m->streams ? fm_min(first + FM_BLOCK, last) : last;
        fm_parts parts = fm_parts_of(&m->boxes, row, first, end);
        while (fm_next_part(&parts, &from, &to, &inside))
            F(mix_span)(target + (from - first), x + from, y + from, inside ? 0 : lam, to - from, 0);
        if (m->streams) fm_stream(out + first, block, (size_t)(end - first) * sizeof(T));
    }
}

static void F(forward_chunk)(void *arg, int64_t chunk) {
    const mixing *m = arg;
    fm_chunk k = fm_chunk_of(&m->cut, chunk);
    for (int64_t row = k.first_row; row < k.last_row; row++) {
        const T *x = (const T *)m->x + row * m->x_stride;
        T *out = (T *)m->out + row * m->out_stride;
        int64_t partner = m->index[row * m->index_stride];
        A lam = ((const A *)m->lam)[row * m->lam_stride];
        if (partner < 0 || partner >= m->cut.rows) {
            memset(out + k.first, 0xff, (size_t)(k.last - k.first) * sizeof(T)); /* NaN in every dtype */
            continue;
        }
        const T *y = (const T *)m->x + partner * m->x_stride;
        F(mix_row)(m, row, x, y, out, lam, k.first, k.last);
    }
    if (m->streams) fm_streamed();
}

/* Adds a row's gradient, times its weight outside and inside its box, to the sums of the elements [first, last). Weights of 0 add
 * nothing. */
static void F(add_row)(A *sums, const T *g, const mixing *m, int64_t row, int64_t first, int64_t last, A outside, A within) {
    A buffer[FM_BLOCK];
    int64_t from, to;
    int inside;
    fm_parts parts = fm_parts_of(&m->boxes, row, first, last);
    while (fm_next_part(&parts, &from, &to, &inside)) {
        A weight = inside ? within : outside;
        if (weight != 0) F(fm_add_values)(sums + from - first, values(g + from, buffer, to - from), weight, to - from);
    }
}

static void F(dx_of_row)(const mixing *m, int64_t row, int64_t first, int64_t last) {
    const T *grad = m->grad;
    const A *lam = m->lam;
    T *dx = (T *)m->out + row * m->out_stride;
    for (; first < last; first += FM_BLOCK) {
        A buffer[FM_BLOCK];
        int64_t end = fm_min(first + FM_BLOCK, last), n = end - first;
        T block[FM_BLOCK], *to = m->streams ? block : dx + first;
        A *sums = place(to, buffer), own = lam[row * m->lam_stride];
        if (m->boxes.boxes || own == 0) {
            for (int64_t i = 0; i < n; i++) sums[i] = 0;
            F(add_row)(sums, grad + row * m->grad_stride, m, row, first, end, own, 0);
        } else {
            A wide[FM_BLOCK];
            F(fm_scale_values)(sums, values(grad + row * m->grad_stride + first, wide, n), own, n);
        }
        for (int64_t p = m->offsets[row]; p < m->offsets[row + 1]; p++) {
            int64_t k = m->order[p];
            F(add_row)(sums, grad + k * m->grad_stride, m, k, first, end, 1 - lam[k * m->lam_stride], 1);
        }
        stored(to, buffer, n);
        if (m->streams) fm_stream(dx + first, block, (size_t)n * sizeof(T));
    }
}

static double F(dlam_of_row)(const mixing *m, int64_t row, int64_t partner, int64_t first, int64_t last) {
    const T *g = (const T *)m->grad + row * m->grad_stride;
    const T *x = (const T *)m->x + row * m->x_stride, *y = (const T *)m->x + partner * m->x_stride;
    double total = 0;
    int64_t from, to;
    int inside;
    fm_parts parts = fm_parts_of(&m->boxes, row, first, last);
    while (fm_next_part(&parts, &from, &to, &inside))
        for (; !inside && from < to; from += FM_BLOCK) {
            A grad[FM_BLOCK], own[FM_BLOCK], other[FM_BLOCK];
            int64_t n = fm_min(FM_BLOCK, to - from);
            total += F(fm_sum_products)(values(g + from, grad, n), values(x + from, own, n), values(y + from, other, n), n);
        }
    return total;
}

static void F(backward_chunk)(void *arg, int64_t chunk) {
    const mixing *m = arg;
    fm_chunk k = fm_chunk_of(&m->cut, chunk);
    for (int64_t row = k.first_row; m->out && row < k.last_row; row++) F(dx_of_row)(m, row, k.first, k.last);
    if (m->out && m->streams) fm_streamed();
    for (int64_t row = k.first_row; m->partial && row < k.last_row; row++) {
        int64_t partner = m->index[row * m->index_stride];
        int right = partner >= 0 && partner < m->cut.rows;
        m->partial[k.piece * m->cut.rows + row] = right ? F(dlam_of_row)(m, row, partner, k.first, k.last) : NAN;
    }
}
