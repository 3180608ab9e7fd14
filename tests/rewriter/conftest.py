"""The tiny model folder of the command lines, for the engine behind them."""

from tests.tools.conftest import tiny_dir

__all__ = ["tiny_dir"]
