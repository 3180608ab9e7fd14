"""kvsink-rewrite: a model folder in, a model folder whose `generate()` runs on the packed cache out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kvsink.tools.cli import command_line, wide_console


@click.command("kvsink-rewrite", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_dir")
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--method", help="A name of kvsink.methods(). [default: klt; static for gqa]")
@click.option("--levels", metavar="NAME", help="For experiments: another variant of the method; of klt: best, codebooks, even.")
@click.option("--key-bits", type=float, metavar="B", help="Average bits of keys; 16 keeps them exact. [default: the method's]")
@click.option("--value-bits", type=float, metavar="B", help="Average bits of values. [default: the method's]")
@click.option(
    "--plan", default="uniform", show_default=True, help="uniform, or auto: measured widths for every layer within --bits."
)
@click.option("--bits", type=float, metavar="B", help="Counted bits per element of --plan auto. [default: those of uniform]")
@click.option(
    "--protect", metavar="RULE", help="Rows kept exact: none, first:N, kvsink:K or :auto, sinks:T, massive:N, or unions with +."
)
@click.option("--profile", metavar="FILE", help="A profile.json of this model: its sink stages are used, not looked for again.")
@click.option("--window", type=int, metavar="R", help="Recent tokens kept exact.")
@click.option(
    "--calibration",
    default="builtin",
    show_default=True,
    metavar="FILE|builtin|mix|random|none",
    help="builtin: prose; mix: prose, code, chats, numbers, languages; random: tokens drawn at random; none: no text, few of"
    " those; a file of UTF-8 text; chats or prompts as JSON lines, in the model's chat template; pictures with text:"
    " drawn[:N], a folder of images and texts, or JSON lines.",
)
@click.option(
    "--calibration-tokens", type=click.IntRange(1), metavar="N", help="[default: 4096; 16384 where codebooks or levels are learnt]"
)
@click.option("--layers", default="", metavar="SPEC", help='Other values for some layers: "0-1:key_bits=4;29:value_bits=8".')
@click.option(
    "--modality", metavar="METHOD", help="Lay the bits by layer class of METHOD (akvq-vl) over this codec; none: leave them out."
)
@click.option(
    "--sliding/--no-sliding",
    "sliding",
    default=None,
    help="Pack sliding-window layers too, or leave them in 16 bit. [default: pack where a model has no others]",
)
@click.option("--onnx", is_flag=True, help="Also export OUT_DIR/model.onnx, checked in onnxruntime.")
@click.option(
    "--onnx-flavour",
    "flavour",
    metavar="NAME",
    help="functions, custom or gqa, with :float16 behind it for CUDA; implies --onnx. [default: functions]",
)
@click.option("--device", default="auto", show_default=True, help="Where to calibrate: auto, cpu, cuda ...")
@click.option(
    "--by-layer/--whole",
    "by_layer",
    default=None,
    help="Read the weights a layer at a time, or all at once. [default: by layer when they would fill the memory]",
)
@click.option(
    "--eval-windows", type=click.IntRange(0), help="Windows of the result table; 0: none. [default: 4; 0 without calibration]"
)
@click.option("--eval-window-tokens", default=512, show_default=True, type=click.IntRange(2), help="Tokens of such a window.")
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Compare with the stock model before anything is written: folded weights, keys, logits, a compiled step.",
)
@click.option("--force", is_flag=True, help="Replace OUT_DIR if it exists.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
def command(
    model_dir: str,
    out_dir: Path,
    method: str | None,
    levels: str | None,
    onnx: bool,
    flavour: str | None,
    device: str,
    eval_windows: int | None,
    eval_window_tokens: int,
    force: bool,
    dry_run: bool,
    by_layer: bool | None,
    **options: Any,
) -> None:
    """Rewrite MODEL_DIR (a folder, a hub id or demo:smollm2) so that its KV cache is packed, and store it in OUT_DIR.

    OUT_DIR is a Hugging Face model folder that AutoModelForCausalLM.from_pretrained loads after `import kvsink`.
    It appears complete or not at all.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    import kvsink
    from kvsink.folder.demo import resolve_model_dir
    from kvsink.folder.loading import model_class
    from kvsink.methods import DEFAULT

    check_out_dir(out_dir, force or dry_run)
    if flavour is not None:
        from kvsink.errors import UnknownName
        from kvsink.export.flavours import FLAVOURS

        known = (*FLAVOURS, *(f"{name}:float16" for name in FLAVOURS))
        if flavour not in known:
            raise UnknownName("flavour", flavour, known)
    grouped = "static:rotated" if flavour == "gqa:float16" else "static" if flavour == "gqa" else None
    named = method or grouped or DEFAULT
    if eval_windows is None:
        eval_windows = 0 if options["calibration"] == "none" else 4
    options["method"] = f"{named}:{levels}" if levels else named
    source = resolve_model_dir(model_dir)
    check_apart(source, out_dir)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        report = kvsink.rewrite_dir(
            source,
            out_dir,
            kvsink.RewriteOptions(**options),
            onnx=flavour or ("functions" if onnx else ""),
            device=device,
            force=force,
            dry_run=dry_run,
            progress=progress,
            by_layer=by_layer,
        )
        layered = "read layer by layer" in report.notes
        quality = (
            measure(out_dir, model_dir, eval_windows, eval_window_tokens, device, progress)
            if eval_windows and not dry_run and not layered
            else None
        )
    print_report(report, out_dir, dry_run, quality, model_class(source).__name__)


