"""The blocks of README.md and of pages in docs/, each a function of the folder of its page: text made of measured rows alone.

Source     tools/results/*.jsonl, as `kvsink-bench` wrote them, and docs/compare.jsonl; of several rows of the same thing the last
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsink.errors import KvsinkError
from kvsink.tools import readme_table
from kvsink.tools.compare_records import read_records

__all__ = ["BLOCKS", "ROOT", "picture_rows", "rows_of"]

ROOT = readme_table.ROOT
RESULTS = ROOT / "tools" / "results"

Row = dict[str, Any]


def rows_of(pattern: str) -> dict[Path, list[Row]]:
    """Rows by file, of all files of tools/results/ with such a name."""
    files = sorted(RESULTS.glob(f"{pattern}.jsonl"))
    return {p: [json.loads(line) for line in p.read_text(encoding="utf-8").splitlines() if line] for p in files}


def _rows(name: str) -> list[Row]:
    found = rows_of(name)
    if not found:
        raise KvsinkError(f"tools/results/{name}.jsonl is missing; measure it again with kvsink-bench")
    return [row for rows in found.values() for row in rows]


def _last(rows: Iterable[Row], *names: str) -> list[Row]:
    """Of rows that agree in the named fields the last, in the order of the first."""
    return list({tuple(r.get(n) for n in names): r for r in rows}.values())


def _about(rows: Sequence[Row], files: Iterable[Path], folder: Path) -> str:
    """Where rows were measured, and the files that hold them."""
    kinds = dict.fromkeys(
        f"{r['device']}, torch {r['torch']}, transformers {r['transformers']}"
        + "".join(f", {what} {r[name]}" for name, what in (("target", "built for"), ("shared_bytes", "shared memory")) if name in r)
        for r in rows
    )
    links = ", ".join(f"[{p.name}]({os.path.relpath(p, folder)})" for p in files)
    return f"{'; '.join(kinds)} (rows: {links}):\n\n"


def _file(name: str) -> Path:
    return RESULTS / f"{name}.jsonl"


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns after the first one hold figures."""
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return "\n".join((f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines))) + "\n"


def _shape(r: Row) -> str:
    return f"B{r['B']} T{r['T']}"


def _method(r: Row) -> str:
    return f"`{r['method']}` {r['bits']}"


def _sentences(items: Iterable[str]) -> str:
    """Items of a list, wrapped as the pages are."""
    wrap = textwrap.TextWrapper(132, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, items)) + "\n"


def _missing(command: str, name: str) -> str:
    return f"Not measured with the present code: `{command} --out tools/results/{name}_GPU.jsonl` makes the rows of this section.\n"


# -- one layer ---------------------------------------------------------------------------------------------------------------


def _kernel_lines(rows: Sequence[Row]) -> str:
    """One line per shape and method: 16 bit, attention, its share of the byte limit, and with the new row's write."""
    lines = []
    for r in rows:
        if r["p50_ms"] is None:
            lines.append((_shape(r), _method(r), f"{r['sdpa_ms'] * 1e3:.1f}", f"error {r['error']}, not timed", *[""] * 5))
            continue
        both = f"{r['speedup_with_both_writes']:.2f}x" if "speedup_with_both_writes" in r else ""
        lines.append(
            (
                _shape(r),
                _method(r),
                f"{r['sdpa_ms'] * 1e3:.1f}",
                f"{r['p50_ms'] * 1e3:.1f}",
                f"**{r['speedup']:.2f}x**",
                f"{r['of_limit']:.0%} of {r['byte_limit_speedup']:.1f}x",
                f"{r['with_append_ms'] * 1e3:.1f}",
                f"{r['speedup_with_append']:.2f}x",
                both,
            )
        )
    head = (
        "shape",
        "method, bits",
        "fp16, us",
        "ours, us",
        "",
        "of the byte limit",
        "with `append_`, us",
        "against fp16",
        "fp16 with its write",
    )
    return _grid(head, lines)


def _kernels(name: str, folder: Path, only: Callable[[Row], bool] = lambda r: True) -> str:
    rows = [r for r in _last(_rows(name), "method", "bits", "B", "T") if only(r)]
    rows = sorted(rows, key=lambda r: (r["B"], r["T"]))
    return _about(rows, [_file(name)], folder) + _kernel_lines(rows)


