"""kvsink-profile: sinks, massive activations and Super Experts of a model; measured by `kvsink.profiling`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from kvsink.tools.cli import command_line

PROFILE, PARTIAL, IGNORE, PAGE = "profile.json", "profile.partial.json", "ignore.json", "index.html"


@click.command("kvsink-profile", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_dir")
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--text", "text_path", metavar="FILE", help="Text to profile on. [default: the built-in calibration text]")
@click.option("--windows", default=8, show_default=True, type=click.IntRange(1), help="Windows, spread evenly over the text.")
@click.option("--window-tokens", default=512, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@click.option("--experts/--no-experts", default=None, help="Look for Super Experts. Default: where the model has experts.")
@click.option("--causal-windows", default=4, show_default=True, type=click.IntRange(0), help="Windows of the check; 0: no check.")
@click.option("--attention/--no-attention", default=True, show_default=True, help="Also look at the attention.")
@click.option("--prune", metavar="SPEC", help='Also store the model with these experts zeroed, as in "1:68,2:shared"; or `found`.')
@click.option("--prune-to", type=click.Path(path_type=Path), metavar="DIR", help="Where --prune stores the model folder.")
@click.option(
    "--stream/--whole",
    "by_layer",
    default=None,
    help="Read the weights a layer at a time, or all at once. [default: by layer when they would fill the memory]",
)
@click.option("--page/--no-page", default=True, show_default=True, help="Write OUT_DIR/index.html (needs the `plot` extra).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, float16 or bfloat16. auto is float32 on a CPU.")
@click.option("--force", is_flag=True, help="Write into OUT_DIR although it holds files.")
def command(
    model_dir: str,
    out_dir: Path,
    text_path: str | None,
    windows: int,
    window_tokens: int,
    experts: bool | None,
    causal_windows: int,
    attention: bool,
    prune: str | None,
    prune_to: Path | None,
    by_layer: bool | None,
    page: bool,
    device: str,
    dtype: str,
    force: bool,
) -> None:
    """Show where the attention sinks of MODEL_DIR (a folder, a hub id or demo:smollm2) come from.

    OUT_DIR gets profile.json, index.html and, for a mixture of experts, ignore.json: what weight quantizers must not touch.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from kvsink.errors import KvsinkError
    from kvsink.evaluate.texts import builtin_text, read_text
    from kvsink.folder.demo import resolve_model_dir
    from kvsink.folder.loading import load_model, load_tokenizer, pick_device, read_config
    from kvsink.model.anatomy import anatomy
    from kvsink.profiling import ProfileOptions, profile
    from kvsink.profiling.layout import find_layout
    from kvsink.profiling.record import windows_of
    from kvsink.tools.rewrite import check_apart, check_out_dir, replace_text

    check_out_dir(out_dir, force)
    if (prune is None) != (prune_to is None):
        raise click.UsageError("--prune and --prune-to go together.")
    if prune_to is not None and prune_to.exists():
        raise KvsinkError(f"{prune_to} exists. Choose another folder for --prune-to")
    source = resolve_model_dir(model_dir)
    for place in (out_dir, prune_to):
        if place is not None:
            check_apart(Path(source), place)
    read_config(Path(source))
    text = builtin_text() if text_path is None else read_text(text_path)
    tokenizer = load_tokenizer(source)
    stream = _stream(Path(source), by_layer, pick_device(device), dtype, prune, windows, window_tokens)
    net = load_model(source, device, dtype) if stream is None else stream.model
    limit = getattr(net.config.get_text_config(), "max_position_embeddings", None) or window_tokens
    ids = windows_of(text, tokenizer, windows, min(window_tokens, limit))
    if prune is not None and prune != "found":
        layout = find_layout(net, anatomy(net))
        for label in _labels(prune):
            layout.find(label)
    options = ProfileOptions(len(ids), ids.shape[1], attention, experts, causal_windows)
    record: dict[str, Any] = {
        "model": model_dir,
        "text": "built-in text (WikiText-2 validation)" if text_path is None else Path(text_path).name,
    }
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        try:
            record, arrays = profile(
                net if stream is None else stream, ids, options, tokenizer=tokenizer, record=record, progress=progress
            )
        except KvsinkError as error:
            if not record.get("hidden", {}).get("largest"):
                raise  # nothing was measured
            out_dir.mkdir(parents=True, exist_ok=True)
            replace_text(out_dir / PARTIAL, json.dumps({**record, "stopped": str(error)}, indent=1) + "\n")
            raise type(error)(f"{error}. What was measured before is in {out_dir / PARTIAL}") from error
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / PARTIAL).unlink(missing_ok=True)
    replace_text(out_dir / PROFILE, json.dumps(record, indent=1) + "\n")
    if record["experts"]:
        replace_text(out_dir / IGNORE, json.dumps(record["experts"]["ignore"], indent=2) + "\n")
    for line in record["findings"]:
        print(line)
    if page:
        from kvsink.profiling.page import render_page

        replace_text(out_dir / PAGE, render_page(record, arrays))
    print(f"wrote {out_dir}: {PROFILE}" + (f", {PAGE}" if page else "") + (f", {IGNORE}" if record["experts"] else ""))
    if prune is not None and prune_to is not None:
        _prune(net, record, prune, Path(source), prune_to)


