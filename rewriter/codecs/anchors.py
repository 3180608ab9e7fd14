"""How many anchors a layer keeps and by which score: the part of a codec that `kvsink.kernels.anchors` reads.

Formula    places at t tokens = rows, or ceil(share · t), in whole numbers
Source     AnTKV, arXiv 2506.19505
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsink.errors import KvsinkError, UnknownName

__all__ = ["MILLION", "SCORES", "Anchors"]

SCORES = ("mass", "qnorm", "exact")
MILLION = 1_000_000


@dataclass(frozen=True)
class Anchors:
    """The anchors of one layer: a share of the tokens in parts per million, or a fixed number of rows."""

    ppm: int = 0
    rows: int = 0
    score: str = "mass"
    normalize: bool = False  # divide scores by the number of queries that could see the row

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UnknownName("anchor score", self.score, SCORES, "Write for example anchors:1%:mass.")
        if (self.ppm > 0) == (self.rows > 0) or self.ppm > MILLION:
            raise KvsinkError(f"anchors of {self.ppm} ppm and {self.rows} rows; give a share up to 100 %, or a number of rows")

    def capacity(self, tokens: int) -> int:
        """Places for `tokens` tokens: ceil(share · tokens), or the fixed number."""
        return self.rows or -(-tokens * self.ppm // MILLION)

    def __str__(self) -> str:
        share = f"{self.ppm / 10_000:g}%" if self.ppm else str(self.rows)
        return f"anchors:{share}" + (f":{self.score}" if self.score != "mass" else "") + (":count" if self.normalize else "")
