/* mix_masked of one dtype: included by mix_masked.c. */
#include "spans.h"

#define LANES ((int64_t)(64 / sizeof(A)))
#define MASK_BLOCK (FM_BLOCK + LANES) /* a run is written in whole vectors, over what comes next */

/* Writes the mask's values for n elements of a row from `first` on. */
static void F(mask_block)(const masking *m, int64_t row, int64_t first, int64_t n, A *weights) {
    const A *mask = (const A *)m->mask + row * m->cells.count;
    fm_run r = fm_run_at(&m->cells, first);
    if (m->cells.run == 1) { /* a cell is an element: a line of the mask at a time */
        for (int64_t at = 0, count; at < n; at += count, fm_next_runs(&m->cells, &r, count)) {
            count = fm_min(m->cells.inner_cells - r.inner, n - at);
            if (m->cells.inner_stride == 1)
                memcpy(weights + at, mask + r.cell, (size_t)count * sizeof(A));
            else
                for (int64_t i = 0; i < count; i++) weights[at + i] = mask[r.cell + i * m->cells.inner_stride];
        }
        return;
    }
    for (int64_t at = 0, count; at < n; at += count, fm_next_run(&m->cells, &r)) {
        count = fm_min(r.left, n - at);
        F(fm_vec) value = (F(fm_vec)){0} + mask[r.cell];
        for (int64_t i = 0; i < count; i += LANES) memcpy(weights + at + i, &value, sizeof value);
    }
}

/* Writes n values of a row x from `first` on, moved by plan p of a row. Those of a block that is not there are NaN, and so are their weights. */
static void F(moved_block)(const masking *m, int p, int64_t row, int64_t first, int64_t n, const T *x, T *to, A *weights, fm_line *line) {
    if (fm_cells_are_elements(&m->cells)) { /* 8 times as fast as spans where they are moved one by one */
        int64_t count = m->cells.count;
        for (int64_t at = 0, run; at < n; at += run) {
            int64_t cell = (first + at) % count, there = 1;
            const int64_t *plan = m->plan[p] + row * count + cell;
            const T *from = x + first + at - cell;
            run = fm_min(count - cell, n - at);
            for (int64_t i = 0; i < run; i++) {
                int64_t right = (uint64_t)plan[i] < (uint64_t)count;
                to[at + i] = from[right ? plan[i] : 0];
                there &= right;
            }
            for (int64_t i = 0; !there && i < run; i++)
                if ((uint64_t)plan[i] >= (uint64_t)count) memset(to + at + i, 0xff, sizeof(T)), weights[at + i] = NAN;
        }
        return;
    }
    fm_run r = fm_run_at(&m->cells, first);
    fm_span s;
    for (int64_t at = 0; at < n; at += s.count, fm_next_runs(&m->cells, &r, s.runs)) {
        s = fm_span_at(&m->cells, &r, m->plan[p] + row * m->cells.count, line, n - at);
        if (s.there) {
            fm_copy_span(to + at, x + first + at + s.shift, s.count * (int64_t)sizeof(T));
            continue;
        }
        memset(to + at, 0xff, (size_t)s.count * sizeof(T)); /* NaN in every dtype */
        for (int64_t i = at; i < at + s.count; i++) weights[i] = NAN;
    }
}

