"""What a calibration run leaves, in memory and as one file: emergence stages, statistics, a fingerprint.

Source     ours
Raises     CalibrationError for a damaged record, or one of another model or version
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvsink.calibrate.queries import QueryStats
from kvsink.calibrate.statistics import KeyStats, Samples, ValueStats
from kvsink.codecs import SideSpec
from kvsink.codecs.protect import SinkStage
from kvsink.errors import CalibrationError
from kvsink.model.digest import DIGEST, check_digest, digest
from kvsink.model.fingerprint import fingerprint, same_model

__all__ = ["Calibration"]

FORMAT = "kvsink-calibration-1"


@dataclass
class Calibration:
    """Everything one calibration run leaves: enough to build every codec that asked for it."""

    stages: tuple[SinkStage, ...]
    keys: dict[tuple[int, int], KeyStats]  # (layer, block)
    values: dict[int, ValueStats]
    fingerprint: Tensor
    tokens: int
    largest: list[float] = field(default_factory=list)  # largest |H| per block output
    medians: list[float] = field(default_factory=list)
    samples: dict[int, Samples] = field(default_factory=dict)  # layer → rows, where a quantizer learns from them
    queries: dict[int, QueryStats] = field(default_factory=dict)  # of no rows where attention does not show them

    def measurable(self, layer: int, key: SideSpec, value: SideSpec) -> tuple[SideSpec, SideSpec]:
        """The declarations of a layer without their metrics where calibration saw that attention does not show its queries, or saw
        no plain projection behind it."""
        seen = self.queries.get(layer)
        if seen is not None and not seen.count:
            key = replace(key, metric="none")
        if seen is not None and seen.roped is not None and (seen.reads if value.metric == "attention" else seen.scored) is None:
            value = replace(value, metric="none")
        return key, value

    def check(self, dims: Sequence[int]) -> None:
        """Raise CalibrationError for statistics that nothing can be designed from. dims: width of the keys of every layer."""
        for (layer, _), keys in self.keys.items():
            rows, least = int(keys.count.sum()), 2 * dims[layer]
            if rows < least:
                more = f"give at least {-(-self.tokens * least // rows)} calibration tokens, or " if rows else ""
                raise CalibrationError(
                    f"layer {layer}: {rows} rows are left to calibrate on beside those that are kept exact, fewer than {least}; "
                    f"{more}protect fewer rows"
                )
        if self.values and all(v.alike for v in self.values.values()):
            raise CalibrationError(
                f"{self.tokens} calibration tokens give one value again and again (condition number inf), so no direction can be "
                "told from another; give text of different tokens, or --calibration none"
            )
        every: list[tuple[object, KeyStats | QueryStats | ValueStats]] = [
            *self.keys.items(),
            *self.queries.items(),
            *self.values.items(),
        ]
        for name, stats in every:
            if not torch.isfinite(stats.second).all():
                raise CalibrationError(f"statistics of layer {name} are not finite; check the weights or calibrate in float32")

    def save(self, path: str | Path) -> None:
        """One safetensors file; tensors by name, the rest as JSON in its header."""
        tensors = {"fingerprint": self.fingerprint}
        for (layer, block), k in self.keys.items():
            for name in ("count", "first", "second"):
                tensors[f"keys.{layer}.{block}.{name}"] = getattr(k, name).contiguous()
        for layer, v in self.values.items():
            for name in ("count", "total", "second"):
                tensors[f"values.{layer}.{name}"] = getattr(v, name).contiguous()
        for layer, q in self.queries.items():
            for name, tensor in vars(q).items():
                if tensor is not None:
                    tensors[f"queries.{layer}.{name}"] = tensor.contiguous()
        for layer, rows in self.samples.items():
            for name, tensor in rows.tensors().items():
                tensors[f"samples.{layer}.{name}"] = tensor.contiguous()
        meta = {
            "format": FORMAT,
            "tokens": str(self.tokens),
            "stages": json.dumps([asdict(s) for s in self.stages]),
            "largest": json.dumps(self.largest),
            "medians": json.dumps(self.medians),
        }
        meta[DIGEST] = digest(tensors, meta)
        save_file(tensors, str(path), metadata=meta)

    def merge(self, other: Calibration) -> None:
        """Add another shard of the same model, made for the same needs. Raises CalibrationError when it is not."""
        if not same_model(self.fingerprint, other.fingerprint):
            raise CalibrationError("the two calibration records are of different weights; merge shards of one model only")
        for what in ("keys", "values", "queries", "samples"):
            mine, others = getattr(self, what), getattr(other, what)
            if set(mine) != set(others):
                raise CalibrationError(
                    f"the two calibration records hold {what} of different layers or blocks; make every shard with the same needs"
                )
        for at, k in self.keys.items():
            k.merge(other.keys[at])
        for layer, v in self.values.items():
            v.merge(other.values[layer])
        for layer, q in self.queries.items():
            q.merge(other.queries[layer])
        for layer, rows in self.samples.items():
            self.samples[layer] = rows.merge(other.samples[layer])
        self.tokens += other.tokens
        if self.stages == other.stages:
            pairs = zip(self.stages, other.stages, strict=True)
            self.stages = tuple(replace(a, crowd=max(a.crowd, b.crowd)) for a, b in pairs)
        self.stages = self.stages or other.stages

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Calibration:
        """Read a record; with `model`, refuse one that was made from other weights."""
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
            if meta.get("format") != FORMAT:
                raise CalibrationError(
                    f"{path} is not a calibration record of this version (format {meta.get('format')!r}, "
                    f"expected {FORMAT!r}); calibrate again"
                )
            keys: dict[tuple[int, int], dict[str, Tensor]] = {}
            values: dict[int, dict[str, Tensor]] = {}
            queries: dict[int, dict[str, Tensor]] = {}
            samples: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                parts = name.split(".")
                if parts[0] == "keys":
                    keys.setdefault((int(parts[1]), int(parts[2])), {})[parts[3]] = tensor
                elif parts[0] == "values":
                    values.setdefault(int(parts[1]), {})[parts[2]] = tensor
                elif parts[0] == "queries":
                    queries.setdefault(int(parts[1]), {})[parts[2]] = tensor
                elif parts[0] == "samples":
                    samples.setdefault(int(parts[1]), {})[parts[2]] = tensor
            record = cls(
                stages=tuple(SinkStage(**s | {"channels": tuple(s["channels"])}) for s in json.loads(meta["stages"])),
                keys={at: KeyStats(**k) for at, k in keys.items()},
                values={at: ValueStats(**v) for at, v in values.items()},
                fingerprint=tensors["fingerprint"],
                tokens=int(meta["tokens"]),
                largest=json.loads(meta["largest"]),
                medians=json.loads(meta["medians"]),
                samples={at: Samples(**rows) for at, rows in samples.items()},
                queries={at: QueryStats(**q) for at, q in queries.items()},
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:
            raise CalibrationError(f"calibration record {path} cannot be read ({error}); calibrate again") from error
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise CalibrationError(f"calibration record {path} holds NaN or infinite numbers; calibrate again")
        check_digest(tensors, meta, f"calibration record {path}", CalibrationError, "calibrate again")
        if model is not None and not same_model(record.fingerprint, fingerprint(model)):
            raise CalibrationError(f"calibration record {path} was made from other weights; calibrate this model again")
        return record
