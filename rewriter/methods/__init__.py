"""The published methods and ours, one declaration per file. A new file in this folder is a new method."""

from .registry import DEFAULT, Claim, Method, Modality, Paper, get_method, methods, register_method

__all__ = ["DEFAULT", "Claim", "Method", "Modality", "Paper", "get_method", "methods", "register_method"]
