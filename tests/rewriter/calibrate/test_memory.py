"""What a run needs: the whole model costs its weights, a layer at a time far less, and both in words."""

from __future__ import annotations

import torch

from kvsink.calibrate.memory import Needs, available_memory, needs
from kvsink.folder.checkpoint import Checkpoint
from tests.models import build


def test_weights_and_what_stays_of_them_layer_by_layer(tmp_path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.find(tmp_path)
    assert checkpoint is not None
    found = needs(model, checkpoint, tokens=512, window=64)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert found.whole >= weights + found.base and found.disk >= checkpoint.nbytes
    wider = needs(model, checkpoint, tokens=1024, window=64)
    assert wider.by_layer - found.by_layer == 512 * 4 * model.config.hidden_size  # float32 states of the windows stay
    assert wider.whole == found.whole  # windows go through a whole model one at a time


def test_needs_in_words() -> None:
    text = str(Needs(whole=3 << 30, by_layer=1 << 30, disk=2 << 30))
    assert text == "about 3.0 GiB of memory with the whole model, 1.0 GiB layer by layer, and 2.0 GiB of disk"


def test_memory_is_there() -> None:
    assert available_memory(torch.device("cpu")) > 1 << 20
