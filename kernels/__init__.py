"""The ops of kvsink, one per file, each with its reference in plain torch. Imported as `kvsink.kernels`."""

from .append import append_
from .attend import attend
from .base import Cost, OpSpec, op_specs
from .dequantize import dequantize
from .hadamard import hadamard
from .quantize import quantize
from .read import read
from .select_sinks import select_sinks

__all__ = ["Cost", "OpSpec", "append_", "attend", "dequantize", "hadamard", "op_specs", "quantize", "read", "select_sinks"]
