"""Ways out of the rewriter. Import as `kvsink.export`, never as `export`."""

from .errors import ExportError
from .flavours import flavour_table
from .model import onnx
from .runner import OnnxGenerator
from .wide import in_float64

__all__ = ["ExportError", "OnnxGenerator", "flavour_table", "in_float64", "onnx"]