def _stream(
    source: Path, by_layer: bool | None, place: Any, dtype: str, prune: str | None, windows: int, window_tokens: int
) -> Any:
    """The checkpoint to read layer by layer, or None to load it whole; says first what memory either takes."""
    from kvsink.calibrate.memory import SHARE_OF_MEMORY, available_memory
    from kvsink.calibrate.skeleton import skeleton
    from kvsink.calibrate.streaming import Stream
    from kvsink.errors import UnsupportedError
    from kvsink.folder.checkpoint import Checkpoint
    from kvsink.folder.loading import pick_dtype
    from kvsink.profiling.passes import BY_LAYER, WHOLE, profile_needs

    kind = pick_dtype(dtype, place)
    if by_layer and prune is not None:
        raise UnsupportedError("--prune stores the whole model and so needs it in memory; leave it out, or use --whole")
    if by_layer and dtype not in ("auto", "float32"):
        raise UnsupportedError(f"layer by layer is computed in float32; leave --dtype {dtype} out, or use --whole")
    checkpoint = Checkpoint.find(source)
    if checkpoint is None:
        if by_layer:
            raise UnsupportedError(f"{source} has no safetensors files, which reading by layers needs; use --whole")
        return None
    bare = skeleton(source)
    wide = str(kind) == "torch.float32"  # otherwise the model is held in 16 bit
    wanted, free = profile_needs(bare, checkpoint, windows, window_tokens, 4 if wide else 2), available_memory(place)
    if by_layer is None:
        by_layer = wanted.whole > SHARE_OF_MEMORY * free and prune is None and dtype in ("auto", "float32")
    click.echo(f"needs {wanted.memory}; {free / 2**30:.1f} GiB are free: read {BY_LAYER if by_layer else WHOLE}", err=True)
    return Stream(bare, checkpoint, place) if by_layer else None


def _labels(spec: str) -> list[str]:
    return [x for x in spec.replace(" ", "").split(",") if x]


def _prune(model: Any, record: dict[str, Any], spec: str, source: Path, target: Path) -> None:
    """Zero the named experts and store the model folder."""
    from kvsink.errors import KvsinkError
    from kvsink.profiling.record import prune
    from kvsink.tools.to_mixtral import save_model_folder

    labels = _labels(spec)
    if labels == ["found"]:
        labels = list((record["experts"] or {}).get("protected", ()))
        if not labels:
            raise KvsinkError(f"no Super Expert was found to prune, so {target} was not written; name some, as in 1:68,2:92")
    prune(model, labels)
    save_model_folder(model, source, target)
    print(f"wrote {target} without {', '.join(labels)}")


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
