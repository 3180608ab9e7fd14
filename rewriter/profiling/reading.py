"""A profile read back: its file, and the emergence stages it found, checked against a model.

Raises     ProfileError for a file that is no profile, or one of another model
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from kvsink.codecs.protect import SinkStage
from kvsink.errors import CalibrationError
from kvsink.model.anatomy import anatomy
from kvsink.model.fingerprint import fingerprint, same_model

__all__ = ["load_profile", "profile_stages"]


FORMAT = "kvsink-profile-1"


def load_profile(path: str | Path) -> dict[str, Any]:
    """Read a profile.json. Raises CalibrationError for anything else, or one that is not complete."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CalibrationError(f"profile {path} cannot be read ({error}); make it with kvsink-profile") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CalibrationError(f"{path} is not a profile of this version (expected {FORMAT!r}); make it with kvsink-profile")
    if record.get("status") != "complete":
        raise CalibrationError(f"profile {path} is partial ({record.get('stopped', 'it was stopped')}); make it again")
    return record


def profile_stages(record: dict[str, Any], model: Any = None) -> tuple[SinkStage, ...]:
    """The emergence stages of a record; with `model`, refuse a record of other weights."""
    try:
        held = torch.tensor(record["fingerprint"], dtype=torch.float32)
        stages = tuple(SinkStage(s["block"], tuple(s["channels"]), s["size"], s["median"]) for s in record["stages"])
        _check_stages(stages, model)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CalibrationError(f"the profile lacks or garbles {error}; make it again with kvsink-profile") from error
    if model is not None and not same_model(held, fingerprint(model)):
        raise CalibrationError("the profile was made from other weights; profile this model again")
    return stages


def _check_stages(stages: tuple[SinkStage, ...], model: Any) -> None:
    """Raise ValueError unless every stage names a block and channels that can be, and of `model` that there are."""
    blocks, channels = 1 << 31, 1 << 31
    if model is not None:
        blocks, channels = len(anatomy(model).blocks), model.config.get_text_config(decoder=True).hidden_size
    for s in stages:
        whole = all(type(n) is int for n in (s.block, *s.channels))
        real = all(isinstance(x, float | int) and math.isfinite(x) for x in (s.size, s.median))
        if not whole or not real or not s.channels or not 0 <= s.block < blocks:
            raise ValueError(f"stage {s}")
        if min(s.channels) < 0 or max(s.channels) >= channels:
            raise ValueError(f"the channels of stage {s}")
