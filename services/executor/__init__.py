"""The executor: weights, KV pages, adapters and one device; runs the fused iteration."""
