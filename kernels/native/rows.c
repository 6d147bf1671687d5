/* What is done to each row alone: norm, RoPE with the write into the cache, activation. */
INLINE void norm_row(const void *x, const void *residual, const void *weight, void *sum, void *y, int64_t num_hidden, float eps, int half) {
    vec squares = spread(0.0f);
    for (int64_t i = 0; i < num_hidden; i += WIDE) {
        vec value = get_some(x, i, num_hidden, half);
        if (residual) {
            value = rounded_wide(value + get_some(residual, i, num_hidden, half), half);
            put_some(sum, i, num_hidden, value, half);
        }
        squares += value * value;
    }
    vec inverse = spread(1.0f / sqrtf(total(squares) / (float)num_hidden + eps));
    const void *from = residual ? sum : x;
    for (int64_t i = 0; i < num_hidden; i += WIDE) {
        vec normed = rounded_wide(get_some(from, i, num_hidden, half) * inverse, half);
        put_some(y, i, num_hidden, get_some(weight, i, num_hidden, half) * normed, half);
    }
}

/* m = x + residual (if any), y = weight * m / rms(m); `sum` takes m and may be x or residual, y may be x. H is a multiple of 8. */
void heddle_rms_norm(const void *x, const void *residual, const void *weight, void *sum, void *y, int64_t num_rows, int64_t num_hidden,
                     float eps, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_hidden >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        int64_t row = r * num_hidden;
        const void *added = residual ? at(residual, row, half) : NULL;
        void *to = residual ? at(sum, row, half) : NULL;
        if (half) norm_row(at(x, row, 1), added, weight, to, at(y, row, 1), num_hidden, eps, 1);
        else norm_row(at(x, row, 0), added, weight, to, at(y, row, 0), num_hidden, eps, 0);
    }
}

INLINE void rotate(const void *x, void *y, const void *cos, const void *sin, int64_t head_dim, int half) {
    int64_t middle = head_dim / 2;
    for (int64_t i = 0; i < middle; i += WIDE) {
        int64_t j = middle + i;
        vec low = get_some(x, i, middle, half), high = get_some(x, j, head_dim, half);
        put_some(y, i, middle, low * get_some(cos, i, middle, half) - high * get_some(sin, i, middle, half), half);
        put_some(y, j, head_dim, high * get_some(cos, j, head_dim, half) + low * get_some(sin, j, head_dim, half), half);
    }
}

INLINE void rotate_heads(const void *x, void *y, const void *cos, const void *sin, int64_t num_heads, int64_t head_dim, int half) {
    for (int64_t h = 0; h < num_heads; h++) rotate(at(x, h * head_dim, half), at(y, h * head_dim, half), cos, sin, head_dim, half);
}

/* q_out = rope(q); k_cache[slots] = rope(k); v_cache[slots] = v. D is a multiple of 16; strides are those of rows, in elements. */
void heddle_rope_and_cache(const void *q, int64_t q_stride, const void *k, int64_t k_stride, const void *v, int64_t v_stride,
                           const void *cos, const void *sin, void *q_out, void *k_cache, void *v_cache, const int64_t *slots,
                           int64_t num_rows, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int half) {
    int64_t kv_row = num_kv_heads * head_dim;
#pragma omp parallel for schedule(static) if (num_rows * num_heads * head_dim >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        const void *c = at(cos, r * head_dim, half), *s = at(sin, r * head_dim, half);
        void *to = at(q_out, r * num_heads * head_dim, half), *key = at(k_cache, slots[r] * kv_row, half);
        int64_t num_keys = slots[r] < 0 ? 0 : num_kv_heads; /* a row without a slot is written nowhere */
        if (half) {
            rotate_heads(at(q, r * q_stride, 1), to, c, s, num_heads, head_dim, 1);
            rotate_heads(at(k, r * k_stride, 1), key, c, s, num_keys, head_dim, 1);
        } else {
            rotate_heads(at(q, r * q_stride, 0), to, c, s, num_heads, head_dim, 0);
            rotate_heads(at(k, r * k_stride, 0), key, c, s, num_keys, head_dim, 0);
        }
        if (num_keys) memcpy(at(v_cache, slots[r] * kv_row, half), at(v, r * v_stride, half), (size_t)(kv_row * (half ? 2 : 4)));
    }
}

INLINE void silu_row(const void *gate, const void *up, void *y, int64_t num_inner, int half) {
    for (int64_t i = 0; i < num_inner; i += WIDE) {
        vec g = get_some(gate, i, num_inner, half), silu = over_one_plus_exp(g, -g);
        put_some(y, i, num_inner, rounded_wide(silu, half) * get_some(up, i, num_inner, half), half);
    }
}

/* y = silu(gate) * up; gate and up are the halves of a row. F is a multiple of 8. */
void heddle_silu_mul(const void *gate_up, void *y, int64_t num_rows, int64_t num_inner, int half) {
#pragma omp parallel for schedule(static) if (num_rows * num_inner >= MIN_PARALLEL)
    for (int64_t r = 0; r < num_rows; r++) {
        const void *gate = at(gate_up, 2 * r * num_inner, half), *up = at(gate_up, (2 * r + 1) * num_inner, half);
        if (half) silu_row(gate, up, at(y, r * num_inner, 1), num_inner, 1);
        else silu_row(gate, up, at(y, r * num_inner, 0), num_inner, 0);
    }
}
