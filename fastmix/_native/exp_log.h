/* exp, expm1, log and log1p of vectors. In float32 within 2 units in the last place of the exact value, for every argument; float64 by the C
 * library. The coefficients are minimax fits of the relative error, below 4e-9. */
#ifndef FASTMIX_EXP_LOG_H
#define FASTMIX_EXP_LOG_H

#include "vectors.h"

#define FM_LN2_HIGH 0x1.62e43p-1f /* ln 2 in two parts */
#define FM_LN2_LOW -0x1.05c61p-29f

/* exp(r) - 1 of |r| <= ln 2 / 2 */
FM_INLINE fm_vec_float32 fm_exp_rest(fm_vec_float32 r) {
    const fm_vec_float32 zero = {0};
    fm_vec_float32 p = zero + 0x1.6a23fp-10f;
    p = fm_vfma_float32(p, r, zero + 0x1.123a0ap-7f);
    p = fm_vfma_float32(p, r, zero + 0x1.5558f2p-5f);
    p = fm_vfma_float32(p, r, zero + 0x1.555492p-3f);
    p = fm_vfma_float32(p, r, zero + 0x1.fffffcp-2f);
    return fm_vfma_float32(p, r * r, r);
}

/* exp(x) = 2**n * exp(r), n the integer next to x/ln 2. n is split into halves, so that 2**n may be subnormal. x is at most 89,
 * or NaN: the losses' arguments are at most 0. */
