"""FP8 KV cache rows and index-key pages: written, gathered and dequantised. `op` holds the entry points."""
