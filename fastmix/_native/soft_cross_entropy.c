/* soft_cross_entropy and its gradient in one pass over each row of logits [N, C], or each tile of pixels of [N, C, I].
 *
 *     K-hot (c_k, a_k)   sum_k a_k*((1-e)*w[c_k]*nll[c_k] + (e/C)*sum_c w[c]*nll[c]),   nll = log(exp_sum) + (row_max - z)
 *     dense t            sum_c t'[c]*nll[c],   t' = w*((1-e)*t + e/C)
 *
 * The gradient is softmax(z)*factor - hard at the named classes - smooth*w, or softmax(z)*factor - t'/N. Terms of weight 0 count as 0 even if they
 * are inf or NaN. A row is read while it is in the first cache: for its maximum, and for the exponentials, which wait there for the
 * gradient. Each row is computed by itself, so nothing depends on the number of threads. */
#include "losses.h"

enum {
    FM_TILE = 64,  /* pixels: whole cache lines of each class */
    FM_NAMED = 8,  /* components whose exponentials are kept */
    FM_FEW = 2048, /* classes: the exponentials of a row wait on the stack */
    FM_GROUP = 16  /* classes that are summed in the dtype of the arithmetic; their sums in double */
};

typedef struct {
    int64_t rows, classes, components, pixels; /* rows: of all images; pixels: of an image, 1 of rows */
    const void *logits, *class_weight;
    int64_t logits_stride, gradient_stride; /* from row to row, or image to image */
    const int64_t *named;                   /* K-hot: classes [N, K, I] */
    const void *weights;                    /* K-hot: [N, K, I]; NULL: 1 */
    fm_dense_target target;
    int64_t ignore_index;
    double smoothing, class_weight_sum, denominator;   /* 1 without a mean */
    double per_class, hard_factor, smooth_factor;      /* e/C; K-hot: (1-e)/denominator, e/C/denominator */
    const void *grad_output;                         /* one for each row; NULL: 1 */
    int64_t grad_output_stride;
    void *losses, *stats, *per_component, *gradient, *dtarget; /* stats [2 or 3, N]: row_max, exp_sum, sum of the weights */
    int backward, dense, failed;
} cross_entropy;

/* Returns memory, in whole cache lines; NULL where there is none. */
static void *fm_scratch(cross_entropy *m, int64_t bytes) {
    void *found = aligned_alloc(64, (size_t)(bytes + 63) & -(size_t)64);
    if (!found) m->failed = 1;
    return found;
}

static inline int64_t fm_tiles(int64_t pixels) { return (pixels + FM_TILE - 1) / FM_TILE; }

#define FM_TYPED "soft_cross_entropy_typed.h"
#include "every_dtype.h"

/* Returns whether there was no memory. */
static int32_t run(cross_entropy *m, int32_t dtype, int32_t threads) {
    static const fm_task rows[] = {row_chunk_float32, row_chunk_float64, row_chunk_bfloat16, row_chunk_float16};
    static const fm_task pixels[] = {pixel_chunk_float32, pixel_chunk_float64, pixel_chunk_bfloat16, pixel_chunk_float16};
    m->per_class = m->smoothing / (double)m->classes;
    m->hard_factor = (1 - m->smoothing) / m->denominator;
    m->smooth_factor = m->per_class / m->denominator;
    if (m->pixels == 1)
        fm_run_loss(rows[dtype], m, m->rows, m->classes, threads);
    else
        fm_run_loss(pixels[dtype], m, m->rows / m->pixels * fm_tiles(m->pixels), m->classes * FM_TILE, threads);
    return m->failed;
}

