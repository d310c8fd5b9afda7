/* mix_masked: out[i]   = m*x[i] + (1-m)*x[index[i]], m the value of the element's cell in mask[i], blocks moved by the plans
 *             dx[i]    = m*g[i] + the sum of (1-m)*g[k] over the k with index[k] = i, in their order
 *             dmask[i] = the sums over each cell of g[i]*(x[i] - x[index[i]])
 *
 * Rows are as in mix.c. mask and dmask [rows, cells] have the dtype of the arithmetic. Gradients go back to where the plans took values from. */
#include <stdlib.h>

#include "rows.h"
#include "vectors.h"

/* How a mask lies over a row in memory. A line holds the elements that follow each other along the inner side of the image, and of each
 * cell a run of it. */
typedef struct {
    int64_t line, run, inner_cells;
    int64_t outer_step, outer_size, outer_cell; /* elements from one place on the outer side to the next; places; places of a cell */
    int64_t inner_stride, outer_stride;         /* from cell to cell in the mask */
    int64_t count;                              /* of the cells */
    double inverse;                             /* of the number that a block's two places are divided by */
} fm_cells;

/* A run, or what is left of it from an element on. Lines that begin before `outer_stop` have the same outer cell. */
typedef struct { int64_t element, left, inner, outer, cell, outer_stop; } fm_run;

static inline void locate_line(const fm_cells *c, fm_run *r, int64_t line_start) {
    int64_t cells = line_start / c->outer_step / c->outer_cell;
    r->outer = cells % (c->outer_size / c->outer_cell);
    r->outer_stop = (cells + 1) * c->outer_cell * c->outer_step;
}

static inline fm_run fm_run_at(const fm_cells *c, int64_t element) {
    fm_run r = {.element = element};
    int64_t place = element % c->line;
    locate_line(c, &r, element - place);
    r.inner = place / c->run;
    r.left = c->run - place % c->run;
    r.cell = r.outer * c->outer_stride + r.inner * c->inner_stride;
    return r;
}

static inline void fm_next_runs(const fm_cells *c, fm_run *r, int64_t runs) {
    r->element += r->left + (runs - 1) * c->run;
    r->left = c->run;
    r->cell += runs * c->inner_stride;
    r->inner += runs;
    if (r->inner == c->inner_cells) {
        r->inner = 0;
        if (r->element >= r->outer_stop) locate_line(c, r, r->element);
        r->cell = r->outer * c->outer_stride;
    }
}

static inline void fm_next_run(const fm_cells *c, fm_run *r) { fm_next_runs(c, r, 1); }

/* Whether a plan's block exists; its place along the inner side, and how far its elements are from those of the run's block. */
static inline int fm_shift(const fm_cells *c, const fm_run *r, int64_t block, int64_t *inner, int64_t *shift) {
    if (block < 0 || block >= c->count) return 0;
    int inner_first = c->inner_stride == 1;
    int64_t divisor = inner_first ? c->inner_cells : c->inner_stride;
    int64_t quotient = (int64_t)(((double)block + 0.5) * c->inverse), rest = block - quotient * divisor; /* a division takes 5 times as long */
    *inner = inner_first ? rest : quotient;
    *shift = (*inner - r->inner) * c->run + ((inner_first ? quotient : rest) - r->outer) * c->outer_cell * c->outer_step;
    return 1;
}

/* Whether each cell is an element, and a row in memory so many planes of them. */
static inline int fm_cells_are_elements(const fm_cells *c) {
    return c->run == 1 && c->inner_stride == 1 && c->outer_cell == 1 && c->outer_step == c->line;
}

#define FM_LINE_CELLS 64
#define FM_NOWHERE INT64_MIN

/* How far a plan moves the cells of a line: lines that follow each other share it for the most part. */
typedef struct { int64_t outer_stop, shift[FM_LINE_CELLS]; } fm_line;

