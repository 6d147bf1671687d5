/* Attention of ragged segments to keys and values in pages. Knows segments and masks, no layer. */
#define KEY_BLOCK 64  /* keys that are widened at a time */

typedef struct {
    int64_t start, end;   /* rows of the batch */
    int64_t first_key;    /* into `slots`: context, then the segment's own rows */
    int64_t num_keys;
    int64_t mask;         /* into `masks`, words of the first row; -1: causal */
    int64_t mask_words;   /* 64-bit words per row */
} segment_t;

INLINE v8 sum_each(const v8 a[8]) { /* lane j: the sum of a[j]'s lanes, in one fixed order */
    v8 b[4], c[2];
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], (i8x){0, 8, 2, 10, 4, 12, 6, 14}) +
               __builtin_shuffle(a[2 * i], a[2 * i + 1], (i8x){1, 9, 3, 11, 5, 13, 7, 15});
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shuffle(b[2 * i], b[2 * i + 1], (i8x){0, 1, 8, 9, 4, 5, 12, 13}) +
               __builtin_shuffle(b[2 * i], b[2 * i + 1], (i8x){2, 3, 10, 11, 6, 7, 14, 15});
    return __builtin_shuffle(c[0], c[1], (i8x){0, 1, 2, 3, 8, 9, 10, 11}) +
           __builtin_shuffle(c[0], c[1], (i8x){4, 5, 6, 7, 12, 13, 14, 15});
}

INLINE void scores_of(const float *q, const float *keys, float *scores, int64_t num_keys, int dim, float scale) {
    for (int64_t j = 0; j < num_keys; j += LANES) {
        v8 acc[8];
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) acc[k] = splat(0.0f);
        for (int d = 0; d < dim; d += LANES) {
            v8 qd = *(const v8 *)(q + d);
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) acc[k] += qd * *(const v8 *)(keys + (j + k) * dim + d);
        }
        *(v8_mem *)(scores + j) = sum_each(acc) * splat(scale);
    }
}

/* out[D] += p[j] values[j][D] and weights += p[j], key after key: a weight of 0 changes nothing, wherever it stands. */
INLINE void add_values(float *out, float *weights, const float *p, const float *values, int64_t num_keys, int dim, int width) {
    for (int d0 = 0; d0 < dim; d0 += width) {
        v8 acc[8], total_weight = *(v8 *)weights;
#pragma GCC unroll 8
        for (int c = 0; c < width / LANES; c++) acc[c] = *(v8 *)(out + d0 + c * LANES);
        for (int64_t j = 0; j < num_keys; j++) {
            v8 pj = splat(p[j]);
            total_weight += pj;
#pragma GCC unroll 8
            for (int c = 0; c < width / LANES; c++) acc[c] += pj * *(const v8 *)(values + j * dim + d0 + c * LANES);
        }
#pragma GCC unroll 8
        for (int c = 0; c < width / LANES; c++) *(v8 *)(out + d0 + c * LANES) = acc[c];
        if (d0 + width == dim) *(v8 *)weights = total_weight;
    }
}

INLINE void widen(const void *row, float *to, int dim, int half) {
#pragma GCC unroll 16
    for (int d = 0; d < dim; d += LANES) *(v8 *)(to + d) = load(row, d, half);
}

#define PREFETCH_KEYS 16

/* Scores of one row for the keys [first, num_keys): `heads` queries share each key, 8 products at a time. */
INLINE void few_scores(const float *q, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys, int dim,
                       float scale, float *scores, int64_t padded, int heads, int half) {
    int at_once = 8 / heads;
    for (int64_t j = first; j < num_keys; j += at_once) {
        const char *keys[8];
        v8 acc[8];
#pragma GCC unroll 8
        for (int k = 0; k < at_once; k++) {
            int64_t ahead = j + k + PREFETCH_KEYS;
            const char *next = cache + slots[ahead < num_keys ? ahead : num_keys - 1] * key_bytes;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            keys[k] = cache + slots[j + k < num_keys ? j + k : num_keys - 1] * key_bytes;
        }
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) acc[k] = splat(0.0f);
#pragma GCC unroll 4
        for (int d = 0; d < dim; d += LANES) {
            v8 key[8];
#pragma GCC unroll 8
            for (int k = 0; k < at_once; k++) key[k] = load(keys[k], d, half);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                v8 qd = *(const v8 *)(q + h * dim + d);
#pragma GCC unroll 8
                for (int k = 0; k < at_once; k++) acc[h * at_once + k] += qd * key[k];
            }
        }
        v8 sums = sum_each(acc) * splat(scale);
        for (int h = 0; h < heads; h++)
            for (int k = 0; k < at_once && j + k < num_keys; k++) scores[h * padded + j + k] = sums[h * at_once + k];
    }
}

