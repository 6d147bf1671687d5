/* Draws tokens from logits. */
#define DRAW_BLOCK 128 /* weights whose sum is kept while the right one is looked for */
#define BUCKETS 1024   /* of weights in [0, 1] by exponent and 3 bits of mantissa: more probable ones have higher buckets */

typedef struct {
    double temperature, top_p, min_p, uniform;
    int64_t top_k; /* 0: all */
    int64_t row;
} draw_t;

typedef struct {
    float weight;
    int32_t token;
} candidate_t;

static int by_weight(const void *a, const void *b) { /* descending; of equal ones the lower token first */
    const candidate_t *x = a, *y = b;
    if (x->weight != y->weight) return x->weight < y->weight ? 1 : -1;
    return x->token < y->token ? -1 : 1;
}

INLINE int bucket_of(float weight) {
    union { float f; uint32_t u; } x = {weight};
    return (int)(x.u >> 20);
}

/* The sum of some weights. */
INLINE double sum_of(const float *weights, int64_t count) {
    double parts[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) parts[k] += weights[i + k];
    for (; i < count; i++) parts[i % 8] += weights[i];
    return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

/* Runs BODY with the index i of every weight of at least `from`; most vectors have none. */
#define FOR_WEIGHTS_FROM(from, BODY)                                                                                                 \
    for (int64_t start = 0; start < num_tokens; start += WIDE) {                                                                     \
        int64_t end = least(start + WIDE, num_tokens);                                                                               \
        if (end - start == WIDE && !any(is_above(get(weights, start, 0), spread(from)) | is_equal(get(weights, start, 0), spread(from)))) \
            continue;                                                                                                                \
        for (int64_t i = start; i < end; i++)                                                                                        \
            if (weights[i] >= (from)) BODY                                                                                           \
    }

/* The lowest bucket that top_k, or else top_p, needs, of the weights of at least `from`; -1 if those do not suffice. */
static int lowest_bucket(const float *weights, int64_t num_tokens, int64_t top_k, double wanted, float from) {
    double mass[BUCKETS] = {0}, sum = 0.0;
    int64_t counts[BUCKETS] = {0}, count = 0;
    FOR_WEIGHTS_FROM(from, {
        counts[bucket_of(weights[i])]++;
        mass[bucket_of(weights[i])] += weights[i];
    })
    for (int lowest = BUCKETS - 1; lowest >= 0; lowest--) {
        count += counts[lowest];
        sum += mass[lowest];
        if (count > 0 && (top_k ? count >= top_k : sum >= wanted)) return lowest; /* top_p may be 0 */
    }
    return -1;
}

#define LIKELY_WEIGHT 0.000244140625f /* 2^-12, where a bucket begins: those above are few, and nearly always enough */

/* The least probable token that top_k and top_p keep: its weight, and of equally probable ones the last token. */
static candidate_t last_kept(const float *weights, int64_t num_tokens, const draw_t *draw, candidate_t *candidates) {
    int64_t top_k = draw->top_k > 0 && draw->top_k < num_tokens ? draw->top_k : 0, num_candidates = 0;
    double total = sum_of(weights, num_tokens);
    int lowest = lowest_bucket(weights, num_tokens, top_k, draw->top_p * total, LIKELY_WEIGHT);
    if (lowest < 0) lowest = lowest_bucket(weights, num_tokens, top_k, draw->top_p * total, 0.0f);
    union { uint32_t u; float f; } least_weight = {lowest > 0 ? (uint32_t)lowest << 20 : 0};
    FOR_WEIGHTS_FROM(least_weight.f, candidates[num_candidates++] = ((candidate_t){weights[i], (int32_t)i});)
    qsort(candidates, (size_t)num_candidates, sizeof(candidate_t), by_weight);
    if (top_k && top_k < num_candidates) num_candidates = top_k;
    if (top_k) {
        total = 0.0;
        for (int64_t i = 0; i < num_candidates; i++) total += candidates[i].weight;
    }
    int64_t kept = 0;
    for (double before = 0.0; kept < num_candidates && (kept == 0 || before < draw->top_p * total); kept++) before += candidates[kept].weight;
    return kept ? candidates[kept - 1] : (candidate_t){0.0f, (int32_t)num_tokens - 1}; /* none, of rows that are not numbers */
}

static int64_t draw_row(const void *logits, int64_t num_tokens, const draw_t *draw, float *weights, candidate_t *candidates, int half) {
    float highest = -INFINITY;
    vec highest_each = spread(-INFINITY);
    int64_t i = 0;
    for (; i + WIDE <= num_tokens; i += WIDE) {
        vec value = get(logits, i, half);
        highest_each = choose(is_above(value, highest_each), value, highest_each);
    }
    for (int k = 0; k < WIDE; k++) highest = highest_each[k] > highest ? highest_each[k] : highest;
    for (; i < num_tokens; i++) {
        float value = load1(logits, i, half);
        highest = value > highest ? value : highest;
    }
    double inverse = 1.0 / draw->temperature;
    float scale = inverse < 3e38 ? (float)inverse : 3e38f;
    i = 0;
    for (; i + WIDE <= num_tokens; i += WIDE) {
        vec value = get(logits, i, half), weight = exp_wide((value - spread(highest)) * spread(scale));
        *(vec *)(weights + i) = choose(is_above(value, spread(-INFINITY)) | is_nan(value), weight, spread(0.0f));
    }
    for (; i < num_tokens; i++) {
        float value = load1(logits, i, half);
        weights[i] = value == -INFINITY ? 0.0f : exp_wide(spread((value - highest) * scale))[0];
    }
    for (i = 0; draw->min_p > 0.0 && i < num_tokens; i++)
        if (weights[i] < draw->min_p) weights[i] = 0.0f;
    if ((draw->top_k > 0 && draw->top_k < num_tokens) || draw->top_p < 1.0) {
        candidate_t last = last_kept(weights, num_tokens, draw, candidates);
        for (i = 0; i <= last.token; i++) weights[i] = weights[i] < last.weight ? 0.0f : weights[i];
        for (; i < num_tokens; i++) weights[i] = weights[i] <= last.weight ? 0.0f : weights[i];
    }
    double total = 0.0;
    for (int64_t block = 0; block < num_tokens; block += DRAW_BLOCK) total += sum_of(weights + block, least(DRAW_BLOCK, num_tokens - block));
    double wanted = draw->uniform * total, before = 0.0;
    int64_t found = -1;
    for (int64_t block = 0; block < num_tokens; block += DRAW_BLOCK) {
        double sum = sum_of(weights + block, least(DRAW_BLOCK, num_tokens - block)), inside = before;
        if (sum > 0.0 && before + sum > wanted) {
            for (i = block; i < block + DRAW_BLOCK && i < num_tokens; i++) {
                if (weights[i] > 0.0f) found = i;
                inside += weights[i];
                if (weights[i] > 0.0f && inside > wanted) return i;
            }
            return found;
        }
        before += sum;
    }
    for (i = num_tokens - 1; i > 0 && weights[i] <= 0.0f; i--) {}
    return i;
}

/* tokens[i] is drawn from logits[draws[i].row], a row of V. Returns 0, or -1 if there was no memory. */
int heddle_draw(const void *logits, int64_t num_tokens, const draw_t *draws, int64_t num_draws, int64_t *tokens, int half) {
    int failed = 0;
#pragma omp parallel if (num_draws > 1)
    {
        float *weights = scratch((size_t)padded(num_tokens) + (size_t)num_tokens * 2);
        if (!weights) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_draws; i++)
                tokens[i] = draw_row(at(logits, draws[i].row * num_tokens, half), num_tokens, draws + i, weights,
                                     (candidate_t *)(weights + padded(num_tokens)), half);
        }
    }
    return failed ? -1 : 0;
}
