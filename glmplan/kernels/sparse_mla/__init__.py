"""Attention over the 2048 tokens an indexer chose, in the compressed (absorbed MLA) form of GLM-5.2."""
