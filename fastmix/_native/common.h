/* What every file of the native backend shares: types, conversions, the fused multiply-add, and the thread pool.
 *
 * All files are compiled together into one library, without headers of Python or torch. Nothing is contracted by the compiler: where a
 * product and a sum are to be rounded once, the code says fm_fma. So the same input gives the same bits, whatever the number of threads.
 */
#ifndef FASTMIX_COMMON_H
#define FASTMIX_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(__FMA__) && !defined(__aarch64__)
#error "fastmix needs a CPU with a fused multiply-add"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastmix needs a little-endian CPU"
#endif

#define FASTMIX_EXPORT __attribute__((visibility("default")))
#define FM_INLINE static inline __attribute__((always_inline))

/* The dtypes, as Python numbers them (library.DTYPES). */
enum { FM_FLOAT32 = 0, FM_FLOAT64 = 1, FM_BFLOAT16 = 2, FM_FLOAT16 = 3 };

typedef struct { uint16_t bits; } fm_bf16;
typedef struct { uint16_t bits; } fm_fp16;

FM_INLINE float fm_fma32(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FM_INLINE double fm_fma64(double a, double b, double c) { return __builtin_fma(a, b, c); }

FM_INLINE int64_t fm_min(int64_t a, int64_t b) { return a < b ? a : b; }
FM_INLINE int64_t fm_max(int64_t a, int64_t b) { return a > b ? a : b; }

FM_INLINE float fm_float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

FM_INLINE uint32_t fm_bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

FM_INLINE float fm_from_bf16(fm_bf16 h) { return fm_float_of((uint32_t)h.bits << 16); }

/* Rounds to the nearest bfloat16, ties to even; a NaN stays one. */
FM_INLINE fm_bf16 fm_to_bf16(float value) {
    uint32_t bits = fm_bits_of(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40;
    fm_bf16 h = {(uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
    return h;
}

#if defined(__F16C__)
FM_INLINE float fm_from_fp16(fm_fp16 h) { return _cvtsh_ss(h.bits); }
FM_INLINE fm_fp16 fm_to_fp16(float value) { fm_fp16 h = {(uint16_t)_cvtss_sh(value, 0)}; return h; }
#elif defined(__aarch64__)
FM_INLINE float fm_from_fp16(fm_fp16 h) { __fp16 f; memcpy(&f, &h, 2); return (float)f; }
FM_INLINE fm_fp16 fm_to_fp16(float value) { __fp16 f = (__fp16)value; fm_fp16 h; memcpy(&h, &f, 2); return h; }
#else
#error "fastmix needs a CPU that converts float16"
#endif

/* n values widened to float32, or rounded from it. */
FM_INLINE void fm_widen_bf16(float *to, const fm_bf16 *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = fm_from_bf16(from[i]);
}

FM_INLINE void fm_round_bf16(fm_bf16 *to, const float *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = fm_to_bf16(from[i]);
}

FM_INLINE void fm_widen_fp16(float *to, const fm_fp16 *from, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < n; i++) to[i] = fm_from_fp16(from[i]);
}

FM_INLINE void fm_round_fp16(fm_fp16 *to, const float *from, int64_t n) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < n; i++) to[i] = fm_to_fp16(from[i]);
}

/* Writes past the caches what is too large to stay in them: the memory is then not read before it is written. */
FM_INLINE void fm_stream(void *to, const void *from, size_t bytes) {
#if defined(__AVX2__)
    char *out = to;
    const char *in = from;
    size_t head = -(uintptr_t)out & 31, at = head < bytes ? head : bytes;
    memcpy(out, in, at);
    for (; at + 32 <= bytes; at += 32)
        _mm256_stream_si256((__m256i *)(out + at), _mm256_loadu_si256((const __m256i *)(in + at)));
    memcpy(out + at, in + at, bytes - at);
#else
    memcpy(to, from, bytes);
#endif
}

/* Makes what was streamed visible to other threads. */
FM_INLINE void fm_streamed(void) {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

/* Runs task(arg, 0), ..., task(arg, chunks - 1), in the caller and in up to threads - 1 workers, and returns when all are done. The
 * chunks must not depend on the number of threads where they decide how a sum is rounded. */
typedef void (*fm_task)(void *arg, int64_t chunk);
void fm_parallel(fm_task task, void *arg, int64_t chunks, int threads);

#endif
