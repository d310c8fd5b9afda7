/* The gradient that a loss's forward formed, times the upstream gradient, in place. */
#include "losses.h"

typedef struct {
    void *values;
    double factor;
    int64_t n;
} scaling;

/* What is 0 stays 0 even if the factor is inf or NaN. */
static void scale_float32(void *arg, int64_t chunk) {
    const scaling *m = arg;
    float *v = m->values, factor = (float)m->factor;
    int64_t last = fm_min((chunk + 1) * FM_LOSS_CHUNK, m->n);
    for (int64_t i = chunk * FM_LOSS_CHUNK; i < last; i++) v[i] = v[i] == 0 ? 0 : v[i] * factor;
}

static void scale_float64(void *arg, int64_t chunk) {
    const scaling *m = arg;
    double *v = m->values;
    int64_t last = fm_min((chunk + 1) * FM_LOSS_CHUNK, m->n);
    for (int64_t i = chunk * FM_LOSS_CHUNK; i < last; i++) v[i] = v[i] == 0 ? 0 : v[i] * m->factor;
}

/* n values of float32 or float64. */
FASTMIX_EXPORT void fm_scale(int32_t dtype, int32_t threads, int64_t n, void *values, double factor) {
    scaling m = {values, factor, n};
    fm_parallel(dtype == FM_FLOAT64 ? scale_float64 : scale_float32, &m, (n + FM_LOSS_CHUNK - 1) / FM_LOSS_CHUNK, n < FM_LOSS_SMALL ? 1 : threads);
}
