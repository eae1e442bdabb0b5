"""What GLM-5.2 is, in bytes: tensors, weights, KV cache and workspaces. Pure."""