def kernels(folder: Path) -> str:
    """One layer of LLaMA-3-8B on the kernels over tiles."""
    return _kernels("kernels_h100", folder)


def codes(folder: Path) -> str:
    """The same layer, codes in rows of bytes."""
    return _kernels("kernels_codes_h100", folder, lambda r: r["kernel"] != "cuda")


def shapes(folder: Path) -> str:
    """Layers of other models: one table per GPU, build and rows kept, speed-ups at each (B, T)."""
    groups: dict[tuple[Any, ...], list[tuple[Path, Row]]] = {}
    for file, rows in rows_of("shapes_*").items():
        for r in _last(rows, "device", "target", "shared_bytes", "model", "method", "bits", "exact", "window", "B", "T"):
            kept = ("of_plain" in r) and (r["exact"], r["window"])
            groups.setdefault((r["device"], r.get("target"), r.get("shared_bytes"), kept), []).append((file, r))
    parts = []
    for (*_, kept), pairs in groups.items():
        rows = [r for _, r in pairs]
        at = sorted({(r["B"], r["T"]) for r in rows})
        methods = list(dict.fromkeys(_method(r) for r in rows))
        held = {(r["model"], _method(r), r["B"], r["T"]): r for r in rows}
        text = _about(rows, dict.fromkeys(f for f, _ in pairs), folder)
        what = f"Time with {kept[0]} rows exact and a window of {kept[1]}, by that without" if kept else "Speed-up"
        text = f"{what}, at {', '.join(f'B{b} T{t}' for b, t in at)}; {text}"
        lines = []
        for model in dict.fromkeys(r["model"] for r in rows):
            mine = [r for r in rows if r["model"] == model]
            served = ", ".join(dict.fromkeys(r["kernel"] for r in mine))
            cells = [_cell(held, model, m, at, "of_plain" if kept else "speedup") for m in methods]
            lines.append((model, f"{mine[0]['Hq']}/{mine[0]['Hkv']}/{mine[0]['D']}", served, *cells))
        parts.append(text + _grid(("model", "heads, channels", "kernel", *methods), lines))
        if not kept:
            lines = [(model, *(_cell(held, model, m, at, "speedup_with_both_writes") for m in methods)) for model, *_ in lines]
            said = "With the new row's write on either side:\n\n"
            parts.append(said + _grid(("model", *methods), lines) + _declined(rows) + _baselines(rows))
    return "\n".join(parts) or _missing("kvsink-bench shapes", "shapes")


def _cell(held: Mapping[tuple[Any, ...], Row], model: str, method: str, at: Sequence[tuple[int, int]], name: str) -> str:
    found = [held.get((model, method, b, t), {}) for b, t in at]
    return ", ".join("–" if (x := r.get(name)) is None else f"{x:.2f}" for r in found) + "x"


def _declined(rows: Sequence[Row]) -> str:
    """Why faster kernels do not serve some rows; and what was wrong."""
    why: dict[str, dict[str, None]] = {}
    for r in rows:
        if r.get("why"):
            why.setdefault(r["why"], {})[f"{r['model']} {_method(r)}"] = None
    lines = [f"- {reason}: {', '.join(names)}" for reason, names in why.items()]
    lines += [f"- {_shape(r)} {r['model']} {_method(r)}: error {r['error']}, not timed" for r in rows if r["p50_ms"] is None]
    return "\nNot by the first kernels:\n" + _sentences(lines) if lines else ""


def _baselines(rows: Sequence[Row]) -> str:
    """Which backend in 16 bit was the fastest."""
    found: dict[str, int] = {}
    for r in _last(rows, "model", "B", "T"):
        found[r["sdpa"]] = found.get(r["sdpa"], 0) + 1
    said = dict.fromkeys(r["flashinfer"] for r in rows if not r["flashinfer"].endswith(" us"))
    more = f"; FlashInfer: {', '.join(said)}" if said else ""
    return f"\nFastest in 16 bit, by number of shapes: {', '.join(f'{n} {c}' for n, c in found.items())}{more}.\n"


# -- whole models ------------------------------------------------------------------------------------------------------------


