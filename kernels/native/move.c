/* Moves rows of the caches. */
/* cache[dst] = cache[src] for rows of `row_bytes` in every cache; all reads come before all writes. Returns 0, or -1 without memory. */
int heddle_commit_kv(void *const *caches, int64_t num_caches, const int64_t *src, const int64_t *dst, int64_t num_rows, int64_t row_bytes) {
    char *held = (char *)scratch((size_t)(num_rows * row_bytes) / sizeof(float) + 1);
    if (!held) return -1;
    for (int64_t c = 0; c < num_caches; c++) {
        char *cache = caches[c];
        for (int64_t i = 0; i < num_rows; i++) memcpy(held + i * row_bytes, cache + src[i] * row_bytes, (size_t)row_bytes);
        for (int64_t i = 0; i < num_rows; i++) memcpy(cache + dst[i] * row_bytes, held + i * row_bytes, (size_t)row_bytes);
    }
    return 0;
}
