/* What samplers draw of a batch: partners, lam, boxes, masks, the choice among samplers, and the target. fastmix/_torch/sample.py says
 * what each random word is for, and draws the same. */
#include <stdlib.h>

#include "draws.h"

enum { REST, LAM, BOX, SIDES, MASK, CHOICE_OF };
enum { EACH_ROW, EACH_PAIR, EACH_BATCH };
enum { ANY, FLIP, ROLL, GIVEN };
enum { PROPORTIONAL, LARGER, OWN };
enum { MOST_OWNERS = 64, AT_ONCE = 64, ROWS_OF_CHUNK = 1024 };

/* A sampler, as a table of numbers has it; parents stand before those that they choose from. */
typedef struct { double kind, owner, stream, per, partner, label, a, b, prob, correct, least, most, parent, low, high; } node;

/* To `weights` what Python packs, in the order of library.SIGNATURES; then what follows from it. given, mask, own (where it is lam), box and
 * what belongs to labels y may be NULL. */
typedef struct {
    int64_t *const *states;
    int64_t owners, seeded; /* the first `seeded` states move on */
    const node *table;
    int64_t nodes, rows, keys; /* keys: bits of the owners whose keys give partners */
    const int64_t *given;      /* partners and groups of nodes that have them, [nodes, 2, rows] */
    const int64_t *sizes;
    int64_t dims, cells;
    int32_t wide, threads; /* wide: results are float64 */
    void *lam;
    int64_t *index;
    void *own;
    int64_t *box;
    void *mask;
    const int64_t *y;
    int64_t y_stride, *classes;
    void *weights;
    fm_source source[MOST_OWNERS];
    const int64_t *order[MOST_OWNERS], *rank[MOST_OWNERS]; /* rows in the order of an owner's keys, and each row's place there */
    const fm_words *words[MOST_OWNERS];                    /* of stream 0, from which the keys are */
    const char *shared; /* masks of samplers whose batch has one, [nodes, cells], and their means */
    const double *means;
} batch;

/* The rows in the order of their keys of 40 bits, equal ones in their own: buckets by the highest bits, of about a row each, and then
 * insertion. Returns 0, or 1 if there is no memory. */
typedef struct { uint64_t key; int64_t row; } keyed;

static int sort_rows(const fm_words *words, int64_t rows, int64_t *order, int64_t *rank) {
    int bits = 1;
    while (bits < 24 && (int64_t)1 << bits < rows) bits++;
    int64_t *starts = calloc(((size_t)1 << bits) + 1, sizeof(int64_t));
    keyed *found = malloc((size_t)rows * 2 * sizeof(keyed)), *sorted = found + rows;
    if (!starts || !found) {
        free(starts);
        free(found);
        return 1;
    }
    for (int64_t row = 0; row < rows; row++) {
        found[row].key = words[row].word[0] >> 24;
        found[row].row = row;
        starts[(found[row].key >> (40 - bits)) + 1]++;
    }
    for (int64_t bucket = 0; bucket < (int64_t)1 << bits; bucket++) starts[bucket + 1] += starts[bucket];
    for (int64_t row = 0; row < rows; row++) sorted[starts[found[row].key >> (40 - bits)]++] = found[row];
    for (int64_t place = 1; place < rows; place++) {
        keyed moved = sorted[place];
        int64_t to = place;
        for (; to > 0 && sorted[to - 1].key > moved.key; to--) sorted[to] = sorted[to - 1];
        sorted[to] = moved;
    }
    for (int64_t place = 0; place < rows; place++) {
        order[place] = sorted[place].row;
        rank[sorted[place].row] = place;
    }
    free(starts);
    free(found);
    return 0;
}

