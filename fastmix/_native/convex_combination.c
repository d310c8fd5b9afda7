/* convex_combination: out[n]          = the sum over k of weights[n, k]*sources[k][n], a chain of fma in the order of k
 *                     dsources[k][n]  = weights[n, k]*g[n]
 *                     dweights[n, k]  = <g[n], sources[k][n]>
 *
 * Rows are as in mix.c. weights and dweights [rows, count] have the dtype of the arithmetic. A source of weight 0 is not read. */
#include <stdlib.h>

#include "rows.h"

typedef struct {
    fm_cut cut;
    int64_t count; /* of the sources */
    const void *const *sources;
    const int64_t *strides;
    const void *weights, *grad;
    int64_t weight_row, weight_column, grad_stride, out_stride;
    void *out;
    void *const *gradients; /* to the sources; NULL for one that is not needed */
    double *partial;        /* sums of dweights, [pieces, rows, count] */
    int streams;
} combining;

#define FM_TYPED "convex_combination_typed.h"
#include "every_dtype.h"

FASTMIX_EXPORT void fm_combine_forward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t numel, int64_t count, const void *const *sources, const int64_t *strides,
    const void *weights, int64_t weight_row, int64_t weight_column, void *out, int64_t out_stride) {
    static const fm_task task[] = {combine_chunk_float32, combine_chunk_float64, combine_chunk_bfloat16, combine_chunk_float16};
    combining c = {.cut = fm_cut_rows(rows, numel, fm_itemsize(dtype)), .count = count, .sources = sources, .strides = strides,
                   .weights = weights, .weight_row = weight_row, .weight_column = weight_column, .out = out,
                   .out_stride = out_stride};
    c.streams = fm_streams(&c.cut, fm_itemsize(dtype));
    fm_parallel(task[dtype], &c, c.cut.chunks, fm_threads_for(&c.cut, threads));
}

/* gradients [count] are NULL where they are not needed, and so may dweights be: then the sources are not read. Returns 0, or 1 if there
 * is no memory. */
FASTMIX_EXPORT int32_t fm_combine_backward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t numel, int64_t count, const void *grad, int64_t grad_stride,
    const void *const *sources, const int64_t *strides, const void *weights, int64_t weight_row, int64_t weight_column,
    void *const *gradients, int64_t out_stride, void *dweights) {
    static const fm_task task[] = {combine_backward_chunk_float32, combine_backward_chunk_float64, combine_backward_chunk_bfloat16,
                                   combine_backward_chunk_float16};
    combining c = {.cut = fm_cut_rows(rows, numel, fm_itemsize(dtype)), .count = count, .sources = sources, .strides = strides,
                   .weights = weights, .weight_row = weight_row, .weight_column = weight_column, .grad = grad,
                   .grad_stride = grad_stride, .gradients = gradients, .out_stride = out_stride};
    c.streams = fm_streams(&c.cut, fm_itemsize(dtype));
    if (dweights && !(c.partial = malloc((size_t)(c.cut.pieces * rows * count) * sizeof(double)))) return 1;
    fm_parallel(task[dtype], &c, c.cut.chunks, fm_threads_for(&c.cut, threads));
    for (int64_t i = 0; dweights && i < rows * count; i++) {
        double total = 0;
        for (int64_t piece = 0; piece < c.cut.pieces; piece++) total += c.partial[piece * rows * count + i];
        if (dtype == FM_FLOAT64)
            ((double *)dweights)[i] = total;
        else
            ((float *)dweights)[i] = (float)total;
    }
    free(c.partial);
    return 0;
}
