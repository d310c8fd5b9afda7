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

typedef struct {
    int64_t rows, classes, components;
    const void *logits, *class_weight, *positive_weight;
    int64_t logits_stride, gradient_stride;
    const int64_t *named;   /* K-hot: classes [N, K] */
    const void *weights;    /* K-hot: [N, K]; NULL: 1 */
    fm_dense_target target; /* of another kind */
    double smoothing, smooth, threshold; /* smooth: what smoothing adds to every class; threshold: NaN without one */
    double class_factor, factor;         /* 1 over the classes of a row, and over all terms, that a mean is taken of */
    const void *grad_output;             /* one for each row; NULL: 1 */
    int64_t grad_output_stride;
    void *losses, *slopes, *gradient, *dtarget;
} binary;

#define FM_TYPED "soft_binary_cross_entropy_typed.h"
#include "every_dtype.h"

static const fm_task hot[] = {hot_chunk_float32, hot_chunk_float64, hot_chunk_bfloat16, hot_chunk_float16};
static const fm_task dense[] = {dense_chunk_float32, dense_chunk_float64, dense_chunk_bfloat16, dense_chunk_float16};

/* Runs the rows, and reduces their losses to `loss`, if that is given. */
static void run(const fm_task *tasks, binary *m, int32_t dtype, int32_t threads, int32_t class_reduction, int32_t reduction, void *loss) {
    double row_factor = reduction == FM_MEAN ? 1 / (double)m->rows : 1;
    m->class_factor = class_reduction == FM_MEAN ? 1 / (double)m->classes : 1;
    m->factor = m->class_factor * row_factor;
    fm_run_loss(tasks[dtype], m, m->rows, m->classes, threads);
    if (loss) fm_put(loss, dtype == FM_FLOAT64, fm_sum_of(m->losses, dtype == FM_FLOAT64, m->rows) * row_factor);
}

/* Writes what is given: losses [N] and their reduction, slopes [N, K] of the loss by each component's weight, the gradient to the logits. */
FASTMIX_EXPORT void fm_soft_bce(
    int32_t dtype, int32_t threads, int64_t rows, int64_t classes, int64_t components, const void *logits, int64_t logits_stride,
    const void *weights, const int64_t *named, const void *class_weight, const void *positive_weight, double smoothing,
    double threshold, int32_t class_reduction, int32_t reduction, void *losses, void *loss, void *slopes, const void *grad_output,
    int64_t grad_output_stride, void *gradient, int64_t gradient_stride) {
    binary m = {.rows = rows, .classes = classes, .components = components, .logits = logits, .logits_stride = logits_stride,
                .weights = weights, .named = named, .class_weight = class_weight, .positive_weight = positive_weight,
                .smoothing = smoothing, .smooth = smoothing / (double)classes, .threshold = threshold, .losses = losses,
                .slopes = slopes, .grad_output = grad_output, .grad_output_stride = grad_output_stride, .gradient = gradient,
                .gradient_stride = gradient_stride};
    run(hot, &m, dtype, threads, class_reduction, reduction, loss);
}

/* The same of dense targets; dtarget [N, C] is the gradient to the target. */
FASTMIX_EXPORT void fm_dense_bce(
    int32_t dtype, int32_t threads, int64_t rows, int64_t classes, const void *logits, int64_t logits_stride, int32_t target_dtype,
    const void *target, int64_t target_stride, const void *lam, int64_t lam_stride, const int64_t *partners, const void *class_weight,
    const void *positive_weight, double smoothing, double threshold, int32_t class_reduction, int32_t reduction, void *losses, void *loss,
    const void *grad_output, int64_t grad_output_stride, void *gradient, int64_t gradient_stride, void *dtarget) {
    binary m = {.rows = rows, .classes = classes, .logits = logits, .logits_stride = logits_stride,
                .target = {target, target_stride, target_dtype, lam, lam_stride, partners}, .class_weight = class_weight,
                .positive_weight = positive_weight, .smoothing = smoothing, .smooth = smoothing / 2, .threshold = threshold,
                .losses = losses, .grad_output = grad_output, .grad_output_stride = grad_output_stride, .gradient = gradient,
                .gradient_stride = gradient_stride, .dtarget = dtarget};
    run(dense, &m, dtype, threads, class_reduction, reduction, loss);
}
