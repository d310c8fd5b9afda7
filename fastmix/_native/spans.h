/* Arithmetic on spans of at most FM_BLOCK elements, in the type A: what the mixing ops are made of. */

/* to = a*x */
FM_INLINE void F(fm_scale_values)(A *restrict to, const A *x, A a, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = a * x[i];
}

/* to = fma(a, x, to) */
FM_INLINE void F(fm_add_values)(A *restrict to, const A *x, A a, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = F(fm_fma)(a, x[i], to[i]);
}

/* The sum of g*(x - y), in 16 sums that are added up in their order. */
FM_INLINE double F(fm_sum_products)(const A *g, const A *x, const A *y, int64_t n) {
    A sums[16] = {0};
    int64_t i = 0;
    double total = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) sums[l] += g[i + l] * (x[i + l] - y[i + l]);
    for (; i < n; i++) sums[i & 15] += g[i] * (x[i] - y[i]);
    for (int l = 0; l < 16; l++) total += sums[l];
    return total;
}

/* The sum of g*x in the same way. */
FM_INLINE double F(fm_sum_pairs)(const A *g, const A *x, int64_t n) {
    A sums[16] = {0};
    int64_t i = 0;
    double total = 0;
    for (; i + 16 <= n; i += 16)
        for (int l = 0; l < 16; l++) sums[l] += g[i + l] * x[i + l];
    for (; i < n; i++) sums[i & 15] += g[i] * x[i];
    for (int l = 0; l < 16; l++) total += sums[l];
    return total;
}
