/* Random words by counter, and Beta and Gamma variables made of them: fastmix/_torch/_draws.py says what they are, and draws the same.
 *
 * Words are Philox4x64-10. What decides is computed on integers or in float64, and logarithms and the like are rounded to fewer bits
 * before they go on, so that other libraries' last bits do not matter. */
#ifndef FASTMIX_DRAWS_H
#define FASTMIX_DRAWS_H

#include "vectors.h"

/* Purposes of words. */
enum { FM_ROW, FM_PLACE, FM_CHOICE, FM_PARTNER, FM_CELL, FM_GAMMA, FM_CELL_GAMMA, FM_WAYS, FM_SKIP, FM_RETRY = 256 };
enum { FM_GAMMA_BLOCKS = 8 }; /* at most, of a Gamma variable */

#define FM_LN2 0x1.62e42fefa39efp-1
#define FM_LN2_REST 0x1.abc9e3b39803fp-56 /* of the logarithm of 2 behind FM_LN2 */

typedef struct { uint64_t key[2], batch; } fm_source;
typedef struct { uint64_t word[4]; } fm_words;

static inline fm_source fm_source_of(const int64_t *state) {
    fm_source s = {{(uint64_t)state[0], (uint64_t)state[1]}, (uint64_t)state[2]};
    return s;
}

/* The four words of an item. */
static inline fm_words fm_random_words(const fm_source *s, int64_t purpose, int64_t stream, int64_t item) {
    uint64_t c0 = (uint64_t)item + 1, c1 = s->batch, c2 = (uint64_t)purpose, c3 = (uint64_t)stream;
    uint64_t key0 = s->key[0], key1 = s->key[1];
    for (int round = 0; round < 10; round++) {
        unsigned __int128 first = (unsigned __int128)c0 * 0xD2E7470EE14C6C93u, second = (unsigned __int128)c2 * 0xCA5A826395121157u;
        c0 = (uint64_t)(second >> 64) ^ c1 ^ key0;
        c2 = (uint64_t)(first >> 64) ^ c3 ^ key1;
        c1 = (uint64_t)second;
        c3 = (uint64_t)first;
        key0 += 0x9E3779B97F4A7C15u;
        key1 += 0xBB67AE8584CAA73Bu;
    }
    fm_words w = {{c0, c1, c2, c3}};
    return w;
}

FM_INLINE double fm_double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

/* A number in (0, 1) of 52 bits of a word, and of 32 bits. */
FM_INLINE double fm_unit(uint64_t word) { return fm_double_of(word >> 12 | 0x3FF0000000000000u) - (1 - 0x1p-53); }
FM_INLINE double fm_unit32(uint64_t bits) { return fm_double_of(bits << 20 | 0x3FF0000000000000u) - (1 - 0x1p-33); }

/* An integer in [0, size) of 32 bits. */
FM_INLINE int64_t fm_scaled(uint64_t bits, int64_t size) { return (int64_t)bits * size >> 32; }

/* x rounded to 31 significant bits. */
FM_INLINE fm_vec_float64 fm_short(fm_vec_float64 x) { return (fm_vec_float64)(((fm_int64s)x + 0x200000) & -0x400000); }
FM_INLINE double fm_short_one(double x) {
    int64_t bits;
    memcpy(&bits, &x, 8);
    return fm_double_of((uint64_t)((bits + 0x200000) & -0x400000));
}

/* log(x) of x in [2**-53, 1), to three units in the last place: x = 2**k m, m in [sqrt(1/2), sqrt(2)), log(m) = 2*atanh((m-1)/(m+1)). */
FM_INLINE fm_vec_float64 fm_log_of_unit(fm_vec_float64 x) {
    const fm_vec_float64 zero = {0};
    fm_int64s bits = (fm_int64s)x, up = bits + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD);
    fm_int64s exponent = (up >> 52) & 0x7FF; /* of m's place, 1023 more than k */
    fm_vec_float64 k = (fm_vec_float64)(exponent | 0x4330000000000000) - (0x1p52 + 1023);
    fm_vec_float64 m = (fm_vec_float64)(bits - ((exponent - 1023) << 52));
    fm_vec_float64 s = (m - 1) / (m + 1), square = s * s, p = zero + 1.0 / 19;
    for (int n = 17; n >= 3; n -= 2) p = fm_vfma_float64(p, square, zero + 1.0 / n);
    p = 2 * fm_vfma_float64(p * square, s, s);
    return fm_vfma_float64(k, zero + FM_LN2, fm_vfma_float64(k, zero + FM_LN2_REST, p));
}

/* exp(x) - 1 of x in [0, 690], to two units in the last place: x = k*log(2) + r, and the series of exp(r) - 1. */
FM_INLINE fm_vec_float64 fm_expm1_of_positive(fm_vec_float64 x) {
    static const double inverse_factorials[] = {1.0 / 87178291200, 1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                                1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5};
    const fm_vec_float64 zero = {0};
    fm_vec_float64 shifted = fm_vfma_float64(x, zero + 0x1.71547652b82fep0, zero + 0x1.8p52), k = shifted - 0x1.8p52;
    fm_vec_float64 r = fm_vfma_float64(k, zero - FM_LN2_REST, fm_vfma_float64(k, zero - FM_LN2, x)), p = zero + inverse_factorials[0];
    for (int n = 1; n < 13; n++) p = fm_vfma_float64(p, r, zero + inverse_factorials[n]);
    p = fm_vfma_float64(p * r, r, r);
    fm_vec_float64 scale = (fm_vec_float64)(((fm_int64s)shifted + 1023) << 52);
    return fm_vfma_float64(scale, p, scale - 1);
}