static void F(masked_forward_chunk)(void *arg, int64_t chunk) {
    const masking *m = arg;
    fm_chunk k = fm_chunk_of(&m->cut, chunk);
    for (int64_t row = k.first_row; row < k.last_row; row++) {
        int64_t partner = m->index[row * m->index_stride];
        T *out = (T *)m->out + row * m->out_stride;
        if (partner < 0 || partner >= m->cut.rows) {
            memset(out + k.first, 0xff, (size_t)(k.last - k.first) * sizeof(T)); /* NaN in every dtype */
            continue;
        }
        const T *x = (const T *)m->x + row * m->x_stride, *y = (const T *)m->x + partner * m->x_stride;
        fm_line lines[2];
        lines[0].outer_stop = lines[1].outer_stop = 0; /* of no line yet */
        if (m->plan[0]) fm_fetch_row(x, m->cut.numel * (int64_t)sizeof(T));
        if (m->plan[1]) fm_fetch_row(y, m->cut.numel * (int64_t)sizeof(T));
        for (int64_t at = k.first; at < k.last; at += FM_BLOCK) {
            int64_t n = fm_min(FM_BLOCK, k.last - at);
            A weights[MASK_BLOCK], wide_own[FM_BLOCK], wide_other[FM_BLOCK], mixed[FM_BLOCK];
            T moved_own[FM_BLOCK], moved_other[FM_BLOCK];
            F(mask_block)(m, row, at, n, weights);
            if (m->plan[0]) F(moved_block)(m, 0, row, at, n, x, moved_own, weights, &lines[0]);
            if (m->plan[1]) F(moved_block)(m, 1, row, at, n, y, moved_other, weights, &lines[1]);
            const A *own = values(m->plan[0] ? moved_own : x + at, wide_own, n);
            const A *other = values(m->plan[1] ? moved_other : y + at, wide_other, n);
            T block[FM_BLOCK], *row_out = m->streams ? block : out + at;
            A *to = place(row_out, mixed);
            for (int64_t i = 0; i < n; i++) {
                A w = weights[i], sum = F(fm_fma)(w, own[i], (1 - w) * other[i]);
                sum = w == 0 ? other[i] : sum; /* what has weight 0 is not read */
                to[i] = w == 1 ? own[i] : sum;
            }
            stored(row_out, mixed, n);
            if (m->streams) fm_stream(out + at, block, (size_t)n * sizeof(T));
        }
    }
    if (m->streams) fm_streamed();
}

/* Adds the gradient times the mask's values, or one minus them, to the sums. Weights of 0 add nothing. */
static void F(add_masked)(A *sums, const masking *m, int64_t row, int64_t first, int64_t n, int of_partner) {
    A weights[MASK_BLOCK], wide[FM_BLOCK];
    F(mask_block)(m, row, first, n, weights);
    const A *grad = values((const T *)m->grad + row * m->grad_stride + first, wide, n);
    for (int64_t i = 0; i < n; i++) {
        A w = of_partner ? 1 - weights[i] : weights[i], sum = F(fm_fma)(w, grad[i], sums[i]);
        sums[i] = w == 0 ? sums[i] : sum;
    }
}

static void F(masked_dx_chunk)(void *arg, int64_t chunk) {
    const masking *m = arg;
    fm_chunk k = fm_chunk_of(&m->cut, chunk);
    for (int64_t row = k.first_row; row < k.last_row; row++)
        for (int64_t at = k.first; at < k.last; at += FM_BLOCK) {
            int64_t n = fm_min(FM_BLOCK, k.last - at);
            A buffer[FM_BLOCK];
            T *dx = (T *)m->out + row * m->out_stride + at;
            A *sums = place(dx, buffer);
            for (int64_t i = 0; i < n; i++) sums[i] = 0;
            F(add_masked)(sums, m, row, at, n, 0);
            for (int64_t p = m->offsets[row]; p < m->offsets[row + 1]; p++) F(add_masked)(sums, m, m->order[p], at, n, 1);
            stored(dx, buffer, n);
        }
}

/* Adds the gradient of a period of a row times the mask's values, or one minus them, to the sums of where its values came from. */
static void F(add_moved)(A *sums, const masking *m, int64_t row, int64_t first, int of_partner) {
    const int64_t *plan = m->plan[of_partner] ? m->plan[of_partner] + row * m->cells.count : NULL;
    fm_line line;
    line.outer_stop = 0; /* of no line yet */
    for (int64_t at = 0; at < m->period; at += FM_BLOCK) {
        int64_t n = fm_min(FM_BLOCK, m->period - at);
        if (!plan) {
            F(add_masked)(sums + at, m, row, first + at, n, of_partner);
            continue;
        }
        A weights[MASK_BLOCK], wide[FM_BLOCK];
        F(mask_block)(m, row, first + at, n, weights);
        const A *grad = values((const T *)m->grad + row * m->grad_stride + first + at, wide, n);
        fm_run r = fm_run_at(&m->cells, first + at);
        fm_span s;
        for (int64_t from = 0; from < n; from += s.count, fm_next_runs(&m->cells, &r, s.runs)) {
            s = fm_span_at(&m->cells, &r, plan, &line, n - from);
            A *to = sums + at + from + s.shift;
            for (int64_t i = 0; s.there && i < s.count; i++) {
                A w = of_partner ? 1 - weights[from + i] : weights[from + i], sum = F(fm_fma)(w, grad[from + i], to[i]);
                to[i] = w == 0 ? to[i] : sum;
            }
        }
    }
}

