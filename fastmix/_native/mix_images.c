/* mix_images: x[i]   = images[i]*factor[c] + shift[c], rounded once; mirrored where flip[i]
 *             out[i] = lam[i]*x[i] + (1-lam[i])*x[index[i]] outside row i's box, x[index[i]] inside it
 *             or with the value of the pixel's cell in mask[i] for lam[i], and blocks moved by the plans, as in mix_masked.c
 *
 * images [rows, channels, height, width] bytes and out in any strides; the arithmetic is float32. The bytes are read where they are
 * used, a fourth of what is written: nothing is normalised ahead. */
#include "rows.h"

typedef struct {
    int64_t rows, channels, height, width, rows_per_chunk;
    const uint8_t *images, *flip;
    const float *factor, *shift, *lam;
    const int64_t *index, *boxes, *strides, *out_strides; /* strides: rows, channels, lines, elements */
    const float *mask;
    const int64_t *plan[2];
    int64_t cells[2], cell_height, cell_width; /* how many, down and across, and their size in pixels */
    int64_t flip_stride, lam_stride, index_stride;
    void *out;
    int streams;
} picturing;

/* Normalises n bytes that are `step` apart. */
FM_INLINE void normalize(float *restrict to, const uint8_t *from, int64_t step, float factor, float shift, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = fm_fma32((float)from[i * step], factor, shift);
}

/* Writes the normalised pixels [x, x + n) of a line, mirrored where the row is. */
static void read_line(const picturing *m, int64_t row, int64_t c, int64_t y, int64_t x, int64_t n, float *to) {
    const uint8_t *line = m->images + row * m->strides[0] + c * m->strides[1] + y * m->strides[2];
    int64_t step = m->strides[3];
    int mirrored = m->flip && m->flip[row * m->flip_stride];
    const uint8_t *first = line + (mirrored ? m->width - 1 - x : x) * step;
    step = mirrored ? -step : step;
    float factor = m->factor[c], shift = m->shift[c];
    if (step == 1) /* with the step known, whole vectors are read */
        normalize(to, first, 1, factor, shift, n);
    else if (step == -1)
        normalize(to, first, -1, factor, shift, n);
    else if (step == 3)
        normalize(to, first, 3, factor, shift, n);
    else if (step == -3)
        normalize(to, first, -3, factor, shift, n);
    else
        normalize(to, first, step, factor, shift, n);
}

/* Writes the pixels [x, x + n) of a line of a row, their blocks moved by the plan of row `by`. Those of a block that is not there are NaN. */
static void read_moved(const picturing *m, const int64_t *plan, int64_t by, int64_t row, int64_t c, int64_t y, int64_t x, int64_t n, float *to) {
    if (!plan) {
        read_line(m, row, c, y, x, n, to);
        return;
    }
    int64_t cell_y = y / m->cell_height, cell_x = x / m->cell_width, count = m->cells[0] * m->cells[1];
    const int64_t *line = plan + by * count + cell_y * m->cells[1];
    for (int64_t at = 0, run; at < n; at += run, cell_x++) {
        int64_t place = x + at - cell_x * m->cell_width, block = line[cell_x];
        run = fm_min(m->cell_width - place, n - at);
        if (block >= 0 && block < count)
            read_line(m, row, c, y % m->cell_height + block / m->cells[1] * m->cell_height,
                      place + block % m->cells[1] * m->cell_width, run, to + at);
        else
            for (int64_t i = at; i < at + run; i++) to[i] = NAN;
    }
}

/* Writes the mask's values of the pixels [x, x + n) of a line. */
static void read_mask(const picturing *m, int64_t row, int64_t y, int64_t x, int64_t n, float *to) {
    int64_t cell_x = x / m->cell_width;
    const float *line = m->mask + (row * m->cells[0] + y / m->cell_height) * m->cells[1];
    if (m->cell_width == 1) {
        memcpy(to, line + x, (size_t)n * sizeof(float));
        return;
    }
    for (int64_t at = 0, run; at < n; at += run, cell_x++) {
        run = fm_min((cell_x + 1) * m->cell_width - x - at, n - at);
        for (int64_t i = at; i < at + run; i++) to[i] = line[cell_x];
    }
}

#define FM_ONLY_FLOAT32
#define FM_TYPED "mix_images_typed.h"
#include "every_dtype.h"

/* shape: rows, channels, height, width. cells: how many down and across in mask and plans. flip, index, lam, boxes [rows, 4], mask [rows,
 * cells] and the plans [rows, cells] may be NULL. */
FASTMIX_EXPORT void fm_mix_images(
    int32_t dtype, int32_t threads, const int64_t *shape, const uint8_t *images, const int64_t *strides, const float *factor,
    const float *shift, const uint8_t *flip, int64_t flip_stride, const float *lam, int64_t lam_stride, const int64_t *index,
    int64_t index_stride, const int64_t *boxes, const float *mask, const int64_t *cells, const int64_t *plan,
    const int64_t *partner_plan, void *out, const int64_t *out_strides) {
    static const fm_task task[] = {images_chunk_float32, NULL, images_chunk_bfloat16, images_chunk_float16};
    int64_t numel = shape[1] * shape[2] * shape[3];
    picturing m = {.rows = shape[0], .channels = shape[1], .height = shape[2], .width = shape[3],
                   .rows_per_chunk = fm_max(1, FM_CHUNK_ROWS / numel), .images = images, .flip = flip, .factor = factor,
                   .shift = shift, .lam = lam, .index = index, .boxes = boxes, .strides = strides, .out_strides = out_strides,
                   .flip_stride = flip_stride, .lam_stride = lam_stride, .index_stride = index_stride, .out = out,
                   .mask = mask, .plan = {plan, partner_plan}};
    for (int d = 0; mask && d < 2; d++) m.cells[d] = cells[d];
    if (mask) m.cell_height = m.height / cells[0], m.cell_width = m.width / cells[1];
    m.streams = out_strides[3] == 1 && shape[0] * numel * fm_itemsize(dtype) >= FM_STREAM_BYTES;
    int64_t chunks = (m.rows + m.rows_per_chunk - 1) / m.rows_per_chunk;
    fm_parallel(task[dtype], &m, chunks, shape[0] * numel < FM_SMALL ? 1 : threads);
}
