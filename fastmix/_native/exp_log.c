/* exp, log, log1p and expm1 of arrays: for the tests of exp_log.h. */
#include "exp_log.h"

/* what: 0 exp, 1 log, 2 log1p of [0, 1], 3 expm1 of [-1, 1] */
FASTMIX_EXPORT void fm_exp_log(int32_t what, const float *x, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        int64_t count = fm_min(16, n - i);
        fm_vec_float32 v = fm_load_part_float32(x + i, count, 0);
        if (what == 0) v = fm_exp_float32(fm_min_float32((fm_vec_float32){0} + 89.0f, v)); /* inf beyond */
        if (what == 1) v = fm_log_float32(v);
        if (what == 2) v = fm_log1p_float32(v);
        if (what == 3) v = fm_expm1_float32(v);
        fm_store_part_float32(out + i, count, v);
    }
}
