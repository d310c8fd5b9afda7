/* Vectors of 64 bytes: 16 of float32 or 8 of float64, whatever the CPU's registers hold. So sums are taken in the same lanes everywhere.
 * The compiler splits them where registers are shorter; intrinsics stand only where it has no operator. */
#ifndef FASTMIX_VECTORS_H
#define FASTMIX_VECTORS_H

#include "common.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* all functions that take vectors are inlined */
#endif

typedef float fm_vec_float32 __attribute__((vector_size(64)));
typedef double fm_vec_float64 __attribute__((vector_size(64)));
typedef int32_t fm_int32s __attribute__((vector_size(64)));
typedef uint32_t fm_uint32s __attribute__((vector_size(64)));
typedef int64_t fm_int64s __attribute__((vector_size(64)));
typedef uint16_t fm_uint16s __attribute__((vector_size(32)));
typedef fm_vec_float32 fm_vec_bfloat16, fm_vec_float16; /* they are widened */

/* if_true where the mask is set, else if_false */
FM_INLINE fm_vec_float32 fm_select_float32(fm_int32s mask, fm_vec_float32 if_true, fm_vec_float32 if_false) {
    return (fm_vec_float32)(((fm_int32s)if_true & mask) | ((fm_int32s)if_false & ~mask));
}
FM_INLINE fm_vec_float64 fm_select_float64(fm_int64s mask, fm_vec_float64 if_true, fm_vec_float64 if_false) {
    return (fm_vec_float64)(((fm_int64s)if_true & mask) | ((fm_int64s)if_false & ~mask));
}

