/* mix: out[i]  = lam[i]*x[i] + (1-lam[i])*x[index[i]]                  outside row i's box, x[index[i]] inside it
 *      dx[i]   = lam[i]*g[i] + the sum of (1-lam[k])*g[k] over the k with index[k] = i, in their order
 *      dlam[i] = <g[i], x[i] - x[index[i]]>                            outside the box
 *
 * A row is numel elements that lie side by side, in the same order in all tensors; strides are from row to row, in elements. x is read
 * from memory once: a chunk is a piece of all rows that stays in the cache. lam and dlam have the dtype of the arithmetic. */
#include <stdlib.h>

#include "rows.h"
#include "vectors.h"

/* To `dlam` what Python packs, in the order of library.SIGNATURES; then what follows from it. */
typedef struct {
    int32_t dtype, threads;
    int64_t rows, numel;
    const void *x;
    int64_t x_stride;
    const void *grad; /* of a backward */
    int64_t grad_stride;
    const void *lam;
    int64_t lam_stride;
    const int64_t *index;
    int64_t index_stride;
    const int64_t *box, *geometry;
    void *out; /* the mixed batch, or dx */
    int64_t out_stride;
    void *dlam; /* [rows] */
    fm_cut cut;
    fm_boxes boxes;
    int streams;
    const int64_t *offsets, *order; /* the rows whose partner is row i: order[offsets[i]], ..., order[offsets[i+1] - 1] */
    double *partial;                /* sums of dlam, [pieces, rows] */
} mixing;

/* Whether a block of 64 bytes or more at `to` is written past the caches from registers: a copy of it in the first cache takes 1.2 times as long. */
#if defined(__AVX512F__)
FM_INLINE int mix_streams(const void *to) { return !((uintptr_t)to & 63); }
FM_INLINE void stream_float32(float *p, fm_vec_float32 v) { _mm512_stream_ps(p, (__m512)v); }
FM_INLINE void stream_float64(double *p, fm_vec_float64 v) { _mm512_stream_pd(p, (__m512d)v); }
FM_INLINE void stream_float16(fm_fp16 *p, fm_vec_float32 v) { _mm256_stream_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0)); }
#else
FM_INLINE int mix_streams(const void *to) { (void)to; return 0; }
#define stream_float32 fm_store_float32
#define stream_float64 fm_store_float64
#define stream_float16 fm_store_float16
#endif
#define stream_bfloat16 fm_store_bfloat16 /* they go in pairs */

/* to = fma(a, x, b*y) of bfloat16, 32 at a time; returns how many. Those at even places are widened by a shift and those at odd ones by a
 * mask, and rounded in the same way: 1.3 times as fast as 16 that cross the register's lanes. */
#if defined(__AVX512BW__) && defined(__AVX512VL__)
FM_INLINE int64_t mix_pairs_bfloat16(fm_bf16 *to, const fm_bf16 *x, const fm_bf16 *y, float a, float b, int64_t n, int streams) {
    const __m512 own = _mm512_set1_ps(a), other = _mm512_set1_ps(b);
    const __m512i high = _mm512_set1_epi32((int32_t)0xffff0000);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m512i p = _mm512_loadu_si512(x + i), q = _mm512_loadu_si512(y + i);
        __m512 even = _mm512_mul_ps(other, _mm512_castsi512_ps(_mm512_slli_epi32(q, 16)));
        __m512 odd = _mm512_mul_ps(other, _mm512_castsi512_ps(_mm512_and_si512(q, high)));
        even = _mm512_fmadd_ps(own, _mm512_castsi512_ps(_mm512_slli_epi32(p, 16)), even);
        odd = _mm512_fmadd_ps(own, _mm512_castsi512_ps(_mm512_and_si512(p, high)), odd);
        __m512i low = _mm512_srli_epi32(fm_rounded_words((fm_vec_float32)even), 16);
        __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, low, fm_rounded_words((fm_vec_float32)odd));
        if (streams)
            _mm512_stream_si512((void *)(to + i), both);
        else
            _mm512_storeu_si512(to + i, both);
    }
    return i;
}
#else
#define mix_pairs_bfloat16(to, x, y, a, b, n, streams) 0
#endif
#define mix_pairs_float32(to, x, y, a, b, n, streams) 0
#define mix_pairs_float64(to, x, y, a, b, n, streams) 0
#define mix_pairs_float16(to, x, y, a, b, n, streams) 0

#define FM_TYPED "mix_typed.h"
#include "every_dtype.h"

static mixing unpacked(const mixing *packed) {
    mixing m = {0};
    memcpy(&m, packed, offsetof(mixing, cut));
    m.cut = fm_cut_rows(m.rows, m.numel, fm_itemsize(m.dtype));
    m.boxes = fm_boxes_of(m.box, m.geometry);
    m.streams = fm_streams(&m.cut, fm_itemsize(m.dtype));
    return m;
}

FASTMIX_EXPORT void fm_mix_forward(const mixing *packed) {
    static const fm_task task[] = {forward_chunk_float32, forward_chunk_float64, forward_chunk_bfloat16, forward_chunk_float16};
    mixing m = unpacked(packed);
    fm_parallel(task[m.dtype], &m, m.cut.chunks, fm_threads_for(&m.cut, m.threads));
}

/* dx and dlam may be NULL. Returns 0, or 1 if there is no memory. */
FASTMIX_EXPORT int32_t fm_mix_backward(const mixing *packed) {
    static const fm_task task[] = {backward_chunk_float32, backward_chunk_float64, backward_chunk_bfloat16, backward_chunk_float16};
    mixing m = unpacked(packed);
    int64_t rows = m.rows, *offsets = m.out ? calloc((size_t)(2 * rows + 1), sizeof(int64_t)) : NULL;
    m.partial = m.dlam ? malloc((size_t)(m.cut.pieces * rows) * sizeof(double)) : NULL;
    int failed = (m.out && !offsets) || (m.dlam && !m.partial);
    if (!failed) {
        if (m.out) {
            fm_inverse(m.index, m.index_stride, rows, offsets, offsets + rows + 1);
            m.offsets = offsets;
            m.order = offsets + rows + 1;
        }
        fm_parallel(task[m.dtype], &m, m.cut.chunks, fm_threads_for(&m.cut, m.threads));
        for (int64_t row = 0; m.dlam && row < rows; row++) {
            double total = 0;
            for (int64_t piece = 0; piece < m.cut.pieces; piece++) total += m.partial[piece * rows + row];
            if (m.dtype == FM_FLOAT64)
                ((double *)m.dlam)[row] = total;
            else
                ((float *)m.dlam)[row] = (float)total;
        }
    }
    free(offsets);
    free(m.partial);
    return failed;
}
