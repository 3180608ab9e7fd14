"""kvsink: a compiler for the KV cache of transformers. `import kvsink` registers the quantizer and the dynamo backend."""

__version__ = "0.2.0.dev1"

from . import codecs, kernels
from .cache.cache import KVSinkCache
from .errors import KvsinkError
from .explain import explain
from .hf import KvsinkConfig
from .methods import Method, get_method, methods, register_method
from .outdir import rewrite_dir
from .report import Report
from .rewrite import RewriteOptions, rewrite

__all__ = [
    "KVSinkCache",
    "KvsinkConfig",
    "KvsinkError",
    "Method",
    "Report",
    "RewriteOptions",
    "codecs",
    "explain",
    "get_method",
    "kernels",
    "methods",
    "register_method",
    "rewrite",
    "rewrite_dir",
]
