/* How the mixing ops cut a batch into chunks, and a row into the parts that lie inside and outside its box. */
#ifndef FASTMIX_ROWS_H
#define FASTMIX_ROWS_H

#include "common.h"

/* The fused multiply-add of each dtype's arithmetic, by the names that spans.h gives it. */
#define fm_fma_float32 fm_fma32
#define fm_fma_float64 fm_fma64
#define fm_fma_bfloat16 fm_fma32
#define fm_fma_float16 fm_fma32

static inline int64_t fm_itemsize(int32_t dtype) { return dtype == FM_FLOAT32 ? 4 : dtype == FM_FLOAT64 ? 8 : 2; }

enum {
    FM_BLOCK = 512,             /* elements: what is widened or added up at once stays in the first cache */
    FM_CHUNK_BYTES = 1 << 20,   /* of a chunk of all rows: a row is still in the cache when it is read as a partner */
    FM_CHUNK_ROWS = 1 << 16,    /* elements of a chunk of whole rows */
    FM_SMALL = 1 << 17,         /* elements: less is not worth waking a thread */
    FM_STREAM_BYTES = 1 << 23   /* a result as large as this is written past the caches: 1.3 times as fast as a copy, else 0.85 */
};

/* A chunk is some whole rows where rows are short, and else the same piece of every row. It depends on the shape alone. */
typedef struct {
    int64_t rows, numel;   /* of the batch, of a row */
    int64_t rows_per_chunk, piece;
    int64_t chunks, pieces;
} fm_cut;

typedef struct { int64_t first_row, last_row, first, last, piece; } fm_chunk;

static inline fm_cut fm_cut_rows(int64_t rows, int64_t numel, int64_t itemsize) {
    fm_cut c = {.rows = rows, .numel = numel};
    int64_t piece = FM_CHUNK_BYTES / (rows * itemsize) & -FM_BLOCK;
    c.piece = fm_min(fm_max(piece, 2 * FM_BLOCK), 32 * FM_BLOCK);
    if (numel <= 2 * c.piece) {
        c.piece = numel;
        c.rows_per_chunk = fm_max(1, FM_CHUNK_ROWS / fm_max(numel, 1));
    } else {
        c.rows_per_chunk = rows;
    }
    c.pieces = (numel + c.piece - 1) / c.piece;
    c.chunks = c.pieces * ((rows + c.rows_per_chunk - 1) / c.rows_per_chunk);
    return c;
}

static inline fm_chunk fm_chunk_of(const fm_cut *c, int64_t chunk) {
    int64_t piece = chunk % c->pieces, first_row = chunk / c->pieces * c->rows_per_chunk;
    fm_chunk k = {first_row, fm_min(first_row + c->rows_per_chunk, c->rows), piece * c->piece,
                  fm_min((piece + 1) * c->piece, c->numel), piece};
    return k;
}

static inline int fm_streams(const fm_cut *c, int64_t itemsize) { return c->rows * c->numel * itemsize >= FM_STREAM_BYTES; }

static inline int fm_threads_for(const fm_cut *c, int threads) { return c->rows * c->numel < FM_SMALL ? 1 : threads; }

/* Writes for each row the rows that have it as their partner: offsets [rows + 1], order [rows]. */
static inline void fm_inverse(const int64_t *index, int64_t stride, int64_t rows, int64_t *offsets, int64_t *order) {
    for (int64_t k = 0; k < rows; k++) {
        int64_t partner = index[k * stride];
        if (partner >= 0 && partner < rows) offsets[partner + 1]++;
    }
    for (int64_t i = 0; i < rows; i++) offsets[i + 1] += offsets[i];
    for (int64_t k = 0; k < rows; k++) {
        int64_t partner = index[k * stride];
        if (partner >= 0 && partner < rows) order[offsets[partner]++] = k;
    }
    for (int64_t i = rows; i > 0; i--) offsets[i] = offsets[i - 1];
    offsets[0] = 0;
}

/* The boxes of all rows. Along dimension d, from the outermost in memory to the innermost, element e of a row has the coordinate
 * e / step[d] % size[d]; column[d] is where the box holds its start, and `dims` columns later its stop. */
typedef struct {
    const int64_t *boxes; /* NULL: no boxes */
    int64_t dims, step[3], size[3], column[3];
} fm_boxes;

/* geometry: dims, then step, size and column of each dimension. */
static inline fm_boxes fm_boxes_of(const int64_t *boxes, const int64_t *geometry) {
    fm_boxes b = {.boxes = boxes, .dims = boxes ? geometry[0] : 0};
    for (int64_t d = 0; d < b.dims; d++) {
        b.step[d] = geometry[1 + 3 * d];
        b.size[d] = geometry[2 + 3 * d];
        b.column[d] = geometry[3 + 3 * d];
    }
    return b;
}

/* Walks the elements [at, end) of a row as parts that are wholly inside or outside its box. */
typedef struct {
    const fm_boxes *b;
    int64_t at, end, start[3], stop[3];
    int has_box;
} fm_parts;

static inline fm_parts fm_parts_of(const fm_boxes *b, int64_t row, int64_t first, int64_t last) {
    fm_parts p = {.b = b, .at = first, .end = last, .has_box = b->boxes != NULL};
    for (int64_t d = 0; d < b->dims; d++) {
        const int64_t *corner = b->boxes + row * 2 * b->dims + b->column[d];
        p.start[d] = fm_min(fm_max(corner[0], 0), b->size[d]);
        p.stop[d] = fm_min(fm_max(corner[b->dims], 0), b->size[d]);
        if (p.start[d] >= p.stop[d]) p.has_box = 0;
    }
    return p;
}

/* Whether there is another part: [*from, *to), inside the box or not. */
static inline int fm_next_part(fm_parts *p, int64_t *from, int64_t *to, int *inside) {
    if (p->at >= p->end) return 0;
    *from = p->at;
    *inside = 0;
    if (!p->has_box) {
        *to = p->at = p->end;
        return 1;
    }
    const fm_boxes *b = p->b;
    int64_t last = b->dims - 1, length = b->step[last] * b->size[last];
    int64_t place = p->at % length, line = p->at - place, stop = length;
    int crosses = 1;
    for (int64_t d = 0; d < last; d++) {
        int64_t coordinate = line / b->step[d] % b->size[d];
        crosses &= coordinate >= p->start[d] && coordinate < p->stop[d];
    }
    if (crosses) {
        int64_t box_start = p->start[last] * b->step[last], box_stop = p->stop[last] * b->step[last];
        if (place < box_start) {
            stop = box_start;
        } else if (place < box_stop) {
            stop = box_stop;
            *inside = 1;
        }
    }
    *to = p->at = fm_min(line + stop, p->end);
    return 1;
}

#endif
