/* js_divergence of K sets of logits [N, C], and its gradients.
 *
 *     loss[n]      scale*(1/K)*sum_k KL(p_k || m),   p_k = softmax(z_k[n]),   m = mean over k of p_k
 *     gradient     scale*(1/K)*p_k*(log(p_k/m) - KL(p_k || m))
 *
 * A row's exponentials of all sets wait in the first caches, and so do p_k and log(p_k/m) for the gradient. Where all ratios p_k/m of a row are
 * near 1, p_k/m - 1 is formed of differences of the logits instead, with the bits that z - max rounds off: small divergences keep their
 * digits. Each row is computed by itself, so nothing depends on the number of threads. */
#include "losses.h"

enum { MOST_SETS = 16 };

/* To `gradients` what Python packs, in the order of library.SIGNATURES; then what follows from it. Forward where `losses` is given: losses
 * [N], their reduction, stats (or NULL) and gradients are written. Else backward from the stats. */
typedef struct {
    int32_t dtype, threads;
    int64_t rows, classes, sets;
    const void *const *logits;
    const int64_t *strides;
    double scale; /* the options */
    int32_t reduction;
    void *losses, *loss, *stats; /* stats [3, K, N]: row_max, exp_sum, KL(p_k || m) */
    const void *grad_output;     /* one for each row; NULL: 1 */
    int64_t grad_output_stride;
    void *const *gradients; /* NULL: none; [N, C] each, or NULL */
    double factor;          /* of the gradient: over the rows that a mean is taken of */
    int backward, failed;
} divergence;

#define FM_TYPED "js_divergence_typed.h"
#include "every_dtype.h"

/* Returns whether there was no memory. */
FASTMIX_EXPORT int32_t fm_js_divergence(const divergence *packed) {
    static const fm_task tasks[] = {js_chunk_float32, js_chunk_float64, js_chunk_bfloat16, js_chunk_float16};
    divergence m = {0};
    memcpy(&m, packed, offsetof(divergence, factor));
    int is_double = m.dtype == FM_FLOAT64;
    double mean = m.reduction == FM_MEAN ? 1 / (double)m.rows : 1;
    m.factor = m.scale * mean / (double)m.sets;
    m.backward = !m.losses;
    fm_run_loss(tasks[m.dtype], &m, m.rows, m.sets * m.classes, m.threads);
    if (m.loss) fm_put(m.loss, is_double, fm_sum_of(m.losses, is_double, m.rows) * mean);
    return m.failed;
}
