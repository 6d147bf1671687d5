/* The way back through ragged causal attention: windows of sequences, a key/value head at a time. Knows pages, no layer.
 *
 * Rows of a window go back in chunks, later rows first. What rows and keys have in common (scores, their gradients) lies
 * transposed, [keys][rows of a chunk]: then keys and values are read as they lie, lanes are rows, and no sum crosses lanes.
 * A row's sums take the keys in blocks that begin at multiples of BLOCK_KEYS, a key's sums the rows one after another: neither
 * depends on chunks. Keys that a row does not see would add zeros, and are left out where that saves a tile.
 *
 * Chunks are the threads' tasks. They add to the gradients of keys and values in their order: a chunk comes to a block of keys when the
 * chunk before, which another thread may have, is through with it. Tasks are taken in an order in which that one has been taken before.
 */
#include <sched.h>

#define CHUNK_PAIRS 48    /* pairs of a row and a query head that go back together: tiles fit in both directions */
#define BLOCK_KEYS 60     /* keys whose rows, with what a chunk has to do with them, stay in the L1 cache; a multiple of MAX_ROWS */
#define GROUP_FLOATS 262144 /* of keys and values of heads that go back side by side: they stay in the L2 cache */
#define PATIENCE 64       /* looks at another thread's progress before this one lets others run */

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

/* --- a chunk of rows ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const float *k_LD, *v_LD;                 /* of the window's keys, D in whole vectors */
    float *p_LR, *ds_BR;                      /* exp(score - highest); gradients of the scores of one block of keys */
    float *q_RD, *dout_RD, *out_RD, *dq_RD;   /* q is scaled, dout divided by its row's sum */
    float *q_DR, *dout_DR;
    float *highest_R, *sum_R, *shared_R;
    int32_t *visible_R;                       /* keys that a pair sees: the first ones */
    float *dk, *dv;                           /* of the first key, `kv_row` apart */
    int64_t dim, width, group, kv_row, stride; /* D, in whole vectors; R: pairs of a row and a query head, `stride` at most, later rows first */
    int64_t num_pairs, num_seen, num_seen_by_all;
    int64_t *progress;                        /* blocks of keys that this chunk is through with; before it, those of the chunk before */
    int is_first;
} chunk_t;

/* The pairs that see this key: the first ones. */
INLINE int64_t num_seeing(const chunk_t *c, int64_t key) { return least(c->num_pairs, (c->num_seen - key) * c->group); }

/* The end of the keys before `end` that one of the MAX_ROWS pairs from `pair` on sees. */
INLINE int64_t last_seen(const chunk_t *c, int64_t pair, int64_t end) { return least(end, c->num_seen - pair / c->group); }

/* y_LR = w x_DR of the keys [first, end), and of the pairs that see them. */
static void by_key(const chunk_t *c, const float *w_LD, const float *x_DR, int64_t first, int64_t end, float *y_LR) {
    for (int64_t key = first; key < end; key += MAX_ROWS)
        multiply(w_LD + key * c->width, c->width, 0, x_DR, c->stride, c->dim, (int)least(MAX_ROWS, end - key), padded(num_seeing(c, key)),
                 y_LR + (key - first) * c->stride, c->stride, SET);
}

/* y_RD (+)= x^T w over the keys [first, end). */
static void over_keys(const chunk_t *c, const float *x_LR, const float *w_LD, int64_t first, int64_t end, float *y_RD) {
    for (int64_t pair = 0; pair < c->num_pairs; pair += MAX_ROWS) {
        int64_t count = last_seen(c, pair, end) - first;
        if (count > 0)
            multiply(x_LR + pair, c->stride, 1, w_LD + first * c->width, c->width, count, (int)least(MAX_ROWS, c->num_pairs - pair), c->width,
                     y_RD + pair * c->width, c->width, first ? ADD_SUM : SET);
    }
}

/* gradient += x w of the keys [first, end), pair after pair. */
static void over_pairs(const chunk_t *c, const float *x_LR, const float *w_RD, int64_t first, int64_t end, float *gradient) {
    for (int64_t key = first; key < end; key += MAX_ROWS)
        multiply(x_LR + (key - first) * c->stride, c->stride, 0, w_RD, c->width, num_seeing(c, key), (int)least(MAX_ROWS, end - key), c->dim,
                 gradient + key * c->kv_row, c->kv_row, GO_ON);
}

INLINE vec if_visible(const chunk_t *c, int64_t key, int64_t pair, vec value, vec otherwise) {
    return choose(is_above_int(*(const ivec *)(c->visible_R + pair), (int32_t)key), value, otherwise);
}

