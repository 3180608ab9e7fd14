"""The cells of the table of families: what is done with one tiny model, and what is said of it.

Outcomes   right | declined (reason) | wrong (what was seen) | not judged (why there is no tiny model, or none that runs on text
           alone); an exception that is not ours counts as wrong, unless the stock model raises as well
Models     random, float64; float32 in folders, in ONNX, and for models that do not run in float64
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import kvsink
from kvsink.errors import KvsinkError
from kvsink.graph.backend import forget_reports, last_report
from kvsink.outdir import rewrite_dir
from kvsink.rewrite import RewriteOptions
from kvsink.tools.against_stock import BOUND, cached_logits, distance, forced_logits, planted
from kvsink.tools.tiny_models import VOCAB, build_family

__all__ = ["CELLS", "CHUNKS", "LENGTH", "NEW", "PADS", "PROMPT", "NotJudged", "Subject", "check_family", "ids", "rewritten"]

CELLS = ("8 bits", "chunked", "padded", "compiled", "folder", "onnx")
LENGTH, PROMPT, PADS, NEW = 80, 70, 5, 8  # more than a block of 64 tokens, and more than any window
CHUNKS = (7, 5, 1, 1, 56)
_FIRST = 30  # token 3 is the first printable character that is one byte, which byte-level tokenizers leave as it is
_JUMPS = {"phimoe": "its router gives experts weights that jump where two tie, so that rounding of any size may show"}
_OPTIONS: dict[str, Any] = {"key_bits": 8, "value_bits": 8, "protect": "first:1"}


class NotServed(Exception):
    """A cell that says no, with its reason."""


class NotJudged(Exception):
    """A family without a tiny model that runs, or that would show a fault."""


class Wrong(Exception):
    """A cell whose result is not what it must be."""


def check_family(family: str, cells: Sequence[str] = CELLS) -> dict[str, str]:
    """The outcome of every asked cell of one family."""
    subject = Subject(family)
    checks: dict[str, Callable[[Subject], str]] = {
        "8 bits": _eight_bits,
        "chunked": _chunked,
        "padded": _padded,
        "compiled": _compiled,
        "folder": _folder,
        "onnx": lambda s: _onnx(s.family),
    }
    out = {}
    for cell in cells:
        torch._dynamo.reset()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                assert subject.stock is not None
                note = checks[cell](subject)
            out[cell] = f"right ({note})" if note else "right"
        except NotServed as error:
            out[cell] = f"declined ({_line(error)})"
        except NotJudged as error:
            out[cell] = f"not judged ({_line(error)})"
        except Wrong as error:
            out[cell] = f"wrong ({_line(error)})"
        except Exception as error:  # whatever torch or transformers raises: a cell says it rather than stop the table
            ours = _ours(error)
            late = "when it runs: " if "ours" in vars(subject) and cell not in ("folder", "onnx") else ""
            out[cell] = f"declined ({late}{_line(ours)})" if ours else f"wrong ({_named(error)})"
    torch._dynamo.reset()
    return out


class Subject:
    """A family under test: its stock model, the rewritten twin, and the logits that both must give."""

    def __init__(self, family: str) -> None:
        self.family = family

    @cached_property
    def stock(self) -> Any:
        """The stock model, in float32 where it does not run in float64 or loses padded rows there (scores masked by the least
        number of float64, then a softmax in float32)."""
        if self.family in _JUMPS:
            raise NotJudged(_JUMPS[self.family])
        reason = "its logits are not one number per token and word"
        given, mask = ids(1, 9, 2), torch.ones(1, 9, dtype=torch.int64)
        mask[0, 0] = 0
        for dtype in (torch.float64, torch.float32):
            try:
                model: Any = build_family(self.family, dtype)
                if model.config.is_encoder_decoder:
                    return model
                logits = model(input_ids=given).logits
                masked = model(input_ids=given, attention_mask=mask).logits[:, -1]
            except Exception as error:  # whatever stops transformers is the reason that the table gives
                reason = _named(error)
                continue
            if logits.shape == (1, 9, VOCAB) and logits.isfinite().all() and (masked.isfinite().all() or dtype == torch.float32):
                return model
        raise NotJudged(reason)

    @cached_property
    def ours(self) -> Any:
        """The twin, rewritten. Raises NotJudged where wrong keys in its packed layers would not show in the logits."""
        model = build_family(self.family, self.stock.dtype)
        report = kvsink.rewrite(model, "klt", calibration=ids(8, 64, 1), **_OPTIONS)
        self.layers = report.layers
        self.packed = [row.layer for row in report.layers if row.packed]
        given = ids(1, LENGTH, 3)
        try:
            wanted = cached_logits(self.stock, given, (PROMPT,))
        except Exception as error:
            raise NotServed(f"the stock model does not run with its own cache: {_named(error)}") from error
        try:
            faulty = cached_logits(self.stock, given, (PROMPT,), planted(self.stock, self.packed))
        except Exception as error:
            raise NotJudged(f"it takes no cache in which a fault could be planted: {_named(error)}") from error
        if (fault := distance(faulty, wanted)) < 1.5 * BOUND:
            raise NotJudged(f"keys in the wrong channels change its logits by {fault:.2g} of their size only")
        return model

    def compare(self, found: Tensor, wanted: Tensor, uncached: Callable[[], Tensor]) -> str:
        """The error in words; raises Wrong where it is beyond the bound.

        uncached: the logits of the stock model without a cache, which decide where its own cache changes what it computes.
        """
        if found.shape != wanted.shape:
            raise Wrong(f"logits {tuple(found.shape)}, those of the stock model {tuple(wanted.shape)}")
        error = distance(found, wanted)
        if error <= BOUND:
            return f"{error:.3f}"
        plain = uncached()
        if (without := distance(found, plain)) <= BOUND < (own := distance(wanted, plain)):
            return f"{without:.3f}, as without a cache, from which the stock cache differs by {own:.2g}"
        raise Wrong(f"logits differ from the stock model's by {error:.3g} of their size")


def _chunks(subject: Subject, chunks: tuple[int, ...]) -> str:
    given, model = ids(1, LENGTH, 3), subject.ours
    wanted = cached_logits(subject.stock, given, chunks)
    found = cached_logits(model, given, chunks, kvsink.KVSinkCache.for_model(model))
    return subject.compare(found, wanted, lambda: subject.stock(given, use_cache=False).logits)


def _eight_bits(subject: Subject) -> str:
    error = _chunks(subject, (PROMPT,))
    others = {row.reason: None for row in subject.layers if not row.packed}
    note = f"{error}; {len(subject.packed)} of {len(subject.layers)} layers"
    return "; ".join([note, *others])


def _chunked(subject: Subject) -> str:
    return _chunks(subject, CHUNKS)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """A left-padded prompt of two rows, its mask, and what follows it."""
    prompt, mask = ids(2, PROMPT, 3), torch.ones(2, PROMPT, dtype=torch.int64)
    prompt[1, :PADS], mask[1, :PADS] = 0, 0
    return prompt, mask, ids(2, NEW, 4)


def _generated(subject: Subject, **options: Any) -> Tensor:
    try:
        return forced_logits(subject.stock, *_batch(), **options)[0]
    except Exception as error:
        raise NotServed(f"the stock model does not generate on a padded batch: {_named(error)}") from error


def _padded(subject: Subject) -> str:
    model, wanted = subject.ours, _generated(subject)
    found, out = forced_logits(model, *_batch())
    cache = getattr(out, "cache", None) or out.past_key_values  # the name since transformers 5.24, and before
    if not isinstance(cache, kvsink.KVSinkCache):
        raise Wrong(f"generate ran on a {type(cache).__name__}")
    return subject.compare(found, wanted, lambda: _generated(subject, use_cache=False))


def _compiling(model: Any, backend: str) -> dict[str, Any]:
    options = {"options": {"kvsink.inner": "eager"}} if backend == "kvsink" else {}
    config = transformers.CompileConfig(backend=backend, fullgraph=True, mode=None, **options)
    config._compile_all_devices = True
    model._compiled_call = None
    return {"compile_config": config}


def _compiled(subject: Subject) -> str:
    model, wanted = subject.ours, _generated(subject)
    forget_reports()
    try:
        found, _ = forced_logits(model, *_batch(), **_compiling(model, "kvsink"))
    except Exception as error:
        if _ours(error) is None and (reason := _uncompilable(subject.stock)):
            raise NotServed(f"the stock model does not compile: {reason}") from error
        raise
    apart, made = subject.compare(found, wanted, lambda: _generated(subject, use_cache=False)), last_report()
    fused = len(made.done("fuse")) if made is not None else 0
    if fused != len(subject.packed):
        reasons = [r.reason for r in made.declined()] if made is not None else ["generate did not compile"]
        why = reasons[0] if reasons else "no attention that the graph shows whole"
        raise NotServed(f"{apart}; {fused} of {len(subject.packed)} packed layers fused: {why}")
    return f"{apart}; {fused} fused"


def _uncompilable(stock: Any) -> str:
    """What stops the stock model from decoding in one graph, or an empty string."""
    torch._dynamo.reset()
    try:
        forced_logits(stock, *_batch(), cache_implementation="static", **_compiling(stock, "eager"))
    except Exception as error:
        return _named(error)
    return ""


def _folder(subject: Subject) -> str:
    kind = type(subject.stock)
    with tempfile.TemporaryDirectory() as place:
        plain, out = Path(place) / "plain", Path(place) / "out"
        saved: Any = build_family(subject.family)
        saved.save_pretrained(plain)
        save_tokenizer(plain)
        try:
            stock = kind.from_pretrained(plain)
        except Exception as error:
            raise NotServed(f"the stock model does not load again: {_named(error)}") from error
        wide = (vars(stock.config).get("head_dim") or 0) > 60  # more channels than one short window calibrates
        text = ids(8, 64, 1) if wide else ids(4, 62, 1)  # a window that fits the positions of every model
        (Path(place) / "text").write_text(_text(text), encoding="utf-8")
        calibration: dict[str, Any] = {"calibration": str(Path(place) / "text"), "calibration_tokens": text.numel()}
        options = RewriteOptions(method="klt", **calibration, **_OPTIONS)
        rewrite_dir(plain, out, options, device="cpu")
        model = kind.from_pretrained(out)
        given = ids(1, LENGTH, 3)
        found = cached_logits(model, given, (PROMPT,), kvsink.KVSinkCache.for_model(model))
        wanted = cached_logits(stock, given, (PROMPT,))
        return subject.compare(found, wanted, lambda: stock(given, use_cache=False).logits)


def _text(tokens: Tensor) -> str:
    """Token ids in the letters of `save_tokenizer`."""
    return "".join(chr(_FIRST + i) for i in tokens.flatten().tolist())


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of VOCAB single characters into a model folder; ids 0, 1 and 2 are special."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(chr(_FIRST + i) for i in range(3, VOCAB))]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)


def _ours(error: BaseException | None) -> KvsinkError | None:
    while error is not None and not isinstance(error, KvsinkError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    """The first line of a message, without the folder it happened in; a line that ends in a colon takes the next one along."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return re.sub(r"\S*/(plain|out)\b", r"\1", first)[:240].replace("|", "\\|")


def ids(rows: int, length: int, seed: int) -> Tensor:
    """Token ids [B, S] that avoid the special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def rewritten(family: str, method: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A tiny model rewritten by a method at 4 bits, and the report."""
    model = build_family(family, dtype)
    widths = {"key_bits": 4, "value_bits": 4, "protect": "first:1", **options}
    report = kvsink.rewrite(model, method, **{"calibration": ids(8, 64, 1), **widths})
    return model, report


def _onnx(family: str) -> str:
    from kvsink.export import onnx

    model, _ = rewritten(family, "rtn", torch.float32, protect="massive:1")
    with tempfile.TemporaryDirectory() as folder:
        onnx(model, Path(folder) / "model.onnx")
    return ""
