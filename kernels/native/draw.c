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

/* The least probable token that top_k and top_p keep: its weight, and of equally probable ones the last token. */
static candidate_t last_kept(const float *weights, int64_t num_tokens, const draw_t *draw, candidate_t *candidates) {
    double mass[BUCKETS] = {0}, total = 0.0;
    int64_t counts[BUCKETS] = {0}, top_k = draw->top_k > 0 && draw->top_k < num_tokens ? draw->top_k : 0;
    for (int64_t i = 0; i < num_tokens; i++) {
        int bucket = bucket_of(weights[i]);
        counts[bucket]++;
        mass[bucket] += weights[i];
        total += weights[i];
    }
    int lowest = BUCKETS - 1;
    int64_t count = counts[lowest], num_candidates = 0;
    double sum = mass[lowest];
    while (lowest > 0 && (top_k ? count < top_k : sum < draw->top_p * total)) lowest--, count += counts[lowest], sum += mass[lowest];
    for (int64_t i = 0; i < num_tokens; i++)
        if (bucket_of(weights[i]) >= lowest) candidates[num_candidates++] = (candidate_t){weights[i], (int32_t)i};
    qsort(candidates, (size_t)num_candidates, sizeof(candidate_t), by_weight);
    if (top_k && top_k < num_candidates) num_candidates = top_k;
    if (top_k) {
        total = 0.0;
        for (int64_t i = 0; i < num_candidates; i++) total += candidates[i].weight;
    }
    int64_t kept = 0;
    for (double before = 0.0; kept < num_candidates && (kept == 0 || before < draw->top_p * total); kept++) before += candidates[kept].weight;
    return candidates[kept - 1];
}

static int64_t draw_row(const void *logits, int64_t num_tokens, const draw_t *draw, float *weights, candidate_t *candidates, int half) {
    float highest = -INFINITY;
    for (int64_t i = 0; i < num_tokens; i++) {
        float value = load1(logits, i, half);
        highest = value > highest ? value : highest;
    }
    double inverse = 1.0 / draw->temperature;
    float scale = inverse < 3e38 ? (float)inverse : 3e38f;
    int64_t i = 0;
    for (; i + LANES <= num_tokens; i += LANES) {
        v8 value = load(logits, i, half);
        *(v8 *)(weights + i) = where(value == splat(-INFINITY), splat(0.0f), exp8((value - splat(highest)) * splat(scale)));
    }
    for (; i < num_tokens; i++) {
        float value = load1(logits, i, half);
        weights[i] = value == -INFINITY ? 0.0f : exp8(splat((value - highest) * scale))[0];
    }
    for (i = 0; draw->min_p > 0.0 && i < num_tokens; i++)
        if (weights[i] < draw->min_p) weights[i] = 0.0f;
    if ((draw->top_k > 0 && draw->top_k < num_tokens) || draw->top_p < 1.0) {
        candidate_t last = last_kept(weights, num_tokens, draw, candidates);
        for (i = 0; i < num_tokens; i++)
            if (weights[i] < last.weight || (weights[i] == last.weight && i > last.token)) weights[i] = 0.0f;
    }
    double total = 0.0;
    for (int64_t block = 0; block < num_tokens; block += DRAW_BLOCK) {
        double sum = 0.0;
        for (i = block; i < block + DRAW_BLOCK && i < num_tokens; i++) sum += weights[i];
        total += sum;
    }
    double wanted = draw->uniform * total, before = 0.0;
    int64_t found = -1;
    for (int64_t block = 0; block < num_tokens; block += DRAW_BLOCK) {
        double sum = 0.0, inside = before;
        for (i = block; i < block + DRAW_BLOCK && i < num_tokens; i++) sum += weights[i];
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
        float *weights = scratch((size_t)padded8(num_tokens) + (size_t)num_tokens * 2);
        if (!weights) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < num_draws; i++)
                tokens[i] = draw_row(at(logits, draws[i].row * num_tokens, half), num_tokens, draws + i, weights,
                                     (candidate_t *)(weights + padded8(num_tokens)), half);
        }
    }
    return failed ? -1 : 0;
}
