/* The way back through the decoder, as the other files are the way forward. Knows pointers, no torch.
 *
 * A row's gradient is a fixed sequence of operations on this row alone, as there. What is summed over rows (gradients of
 * adapters, of keys and values) is added to what is there already, row after row in the order that the caller gives: so it does not
 * depend on how the rows are divided among calls, only on their order.
 */
#define GROUP_ROWS 160  /* most rows of a task but for a block; they share the panels that it turns round */
#define GROUP_PANELS 18 /* most panels of a task, which share the rows that it widens */
#define DEPTH 512       /* inputs of a task's rows that stay in the L2 cache while panels stream by; a multiple of SLICE */
#define TURN_AHEAD 4    /* panels of a weight that are fetched before they are turned round */

/* --- the gradient of a linear's input ------------------------------------------------------------------------------------ */

/* Words of 8 rows as 8 columns. */
INLINE void transpose8(u8x r[8]) {
    __m256i *m = (__m256i *)r, t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(m[i], m[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            u[i + 2 * k] = _mm256_unpacklo_epi64(t[i + k], t[i + 2 + k]);
            u[i + 2 * k + 1] = _mm256_unpackhi_epi64(t[i + k], t[i + 2 + k]);
        }
    for (int i = 0; i < 4; i++) {
        m[i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x20);
        m[4 + i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
    }
}

/* Inputs [column, column + 16) of outputs [o0, o1) of a packed weight, turned round: [o1 - o0][16] floats. Inputs that it does not have
 * are 0. `o0` is a multiple of PANEL, and there is room for whole panels. */
INLINE void turn_panel(const void *packed, int64_t num_in, int64_t column, float *panel, int64_t o0, int64_t o1, int half) {
    int64_t width = heddle_packed_inputs(num_in, half) / (half ? 2 : 1), first = half ? column / 2 : column; /* words for an output, which of them is first */
    int64_t count = least(half ? PANEL / 2 : PANEL, width - first);
    for (int64_t o = o0; o < o1; o += PANEL) {
        const uint32_t *words = (const uint32_t *)packed + (o / PANEL * width + first) * PANEL;
        for (int64_t i = 0; i < count; i++) __builtin_prefetch(words + (TURN_AHEAD * width + i) * PANEL);
        for (int part = 0; part < PANEL; part += 8)
            for (int word = 0; word < (half ? PANEL / 2 : PANEL); word += 8) {
                u8x r[8];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) r[i] = word + i < count ? *(const u8x *)(words + (word + i) * PANEL + part) : (u8x){0};
                transpose8(r);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    float *to = panel + (o - o0 + part + i) * PANEL;
                    if (half) {
                        *(u8x *)to = (u8x)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128((__m256i)r[i])), 16);
                        *(u8x *)(to + LANES) = (u8x)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256((__m256i)r[i], 1)), 16);
                    } else *(u8x *)(to + word) = r[i];
                }
            }
    }
}

typedef struct {
    const void *dy, *packed;
    void *dx;
    int64_t dy_stride, num_out, num_in;
    int dy_half, half; /* the latter is of the weight; dx is as dy */
} linear_backward_t;

/* dx of rows [row0, row1) and panels [first, last). `rows` [row1 - row0][DEPTH], `sums` [last - first][row1 - row0][PANEL]. */
static void group_backward(const linear_backward_t *p, int64_t row0, int64_t row1, int64_t first, int64_t last, float *rows, float *sums) {
    int64_t n = row1 - row0;
    float panel[SLICE * PANEL] __attribute__((aligned(64)));
    memset(sums, 0, (size_t)((last - first) * n * PANEL) * sizeof(float));
    for (int64_t depth = 0; depth < p->num_out; depth += DEPTH) {
        int64_t end = least(depth + DEPTH, p->num_out), width = end - depth;
        for (int64_t r = 0; r < n; r++) {
            const void *from = at(p->dy, (row0 + r) * p->dy_stride + depth, p->dy_half);
            if (p->dy_half) widen_rows(from, 0, rows + r * width, width, 1);
            else memcpy(rows + r * width, from, (size_t)width * sizeof(float));
        }
        for (int64_t c = first; c < last; c++)
            for (int64_t i0 = depth; i0 < end; i0 += SLICE) {
                int64_t i1 = least(i0 + SLICE, end);
                if (p->half) turn_panel(p->packed, p->num_in, c * PANEL, panel, i0, i1, 1);
                else turn_panel(p->packed, p->num_in, c * PANEL, panel, i0, i1, 0);
                for (int64_t r = 0; r < n; r += MAX_ROWS)
                    block(rows + r * width + i0 - depth, width, panel, SLICE * PANEL, i1 - i0, (int)least(MAX_ROWS, n - r), 1,
                          sums + ((c - first) * n + r) * PANEL, 0);
            }
    }
    for (int64_t c = first; c < last; c++)
        for (int64_t r = 0; r < n; r += MAX_ROWS)
            emit(sums + ((c - first) * n + r) * PANEL, (int)least(MAX_ROWS, n - r), 1, c, row0 + r, p->num_in, NULL, p->dx, p->num_in, p->dy_half);
}

