/* mix: out[i]  = lam[i]*x[i] + (1-lam[i])*x[index[i]]                  outside row i's box, x[index[i]] inside it
 *      dx[i]   = lam[i]*g[i] + the sum of (1-lam[k])*g[k] over the k with index[k] = i, in their order
 *      dlam[i] = <g[i], x[i] - x[index[i]]>                            outside the box
 *
 * A row is numel elements that lie side by side, in the same order in all tensors; strides are from row to row, in elements. x is read
 * from memory once: a chunk is a piece of all rows that stays in the cache. lam and dlam have the dtype of the arithmetic. */
#include <stdlib.h>

#include "rows.h"
#include "vectors.h"

typedef struct {
    fm_cut cut;
    const void *x, *grad, *lam;
    const int64_t *index;
    void *out; /* the mixed batch, or dx */
    int64_t x_stride, grad_stride, lam_stride, index_stride, out_stride;
    fm_boxes boxes;
    int streams;
    const int64_t *offsets, *order; /* the rows whose partner is row i: order[offsets[i]], ..., order[offsets[i+1] - 1] */
    double *partial;                /* sums of dlam, [pieces, rows] */
} mixing;

#define FM_TYPED "mix_typed.h"
#include "every_dtype.h"

FASTMIX_EXPORT void fm_mix_forward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t numel, const void *x, int64_t x_stride, const void *lam, int64_t lam_stride,
    const int64_t *index, int64_t index_stride, const int64_t *boxes, const int64_t *geometry, void *out, int64_t out_stride) {
    static const fm_task task[] = {forward_chunk_float32, forward_chunk_float64, forward_chunk_bfloat16, forward_chunk_float16};
    mixing m = {.cut = fm_cut_rows(rows, numel, fm_itemsize(dtype)), .x = x, .lam = lam, .index = index, .out = out,
                .x_stride = x_stride, .lam_stride = lam_stride, .index_stride = index_stride, .out_stride = out_stride,
                .boxes = fm_boxes_of(boxes, geometry)};
    m.streams = fm_streams(&m.cut, fm_itemsize(dtype));
    fm_parallel(task[dtype], &m, m.cut.chunks, fm_threads_for(&m.cut, threads));
}

/* dx and dlam [rows] may be NULL. Returns 0, or 1 if there is no memory. */
FASTMIX_EXPORT int32_t fm_mix_backward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t numel, const void *grad, int64_t grad_stride, const void *x,
    int64_t x_stride, const void *lam, int64_t lam_stride, const int64_t *index, int64_t index_stride, const int64_t *boxes,
    const int64_t *geometry, void *dx, int64_t dx_stride, void *dlam) {
    static const fm_task task[] = {backward_chunk_float32, backward_chunk_float64, backward_chunk_bfloat16, backward_chunk_float16};
    mixing m = {.cut = fm_cut_rows(rows, numel, fm_itemsize(dtype)), .x = x, .grad = grad, .lam = lam, .index = index, .out = dx,
                .x_stride = x_stride, .grad_stride = grad_stride, .lam_stride = lam_stride, .index_stride = index_stride,
                .out_stride = dx_stride, .boxes = fm_boxes_of(boxes, geometry)};
    m.streams = fm_streams(&m.cut, fm_itemsize(dtype));
    int64_t *offsets = dx ? calloc((size_t)(2 * rows + 1), sizeof(int64_t)) : NULL;
    m.partial = dlam ? malloc((size_t)(m.cut.pieces * rows) * sizeof(double)) : NULL;
    int failed = (dx && !offsets) || (dlam && !m.partial);
    if (!failed) {
        if (dx) {
            fm_inverse(index, index_stride, rows, offsets, offsets + rows + 1);
            m.offsets = offsets;
            m.order = offsets + rows + 1;
        }
        fm_parallel(task[dtype], &m, m.cut.chunks, fm_threads_for(&m.cut, threads));
        for (int64_t row = 0; dlam && row < rows; row++) {
            double total = 0;
            for (int64_t piece = 0; piece < m.cut.pieces; piece++) total += m.partial[piece * rows + row];
            if (dtype == FM_FLOAT64)
                ((double *)dlam)[row] = total;
            else
                ((float *)dlam)[row] = (float)total;
        }
    }
    free(offsets);
    free(m.partial);
    return failed;
}