/* The chunks are periods of rows: blocks come from anywhere in them. */
static void F(moved_dx_chunk)(void *arg, int64_t chunk) {
    masking *m = arg;
    int64_t periods = m->cut.numel / m->period, row = chunk / periods, first = chunk % periods * m->period;
    T *dx = (T *)m->out + row * m->out_stride + first;
    A *buffer = sizeof(T) == sizeof(A) ? NULL : malloc((size_t)m->period * sizeof(A));
    if (sizeof(T) != sizeof(A) && !buffer) {
        m->failed = 1;
        return;
    }
    A *sums = place(dx, buffer);
    for (int64_t i = 0; i < m->period; i++) sums[i] = 0;
    F(add_moved)(sums, m, row, first, 0);
    for (int64_t p = m->offsets[row]; p < m->offsets[row + 1]; p++) F(add_moved)(sums, m, m->order[p], first, 1);
    stored(dx, buffer, m->period);
    free(buffer);
}

/* The chunks are rows: a cell is added up over the whole row. */
static void F(masked_dmask_chunk)(void *arg, int64_t row) {
    const masking *m = arg;
    int64_t partner = m->index[row * m->index_stride];
    double *sums = m->sums + row * m->cells.count;
    for (int64_t i = 0; i < m->cells.count; i++) sums[i] = partner < 0 || partner >= m->cut.rows ? NAN : 0;
    if (partner < 0 || partner >= m->cut.rows) return;
    const T *g = (const T *)m->grad + row * m->grad_stride;
    const T *x = (const T *)m->x + row * m->x_stride, *y = (const T *)m->x + partner * m->x_stride;
    fm_line lines[2];
    lines[0].outer_stop = lines[1].outer_stop = 0; /* of no line yet */
    for (int64_t at = 0; at < m->cut.numel; at += FM_BLOCK) {
        int64_t n = fm_min(FM_BLOCK, m->cut.numel - at);
        A wide_g[FM_BLOCK], wide_x[FM_BLOCK], wide_y[FM_BLOCK], unused[MASK_BLOCK];
        T moved_own[FM_BLOCK], moved_other[FM_BLOCK];
        if (m->plan[0]) F(moved_block)(m, 0, row, at, n, x, moved_own, unused, &lines[0]);
        if (m->plan[1]) F(moved_block)(m, 1, row, at, n, y, moved_other, unused, &lines[1]);
        const A *grad = values(g + at, wide_g, n), *own = values(m->plan[0] ? moved_own : x + at, wide_x, n);
        const A *other = values(m->plan[1] ? moved_other : y + at, wide_y, n);
        if (m->cells.run == 1 && m->cells.inner_stride == 1) {
            for (int64_t from = 0, count; from < n; from += count) {
                fm_run r = fm_run_at(&m->cells, at + from);
                count = fm_min(m->cells.inner_cells - r.inner, n - from);
                for (int64_t i = 0; i < count; i++) sums[r.cell + i] += grad[from + i] * (own[from + i] - other[from + i]);
            }
            continue;
        }
        fm_run r = fm_run_at(&m->cells, at);
        for (int64_t from = 0; from < n; fm_next_run(&m->cells, &r)) {
            int64_t count = fm_min(r.left, n - from);
            if (count < 16)
                for (int64_t i = from; i < from + count; i++) sums[r.cell] += grad[i] * (own[i] - other[i]);
            else
                sums[r.cell] += F(fm_sum_products)(grad + from, own + from, other + from, count);
            from += count;
        }
    }
}

#undef LANES
#undef MASK_BLOCK
