/* Attention of ragged segments to keys and values in pages. Knows segments and masks, no layer. */
#define KEY_BLOCK 64  /* keys that are widened at a time */

typedef struct {
    int64_t start, end;   /* rows of the batch */
    int64_t first_key;    /* into `slots`: context, then the segment's own rows */
    int64_t num_keys;
    int64_t mask;         /* into `masks`, words of the first row; -1: causal */
    int64_t mask_words;   /* 64-bit words per row */
} segment_t;

/* Scores of `num_keys` keys and a vector of queries, which both lie `dim` (in whole vectors) apart; of a key `stride` from the next one's. */
INLINE void scores_of(const float *queries, const float *keys, float *scores, int64_t stride, int64_t num_keys, int dim, float scale) {
    for (int64_t j = 0; j < num_keys; j++) {
        vec acc[WIDE];
#pragma GCC unroll 16
        for (int i = 0; i < WIDE; i++) acc[i] = spread(0.0f);
#pragma GCC unroll 2
        for (int d = 0; d < dim; d += WIDE) {
            vec key = *(const vec *)(keys + j * dim + d);
#pragma GCC unroll 16
            for (int i = 0; i < WIDE; i++) acc[i] += key * *(const vec *)(queries + i * dim + d);
        }
        *(vec *)(scores + j * stride) = sum_each(acc) * spread(scale);
    }
}

INLINE void widen(const void *row, float *to, int dim, int half) {
#pragma GCC unroll 16
    for (int d = 0; d < dim; d += WIDE) *(vec *)(to + d) = get_some(row, d, dim, half);
}

#define PREFETCH_KEYS 16

/* Scores of one row for the keys [first, num_keys), a head's `padded` behind the one before: `heads` queries share each key, WIDE products at a time. */
INLINE void few_scores(const float *q, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys, int dim,
                       float scale, float *scores, int64_t padded, int heads, int half) {
    int at_once = WIDE / heads;
    for (int64_t j = first; j < num_keys; j += at_once) {
        const char *keys[WIDE];
        vec acc[WIDE];
#pragma GCC unroll 16
        for (int k = 0; k < at_once; k++) {
            int64_t ahead = j + k + PREFETCH_KEYS;
            const char *next = cache + slots[ahead < num_keys ? ahead : num_keys - 1] * key_bytes;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            keys[k] = cache + slots[j + k < num_keys ? j + k : num_keys - 1] * key_bytes;
        }
#pragma GCC unroll 16
        for (int k = 0; k < WIDE; k++) acc[k] = spread(0.0f);
#pragma GCC unroll 4
        for (int d = 0; d < dim; d += WIDE) {
            vec key[WIDE];
#pragma GCC unroll 16
            for (int k = 0; k < at_once; k++) key[k] = get(keys[k], d, half);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                vec qd = *(const vec *)(q + h * dim + d);
#pragma GCC unroll 16
                for (int k = 0; k < at_once; k++) acc[h * at_once + k] += qd * key[k];
            }
        }
        vec sums = sum_each(acc) * spread(scale);
        for (int h = 0; h < heads; h++)
            for (int k = 0; k < at_once && j + k < num_keys; k++) scores[h * padded + j + k] = sums[h * at_once + k];
    }
}

INLINE void few_values(const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys, int dim,
                       const float *scores, int64_t padded, float *out, float *weights, int heads, int width, int half) {
    for (int d0 = 0; d0 < dim; d0 += width * WIDE) {
        vec acc[4][8], total_weight[4];
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            total_weight[h] = spread(0.0f);
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) acc[h][c] = spread(0.0f);
        }
        for (int64_t j = first; j < num_keys; j++) {
            int64_t ahead = j + PREFETCH_KEYS < num_keys ? j + PREFETCH_KEYS : num_keys - 1;
            const char *value = cache + slots[j] * key_bytes, *next = cache + slots[ahead] * key_bytes;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            vec p[4];
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) p[h] = spread(scores[h * padded + j]);
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) {
                vec v = get(value, d0 + c * WIDE, half);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++) acc[h][c] += p[h] * v;
            }
            if (d0 == 0)
                for (int h = 0; h < heads; h++) total_weight[h] += p[h];
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            if (d0 == 0) weights[h] = total_weight[h][0];
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) *(vec *)(out + h * dim + d0 + c * WIDE) = acc[h][c];
        }
    }
}

