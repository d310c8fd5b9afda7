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

typedef struct {
    int64_t rows, classes, sets;
    const void *const *logits;
    const int64_t *strides;
    double scale, factor; /* of the loss; of the gradient: over the rows that a mean is taken of */
    void *losses, *stats; /* stats [3, K, N]: row_max, exp_sum, KL(p_k || m) */
    const void *grad_output; /* one for each row; NULL: 1 */
    int64_t grad_output_stride;
    void *const *gradients; /* NULL: none; [N, C] each, or NULL */
    int backward, failed;
} divergence;

#define FM_TYPED "js_divergence_typed.h"
#include "every_dtype.h"

/* Forward where `losses` is given: losses [N], their reduction, stats (or NULL) and gradients are written. Else backward from the stats. Returns
 * whether there was no memory. */
FASTMIX_EXPORT int32_t fm_js_divergence(
    int32_t dtype, int32_t threads, int64_t rows, int64_t classes, int64_t sets, const void *const *logits, const int64_t *strides,
    double scale, int32_t reduction, void *losses, void *loss, void *stats, const void *grad_output, int64_t grad_output_stride,
    void *const *gradients) {
    static const fm_task tasks[] = {js_chunk_float32, js_chunk_float64, js_chunk_bfloat16, js_chunk_float16};
    double mean = reduction == FM_MEAN ? 1 / (double)rows : 1;
    divergence m = {.rows = rows, .classes = classes, .sets = sets, .logits = logits, .strides = strides, .scale = scale,
                    .factor = scale * mean / (double)sets, .losses = losses, .stats = stats, .grad_output = grad_output,
                    .grad_output_stride = grad_output_stride, .gradients = gradients, .backward = !losses};
    fm_run_loss(tasks[dtype], &m, rows, sets * classes, threads);
    if (loss) fm_put(loss, dtype == FM_FLOAT64, fm_sum_of(losses, dtype == FM_FLOAT64, rows) * mean);
    return m.failed;
}
