"""From folder to folder: OUT_DIR is complete or absent, loads as any model does, and is refused when it is damaged."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvsink
from kvsink import outdir
from kvsink.calibrate.uncalibrated import TOKENS
from kvsink.errors import CalibrationError, KvsinkError, ModelError, SidecarError
from kvsink.folder import place
from kvsink.model.runtime import runtime_of
from kvsink.outdir import rewrite_dir
from kvsink.rewrite import RewriteOptions
from tests.close import largest_difference
from tests.models import build, tokens

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8
METHODS = sorted(kvsink.methods())


def options(method: str, text: Path, **changes: Any) -> RewriteOptions:
    return RewriteOptions(**{"method": method, "calibration": str(text), "calibration_tokens": 512, **changes})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def rewritten_dir(tiny_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good OUT_DIR; tests that damage it work on a copy."""
    out = tmp_path_factory.mktemp("good") / "out"
    rewrite_dir(tiny_dir, out, options("klt", text))
    return out


@pytest.fixture
def damaged(rewritten_dir: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(rewritten_dir, tmp_path / "copy"))


def siblings(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir())


def generate(model: Any, ids: Tensor, **more: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, **more)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", METHODS)
def test_a_folder_equals_the_rewrite_in_memory(tiny_dir: Path, text: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "deep" / "out"
    bits: dict[str, Any] = {"key_bits": 4, "value_bits": max(2, kvsink.get_method(method).value_bits)}
    report = rewrite_dir(tiny_dir, out, options(method, text, **bits))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    again = kvsink.rewrite(
        model, method, **bits, calibration=text, calibration_tokens=512, tokenizer=AutoTokenizer.from_pretrained(tiny_dir)
    )
    assert report.layers == again.layers
    one, two = runtime_of(loaded), runtime_of(model)
    assert one.plans == two.plans and one.method == two.method == method and one.stages == two.stages
    assert set(one.tables) == set(two.tables) and all(torch.equal(one.tables[n], two.tables[n]) for n in one.tables)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    ids = tokens(2, 20, seed=3)
    outs = [generate(m, ids, return_dict_in_generate=True, output_logits=True) for m in (loaded, model)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert largest_difference(outs[0].logits, outs[1].logits) == 0
    assert isinstance(outs[0].past_key_values, kvsink.KVSinkCache)


def test_a_folder_without_calibration(tiny_dir: Path, tmp_path: Path) -> None:
    """Whole and by layers: the same answers, and neither text nor tokenizer is asked for."""
    found = []
    for by_layer in (False, True):
        source, out = tmp_path / f"source-{by_layer}", tmp_path / f"out-{by_layer}"
        source.mkdir()
        for name in ("config.json", "model.safetensors"):
            (source / name).write_bytes((tiny_dir / name).read_bytes())
        report = rewrite_dir(source, out, RewriteOptions(calibration="none"), by_layer=by_layer)
        assert (report.method, report.calibration_tokens) == ("klt", TOKENS)
        assert json.loads((out / "kvsink.json").read_text())["options"]["calibration"] == "none"
        found.append(AutoModelForCausalLM.from_pretrained(out).generate(tokens(1, 30), max_new_tokens=8, do_sample=False))
    assert torch.equal(*found)


def test_everything_is_in_the_folder(rewritten_dir: Path, tiny_dir: Path) -> None:
    names = {p.name for p in rewritten_dir.iterdir()}
    assert names >= {p.name for p in tiny_dir.iterdir()} | {
        "config.json",
        "model.safetensors",
        "kvsink.json",
        "kvsink_calibration.safetensors",
        "kvsink_report.json",
        "kvsink_report.md",
    }
    config = json.loads((rewritten_dir / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "kvsink" and config["quantization_config"]["method"] == "klt"
    plan = json.loads((rewritten_dir / "kvsink.json").read_text())
    assert plan["format"] == 1 and plan["method"] == "klt" and len(plan["layers"]) == 2 and plan["versions"]["torch"]
    assert plan["options"]["calibration_tokens"] == 512
    report = json.loads((rewritten_dir / "kvsink_report.json").read_text())
    assert report["method"] == "klt" and report["bits_per_element"] == config["quantization_config"]["bits"]
    assert (rewritten_dir / "kvsink_report.md").read_text().startswith("# kvsink: ")
    assert rewritten_dir.stat().st_mode & 0o777 == 0o755 and siblings(rewritten_dir) == ["out"]
    mine, theirs = (AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] for folder in (rewritten_dir, tiny_dir))
    assert mine == theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_the_precision_of_the_checkpoint(tiny_dir: Path, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    import shutil

    source, out = Path(shutil.copytree(tiny_dir, tmp_path / "model")), tmp_path / "out"
    build("llama", dtype=dtype).save_pretrained(source)
    rewrite_dir(source, out, options("rotatekv", text))
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert next(loaded.parameters()).dtype == dtype
    assert generate(loaded, tokens(1, 9)).shape == (1, 25)
    wide = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)  # another precision is still the same model
    assert runtime_of(wide).method == "rotatekv"


def test_dry_run_writes_nothing(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    report = rewrite_dir(tiny_dir, tmp_path / "out", options("klt", text), dry_run=True)
    assert report.method == "klt" and not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    rewrite_dir(tiny_dir, tmp_path / "out", options("klt", text), dry_run=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_progress_is_told(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    rewrite_dir(tiny_dir, tmp_path / "out", options("klt", text), progress=lambda *step: told.append(step))
    assert ("calibrating", 4, 4) in told and any(what == "finding sinks" for what, *_ in told)


# -- what stands there already -----------------------------------------------------------------------------------------


def test_an_existing_folder_is_not_touched(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(KvsinkError, match=f"{out} exists; pass --force to replace it"):
        rewrite_dir(tiny_dir, out, options("klt", text))
    assert [p.name for p in out.iterdir()] == ["mine"] and siblings(out) == ["out"]
    rewrite_dir(tiny_dir, out, options("klt", text), force=True)
    assert not (out / "mine").exists() and (out / "kvsink.json").exists() and siblings(out) == ["out"]


def test_an_empty_folder_is_filled(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    rewrite_dir(tiny_dir, tmp_path / "out", options("rtn", text))
    assert (tmp_path / "out" / "kvsink.json").exists() and siblings(tmp_path / "out") == ["out"]


def test_a_file_in_the_way(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for force in (False, True):
        with pytest.raises(KvsinkError, match="out is not a folder; choose another OUT_DIR"):
            rewrite_dir(tiny_dir, tmp_path / "out", options("klt", text), force=force)
    assert (tmp_path / "out").read_text() == "x"


# -- runs that fail ----------------------------------------------------------------------------------------------------

FAILURES = [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("anything")]


@pytest.mark.sample(3)
@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("step", ["write_sidecar", "exchange", "copyfile", "rename"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_run_that_fails_leaves_nothing(
    tiny_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, step: str, existing: bool
) -> None:
    out, called = tmp_path / "out", []
    if existing:
        out.mkdir()
        (out / "mine").write_text("x")

    def fail(*args: Any, **kwargs: Any) -> None:
        called.append(args)
        raise failure

    if step == "copyfile":
        monkeypatch.setattr(outdir.shutil, "copyfile", fail)
    elif step == "exchange":
        monkeypatch.setattr(place, "exchange", fail)
    elif step == "rename":
        rename = outdir.os.rename
        monkeypatch.setattr(outdir.os, "rename", lambda a, b: fail() if str(a).endswith(".partial") else rename(a, b))
    else:
        monkeypatch.setattr(outdir, step, fail)
    with pytest.raises(type(failure)):
        rewrite_dir(tiny_dir, out, options("rtn", text), force=True)
    assert called
    assert siblings(out) == (["out"] if existing else [])
    assert not existing or [p.name for p in out.iterdir()] == ["mine"]


def test_what_a_killed_run_left_is_swept(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    """Killed before the exchange, or in the middle of it with the old folder set aside."""
    out = tmp_path / "out"
    (tmp_path / ".out.abc.partial").mkdir()
    (tmp_path / ".out.abc.partial" / "half").write_text("x")
    (tmp_path / ".out.abc.old" / "old").mkdir(parents=True)
    (tmp_path / ".out.abc.old" / "old" / "mine").write_text("x")
    (tmp_path / ".outer.abc.partial").mkdir()  # of another run
    rewrite_dir(tiny_dir, out, options("rtn", text), force=True)
    assert siblings(out) == [".outer.abc.partial", "out"] and (out / "kvsink.json").exists()


def test_a_folder_set_aside_by_a_killed_run_counts_as_existing(tiny_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.abc.old" / "old").mkdir(parents=True)
    (tmp_path / ".out.abc.old" / "old" / "mine").write_text("x")
    with pytest.raises(KvsinkError, match="exists; pass --force"):
        rewrite_dir(tiny_dir, out, options("rtn", text))
    assert [p.name for p in out.iterdir()] == ["mine"] and siblings(out) == ["out"]


# -- sources that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("missing", ModelError, "is not a model folder .no config.json.; pass a folder"),
        ("file", ModelError, "is not a model folder"),
        ("no-config", ModelError, "is not a model folder"),
        ("bad-config", ModelError, "config.json is not a model configuration"),
        ("unknown-type", ModelError, "architecture this transformers does not know"),
        ("nan", ModelError, "weight model.layers.1.mlp.up_proj.weight holds NaN"),
        ("no-weights", ModelError, "holds no weights"),
        ("other-shape", ModelError, "do not fit its config.json"),
        ("no-tokenizer", ModelError, "no usable tokenizer"),
        ("short-text", CalibrationError, "has 43 tokens, 512 were asked for"),
        ("rewritten", ModelError, "has been rewritten by kvsink already"),
    ],
)
def test_sources_that_are_refused(
    tiny_dir: Path, rewritten_dir: Path, text: Path, tmp_path: Path, damage: str, error: type[KvsinkError], words: str
) -> None:
    import shutil

    source, out = Path(shutil.copytree(tiny_dir, tmp_path / "model")), tmp_path / "results" / "out"
    match damage:
        case "missing":
            source = tmp_path / "nowhere"
        case "file":
            source = source / "config.json"
        case "no-config":
            (source / "config.json").unlink()
        case "bad-config":
            (source / "config.json").write_text("{")
        case "unknown-type":
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps({**config, "model_type": "llamoid"}))
        case "nan":
            tensors = load_file(source / "model.safetensors")
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
            save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        case "no-weights":
            (source / "model.safetensors").unlink()
        case "other-shape":
            config = json.loads((source / "config.json").read_text())
            (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
        case "no-tokenizer":
            (source / "tokenizer.json").unlink()
            (source / "tokenizer_config.json").unlink()
        case "short-text":
            text = tmp_path / "short.txt"
            text.write_text(TEXT[:43])
        case "rewritten":
            source = rewritten_dir
    with pytest.raises(error, match=words):
        rewrite_dir(source, out, options("klt", text))
    assert not out.exists() and not out.parent.exists()


def test_a_record_of_another_model_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    from kvsink.calibrate.calibration import calibrate

    record = tmp_path / "record.safetensors"
    calibrate(build("mistral"), tokens(2, 64), [()] * 2, {0: (64,), 1: (64,)}).save(record)
    with pytest.raises(CalibrationError, match="made from other weights"):
        rewrite_dir(tiny_dir, tmp_path / "out", options("klt", record))
    assert siblings(tmp_path / "out") == ["record.safetensors"]


# -- folders that are refused when they are loaded ---------------------------------------------------------------------


def edit_plan(folder: Path, change: Any) -> None:
    plan = json.loads((folder / "kvsink.json").read_text())
    change(plan)
    (folder / "kvsink.json").write_text(json.dumps(plan))


def edit_tensors(folder: Path, change: Any) -> None:
    file = folder / "kvsink_calibration.safetensors"
    with safe_open(file, framework="pt") as opened:
        meta = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=meta)


def other_weights(folder: Path) -> None:
    build("mistral").save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")


DAMAGE: dict[str, tuple[Any, str]] = {
    "no plan": (lambda d: (d / "kvsink.json").unlink(), "kvsink.json is missing"),
    "no tables": (lambda d: (d / "kvsink_calibration.safetensors").unlink(), "kvsink_calibration.safetensors is missing"),
    "truncated plan": (lambda d: (d / "kvsink.json").write_text((d / "kvsink.json").read_text()[:200]), "cannot be read"),
    "empty plan": (lambda d: (d / "kvsink.json").write_text(""), "cannot be read"),
    "a list": (lambda d: (d / "kvsink.json").write_text("[]"), "cannot be read"),
    "truncated tables": (
        lambda d: (d / "kvsink_calibration.safetensors").write_bytes((d / "kvsink_calibration.safetensors").read_bytes()[:-9]),
        "cannot be read",
    ),
    "other version": (lambda d: edit_plan(d, lambda p: p.update(format=2)), "has format 2, this version reads 1"),
    "older version": (lambda d: edit_plan(d, lambda p: p.pop("format")), "cannot be read"),
    "fewer layers": (lambda d: edit_plan(d, lambda p: p["layers"].pop()), "plans 1 layers, the model has 2"),
    "unknown field": (lambda d: edit_plan(d, lambda p: p["layers"][0]["codec"]["key"].update(new=1)), "unknown codec fields"),
    "no layers": (lambda d: edit_plan(d, lambda p: p.pop("layers")), "is damaged"),
    "bad segment": (lambda d: edit_plan(d, lambda p: p["layers"][0].update(segments=[["first"]])), "is damaged"),
    "other segments": (lambda d: edit_plan(d, lambda p: p["layers"][0].update(segments=[])), "exact rows but segments"),
    "no table": (lambda d: edit_tensors(d, lambda t: t.pop("layers.1.k_basis")), "table k_basis of layer 1 is missing"),
    "other shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"layers.1.k_mean": torch.zeros(2, 8)})),
        r"k_mean of layer 1 has shape \(2, 8\)",
    ),
    "nan table": (lambda d: edit_tensors(d, lambda t: t["layers.0.k_sigma"].fill_(float("nan"))), "holds NaN or infinite"),
    "no fingerprint": (lambda d: edit_tensors(d, lambda t: t.pop("fingerprint")), "cannot be read"),
    "other model": (lambda d: other_weights(d), "made for other weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_never_a_plain_model(damaged: Path, damage: str) -> None:
    change, words = DAMAGE[damage]
    change(damaged)
    with pytest.raises((SidecarError, kvsink.errors.UnsupportedError), match=words):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_the_copy_itself_is_good(damaged: Path) -> None:
    assert runtime_of(AutoModelForCausalLM.from_pretrained(damaged)).method == "klt"
