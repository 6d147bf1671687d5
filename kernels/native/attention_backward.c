/* The way back through ragged causal attention: windows of sequences, a key/value head at a time. Knows pages, no layer.
 *
 * Rows of a window go back in chunks, later rows first. What rows and keys have in common (scores, their gradients) lies
 * transposed, [keys][rows of a chunk]: then keys and values are read as they lie, lanes are rows, and no sum crosses lanes.
 * A row's sums take the keys in blocks that begin at multiples of BLOCK_KEYS, a key's sums the rows one after another: neither
 * depends on chunks. Keys that a row does not see would add zeros, and are left out where that saves a tile.
 */
#define CHUNK_PAIRS 48 /* pairs of a row and a query head that go back together: 6 x 16 tiles fit in both directions */
#define BLOCK_KEYS 60  /* keys whose rows, with what a chunk has to do with them, stay in the L1 cache; a multiple of MAX_ROWS */

typedef struct {
    int64_t start, end;          /* rows of the batch */
    int64_t first_key, num_keys; /* into `slots`: keys before the window, then those of its own rows */
    float *dk, *dv;              /* [num_keys][K][D], to which the window's share is added */
} window_t;

typedef struct {
    const void *dout, *q;
    void *out, *dq; /* [T][N][D] */
    const void *k_cache, *v_cache;
    const int64_t *slots;
    int64_t num_heads, num_kv_heads, head_dim;
    float scale;
    int half, half_rows; /* of the caches, of the rows */
} attention_backward_t;

/* --- products: c [rows][width] = a b, b [count][width] ------------------------------------------------------------------- */

typedef enum { SET, ADD_SUM, GO_ON } product_mode_t; /* c = sum, c += sum, or c goes on product after product */

/* Element (r, k) of a is at r * a_stride + k, or at r + k * a_stride if it is `transposed`. */
INLINE void multiply_tile(const float *a, int64_t a_stride, int transposed, const float *b, int64_t b_stride, int64_t count, int rows,
                          int vectors, float *c, int64_t c_stride, product_mode_t mode) {
    v8 acc[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) acc[r][v] = mode == GO_ON ? load(c, r * c_stride + v * LANES, 0) : splat(0.0f);
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; k++) {
        v8 held[2];
        for (int v = 0; v < vectors; v++) held[v] = load(b, k * b_stride + v * LANES, 0);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            v8 ar = splat(transposed ? a[r + k * a_stride] : a[r * a_stride + k]);
            for (int v = 0; v < vectors; v++) acc[r][v] += ar * held[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            int64_t to = r * c_stride + v * LANES;
            store(c, to, mode == ADD_SUM ? load(c, to, 0) + acc[r][v] : acc[r][v], 0);
        }
}

#define TILE_OF(ROWS, TRANSPOSED)                                                                                                    \
    case ROWS * 2 + TRANSPOSED:                                                                                                      \
        for (; column + 2 * LANES <= width; column += 2 * LANES)                                                                     \
            multiply_tile(a, a_stride, TRANSPOSED, b + column, b_stride, count, ROWS, 2, c + column, c_stride, mode);                \
        if (column < width)                                                                                                          \
            multiply_tile(a, a_stride, TRANSPOSED, b + column, b_stride, count, ROWS, 1, c + column, c_stride, mode);                \
        break;

/* Up to MAX_ROWS rows; `width` is a multiple of LANES. */
static void multiply(const float *a, int64_t a_stride, int transposed, const float *b, int64_t b_stride, int64_t count, int rows, int64_t width,
                     float *c, int64_t c_stride, product_mode_t mode) {
    int64_t column = 0;
    switch (rows * 2 + transposed) {
        TILE_OF(1, 0) TILE_OF(2, 0) TILE_OF(3, 0) TILE_OF(4, 0) TILE_OF(5, 0) TILE_OF(6, 0)
        TILE_OF(1, 1) TILE_OF(2, 1) TILE_OF(3, 1) TILE_OF(4, 1) TILE_OF(5, 1) TILE_OF(6, 1)
    }
}