FM_INLINE fm_vec_float32 fm_exp_float32(fm_vec_float32 x) {
    const fm_vec_float32 zero = {0};
    fm_vec_float32 magic = zero + 0x1.8p23f; /* the sum's last bits are the rounded integer */
    x = fm_max_float32(zero - 104.0f, x); /* 0 beyond; NaN stays */
    fm_vec_float32 shifted = fm_vfma_float32(x, zero + 0x1.715476p+0f, magic), n = shifted - magic;
    fm_vec_float32 r = fm_vfma_float32(n, zero - FM_LN2_LOW, fm_vfma_float32(n, zero - FM_LN2_HIGH, x));
    fm_vec_float32 p = fm_exp_rest(r) + 1.0f;
#if defined(__AVX512F__)
    return (fm_vec_float32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    fm_int32s exponent = (fm_int32s)shifted - 0x4b400000, half = exponent >> 1;
    return p * (fm_vec_float32)((half + 127) << 23) * (fm_vec_float32)((exponent - half + 127) << 23);
#endif
}

/* log(x) = e*ln 2 + log(1 + f), 1 + f in [sqrt(1/2), sqrt(2)). Replaces n vectors of positive normal numbers by their logarithms, and
 * less*ln 2 less, step by step of all: one alone waits for each of its own steps. */
FM_INLINE void fm_logs_float32(fm_vec_float32 *x, fm_vec_float32 less, int n) {
    const float terms[] = {-0x1.de5386p-4f, 0x1.e6f55ap-4f, -0x1.fc1ec2p-4f, 0x1.2336e2p-3f, -0x1.555c5ep-3f, 0x1.99a4bcp-3f, -0x1.000006p-2f, 0x1.555548p-2f};
    const fm_vec_float32 zero = {0};
    fm_vec_float32 e[4], f[4], square[4], p[4];
    for (int k = 0; k < n; k++) {
        fm_int32s bits = (fm_int32s)x[k] - 0x3f3504f3;
        e[k] = __builtin_convertvector(bits >> 23, fm_vec_float32) - less;
        f[k] = (fm_vec_float32)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
        square[k] = f[k] * f[k];
        p[k] = zero + 0x1.14698ep-4f;
    }
#pragma GCC unroll 8
    for (int term = 0; term < 8; term++)
        for (int k = 0; k < n; k++) p[k] = fm_vfma_float32(p[k], f[k], zero + terms[term]);
    for (int k = 0; k < n; k++) p[k] = fm_vfma_float32(e[k], zero + FM_LN2_LOW, f[k] * square[k] * p[k]);
    for (int k = 0; k < n; k++) p[k] = fm_vfma_float32(square[k], zero - 0.5f, p[k]);
    for (int k = 0; k < n; k++) x[k] = fm_vfma_float32(e[k], zero + FM_LN2_HIGH, f[k] + p[k]);
}

/* The logarithm of any number. */
FM_INLINE fm_vec_float32 fm_log_float32(fm_vec_float32 x) {
    const fm_vec_float32 zero = {0};
    fm_int32s subnormal = x < 0x1p-126f;
    fm_vec_float32 result = fm_select_float32(subnormal, x * 0x1p25f, x);
    fm_logs_float32(&result, fm_select_float32(subnormal, zero + 25.0f, zero), 1);
    result = fm_select_float32(x == 0.0f, zero - __builtin_inff(), result);
    result = fm_select_float32(x == __builtin_inff(), x, result);
    return fm_select_float32(x >= 0.0f, result, zero + __builtin_nanf(""));
}

/* log(1 + q) of q in [0, 1], to the last bits also where q is small: 2*atanh(s), s = q/(2 + q). */
FM_INLINE fm_vec_float32 fm_log1p_float32(fm_vec_float32 q) {
    const fm_vec_float32 zero = {0};
    fm_vec_float32 s = q / (q + 2.0f), square = s * s, p = zero + 0x1.f1af3ap-4f;
    p = fm_vfma_float32(p, square, zero + 0x1.b6d68ep-4f);
    p = fm_vfma_float32(p, square, zero + 0x1.250974p-3f);
    p = fm_vfma_float32(p, square, zero + 0x1.9996a8p-3f);
    p = fm_vfma_float32(p, square, zero + 0x1.555558p-2f);
    return fm_vfma_float32(p * square, s, s) * 2.0f;
}

/* exp(x) - 1 of x in [-1, 1], to the last bits also where x is small. */
FM_INLINE fm_vec_float32 fm_expm1_float32(fm_vec_float32 x) {
    const fm_vec_float32 zero = {0};
    fm_vec_float32 magic = zero + 0x1.8p23f;
    x = fm_min_float32(zero + 1.0f, fm_max_float32(zero - 1.0f, x)); /* NaN stays */
    fm_vec_float32 shifted = fm_vfma_float32(x, zero + 0x1.715476p+0f, magic), n = shifted - magic;
    fm_vec_float32 r = fm_vfma_float32(n, zero - FM_LN2_LOW, fm_vfma_float32(n, zero - FM_LN2_HIGH, x));
    fm_vec_float32 scale = (fm_vec_float32)(((fm_int32s)shifted - 0x4b400000 + 127) << 23);
    return fm_vfma_float32(scale, fm_exp_rest(r), scale - 1.0f);
}

FM_INLINE fm_vec_float64 fm_exp_float64(fm_vec_float64 x) {
    for (int l = 0; l < 8; l++) x[l] = exp(x[l]);
    return x;
}
FM_INLINE fm_vec_float64 fm_log_float64(fm_vec_float64 x) {
    for (int l = 0; l < 8; l++) x[l] = log(x[l]);
    return x;
}
FM_INLINE void fm_logs_float64(fm_vec_float64 *x, fm_vec_float64 less, int n) {
    for (int k = 0; k < n; k++) x[k] = fm_log_float64(x[k]) - less * 0x1.62e42fefa39efp-1;
}
FM_INLINE fm_vec_float64 fm_expm1_float64(fm_vec_float64 x) {
    for (int l = 0; l < 8; l++) x[l] = expm1(x[l]);
    return x;
}
FM_INLINE fm_vec_float64 fm_log1p_float64(fm_vec_float64 x) {
    for (int l = 0; l < 8; l++) x[l] = log1p(x[l]);
    return x;
}

#define fm_exp_bfloat16 fm_exp_float32
#define fm_exp_float16 fm_exp_float32
#define fm_expm1_bfloat16 fm_expm1_float32
#define fm_expm1_float16 fm_expm1_float32
#define fm_log_bfloat16 fm_log_float32
#define fm_log_float16 fm_log_float32
#define fm_logs_bfloat16 fm_logs_float32
#define fm_logs_float16 fm_logs_float32
#define fm_log1p_bfloat16 fm_log1p_float32
#define fm_log1p_float16 fm_log1p_float32

#endif
