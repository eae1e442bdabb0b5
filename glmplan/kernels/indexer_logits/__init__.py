"""Logits of the sparse-attention indexer, over the paged cache (decode) and over gathered keys (prefill)."""
