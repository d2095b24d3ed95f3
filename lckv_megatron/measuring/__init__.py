"""What generation with a small KV cache takes: bytes, batches, seconds; compared fairly, in turns."""