def check_out_dir(out_dir: Path, may_exist: bool) -> None:
    """Refuse an existing OUT_DIR before anything slow happens."""
    from kvsink.errors import KvsinkError

    if out_dir.is_symlink() or (out_dir.exists() and not out_dir.is_dir()):
        raise KvsinkError(f"{out_dir} is a file or a link, not a folder. Choose another OUT_DIR")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not may_exist:
        raise KvsinkError(f"{out_dir} exists. Pass --force to replace it, or choose another OUT_DIR")


def check_apart(source: Path, out_dir: Path) -> None:
    """Refuse to write a model over its source, or one inside the other."""
    from kvsink.errors import KvsinkError

    a, b = source.resolve(), out_dir.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise KvsinkError(f"OUT_DIR {out_dir} and MODEL_DIR {source} overlap. Choose an OUT_DIR elsewhere")


def measure(out_dir: Path, name: str, windows: int, window_tokens: int, device: str, progress: Any) -> Any:
    """Load what was written and compare it with its own weights on a stock cache; the row goes into both reports."""
    from kvsink.evaluate import evaluation
    from kvsink.evaluate.results import markdown_table
    from kvsink.evaluate.texts import evaluation_text
    from kvsink.folder.loading import load_model, load_tokenizer

    model = load_model(out_dir, device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or window_tokens
    window_tokens = min(window_tokens, limit)
    ids = evaluation.token_windows(evaluation_text(), load_tokenizer(out_dir), windows, window_tokens)
    result = evaluation.evaluate(
        model,
        model,
        ids,
        model_name=name,
        text_name="WikiText-2 test, detokenized",
        progress=lambda done, total: progress("evaluate", done, total),
    )
    report_json, report_md = out_dir / "kvsink_report.json", out_dir / "kvsink_report.md"
    if report_json.is_file():
        record = {**json.loads(report_json.read_text()), "quality": result.to_json()}
        replace_text(report_json, json.dumps(record, indent=2) + "\n")
    if report_md.is_file():
        table = markdown_table([result])
        replace_text(report_md, f"{report_md.read_text()}\n## Quality\n\n{table}\n\n{result.provenance()}\n")
    return result


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def print_report(report: Any, out_dir: Path, dry_run: bool, quality: Any = None, loads: str = "AutoModelForCausalLM") -> None:
    """The result in a few lines: bits, what was left alone, quality, what to do next. loads: the class that loads the folder."""
    console = wide_console(sys.stdout)
    packed = [row for row in report.layers if row.packed]
    console.print(
        f"[bold]{report.method}[/], protect {report.protect}: {len(packed)} of {len(report.layers)} layers packed,"
        f" {report.bits:.2f} bits per element, {report.smaller:.1f} times smaller than 16 bit",
        highlight=False,
    )
    for row in report.layers:
        if not row.packed:
            console.print(f"layer {row.layer} ({row.path}) left alone: {row.reason}", highlight=False, markup=False)
    for line in (*(f"note: {note}" for note in report.notes), *report.served):
        console.print(line, highlight=False, markup=False)
    if report.check is not None:
        console.print(str(report.check), highlight=False, markup=False, style="bold red" if report.check.skipped else "")
    if dry_run:
        console.print(f"dry run: {out_dir} was not written", highlight=False, markup=False)
        return
    if quality is not None:
        console.print(quality.table())
    console.print(f"wrote {out_dir}: report in {out_dir / 'kvsink_report.md'}", highlight=False, markup=False)
    load = f"{loads}.from_pretrained({json.dumps(str(out_dir))})"
    console.print(f"next: import kvsink; {load}, or kvsink-eval {out_dir}", highlight=False, markup=False)


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