def generate(folder: Path) -> str:
    """`generate()` as a user calls it."""
    from kvsink.tools.bench_generate import generate_table

    parts = []
    for file, rows in rows_of("generate_*").items():
        rows = _last(rows, "device", "target", "side", "layers", "B", "T")
        rows = sorted(rows, key=lambda r: (r["B"] * r["T"], r["B"]))
        parts.append(f"{rows[0]['layers']} layers; {_about(rows, [file], folder)}{generate_table(rows)}\n")
    return "\n".join(parts) or _missing("kvsink-bench generate", "generate")


def serve(folder: Path) -> str:
    """Requests of mixed lengths through vLLM's engine, every run of them."""
    from kvsink.tools.bench_serve import serve_table

    parts = []
    for file, rows in rows_of("serve_*").items():
        groups: dict[str, list[Row]] = {}
        for r in rows:
            asked = f"{r['requests']} requests of {r['prompt_tokens']:,} tokens in all, which ask for {r['new_tokens']:,} more"
            given = "".join(f", {k} {json.dumps(v)}" for k, v in r.get("engine", {}).items() if k != "dtype")
            where = f"a cache of {r['cache_mib']} MiB, {r['dtype']}, vLLM {r['vllm']}{given}"
            groups.setdefault(f"{asked}; {where}", []).append(r)
        parts += [f"{said}; {_about(group, [file], folder)}{serve_table(group)}\n" for said, group in groups.items()]
    return "\n".join(parts) or _missing("kvsink-bench serve", "serve")


