"""Language models whose KV cache is small by construction."""