#define FEW_OF(HEADS, WIDTH, HALF)                                                                                                   \
    do {                                                                                                                             \
        if (!pass) few_scores(q, cache, key_bytes, slots, first, num_keys, dim, scale, scores, padded, HEADS, HALF);                 \
        else if (dim % (4 * WIDE))                                                                                                   \
            few_values(cache, key_bytes, slots, first, num_keys, dim, scores, padded, out, weights, HEADS, 2, HALF);                 \
        else few_values(cache, key_bytes, slots, first, num_keys, dim, scores, padded, out, weights, HEADS, WIDTH, HALF);            \
    } while (0)
#define FOUR_HEADS (WIDE / 4) /* vectors of 4 heads whose sums fit the registers */

/* Scores (pass 0) or values (pass 1) of one row and up to 4 heads, straight from the cache: its keys are used once. */
static void few(int pass, const float *q, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys,
                int dim, float scale, float *scores, int64_t padded, float *out, float *weights, int heads, int half) {
    switch (heads * 2 + half) {
    case 2: FEW_OF(1, 4, 0); break;
    case 3: FEW_OF(1, 4, 1); break;
    case 4: FEW_OF(2, 4, 0); break;
    case 5: FEW_OF(2, 4, 1); break;
    case 6: FEW_OF(3, 4, 0); break;
    case 7: FEW_OF(3, 4, 1); break;
    case 8: FEW_OF(4, FOUR_HEADS, 0); break;
    case 9: FEW_OF(4, FOUR_HEADS, 1); break;
    }
}

INLINE int is_visible(const segment_t *s, const uint64_t *masks, int64_t own_row, int64_t own_key) {
    return (int)(masks[s->mask + own_row * s->mask_words + own_key / 64] >> (own_key % 64) & 1);
}

static int64_t depth_of(const segment_t *s, const uint64_t *masks, int64_t own_row) { /* own keys it sees besides itself */
    int64_t count = 0;
    for (int64_t w = 0; w < s->mask_words; w++) count += __builtin_popcountll(masks[s->mask + own_row * s->mask_words + w]);
    return count - 1;
}

/* Scores of a row that are `stride` apart: those that the mask or the window hides become -infinity. */
static void hide(const segment_t *s, const uint64_t *masks, int64_t own_row, int64_t window, float *scores, int64_t stride) {
    int64_t rows = s->end - s->start, context = s->num_keys - rows;
    for (int64_t j = 0; j < rows; j++)
        if (!is_visible(s, masks, own_row, j)) scores[(context + j) * stride] = -INFINITY;
    if (window <= 0) return;
    int64_t position = context + depth_of(s, masks, own_row), first = position - window + 1;
    for (int64_t j = 0; j < context && j < first; j++) scores[j * stride] = -INFINITY;
    for (int64_t j = 0; j < rows; j++)
        if (scores[(context + j) * stride] != -INFINITY && context + depth_of(s, masks, j) < first) scores[(context + j) * stride] = -INFINITY;
}

/* exp(score - highest) of one row; the sum is taken with the values. */
INLINE void softmax_weights(float *scores, int64_t num_padded) {
    vec highest = spread(-INFINITY);
    for (int64_t j = 0; j < num_padded; j += WIDE) {
        vec s = *(vec_mem *)(scores + j);
        highest = choose(is_above(s, highest) | is_nan(s), s, highest);
    }
    float top = highest[0];
    for (int i = 1; i < WIDE; i++) top = highest[i] > top || highest[i] != highest[i] ? highest[i] : top;
    for (int64_t j = 0; j < num_padded; j += WIDE) *(vec_mem *)(scores + j) = exp_wide(*(vec_mem *)(scores + j) - spread(top));
}