INLINE void few_values(const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys, int dim,
                       const float *scores, int64_t padded, float *out, float *weights, int heads, int width, int half) {
    for (int d0 = 0; d0 < dim; d0 += width * LANES) {
        v8 acc[4][8], total_weight[4];
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            total_weight[h] = splat(0.0f);
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) acc[h][c] = splat(0.0f);
        }
        for (int64_t j = first; j < num_keys; j++) {
            int64_t ahead = j + PREFETCH_KEYS < num_keys ? j + PREFETCH_KEYS : num_keys - 1;
            const char *value = cache + slots[j] * key_bytes, *next = cache + slots[ahead] * key_bytes;
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            v8 p[4];
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) p[h] = splat(scores[h * padded + j]);
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) {
                v8 v = load(value, d0 + c * LANES, half);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++) acc[h][c] += p[h] * v;
            }
            if (d0 == 0)
                for (int h = 0; h < heads; h++) total_weight[h] += p[h];
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            if (d0 == 0) *(v8 *)(weights + h * LANES) = total_weight[h];
#pragma GCC unroll 8
            for (int c = 0; c < width; c++) *(v8 *)(out + h * dim + d0 + c * LANES) = acc[h][c];
        }
    }
}

#define FEW_OF(HEADS, WIDTH, HALF)                                                                                                   \
    do {                                                                                                                             \
        if (!pass) few_scores(q, cache, key_bytes, slots, first, num_keys, dim, scale, scores, padded, HEADS, HALF);                 \
        else few_values(cache, key_bytes, slots, first, num_keys, dim, scores, padded, out, weights, HEADS, WIDTH, HALF);            \
    } while (0)

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
    case 8: FEW_OF(4, 2, 0); break;
    case 9: FEW_OF(4, 2, 1); break;
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

static void hide(const segment_t *s, const uint64_t *masks, int64_t own_row, int64_t window, float *scores) {
    int64_t rows = s->end - s->start, context = s->num_keys - rows;
    for (int64_t j = 0; j < rows; j++)
        if (!is_visible(s, masks, own_row, j)) scores[context + j] = -INFINITY;
    if (window <= 0) return;
    int64_t position = context + depth_of(s, masks, own_row), first = position - window + 1;
    for (int64_t j = 0; j < context && j < first; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < rows; j++)
        if (scores[context + j] != -INFINITY && context + depth_of(s, masks, j) < first) scores[context + j] = -INFINITY;
}

INLINE void softmax_weights(float *scores, int64_t num_padded) { /* exp(score - highest); the sum is taken with the values */
    v8 highest = splat(-INFINITY);
    for (int64_t j = 0; j < num_padded; j += LANES) {
        v8 s = *(v8_mem *)(scores + j);
        highest = where((s > highest) | (s != s), s, highest);
    }
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = highest[i] > top || highest[i] != highest[i] ? highest[i] : top;
    for (int64_t j = 0; j < num_padded; j += LANES) *(v8_mem *)(scores + j) = exp8(*(v8_mem *)(scores + j) - splat(top));
}

/* Scores (pass 0) or values (pass 1) of several rows for the keys [first, num_keys), which are widened block by block. */
static void many(int pass, const float *queries, const char *cache, int64_t key_bytes, const int64_t *slots, int64_t first, int64_t num_keys,
                 int dim, float scale, float *scores, int64_t padded, float *outs, float *weights, int64_t pairs, float *wide, int half) {
    for (int64_t j0 = first; j0 < num_keys; j0 += KEY_BLOCK) {
        int64_t count = num_keys - j0 < KEY_BLOCK ? num_keys - j0 : KEY_BLOCK, filled = padded8(count);
        for (int64_t j = 0; j < count; j++) {
            const char *row = cache + slots[j0 + j] * key_bytes;
            if (dim == 64 && half) widen(row, wide + j * 64, 64, 1);
            else if (half) widen(row, wide + j * dim, dim, 1);
            else widen(row, wide + j * dim, dim, 0);
        }
        if (!pass) memset(wide + count * dim, 0, (size_t)((filled - count) * dim) * sizeof(float));
        for (int64_t i = 0; i < pairs; i++) {
            const float *q = queries + i * dim;
            float *row = scores + i * padded + j0, *out = outs + i * dim, *weight = weights + i * LANES;
            if (!pass) {
                if (dim == 64) scores_of(q, wide, row, filled, 64, scale);
                else if (dim == 128) scores_of(q, wide, row, filled, 128, scale);
                else scores_of(q, wide, row, filled, dim, scale);
            } else {
                if (dim == 64) add_values(out, weight, row, wide, count, 64, 64);
                else if (dim == 128) add_values(out, weight, row, wide, count, 128, 64);
                else add_values(out, weight, row, wide, count, dim, LANES);
            }
        }
    }
}