/* Scores to exp(score - highest), their sums, and the output times these sums. */
static void forth(const chunk_t *c) {
    int64_t lanes = padded(c->num_pairs);
    by_key(c, c->k_LD, c->q_DR, 0, c->num_seen, c->p_LR);
    for (int64_t i = 0; i < lanes; i += WIDE) {
        vec highest = spread(-INFINITY);
        for (int64_t key = 0; key < c->num_seen; key++) {
            vec *score = (vec *)(c->p_LR + key * c->stride + i);
            if (key >= c->num_seen_by_all) *score = if_visible(c, key, i, *score, spread(-INFINITY));
            highest = choose(is_above(*score, highest), *score, highest);
        }
        *(vec *)(c->highest_R + i) = highest;
        *(vec *)(c->sum_R + i) = spread(0.0f);
    }
    for (int64_t first = 0; first < c->num_seen; first += BLOCK_KEYS) {
        int64_t end = least(first + BLOCK_KEYS, c->num_seen);
        for (int64_t i = 0; i < lanes; i += WIDE) {
            vec highest = *(vec *)(c->highest_R + i), sum = *(vec *)(c->sum_R + i);
            for (int64_t key = first; key < end; key++) {
                vec *weight = (vec *)(c->p_LR + key * c->stride + i);
                *weight = exp_wide(*weight - highest);
                sum += *weight;
            }
            *(vec *)(c->sum_R + i) = sum;
        }
        over_keys(c, c->p_LR + first * c->stride, c->v_LD, first, end, c->out_RD);
    }
}

/* The output, dout divided by the sums, and what the gradients of a pair's scores have in common. */
static void between(const chunk_t *c) {
    for (int64_t i = 0; i < c->num_pairs; i++) {
        vec inverse = spread(1.0f / c->sum_R[i]), shared = spread(0.0f);
        for (int64_t d = 0; d < c->width; d += WIDE) {
            vec *out = (vec *)(c->out_RD + i * c->width + d), *dout = (vec *)(c->dout_RD + i * c->width + d);
            *out *= inverse;
            *dout *= inverse;
            shared += *out * *dout;
        }
        c->shared_R[i] = total(shared);
    }
    transpose(c->dout_RD, c->num_pairs, c->width, c->dout_DR, c->stride);
}

/* Waits until the chunk before this one is through with so many blocks of keys. */
INLINE void wait_for_turn(const chunk_t *c, int64_t num_blocks) {
    for (int64_t looks = 1; !c->is_first && __atomic_load_n(c->progress - 1, __ATOMIC_ACQUIRE) < num_blocks; looks++) {
        if (looks % PATIENCE) _mm_pause();
        else sched_yield();
    }
}

/* The gradients of scores, a block of keys at a time, and of all that they came from; dq still without the scale. */
static void back(const chunk_t *c) {
    int64_t lanes = padded(c->num_pairs), num_blocks = 0;
    for (int64_t first = 0; first < c->num_seen; first += BLOCK_KEYS) {
        int64_t end = least(first + BLOCK_KEYS, c->num_seen);
        const float *p_BR = c->p_LR + first * c->stride;
        by_key(c, c->v_LD, c->dout_DR, first, end, c->ds_BR);
        for (int64_t key = first; key < end; key++)
            for (int64_t i = 0; i < lanes; i += WIDE) {
                int64_t at_pair = (key - first) * c->stride + i;
                vec *ds = (vec *)(c->ds_BR + at_pair), value = *(vec *)(p_BR + at_pair) * (*ds - *(vec *)(c->shared_R + i));
                *ds = key < c->num_seen_by_all ? value : if_visible(c, key, i, value, spread(0.0f));
            }
        over_keys(c, c->ds_BR, c->k_LD, first, end, c->dq_RD);
        wait_for_turn(c, ++num_blocks);
        over_pairs(c, c->ds_BR, c->q_RD, first, end, c->dk);
        over_pairs(c, p_BR, c->dout_RD, first, end, c->dv);
        __atomic_store_n(c->progress, num_blocks, __ATOMIC_RELEASE);
    }
}

/* --- windows --------------------------------------------------------------------------------------------------------------- */

/* `dim` elements from `from` on of a row as floats in whole vectors, times `factor`; and the way back. */
INLINE void read_row(const void *x, int64_t from, int half, float *to, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d += WIDE) *(vec *)(to + d) = get_some(x, from + d, from + dim, half) * spread(factor);
}

INLINE void write_row(const float *x, void *to, int64_t from, int half, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d += WIDE) put_some(to, from + d, from + dim, *(const vec *)(x + d) * spread(factor), half);
}

