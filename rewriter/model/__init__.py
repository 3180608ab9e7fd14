"""A live transformers model: what a rewritten one carries, its hooks, its attention and its weights."""