def _beside(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of a row in 16 bit and one of ours in the same run, the last of each side and length."""
    stock: dict[int, Row] = {}
    pairs: dict[tuple[str, int, bool], tuple[Row, Row]] = {}
    for r in rows:
        if r["side"] in ("stock", "static"):
            stock[r["T"]] = r
        else:
            pairs[r["side"], r["T"], r["B"] == 1] = stock[r["T"]], r
    return list(pairs.values())


def _decode_lines(pairs: Sequence[tuple[Row, Row]]) -> str:
    lines = []
    for base, r in sorted(pairs, key=lambda pair: (-pair[1]["B"], -pair[1]["T"], pair[1]["side"])):
        lines.append(
            (
                f"B{base['B']} T{r['T']}" if r["B"] == base["B"] else f"T{r['T']}, largest batch of each side",
                f"`{r['side']}`",
                f"{base['tokens_per_s']:,.1f} (B{base['B']}, {base['step_ms']:.2f} ms)",
                f"{r['tokens_per_s']:,.1f} (B{r['B']}, {r['step_ms']:.2f} ms)",
                f"**{r['tokens_per_s'] / base['tokens_per_s']:.2f}x**",
            )
        )
    return _grid(("shape", "side", "16 bit, tokens/s", "tokens/s", ""), lines)


def decode(folder: Path) -> str:
    """A whole model, compiled."""
    rows = _rows("decode_h100")
    return _about(rows, [_file("decode_h100")], folder) + _decode_lines(_beside(rows))


def decode_codes(folder: Path) -> str:
    """The first four layers, codes in rows of bytes."""
    rows = [r for r in _rows("decode_4_layers_h100") if r.get("append") != "in turn"]
    return _about(rows, [_file("decode_4_layers_h100")], folder) + _decode_lines(_beside(rows))


def prefill(folder: Path) -> str:
    """One long prompt in one piece."""
    rows = _last(_rows("prefill_h100"), "side", "T")
    base = next(r for r in rows if r["side"] == "stock")
    lines = [
        (
            f"T{r['T']}, " + ("16 bit" if r is base else f"`{r['side']}`"),
            f"{r['seconds']:.3f}",
            "" if r is base else f"{r['seconds'] / base['seconds'] - 1:+.1%}",
            f"{r['peak_gib']:.1f}",
            f"{r['sink_prediction_ms']:.2f}" if "sink_prediction_ms" in r else "",
        )
        for r in rows
    ]
    head = ("side", "seconds", "against 16 bit", "peak, GiB", "choice of exact rows, ms")
    return _about(rows, [_file("prefill_h100")], folder) + _grid(head, lines)


def capacity(folder: Path) -> str:
    """The largest batch and the longest sequence."""
    base, most = max(_beside(_rows("decode_h100")), key=lambda pair: pair[1]["B"])
    r = _rows("capacity_h100")[-1]
    spent = list(r["chunk_s"].values())
    items = (
        f"- Batch at T {most['T']}: {most['B']} sequences against {base['B']} in 16 bit, {most['B'] / base['B']:.1f}x.",
        f"- One sequence of {r['T']:,} tokens, `{r['side']}`: {r['chunks_run']} of {r['chunks']} chunks of {r['chunk']:,} tokens "
        f"in {r['prefill_s']:.0f} s, the first {spent[0]:.2f} s, the last whole one {max(spent):.1f} s; {r['peak_gib']:.1f} GiB at "
        f"the peak, {r['cache_gib']:.1f} of them the cache. A token then takes {r['step_ms']:.1f} ms; logits are finite; attention "
        f"differs from attention over the decoded past by {r['attention_error']:.1e}.",
    )
    return _about([r], [_file("decode_h100"), _file("capacity_h100")], folder) + _sentences(items)


def vlm(folder: Path) -> str:
    """LLaVA-1.5-7B's language model."""
    rows = _rows("vlm_h100")
    gains = _last((r for r in rows if r["kind"] == "vlm"), "side", "T")
    best = {(r["side"], r["T"], r["B"]): r for r in rows if r["kind"] == "decode"}
    lines = []
    for g in sorted(gains, key=lambda g: (g["T"], g["side"])):
        mine = [r for (side, t, _), r in best.items() if (side, t) == (g["side"], g["T"])]
        most = max(mine, key=lambda r: r["B"])
        lines.append(
            (
                f"T{g['T']}",
                f"`{g['side']}`",
                f"{g['same_batch']}",
                f"{g['memory_smaller']:.2f}x",
                f"{most['B']}",
                f"{g['batch_larger']:.2f}x",
                f"{most['tokens_per_s']:,.0f}",
                f"**{g['throughput_higher']:.2f}x**",
            )
        )
    head = ("tokens", "side", "batch that fills 16 bit", "memory there", "largest batch", "", "tokens/s at it", "")
    return _about(rows, [_file("vlm_h100")], folder) + _grid(head, lines)


def short_rows(folder: Path) -> str:
    """Many rows of few tokens: divided among warps, or one warp each."""
    rows = [r for r in _rows("short_rows_h100") if "whole_ms" in r and not r["mask"]]
    rows = _last(rows, "side", "E", "B", "T")
    lines = [
        (
            f"{_shape(r)}, {r['E']} exact",
            f"`{r['side']}`",
            f"{r['sdpa_ms']:.2f}",
            f"{r['divided_ms']:.2f}",
            f"{r['whole_ms']:.2f}",
            f"{r['whole_of_limit']:.0%}",
        )
        for r in rows
    ]
    head = ("shape", "side", "fp16, ms", "rows divided", "rows whole", "of the byte limit")
    return _about(rows, [_file("short_rows_h100")], folder) + _grid(head, lines)


def _cpu_runs() -> list[dict[str, Row]]:
    """Runs of the present code with the sides of the last one; a run begins where a side comes again."""
    runs: list[dict[str, Row]] = []
    for r in _rows("cpu"):
        if r.get("note"):
            continue
        if not runs or r["side"] in runs[-1]:
            runs.append({})
        runs[-1][r["side"]] = r
    return [run for run in runs if run.keys() == runs[-1].keys()]


def _coded(runs: list[dict[str, Row]]) -> str:
    """The side that is coded."""
    return next(side for side in runs[0] if side not in ("float32", "bfloat16"))


def cpu(folder: Path) -> str:
    """One token behind a prompt, on a processor."""
    runs = _cpu_runs()
    lines = [(f"`{side}`", *(f"{run[side]['p50_ms']:.1f}" for run in runs)) for side in runs[0]]
    coded = _coded(runs)
    lines.append((f"`{coded}` by float32", *(f"{run[coded]['p50_ms'] / run['float32']['p50_ms']:.2f}" for run in runs)))
    r = runs[0][coded]
    link = f"[rows]({os.path.relpath(_file('cpu'), folder)})"
    about = f"{r['model']} behind {r['T']:,} tokens, {r['threads']} threads, torch {r['torch']}, ms ({link}):"
    return about + "\n\n" + _grid(("side", *(f"run {i + 1}" for i in range(len(runs)))), lines)


# -- README ------------------------------------------------------------------------------------------------------------------


_OURS = "default", "klt-2", "klt-4"  # the default method, at its own bits and at others
_SHOWN = "llama-3-8b", "llama-3-70b", "gpt-oss-20b", "gemma-3-4b"


def speed(folder: Path) -> str:
    """README's lines on speed."""
    page = os.path.relpath(ROOT / "docs" / "performance.md", folder)
    pairs = {(r["side"], r["T"]): (base, r) for base, r in _beside(_rows("decode_h100"))}
    side = "centred:even-2"

    def gain(t: int) -> float:
        base, r = pairs[side, t]
        return r["tokens_per_s"] / base["tokens_per_s"]

    base, most = pairs[side, 4096]
    alone = [
        r["speedup"]
        for r in _last(_rows("kernels_h100"), "method", "bits", "B", "T")
        if r["B"] * r["T"] > 1e5 and f"{r['method']}-{r['bits']}" == side
    ]
    tables: list[str] = []
    items = [
        f"- Speed, {most['device']}, a whole model of LLaMA-3-8B shape with `{side}` against 16 bit compiled with CUDA graphs: "
        f"{gain(4096):.1f}x the tokens per second at the largest batch of 4096 tokens ({most['B']} sequences against {base['B']}), "
        f"{gain(131072):.2f}x for one sequence of 131,072 tokens, {gain(1024):.2f}x for one of 1,024; attention alone "
        f"{min(alone):.1f} to {max(alone):.1f}x at the long shapes ([{page}]({page}))."
    ]
    for rows in rows_of("generate_*").values():
        beside = {(r["B"], r["T"]) for r in rows if r["side"] == "static"}  # "16 bit" is the faster of both, or is not said
        for r in _last((r for r in rows if r["side"] in _OURS and (r["B"], r["T"]) in beside), "side", "B", "T"):
            items.append(
                f"- `generate()` with `{r['side']}`, {r['layers']} layers of that shape, {r['device']}, {r['B']} x {r['T']:,} "
                f"tokens: decoding {r['decode_speedup']:.2f}x the speed of 16 bit, prefill {r['prefill_ratio']:.2f}x its time."
            )
    for rows in rows_of("shapes_*").values():
        last = _last((r for r in rows if "of_plain" not in r and "target" not in r), "model", "method", "bits", "B", "T")
        long = [r for r in last if (r["B"], r["T"]) == (16, 8192) and r["p50_ms"] and r["model"] in _SHOWN]
        lines = []
        for name in (*_OURS, "klt:even-2", "klt:even-4", side):
            found = {r["model"]: f"{r['speedup']:.1f}x" for r in long if f"{r['method']}-{r['bits']}" == name}
            lines += [(f"`{name}`", *(found.get(model, "–") for model in _SHOWN))] if found else []
        if lines:
            about = f"one layer, 16 x 8,192 tokens, {long[0]['device']}: of fp16's speed"
            tables.append(_grid((about, *_SHOWN), lines))
    runs = _cpu_runs()
    coded = _coded(runs)
    ratios = [run[coded]["p50_ms"] / run["float32"]["p50_ms"] for run in runs]
    r = runs[0][coded]
    items.append(
        f"- On a processor ({r['threads']} cores, AVX-512), one token of the demo model behind {r['T']:,} with `{coded}` takes "
        f"{min(ratios):.2f} to {max(ratios):.2f} of the time of float32 with its own cache, by C kernels built at first use."
    )
    return "\n".join((*tables, _sentences(items)))


def quality(folder: Path) -> str:
    """README's table of methods."""
    return readme_table.table(read_records(ROOT / "docs" / "compare.jsonl"))


def picture_rows(name: str) -> dict[str, list[Row]]:
    """Rows of each picture, by the stem of its file in docs/."""
    if name == "kernels":
        return {"performance": _rows("kernels_h100")}
    return {p.stem: [r for r in rows if "target" not in r] for p, rows in rows_of("shapes_*").items()}


BLOCKS: dict[str, Callable[[Path], str]] = {
    "quality": quality,
    "speed": speed,
    "generate": generate,
    "serve": serve,
    "shapes": shapes,
    "kernels": kernels,
    "codes": codes,
    "decode": decode,
    "decode-codes": decode_codes,
    "prefill": prefill,
    "capacity": capacity,
    "vlm": vlm,
    "short-rows": short_rows,
    "cpu": cpu,
}