/* The partner of a row, and the number of the group that shares its draws. An odd number of rows has a ring of three beside its pairs. */
static int64_t partner_of(const batch *b, int64_t number, int64_t row, int64_t *group) {
    const node *n = b->table + number;
    int64_t rows = b->rows, last = rows - 1, ring = rows % 2 ? fm_min(rows, 3) : 0;
    int pair = n->per == EACH_PAIR;
    *group = n->per == EACH_ROW ? row : 0;
    if (n->partner == GIVEN) {
        const int64_t *given = b->given + 2 * number * rows + row;
        if (pair) *group = given[rows];
        return given[0];
    }
    if (n->partner == ANY) {
        const int64_t *order = b->order[(int)n->owner], place = b->rank[(int)n->owner][row];
        if (!pair) return order[place < last ? place + 1 : 0];
        *group = place < ring ? 0 : (place - ring % 2) / 2;
        if (place < ring) return order[place + 1 < ring ? place + 1 : 0];
        return order[(place - ring) % 2 ? place - 1 : place + 1];
    }
    if (n->partner == FLIP) {
        if (pair) *group = fm_min(row, last - row);
        return last - row;
    }
    if (!pair) return row ? row - 1 : last;
    *group = fm_min(row / 2, fm_max(rows / 2 - 1, 0));
    if (row > last - ring) return row < last ? row + 1 : last + 1 - ring;
    return row ^ 1;
}

/* The number of the sampler that a row uses. */
static int64_t chosen_by(const batch *b, int64_t row) {
    int64_t chosen = 0, asked = -1;
    double chance = 0;
    for (int64_t number = 1; number < b->nodes; number++) {
        const node *n = b->table + number;
        if (chosen != n->parent) continue;
        if (asked != chosen) { /* the chance, of 2**53, is one for all that a sampler chooses from */
            const node *up = b->table + chosen;
            int64_t item = up->per == EACH_ROW ? row : 0;
            if (up->per == EACH_PAIR) partner_of(b, chosen, row, &item);
            fm_words w = fm_random_words(&b->source[(int)up->owner], FM_CHOICE, (int64_t)up->stream, item >> 2);
            chance = (double)(w.word[item & 3] >> 11);
            asked = chosen;
        }
        if (chance >= n->low && chance < n->high) chosen = number;
    }
    return chosen;
}

/* Writes the box of a group, and returns the part of the image outside of it. */
static double cut_box(const batch *b, const node *n, int64_t group, double rest, int64_t *box) {
    double ratio = b->dims == 1 ? rest : b->dims == 2 ? sqrt(rest) : cbrt(rest);
    fm_words w = fm_random_words(&b->source[(int)n->owner], FM_PLACE, (int64_t)n->stream, group);
    int64_t inside = 1, whole = 1;
    for (int64_t d = 0; d < b->dims; d++) {
        int64_t size = b->sizes[d], side, start, stop;
        if (n->kind == BOX) {
            side = (int64_t)((double)size * ratio);
            start = fm_scaled(w.word[d] >> 32, size) - side / 2;
            stop = fm_min(start + side, size);
            start = fm_max(start, 0);
        } else {
            int64_t shortest = (int64_t)((double)size * n->least), longest = (int64_t)((double)size * n->most);
            side = shortest + fm_scaled(w.word[d] & 0xFFFFFFFFu, longest - shortest + 1);
            start = fm_scaled(w.word[d] >> 32, size - side + 1);
            stop = start + side;
        }
        box[d] = start;
        box[b->dims + d] = stop;
        inside *= stop - start;
        whole *= size;
    }
    return 1 - (double)inside / (double)fm_max(whole, 1);
}

