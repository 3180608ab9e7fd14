"""Error texts: nearest names, and one family that the command lines can catch."""

from __future__ import annotations

import pytest

from kvsink import errors


def test_unknown_name_lists_the_three_nearest():
    error = errors.UnknownName("method", "rotatkv", ["rtn", "klt", "rotatekv", "centred", "kivi"], hint="See kvsink.methods().")
    assert error.nearest[0] == "rotatekv"
    assert len(error.nearest) == 3
    assert str(error).startswith("unknown method 'rotatkv'; nearest known: rotatekv, ")
    assert str(error).endswith(". See kvsink.methods().")


@pytest.mark.parametrize("known", [[], ["only"]])
def test_unknown_name_with_few_known(known):
    text = str(errors.UnknownName("pass", "zzz", known))
    assert ("only" in text) if known else text.endswith("no pass is known")


def test_every_error_is_a_kvsink_error():
    children = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(children) >= 6
    assert all(issubclass(e, errors.KvsinkError) for e in children)
