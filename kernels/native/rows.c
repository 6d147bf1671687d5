/* What is done to each row alone: norm, RoPE with the write into the cache, activation. */
INLINE float total(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

INLINE void norm_row(const void *x, const void *residual, const void *weight, void *sum, void *y, int64_t num_hidden, float eps, int half) {
    v8 squares = splat(0.0f);
    for (int64_t i = 0; i < num_hidden; i += LANES) {
        v8 value = load(x, i, half);
        if (residual) {
            value = rounded(value + load(residual, i, half), half);
            store(sum, i, value, half);
        }
        squares += value * value;
    }
    v8 inverse = splat(1.0f / sqrtf(total(squares) / (float)num_hidden + eps));
    const void *from = residual ? sum : x;
    for (int64_t i = 0; i < num_hidden; i += LANES)
        store(y, i, load(weight, i, half) * rounded(load(from, i, half) * inverse, half), half);
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
    for (int64_t i = 0; i < middle; i += LANES) {
        v8 low = load(x, i, half), high = load(x, middle + i, half);
        store(y, i, low * load(cos, i, half) - high * load(sin, i, half), half);
        store(y, middle + i, high * load(cos, middle + i, half) + low * load(sin, middle + i, half), half);
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

INLINE v8 exp8(v8 x) { /* relative error below 2e-7; 0 below -87, infinite above 88 */
    i8x is_low = x < splat(-87.0f);
    i8x is_high = x > splat(88.0f);
    x = where(is_low, splat(-87.0f), where(is_high, splat(88.0f), x));
    v8 scaled = x * splat(1.44269504f);
    v8 shifted = scaled + splat(12582912.0f); /* 1.5 * 2^23: rounds to an integer in the low bits */
    i8x n = (i8x)shifted - (i8x)splat(12582912.0f);
    v8 whole = shifted - splat(12582912.0f);
    v8 r = x - whole * splat(0.693359375f) + whole * splat(2.12194440e-4f);
    v8 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    return where(is_low, splat(0.0f), where(is_high, splat(INFINITY), p * (v8)((n + 127) << 23)));
}

INLINE void silu_row(const void *gate, const void *up, void *y, int64_t num_inner, int half) {
    for (int64_t i = 0; i < num_inner; i += LANES) {
        v8 g = load(gate, i, half), silu = g / (splat(1.0f) + exp8(-g));
        store(y, i, rounded(silu, half) * load(up, i, half), half);
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
