/* All layers of a decoder in one call, out of the operations before. */
typedef struct { /* packed weights; NULL: no bias, no norm of heads */
    const void *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *post_norm, *gate_up, *down;
    int64_t window;
} layer_t;

typedef struct {
    int64_t num_layers, num_hidden, num_inner, num_heads, num_kv_heads, head_dim, half;
    double eps, scale;
} shape_t;

typedef struct {
    const segment_t *segments;
    const int64_t *slots;
    const uint64_t *masks;
    const int64_t *tasks;
    int64_t num_tasks, task_heads;
} attention_t;

typedef struct {
    const lora_t *segments;
    const int64_t *tasks;
    int64_t num_down, num_tasks, num_low;
} lora_work_t;

/* Elements of a row in the scratch space: y (or z), qkv, q (or the attention's input), attention's output, o (or down), gate_up, h. */
int64_t heddle_layers_width(const shape_t *p) {
    int64_t q = p->num_heads * p->head_dim, kv = p->num_kv_heads * p->head_dim;
    return 2 * p->num_hidden + 3 * q + 2 * kv + 3 * p->num_inner;
}

static int adapt(const lora_work_t *work, void *y, int64_t num_out, const void *x, int64_t num_in, int half) {
    return work->num_tasks ? heddle_lora(y, num_out, x, num_in, num_in, work->segments, work->tasks, work->num_down, work->num_tasks, work->num_low, half) : 0;
}

static void norm_heads(void *x, int64_t x_stride, const void *weight, int64_t num_rows, int64_t num_heads, int64_t head_dim, float eps, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_heads * head_dim >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t h = 0; h < num_heads; h++) {
            void *head = at(x, r * x_stride + h * head_dim, half);
            if (half) norm_row(head, NULL, weight, NULL, head, head_dim, eps, 1);
            else norm_row(head, NULL, weight, NULL, head, head_dim, eps, 0);
        }
}

/* x [T, H]: embeddings, and then the hidden states behind the last layer. `work`: heddle_layers_width elements for each row. `lora`:
 * four for each layer (qkv, o, gate_up, down), or NULL. `kept`: where a copy of the states behind each layer but the last goes, NULL for
 * nowhere. Returns 0, or -1 if there was no memory. Every operation is the one above. */
int heddle_layers(const shape_t *p, const layer_t *layers, void *const *k_caches, void *const *v_caches, const attention_t *attention,
                  const lora_work_t *lora, const void *cos, const void *sin, const int64_t *slots, int64_t num_rows, void *x, void *work,
                  void *const *kept) {
    int half = (int)p->half, status = 0;
    int64_t hidden = p->num_hidden, inner = p->num_inner, q_width = p->num_heads * p->head_dim, kv_width = p->num_kv_heads * p->head_dim;
    int64_t qkv_width = q_width + 2 * kv_width;
    float eps = (float)p->eps;
    void *y = work, *out = at(y, num_rows * hidden, half), *qkv = at(out, num_rows * hidden, half), *q = at(qkv, num_rows * qkv_width, half);
    void *attended = at(q, num_rows * q_width, half), *gate_up = at(attended, num_rows * q_width, half);
    void *h = at(gate_up, 2 * num_rows * inner, half);
    heddle_rms_norm(x, NULL, layers[0].input_norm, NULL, y, num_rows, hidden, eps, half);
    for (int64_t l = 0; l < p->num_layers && !status; l++) {
        const layer_t *w = layers + l;
        const lora_work_t *updates = lora + 4 * l;
        void *k = at(qkv, q_width, half), *v = at(qkv, q_width + kv_width, half);
        status |= heddle_linear(y, hidden, w->qkv, w->qkv_bias, qkv, qkv_width, num_rows, hidden, qkv_width, half);
        if (lora) status |= adapt(updates, qkv, qkv_width, y, hidden, half);
        if (w->q_norm) norm_heads(qkv, qkv_width, w->q_norm, num_rows, p->num_heads, p->head_dim, eps, half);
        if (w->k_norm) norm_heads(k, qkv_width, w->k_norm, num_rows, p->num_kv_heads, p->head_dim, eps, half);
        heddle_rope_and_cache(qkv, qkv_width, k, qkv_width, v, qkv_width, cos, sin, q, k_caches[l], v_caches[l], slots, num_rows,
                              p->num_heads, p->num_kv_heads, p->head_dim, half);
        status |= heddle_attention(q, k_caches[l], v_caches[l], attended, attention->segments, attention->slots, attention->masks,
                                   attention->tasks, attention->num_tasks, attention->task_heads, p->num_heads, p->num_kv_heads, p->head_dim,
                                   (float)p->scale, w->window, half);
        status |= heddle_linear(attended, q_width, w->o, w->o_bias, out, hidden, num_rows, q_width, hidden, half);
        if (lora) status |= adapt(updates + 1, out, hidden, attended, q_width, half);
        heddle_rms_norm(x, out, w->post_norm, x, y, num_rows, hidden, eps, half);
        status |= heddle_linear(y, hidden, w->gate_up, NULL, gate_up, 2 * inner, num_rows, hidden, 2 * inner, half);
        if (lora) status |= adapt(updates + 2, gate_up, 2 * inner, y, hidden, half);
        heddle_silu_mul(gate_up, h, num_rows, inner, half);
        status |= heddle_linear(h, inner, w->down, NULL, out, hidden, num_rows, inner, hidden, half);
        if (lora) status |= adapt(updates + 3, out, hidden, h, inner, half);
        if (l + 1 < p->num_layers) heddle_rms_norm(x, out, layers[l + 1].input_norm, x, y, num_rows, hidden, eps, half);
        if (kept[l]) memcpy(kept[l], x, num_rows * hidden * (half ? 2 : 4));
    }
    for (int64_t i = 0; i < num_rows * hidden; i += LANES) store(x, i, load(x, i, half) + load(out, i, half), half);
    return status;
}
