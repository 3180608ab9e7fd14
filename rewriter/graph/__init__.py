"""A model as an FX graph: captured, its attention sites found, passes run over it, handed on to a compiler."""