static inline void fm_plan_line(const fm_cells *c, fm_line *line, const int64_t *plan, fm_run r) {
    int64_t unused;
    line->outer_stop = r.outer_stop;
    r.cell = r.outer * c->outer_stride;
    for (r.inner = 0; r.inner < c->inner_cells; r.inner++, r.cell += c->inner_stride)
        if (!fm_shift(c, &r, plan[r.cell], &unused, &line->shift[r.inner])) line->shift[r.inner] = FM_NOWHERE;
}

/* Elements that a plan moves alike, from a run on: the run, or where lines have many cells, blocks that follow each other along a line, as of
 * a partner that is shifted. */
typedef struct { int64_t runs, count, shift; int there; } fm_span;

static inline fm_span fm_span_at(const fm_cells *c, const fm_run *r, const int64_t *plan, fm_line *line, int64_t most) {
    fm_span s = {.runs = 1, .count = r->left};
    if (c->inner_cells <= FM_LINE_CELLS) {
        if (line->outer_stop != r->outer_stop) fm_plan_line(c, line, plan, *r);
        s.shift = line->shift[r->inner];
        s.there = s.shift != FM_NOWHERE;
    } else {
        int64_t inner = 0;
        s.there = fm_shift(c, r, plan[r->cell], &inner, &s.shift);
        if (s.there && c->inner_stride == 1) {
            const int64_t *first = plan + r->cell;
            int64_t runs = c->inner_cells - fm_max(r->inner, inner);
            for (; s.runs < runs && s.count < most && first[s.runs] == *first + s.runs; s.runs++) s.count += c->run;
        }
    }
    s.count = fm_min(s.count, most);
    return s;
}

/* memcpy of short spans, which are of the same length for the most part: a call takes longer. */
FM_INLINE void fm_copy_span(void *to, const void *from, int64_t bytes) {
    char *t = to;
    const char *f = from;
    if (bytes > 64) {
        memcpy(t, f, (size_t)bytes);
    } else if (bytes >= 32) {
        char ends[64];
        memcpy(ends, f, 32), memcpy(ends + 32, f + bytes - 32, 32);
        memcpy(t, ends, 32), memcpy(t + bytes - 32, ends + 32, 32);
    } else if (bytes >= 16) {
        char ends[32];
        memcpy(ends, f, 16), memcpy(ends + 16, f + bytes - 16, 16);
        memcpy(t, ends, 16), memcpy(t + bytes - 16, ends + 16, 16);
    } else {
        for (int64_t i = 0; i < bytes; i += 2) memcpy(t + i, f + i, 2);
    }
}

/* Fetches a row into the second cache, in its order: blocks that are read from anywhere in it would each wait for memory. */
static inline void fm_fetch_row(const void *row, int64_t bytes) {
    for (int64_t at = 0; bytes <= 1 << 20 && at < bytes; at += 64) __builtin_prefetch((const char *)row + at, 0, 2);
}

typedef struct {
    fm_cut cut;
    fm_cells cells;
    const void *x, *grad, *mask;
    const int64_t *index, *plan[2];
    int64_t x_stride, grad_stride, index_stride, out_stride;
    void *out;
    const int64_t *offsets, *order;
    double *sums;   /* of dmask, [rows, cells] */
    int64_t period; /* elements of a row that the mask lies over once: blocks stay within them */
    int streams;
    int failed; /* for want of memory */
} masking;

#define FM_TYPED "mix_masked_typed.h"
#include "every_dtype.h"

static fm_cells cells_of(const int64_t *geometry) {
    fm_cells c = {geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7], geometry[8], 0};
    c.inverse = 1 / (double)(c.inner_stride == 1 ? c.inner_cells : c.inner_stride);
    return c;
}

