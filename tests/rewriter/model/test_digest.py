"""A checksum tells damage from another wish."""

from __future__ import annotations

import torch

from kvsink.model import digest


def test_a_digest_tells_values_names_shapes_and_text_apart() -> None:
    one = {"a": torch.arange(6.0), "b": torch.zeros(0)}
    base = digest.digest(one, {"x": 1})
    assert base == digest.digest(dict(reversed(one.items())), {"x": 1, digest.DIGEST: "anything"})
    others = [
        ({**one, "a": torch.arange(6.0).view(2, 3)}, {"x": 1}),
        ({**one, "a": torch.arange(6.0).half()}, {"x": 1}),
        ({"c": one["a"], "b": one["b"]}, {"x": 1}),
        ({"a": one["a"]}, {"x": 1}),
        (one, {"x": 2}),
        ({**one, "a": torch.arange(6.0).index_fill(0, torch.tensor([2]), 2.0000002)}, {"x": 1}),
    ]
    assert len({base, *(digest.digest(t, r) for t, r in others)}) == 7