/* Draws the mask of a group, and returns its mean: a sum of integers, 64 bits behind the point, in any order the same. */
static double draw_mask(const batch *b, const node *n, int64_t group, void *mask) {
    const fm_source *source = &b->source[(int)n->owner];
    int64_t stream = (int64_t)n->stream, high_sum = 0, low_sum = 0, blocks = (b->cells + 1) / 2;
    uint64_t u[8] = {0}, v[8] = {0};
    double a[8], lam[8], rest[8];
    for (int l = 0; l < 8; l++) a[l] = n->a;
    for (int64_t first = 0; first < b->cells; first += 8) {
        int64_t count = fm_min(8, b->cells - first);
        if (n->a == n->b) {
            for (int64_t l = 0; l < count; l += 2) {
                fm_words w = fm_random_words(source, FM_CELL, stream, group * blocks + (first + l) / 2);
                u[l] = w.word[0], v[l] = w.word[1], u[l + 1] = w.word[2], v[l + 1] = w.word[3];
            }
            fm_symmetric_beta(u, v, a, lam, rest);
        } else {
            for (int64_t l = 0; l < count; l++)
                fm_uneven_beta(source, FM_CELL_GAMMA, stream, group * b->cells + first + l, n->a, n->b, &lam[l], &rest[l]);
        }
        for (int64_t l = 0; l < count; l++) {
            double cell = b->wide ? lam[l] : (double)(float)lam[l], bits = cell * 0x1p32;
            int64_t high = (int64_t)bits;
            if (b->wide)
                ((double *)mask)[first + l] = cell;
            else
                ((float *)mask)[first + l] = (float)cell;
            high_sum += high;
            low_sum += (int64_t)((bits - (double)high) * 0x1p32);
        }
    }
    return b->cells ? ((double)high_sum + (double)low_sum * 0x1p-32) * 0x1p-32 / (double)b->cells : 1;
}

static void keep(const batch *b, void *to, int64_t at, double value) {
    if (b->wide)
        ((double *)to)[at] = value;
    else
        ((float *)to)[at] = (float)value;
}

/* Gives a row its mask, and returns the mean. */
static double mask_of_row(const batch *b, int64_t number, int64_t group, int64_t row) {
    int64_t bytes = b->cells * (b->wide ? 8 : 4);
    char *mask = (char *)b->mask + row * bytes;
    if (b->table[number].per != EACH_BATCH) return draw_mask(b, b->table + number, group, mask);
    memcpy(mask, b->shared + number * bytes, (size_t)bytes);
    return b->means[number];
}

/* Draws rows from `first` on, as many as are at once in the caches. */
static void draw_rows(const batch *b, int64_t first, int64_t count) {
    int64_t chosen[AT_ONCE], group[AT_ONCE], before = -1;
    uint64_t u[AT_ONCE] = {0}, v[AT_ONCE] = {0};
    double a[AT_ONCE], lams[AT_ONCE], rests[AT_ONCE];
    char mixed[AT_ONCE];
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i;
        const node *n = b->table + (chosen[i] = b->nodes > 1 ? chosen_by(b, row) : 0);
        b->index[row] = row;
        mixed[i] = 0;
        a[i] = 1;
        if (n->kind == REST || n->kind == CHOICE_OF) continue;
        int64_t partner = b->index[row] = partner_of(b, chosen[i], row, &group[i]);
        const fm_words *known = n->stream == 0 ? b->words[(int)n->owner] : NULL;
        fm_words w = known ? known[group[i]] : fm_random_words(&b->source[(int)n->owner], FM_ROW, (int64_t)n->stream, group[i]);
        mixed[i] = (double)(w.word[1] >> 11) < n->prob * 0x1p53 && (n->partner != GIVEN || partner != row);
        u[i] = w.word[2], v[i] = w.word[3], a[i] = n->a;
    }
    for (int64_t i = count; i % 8; i++) a[i] = 1;
    for (int64_t i = 0; i < count; i += 8) fm_symmetric_beta(u + i, v + i, a + i, lams + i, rests + i);
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i, *box = b->dims ? b->box + 2 * b->dims * row : NULL;
        const node *n = b->table + chosen[i];
        int kind = mixed[i] ? (int)n->kind : REST;
        double lam = 1, own;
        if ((kind == LAM || kind == BOX) && n->a != n->b) {
            if (before >= 0 && chosen[before] == chosen[i] && group[before] == group[i])
                lams[i] = lams[before], rests[i] = rests[before];
            else
                fm_uneven_beta(&b->source[(int)n->owner], FM_GAMMA, (int64_t)n->stream, group[i], n->a, n->b, &lams[i], &rests[i]);
            before = i;
        }
        for (int64_t d = 0; d < 2 * b->dims; d++) box[d] = 0;
        if (kind == LAM) lam = lams[i];
        own = lam;
        if (kind == BOX || kind == SIDES) {
            own = cut_box(b, n, group[i], rests[i], box);
            if (kind == BOX && !n->correct) own = 1 - rests[i];
        }
        if (b->mask) {
            if (kind == MASK)
                own = lam = mask_of_row(b, chosen[i], group[i], row);
            else
                for (int64_t cell = 0; cell < b->cells; cell++) keep(b, b->mask, row * b->cells + cell, lam);
        }
        if (n->label == LARGER) own = own >= 0.5;
        if (n->label == OWN) own = 1;
        keep(b, b->lam, row, lam);
        if (b->own) keep(b, b->own, row, own);
        if (b->classes) {
            b->classes[2 * row] = b->y[row * b->y_stride];
            b->classes[2 * row + 1] = b->y[b->index[row] * b->y_stride];
            keep(b, b->weights, 2 * row, own);
            keep(b, b->weights, 2 * row + 1, b->wide ? 1 - own : (double)(1 - (float)own));
        }
    }
}

