"""Write docs/families.md, what works in every family of models, by running it: `python -m kvsink.tools.families`.

capture    every full-attention layer of a decode step is located in its graph
rewrite    `kvsink.rewrite` with klt and with rtn, 4 bits; how many layers are packed, and why others are not
generate   a left-padded batch: 16-bit tokens equal the model's own on its stock cache; 4-bit klt and rtn generate
compile    tokens of 4-bit klt and rtn through dynamo and all passes equal those without, every packed layer fused
onnx       4-bit rtn leaves as model.onnx, whose run beside the torch model passes its check

Models     tiny, random, float64 (ONNX: float32), see `kvsink.tools.tiny_models`
Outcomes   right | declined (reason) | wrong (what was seen); an exception that is not ours counts as wrong
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import kvsink
from kvsink.backend import forget_reports, last_report
from kvsink.capture import capture_all
from kvsink.errors import KvsinkError
from kvsink.passing import cache_of, given_cache
from kvsink.pipeline import run_passes
from kvsink.sites import Declined, find_sites
from kvsink.tools.tiny_models import FAMILIES, VOCAB, build_family

__all__ = ["CELLS", "check_family", "page"]

DOCS = Path(__file__).resolve().parents[1] / "docs" / "families.md"
RECORD = DOCS.with_suffix(".json")
COMMAND = "python -m kvsink.tools.families"
CELLS = ("capture", "rewrite", "generate", "compile", "onnx")
_PROMPT, _NEW, _METHODS = 13, 10, ("klt", "rtn")


class NotServed(Exception):
    """A cell that says no, with its reason."""


class Wrong(Exception):
    """A cell whose result is not what it must be."""


def check_family(family: str, cells: Sequence[str] = CELLS) -> dict[str, str]:
    """The outcome of every asked cell of one family."""
    checks: dict[str, Callable[[str], str]] = {
        "capture": _capture, "rewrite": _rewrite, "generate": _generate, "compile": _compile, "onnx": _onnx,
    }  # fmt: skip
    out = {}
    for cell in cells:
        torch._dynamo.reset()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                note = checks[cell](family)
            out[cell] = f"right ({note})" if note else "right"
        except (KvsinkError, NotServed) as error:
            out[cell] = f"declined ({_line(error)})"
        except Wrong as error:
            out[cell] = f"wrong ({_line(error)})"
        except Exception as error:  # whatever torch or transformers raises: a cell says it rather than stop the table
            ours = _ours(error)
            out[cell] = f"declined ({_line(ours)})" if ours else f"wrong ({type(error).__name__}: {_line(error)})"
    torch._dynamo.reset()
    return out


def _ours(error: BaseException | None) -> KvsinkError | None:
    while error is not None and not isinstance(error, KvsinkError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def _line(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first.strip()[:240].replace("|", "\\|")


def ids(rows: int, length: int, seed: int) -> Tensor:
    """Token ids [B, S] that avoid the special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def rewritten(family: str, method: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A tiny model rewritten by a method at 4 bits, and the report."""
    model = build_family(family, dtype)
    widths = {"key_bits": 4, "value_bits": 4, "protect": "first:1", **options}
    report = kvsink.rewrite(model, method, **{"calibration": ids(8, 64, 1), **widths})
    return model, report


def _tokens(model: Any, **options: Any) -> Tensor:
    prompt = ids(2, _PROMPT, 3)
    mask = torch.ones_like(prompt)
    prompt[1, :3], mask[1, :3] = 0, 0  # left padding
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=_NEW, do_sample=False, return_dict_in_generate=True, **options
    )
    cache = cache_of(out)
    if hasattr(model, "_kvsink_runtime") and not (isinstance(cache, kvsink.KVSinkCache) and cache.get_seq_length() > _NEW):
        raise Wrong(f"generate ran on a {type(cache).__name__}")
    tokens: Tensor = out.sequences[:, -_NEW:]
    return tokens


def _capture(family: str) -> str:
    model = build_family(family)
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=ids(1, 5, 2), **given_cache(model, cache), **_decoder(model, 5))
    graphs = capture_all(model, ids(1, 1, 4), cache) if not _decoder(model, 1) else []
    if not graphs:
        raise NotServed("an encoder-decoder model: its cross attention has no growing cache")
    located, reasons = 0, []
    for gm in graphs:
        run_passes(gm, ("normalize",))
        for site in find_sites(gm):
            if isinstance(site, Declined):
                reasons.append(site.reason)
            else:
                located += 1
    if reasons:
        raise NotServed(f"{located} of {located + len(reasons)} attentions located; {reasons[0]}")
    if not located:
        raise NotServed("no attention that the graph shows whole")
    return f"{located} sites"


def _decoder(model: Any, length: int) -> dict[str, Any]:
    return {"decoder_input_ids": ids(1, length, 2)} if model.config.is_encoder_decoder else {}


def _rewrite(family: str) -> str:
    note = ""
    for method in _METHODS:
        _, report = rewritten(family, method)
        packed = sum(row.packed for row in report.layers)
        others = [row.reason for row in report.layers if not row.packed]
        note = f"{packed} of {len(report.layers)} layers" + (f"; {others[0]}" if others else "")
    return note


def _generate(family: str) -> str:
    original = build_family(family, torch.float64)
    exact, _ = rewritten(family, "rtn", key_bits=16, value_bits=16)
    wanted, found = _tokens(original), _tokens(exact)
    if not torch.equal(wanted, found):
        raise Wrong(f"{int((wanted != found).sum())} of {wanted.numel()} tokens at 16 bit differ from the model's own")
    for method in _METHODS:
        _tokens(rewritten(family, method)[0])
    return ""


def _compile(family: str) -> str:
    for method in _METHODS:
        model, report = rewritten(family, method)
        wanted = _tokens(model)
        config = transformers.CompileConfig(
            backend="kvsink", fullgraph=True, mode=None, options={"kvsink.inner": "eager"}
        )
        config._compile_all_devices = True
        model._compiled_call = None
        forget_reports()
        found = _tokens(model, compile_config=config)
        if not torch.equal(wanted, found):
            raise Wrong(f"{method}: {int((wanted != found).sum())} of {wanted.numel()} tokens differ from uncompiled ones")
        packed, made = sum(row.packed for row in report.layers), last_report()
        fused = len(made.done("fuse")) if made is not None else 0
        if fused != packed:
            reasons = [r.reason for r in made.declined()] if made is not None else ["generate did not compile"]
            why = reasons[0] if reasons else "no attention that the graph shows whole"
            raise NotServed(f"{method}: tokens equal; {fused} of {packed} packed layers fused: {why}")
    return ""


def _onnx(family: str) -> str:
    from kvsink.export import onnx

    model, _ = rewritten(family, "rtn", torch.float32, protect="massive:1")
    with tempfile.TemporaryDirectory() as folder:
        onnx(model, Path(folder) / "model.onnx")
    return ""


def page(record: dict[str, dict[str, str]]) -> str:
    """The file."""
    every, kinds = [c for row in record.values() for c in row.values()], ("right", "declined", "wrong", "not run")
    count = {kind: sum(c.startswith(kind) for c in every) for kind in kinds}
    lines = [
        "# Families of models", "",
        f"Made by `{COMMAND}`, which runs every cell on a tiny random model of the family; change that, not this file.", "",
        "- capture: the attentions of a decode step are located in its graph",
        "- rewrite: klt and rtn at 4 bits; layers that are packed, and why others are not",
        "- generate: on a left-padded batch, greedy tokens at 16 bit equal those of the model on its stock cache (float64); klt "
        "and rtn at 4 bits generate",
        "- compile: klt and rtn at 4 bits, tokens of the decode graph after all passes equal those without compilation, and "
        "every packed layer is fused. The graph runs operator by operator here, without Inductor",
        "- ONNX: rtn at 4 bits leaves, and runs beside the torch model in onnxruntime within the export's own check", "",
        f"{len(record)} families; cells: " + ", ".join(f"{n} {kind}" for kind, n in count.items()) + ". "
        f"torch {torch.__version__}, transformers {transformers.__version__}, CPU.", "",
        "| family | capture | rewrite | generate | compile | ONNX |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {FAMILIES[f][0]} | " + " | ".join(record[f][c] for c in CELLS) + " |" for f in FAMILIES if f in record]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the asked cells and write the record and the page; exits with 1 when a cell is wrong."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families, by comma; the others keep what the record says")
    parser.add_argument("--cells", default=",".join(CELLS), help="cells, by comma")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--out", type=Path, default=DOCS)
    o = parser.parse_args(argv)
    chosen, cells = [f for f in o.only.split(",") if f] or list(FAMILIES), o.cells.split(",")
    for name, known in [*((n, FAMILIES) for n in chosen), *((c, CELLS) for c in cells)]:
        if name not in known:
            parser.error(f"{name!r} is not one of {', '.join(known)}")
    record = json.loads(o.record.read_text(encoding="utf-8")) if o.record.is_file() else {}
    for family in chosen:
        begun = time.monotonic()
        found = check_family(family, cells)
        record[family] = {c: {**record.get(family, {}), **found}.get(c, "not run") for c in CELLS}
        print(f"{family} ({time.monotonic() - begun:.0f} s): " + "; ".join(f"{c} {t}" for c, t in found.items()), flush=True)
        o.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    o.out.write_text(page(record), encoding="utf-8")
    return int(any(c.startswith("wrong") for row in record.values() for c in row.values()))


if __name__ == "__main__":
    sys.exit(main())
