/* What the losses share in one dtype: included by their typed files. */
#define V F(fm_vec)
#define LANES ((int64_t)(sizeof(V) / sizeof(A)))

/* v with the lanes from `part` on set to 0, whatever they hold. */
FM_INLINE V F(first_lanes)(V v, int64_t part) {
    static const A ones[2 * LANES] = {[0 ... LANES - 1] = 1};
    V kept;
    memcpy(&kept, ones + LANES - part, sizeof kept);
    return F(fm_select)(kept != 0, v, (V){0});
}

FM_INLINE V F(load_lanes)(const T *p, int64_t part, A fill) {
    return part == LANES ? F(fm_load)(p) : F(fm_load_part)(p, part, fill);
}

FM_INLINE void F(store_lanes)(T *p, int64_t part, V v) {
    if (part == LANES)
        F(fm_store)(p, v);
    else
        F(fm_store_part)(p, part, v);
}

/* Values of the arithmetic's dtype; behind `part` 0. */
FM_INLINE V F(load_wide)(const A *p, int64_t part) { return part == LANES ? W(fm_load)(p) : W(fm_load_part)(p, part, 0); }

FM_INLINE void F(store_wide)(A *p, int64_t part, V v) {
    if (part == LANES)
        W(fm_store)(p, v);
    else
        W(fm_store_part)(p, part, v);
}

/* The largest of a row; NaN is passed over, and comes back with the exponentials. */
FM_INLINE A F(row_max)(const T *z, int64_t n) {
    V largest = (V){0} - (A)INFINITY, second = largest;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        largest = F(fm_max)(F(fm_load)(z + i), largest);
        second = F(fm_max)(F(fm_load)(z + i + LANES), second);
    }
    if (i + LANES <= n) {
        largest = F(fm_max)(F(fm_load)(z + i), largest);
        i += LANES;
    }
    if (i < n) second = F(fm_max)(F(fm_load_part)(z + i, n - i, (A)-INFINITY), second);
    return F(fm_largest)(F(fm_max)(largest, second));
}

/* Writes the values [at, at + n) of one stored row of a target as they are computed with. */
FM_INLINE void F(wide_target)(A *to, const fm_dense_target *d, int64_t row, int64_t at, int64_t n) {
    int64_t from = row * d->stride + at;
    switch (d->dtype) {
    case FM_FLOAT32: for (int64_t i = 0; i < n; i++) to[i] = (A)((const float *)d->values)[from + i]; break;
    case FM_FLOAT64: for (int64_t i = 0; i < n; i++) to[i] = (A)((const double *)d->values)[from + i]; break;
    case FM_BFLOAT16: for (int64_t i = 0; i < n; i++) to[i] = (A)fm_from_bf16(((const fm_bf16 *)d->values)[from + i]); break;
    default: for (int64_t i = 0; i < n; i++) to[i] = (A)fm_from_fp16(((const fm_fp16 *)d->values)[from + i]);
    }
}

/* The same, mixed with the partner's. */
static void F(mixed_target)(A *to, const fm_dense_target *d, int64_t row, int64_t at, int64_t n) {
    F(wide_target)(to, d, row, at, n);
    if (!d->lam) return;
    A partner[FM_LOSS_BLOCK], lam = ((const A *)d->lam)[row * d->lam_stride], other = 1 - lam;
    F(wide_target)(partner, d, d->partners[row], at, n);
    for (int64_t i = 0; i < n; i++) to[i] = (lam == 0 ? 0 : lam * to[i]) + (other == 0 ? 0 : other * partner[i]);
}

/* Returns where the values [at, at + n) of a target's row lie as they are computed with: where they are stored, or in t. */
FM_INLINE const A *F(target_of)(A *t, const fm_dense_target *d, int64_t row, int64_t at, int64_t n) {
    if (d->dtype == (sizeof(A) == 8 ? FM_FLOAT64 : FM_FLOAT32) && !d->lam) return (const A *)d->values + row * d->stride + at;
    F(mixed_target)(t, d, row, at, n);
    return t;
}