static void draw_chunk(void *arg, int64_t chunk) {
    const batch *b = arg;
    int64_t per_chunk = b->mask ? 1 : ROWS_OF_CHUNK, last = fm_min((chunk + 1) * per_chunk, b->rows);
    for (int64_t row = chunk * per_chunk; row < last; row += AT_ONCE) draw_rows(b, row, fm_min(AT_ONCE, last - row));
}

/* Draws a batch. Returns 0, or 1 if there is no memory. */
FASTMIX_EXPORT int32_t fm_sample(const batch *packed) {
    batch b;
    memcpy(&b, packed, offsetof(batch, source));
    int64_t count = __builtin_popcountll((uint64_t)b.keys), s = 0, *next, bytes = b.cells * (b.wide ? 8 : 4);
    int64_t *orders = next = malloc((size_t)(2 * count * b.rows + 1) * sizeof(int64_t));
    fm_words *all = malloc((size_t)(count * b.rows + 1) * sizeof(fm_words)), *words = all;
    char *shared = b.mask ? malloc((size_t)(b.nodes * bytes + 1)) : NULL;
    double *means = b.mask ? malloc((size_t)b.nodes * sizeof(double)) : NULL;
    int failed = !orders || !all || (b.mask && (!shared || !means));
    for (; s < b.owners && !failed; s++) {
        b.source[s] = fm_source_of(b.states[s]);
        b.words[s] = NULL;
        /* in one step: threads that draw from one sampler at once get batches of their own */
        if (s < b.seeded) b.source[s].batch = (uint64_t)__atomic_fetch_add(&b.states[s][2], 1, __ATOMIC_RELAXED);
        if (!(b.keys >> s & 1) || !b.rows) continue;
        for (int64_t row = 0; row < b.rows; row++) words[row] = fm_random_words(&b.source[s], FM_ROW, 0, row);
        failed = sort_rows(words, b.rows, next, next + b.rows);
        b.words[s] = words;
        b.order[s] = next;
        b.rank[s] = next + b.rows;
        words += b.rows;
        next += 2 * b.rows;
    }
    if (!failed) {
        for (int64_t number = 0; b.mask && number < b.nodes; number++) {
            const node *n = b.table + number;
            if (n->kind == MASK && n->per == EACH_BATCH) means[number] = draw_mask(&b, n, 0, shared + number * bytes);
        }
        b.shared = shared;
        b.means = means;
        int64_t chunks = b.mask ? b.rows : (b.rows + ROWS_OF_CHUNK - 1) / ROWS_OF_CHUNK;
        fm_parallel(draw_chunk, &b, chunks, b.rows * (b.mask ? b.cells : 1) < 4 * ROWS_OF_CHUNK ? 1 : b.threads);
    } else {
        while (s-- > 0)
            if (s < b.seeded) __atomic_fetch_sub(&b.states[s][2], 1, __ATOMIC_RELAXED);
    }
    free(orders);
    free(all);
    free(shared);
    free(means);
    return failed;
}
