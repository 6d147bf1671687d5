/* The way back through ragged causal attention: windows of sequences, a key/value head at a time. Knows pages, no layer. */
#define CHUNK_ROWS 16 /* rows of a window that go back together */

typedef struct {
    int64_t start, end;          /* rows of the batch */
    int64_t first_key, num_keys; /* into `slots`: keys before the window, then those of its own rows */
    float *dk, *dv;              /* [num_keys][K][D], to which the window's share is added */
} window_t;

typedef struct {
    const float *dout, *q;
    float *out, *dq; /* [T][N][D] */
    const void *k_cache, *v_cache;
    const int64_t *slots;
    int64_t num_heads, num_kv_heads, head_dim;
    float scale;
    int half;
} attention_backward_t;

/* y[num_rows][panels * PANEL] = x w, the panels of w lying one behind the other. */
static void panel_product(const float *x, int64_t x_stride, const float *w, int64_t w_panel, int64_t num_in, int64_t num_rows, int64_t panels,
                          float *y, int64_t y_stride) {
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t row = 0; row < num_rows; row += MAX_ROWS) {
            int rows = (int)least(MAX_ROWS, num_rows - row);
            float sums[MAX_ROWS * PANEL] __attribute__((aligned(64))) = {0};
            block(x + row * x_stride, x_stride, w + panel * w_panel, w_panel, num_in, rows, 1, sums, 0);
            for (int r = 0; r < rows; r++) memcpy(y + (row + r) * y_stride + panel * PANEL, sums + r * PANEL, PANEL * sizeof(float));
        }
}

/* gradient[key][D] += the products of row `key` of x with w, input after input. */
static void add_to_keys(const float *x, int64_t x_stride, const float *w, int64_t num_in, int64_t num_keys, int64_t head_dim, float *gradient,
                        int64_t stride) {
    for (int64_t panel = 0; panel < num_panels(head_dim); panel++) {
        int64_t count = least(PANEL, head_dim - panel * PANEL);
        for (int64_t key = 0; key < num_keys; key += MAX_ROWS) {
            int rows = (int)least(MAX_ROWS, num_keys - key);
            float sums[MAX_ROWS * PANEL] __attribute__((aligned(64))) = {0}, *to = gradient + key * stride + panel * PANEL;
            for (int r = 0; r < rows; r++) memcpy(sums + r * PANEL, to + r * stride, (size_t)count * sizeof(float));
            add_in_order(x + key * x_stride, x_stride, w + panel * num_in * PANEL, num_in, rows, sums);
            for (int r = 0; r < rows; r++) memcpy(to + r * stride, sums + r * PANEL, (size_t)count * sizeof(float));
        }
    }
}

/* scores become probabilities of the first `visible` keys; the others' are 0. */
static void softmax_row(float *scores, int64_t visible, int64_t padded, float scale) {
    for (int64_t j = visible; j < padded; j++) scores[j] = -INFINITY;
    float highest = -INFINITY;
    for (int64_t j = 0; j < visible; j++) {
        scores[j] *= scale;
        highest = scores[j] > highest ? scores[j] : highest;
    }
    v8 sum = splat(0.0f);
    for (int64_t j = 0; j < padded; j += LANES) {
        v8 e = exp8(*(v8 *)(scores + j) - splat(highest));
        *(v8 *)(scores + j) = e;
        sum += e;
    }
    float inverse = 1.0f / total(sum);
    for (int64_t j = 0; j < padded; j++) scores[j] *= inverse;
}

/* Keys or values of one head by key panels [L / 16][D][16] and by dimension panels [D / 16][L][16]. */
static void gather_head(const void *cache, const int64_t *slots, int64_t num_keys, int64_t kv_row, int64_t column, int64_t head_dim, float *by_key,
                        float *by_dim, int half) {
    memset(by_key, 0, (size_t)(num_panels(num_keys) * PANEL * head_dim) * sizeof(float));
    memset(by_dim, 0, (size_t)(num_panels(head_dim) * PANEL * num_keys) * sizeof(float));
    for (int64_t j = 0; j < num_keys; j++)
        for (int64_t d = 0; d < head_dim; d++) {
            float value = load1(cache, slots[j] * kv_row + column + d, half);
            by_key[(j / PANEL * head_dim + d) * PANEL + j % PANEL] = value;
            by_dim[(d / PANEL * num_keys + j) * PANEL + d % PANEL] = value;
        }
}