/* a > b ? a : b and a < b ? a : b: b where one of them is NaN; and a*b + c with one rounding. */
#if defined(__AVX512F__)
FM_INLINE fm_vec_float32 fm_max_float32(fm_vec_float32 a, fm_vec_float32 b) { return (fm_vec_float32)_mm512_max_ps((__m512)a, (__m512)b); }
FM_INLINE fm_vec_float64 fm_max_float64(fm_vec_float64 a, fm_vec_float64 b) { return (fm_vec_float64)_mm512_max_pd((__m512d)a, (__m512d)b); }
FM_INLINE fm_vec_float32 fm_min_float32(fm_vec_float32 a, fm_vec_float32 b) { return (fm_vec_float32)_mm512_min_ps((__m512)a, (__m512)b); }
FM_INLINE fm_vec_float64 fm_min_float64(fm_vec_float64 a, fm_vec_float64 b) { return (fm_vec_float64)_mm512_min_pd((__m512d)a, (__m512d)b); }
FM_INLINE fm_vec_float32 fm_vfma_float32(fm_vec_float32 a, fm_vec_float32 b, fm_vec_float32 c) {
    return (fm_vec_float32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FM_INLINE fm_vec_float64 fm_vfma_float64(fm_vec_float64 a, fm_vec_float64 b, fm_vec_float64 c) {
    return (fm_vec_float64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#else
#if defined(__x86_64__)
/* An operation on both halves: of vectors longer than its registers, the compiler compares number by number. */
#define FM_HALVES(name, V, H, operation) \
    FM_INLINE V name(V a, V b) { \
        H x[2], y[2]; \
        memcpy(x, &a, 64), memcpy(y, &b, 64); \
        for (int l = 0; l < 2; l++) x[l] = operation(x[l], y[l]); \
        memcpy(&a, x, 64); \
        return a; \
    }
FM_HALVES(fm_max_float32, fm_vec_float32, __m256, _mm256_max_ps)
FM_HALVES(fm_max_float64, fm_vec_float64, __m256d, _mm256_max_pd)
FM_HALVES(fm_min_float32, fm_vec_float32, __m256, _mm256_min_ps)
FM_HALVES(fm_min_float64, fm_vec_float64, __m256d, _mm256_min_pd)
#else
FM_INLINE fm_vec_float32 fm_max_float32(fm_vec_float32 a, fm_vec_float32 b) { return fm_select_float32(a > b, a, b); }
FM_INLINE fm_vec_float64 fm_max_float64(fm_vec_float64 a, fm_vec_float64 b) { return fm_select_float64(a > b, a, b); }
FM_INLINE fm_vec_float32 fm_min_float32(fm_vec_float32 a, fm_vec_float32 b) { return fm_select_float32(a < b, a, b); }
FM_INLINE fm_vec_float64 fm_min_float64(fm_vec_float64 a, fm_vec_float64 b) { return fm_select_float64(a < b, a, b); }
#endif
FM_INLINE fm_vec_float32 fm_vfma_float32(fm_vec_float32 a, fm_vec_float32 b, fm_vec_float32 c) {
#if defined(__x86_64__)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int l = 0; l < 2; l++) z[l] = _mm256_fmadd_ps(x[l], y[l], z[l]);
    memcpy(&c, z, 64);
#else
    for (int l = 0; l < 16; l++) c[l] = fm_fma32(a[l], b[l], c[l]);
#endif
    return c;
}
FM_INLINE fm_vec_float64 fm_vfma_float64(fm_vec_float64 a, fm_vec_float64 b, fm_vec_float64 c) {
    for (int l = 0; l < 8; l++) c[l] = fm_fma64(a[l], b[l], c[l]);
    return c;
}
#endif

/* w*x, and 0 where w is 0, even if x is inf or NaN */
#if defined(__AVX512F__)
FM_INLINE fm_vec_float32 fm_times_float32(fm_vec_float32 w, fm_vec_float32 x) {
    return (fm_vec_float32)_mm512_maskz_mul_ps(_mm512_cmp_ps_mask((__m512)w, _mm512_setzero_ps(), _CMP_NEQ_UQ), (__m512)w, (__m512)x);
}
FM_INLINE fm_vec_float64 fm_times_float64(fm_vec_float64 w, fm_vec_float64 x) {
    return (fm_vec_float64)_mm512_maskz_mul_pd(_mm512_cmp_pd_mask((__m512d)w, _mm512_setzero_pd(), _CMP_NEQ_UQ), (__m512d)w, (__m512d)x);
}
#elif defined(__x86_64__)
FM_INLINE __m256 fm_half_times_float32(__m256 w, __m256 x) {
    return _mm256_and_ps(_mm256_mul_ps(w, x), _mm256_cmp_ps(w, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
FM_INLINE __m256d fm_half_times_float64(__m256d w, __m256d x) {
    return _mm256_and_pd(_mm256_mul_pd(w, x), _mm256_cmp_pd(w, _mm256_setzero_pd(), _CMP_NEQ_UQ));
}
FM_HALVES(fm_times_float32, fm_vec_float32, __m256, fm_half_times_float32)
FM_HALVES(fm_times_float64, fm_vec_float64, __m256d, fm_half_times_float64)
#else
FM_INLINE fm_vec_float32 fm_times_float32(fm_vec_float32 w, fm_vec_float32 x) {
    return fm_select_float32(w == 0, (fm_vec_float32){0}, w * x);
}
FM_INLINE fm_vec_float64 fm_times_float64(fm_vec_float64 w, fm_vec_float64 x) {
    return fm_select_float64(w == 0, (fm_vec_float64){0}, w * x);
}
#endif

/* The sum of all lanes, in pairs: the same order everywhere. */
#if defined(__AVX512F__)
FM_INLINE double fm_sum_float64(fm_vec_float64 v) {
    __m256d four = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)v), _mm512_extractf64x4_pd((__m512d)v, 1));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}
FM_INLINE double fm_sum_float32(fm_vec_float32 v) {
    __m256 low = _mm512_castps512_ps256((__m512)v), high = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
    return fm_sum_float64((fm_vec_float64)_mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high)));
}
#else
FM_INLINE double fm_sum_float64(fm_vec_float64 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
FM_INLINE double fm_sum_float32(fm_vec_float32 v) {
    fm_vec_float64 half;
    for (int l = 0; l < 8; l++) half[l] = (double)v[l] + (double)v[l + 8];
    return fm_sum_float64(half);
}
#endif

/* The largest of all lanes, of which none is NaN. */
#if defined(__AVX512F__)
FM_INLINE float fm_largest_float32(fm_vec_float32 v) { return _mm512_reduce_max_ps((__m512)v); }
FM_INLINE double fm_largest_float64(fm_vec_float64 v) { return _mm512_reduce_max_pd((__m512d)v); }
#else
FM_INLINE float fm_largest_float32(fm_vec_float32 v) {
    float lanes[16];
    memcpy(lanes, &v, sizeof v);
    for (int width = 8; width; width /= 2)
        for (int l = 0; l < width; l++) lanes[l] = lanes[l + width] > lanes[l] ? lanes[l + width] : lanes[l];
    return lanes[0];
}
FM_INLINE double fm_largest_float64(fm_vec_float64 v) {
    double lanes[8];
    memcpy(lanes, &v, sizeof v);
    for (int width = 4; width; width /= 2)
        for (int l = 0; l < width; l++) lanes[l] = lanes[l + width] > lanes[l] ? lanes[l + width] : lanes[l];
    return lanes[0];
}
#endif

/* Reads 16 (8) stored values, widened; and rounds them back. */
FM_INLINE fm_vec_float32 fm_load_float32(const float *p) {
    fm_vec_float32 v;
    memcpy(&v, p, 64);
    return v;
}
FM_INLINE fm_vec_float64 fm_load_float64(const double *p) {
    fm_vec_float64 v;
    memcpy(&v, p, 64);
    return v;
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
/* Halves of words are moved by one permutation, where widening and narrowing take two and three instructions. */
FM_INLINE fm_vec_float32 fm_widened_bfloat16(__m256i h) {
    const fm_uint32s place = {0, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16, 6 << 16, 7 << 16,
                              8 << 16, 9 << 16, 10 << 16, 11 << 16, 12 << 16, 13 << 16, 14 << 16, 15 << 16};
    return (fm_vec_float32)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)place, _mm512_castsi256_si512(h));
}
/* The upper halves of the words are bfloat16, rounded to even; NaN stays one. */
FM_INLINE __m512i fm_rounded_words(fm_vec_float32 v) {
    fm_uint32s bits = (fm_uint32s)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32((__m512i)rounded, is_nan, (__m512i)bits, _mm512_set1_epi32(0x400000));
}
FM_INLINE __m256i fm_rounded_bfloat16(fm_vec_float32 v) {
    const fm_uint32s place = {1 | 3 << 16, 5 | 7 << 16, 9 | 11 << 16, 13 | 15 << 16, 17 | 19 << 16, 21 | 23 << 16, 25 | 27 << 16, 29 | 31 << 16};
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)place, fm_rounded_words(v)));
}
FM_INLINE fm_vec_float32 fm_load_bfloat16(const fm_bf16 *p) { return fm_widened_bfloat16(_mm256_loadu_si256((const __m256i *)p)); }
FM_INLINE void fm_store_bfloat16(fm_bf16 *p, fm_vec_float32 v) { _mm256_storeu_si256((__m256i *)p, fm_rounded_bfloat16(v)); }
#else
FM_INLINE fm_vec_float32 fm_load_bfloat16(const fm_bf16 *p) {
    fm_uint16s h;
    memcpy(&h, p, 32);
    return (fm_vec_float32)(__builtin_convertvector(h, fm_uint32s) << 16);
}
FM_INLINE void fm_store_bfloat16(fm_bf16 *p, fm_vec_float32 v) {
    fm_uint32s bits = (fm_uint32s)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
    fm_uint32s is_nan = (fm_uint32s)(v != v);
    fm_uint16s h = __builtin_convertvector((nan & is_nan) | (rounded & ~is_nan), fm_uint16s);
    memcpy(p, &h, 32);
}
#endif
#if defined(__AVX512F__)
FM_INLINE fm_vec_float32 fm_load_float16(const fm_fp16 *p) {
    return (fm_vec_float32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
FM_INLINE void fm_store_float16(fm_fp16 *p, fm_vec_float32 v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0)); }
#else
FM_INLINE fm_vec_float32 fm_load_float16(const fm_fp16 *p) {
    float wide[16];
    fm_widen_fp16(wide, p, 16);
    return fm_load_float32(wide);
}
FM_INLINE void fm_store_float16(fm_fp16 *p, fm_vec_float32 v) {
    float wide[16];
    memcpy(wide, &v, 64);
    fm_round_fp16(p, wide, 16);
}
#endif
FM_INLINE void fm_store_float32(float *p, fm_vec_float32 v) { memcpy(p, &v, 64); }
FM_INLINE void fm_store_float64(double *p, fm_vec_float64 v) { memcpy(p, &v, 64); }

