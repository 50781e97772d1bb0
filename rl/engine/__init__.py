"""Generation: KV cache, sampler, batched decoding."""
