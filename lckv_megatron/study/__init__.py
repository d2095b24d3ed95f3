"""A grid of models, each trained, converted and measured: quality for each byte of KV cache."""
