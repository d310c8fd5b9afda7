/* What the losses share: how they are reduced, and where a dense target is read. */
#ifndef FASTMIX_LOSSES_H
#define FASTMIX_LOSSES_H

#include <stdlib.h>

#include "exp_log.h"

enum { FM_NONE = 0, FM_SUM = 1, FM_MEAN = 2 }; /* reductions, as Python numbers them */

enum {
    FM_LOSS_CHUNK = 1 << 15, /* elements of a chunk of rows */
    FM_LOSS_SMALL = 1 << 15, /* elements: less is not worth waking a thread */
    FM_AHEAD = 1024,         /* classes: so far ahead memory is fetched into the first cache */
    FM_LOSS_BLOCK = 512      /* classes: the target of as many is made at once, and stays in the first cache */
};

/* Rows of a target in the logits' shape, of any dtype; with `lam` the rows are mixed with those of `partners`. */
typedef struct {
    const void *values;
    int64_t stride, dtype;
    const void *lam;
    int64_t lam_stride;
    const int64_t *partners;
} fm_dense_target;

static inline int64_t fm_loss_rows(int64_t classes) { return fm_max(1, FM_LOSS_CHUNK / classes); }

/* Runs the chunks of rows of a loss. */
static inline void fm_run_loss(fm_task task, void *arg, int64_t rows, int64_t classes, int threads) {
    int64_t step = fm_loss_rows(classes);
    fm_parallel(task, arg, (rows + step - 1) / step, rows * classes < FM_LOSS_SMALL ? 1 : threads);
}

/* The sum of n values of the arithmetic's dtype, in 8 sums. */
static inline double fm_sum_of(const void *values, int is_double, int64_t n) {
    double totals[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) totals[l] += is_double ? ((const double *)values)[i + l] : (double)((const float *)values)[i + l];
    for (; i < n; i++) totals[i & 7] += is_double ? ((const double *)values)[i] : (double)((const float *)values)[i];
    return ((totals[0] + totals[4]) + (totals[2] + totals[6])) + ((totals[1] + totals[5]) + (totals[3] + totals[7]));
}

static inline void fm_put(void *to, int is_double, double value) {
    if (is_double)
        *(double *)to = value;
    else
        *(float *)to = (float)value;
}

#endif