/* The same of pairs side by side, and the sums. */
INLINE void softmax_columns(float *scores, int64_t stride, int64_t num_keys, float *weights) {
    for (int64_t i = 0; i < stride; i += WIDE) {
        vec highest = spread(-INFINITY), sum = spread(0.0f);
        for (int64_t j = 0; j < num_keys; j++) {
            vec s = *(vec *)(scores + j * stride + i);
            highest = choose(is_above(s, highest) | is_nan(s), s, highest);
        }
        for (int64_t j = 0; j < num_keys; j++) {
            vec *s = (vec *)(scores + j * stride + i);
            *s = exp_wide(*s - highest);
            sum += *s;
        }
        *(vec *)(weights + i) = sum;
    }
}

/* Scores (pass 0) or values (pass 1) of several rows for the keys [first, num_keys), which are widened block by block. */
static void many(int pass, const float *queries, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys,
                 int dim, float scale, float *scores, int64_t stride, float *outs, int64_t pairs, float *wide, int half) {
    int width = (int)padded(dim);
    for (int64_t j0 = first; j0 < num_keys; j0 += KEY_BLOCK) {
        int64_t count = num_keys - j0 < KEY_BLOCK ? num_keys - j0 : KEY_BLOCK;
        for (int64_t j = 0; j < count; j++) {
            int64_t ahead = j0 + j + PREFETCH_KEYS;
            const char *row = cache + slots[j0 + j] * key_bytes, *next = cache + slots[ahead < num_keys ? ahead : num_keys - 1] * key_bytes;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            if (dim == 64 && half) widen(row, wide + j * 64, 64, 1);
            else if (half) widen(row, wide + j * width, dim, 1);
            else widen(row, wide + j * width, dim, 0);
        }
        for (int64_t i = 0; !pass && i < pairs; i += WIDE) {
            const float *q = queries + i * width;
            float *to = scores + j0 * stride + i;
            if (width == 64) scores_of(q, wide, to, stride, count, 64, scale);
            else if (width == 128) scores_of(q, wide, to, stride, count, 128, scale);
            else scores_of(q, wide, to, stride, count, width, scale);
        }
        for (int64_t i = 0; pass && i < pairs; i += MAX_ROWS)
            multiply(scores + j0 * stride + i, stride, 1, wide, width, count, (int)(pairs - i < MAX_ROWS ? pairs - i : MAX_ROWS), width,
                     outs + i * width, width, GO_ON);
    }
}

#define FEW_QUERIES (WIDE / 8) /* rows up to which it is faster to read the keys for each of them */

/* Floats of scratch space for a task of so many (row, head) pairs. */
INLINE int64_t attend_floats(int64_t pairs, int64_t num_keys, int64_t dim) {
    return (KEY_BLOCK + 2 * padded(pairs)) * padded(dim) + padded(pairs) * (padded(num_keys) + 1);
}

