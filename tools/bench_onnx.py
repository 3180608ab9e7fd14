"""`kvsink-bench onnx`: exported graphs under onnxruntime beside an export of the same model whose cache is not coded.

First what is right: every case is exported, its logits are compared with those of the CPU provider and of the torch model, and a
step is profiled, which says on which provider each node ran. Then what is fast: decode steps behind a prompt, one step of every
case in turn. What runs on a GPU runs in another process, so that a case that brings it down is one line of the table.

Formula    difference = max |logits - logits'| / max |logits'| over a prompt of 96 tokens and 8 single ones, each side with its own
           cache; bytes: codes that differ between the providers. Verdict "ok": difference to the CPU at most 2 % in float16 (0.1 %
           in float32), or to torch at most 1.5 times the CPU's own, or that of torch in float16 for what runs on CUDA alone
           (codes that tie part two caches of 4 bits in float16 further than that), and no node but those that handle shapes
           on the CPU
Shapes     one sequence; the cache stays on the device
Differs    random weights where no folder is given: what is right is then asked of two layers of a quarter of the width, and times
           are those of the shape; a folder, or a shape as small as that, is exported once
"""

from __future__ import annotations

import gc
import importlib.metadata
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from kvsink.errors import KvsinkError
from kvsink.export import onnx
from kvsink.model.passing import given_cache
from kvsink.model.runtime import detach
from kvsink.tools.bench_onnx_run import SHORT, SINGLE, numbers, pieces, starts, timed

__all__ = ["onnx_rows", "parse_cases", "table"]

Case = tuple[str, str, int]
_SAID = (
    "p50_ms",
    "p20_ms",
    "prefill_s",
    "cache_mib",
    "cache_bits",
    "off_cpu",
    "off_torch",
    "cpu_off_torch",
    "half_off_torch",
    "top1_torch",
    "bytes_off_cpu",
    "cpu_share",
    "on_cpu",
    "slowest",
    "export_s",
    "verdict",
)
_ONE = 120  # seconds that one case may take to be compared


def parse_cases(text: str) -> list[Case]:
    """ "gqa:4,functions:klt:2" → flavour, method, bits."""
    cases: list[Case] = []
    for part in (p for p in text.split(",") if p):
        flavour, *method, bits = part.split(":") if ":" in part else (part, "")
        if flavour not in ("functions", "gqa", "custom") or len(method) > 2 or not bits.isdigit():
            raise click.BadParameter(f"{part!r} is not FLAVOUR:BITS or FLAVOUR:METHOD:BITS", param_hint="--cases")
        cases.append((flavour, ":".join(method) or "static:rotated", int(bits)))
    return cases


