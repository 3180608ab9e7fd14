"""Measure the rows of README's table and write them between its markers: `python -m kvsink.tools.readme_table`.

Every row is SmolLM2-135M-Instruct in float32 on WikiText-2 test (detokenized), 8 windows of 1024 tokens fed in chunks of 64
through the packed cache, calibrated on 16384 tokens of the built-in text. Finished rows are kept in tools/results/readme.json
and not measured again; remove the file to start over.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvsink
from kvsink.calibration import Calibration, calibrate
from kvsink.demo import resolve_model_dir
from kvsink.evaluation import evaluate, packed_cache, token_windows
from kvsink.loading import load_model, load_tokenizer
from kvsink.protect import parse_policies
from kvsink.rewrite import calibration_windows
from kvsink.texts import evaluation_text

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
OURS = "kvsink:5+first:1"


@dataclass(frozen=True)
class Row:
    """One configuration; strict also reads the newest rows back from their codes."""

    method: str
    key_bits: float
    value_bits: float
    protect: str
    strict: bool = False


ROWS = tuple(
    Row(method, k, v, protect, strict)
    for strict in (False, True)
    for method, k, v, protect in (
        ("klt", 3, 4, OURS),
        ("klt", 2, 4, OURS),
        ("klt", 2, 2, OURS),
        ("rotatekv", 4, 4, "massive:20"),
        ("rotatekv", 2, 2, "massive:20"),
    )
) + tuple(
    Row(method, 2, v, protect, True)
    for method, v in (("rotatekv", 2), ("klt", 4))
    for protect in ("none", "first:5", "kvsink:5")
)


def measure(windows: int = 8, tokens: int = 1024) -> list[dict[str, Any]]:
    """All rows, measured or as kept from an earlier run."""
    store = ROOT / "tools" / "results" / "readme.json"
    done = {json.dumps(r["row"]): r for r in json.loads(store.read_text())} if store.is_file() else {}
    folder = resolve_model_dir("demo:smollm2")
    tokenizer = load_tokenizer(folder)
    ids = token_windows(evaluation_text(), tokenizer, windows, tokens)
    baseline = load_model(folder, "cpu")
    record: Calibration | None = None
    for row in ROWS:
        key = json.dumps(asdict(row))
        if key in done:
            continue
        if record is None:
            text = calibration_windows(baseline, "builtin", 16384, tokenizer)
            record = calibrate(baseline, text, [parse_policies(OURS)] * 30, dict.fromkeys(range(30), (1, 64)))
        model = load_model(folder, "cpu")
        kvsink.rewrite(
            model, row.method, key_bits=row.key_bits, value_bits=row.value_bits, protect=row.protect, calibration=record
        )
        result = evaluate(
            model, baseline, ids, cache_factory=partial(packed_cache, strict=row.strict), batch=windows,
            model_name="demo:smollm2", method=row.method, text_name="WikiText-2 test, detokenized",
        )  # fmt: skip
        done[key] = {"row": asdict(row), **result.to_json()}
        store.parent.mkdir(exist_ok=True)
        store.write_text(json.dumps(list(done.values()), indent=1) + "\n")
        print(row, f"{result.perplexity:.3f}", f"{result.bits_per_element:.2f}", flush=True)
    return [done[json.dumps(asdict(row))] for row in ROWS]


def markdown(results: list[dict[str, Any]]) -> str:
    """The table: one line per method and protection, chunked and strict figures side by side."""
    base = results[0]["baseline_perplexity"]
    lines = [
        "| method | keys/values, bits | kept exact | counted bits | perplexity | KL | same top token | strict perplexity |",
        "|---|---|---|---|---|---|---|---|",
        f"| 16 bit | 16/16 | all | 16 | {base:.2f} | 0 | 100 % | {base:.2f} |",
    ]
    by = {json.dumps(r["row"]): r for r in results}
    seen = set()
    for r in results:
        row = Row(**r["row"])
        name = (row.method, row.key_bits, row.value_bits, row.protect)
        if name in seen:
            continue
        seen.add(name)
        loose = by.get(json.dumps(asdict(Row(*name, strict=False))))
        strict = by.get(json.dumps(asdict(Row(*name, strict=True))))

        def change(x: dict[str, Any] | None) -> str:
            return f"{x['perplexity']:.2f} (+{100 * (x['perplexity'] / base - 1):.1f} %)" if x else "-"

        kl, top = (f"{loose['kl']:.4f}", f"{100 * loose['top1']:.1f} %") if loose else ("-", "-")
        lines.append(
            f"| `{row.method}` | {row.key_bits:g}/{row.value_bits:g} | {row.protect} | {r['bits_per_element']:.2f} | "
            f"{change(loose)} | {kl} | {top} | {change(strict)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and rewrite the block in README.md."""
    torch.set_grad_enabled(False)
    table = markdown(measure())
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