/* The same of the first n values; the other lanes are `fill`. */
#if defined(__AVX512F__)
FM_INLINE fm_vec_float32 fm_load_part_float32(const float *p, int64_t n, float fill) {
    return (fm_vec_float32)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), p);
}
FM_INLINE void fm_store_part_float32(float *p, int64_t n, fm_vec_float32 v) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
#else
FM_INLINE fm_vec_float32 fm_load_part_float32(const float *p, int64_t n, float fill) {
    float v[16];
    for (int64_t l = 0; l < 16; l++) v[l] = fill;
    for (int64_t l = 0; l < n; l++) v[l] = p[l];
    return fm_load_float32(v);
}
FM_INLINE void fm_store_part_float32(float *p, int64_t n, fm_vec_float32 v) {
    for (int64_t l = 0; l < n; l++) p[l] = v[l];
}
#endif
FM_INLINE fm_vec_float64 fm_load_part_float64(const double *p, int64_t n, double fill) {
    double v[8];
    for (int64_t l = 0; l < 8; l++) v[l] = fill;
    for (int64_t l = 0; l < n; l++) v[l] = p[l];
    return fm_load_float64(v);
}
FM_INLINE void fm_store_part_float64(double *p, int64_t n, fm_vec_float64 v) {
    for (int64_t l = 0; l < n; l++) p[l] = v[l];
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
FM_INLINE fm_vec_float32 fm_filled(fm_vec_float32 v, int64_t n, float fill) {
    return (fm_vec_float32)_mm512_mask_mov_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), (__m512)v);
}
FM_INLINE fm_vec_float32 fm_load_part_bfloat16(const fm_bf16 *p, int64_t n, float fill) {
    return fm_filled(fm_widened_bfloat16(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)), n, fill);
}
FM_INLINE void fm_store_part_bfloat16(fm_bf16 *p, int64_t n, fm_vec_float32 v) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), fm_rounded_bfloat16(v));
}
FM_INLINE fm_vec_float32 fm_load_part_float16(const fm_fp16 *p, int64_t n, float fill) {
    return fm_filled((fm_vec_float32)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)), n, fill);
}
FM_INLINE void fm_store_part_float16(fm_fp16 *p, int64_t n, fm_vec_float32 v) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), _mm512_cvtps_ph((__m512)v, 0));
}
#else
FM_INLINE fm_vec_float32 fm_load_part_bfloat16(const fm_bf16 *p, int64_t n, float fill) {
    float v[16];
    for (int64_t l = 0; l < 16; l++) v[l] = fill;
    for (int64_t l = 0; l < n; l++) v[l] = fm_from_bf16(p[l]);
    return fm_load_float32(v);
}
FM_INLINE void fm_store_part_bfloat16(fm_bf16 *p, int64_t n, fm_vec_float32 v) {
    for (int64_t l = 0; l < n; l++) p[l] = fm_to_bf16(v[l]);
}
FM_INLINE fm_vec_float32 fm_load_part_float16(const fm_fp16 *p, int64_t n, float fill) {
    float v[16];
    for (int64_t l = 0; l < 16; l++) v[l] = fill;
    for (int64_t l = 0; l < n; l++) v[l] = fm_from_fp16(p[l]);
    return fm_load_float32(v);
}
FM_INLINE void fm_store_part_float16(fm_fp16 *p, int64_t n, fm_vec_float32 v) {
    for (int64_t l = 0; l < n; l++) p[l] = fm_to_fp16(v[l]);
}
#endif

/* One value, widened or rounded. */
FM_INLINE float fm_wide_float32(float v) { return v; }
FM_INLINE double fm_wide_float64(double v) { return v; }
FM_INLINE float fm_wide_bfloat16(fm_bf16 v) { return fm_from_bf16(v); }
FM_INLINE float fm_wide_float16(fm_fp16 v) { return fm_from_fp16(v); }

/* Narrow dtypes are computed as float32. */
#define fm_select_bfloat16 fm_select_float32
#define fm_select_float16 fm_select_float32
#define fm_times_bfloat16 fm_times_float32
#define fm_times_float16 fm_times_float32
#define fm_max_bfloat16 fm_max_float32
#define fm_max_float16 fm_max_float32
#define fm_min_bfloat16 fm_min_float32
#define fm_min_float16 fm_min_float32
#define fm_vfma_bfloat16 fm_vfma_float32
#define fm_vfma_float16 fm_vfma_float32
#define fm_sum_bfloat16 fm_sum_float32
#define fm_sum_float16 fm_sum_float32
#define fm_largest_bfloat16 fm_largest_float32
#define fm_largest_float16 fm_largest_float32

#endif
