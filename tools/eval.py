"""kvsink-eval: quality of a model through its real cache, beside the 16-bit model; defined in `kvsink.evaluate.evaluation`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from kvsink.tools.cli import command_line, wide_console

Progress = Callable[[int, int], None]


@click.command("kvsink-eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--baseline", metavar="DIR", help="The 16-bit model. For a rewritten folder the default is its own weights with a stock cache."
)
@click.option(
    "--text", "text_path", metavar="FILE", help="Text to evaluate on. Default: the WikiText-2 test split that ships with kvsink."
)
@click.option("--windows", default=8, show_default=True, type=click.IntRange(1), help="Windows, spread evenly over the text.")
@click.option("--window-tokens", default=1024, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@click.option("--chunk", default=64, show_default=True, type=click.IntRange(1), help="Tokens fed at a time.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Windows run as rows of one batch.")
@click.option("--passkey/--no-passkey", default=True, show_default=True, help="Also measure passkey retrieval.")
@click.option("--sinks/--no-sinks", default=True, show_default=True, help="Also measure whether the sinks survive the cache.")
@click.option("--strict", is_flag=True, help="Read the newest chunk from its codes too, not only the stored rows.")
@click.option("--detokenize/--no-detokenize", default=None, help="Undo WikiText's tokenizer. Default: when the text needs it.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16 or bfloat16. auto is float32 on a CPU.")
@click.option(
    "--images",
    "pictures",
    metavar="SOURCE",
    help="Pictures with text instead of text: drawn[:N], drawn-captions[:N], a folder of images and texts, or JSON lines.",
)
@click.option("--attention", "attention_path", metavar="FILE", help="With --images: draw the share of attention by modality.")
@click.option("--compare", "comparing", is_flag=True, help="Measure a set of methods side by side, on one MODEL or several.")
@click.option("--set", "row_set", metavar="NAME", help="With --compare: published (the default), default, stock, shift, quick ...")
@click.option("--rows", "rows_path", metavar="FILE", help="With --compare: a JSON list of rows, instead of a set.")
@click.option("--out", "out_dir", metavar="DIR", help="With --compare: where records, tables and plots go. [default: docs]")
@click.option("--calibration-tokens", type=click.IntRange(1), metavar="N", help="With --compare. [default: 16384]")
@click.option("--json", "json_path", metavar="FILE", help="Write the row as JSON; - is standard output.")
def command(
    models: tuple[str, ...],
    baseline: str | None,
    text_path: str | None,
    windows: int,
    window_tokens: int,
    chunk: int,
    batch: int,
    passkey: bool,
    sinks: bool,
    strict: bool,
    detokenize: bool | None,
    device: str,
    dtype: str,
    pictures: str | None,
    attention_path: str | None,
    comparing: bool,
    row_set: str | None,
    rows_path: str | None,
    out_dir: str | None,
    calibration_tokens: int | None,
    json_path: str | None,
) -> None:
    """Perplexity, KL and top-1 agreement with the 16-bit model, passkey retrieval and counted bits of MODEL.

    MODEL is a folder made by kvsink-rewrite, any model folder, a hub id, or demo:smollm2. Of an exported OUT_DIR/model.onnx,
    perplexity and counted bits, through its runner. With --compare MODEL may be NAME=FOLDER, and stand several times.
    """
    extra = {"--set": row_set, "--rows": rows_path, "--out": out_dir, "--calibration-tokens": calibration_tokens}
    if comparing:
        own = {"--text": text_path, "--windows": windows, "--window-tokens": window_tokens, "--chunk": chunk, "--device": device}
        _compare(models, {**extra, **own, "--dtype": "float32" if dtype == "auto" else dtype})
        return
    if given := [name for name, value in extra.items() if value is not None]:
        raise click.UsageError(f"{given[0]} goes with --compare.")
    if len(models) > 1:
        raise click.UsageError(f"{len(models)} models go with --compare; give one.")
    model = models[0]

    if pictures is not None:
        _pictures(model, pictures, device, dtype, strict, json_path, attention_path, min(chunk, 16))
        return
    if attention_path is not None:
        raise click.UsageError("--attention goes with --images.")

    if model.endswith(".onnx"):
        if given := [name for name, value in {"--baseline": baseline, "--strict": strict}.items() if value]:
            raise click.UsageError(f"{given[0]} is not for an ONNX model.")
        _onnx(model, _text(text_path, detokenize), windows, window_tokens, chunk, batch, device, json_path)
        return

    import kvsink  # noqa: F401  registers the quantizer, so that a rewritten folder loads as one
    from kvsink.evaluate import evaluation
    from kvsink.evaluate.retrieval import passkey_retrieval
    from kvsink.folder.demo import resolve_model_dir
    from kvsink.folder.loading import load_model, load_tokenizer

    folder = resolve_model_dir(model)
    baseline_folder = None if baseline is None else resolve_model_dir(baseline)
    text, text_name = _text(text_path, detokenize)
    tokenizer = load_tokenizer(folder)
    ids = evaluation.token_windows(text, tokenizer, windows, window_tokens)
    net = load_model(folder, device, dtype)
    packed = evaluation.is_rewritten(net)
    if baseline_folder is not None:
        reference = load_model(baseline_folder, device, dtype)
    else:
        reference = net if packed else None
    factory = partial(evaluation.packed_cache, strict=strict) if packed else evaluation.dynamic_cache
    with _bars() as bar:
        result = evaluation.evaluate(
            net,
            reference,
            ids,
            chunk=chunk,
            cache_factory=factory,
            batch=batch,
            model_name=model,
            method=evaluation.method_name(net) + (", strict" if strict and packed else ""),
            text_name=text_name,
            progress=bar("perplexity"),
        )
        if passkey:
            lengths = [n for n in (256, 512, 1024) if n <= window_tokens] or [256]
            retrieve = partial(passkey_retrieval, tokenizer=tokenizer, lengths=lengths, chunk=chunk)
            result = replace(result, passkey=retrieve(net, cache_factory=factory, progress=bar("passkey")))
            if reference is not None:
                found = retrieve(reference, cache_factory=evaluation.dynamic_cache, progress=bar("passkey, reference"))
                result = replace(result, baseline_passkey=found)
        health = ""
        if sinks and packed:
            health, decay = _sinks(net, reference, ids[:1, :512], chunk, strict)
            result = replace(result, sink_decay=decay)
    _show(result, json_path, health)


def _pictures(
    model: str, source: str, device: str, dtype: str, strict: bool, json_path: str | None, plot: str | None, chunk: int
) -> None:
    """Answers and perplexity on pictures with text, beside the 16-bit model, bits by modality, and the plot of attention."""
    import kvsink  # noqa: F401  registers the quantizer
    from kvsink.evaluate import evaluation
    from kvsink.evaluate.imagetext import load_processor, prompts, read_examples
    from kvsink.evaluate.vision import attention_shares, evaluate_pictures, remember
    from kvsink.folder.demo import resolve_model_dir
    from kvsink.folder.loading import load_model

    examples = read_examples(source, held_back=True)
    folder = resolve_model_dir(model)
    processor, net = load_processor(folder), load_model(folder, device, dtype)
    seen = prompts(examples, processor, net)
    console = wide_console(sys.stderr if json_path == "-" else sys.stdout)
    options: dict[str, Any] = {"chunk": chunk, "model_name": model, "data": source}
    with _bars() as bar:
        stock = evaluate_pictures(
            net, seen, cache_factory=evaluation.dynamic_cache, method="16 bit", progress=bar("16 bit"), **options
        )
        rows = [stock]
        if evaluation.is_rewritten(net):
            factory = partial(evaluation.packed_cache, strict=strict)
            found = remember(net, seen, chunk)
            rows.append(evaluate_pictures(net, seen, cache_factory=factory, reference=found, progress=bar("packed"), **options))
        if plot is not None:
            from kvsink.tools.vision_plot import plot_shares

            total = sum(len(p.visual) for p in seen)
            visual = sum(int(p.visual.sum()) for p in seen) / total
            counted = {"visual": visual, "first": len(seen) / total, "text": 1 - visual - len(seen) / total}
            plot_shares(attention_shares(net, seen[:16]), counted, Path(plot), f"Attention in {Path(model).name}, {source}")
    for row in rows:
        console.print(row.line(), highlight=False, markup=False)
    if json_path is not None:
        record = json.dumps([row.to_json() for row in rows], indent=2)
        if json_path == "-":
            print(record)
        else:
            Path(json_path).write_text(record + "\n")


def _show(result: Any, json_path: str | None, health: str = "") -> None:
    """The row as a table with the health of its sinks, and as JSON where it was asked for."""
    console = wide_console(sys.stderr if json_path == "-" else sys.stdout)
    console.print(result.table())
    if health:
        console.print(health, highlight=False, markup=False)
    if json_path is not None:
        record = json.dumps(result.to_json(), indent=2)
        if json_path == "-":
            print(record)
        else:
            Path(json_path).write_text(record + "\n")


def _sinks(net: Any, reference: Any, ids: Any, chunk: int, strict: bool) -> tuple[str, tuple[float | None, ...] | None]:
    """The health line of the sinks and D_sink by layer; a model that cannot be looked at gets a line that says why."""
    from kvsink.errors import UnsupportedError
    from kvsink.profiling.health import sink_health

    try:
        health = sink_health(net, reference, ids, chunk, strict)
    except UnsupportedError as error:
        return str(error), None
    return health.line(), health.d_sink


def _onnx(
    model: str, text: tuple[str, str], windows: int, window_tokens: int, chunk: int, batch: int, device: str, json_path: str | None
) -> None:
    """Perplexity of an exported model; its tokenizer is beside it."""
    from kvsink.errors import UnsupportedError
    from kvsink.evaluate import evaluation
    from kvsink.export import OnnxGenerator
    from kvsink.export.evaluation import evaluate_onnx
    from kvsink.folder.loading import load_tokenizer

    if device not in ("auto", "cpu", "cuda"):
        raise UnsupportedError(f"device {device!r} is not one of auto, cpu, cuda for an ONNX model")
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider") if device == "cuda" else ("CPUExecutionProvider",)
    runner = OnnxGenerator(model, providers=providers)
    ids = evaluation.token_windows(text[0], load_tokenizer(Path(model).parent), windows, window_tokens)
    with _bars() as bar:
        result = evaluate_onnx(runner, ids, chunk, batch, text[1], bar("perplexity"))
    _show(result, json_path)


def _compare(models: Sequence[str], options: dict[str, object]) -> None:
    """Hand over to `python -m kvsink.tools.compare`, which the tables name as the command that made them."""
    from kvsink.tools.compare import main as compare_main

    source = click.get_current_context().get_parameter_source("windows")
    if source is not None and source.name == "DEFAULT":
        options.pop("--windows")  # the comparison has a default of its own
    argv = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    if code := compare_main([part for model in models for part in ("--model", model)] + argv):
        raise SystemExit(code)


def _text(path: str | None, detokenize: bool | None) -> tuple[str, str]:
    """The text and the name a row gives it."""
    from kvsink.evaluate.texts import detokenize_wikitext, evaluation_text, looks_like_wikitext, read_text

    if path is None:
        return evaluation_text(), "WikiText-2 test, detokenized"
    text = read_text(path)
    if detokenize if detokenize is not None else looks_like_wikitext(text):
        return detokenize_wikitext(text), f"{Path(path).name}, detokenized"
    return text, Path(path).name


@contextmanager
def _bars() -> Iterator[Callable[[str], Progress]]:
    """Progress bars on stderr; call the result with a title to get the function that moves that bar."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(file=sys.stderr), transient=True) as bars:

        def bar(title: str) -> Progress:
            task = bars.add_task(title, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