/* y [num_columns][stride] = x [num_rows][num_columns] transposed; lanes beyond the rows, up to a multiple of LANES, are 0. */
static void transpose(const float *x, int64_t num_rows, int64_t num_columns, float *y, int64_t stride) {
    for (int64_t r = 0; r < num_rows; r += LANES)
        for (int64_t c = 0; c < num_columns; c += LANES) {
            __m256 a[8], b[8];
            for (int i = 0; i < 8; i++) a[i] = r + i < num_rows ? _mm256_load_ps(x + (r + i) * num_columns + c) : _mm256_setzero_ps();
            for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
                    a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
                }
            for (int i = 0; i < 4; i++) {
                _mm256_store_ps(y + (c + i) * stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
                _mm256_store_ps(y + (c + i + 4) * stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
            }
        }
}

/* --- a chunk of rows ------------------------------------------------------------------------------------------------------- */

typedef struct {
    float *k_LD, *v_LD;                       /* of the window's keys */
    float *p_LR, *ds_BR;                      /* exp(score - highest); gradients of the scores of one block of keys */
    float *q_RD, *dout_RD, *out_RD, *dq_RD;   /* q is scaled, dout divided by its row's sum */
    float *q_DR, *dout_DR;
    float *highest_R, *sum_R, *shared_R;
    int32_t *visible_R;                       /* keys that a pair sees: the first ones */
    float *dk, *dv;                           /* of the first key, `kv_row` apart */
    int64_t dim, group, kv_row, stride;       /* R: pairs of a row and a query head, `stride` at most, later rows first */
    int64_t num_pairs, num_seen, num_seen_by_all;
} chunk_t;

/* The pairs that see this key: the first ones. */
INLINE int64_t num_seeing(const chunk_t *c, int64_t key) { return least(c->num_pairs, (c->num_seen - key) * c->group); }

/* The end of the keys before `end` that one of the MAX_ROWS pairs from `pair` on sees. */
INLINE int64_t last_seen(const chunk_t *c, int64_t pair, int64_t end) { return least(end, c->num_seen - pair / c->group); }

/* y_LR = w x_DR of the keys [first, end), and of the pairs that see them. */
static void by_key(const chunk_t *c, const float *w_LD, const float *x_DR, int64_t first, int64_t end, float *y_LR) {
    for (int64_t key = first; key < end; key += MAX_ROWS)
        multiply(w_LD + key * c->dim, c->dim, 0, x_DR, c->stride, c->dim, (int)least(MAX_ROWS, end - key), padded8(num_seeing(c, key)),
                 y_LR + (key - first) * c->stride, c->stride, SET);
}

/* y_RD (+)= x^T w over the keys [first, end). */
static void over_keys(const chunk_t *c, const float *x_LR, const float *w_LD, int64_t first, int64_t end, float *y_RD) {
    for (int64_t pair = 0; pair < c->num_pairs; pair += MAX_ROWS) {
        int64_t count = last_seen(c, pair, end) - first;
        if (count > 0)
            multiply(x_LR + pair, c->stride, 1, w_LD + first * c->dim, c->dim, count, (int)least(MAX_ROWS, c->num_pairs - pair), c->dim,
                     y_RD + pair * c->dim, c->dim, first ? ADD_SUM : SET);
    }
}

/* gradient += x w of the keys [first, end), pair after pair. */
static void over_pairs(const chunk_t *c, const float *x_LR, const float *w_RD, int64_t first, int64_t end, float *gradient) {
    for (int64_t key = first; key < end; key += MAX_ROWS)
        multiply(x_LR + (key - first) * c->stride, c->stride, 0, w_RD, c->dim, num_seeing(c, key), (int)least(MAX_ROWS, end - key), c->dim,
                 gradient + key * c->kv_row, c->kv_row, GO_ON);
}

INLINE v8 if_visible(const chunk_t *c, int64_t key, int64_t pair, v8 value, v8 otherwise) {
    return where(*(const i8x *)(c->visible_R + pair) > (int32_t)key, value, otherwise);
}

/* Scores to exp(score - highest), their sums, and the output times these sums. */
static void forth(const chunk_t *c) {
    int64_t lanes = padded8(c->num_pairs);
    by_key(c, c->k_LD, c->q_DR, 0, c->num_seen, c->p_LR);
    for (int64_t i = 0; i < lanes; i += LANES) *(v8 *)(c->highest_R + i) = splat(-INFINITY), *(v8 *)(c->sum_R + i) = splat(0.0f);
    for (int64_t key = 0; key < c->num_seen; key++)
        for (int64_t i = 0; i < lanes; i += LANES) {
            v8 *score = (v8 *)(c->p_LR + key * c->stride + i), *highest = (v8 *)(c->highest_R + i);
            if (key >= c->num_seen_by_all) *score = if_visible(c, key, i, *score, splat(-INFINITY));
            *highest = where(*score > *highest, *score, *highest);
        }
    for (int64_t first = 0; first < c->num_seen; first += BLOCK_KEYS) {
        int64_t end = least(first + BLOCK_KEYS, c->num_seen);
        for (int64_t key = first; key < end; key++)
            for (int64_t i = 0; i < lanes; i += LANES) {
                v8 *weight = (v8 *)(c->p_LR + key * c->stride + i);
                *weight = exp8(*weight - *(v8 *)(c->highest_R + i));
                *(v8 *)(c->sum_R + i) += *weight;
            }
        over_keys(c, c->p_LR + first * c->stride, c->v_LD, first, end, c->out_RD);
    }
}

/* The output, dout divided by the sums, and what the gradients of a pair's scores have in common. */
static void between(const chunk_t *c) {
    for (int64_t i = 0; i < c->num_pairs; i++) {
        v8 inverse = splat(1.0f / c->sum_R[i]), shared = splat(0.0f);
        for (int64_t d = 0; d < c->dim; d += LANES) {
            v8 *out = (v8 *)(c->out_RD + i * c->dim + d), *dout = (v8 *)(c->dout_RD + i * c->dim + d);
            *out *= inverse;
            *dout *= inverse;
            shared += *out * *dout;
        }
        c->shared_R[i] = total(shared);
    }
    transpose(c->dout_RD, c->num_pairs, c->dim, c->dout_DR, c->stride);
}

/* The gradients of scores, a block of keys at a time, and of all that they came from; dq still without the scale. */
static void back(const chunk_t *c) {
    int64_t lanes = padded8(c->num_pairs);
    for (int64_t first = 0; first < c->num_seen; first += BLOCK_KEYS) {
        int64_t end = least(first + BLOCK_KEYS, c->num_seen);
        const float *p_BR = c->p_LR + first * c->stride;
        by_key(c, c->v_LD, c->dout_DR, first, end, c->ds_BR);
        for (int64_t key = first; key < end; key++)
            for (int64_t i = 0; i < lanes; i += LANES) {
                int64_t at_pair = (key - first) * c->stride + i;
                v8 *ds = (v8 *)(c->ds_BR + at_pair), value = *(v8 *)(p_BR + at_pair) * (*ds - *(v8 *)(c->shared_R + i));
                *ds = key < c->num_seen_by_all ? value : if_visible(c, key, i, value, splat(0.0f));
            }
        over_keys(c, c->ds_BR, c->k_LD, first, end, c->dq_RD);
        over_pairs(c, c->ds_BR, c->q_RD, first, end, c->dk);
        over_pairs(c, p_BR, c->dout_RD, first, end, c->dv);
    }
}

/* --- a window -------------------------------------------------------------------------------------------------------------- */

/* Elements from `from` on of a row as floats, times `factor`; and the way back. */
INLINE void read_row(const void *x, int64_t from, int half, float *to, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d += LANES) *(v8 *)(to + d) = load(x, from + d, half) * splat(factor);
}

