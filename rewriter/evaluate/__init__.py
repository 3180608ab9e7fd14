"""Measure a model through its real cache: perplexity, retrieval, pictures, and a rewrite's own check."""
