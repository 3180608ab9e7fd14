"""kvsink-eval: quality of a model through its real cache, beside the 16-bit model; defined in `kvsink.evaluate.evaluation`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from kvsink.tools.cli import command_line, wide_console

Progress = Callable[[int, int], None]


def _numbers(kind: Callable[[str], Any], low: float, high: float) -> Callable[..., Any]:
    """What reads a list with commas of numbers from `low` to `high`."""

    def read(context: click.Context, option: click.Parameter, words: str | None) -> tuple[Any, ...] | None:
        try:
            found = None if words is None else tuple(kind(part) for part in words.split(","))
        except ValueError:
            found = ()
        if found is not None and not (found and all(low <= n <= high for n in found)):
            raise click.BadParameter(f"{words!r} is not a list with commas of numbers from {low:g} to {high:g}")
        return found

    return read


@click.command("kvsink-eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--baseline", metavar="DIR", help="The 16-bit model. For a rewritten folder the default is its own weights with a stock cache."
)
@click.option(
    "--text", "text_path", metavar="FILE", help="Text to evaluate on. Default: the WikiText-2 test split that ships with kvsink."
)
@click.option("--windows", default=8, show_default=True, type=click.IntRange(1), help="Windows, spread evenly over the text.")
@click.option("--window-tokens", default=1024, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@click.option(
    "--length",
    type=click.IntRange(2),
    metavar="N",
    help="Windows of N tokens, told apart by position; several MODELs may be given.",
)
@click.option("--plot", "plot_path", metavar="FILE", help="With --length: draw KL against position, one line per MODEL.")
@click.option("--chunk", default=64, show_default=True, type=click.IntRange(1), help="Tokens fed at a time.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Windows run as rows of one batch.")
@click.option(
    "--retrieval",
    metavar="TASKS",
    help="RULER's single, multikey, multivalue, multiquery, variables, words, and call (a function call whose arguments stand far"
    " back), with commas; all or none. [default: single; none with --length]",
)
@click.option("--no-passkey", is_flag=True, hidden=True, help="Older name of --retrieval none.")
@click.option(
    "--lengths",
    callback=_numbers(int, 1, 1e9),
    metavar="N,N",
    help="Tokens of retrieval's prompts. Default: the window and parts of it.",
)
@click.option(
    "--depths", default="0.1,0.3,0.5,0.7,0.9", show_default=True, callback=_numbers(float, 0, 1), help="Where needles stand."
)
@click.option(
    "--samples", default=1, show_default=True, type=click.IntRange(1), help="Prompts of retrieval per task, length and depth."
)
@click.option(
    "--arithmetic",
    "problems",
    type=click.IntRange(1),
    metavar="N",
    help="Also answer N word problems by generate(), beside 16 bit.",
)
@click.option(
    "--budget", default=400, show_default=True, type=click.IntRange(1), help="With --arithmetic: the most new tokens of an answer."
)
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0), help="With --arithmetic: 0 is greedy.")
@click.option(
    "--tasks", metavar="NAMES", help="Also run tasks of lm-eval that generate, such as gsm8k, beside 16 bit: names or YAML files."
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="With --tasks: the first N documents of each.")
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
    length: int | None,
    plot_path: str | None,
    chunk: int,
    batch: int,
    retrieval: str | None,
    no_passkey: bool,
    lengths: tuple[int, ...] | None,
    depths: tuple[float, ...],
    samples: int,
    problems: int | None,
    budget: int,
    tasks: str | None,
    limit: int | None,
    temperature: float,
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
    """Perplexity, KL and top-1 agreement with the 16-bit model, retrieval and counted bits of MODEL.

    MODEL is a folder made by kvsink-rewrite, any model folder, a hub id, or demo:smollm2. Of an exported OUT_DIR/model.onnx,
    perplexity and counted bits, through its runner. With --length the same by position, to compare several MODELs. With --compare
    MODEL may be NAME=FOLDER, and stand several times.
    """
    model, *others = models
    if others and length is None and not comparing:
        raise click.UsageError(f"{others[0]!r} is a second MODEL; several go with --length or --compare.")
    long = {
        "--length": length,
        "--plot": plot_path,
        "--retrieval": retrieval,
        "--lengths": lengths,
        "--arithmetic": problems,
        "--tasks": tasks,
    }
    extra = {"--set": row_set, "--rows": rows_path, "--out": out_dir, "--calibration-tokens": calibration_tokens}
    if comparing:
        _refuse(long, "does not go with --compare")
        own = {"--text": text_path, "--windows": windows, "--window-tokens": window_tokens, "--chunk": chunk, "--device": device}
        _compare(models, {**extra, **own, "--dtype": "float32" if dtype == "auto" else dtype})
        return
    _refuse(extra, "goes with --compare")

    if pictures is not None:
        _refuse(long, "does not go with --images")
        _pictures(model, pictures, device, dtype, strict, json_path, attention_path, min(chunk, 16))
        return
    _refuse({"--attention": attention_path}, "goes with --images")

    from kvsink.evaluate.retrieval import task_names
    from kvsink.tools.eval_text import Wishes, text_of

    if model.endswith(".onnx"):
        _refuse({"--baseline": baseline, "--strict": strict or None, **long}, "is not for an ONNX model")
        _onnx(model, text_of(text_path, detokenize), windows, window_tokens, chunk, batch, device, json_path)
        return
    if length is None:
        _refuse({"--plot": plot_path}, "goes with --length")
    elif not _default("window_tokens"):
        raise click.UsageError("--window-tokens is what --length says; pass one of them.")
    if retrieval is None or no_passkey:
        retrieval = "single" if length is None and not no_passkey else "none"
    if retrieval == "none":
        _refuse({"--lengths": lengths}, "goes with --retrieval")
    if tasks is None:
        _refuse({"--limit": limit}, "goes with --tasks")
    wish = Wishes(
        baseline,
        text_of(text_path, detokenize),
        text_path is not None,
        windows,
        length or window_tokens,
        length,
        chunk,
        batch,
        strict,
        sinks,
        device,
        dtype,
        task_names(retrieval),
        lengths,
        depths,
        samples,
        problems or 0,
        budget,
        temperature,
        tuple(tasks.split(",")) if tasks else (),
        limit,
    )
    _text(models, wish, plot_path, json_path)


def _refuse(options: dict[str, Any], why: str) -> None:
    """A usage error for the first of these options that was given."""
    if given := [name for name, value in options.items() if value is not None]:
        raise click.UsageError(f"{given[0]} {why}.")


def _default(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


def _text(models: Sequence[str], wish: Any, plot_path: str | None, json_path: str | None) -> None:
    """Every model on text, tables as they are ready; then all by position, the plot and JSON."""
    import kvsink  # noqa: F401  registers the quantizer, so that a rewritten folder loads as one
    from kvsink.tools.eval_tables import generation_table, harness_table, positions_table, retrieval_table
    from kvsink.tools.eval_text import measure

    console, results = _console(json_path), []
    for model in models:
        with _bars() as bar:
            result, health = measure(model, wish, bar)
        results.append(result)
        console.print(result.table())
        if result.retrieval is not None:
            console.print(retrieval_table(result.retrieval, result.baseline_retrieval))
        if result.generation is not None:
            console.print(generation_table(result.generation, result.baseline_generation, result.method))
        if result.harness:
            console.print(harness_table(result.harness, result.baseline_harness, result.method))
        if health:
            console.print(health, highlight=False, markup=False)
    if wish.length is not None:
        console.print(positions_table(results))
    if plot_path is not None:
        _plot(results, plot_path)
    if json_path is not None:
        _write([r.to_json() for r in results] if len(results) > 1 else results[0].to_json(), json_path)


def _pictures(
    model: str, source: str, device: str, dtype: str, strict: bool, json_path: str | None, plot: str | None, chunk: int
) -> None:
    """The rows on pictures, and as JSON where that was asked for."""
    import kvsink  # noqa: F401  registers the quantizer
    from kvsink.tools.eval_pictures import measure_pictures

    with _bars() as bar:
        rows = measure_pictures(model, source, device, dtype, strict, plot, chunk, bar)
    for row in rows:
        _console(json_path).print(row.line(), highlight=False, markup=False)
    if json_path is not None:
        _write([row.to_json() for row in rows], json_path)


def _plot(results: Sequence[Any], path: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("kvsink-eval: no plot: matplotlib is missing; pip install 'kvsink[plot]'", file=sys.stderr)
        return
    from kvsink.tools.length_plot import plot_lengths

    plot_lengths(results, Path(path))


def _console(json_path: str | None) -> Any:
    """Where tables go: beside JSON on standard output they make room for it."""
    return wide_console(sys.stderr if json_path == "-" else sys.stdout)


def _write(record: Any, path: str) -> None:
    """JSON into a file, or onto standard output for `-`."""
    words = json.dumps(record, indent=2)
    if path == "-":
        print(words)
    else:
        Path(path).write_text(words + "\n")


def _onnx(
    model: str, text: tuple[str, str], windows: int, window_tokens: int, chunk: int, batch: int, device: str, json_path: str | None
) -> None:
    """Perplexity of an exported model; its tokenizer is beside it."""
    from kvsink.errors import UnsupportedError
    from kvsink.evaluate import evaluation
    from kvsink.export.evaluation import evaluate_onnx
    from kvsink.folder.loading import load_tokenizer
    from kvsink.tools.build_ort_ops import runner_for

    if device not in ("auto", "cpu", "cuda"):
        raise UnsupportedError(f"device {device!r} is not one of auto, cpu, cuda for an ONNX model")
    runner = runner_for(model, device)
    ids = evaluation.token_windows(text[0], load_tokenizer(Path(model).parent), windows, window_tokens)
    with _bars() as bar:
        result = evaluate_onnx(runner, ids, chunk, batch, text[1], bar("perplexity"))
    _console(json_path).print(result.table())
    if json_path is not None:
        _write(result.to_json(), json_path)


def _compare(models: Sequence[str], options: dict[str, object]) -> None:
    """Hand over to `python -m kvsink.tools.compare`, which the tables name as the command that made them."""
    from kvsink.tools.compare import main as compare_main

    if _default("windows"):
        options.pop("--windows")  # the comparison has a default of its own
    argv = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    if code := compare_main([part for model in models for part in ("--model", model)] + argv):
        raise SystemExit(code)


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
