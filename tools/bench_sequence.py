"""`kvsink-bench capacity`: one long sequence, prefilled in chunks, then decoded, with what was seen on the way in a file.

Formula    error of attention = |one row by the decode kernel - the same row by decoded pieces| / |the latter|, in three layers
           error of a step = |logits of the compiled step - of the model without compilation| / |the latter|
Shapes     one sequence; `steps` tokens at the end, greedy, each behind the other
Differs    sampled chunks stand on random codes, as if the chunks between had been run; their prefill is a mean times a number
Raises     NotFinite when a chunk's logits are not finite
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kvsink.errors import KvsinkError
from kvsink.kernels import backends, prefill
from kvsink.kernels.attend import attention
from kvsink.kernels.backends import Call, LayerState
from kvsink.kernels.cuda import launch
from kvsink.model.passing import given_cache
from kvsink.tools.bench_model import fill, rewritten

__all__ = ["ATTENTION_BOUND", "STEP_BOUND", "NotFinite", "Progress", "choose_pieces", "sequence_row"]

ATTENTION_BOUND = 1e-2  # bf16: 2^-8 of rounding on either way, and a few like it
STEP_BOUND = 0.1  # over all layers: Inductor rounds less often, and a code at a threshold turns
_SAMPLES = 9


class NotFinite(KvsinkError):
    """Logits that are no numbers: a time behind them would mean nothing."""


class Progress:
    """Lines of JSON, each on disk before the next chunk begins; without a file nothing is written."""

    def __init__(self, path: Path | None, say: Callable[[str], None]) -> None:
        self.path, self.say, self.begun = path, say, time.monotonic()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def note(self, **fields: Any) -> None:
        row = {**fields, "elapsed_s": round(time.monotonic() - self.begun, 2)}
        self.say("  ".join(f"{k}={v}" for k, v in row.items()))
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_gib() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0


def sequence_row(
    model: Any,
    side: str,
    tokens: int,
    chunk: int,
    say: Callable[[str], None],
    whole: bool,
    steps: int = 16,
    pieces: str = "flash",
    progress: Path | None = None,
    compiled: bool = True,
) -> dict[str, Any]:
    """Prefill in chunks, check, decode. Without `whole`, chunks at a few places only are run."""
    from kvsink.cache.cache import KVSinkCache

    model.config._attn_implementation = "sdpa"
    cache = KVSinkCache.for_model(rewritten(model, side)(), 1, tokens + 256)
    starts = list(range(0, tokens, chunk))
    run = starts if whole else [starts[round(i * (len(starts) - 1) / (_SAMPLES - 1))] for i in range(_SAMPLES)]
    seen = Progress(progress, say)
    pieces = choose_pieces(pieces, model, say)
    with patch.dict(os.environ, KVSINK_PIECES=pieces), torch.no_grad():
        spent = _prefill(model, cache, run, tokens, chunk, whole, seen)
        held = int(cache.get_seq_length())
        seen.note(event="prefilled", tokens=held, cache_gib=round(cache.nbytes() / 2**30, 2))
        error = attention_error(cache, model, held)
        seen.note(event="attention checked", error=error)
        decoded = _decode(model, cache, held, steps, compiled, seen)
    total = sum(spent.values()) if whole else sum(spent.values()) / len(spent) * len(starts)
    right = decoded["finite"] and decoded["step_error"] <= STEP_BOUND and (error is None or error <= ATTENTION_BOUND)
    row = {
        "kind": "sequence",
        "side": side,
        "B": 1,
        "T": held,
        "chunk": chunk,
        "chunks_run": len(run),
        "chunks": len(starts),
        "pieces": pieces,
        "prefill_s": round(total, 1),
        "prefill_is": "measured" if whole else "mean of the chunks run times their number",
        "chunk_s": {k: round(v, 3) for k, v in spent.items()},
        "attention_error": error,
        **decoded,
        "verdict": "ok" if right else "wrong",
        "peak_gib": _peak_gib(),
        "cache_gib": round(cache.nbytes() / 2**30, 2),
    }
    seen.note(event="done", **{k: v for k, v in row.items() if k != "chunk_s"})
    return row


def _prefill(model: Any, cache: Any, run: list[int], tokens: int, chunk: int, whole: bool, seen: Progress) -> dict[int, float]:
    """Seconds of every chunk run, by its first token."""
    spent: dict[int, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not whole:
        fill(cache, 0)
    for i, start in enumerate(run):
        if not whole:
            _set_length(cache, start)
        ids = torch.randint(0, min(1000, model.config.vocab_size), (1, min(chunk, tokens - start)), device=model.device)
        _synchronize()
        begun = time.monotonic()
        logits = model(ids, **given_cache(model, cache), use_cache=True, logits_to_keep=1).logits
        _synchronize()
        spent[start] = time.monotonic() - begun
        if not bool(torch.isfinite(logits).all()):
            raise NotFinite(f"the logits behind token {start + ids.shape[1] - 1} are not finite")
        seen.note(
            event="chunk",
            index=i,
            of=len(run),
            start=start,
            tokens=ids.shape[1],
            seconds=round(spent[start], 3),
            peak_gib=_peak_gib(),
        )
    return spent


def _set_length(cache: Any, length: int) -> None:
    for layer in cache.packed_layers():
        layer.length.fill_(length)


def _decode(model: Any, cache: Any, held: int, steps: int, compiled: bool, seen: Progress) -> dict[str, Any]:
    """Greedy steps behind `held` tokens: the first by the model as it is, then all by the compiled step, timed one by one."""
    token = torch.randint(0, min(1000, model.config.vocab_size), (1, 1), device=model.device)

    def ask(call: Any, given: Tensor, i: int) -> Tensor:
        position = torch.full((1, 1), held + i, device=model.device)
        return call(given, position_ids=position, use_cache=True, **given_cache(call, cache)).logits[:, -1:].clone()

    wanted = ask(model, token, 0).float()
    _set_length(cache, held)
    step = torch.compile(model, backend="kvsink", mode="reduce-overhead", fullgraph=True) if compiled else model
    for i in range(4):  # compiles, and records its graph
        torch.compiler.cudagraph_mark_step_begin()
        ask(step, token, i)
        if i == 0:
            _synchronize()
            seen.note(event="compiled" if compiled else "first step")
    _set_length(cache, held)
    logits, marks = [], [_mark()]
    given = token
    for i in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        logits.append(ask(step, given, i))
        given = logits[-1].argmax(-1)
        marks.append(_mark())
    _synchronize()
    took = [round(_between(a, b), 3) for a, b in pairwise(marks)]
    found = torch.cat(logits, 1).float()
    for i, ms in enumerate(took):
        seen.note(event="step", index=i, token=int(found[0, i].argmax()), ms=ms)
    error = float((found[:, :1] - wanted).norm() / wanted.norm())
    return {
        "decoded": steps,
        "step_ms": sorted(took)[len(took) // 2],
        "decode_ms": took,
        "finite": bool(torch.isfinite(found).all()),
        "tokens": found[0].argmax(-1).tolist(),
        "step_error": float(f"{error:.1e}"),
    }


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: Any, b: Any) -> float:
    return (b - a) * 1e3 if isinstance(a, float) else a.elapsed_time(b)


def attention_error(cache: Any, model: Any, held: int) -> float | None:
    """The decode kernel against the decoded past in pieces, the largest of three layers; None where no kernel attends."""
    layers, config, worst = cache.packed_layers(), model.config, 0.0
    heads, kv_heads, dim, dtype = config.num_attention_heads, config.num_key_value_heads, config.head_dim, model.dtype
    g = torch.Generator(model.device).manual_seed(0)
    for i in sorted({0, len(layers) // 2, len(layers) - 1}):
        x = layers[i]
        q, k, v = (torch.randn(1, n, 1, dim, device=model.device, dtype=dtype, generator=g) for n in (heads, kv_heads, kv_heads))
        call = Call(x.codec, x.codec_text, k, v, LayerState(*x.state()), x.params, q)
        if backends.choose("attend", *call.facts).name != "cuda (tiles)":
            return None
        lib = launch.library(x.codec, call.shape.repeats, call.shape.rotary, k.device)
        p, st = call.p, call.st

        def past(start: int, end: int, x: Any = x, p: Any = p, st: Any = st, lib: Any = lib) -> tuple[Tensor, Tensor]:
            return launch.decode_rows(lib, x.codec, st, p, start, end, dtype, held + 1)

        out = attention(q, k, v, x.state(), x.params, None, dim**-0.5, False, x.codec_text)
        wanted = prefill.attend_chunk(past, q, k, v, held, None, dim**-0.5, False, x.codec.strict).float()
        error = float((out.float() - wanted).norm() / wanted.norm())
        worst = max(worst, error) if error == error else float("nan")
    return float(f"{worst:.1e}")


def choose_pieces(wanted: str, model: Any, say: Callable[[str], None]) -> str:
    """The backend for pieces of the past: cudnn only where it gives flash's outputs and sums."""
    if wanted == "flash":
        return wanted
    config = model.config
    g = torch.Generator(model.device).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, t, config.head_dim, device=model.device, dtype=model.dtype, generator=g)
        for n, t in ((config.num_attention_heads, 256), *((config.num_key_value_heads, 4096),) * 2)
    )
    try:
        found = [prefill.attend_piece(q, k, v, None, config.head_dim**-0.5, False, by) for by in ("flash", wanted)]
    except RuntimeError as error:
        say(f"{wanted} does not serve pieces of the past: {str(error).splitlines()[0]}; flash does")
        return "flash"
    (a, b), (c, d) = found
    off, mass = float((a.float() - c.float()).norm() / a.float().norm()), float((b - d).abs().max())
    same = off <= ATTENTION_BOUND and mass <= 1e-2
    say(f"{wanted} against flash: outputs {off:.1e}, logarithms of sums {mass:.1e}" + ("" if same else "; flash is taken"))
    return wanted if same else "flash"