/* geometry: the fields of fm_cells in their order. mask [rows, cells], plans [rows, cells] or NULL. */
FASTMIX_EXPORT void fm_mix_masked_forward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t numel, const void *x, int64_t x_stride, const void *mask,
    const int64_t *geometry, const int64_t *index, int64_t index_stride, const int64_t *plan, const int64_t *partner_plan, void *out,
    int64_t out_stride) {
    static const fm_task task[] = {masked_forward_chunk_float32, masked_forward_chunk_float64, masked_forward_chunk_bfloat16,
                                   masked_forward_chunk_float16};
    masking m = {.cut = fm_cut_rows(rows, numel, fm_itemsize(dtype)), .cells = cells_of(geometry), .x = x, .mask = mask,
                 .index = index, .plan = {plan, partner_plan}, .x_stride = x_stride, .index_stride = index_stride, .out = out,
                 .out_stride = out_stride};
    if ((plan || partner_plan) && rows > 1) { /* rows whole: blocks come from anywhere in them */
        m.cut.piece = numel;
        m.cut.pieces = m.cut.rows_per_chunk = 1;
        m.cut.chunks = rows;
    }
    m.streams = fm_streams(&m.cut, fm_itemsize(dtype));
    fm_parallel(task[dtype], &m, m.cut.chunks, fm_threads_for(&m.cut, threads));
}

/* dx and dmask [rows, cells] may be NULL. Returns 0, or 1 if there is no memory. */
FASTMIX_EXPORT int32_t fm_mix_masked_backward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t numel, const void *grad, int64_t grad_stride, const void *x, int64_t x_stride,
    const void *mask, const int64_t *geometry, const int64_t *index, int64_t index_stride, const int64_t *plan,
    const int64_t *partner_plan, void *dx, int64_t dx_stride, void *dmask) {
    static const fm_task dx_task[] = {masked_dx_chunk_float32, masked_dx_chunk_float64, masked_dx_chunk_bfloat16,
                                      masked_dx_chunk_float16};
    static const fm_task moved_dx_task[] = {moved_dx_chunk_float32, moved_dx_chunk_float64, moved_dx_chunk_bfloat16,
                                            moved_dx_chunk_float16};
    static const fm_task dmask_task[] = {masked_dmask_chunk_float32, masked_dmask_chunk_float64, masked_dmask_chunk_bfloat16,
                                         masked_dmask_chunk_float16};
    masking m = {.cut = fm_cut_rows(rows, numel, fm_itemsize(dtype)), .cells = cells_of(geometry), .x = x, .grad = grad, .mask = mask,
                 .index = index, .plan = {plan, partner_plan}, .x_stride = x_stride, .grad_stride = grad_stride,
                 .index_stride = index_stride, .out = dx, .out_stride = dx_stride};
    m.period = m.cells.outer_step * m.cells.outer_size;
    int64_t *offsets = dx ? calloc((size_t)(2 * rows + 1), sizeof(int64_t)) : NULL;
    m.sums = dmask ? malloc((size_t)(rows * m.cells.count) * sizeof(double)) : NULL;
    int failed = (dx && !offsets) || (dmask && !m.sums);
    if (!failed && dx) {
        fm_inverse(index, index_stride, rows, offsets, offsets + rows + 1);
        m.offsets = offsets;
        m.order = offsets + rows + 1;
        if (plan || partner_plan)
            fm_parallel(moved_dx_task[dtype], &m, rows * (numel / m.period), fm_threads_for(&m.cut, threads));
        else
            fm_parallel(dx_task[dtype], &m, m.cut.chunks, fm_threads_for(&m.cut, threads));
        failed = m.failed;
    }
    if (!failed && dmask) {
        fm_parallel(dmask_task[dtype], &m, rows, fm_threads_for(&m.cut, threads));
        for (int64_t i = 0; i < rows * m.cells.count; i++) {
            if (dtype == FM_FLOAT64)
                ((double *)dmask)[i] = m.sums[i];
            else
                ((float *)dmask)[i] = (float)m.sums[i];
        }
    }
    free(offsets);
    free(m.sums);
    return failed;
}