/* dx[T, I] = dy[T, O] weight[O, I], from the packed weight of the way forward. Returns 0, or -1 if there was no memory. */
int heddle_linear_backward(const void *dy, int64_t dy_stride, const void *packed, void *dx, int64_t num_rows, int64_t num_out, int64_t num_in,
                           int dy_half, int half) {
    linear_backward_t p = {dy, packed, dx, dy_stride, num_out, num_in, dy_half, half};
    if (!num_rows) return 0;
#ifdef __AMX_BF16__
    if (half && dy_half) return linear_backward_amx(dy, dy_stride, packed, dx, num_rows, num_out, num_in);
#endif
    int64_t groups = (num_rows + GROUP_ROWS - 1) / GROUP_ROWS, panels = num_panels(num_in), threads = omp_get_max_threads();
    int64_t least_parts = least((threads + groups - 1) / groups, panels), parts = (panels + GROUP_PANELS - 1) / GROUP_PANELS;
    int failed = 0;
    if (parts < least_parts) parts = least_parts;
#pragma omp parallel if (num_rows * num_out * num_in >= MIN_PARALLEL)
    {
        float *rows = scratch((DEPTH + GROUP_PANELS * PANEL) * (GROUP_ROWS + MAX_ROWS));
        if (!rows) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < groups * parts; task++) {
            int64_t group = task / parts, part = task % parts, blocks = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
            int64_t row0 = block_start(group, groups, blocks) * MAX_ROWS, row1 = least(block_start(group + 1, groups, blocks) * MAX_ROWS, num_rows);
            if (rows)
                group_backward(&p, row0, row1, block_start(part, parts, panels), block_start(part + 1, parts, panels), rows,
                               rows + DEPTH * (GROUP_ROWS + MAX_ROWS));
        }
    }
    return failed ? -1 : 0;
}

/* --- rows: norm, activation, loss ---------------------------------------------------------------------------------------- */

INLINE void norm_row_backward(const void *dy, const void *x, const void *weight, void *dx, int64_t num_hidden, float eps, int half) {
    vec squares = spread(0.0f), products = spread(0.0f);
    for (int64_t i = 0; i < num_hidden; i += WIDE) {
        vec value = get_some(x, i, num_hidden, half);
        squares += value * value;
        products += get_some(dy, i, num_hidden, half) * get_some(weight, i, num_hidden, half) * value;
    }
    float inverse = 1.0f / sqrtf(total(squares) / (float)num_hidden + eps);
    float shared = inverse * inverse * inverse * (total(products) / (float)num_hidden);
    for (int64_t i = 0; i < num_hidden; i += WIDE) {
        vec own = get_some(dy, i, num_hidden, half) * get_some(weight, i, num_hidden, half) * spread(inverse);
        put_some(dx, i, num_hidden, own - get_some(x, i, num_hidden, half) * spread(shared), half);
    }
}

/* dx of y = weight * x / rms(x). H is a multiple of 8. */
void heddle_rms_norm_backward(const void *dy, const void *x, const void *weight, void *dx, int64_t num_rows, int64_t num_hidden, float eps,
                              int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_hidden >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t row = r * num_hidden;
        if (half) norm_row_backward(at(dy, row, 1), at(x, row, 1), weight, at(dx, row, 1), num_hidden, eps, 1);
        else norm_row_backward(at(dy, row, 0), at(x, row, 0), weight, at(dx, row, 0), num_hidden, eps, 0);
    }
}