def onnx_rows(
    name: str,
    layers: int,
    hidden: int,
    provider: str,
    dtype: str | None,
    cases: list[Case],
    tokens: int,
    steps: int,
    threads: int,
    seconds: int,
    chunk: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One row per case about its numbers, then one per case about its time; a case that stops has its reason as verdict.

    seconds: no export begins after three quarters of them. chunk: tokens of a prompt that a call takes.
    """
    began, kind = time.perf_counter(), dtype or ("float16" if provider == "cuda" else "float32")
    label = name if name != "llama" else f"llama {hidden} x{layers}"
    facts = _facts(provider) | {"model": label, "dtype": kind}
    say("  ".join(f"{k}={v}" for k, v in facts.items()))
    apart = _Apart()
    begun = apart(60, starts, provider)
    if "verdict" in begun:
        apart.close()
        raise KvsinkError(f"onnxruntime does not run on {provider} here: {begun['verdict']}")
    small = (min(layers, 2), min(hidden, max(512, hidden // 4))) if name == "llama" else (layers, hidden)
    positions = max(tokens + steps, SHORT + SINGLE)
    with closing(apart), tempfile.TemporaryDirectory() as folder:
        source = _Source(name, *small, positions)
        made: dict[Case, Path | None] = {}
        stopped: list[Case] = []
        for case in cases:
            row = facts | _named(case) | {"kind": "onnx-numbers", "T": SHORT + SINGLE}
            path = Path(folder) / f"numbers-{len(made)}" / "model.onnx"
            try:
                ids = source.text(positions)
                exported, logits = source.export(case, path, kind, positions)
                row |= exported | apart(_ONE, numbers, str(path), provider, kind, ids.numpy(), logits, threads)
            except Exception as error:  # whatever a case brings is told in its row
                row |= {"verdict": _told(error)}
            made[case] = path if row["verdict"] == "ok" or "off_torch" in row else None
            _tell(say, case, row)
            yield row
        measured: list[Case] = [case for case in cases if made[case] is not None]
        if small != (layers, hidden):
            source = _Source(name, layers, hidden, positions)
            for case in measured:
                row = facts | _named(case) | {"kind": "onnx", "T": tokens}
                made[case] = path = Path(folder) / f"time-{len(stopped)}-{case[0]}-{case[1]}-{case[2]}" / "model.onnx"
                try:
                    if time.perf_counter() - began > 0.75 * seconds:
                        raise KvsinkError(f"not timed: {time.perf_counter() - began:.0f} of {seconds} seconds were over")
                    exported, _ = source.export(case, path, kind, positions)
                    say(f"exported {':'.join(map(str, case))} in {exported['export_s']} s")
                except Exception as error:
                    stopped.append(case)
                    row |= {"verdict": _told(error)}
                    _tell(say, case, row)
                    yield row
            measured = [case for case in measured if case not in stopped]
        rows = source.text(positions).numpy()
        del source
        gc.collect()
        paths = [(case[0], str(made[case])) for case in measured]

        def left() -> float:
            return max(30.0, seconds - (time.perf_counter() - began))

        found = apart(left(), timed, paths, provider, rows, tokens, steps, threads, chunk) if measured else {}
        each = found.get("rows")
        for i, case in enumerate(measured):  # all of them in turn; where that stops, each alone
            row = facts | _named(case) | {"kind": "onnx", "T": tokens, "in_turn": bool(each)}
            one = each[i] if each else apart(left(), timed, paths[i : i + 1], provider, rows, tokens, steps, threads, chunk)
            row |= one["rows"][0] if "rows" in one else one
            _tell(say, case, row)
            yield row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as two Markdown tables: numbers, then times, beside the case of the same flavour that is not coded."""
    checked = [r for r in rows if r["kind"] == "onnx-numbers"]
    times = [r for r in rows if r["kind"] == "onnx"]
    lines = ["| flavour | method | bits | off the CPU | off torch | the CPU off torch | bytes off the CPU | verdict |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---|")
    for r in checked:
        said = ("flavour", "method", "bits", "off_cpu", "off_torch", "cpu_off_torch", "bytes_off_cpu", "verdict")
        lines.append(f"| {' | '.join(str(r.get(k, '')) for k in said)} |")
    lines += ["", "| flavour | method | bits | step, ms | p20, ms | against not coded | prompt, s | cache, MiB | verdict |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---|")
    plain = {r["flavour"]: r["p50_ms"] for r in times if r["bits"] == 16 and "p50_ms" in r}
    plain.setdefault("custom", min((time for time in plain.values() if time), default=0.0))  # the fastest that is not coded
    for r in times:
        base = plain.get(r["flavour"])
        ratio = f"{base / r['p50_ms']:.2f}x" if base and "p50_ms" in r else ""
        cells = [r.get(k, "") for k in ("flavour", "method", "bits", "p50_ms", "p20_ms")]
        cells += [ratio, *(r.get(k, "") for k in ("prefill_s", "cache_mib", "verdict"))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _tell(say: Callable[[str], None], case: Case, row: dict[str, Any]) -> None:
    say(":".join(map(str, case)) + "  " + "  ".join(f"{k}={v}" for k, v in row.items() if k in _SAID))


def _named(case: Case) -> dict[str, Any]:
    flavour, method, bits = case
    return {"flavour": flavour, "method": method if bits < 16 else "not coded", "bits": bits, "B": 1}


def _told(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return lines[0][:200] if isinstance(error, KvsinkError) else f"{type(error).__name__}: {lines[0][:200]}"


def _facts(provider: str) -> dict[str, str]:
    import onnxruntime
    import transformers

    cuda = provider == "cuda" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if cuda else platform.machine(),
        "provider": provider,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "onnx": importlib.metadata.version("onnx"),
        "python": platform.python_version(),
    }


class _Source:
    """A model in float32 on the CPU whose weights come back for every case; a random one is made once."""

    def __init__(self, name: str, layers: int, hidden: int, positions: int) -> None:
        self.name = name
        if name != "llama":
            from kvsink.evaluate.evaluation import token_windows
            from kvsink.evaluate.texts import evaluation_text
            from kvsink.folder.demo import resolve_model_dir
            from kvsink.folder.loading import load_model, load_tokenizer

            folder = resolve_model_dir(name)
            self.model = load_model(folder, "cpu", torch.float32)
            self.text: Callable[[int], Tensor] = lambda n: token_windows(evaluation_text(), load_tokenizer(folder), 1, n)
        else:
            from kvsink.tools.bench_model import Shape, llama

            torch.manual_seed(0)
            shape = Shape(
                vocabulary=8192,
                inner=hidden * 7 // 2,
                kv_heads=max(1, hidden // 512),
                theta=500000.0,
                hidden=hidden,
                heads=max(1, hidden // 128),
            )
            self.model = llama(layers, torch.float32, positions=positions, shape=shape, device="cpu")
            self.text = lambda n: torch.randint(0, 8192, (1, n), generator=torch.Generator().manual_seed(1))
        self._weights = {name: p.data.clone() for name, p in self.model.named_parameters()}

    def export(self, case: Case, path: Path, kind: str, positions: int) -> tuple[dict[str, Any], Any]:
        """Rewrite, write the graph, and run torch on the short text: what a row says of that, and torch's logits by provider.

        On CUDA GroupQueryAttention attends to the rows of a first prompt as they came, on the CPU to their codes.
        """
        import kvsink

        flavour, method, bits = case
        begun = time.perf_counter()
        detach(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.data = self._weights[name].clone()
        plain: dict[str, Any] = {"protect": "none"} if flavour == "gqa" or bits == 16 else {}
        given: dict[str, Any] = {"calibration": self.text(1024)} if self.name == "llama" else {}
        kvsink.rewrite(self.model, method, key_bits=bits, value_bits=bits, **plain, **given)
        path.parent.mkdir()
        manifest = onnx(self.model, path, flavour, tokens=positions, dtype=kind)
        row = {"export_s": round(time.perf_counter() - begun, 1), "checked": manifest["check"]}
        ids, strict = self.text(positions), flavour == "gqa"
        logits = {"cpu": self._logits(ids, strict, strict)}
        if "kernels" in manifest and torch.cuda.is_available():  # codes part where float16 rounds otherwise: how far, torch shows
            for parameter in self.model.parameters():
                parameter.data = parameter.data.half()
            logits["half"] = self._logits(ids.cuda(), False, False, self.model.cuda())
            self.model.cpu()
        return row, logits | {"cuda": self._logits(ids, False, strict) if strict and bits < 16 else logits["cpu"]}

    def _logits(self, ids: Tensor, strict_prompt: bool, strict: bool, model: Any = None) -> Any:
        """strict: new rows are read from their codes, those of the prompt or of later steps."""
        from kvsink import KVSinkCache

        model = self.model if model is None else model
        found: list[Tensor] = []
        cache, then = (KVSinkCache.for_model(model, 1, SHORT + SINGLE, strict=s) for s in (strict_prompt, strict))
        with torch.no_grad():
            for a, b in pieces():
                found.append(model(input_ids=ids[:, a:b], **given_cache(model, cache), use_cache=True).logits)
                if a == 0:
                    for one, other in zip(cache.packed_layers(), then.packed_layers(), strict=True):
                        for held, x in zip(other.state(), one.state(), strict=True):
                            held.copy_(x)
                    cache = then if then.packed_layers() else cache
        return torch.cat(found, dim=1).float().cpu().numpy()


# -- in a process of its own -------------------------------------------------------------------------------------------


class _Apart:
    """A process of its own for what may bring it down; the next call finds a fresh one after any call that went wrong."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, seconds: float, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What `work` returns, or a verdict that says in one line how it ended."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        try:
            found = self._pool.submit(_guarded, work, *arguments).result(timeout=seconds)
        except TooLong:
            found = {"verdict": f"stopped after {seconds:.0f} s", "broken": True}
        except BrokenProcessPool:
            found = {"verdict": "its process died", "broken": True}
        if found.pop("broken", False):
            self.close()
        return found

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


def _guarded(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    try:
        return work(*arguments)
    except Exception as error:  # told here: not every error can be sent to another process
        return {"verdict": _told(error), "broken": True}  # an error of CUDA stays with its process
