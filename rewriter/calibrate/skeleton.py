"""A folder's model without its weights: shapes on the meta device, buffers real.

Raises     ModelError where transformers cannot build it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvsink.errors import ModelError

__all__ = ["skeleton"]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register are shapes alone; buffers (angles, for one) stay real."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def skeleton(folder: str | Path) -> Any:
    """The model of a folder in float32 without its weights."""
    from transformers import AutoConfig

    from kvsink.folder.loading import model_class, refusal

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with _parameters_on_meta():
            model = model_class(Path(folder)).from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers raises its own kinds
        raise ModelError(refusal(Path(folder), error)) from error
    model.tie_weights()
    model.config._name_or_path = str(folder)
    return model.eval()
