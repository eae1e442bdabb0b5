"""Which 2048 keys does each query attend to: exact top-k of logits rows, mapped to KV slots in the same pass."""
