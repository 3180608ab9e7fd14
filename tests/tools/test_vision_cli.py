"""kvsink-rewrite and kvsink-eval on a vision-language model: pictures in, bits by modality out, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from PIL import Image

from kvsink.model.runtime import Runtime, runtime_of
from kvsink.tools.eval import main as evaluate
from kvsink.tools.rewrite import main as rewrite

FEW = ["--device", "cpu", "--eval-windows", "0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures with a text beside each."""
    there = tmp_path / "pictures"
    there.mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 12), color).save(there / f"{i}.png")
        (there / f"{i}.txt").write_text(f"all_{color}_" * 5)
    return there


def json_lines(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_a_folder_of_pictures_in_and_bits_by_modality_out(
    seeing_dir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows, image = tmp_path / "out", tmp_path / "rows.json", tmp_path / "shares.svg"
    assert rewrite([str(seeing_dir), str(out), "--method", "akvq-vl", "--window", "8", "--calibration", str(folder), *FEW]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "text-salient layers" in said and "model.vision_tower: 2 attention layers are left alone" in said
    args = [str(out), "--images", str(folder), "--json", str(rows), "--attention", str(image), "--device", "cpu"]
    assert evaluate(args) == 0
    said = capsys.readouterr().out
    stock, packed = json.loads(rows.read_text())
    assert "visual rows" in said and said.count("answers right") == 2
    assert stock["bits_per_element"] == 16 and stock["prompts"] == packed["prompts"] == 3
    assert packed["visual_tokens"] == 12 and packed["kl"] > 0 and packed["text_bits"] > 4
    assert packed["visual_bits"] == pytest.approx(8.0)  # 2 bits and a scale per 16 channels; one row of four, the first, exact
    text = image.read_text()
    assert "pictures (" in text and "first token (" in text


def test_several_pictures_a_line(seeing_dir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = json_lines(
        tmp_path / "data.jsonl",
        {"images": ["pictures/0.png", "pictures/1.png"], "text": "first<image>then<image>which?", "answer": "both"},
        {"image": "pictures/2.png", "text": "a_blue_one"},
    )
    rows = tmp_path / "rows.json"
    assert evaluate([str(seeing_dir), "--images", lines, "--json", str(rows), "--device", "cpu"]) == 0
    (row,) = json.loads(rows.read_text())
    assert row["prompts"] == 2 and row["visual_tokens"] == 12 and row["answers"] == 2
    out = tmp_path / "out"
    options = ["--method", "centred", "--modality", "akvq-vl", "--calibration", str(folder)]
    assert rewrite([str(seeing_dir), str(out), *options, *FEW]) == 0
    assert "centred by modality" in (out / "kvsink_report.md").read_text()
    named = re.search(r"import kvsink; (\w+)\.from_pretrained", capsys.readouterr().out.replace("\n", ""))
    assert named is not None and named[1] == "AutoModelForImageTextToText"
    assert isinstance(runtime_of(getattr(transformers, named[1]).from_pretrained(out)), Runtime)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no image", "no image for a vision prompt"),
        ("no image token", "no image token in a vision prompt"),
        ("cut", "image tokens would be cut"),
        ("unreadable", "1.png cannot be read"),
        ("counts", "2 times <image> for 1 images"),
        ("no text", "has no readable text beside it"),
        ("empty", "holds no image"),
        ("number", "is not a number of pictures"),
        ("json", "data.jsonl line 1 cannot be read"),
        ("nothing", "neither a folder nor a file"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(
    what: str, said: str, seeing_dir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = seeing_dir, str(folder)
    lines = tmp_path / "data.jsonl"
    if what == "no image":
        data = json_lines(lines, {"images": [], "text": "x"})
    elif what == "no image token":
        import shutil

        model = tmp_path / "model"
        shutil.copytree(seeing_dir, model)
        config = json.loads((model / "config.json").read_text())
        config["image_token_id"] = 95
        config.pop("image_token_index", None)
        (model / "config.json").write_text(json.dumps(config))
    elif what == "cut":
        data = json_lines(lines, {"image": "pictures/0.png", "text": "a" * 127 + "<image>b"})
    elif what == "unreadable":
        (folder / "1.png").write_bytes(b"\x89PNG no more")
    elif what == "counts":
        data = json_lines(lines, {"image": "pictures/0.png", "text": "<image><image>"})
    elif what == "no text":
        (folder / "0.txt").unlink()
    elif what == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif what == "number":
        data = "drawn:some"
    elif what == "json":
        lines.write_text("no json\n")
        data = str(lines)
    else:
        data = str(tmp_path / "nowhere.jsonl")
    out = tmp_path / "out"
    for main, argv in (
        (rewrite, [str(model), str(out), "--method", "akvq-vl", "--calibration", data, *FEW]),
        (evaluate, [str(model), "--images", data, "--device", "cpu"]),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.strip().splitlines()[-1].count(said) == 1 and "Traceback" not in error
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_models_that_do_not_see_or_hold_no_cache_are_named(
    tiny_dir: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers as hf

    assert rewrite([str(tiny_dir), str(tmp_path / "a"), "--calibration", str(folder), *FEW]) == 2
    assert "is a text model: it has no image processor" in capsys.readouterr().err
    clip = hf.CLIPModel(
        hf.CLIPConfig(
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            text_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 20,
            },
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    assert rewrite([str(tmp_path / "clip"), str(tmp_path / "b"), *FEW]) == 2
    assert "is not a causal language model" in capsys.readouterr().err