INLINE void write_row(const float *x, void *to, int64_t from, int half, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d += LANES) store(to, from + d, *(const v8 *)(x + d) * splat(factor), half);
}

static void widen_head(const void *cache, const int64_t *slots, int64_t num_keys, int64_t kv_row, int64_t column, int64_t dim, float *x_LD,
                       int half) {
    for (int64_t j = 0; j < num_keys; j++) {
        if (half) read_row(cache, slots[j] * kv_row + column, 1, x_LD + j * dim, dim, 1.0f);
        else read_row(cache, slots[j] * kv_row + column, 0, x_LD + j * dim, dim, 1.0f);
    }
}

/* Where pair i of a chunk that ends before row `end` lies in the batch. */
INLINE int64_t place_of(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head, int64_t i) {
    return ((end - 1 - i / c->group) * p->num_heads + kv_head * c->group + i % c->group) * c->dim;
}

INLINE void read_pairs(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head, int half) {
    for (int64_t i = 0; i < c->num_pairs; i++) {
        int64_t from = place_of(p, c, end, kv_head, i);
        read_row(p->q, from, half, c->q_RD + i * c->dim, c->dim, p->scale);
        read_row(p->dout, from, half, c->dout_RD + i * c->dim, c->dim, 1.0f);
    }
}

