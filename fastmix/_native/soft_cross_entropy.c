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

/* To `dtarget` what Python packs, in the order of library.SIGNATURES; then what follows from it. Forward where `losses` is given, else
 * backward from the stats; K-hot where `named` is given, else dense. */
typedef struct {
    int32_t dtype, threads;
    int64_t rows, classes, components, pixels; /* rows: of all images; pixels: of an image, 1 of rows */
    const void *logits;
    int64_t logits_stride; /* from row to row, or image to image */
    const void *class_weight;
    int64_t ignore_index; /* the options */
    double smoothing;
    int32_t reduction;
    void *losses, *loss, *denominator_at; /* losses [N*I] are written; with a reduction the loss; of a mean its denominator, if asked for */
    void *stats, *per_component;          /* stats [2 or 3, N]: row_max, exp_sum, sum of the weights */
    const void *grad_output;              /* one for each row; NULL: 1 */
    int64_t grad_output_stride;
    void *gradient;
    int64_t gradient_stride;
    const int64_t *named; /* classes [N, K, I] */
    const void *weights;  /* [N, K, I]; NULL: 1 */
    fm_dense_target target;
    void *dtarget;
    double class_weight_sum, denominator;         /* 1 without a mean */
    double per_class, hard_factor, smooth_factor; /* e/C; K-hot: (1-e)/denominator, e/C/denominator */
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

/* Returns the denominator of a mean over K-hot targets: the sum of a*w over the components that are not ignored. */
static double denominator_of(const cross_entropy *m, int is_double) {
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

/* Returns whether there was no memory. */
FASTMIX_EXPORT int32_t fm_cross_entropy(const cross_entropy *packed) {
    static const fm_task rows[] = {row_chunk_float32, row_chunk_float64, row_chunk_bfloat16, row_chunk_float16};
    static const fm_task pixels[] = {pixel_chunk_float32, pixel_chunk_float64, pixel_chunk_bfloat16, pixel_chunk_float16};
    cross_entropy m = {0};
    memcpy(&m, packed, offsetof(cross_entropy, class_weight_sum));
    int is_double = m.dtype == FM_FLOAT64;
    m.backward = !m.losses;
    m.dense = !m.named;
    m.class_weight_sum = m.class_weight && !m.dense ? fm_sum_of(m.class_weight, is_double, m.classes) : (double)m.classes;
    m.denominator = m.reduction != FM_MEAN ? 1 : m.dense ? (double)m.rows : denominator_of(&m, is_double);
    m.per_class = m.smoothing / (double)m.classes;
    m.hard_factor = (1 - m.smoothing) / m.denominator;
    m.smooth_factor = m.per_class / m.denominator;
    if (m.denominator_at) fm_put(m.denominator_at, is_double, m.denominator);
    if (m.pixels == 1)
        fm_run_loss(rows[m.dtype], &m, m.rows, m.classes, m.threads);
    else
        fm_run_loss(pixels[m.dtype], &m, m.rows / m.pixels * fm_tiles(m.pixels), m.classes * FM_TILE, m.threads);
    if (m.losses && m.reduction) fm_put(m.loss, is_double, fm_sum_of(m.losses, is_double, m.rows) / m.denominator);
    return m.failed;
}
