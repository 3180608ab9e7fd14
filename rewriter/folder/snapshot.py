"""The files of a rewritten folder that lie beside the weights just loaded: in a local folder, or in one snapshot of a hub's cache.

transformers says which weight files it has read. They name folder, or repository, commit, subfolder and cache, whatever revision
or cache_dir was asked for, so that the plan comes from the same snapshot as the weights.

Source     ours; the layout of the cache is huggingface_hub's: models--OWNER--NAME/snapshots/COMMIT/SUBFOLDER
Raises     SidecarError when a file is not there, or cannot be fetched
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from kvsink.errors import SidecarError
from kvsink.folder.sidecar import AGAIN

__all__ = ["beside"]


def beside(weights: Sequence[str], name: str, asked: Mapping[str, Any]) -> str:
    """The path of the file `name` beside weight files. asked: token, proxies and the like, for a file that is not here yet."""
    if not weights:
        raise SidecarError(f"no weight files were read, so there is no folder to read {name} from; pass a folder or a hub id")
    folder = Path(weights[0]).parent
    if (folder / name).is_file():
        return str(folder / name)
    parts = folder.parts
    at = next((i for i in range(len(parts) - 2, 0, -1) if parts[i] == "snapshots" and parts[i - 1].startswith("models--")), None)
    if at is None:
        raise SidecarError(
            f"{folder} says it is a kvsink model but {name} is missing; {AGAIN}, or take quantization_config out of its "
            "config.json to load it as a plain model"
        )
    where: dict[str, Any] = {
        "revision": parts[at + 1],
        "subfolder": "/".join(parts[at + 2 :]),
        "cache_dir": str(Path(*parts[: at - 1])),
    }
    repository = parts[at - 1].removeprefix("models--").replace("--", "/")
    try:
        found = cached_file(repository, name, **{**asked, **where})
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SidecarError(
            f"{repository}@{where['revision'][:8]} says it is a kvsink model but {name} cannot be had ({reason})"
        ) from error
    assert found is not None
    return str(found)