INLINE void write_pairs(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head, int half) {
    for (int64_t i = 0; i < c->num_pairs; i++) {
        int64_t to = place_of(p, c, end, kv_head, i);
        write_row(c->out_RD + i * c->dim, p->out, to, half, c->dim, 1.0f);
        write_row(c->dq_RD + i * c->dim, p->dq, to, half, c->dim, p->scale);
    }
}

static void read_chunk(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head) {
    if (p->half_rows) read_pairs(p, c, end, kv_head, 1);
    else read_pairs(p, c, end, kv_head, 0);
    for (int64_t i = 0; i < padded8(c->num_pairs); i++) c->visible_R[i] = i < c->num_pairs ? (int32_t)(c->num_seen - i / c->group) : 0;
    transpose(c->q_RD, c->num_pairs, c->dim, c->q_DR, c->stride);
}

static void write_chunk(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head) {
    if (p->half_rows) write_pairs(p, c, end, kv_head, 1);
    else write_pairs(p, c, end, kv_head, 0);
}

/* This thread's room for the chunks of a window; 0, or -1 if there is no memory. */
static int make_room(chunk_t *c, int64_t num_keys) {
    static __thread buffer_t buffer;
    int64_t per_head = num_keys * c->dim, per_chunk = c->stride * c->dim;
    float *room = grown(&buffer, (size_t)(2 * per_head + (num_keys + BLOCK_KEYS + 4) * c->stride + 6 * per_chunk));
    if (!room) return -1;
    float **parts[] = {&c->k_LD, &c->v_LD, &c->p_LR, &c->ds_BR, &c->q_RD, &c->dout_RD, &c->out_RD, &c->dq_RD, &c->q_DR, &c->dout_DR,
                       &c->highest_R, &c->sum_R, &c->shared_R};
    int64_t sizes[] = {per_head, per_head, num_keys * c->stride, BLOCK_KEYS * c->stride, per_chunk, per_chunk, per_chunk, per_chunk, per_chunk,
                       per_chunk, c->stride, c->stride, c->stride};
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); room += sizes[i++]) *parts[i] = room;
    c->visible_R = (int32_t *)room;
    return 0;
}

/* Rows of a window and the query heads of one key/value head, later rows first. */
static int head_backward(const attention_backward_t *p, const window_t *w, int64_t kv_head) {
    int64_t dim = p->head_dim, group = p->num_heads / p->num_kv_heads, kv_row = p->num_kv_heads * dim, column = kv_head * dim;
    int64_t chunk_rows = least(group < CHUNK_PAIRS ? CHUNK_PAIRS / group : 1, w->end - w->start), context = w->num_keys - (w->end - w->start);
    chunk_t c = {.dim = dim, .group = group, .kv_row = kv_row, .stride = padded8(chunk_rows * group), .dk = w->dk + column, .dv = w->dv + column};
    if (make_room(&c, w->num_keys)) return -1;
    widen_head(p->k_cache, p->slots + w->first_key, w->num_keys, kv_row, column, dim, c.k_LD, p->half);
    widen_head(p->v_cache, p->slots + w->first_key, w->num_keys, kv_row, column, dim, c.v_LD, p->half);
    for (int64_t end = w->end; end > w->start; end -= chunk_rows) {
        int64_t num_rows = least(chunk_rows, end - w->start);
        c.num_pairs = num_rows * group;
        c.num_seen = context + end - w->start;
        c.num_seen_by_all = c.num_seen - num_rows + 1;
        read_chunk(p, &c, end, kv_head);
        forth(&c);
        between(&c);
        back(&c);
        write_chunk(p, &c, end, kv_head);
    }
    return 0;
}

/* The attention's output again, and the gradients of queries, and of keys and values added to what is there: a key's from later rows
 * first. Every row of the batch is in one window. D is a multiple of 8. Returns 0, or -1 if there was no memory. */
int heddle_attention_backward(const void *dout, const void *q, const void *k_cache, const void *v_cache, void *out, void *dq,
                              const window_t *windows, int64_t num_windows, const int64_t *slots, int64_t num_heads, int64_t num_kv_heads,
                              int64_t head_dim, float scale, int half, int half_rows) {
    attention_backward_t p = {dout, q, out, dq, k_cache, v_cache, slots, num_heads, num_kv_heads, head_dim, scale, half, half_rows};
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) if (num_windows * num_kv_heads > 1)
    for (int64_t task = 0; task < num_windows * num_kv_heads; task++)
        if (head_backward(&p, windows + task / num_kv_heads, task % num_kv_heads)) {
#pragma omp atomic write
            failed = 1;
        }
    return failed ? -1 : 0;
}
