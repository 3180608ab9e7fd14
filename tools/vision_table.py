"""The quality table of docs/vision.md: answers about pictures and perplexity of captions, method by method, through the real cache.

    python -m kvsink.tools.vision_table MODEL_DIR [--documents 12] [--pictures 4] [--json rows.jsonl]

MODEL_DIR is a folder of `kvsink.tools.train_vision`. A document is several held-back drawn pictures, each with its questions (or
its caption); it is fed picture by picture and its text in chunks of 16, so that every answer reads stored rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from kvsink.tools.cli import command_line

__all__ = ["ROWS", "chance", "markdown", "measure_row"]

UNION = "pivots:15+kvsink:5+first:1"
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("rtn", "rtn", {"key_bits": 2, "value_bits": 2}),
    ("kivi, R 32", "kivi@32", {}),
    ("kivi, R 128", "kivi", {}),
    ("rotatekv", "rotatekv", {}),
    ("akvq-vl, R 32", "akvq-vl", {"window": 32}),
    ("akvq-vl, R 128", "akvq-vl", {}),
    ("akvq-vl, R 32, sinks", "akvq-vl", {"window": 32, "protect": UNION}),
    ("akvq-vl:even", "akvq-vl:even", {}),
    ("akvq-vl:even, sinks", "akvq-vl:even", {"protect": UNION}),
    ("klt", "klt", {}),
    ("klt by modality", "klt", {"modality": "akvq-vl"}),
    ("klt:codebooks", "klt:codebooks", {}),
    ("klt:codebooks by modality", "klt:codebooks", {"modality": "akvq-vl"}),
    ("klt:best 2/4", "klt:best", {"value_bits": 4}),
    ("klt:best 2/4 by modality", "klt:best", {"value_bits": 4, "modality": "akvq-vl"}),
    ("klt:best 2/4 by modality, R 32, sinks", "klt:best", {"value_bits": 4, "modality": "akvq-vl", "window": 32, "protect": UNION}),
    ("centred", "centred", {"value_bits": 2}),
    ("centred by modality", "centred", {"value_bits": 2, "modality": "akvq-vl"}),
)
"""Name, method ("kivi@32": with 32 recent rows instead of 128) and options of `kvsink.rewrite`."""


def _method(name: str) -> Any:
    from kvsink.methods import get_method

    stem, _, recent = name.partition("@")
    m = get_method(stem)
    if not recent:
        return m
    n = int(recent)
    return replace(m, name=f"{stem}-r{n}", key=replace(m.key, flush=n), value=replace(m.value, newest=n))


def chance(documents: int, pictures: int) -> float:
    """Share of right answers of a guesser who knows the possible answers of each question."""
    from kvsink.evaluate.pictures import drawn

    asked = [q for p in drawn(documents * pictures) for q in p.questions]
    return sum(1 / len(options) for _, _, options in asked) / len(asked)


def measure_row(
    model: Any, name: str, method: str, options: dict[str, Any], calibration: Any, sets: dict[str, Any]
) -> dict[str, Any]:
    """Rewrite, measure every set of prompts, and give one flat record. sets: name → (prompts, reference)."""
    import kvsink
    from kvsink.evaluate import evaluation
    from kvsink.evaluate.vision import evaluate_pictures

    report = kvsink.rewrite(model, _method(method), calibration=calibration, fold=False, **options)
    factory = partial(evaluation.packed_cache, strict=False)
    record: dict[str, Any] = {"name": name, "method": report.method, "options": options, "notes": report.notes}
    record["bits_at_4096"] = round(report.bits, 4)
    for what, (seen, reference) in sets.items():
        result = evaluate_pictures(model, seen, cache_factory=factory, reference=reference, method=name, data=what)
        record[what] = result.to_json()
    return record


def markdown(stock: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| method | bits counted | of picture rows | of text rows | answers right | KL of answers | perplexity of captions |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| 16 bit | 16.00 | 16.00 | 16.00 | {stock['questions']['accuracy']:.1%} | | {stock['captions']['perplexity']:.3f} |",
    ]
    for r in records:
        q, c = r["questions"], r["captions"]
        lines.append(
            f"| {r['name']} | {q['bits_per_element']:.2f} | {q['visual_bits']:.2f} | {q['text_bits']:.2f} | {q['accuracy']:.1%} | "
            f"{q['kl']:.4f} | {c['perplexity']:.3f} |"
        )
    return "\n".join(lines)


@click.command("vision_table", context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.argument("model_dir")
@click.option("--documents", default=12, show_default=True)
@click.option("--pictures", default=4, show_default=True)
@click.option("--calibration-documents", default=20, show_default=True)
@click.option("--only", default="", help="Names of rows, separated by ;")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=None)
def command(model_dir: str, documents: int, pictures: int, calibration_documents: int, only: str, json_path: Path | None) -> None:
    from kvsink.evaluate.evaluation import dynamic_cache
    from kvsink.evaluate.imagetext import drawn_examples, load_processor, prompts
    from kvsink.evaluate.vision import evaluate_pictures, remember
    from kvsink.folder.loading import load_model

    model, processor = load_model(model_dir, "cpu"), load_processor(model_dir)
    n = calibration_documents
    examples = [*drawn_examples(n // 2, 900_000, False, pictures), *drawn_examples(n - n // 2, 900_001, True, pictures)]
    calibration = [p.inputs for p in prompts(examples, processor, model)]
    sets: dict[str, Any] = {}
    stock: dict[str, Any] = {"name": "16 bit", "chance": chance(documents, pictures)}
    for what in ("questions", "captions"):
        count = documents if what == "questions" else max(1, documents // 2)
        seen = prompts(drawn_examples(count, captions=what == "captions", pictures=pictures), processor, model)
        sets[what] = (seen, remember(model, seen))
        stock[what] = evaluate_pictures(model, seen, cache_factory=dynamic_cache, method="16 bit", data=what).to_json()
    say: Callable[[str], None] = partial(print, flush=True)
    _keep(json_path, stock)
    say(f"chance {stock['chance']:.1%}; 16 bit {stock['questions']['accuracy']:.1%} of {stock['questions']['answers']} answers")
    records = []
    for name, method, options in ROWS:
        if only and name not in only.split(";"):
            continue
        records.append(measure_row(model, name, method, options, calibration, sets))
        _keep(json_path, records[-1])
        say(markdown(stock, records[-1:]).splitlines()[-1])
    say("\n" + markdown(stock, records))


def _keep(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