/* The series of sin(y * pi/2) for y in [-1, 1], in products and sums that are rounded one by one, as the kernels have it. */
#define FM_SINE(name, type)                                                                                        \
    FM_INLINE type name(type y) {                                                                                  \
        type z = y * y, s = 2.571422892860474e-16 * z - 4.377065467313742e-14;                                     \
        s = s * z + 6.0669357311061955e-12;                                                                        \
        s = s * z - 6.688035109811468e-10;                                                                         \
        s = s * z + 5.692172921967927e-08;                                                                         \
        s = s * z - 3.598843235212085e-06;                                                                         \
        s = s * z + 0.00016044118478735983;                                                                        \
        s = s * z - 0.004681754135318688;                                                                          \
        s = s * z + 0.07969262624616705;                                                                           \
        s = s * z - 0.6459640975062463;                                                                            \
        return y * (s * z + 1.5707963267948966);                                                                   \
    }
FM_SINE(fm_sine, fm_vec_float64)
FM_SINE(fm_sine_one, double)

#if defined(__AVX512F__)
FM_INLINE fm_vec_float64 fm_sqrt(fm_vec_float64 x) { return (fm_vec_float64)_mm512_sqrt_pd((__m512d)x); }
#else
FM_INLINE fm_vec_float64 fm_sqrt(fm_vec_float64 x) {
    for (int l = 0; l < 8; l++) x[l] = __builtin_sqrt(x[l]);
    return x;
}
#endif

/* lam ~ Beta(a, a) and 1 - lam, of eight pairs of words, without rejection. */
FM_INLINE void fm_symmetric_beta(const uint64_t *u, const uint64_t *v, const double *a, double *lam, double *rest) {
    const fm_vec_float64 zero = {0};
    fm_int64s first, second, one = (fm_int64s)zero + 0x3FF0000000000000, most = (fm_int64s)zero + (int64_t)(~(uint64_t)0 >> 12);
    memcpy(&first, u, 64), memcpy(&second, v, 64);
    fm_vec_float64 unit = (fm_vec_float64)((first >> 12 & most) | one) - (1 - 0x1p-53);
    fm_vec_float64 turn = (fm_vec_float64)((second >> 12 & most) | one) - 1.5, shape = fm_load_float64(a);
    fm_vec_float64 power = fm_min_float64(fm_short(zero - fm_log_of_unit(unit)) / shape, zero + 690.0);
    fm_vec_float64 q = fm_short(fm_expm1_of_positive(power));
    turn = fm_select_float64(turn < 0, zero - turn, turn);
    fm_vec_float64 cosine = fm_short(fm_sine(4 * turn - 1));
    q *= cosine * cosine;
    fm_vec_float64 least = 0.5 / ((1 + fm_sqrt(q / (1 + q))) * (1 + q)), other = 1 - least;
    fm_store_float64(lam, fm_select_float64(cosine < 0, least, other));
    fm_store_float64(rest, fm_select_float64(cosine < 0, other, least));
}

/* One try of Marsaglia and Tsang: whether v is accepted; d*v is then a Gamma variable of shape d + 1/3. */
static inline int fm_gamma_try(double normal, double chance, double d, double *v) {
    double root = 1 + normal / sqrt(9 * d), square = normal * normal;
    if (!(root > 0)) return 0;
    *v = root * root * root;
    return chance < 1 - 0.0331 * (square * square) || log(chance) < 0.5 * square + d * (1 - *v + log(*v));
}

/* The logarithm of a Gamma variable: log(Gamma(shape + 1)) - Exponential/shape. */
static inline double fm_log_gamma(const fm_source *s, int64_t purpose, int64_t stream, int64_t item, double shape) {
    double d = shape + 2.0 / 3, v = 1, wait = 0;
    for (int block = 0, done = 0; block < FM_GAMMA_BLOCKS && !done; block++) {
        fm_words w = fm_random_words(s, purpose + FM_RETRY * block, stream, item);
        double radius = sqrt(-2 * log(fm_unit32(w.word[0] >> 32))), turn = fm_unit32(w.word[0] & 0xFFFFFFFFu);
        double before = turn < 0.25 ? turn + 0.75 : turn - 0.25; /* a quarter of a turn: the cosine there is the sine here */
        if (block == 0) wait = fm_unit(w.word[2]);
        v = 1;
        done = fm_gamma_try(radius * fm_sine_one(4 * fabs(turn - 0.5) - 1), fm_unit32(w.word[1] >> 32), d, &v);
        if (!done) {
            v = 1;
            done = fm_gamma_try(radius * fm_sine_one(4 * fabs(before - 0.5) - 1), fm_unit32(w.word[1] & 0xFFFFFFFFu), d, &v);
            if (!done) v = 1;
        }
    }
    return floor(log(d * v) * 0x1p27 + 0.5) * 0x1p-27 + fm_short_one(log(wait)) / shape;
}

/* lam ~ Beta(a, b) and 1 - lam, of the Gamma variables 2*item and 2*item + 1. */
static inline void fm_uneven_beta(const fm_source *s, int64_t purpose, int64_t stream, int64_t item, double a, double b, double *lam,
                                  double *rest) {
    double first = fm_log_gamma(s, purpose, stream, 2 * item, a);
    double logit = first - fm_log_gamma(s, purpose, stream, 2 * item + 1, b);
    double e = fm_short_one(exp(-fabs(logit))), least = e / (1 + e);
    *lam = logit < 0 ? least : 1 - least;
    *rest = logit < 0 ? 1 - least : least;
}

#endif
