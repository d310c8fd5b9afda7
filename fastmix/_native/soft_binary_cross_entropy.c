/* soft_binary_cross_entropy and its gradient in one pass over each row of logits [N, C].
 *
 *     loss of a class      w*(p*t'*softplus(-z) + (1-t')*softplus(z)),   softplus(z) = max(z, 0) + log(1 + q),   q = exp(-|z|)
 *     gradient             w*((1-t')*sigmoid(z) - p*t'*sigmoid(-z))
 *     t'                   (1-e)*t + e/C of a K-hot target, (1-e)*t + e/2 of a dense one; 1 where it exceeds the threshold, else 0
 *
 * With the weights w*p*t' and w*(1-t') of both terms, their sum `both`, and that of the term that grows with |z|, `larger`, the loss is
 * larger*|z| + both*log(1 + q), and the gradient larger - both*q/(1 + q), with the sign of z: exact also where it is small. Terms of weight
 * 0 count as 0 even if they are inf or NaN. A K-hot row is read as a dense one, whose target is made block by block. Each row is computed by
 * itself, so nothing depends on the number of threads. */
#include "losses.h"

/* To `dtarget` what Python packs, in the order of library.SIGNATURES; then what follows from it. Written is what is given: losses [N] and
 * their reduction, slopes [N, K] of the loss by each component's weight, the gradients to logits and dense target. K-hot where `named` is
 * given. */
typedef struct {
    int32_t dtype, threads;
    int64_t rows, classes, components;
    const void *logits;
    int64_t logits_stride;
    const void *class_weight, *positive_weight;
    double smoothing, threshold; /* the options; threshold: NaN without one */
    int32_t class_reduction, reduction;
    void *losses, *loss, *slopes;
    const void *grad_output; /* one for each row; NULL: 1 */
    int64_t grad_output_stride;
    void *gradient;
    int64_t gradient_stride;
    const int64_t *named; /* classes [N, K] */
    const void *weights;  /* [N, K]; NULL: 1 */
    fm_dense_target target;
    void *dtarget;
    double smooth;               /* what smoothing adds to every class */
    double class_factor, factor; /* 1 over the classes of a row, and over all terms, that a mean is taken of */
} binary;

#define FM_TYPED "soft_binary_cross_entropy_typed.h"
#include "every_dtype.h"

static const fm_task hot[] = {hot_chunk_float32, hot_chunk_float64, hot_chunk_bfloat16, hot_chunk_float16};
static const fm_task dense[] = {dense_chunk_float32, dense_chunk_float64, dense_chunk_bfloat16, dense_chunk_float16};

FASTMIX_EXPORT void fm_binary_cross_entropy(const binary *packed) {
    binary m = {0};
    memcpy(&m, packed, offsetof(binary, smooth));
    int is_double = m.dtype == FM_FLOAT64;
    double row_factor = m.reduction == FM_MEAN ? 1 / (double)m.rows : 1;
    m.smooth = m.smoothing / (m.named ? (double)m.classes : 2);
    m.class_factor = m.class_reduction == FM_MEAN ? 1 / (double)m.classes : 1;
    m.factor = m.class_factor * row_factor;
    fm_run_loss((m.named ? hot : dense)[m.dtype], &m, m.rows, m.classes, m.threads);
    if (m.loss) fm_put(m.loss, is_double, fm_sum_of(m.losses, is_double, m.rows) * row_factor);
}