static void widen_head(const void *cache, const int64_t *slots, int64_t num_keys, int64_t kv_row, int64_t column, int64_t dim, float *x_LD,
                       int half) {
    for (int64_t j = 0; j < num_keys; j++) {
        const char *next = at(cache, slots[least(j + PREFETCH_KEYS, num_keys - 1)] * kv_row + column, half);
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
        if (half) read_row(cache, slots[j] * kv_row + column, 1, x_LD + j * padded(dim), dim, 1.0f);
        else read_row(cache, slots[j] * kv_row + column, 0, x_LD + j * padded(dim), dim, 1.0f);
    }
}

/* Where pair i of a chunk that ends before row `end` lies in the batch. */
INLINE int64_t place_of(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head, int64_t i) {
    return ((end - 1 - i / c->group) * p->num_heads + kv_head * c->group + i % c->group) * c->dim;
}

INLINE void read_pairs(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head, int half) {
    for (int64_t i = 0; i < c->num_pairs; i++) {
        int64_t from = place_of(p, c, end, kv_head, i);
        read_row(p->q, from, half, c->q_RD + i * c->width, c->dim, p->scale);
        read_row(p->dout, from, half, c->dout_RD + i * c->width, c->dim, 1.0f);
    }
}

INLINE void write_pairs(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head, int half) {
    for (int64_t i = 0; i < c->num_pairs; i++) {
        int64_t to = place_of(p, c, end, kv_head, i);
        write_row(c->out_RD + i * c->width, p->out, to, half, c->dim, 1.0f);
        write_row(c->dq_RD + i * c->width, p->dq, to, half, c->dim, p->scale);
    }
}

static void read_chunk(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head) {
    if (p->half_rows) read_pairs(p, c, end, kv_head, 1);
    else read_pairs(p, c, end, kv_head, 0);
    for (int64_t i = 0; i < padded(c->num_pairs); i++) c->visible_R[i] = i < c->num_pairs ? (int32_t)(c->num_seen - i / c->group) : 0;
    transpose(c->q_RD, c->num_pairs, c->width, c->q_DR, c->stride);
}

static void write_chunk(const attention_backward_t *p, const chunk_t *c, int64_t end, int64_t kv_head) {
    if (p->half_rows) write_pairs(p, c, end, kv_head, 1);
    else write_pairs(p, c, end, kv_head, 0);
}

/* This thread's room for a chunk that sees so many keys at most; 0, or -1 if there is no memory. */
static int make_room(chunk_t *c, int64_t num_keys) {
    static __thread buffer_t buffer;
    int64_t per_chunk = c->stride * c->width;
    float *room = grown(&buffer, (size_t)((num_keys + BLOCK_KEYS + 4) * c->stride + 6 * per_chunk));
    if (!room) return -1;
    float **parts[] = {&c->p_LR, &c->ds_BR, &c->q_RD, &c->dout_RD, &c->out_RD, &c->dq_RD, &c->q_DR, &c->dout_DR, &c->highest_R, &c->sum_R,
                       &c->shared_R};
    int64_t sizes[] = {num_keys * c->stride, BLOCK_KEYS * c->stride, per_chunk, per_chunk, per_chunk, per_chunk, per_chunk, per_chunk, c->stride,
                       c->stride, c->stride};
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); room += sizes[i++]) *parts[i] = room;
    c->visible_R = (int32_t *)room;
    return 0;
}

/* Rows of a window and the query heads of one key/value head, later rows first, in chunks. */
typedef struct {
    const window_t *window;
    int64_t kv_head, num_chunks;
    float *k_LD, *v_LD;
    int64_t *progress; /* [num_chunks] */
} head_t;

INLINE int64_t rows_of_chunk(int64_t group) { return group < CHUNK_PAIRS ? CHUNK_PAIRS / group : 1; }

static void chunk_backward(const attention_backward_t *p, const head_t *head, int64_t index, chunk_t *c) {
    const window_t *w = head->window;
    int64_t end = w->end - index * rows_of_chunk(c->group), num_rows = least(rows_of_chunk(c->group), end - w->start);
    c->k_LD = head->k_LD;
    c->v_LD = head->v_LD;
    c->dk = w->dk + head->kv_head * c->dim;
    c->dv = w->dv + head->kv_head * c->dim;
    c->num_pairs = num_rows * c->group;
    c->num_seen = w->num_keys - (w->end - end);
    c->num_seen_by_all = c->num_seen - num_rows + 1;
    c->progress = head->progress + index;
    c->is_first = index == 0;
    read_chunk(p, c, end, head->kv_head);
    forth(c);
    between(c);
    back(c);
    write_chunk(p, c, end, head->kv_head);
}

/* The next heads from `task` on, of at most `limit` and at least `least_heads` if there are so many, with room for what they share.
 * Returns their number, or -1 if there is no memory. */
