/* convex_combination of one dtype: included by convex_combination.c. */
#include "spans.h"

static void F(combine_chunk)(void *arg, int64_t chunk) {
    const combining *c = arg;
    fm_chunk k = fm_chunk_of(&c->cut, chunk);
    for (int64_t row = k.first_row; row < k.last_row; row++) {
        const A *weights = (const A *)c->weights + row * c->weight_row;
        T *out = (T *)c->out + row * c->out_stride;
        for (int64_t at = k.first; at < k.last; at += FM_BLOCK) {
            int64_t n = fm_min(FM_BLOCK, k.last - at);
            A buffer[FM_BLOCK], wide[FM_BLOCK];
            T block[FM_BLOCK], *to = c->streams ? block : out + at;
            A *total = place(to, buffer);
            int begun = 0;
            for (int64_t s = 0; s < c->count; s++) {
                A weight = weights[s * c->weight_column];
                if (weight == 0) continue; /* the source is not read */
                const T *source = (const T *)c->sources[s] + row * c->strides[s] + at;
                if (begun)
                    F(fm_add_values)(total, values(source, wide, n), weight, n);
                else
                    F(fm_scale_values)(total, values(source, wide, n), weight, n);
                begun = 1;
            }
            for (int64_t i = 0; !begun && i < n; i++) total[i] = 0;
            stored(to, buffer, n);
            if (c->streams) fm_stream(out + at, block, (size_t)n * sizeof(T));
        }
    }
    if (c->streams) fm_streamed();
}

static void F(combine_backward_chunk)(void *arg, int64_t chunk) {
    const combining *c = arg;
    fm_chunk k = fm_chunk_of(&c->cut, chunk);
    for (int64_t row = k.first_row; row < k.last_row; row++) {
        const A *weights = (const A *)c->weights + row * c->weight_row;
        const T *grad_row = (const T *)c->grad + row * c->grad_stride;
        double *partial = c->partial ? c->partial + (k.piece * c->cut.rows + row) * c->count : NULL;
        for (int64_t s = 0; partial && s < c->count; s++) partial[s] = 0;
        for (int64_t at = k.first; at < k.last; at += FM_BLOCK) {
            int64_t n = fm_min(FM_BLOCK, k.last - at);
            A wide_grad[FM_BLOCK], wide[FM_BLOCK];
            T block[FM_BLOCK];
            const A *grad = values(grad_row + at, wide_grad, n);
            for (int64_t s = 0; s < c->count; s++) {
                if (partial) partial[s] += F(fm_sum_pairs)(grad, values((const T *)c->sources[s] + row * c->strides[s] + at, wide, n), n);
                if (!c->gradients[s]) continue;
                A weight = weights[s * c->weight_column];
                T *out = (T *)c->gradients[s] + row * c->out_stride + at, *to = c->streams ? block : out;
                A *product = place(to, wide);
                if (weight != 0)
                    F(fm_scale_values)(product, grad, weight, n);
                else
                    for (int64_t i = 0; i < n; i++) product[i] = 0;
                stored(to, wide, n);
                if (c->streams) fm_stream(out, block, (size_t)n * sizeof(T));
            }
        }
    }
    if (c->streams) fm_streamed();
}