/* Rows of a window and the query heads of one key/value head, later rows first. */
static int head_backward(const attention_backward_t *p, const window_t *w, int64_t kv_head) {
    int64_t dim = p->head_dim, group = p->num_heads / p->num_kv_heads, row_size = p->num_heads * dim, kv_row = p->num_kv_heads * dim;
    int64_t keys = w->num_keys, padded = num_panels(keys) * PANEL, wide_dim = num_panels(dim) * PANEL, most = CHUNK_ROWS * group;
    int64_t context = keys - (w->end - w->start), head_size = padded * dim + wide_dim * keys;
    float *k_by_key = buffer_of(MATRIX_BUFFER, 2 * head_size + 3 * most * padded + 6 * most * wide_dim);
    if (!k_by_key) return -1;
    float *k_by_dim = k_by_key + padded * dim, *v_by_key = k_by_key + head_size, *v_by_dim = v_by_key + padded * dim;
    float *p_rows = v_by_key + head_size, *ds_rows = p_rows + most * padded, *columns = ds_rows + most * padded;
    float *q = columns + most * padded, *dout = q + most * wide_dim, *q_panels = dout + most * wide_dim;
    float *dout_panels = q_panels + most * wide_dim, *out = dout_panels + most * wide_dim, *dq = out + most * wide_dim;
    const int64_t *slots = p->slots + w->first_key;
    gather_head(p->k_cache, slots, keys, kv_row, kv_head * dim, dim, k_by_key, k_by_dim, p->half);
    gather_head(p->v_cache, slots, keys, kv_row, kv_head * dim, dim, v_by_key, v_by_dim, p->half);
    for (int64_t end = w->end; end > w->start; end -= CHUNK_ROWS) {
        int64_t start = end - CHUNK_ROWS > w->start ? end - CHUNK_ROWS : w->start, n = (end - start) * group;
        int64_t seen = context + end - w->start, panels = num_panels(seen), seen_padded = panels * PANEL;
        memset(q_panels, 0, (size_t)(2 * most * wide_dim) * sizeof(float));
        for (int64_t i = 0; i < n; i++) {
            int64_t from = (end - 1 - i / group) * row_size + (kv_head * group + i % group) * dim;
            memcpy(q + i * dim, p->q + from, (size_t)dim * sizeof(float));
            memcpy(dout + i * dim, p->dout + from, (size_t)dim * sizeof(float));
            for (int64_t d = 0; d < dim; d++) {
                q_panels[(d / PANEL * n + i) * PANEL + d % PANEL] = p->q[from + d];
                dout_panels[(d / PANEL * n + i) * PANEL + d % PANEL] = p->dout[from + d];
            }
        }
        panel_product(q, dim, k_by_key, dim * PANEL, dim, n, panels, p_rows, padded);
        panel_product(dout, dim, v_by_key, dim * PANEL, dim, n, panels, ds_rows, padded);
        for (int64_t i = 0; i < n; i++) softmax_row(p_rows + i * padded, seen - i / group, seen_padded, p->scale);
        panel_product(p_rows, padded, v_by_dim, keys * PANEL, seen, n, wide_dim / PANEL, out, wide_dim);
        for (int64_t i = 0; i < n; i++) {
            v8 shared = splat(0.0f);
            for (int64_t d = 0; d < dim; d += LANES) shared += *(v8_mem *)(dout + i * dim + d) * *(v8_mem *)(out + i * wide_dim + d);
            v8 mean = splat(total(shared)), scale = splat(p->scale);
            for (int64_t j = 0; j < seen_padded; j += LANES) {
                v8 *ds = (v8 *)(ds_rows + i * padded + j);
                *ds = *(v8 *)(p_rows + i * padded + j) * scale * (*ds - mean);
            }
        }
        panel_product(ds_rows, padded, k_by_dim, keys * PANEL, seen, n, wide_dim / PANEL, dq, wide_dim);
        for (int64_t i = 0; i < n; i++) {
            int64_t to = (end - 1 - i / group) * row_size + (kv_head * group + i % group) * dim;
            memcpy(p->out + to, out + i * wide_dim, (size_t)dim * sizeof(float));
            memcpy(p->dq + to, dq + i * wide_dim, (size_t)dim * sizeof(float));
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < seen; j++) columns[j * n + i] = ds_rows[i * padded + j];
        add_to_keys(columns, n, q_panels, n, seen, dim, w->dk + kv_head * dim, kv_row);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < seen; j++) columns[j * n + i] = p_rows[i * padded + j];
        add_to_keys(columns, n, dout_panels, n, seen, dim, w->dv + kv_head * dim, kv_row);
    }
    return 0;
}

/* The attention's output again, and the gradients of queries, and of keys and values added to what is there: a key's from later rows
 * first. Every row of the batch is in one window. D is a multiple of 8. Returns 0, or -1 if there was no memory. */
int heddle_attention_backward(const float *dout, const float *q, const void *k_cache, const void *v_cache, float *out, float *dq,
                              const window_t *windows, int64_t num_windows, const int64_t *slots, int64_t num_heads, int64_t num_kv_heads,
                              int64_t head_dim, float scale, int half) {
    attention_backward_t p = {dout, q, out, dq, k_cache, v_cache, slots, num_heads, num_kv_heads, head_dim, scale, half};
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 1) if (num_windows * num_kv_heads > 1)
    for (int64_t task = 0; task < num_windows * num_kv_heads; task++)
        if (head_backward(&p, windows + task / num_kv_heads, task % num_kv_heads)) {
#pragma omp atomic write
            failed = 1;
        }
    return failed ? -1 : 0;
}
