"""What is in a wheel, and that it works where no checkout is: `python .ci/wheel.py kvsink-VERSION-py3-none-any.whl`.

The wheel must hold every tracked file of the folders that setup.cfg maps, and the version that `kvsink.__version__` says. It is
then installed without its dependencies into an empty environment beside this interpreter's packages (an editable kvsink among
them is not seen there), where README's first command runs on a tiny model in place of the demo model, and the folder it
wrote is generated with. The C kernels are built anew, from the wheel's sources. Exit code 1, with the reason, where
something is missing.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAYS = ("tools/results/", "tools/gpu_lab/")  # rows and notes of measurements, for readers of the repository
MAKE = """
import sys
from pathlib import Path
from tests.tools.conftest import folder_of
folder_of("llama", Path(sys.argv[1]))
"""
GENERATE = """
import sys
import kvsink
from transformers import AutoModelForCausalLM, AutoTokenizer
assert kvsink.__file__.startswith(sys.prefix), f"{kvsink.__file__} is not the wheel's"
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
prompt = tokenizer("Attention sinks are", return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True)
cache = made.cache if "cache" in made else made.past_key_values  # its name since transformers 5.24, and before
assert isinstance(cache, kvsink.KVSinkCache) and 0 < cache.bits_per_element() < 16, type(cache)
assert made.sequences.shape[1] == prompt["input_ids"].shape[1] + 8, made.sequences.shape
"""


def expected() -> set[str]:
    """Names in the wheel of every tracked file of a mapped folder."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    pairs = re.findall(r"^(\S+) = (\w+)$", config["options"]["package_dir"], re.MULTILINE)
    packages = {folder: name.replace(".", "/") for name, folder in pairs}  # rewriter: kvsink, passes: kvsink/passes
    command = ["git", "ls-files", "-z", *packages]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    kept = [Path(path) for path in listed if path and not path.startswith(STAYS) and (ROOT / path).is_file()]
    return {f"{packages[path.parts[0]]}/{'/'.join(path.parts[1:])}" for path in kept}


def check_contents(wheel: Path) -> None:
    """Exit with the names that a wheel lacks or that stand outside kvsink/, or with a version that is not the package's."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        version = re.findall(r"^Version: (.+)$", file.read(about).decode(), re.MULTILINE)
    if missing := sorted(expected() - names):
        listed = ", ".join(missing[:8])
        sys.exit(f"{wheel.name} lacks {len(missing)} files: {listed}. See packages and package_data in setup.cfg")
    if outside := sorted(name for name in names if not name.startswith(("kvsink/", about.partition("/")[0]))):
        sys.exit(f"{wheel.name} would install {outside[0]} outside kvsink/")
    source = (ROOT / "rewriter" / "__init__.py").read_text(encoding="utf-8")
    said = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if said != version or len(said) != 1:
        sys.exit(f"{wheel.name} says version {version}; rewriter/__init__.py says {said}")


def run(*arguments: str | Path, cwd: Path, program: str | Path = sys.executable, **variables: str) -> None:
    """Run a program outside the checkout's PYTHONPATH, or exit with its output."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(part) for part in (program, *arguments)]
    done = subprocess.run(command, cwd=cwd, env=clean | variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ... ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def check_use(wheel: Path, folder: Path) -> None:
    """Install the wheel into an empty environment in `folder` and use it from there."""
    run("-m", "venv", "--without-pip", "empty", cwd=folder)
    python = folder / "empty" / "bin" / "python"
    run("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Paths in a .pth are added as they are: no .pth in them is read, so that an editable kvsink stays unseen.
    beside = dict.fromkeys(path for path in sys.path if path.endswith("-packages"))
    (folder / "empty" / "lib" / version / "site-packages" / "dependencies.pth").write_text("\n".join(beside) + "\n")
    run("-c", MAKE, folder / "model", cwd=ROOT)
    settings: dict[str, Any] = {"program": python, "cwd": folder, "KVSINK_CACHE": str(folder / "cache")}
    options = ["--calibration-tokens", "2048", "--eval-windows", "1", "--eval-window-tokens", "128", "--device", "cpu"]
    run("model", "out", *options, **settings | {"program": python.with_name("kvsink-rewrite")})
    run("-c", GENERATE, "out", **settings)


if __name__ == "__main__":
    check_contents(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as place:
        check_use(Path(sys.argv[1]).resolve(), Path(place))