/* Floats of scratch space for a task of so many (row, head) pairs. */
INLINE int64_t attend_floats(int64_t pairs, int64_t num_keys, int64_t dim) {
    return KEY_BLOCK * dim + pairs * (2 * dim + LANES + padded8(num_keys) + LANES);
}

/* Rows [row0, row1) of a segment and query heads [head0, head1) of one key/value head. */
static void attend(const segment_t *s, const int64_t *slots, const uint64_t *masks, int64_t row0, int64_t row1, int64_t kv_head, int64_t head0,
                   int64_t head1, const void *q, const void *k_cache, const void *v_cache, void *out, int64_t num_heads,
                   int64_t num_kv_heads, int dim, float scale, int64_t window, int half, float *work) {
    int64_t rows = s->end - s->start, context = s->num_keys - rows, heads = head1 - head0, pairs = (row1 - row0) * heads;
    int64_t num_keys = s->mask < 0 ? context + row1 : s->num_keys; /* causal: later own rows are seen by none of these */
    int64_t padded = padded8(num_keys), key_bytes = num_kv_heads * dim * (half ? 2 : 4), head_bytes = kv_head * dim * (half ? 2 : 4);
    int64_t first = window > 0 && context + row0 - window + 1 > 0 && s->mask < 0 ? (context + row0 - window + 1) / LANES * LANES : 0;
    const int64_t *own = slots + s->first_key;
    float *wide = work, *queries = wide + KEY_BLOCK * dim, *outs = queries + pairs * dim, *weights = outs + pairs * dim;
    float *scores = weights + pairs * LANES;
    int is_few = row1 - row0 == 1 && dim % 32 == 0;
    for (int64_t i = 0; i < pairs; i++) {
        int64_t from = ((s->start + row0 + i / heads) * num_heads + head0 + i % heads) * dim;
        for (int d = 0; d < dim; d += LANES) {
            *(v8 *)(queries + i * dim + d) = load(q, from + d, half);
            *(v8 *)(outs + i * dim + d) = splat(0.0f);
        }
        *(v8 *)(weights + i * LANES) = splat(0.0f);
    }
    for (int pass = 0; pass < 2; pass++) {
        const char *cache = (const char *)(pass ? v_cache : k_cache) + head_bytes;
        if (is_few)
            for (int64_t h = 0; h < heads; h += 4)
                few(pass, queries + h * dim, cache, key_bytes, own, first, num_keys, dim, scale, scores + h * padded, padded, outs + h * dim,
                    weights + h * LANES, (int)(heads - h < 4 ? heads - h : 4), half);
        else
            many(pass, queries, cache, key_bytes, own, first, num_keys, dim, scale, scores, padded, outs, weights, pairs, wide, half);
        if (pass) break;
        for (int64_t i = 0; i < pairs; i++) {
            float *row = scores + i * padded;
            int64_t own_row = row0 + i / heads;
            for (int64_t j = num_keys; j < padded; j++) row[j] = -INFINITY;
            if (s->mask >= 0) {
                hide(s, masks, own_row, window, row);
            } else {
                for (int64_t j = context + own_row + 1; j < num_keys; j++) row[j] = -INFINITY;
                for (int64_t j = first; window > 0 && j < context + own_row - window + 1; j++) row[j] = -INFINITY;
            }
            softmax_weights(row + first, padded - first);
        }
    }
    for (int64_t i = 0; i < pairs; i++) {
        int64_t to = ((s->start + row0 + i / heads) * num_heads + head0 + i % heads) * dim;
        v8 weight = *(v8 *)(weights + i * LANES);
        for (int d = 0; d < dim; d += LANES) store(out, to + d, *(v8 *)(outs + i * dim + d) / weight, half);
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