/* Rows [row0, row1) of a segment and query heads [head0, head1) of one key/value head. */
static void attend(const segment_t *s, const int64_t *slots, const uint64_t *masks, int64_t row0, int64_t row1, int64_t kv_head, int64_t head0,
                   int64_t head1, const void *q, const void *k_cache, const void *v_cache, void *out, int64_t num_heads,
                   int64_t num_kv_heads, int dim, float scale, int64_t window, int half, float *work) {
    int64_t rows = s->end - s->start, context = s->num_keys - rows, heads = head1 - head0, pairs = (row1 - row0) * heads;
    int64_t num_keys = s->mask < 0 ? context + row1 : s->num_keys; /* causal: later own rows are seen by none of these */
    int64_t key_bytes = num_kv_heads * dim * (half ? 2 : 4), head_bytes = kv_head * dim * (half ? 2 : 4), width = padded(dim);
    int64_t first = window > 0 && context + row0 - window + 1 > 0 && s->mask < 0 ? (context + row0 - window + 1) / WIDE * WIDE : 0;
    const int64_t *own = slots + s->first_key;
    float *wide = work, *queries = wide + KEY_BLOCK * width, *outs = queries + padded(pairs) * width, *weights = outs + padded(pairs) * width;
    float *scores = weights + padded(pairs);
    int is_few = row1 - row0 <= FEW_QUERIES && dim % 32 == 0;
    int64_t row_keys = is_few ? padded(num_keys) : 1, key_pairs = is_few ? 1 : padded(pairs); /* how scores of a pair, of a key lie apart */
    for (int64_t i = 0; i < padded(pairs); i++) {
        int64_t from = ((s->start + row0 + i / heads) * num_heads + head0 + i % heads) * dim;
        for (int d = 0; d < dim; d += WIDE) {
            *(vec *)(queries + i * width + d) = i < pairs ? get_some(q, from + d, from + dim, half) : spread(0.0f);
            *(vec *)(outs + i * width + d) = spread(0.0f);
        }
    }
    for (int pass = 0; pass < 2; pass++) {
        const char *cache = (const char *)(pass ? v_cache : k_cache) + head_bytes;
        for (int64_t i = 0; is_few && i < pairs; i++) {
            if (i % heads % 4) continue; /* of a row, 4 heads at a time */
            few(pass, queries + i * dim, cache, key_bytes, own, first, num_keys, dim, scale, scores + i * row_keys, row_keys, outs + i * dim,
                weights + i, (int)(heads - i % heads < 4 ? heads - i % heads : 4), half);
        }
        if (!is_few) many(pass, queries, cache, key_bytes, own, first, num_keys, dim, scale, scores, key_pairs, outs, pairs, wide, half);
        if (pass) break;
        for (int64_t i = 0; i < pairs; i++) {
            float *row = scores + i * row_keys;
            int64_t own_row = row0 + i / heads;
            for (int64_t j = num_keys; is_few && j < row_keys; j++) row[j] = -INFINITY;
            if (s->mask >= 0) {
                hide(s, masks, own_row, window, row, key_pairs);
            } else {
                for (int64_t j = context + own_row + 1; j < num_keys; j++) row[j * key_pairs] = -INFINITY;
                for (int64_t j = first; window > 0 && j < context + own_row - window + 1; j++) row[j * key_pairs] = -INFINITY;
            }
            if (is_few) softmax_weights(row + first, row_keys - first);
        }
        if (!is_few) softmax_columns(scores + first * key_pairs, key_pairs, num_keys - first, weights);
    }
    for (int64_t i = 0; i < pairs; i++) {
        int64_t to = ((s->start + row0 + i / heads) * num_heads + head0 + i % heads) * dim;
        for (int d = 0; d < dim; d += WIDE) put_some(out, to + d, to + dim, *(vec *)(outs + i * width + d) / spread(weights[i]), half);
    }
}

/* `tasks` [num_tasks][4]: segment, first row, last row, first query head; each has `task_heads` query heads of one kv head.
 * Returns 0, or -1 if there was no memory. D is a multiple of 8. */
int heddle_attention(const void *q, const void *k_cache, const void *v_cache, void *out, const segment_t *segments, const int64_t *slots,
                     const uint64_t *masks, const int64_t *tasks, int64_t num_tasks, int64_t task_heads,
                     int64_t num_heads, int64_t num_kv_heads, int64_t dim, float scale, int64_t window, int half) {
    int failed = 0;
    int64_t group = num_heads / num_kv_heads;
#pragma omp parallel
    {
        int64_t most = 0;
        for (int64_t t = 0; t < num_tasks; t++) {
            int64_t need = attend_floats((tasks[4 * t + 2] - tasks[4 * t + 1]) * task_heads, segments[tasks[4 * t]].num_keys, dim);
            if (need > most) most = need;
        }
        float *work = scratch((size_t)most);
        if (!work) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t t = 0; t < num_tasks; t++) {
                const int64_t *task = tasks + 4 * t;
                attend(segments + task[0], slots, masks, task[1], task[2], task[3] / group, task[3], task[3] + task_heads, q, k_cache,
                       v_cache, out, num_heads, num_kv_heads, (int)dim, scale, window, half, work);
            }
        }
    }
    return failed ? -1 : 0;
}
