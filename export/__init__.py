"""Ways out of the rewriter. Import as `kvsink.export`, never as `export`."""

from .errors import ExportError
from .flavours import flavour_table
from .model import onnx
from .runner import OnnxGenerator

__all__ = ["ExportError", "OnnxGenerator", "flavour_table", "onnx"]