INLINE void silu_row_backward(const void *dy, const void *gate, const void *up, void *dgate, void *dup, int64_t num_inner, int half) {
    for (int64_t i = 0; i < num_inner; i += WIDE) {
        vec g = get_some(gate, i, num_inner, half), d = get_some(dy, i, num_inner, half), one = spread(1.0f);
        vec sigmoid = over_one_plus_exp(one, -g);
        put_some(dgate, i, num_inner, d * get_some(up, i, num_inner, half) * (sigmoid * (one + g * (one - sigmoid))), half);
        put_some(dup, i, num_inner, d * (g * sigmoid), half);
    }
}

/* The gradients of gate and up, side by side as they came, of y = silu(gate) * up. F is a multiple of 8. */
void heddle_silu_mul_backward(const void *dy, const void *gate_up, void *dgate_up, int64_t num_rows, int64_t num_inner, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_inner >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t gate = 2 * r * num_inner, up = gate + num_inner, row = r * num_inner;
        if (half) silu_row_backward(at(dy, row, 1), at(gate_up, gate, 1), at(gate_up, up, 1), at(dgate_up, gate, 1), at(dgate_up, up, 1), num_inner, 1);
        else silu_row_backward(at(dy, row, 0), at(gate_up, gate, 0), at(gate_up, up, 0), at(dgate_up, gate, 0), at(dgate_up, up, 0), num_inner, 0);
    }
}

/* The highest of some logits, or NaN if one of them is. */
static float highest_of(const float *logits, int64_t count) {
    vec highest = spread(-INFINITY), sum = spread(0.0f);
    float most = -INFINITY;
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE) {
        vec value = get(logits, i, 0);
        highest = choose(is_above(value, highest), value, highest);
        sum = choose(is_nan(value), value, sum);
    }
    for (int k = 0; k < WIDE; k++) {
        if (sum[k] != sum[k]) return sum[k];
        most = highest[k] > most ? highest[k] : most;
    }
    for (; i < count; i++) {
        if (logits[i] != logits[i]) return logits[i];
        most = logits[i] > most ? logits[i] : most;
    }
    return most;
}

/* Whether no logit before the label is as high. */
static int is_first(const float *logits, int64_t label, float highest) {
    int64_t i = 0;
    while (i < label && logits[i] != highest) i++;
    return i == label;
}

/* loss = -log softmax(logits)[label] and whether the label is the first of the largest; with `makes_gradient` the logits of a row
 * become softmax - one-hot. */
static void loss_row(float *logits, int64_t num_words, int64_t label, float *loss, uint8_t *hit, int makes_gradient) {
    float highest = highest_of(logits, num_words), at_label = logits[label] - highest;
    int is_number = highest == highest;
    int64_t i;
    double sum = 0.0;
    *hit = is_number && highest > -INFINITY && logits[label] == highest && is_first(logits, label, highest);
    for (int64_t start = 0; start < num_words; start += SUM_BLOCK * WIDE) {
        int64_t end = least(start + SUM_BLOCK * WIDE, num_words);
        vec part = spread(0.0f);
        for (i = start; i + WIDE <= end; i += WIDE) {
            vec e = exp_wide(get(logits, i, 0) - spread(highest));
            part += e;
            if (makes_gradient) put(logits, i, e, 0);
        }
        sum += total(part);
        for (; i < end; i++) {
            float e = exp_wide(spread(logits[i] - highest))[0];
            sum += e;
            if (makes_gradient) logits[i] = e;
        }
    }
    *loss = is_number ? (float)(log(sum) - at_label) : NAN;
    if (!makes_gradient) return;
    float inverse = is_number ? (float)(1.0 / sum) : NAN;
    for (i = 0; i < num_words; i++) logits[i] *= inverse;
    logits[label] -= 1.0f;
}

/* Per row of logits [n, V] its loss and hit; the logits become the gradient of the loss, if that is asked for. */
void heddle_losses(float *logits, const int64_t *labels, float *losses, uint8_t *hits, int64_t num_rows, int64_t num_words, int makes_gradient) {
#pragma omp parallel for schedule(dynamic, 1) if (num_rows * num_words >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++)
        loss_row(logits + r * num_words, num_words, labels[r], losses + r, hits + r, makes_gradient);
}
