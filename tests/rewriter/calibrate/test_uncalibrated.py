"""Without calibration: which method and which rows are taken, that nothing is read of any text, and what is refused in one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kvsink
from kvsink.calibrate.uncalibrated import FIRST_ROWS, METHOD, default_method, default_protection
from kvsink.errors import CalibrationError
from kvsink.methods import get_method
from kvsink.model.runtime import runtime_of
from tests.models import build


def test_defaults() -> None:
    assert default_method("none") == METHOD and default_method("builtin") == default_method(["none"]) == "klt"
    own = {"kvarn": "first:128", "kivi": "none", METHOD: FIRST_ROWS}
    assert {n: default_protection(get_method(n), "none") for n in own} == own
    akvq = get_method("akvq-vl")
    assert default_protection(akvq, "none") == FIRST_ROWS and default_protection(akvq, "builtin") == akvq.protect != FIRST_ROWS


def test_no_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("text was read, or the model was run over it")

    for name in ("builtin_text", "read_text", "gather", "calibration_windows"):
        monkeypatch.setattr(f"kvsink.calibrate.observing.{name}", never)
    model = build("llama")
    report = kvsink.rewrite(model, calibration="none", key_bits=3)
    assert (report.method, report.protect, report.calibration_tokens) == (METHOD, FIRST_ROWS, 0)
    assert [p.codec.key.bits for p in runtime_of(model).plans] == [3, 3] and not report.notes
    assert "Calibrated on nothing" in report.to_markdown()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"method": "klt"},
            f"klt is made from statistics of text, and calibration is 'none'; use {METHOD}, .*kivi.*rtn.*--calibration random",
        ),
        ({"method": "static"}, f"static is made from statistics.*use {METHOD}"),
        ({"protect": "kvsink:5+first:1"}, f"rows of protection 'kvsink:5.first:1' are found in text.*--protect {FIRST_ROWS}"),
        ({"method": "kivi", "protect": "sinks:0.1"}, "rows of protection 'sinks:0.1' are found in text"),
        ({"plan": "auto"}, "--plan auto measures widths.*calibration is 'none'; use --plan uniform"),
        ({"plan": "auto", "calibration": "random"}, "--plan auto measures widths.*calibration is 'random'; use --plan uniform"),
    ],
)
def test_what_needs_text_is_refused(options: dict[str, Any], words: str) -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=words) as error:
        kvsink.rewrite(model, **{"calibration": "none", **options})
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("method", ["akvq-vl", "kivi", "kvarn", "oscar", "rtn"])
def test_methods_that_the_error_names_need_no_text(method: str) -> None:
    assert kvsink.rewrite(build("llama"), method, calibration="none").calibration_tokens == 0