/* Writes the divisor of a mean: the sum of a*w over the components that are not ignored. */
static double divisor_of(const cross_entropy *m, int is_double) {
    double totals[4] = {0}; /* each waits for its own additions alone */
    int64_t n = m->rows * m->components;
    for (int64_t i = 0; i < n; i += 4)
        for (int64_t j = i; j < fm_min(i + 4, n); j++) {
            int64_t c = m->named[j];
            double a = 1, w = 1;
            if (c == m->ignore_index || c < 0 || c >= m->classes) continue;
            if (m->weights) a = is_double ? ((const double *)m->weights)[j] : (double)((const float *)m->weights)[j];
            if (m->class_weight) w = is_double ? ((const double *)m->class_weight)[c] : (double)((const float *)m->class_weight)[c];
            totals[j - i] += a * w;
        }
    return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

/* All functions return whether there was no memory. losses [N*I] are written; with a reduction, loss and denominator (mean) too. */
FASTMIX_EXPORT int32_t fm_soft_ce_forward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t classes, int64_t components, int64_t pixels, const void *logits, int64_t logits_stride,
    const void *weights, const int64_t *named, const void *class_weight, int64_t ignore_index, double smoothing, int32_t reduction,
    void *losses, void *loss, void *denominator, void *stats, void *per_component, void *gradient, int64_t gradient_stride) {
    int is_double = dtype == FM_FLOAT64;
    cross_entropy m = {.rows = rows, .classes = classes, .components = components, .pixels = pixels, .logits = logits, .logits_stride = logits_stride,
                       .weights = weights, .named = named, .class_weight = class_weight, .ignore_index = ignore_index,
                       .smoothing = smoothing, .denominator = 1, .losses = losses, .stats = stats, .per_component = per_component,
                       .gradient = gradient, .gradient_stride = gradient_stride};
    m.class_weight_sum = class_weight ? fm_sum_of(class_weight, is_double, classes) : (double)classes;
    if (reduction == FM_MEAN) {
        m.denominator = divisor_of(&m, is_double);
        fm_put(denominator, is_double, m.denominator);
    }
    int32_t failed = run(&m, dtype, threads);
    if (reduction) fm_put(loss, is_double, fm_sum_of(losses, is_double, rows) / m.denominator);
    return failed;
}

FASTMIX_EXPORT int32_t fm_soft_ce_backward(
    int32_t dtype, int32_t threads, int64_t rows, int64_t classes, int64_t components, int64_t pixels, const void *logits, int64_t logits_stride,
    const void *weights, const int64_t *named, const void *class_weight, int64_t ignore_index, double smoothing, int32_t reduction,
    const void *stats, const void *grad_output, int64_t grad_output_stride, void *gradient, int64_t gradient_stride) {
    int is_double = dtype == FM_FLOAT64;
    cross_entropy m = {.rows = rows, .classes = classes, .components = components, .pixels = pixels, .logits = logits, .logits_stride = logits_stride,
                       .weights = weights, .named = named, .class_weight = class_weight, .ignore_index = ignore_index,
                       .smoothing = smoothing, .denominator = 1, .stats = (void *)stats, .gradient = gradient,
                       .gradient_stride = gradient_stride, .grad_output = grad_output, .grad_output_stride = grad_output_stride,
                       .backward = 1};
    m.class_weight_sum = class_weight ? fm_sum_of(class_weight, is_double, classes) : (double)classes;
    if (reduction == FM_MEAN) m.denominator = divisor_of(&m, is_double);
    return run(&m, dtype, threads);
}

/* Dense targets. Forward where `losses` is given, else backward from the stats. */
FASTMIX_EXPORT int32_t fm_dense_ce(
    int32_t dtype, int32_t threads, int64_t rows, int64_t classes, int64_t pixels, const void *logits, int64_t logits_stride, int32_t target_dtype,
    const void *target, int64_t target_stride, const void *lam, int64_t lam_stride, const int64_t *partners,
    const void *class_weight, int64_t ignore_index, double smoothing, int32_t reduction, void *losses, void *loss, void *stats,
    const void *grad_output, int64_t grad_output_stride, void *gradient, int64_t gradient_stride, void *dtarget) {
    int is_double = dtype == FM_FLOAT64;
    cross_entropy m = {.rows = rows, .classes = classes, .pixels = pixels, .logits = logits, .logits_stride = logits_stride, 
                       .target = {target, target_stride, target_dtype, lam, lam_stride, partners}, .class_weight = class_weight, .ignore_index = ignore_index, .smoothing = smoothing,
                       .denominator = reduction == FM_MEAN ? (double)rows : 1, .losses = losses, .stats = stats, .gradient = gradient,
                       .gradient_stride = gradient_stride, .grad_output = grad_output, .grad_output_stride = grad_output_stride,
                       .dtarget = dtarget, .backward = !losses, .dense = 1};
    int32_t failed = run(&m, dtype, threads);
    if (losses && reduction) fm_put(loss, is_double, fm_sum_of(losses, is_double, rows) / m.denominator);
    return failed;
}
