"""kvsink-bench: speed and memory of a rewritten model against 16 bit and against the physical limit, on this machine's GPU.

Rows are JSON, one per line, appended to --out; each carries device, versions, shapes and p20, p50, p80 where they apply.
Ratios hold within one run. An op whose result is outside its bound of the definition is not timed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from kvsink.tools.cli import command_line

_METHODS = ("klt-2", "centred:even-2", "klt:even-2")


def _gpu() -> None:
    import torch

    from kvsink.errors import KvsinkError

    if not torch.cuda.is_available():
        raise KvsinkError("no GPU is found; kvsink-bench times GPU kernels. kvsink-eval measures quality on any machine")


def _write(rows: list[dict[str, Any]], out: Path | None) -> None:
    from kvsink.tools.timing import device_facts

    facts = device_facts()
    _append([{**facts, **row} for row in rows], out)


def _append(rows: list[dict[str, Any]], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _say(text: str) -> None:
    print(text, flush=True)


def _pairs(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(b or 0), int(t)) for b, t in (part.split("x") for part in text.split(","))]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not a list of BATCHxLENGTH, such as 1x1024,16x8192") from error


def _batches(text: str, sides: list[str]) -> dict[str, int]:
    """ "stock=120,klt:even-2=824" as a dict; every name is one of the sides."""
    found = {}
    for part in filter(None, text.split(",")):
        side, _, batch = part.partition("=")
        if side not in sides or not batch.isdecimal() or int(batch) < 1:
            raise click.BadParameter(f"{part!r} is not SIDE=BATCH with one of {', '.join(sides)}", param_hint="--batches")
        found[side] = int(batch)
    return found


def _sides(text: str, sixteen: tuple[str, ...] | None = None) -> list[str]:
    from kvsink.tools.bench_model import SIXTEEN, declared

    sides = [s for s in text.split(",") if s]
    for side in sides:
        if side not in (SIXTEEN if sixteen is None else sixteen):
            declared(side)
    return sides


@click.group(name="kvsink-bench", help=__doc__)
def bench() -> None:
    pass


_METHODS_HELP = "METHOD-BITS or METHOD-BITS/BITS of keys and values, comma-separated; default: kvsink.rewrite(model); klt-dense: \
keys coded before RoPE."
_out = click.option("--out", type=click.Path(path_type=Path), default=None, help="Append rows to this JSON-lines file.")


@bench.command(help="Decode attention and append_ of one layer of LLaMA-3-8B, against the fastest 16-bit backend.")
@click.option("--methods", default=",".join((*_METHODS, "centred:even-4")), show_default=True, help=_METHODS_HELP)
@click.option("--shapes", default="1x1024,1x131072,16x8192,64x4096", show_default=True, help="BATCHxLENGTH, comma-separated.")
@_out
def kernels(methods: str, shapes: str, out: Path | None) -> int:
    pairs, chosen = _pairs(shapes), _sides(methods, ())
    from kvsink.tools.bench_model import LLAMA_3_8B

    return _measured({"llama-3-8b": LLAMA_3_8B}, chosen, pairs, out)


@bench.command(
    help="The same for the layers of other models, by name or config.json: which kernels serve, why faster ones do not, and times "
    "against the fastest of PyTorch's backends and FlashInfer, where it is installed."
)
@click.option("--models", default=None, help="Names or paths of config.json, comma-separated.  [default: all nine]")
@click.option("--methods", default="centred:even-2,klt:even-2,default,centred:even-4", show_default=True, help=_METHODS_HELP)
@click.option("--shapes", default="16x8192,1x131072,1x1024", show_default=True, help="BATCHxLENGTH, comma-separated.")
@click.option("--exact", default=0, show_default=True, help="Time every method a second time with so many first rows exact.")
@click.option("--window", default=0, show_default=True, help="And with so many recent rows exact.")
@click.option("--arch", default=None, help="Build the CUDA kernels for this target, such as compute_80, and run that on this GPU.")
@click.option("--shared", default=None, type=click.IntRange(1), help="Bytes of shared memory they may use, such as 101376.")
@_out
def shapes(
    models: str | None, methods: str, shapes: str, exact: int, window: int, arch: str | None, shared: int | None, out: Path | None
) -> int:
    from kvsink.tools.bench_shapes import MODELS, shapes_of

    found, pairs, chosen = shapes_of(",".join(MODELS) if models is None else models), _pairs(shapes), _sides(methods, ())
    if min(exact, window) < 0:
        raise click.BadParameter(f"--exact {exact} and --window {window} are numbers of rows")
    if arch is not None and not re.fullmatch(r"(compute|sm)_\d+[af]?", arch):
        raise click.BadParameter(f"{arch!r} is no target of a CUDA compiler, such as compute_80 or sm_90a", param_hint="--arch")
    for variable, value in (("KVSINK_CUDA_TARGET", arch), ("KVSINK_CUDA_SHARED", shared)):
        if value is not None:  # read where kernels are built: before the first of them
            os.environ[variable] = str(value)
    return _measured(found, chosen, pairs, out, exact, window, False)


def _measured(
    models: dict[str, Any],
    methods: list[str],
    pairs: list[tuple[int, int]],
    out: Path | None,
    exact: int = 0,
    window: int = 0,
    in_turn: bool = True,
) -> int:
    if not methods or min(n for pair in pairs for n in pair) < 1:
        raise click.BadParameter("a method, a batch and a length of at least 1 are needed")
    _gpu()
    from kvsink.tools.bench_ops import Kept, ops_rows, ops_table
    from kvsink.tools.timing import copy_bandwidth, read_bandwidth

    read, copy = read_bandwidth(), copy_bandwidth()
    _say(f"read {read / 1e12:.3f} TB/s, copy {copy / 1e12:.3f} TB/s")
    kept = [Kept(), *([Kept(f"first:{exact}" if exact else Kept.protect, window)] if exact or window else [])]
    rows = []
    for row in ops_rows(models, methods, pairs, max(read, copy), _say, kept, in_turn):
        rows.append({**row, "read_tb_s": round(read / 1e12, 3), "copy_tb_s": round(copy / 1e12, 3)})
        _write(rows[-1:], out)
    _say(ops_table(rows))
    return 0 if all(r["p50_ms"] is not None for r in rows) else 2


@bench.command(help="Tokens per second of a whole LLaMA-3-8B shape with random weights, compiled, under CUDA graphs.")
@click.option(
    "--sides",
    default=f"stock,{','.join(_METHODS)}",
    show_default=True,
    help="stock: 16 bit over grouped heads without a mask, the strongest; stock-combo: with Inductor's combined kernels too, "
    "as kvsink's own steps have; static: 16 bit as transformers compiles it; METHOD-BITS.",
)
@click.option(
    "--shapes", default="1x1024,1x131072,x4096", show_default=True, help="BATCHxLENGTH; without a batch, the largest that fits."
)
@click.option("--batches", default="", help="SIDE=BATCH, comma-separated: taken where a shape has no batch, in place of a search.")
@click.option("--layers", default=32, show_default=True)
@_out
def decode(sides: str, shapes: str, batches: str, layers: int, out: Path | None) -> int:
    pairs, chosen = _pairs(shapes), _sides(sides)
    fixed = _batches(batches, chosen)
    _gpu()
    import torch

    from kvsink.tools.bench_decode import decode_rows
    from kvsink.tools.bench_model import llama
    from kvsink.tools.bench_sdpa import sdpa_best

    backends = {}
    if any(side.startswith("stock") for side in chosen):
        for b, t in pairs:
            backends[(b, t)], times = sdpa_best(b or 64, t, 32, 8, 128, torch.bfloat16)
            _say(f"16-bit attention at B{b or 64} T{t}: {backends[(b, t)]} {times[1] * 1e3:.1f} us")
    model = llama(layers)
    rows = []
    for b, t in pairs:
        for side in chosen:
            pair = b or fixed.get(side, 0), t
            if (b, t) in backends:
                backends[pair] = backends[b, t]
            rows += decode_rows(model, [side], [pair], backends, _say)
            _write(rows[-1:], out)
    return 0


@bench.command(
    help="LLaVA-1.5-7B's language model, random weights, decoding behind prompts with images: memory, batch, throughput "
    "against 16 bit compiled the same way."
)
@click.option("--baseline", default="static", show_default=True, help="static or stock, see decode.")
@click.option("--sides", default="akvq-vl:even-2,centred:even-2,klt:even-2", show_default=True, help="METHOD-BITS,…")
@click.option(
    "--tokens", default="512,2944", show_default=True, help="Lengths, comma-separated; the last 24 tokens are the decoded ones."
)
@click.option("--layers", default=32, show_default=True)
@_out
def vlm(baseline: str, sides: str, tokens: str, layers: int, out: Path | None) -> int:
    if baseline not in ("static", "stock"):
        raise click.BadParameter(f"{baseline!r} is neither static nor stock", param_hint="--baseline")
    lengths = [t for _, t in _pairs(",".join(f"x{t}" for t in tokens.split(",")))]
    chosen = [s for s in _sides(sides) if s not in ("static", "stock")]
    _gpu()
    import torch

    from kvsink.tools.bench_decode import vision_rows
    from kvsink.tools.bench_model import LLAVA_15_7B, llama
    from kvsink.tools.bench_sdpa import sdpa_best

    backends = {}
    if baseline == "stock":
        for t in lengths:
            backends[(0, t)], _ = sdpa_best(64, t, 32, 32, 128, torch.bfloat16)
    model = llama(layers, shape=LLAVA_15_7B)
    for t in lengths:
        _write(vision_rows(model, baseline, chosen, t, backends, _say), out)
    return 0


@bench.command(
    help="generate() as a user calls it, on a LLaMA-3-8B shape with random weights: first call, prefill and decoding apart."
)
@click.option(
    "--sides",
    default="dynamic,static,default,klt:even-2",
    show_default=True,
    help="dynamic, static: transformers' caches in 16 bit, the second compiled; default: kvsink.rewrite(model); METHOD-BITS.",
)
@click.option("--prompts", default="1x1000,1x32000,16x4000", show_default=True, help="BATCHxLENGTH, comma-separated.")
@click.option("--steps", default=128, show_default=True, help="Tokens decoded after the first.")
@click.option("--layers", default=8, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option(
    "--profile",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Append a profile of every row's prefill to this file: operators by time on GPU and CPU, CUDA calls, Python functions.",
)
@_out
def generate(sides: str, prompts: str, steps: int, layers: int, repeats: int, profile: Path | None, out: Path | None) -> int:
    from kvsink.tools.bench_generate import CACHES, generate_rows, generate_table

    pairs, chosen = _pairs(prompts), _sides(sides, CACHES)
    if min(steps, layers, repeats, *(n for pair in pairs for n in pair)) < 1:
        raise click.BadParameter("--steps, --layers, --repeats, batches and lengths must be at least 1")
    _gpu()
    from kvsink.tools.bench_model import llama

    rows = []
    for row in generate_rows(llama(layers), chosen, pairs, steps, repeats, _say, profile):
        rows.append(row)
        _write([row], out)
    _say(generate_table(rows))
    return 0 if all("decode_ms" in row for row in rows) else 2


@bench.command(help="Seconds of one long prompt in one piece, against 16 bit.")
@click.option("--sides", default=f"stock,{','.join(_METHODS)}", show_default=True)
@click.option("--tokens", default=32768, show_default=True)
@click.option("--layers", default=32, show_default=True)
@_out
def prefill(sides: str, tokens: int, layers: int, out: Path | None) -> int:
    _gpu()
    from kvsink.tools.bench_model import llama
    from kvsink.tools.bench_prefill import prefill_rows

    _write(prefill_rows(llama(layers), _sides(sides), tokens, _say), out)
    return 0


@bench.command(help="The longest sequence: prefilled in chunks, then decoded. The largest batch is a row of `decode`.")
@click.option("--side", default="centred:even-2", show_default=True)
@click.option("--tokens", default=1_000_000, show_default=True)
@click.option("--chunk", default=8192, show_default=True, help="Tokens of a chunk.")
@click.option(
    "--whole/--sampled", default=True, show_default=True, help="Run every chunk, or nine of them spread over the sequence."
)
@click.option("--steps", default=16, show_default=True, help="Tokens decoded at the end, each timed.")
@click.option(
    "--pieces",
    default="flash",
    show_default=True,
    type=click.Choice(["flash", "cudnn"]),
    help="SDPA backend over decoded pieces of the past; cudnn is compared with flash first.",
)
@click.option(
    "--progress",
    type=click.Path(path_type=Path),
    default=None,
    help="Write a line of JSON to this file after every chunk and step, for a run in the background.",
)
@click.option("--layers", default=32, show_default=True)
@_out
def capacity(side: str, layers: int, out: Path | None, **options: Any) -> int:
    if min(options["tokens"], options["chunk"], options["steps"]) < 1:
        raise click.BadParameter("--tokens, --chunk and --steps must be at least 1")
    _gpu()
    from kvsink.tools.bench_model import llama
    from kvsink.tools.bench_sequence import sequence_row

    row = sequence_row(llama(layers), _sides(side)[0], say=_say, **options)
    _write([row], out)
    return 0 if row["verdict"] == "ok" else 2


@bench.command(help="Decoding on this machine's processor behind a long prompt, beside float32 and bfloat16 on a DynamicCache.")
@click.option("--model", "name", default="demo:smollm2", show_default=True, help="Folder, hub id or demo:smollm2.")
@click.option("--method", default="klt", show_default=True)
@click.option("--key-bits", type=float, default=None)
@click.option("--value-bits", type=float, default=None)
@click.option("--tokens", default=4096, show_default=True, help="Length of the prompt.")
@click.option("--steps", default=34, show_default=True)
@click.option("--compiled/--eager", default=False, show_default=True, help="Time the compiled step too; needs a C++ compiler.")
@_out
def cpu(
    name: str,
    method: str,
    key_bits: float | None,
    value_bits: float | None,
    tokens: int,
    steps: int,
    compiled: bool,
    out: Path | None,
) -> int:
    from kvsink.tools.bench_cpu import cpu_rows

    if tokens < 1 or steps < 3:
        raise click.BadParameter(f"{tokens} tokens and {steps} steps; at least 1 and 3 are needed")
    rows = cpu_rows(name, method, key_bits, value_bits, tokens, steps, compiled, _say)
    _append(rows, out)
    return 0


@bench.command(
    name="onnx",
    help="Exported graphs under onnxruntime, on a GPU or on this processor: logits against the CPU and torch and nodes that fell "
    "to the CPU; then the time of a decode step behind a long prompt, all graphs in turn.",
)
@click.option("--model", "name", default="llama", show_default=True, help="llama: random weights; or a folder, or demo:smollm2.")
@click.option("--layers", default=4, show_default=True, help="Layers of the LLaMA-3-8B shape with random weights.")
@click.option("--hidden", default=4096, show_default=True, help="Its width; heads have 128 channels, 4 queries share one.")
@click.option("--provider", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]))
@click.option("--dtype", default=None, type=click.Choice(["float16", "float32"]), help="[default: float16 on cuda, else float32]")
@click.option(
    "--cases",
    default="functions:16,gqa:16,gqa:4,functions:klt:2,gqa:8",
    show_default=True,
    help="FLAVOUR:BITS or FLAVOUR:METHOD:BITS; 16 bits: not coded. Flavour custom builds its library.",
)
@click.option("--tokens", default=4096, show_default=True, help="Length of the prompt.")
@click.option("--steps", default=40, show_default=True)
@click.option("--threads", default=0, show_default=True, help="Of onnxruntime; 0 lets it choose.")
@click.option("--chunk", default=512, show_default=True, type=click.IntRange(1), help="Tokens of the prompt that a call takes.")
@click.option("--seconds", default=340, show_default=True, help="After three quarters of them nothing more is exported.")
@_out
def onnx_(out: Path | None, **options: Any) -> int:
    from kvsink.tools.bench_onnx import onnx_rows, parse_cases, table

    if options["tokens"] < 1 or options["steps"] < 3:
        raise click.BadParameter(f"{options['tokens']} tokens and {options['steps']} steps; at least 1 and 3 are needed")
    options["cases"] = parse_cases(options["cases"])
    rows = []
    for row in onnx_rows(**options, say=_say):
        rows.append(row)
        _append([row], out)
    _say(table(rows))
    return 0 if all(row["verdict"] == "ok" for row in rows) else 2


@bench.command(
    help="Requests of mixed lengths through vLLM's engine, of a 16-bit folder and of rewritten ones, under the same settings: "
    "tokens per second, time to first token and per token, sequences at once, preemptions. Needs vLLM: docs/serving.md."
)
@click.argument("folders", nargs=-1, required=True, metavar="MODEL OUT_DIR...")
@click.option("--requests", default=64, show_default=True, help="They all come at once.")
@click.option("--prompts", default="64-512", show_default=True, help="Tokens of a prompt, LEAST-MOST.")
@click.option("--answers", default="16-128", show_default=True, help="Tokens of an answer, LEAST-MOST.")
@click.option("--cache", default=1024, show_default=True, help="MiB of the cache.")
@click.option("--engine", default="{}", show_default=True, help="Further arguments of vLLM's engine, as JSON.")
@click.option("--seed", default=0, show_default=True, help="Of the lengths.")
@_out
def serve(
    folders: tuple[str, ...], requests: int, prompts: str, answers: str, cache: int, engine: str, seed: int, out: Path | None
) -> int:
    from kvsink.tools.bench_serve import lengths_of, serve_rows, serve_table

    asked, told = _bounds(prompts, 1, "--prompts"), _bounds(answers, 2, "--answers")
    if requests < 2 or cache < 1:
        raise click.BadParameter(f"{requests} requests and {cache} MiB; at least 2 and 1 are needed")
    try:
        options = dict(json.loads(engine))
    except (ValueError, TypeError) as error:
        raise click.BadParameter(f'{engine!r} is not JSON such as {{"max_num_seqs": 64}}', param_hint="--engine") from error
    rows = []
    for row in serve_rows(folders, lengths_of(requests, asked, told, seed), cache, options, _say):
        rows.append(row)
        _append([row], out)
    _say(serve_table(rows))
    return 0


def _bounds(text: str, least: int, option: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    low, high = map(int, found.groups()) if found else (0, 0)
    if not least <= low <= high:
        raise click.BadParameter(f"{text!r} is not LEAST-MOST of at least {least}, such as 64-512", param_hint=option)
    return low, high


@bench.command(help="Draw the rows of `kernels`, or those of `shapes` by model, from a JSON-lines file; needs no GPU.")
@click.argument("rows", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("image", type=click.Path(path_type=Path, dir_okay=False))
def plot(rows: Path, image: Path) -> int:
    from kvsink.tools.bench_plot import plot_kernels, plot_shapes, read_rows

    found = read_rows(rows)
    (plot_shapes if len({r.get("model") for r in found}) > 1 else plot_kernels)(found, image)
    return 0


main = command_line(bench)

if __name__ == "__main__":
    sys.exit(main())
