"""The packed cache: transformers' cache API, layers with windows, sequences that join, and what serves them."""