static int64_t next_heads(const attention_backward_t *p, const window_t *windows, int64_t num_windows, int64_t task, int64_t least_heads,
                          head_t *heads, int64_t limit, buffer_t *buffer) {
    int64_t width = padded(p->head_dim), rows = rows_of_chunk(p->num_heads / p->num_kv_heads), count = 0, num_floats = 0;
    for (; count < limit && task + count < num_windows * p->num_kv_heads; count++) {
        const window_t *w = windows + (task + count) / p->num_kv_heads;
        int64_t num_chunks = (w->end - w->start + rows - 1) / rows, more = 2 * (w->num_keys * width + padded(num_chunks));
        if (count >= least_heads && num_floats + more > GROUP_FLOATS) break;
        heads[count] = (head_t){.window = w, .kv_head = (task + count) % p->num_kv_heads, .num_chunks = num_chunks};
        num_floats += more;
    }
    float *room = grown(buffer, (size_t)num_floats);
    if (!room) return -1;
    for (head_t *h = heads; h < heads + count; h++) {
        h->k_LD = room;
        h->v_LD = h->k_LD + h->window->num_keys * width;
        h->progress = (int64_t *)(h->v_LD + h->window->num_keys * width);
        memset(h->progress, 0, (size_t)h->num_chunks * sizeof(int64_t));
        room = (float *)h->progress + 2 * padded(h->num_chunks);
    }
    return count;
}

/* Keys and values of a head as floats: piece `piece` of `num_pieces`. */
static void widen_piece(const attention_backward_t *p, const head_t *h, int64_t piece, int64_t num_pieces) {
    int64_t kv_row = p->num_kv_heads * p->head_dim, column = h->kv_head * p->head_dim, width = padded(p->head_dim);
    int64_t first = block_start(piece, num_pieces, h->window->num_keys), count = block_start(piece + 1, num_pieces, h->window->num_keys) - first;
    const int64_t *slots = p->slots + h->window->first_key + first;
    widen_head(p->k_cache, slots, count, kv_row, column, p->head_dim, h->k_LD + first * width, p->half);
    widen_head(p->v_cache, slots, count, kv_row, column, p->head_dim, h->v_LD + first * width, p->half);
}

#define MAX_HEADS 64 /* that go back side by side */

/* All chunks of some heads: the first ones of all, the second ones... */
static int heads_backward(const attention_backward_t *p, const head_t *heads, int64_t num_heads) {
    int64_t most_chunks = 0, most_keys = 0, next = 0, threads = omp_get_max_threads(), num_tasks = 0;
    for (const head_t *h = heads; h < heads + num_heads; h++) {
        if (h->num_chunks > most_chunks) most_chunks = h->num_chunks;
        if (h->window->num_keys > most_keys) most_keys = h->window->num_keys;
        num_tasks += h->num_chunks;
    }
    int failed = 0;
#pragma omp parallel if (num_tasks > 1)
    {
        int64_t group = p->num_heads / p->num_kv_heads;
        chunk_t c = {.dim = p->head_dim, .width = padded(p->head_dim), .group = group, .kv_row = p->num_kv_heads * p->head_dim,
                     .stride = padded(rows_of_chunk(group) * group)};
        int has_room = !make_room(&c, most_keys);
        if (!has_room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t piece = 0; piece < num_heads * threads; piece++) widen_piece(p, heads + piece / threads, piece % threads, threads);
        while (has_room) { /* in order, so that whoever waits for a chunk knows that it is under way */
            int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
            if (task >= most_chunks * num_heads) break;
            const head_t *head = heads + task % num_heads;
            if (task / num_heads < head->num_chunks) chunk_backward(p, head, task / num_heads, &c);
        }
    }
    return failed ? -1 : 0;
}

/* The attention's output again, and the gradients of queries, and of keys and values added to what is there: a key's from later rows
 * first. Every row of the batch is in one window. D is a multiple of 8. Returns 0, or -1 if there was no memory. */
int heddle_attention_backward(const void *dout, const void *q, const void *k_cache, const void *v_cache, void *out, void *dq,
                              const window_t *windows, int64_t num_windows, const int64_t *slots, int64_t num_heads, int64_t num_kv_heads,
                              int64_t head_dim, float scale, int half, int half_rows) {
    static __thread buffer_t shared;
    attention_backward_t p = {dout, q, out, dq, k_cache, v_cache, slots, num_heads, num_kv_heads, head_dim, scale, half, half_rows};
    int64_t side_by_side = least((omp_get_max_threads() + 1) / 2, MAX_HEADS); /* two threads for a head wait little for each other */
    head_t heads[MAX_HEADS];
    for (int64_t task = 0; task < num_windows * num_kv_heads;) {
        int64_t count = next_heads(&p, windows, num_windows, task, side_by_side, heads, MAX_HEADS, &shared);
        if (count < 0 || heads_backward(&p, heads, count)) return -1;
        task += count;
    }
    return 0;
}
