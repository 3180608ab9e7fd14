"""Chats become what the model reads: its template over every line, and what is no chat is told with its line."""

from __future__ import annotations

import json

import pytest
import torch

import kvsink
from kvsink.calibrate.observing import calibration_windows
from kvsink.errors import CalibrationError
from kvsink.evaluate.imagetext import is_source
from kvsink.evaluate.texts.chats import chat_tokens, is_chats
from kvsink.model.decoder import Decoder
from tests.models import VOCAB, build
from tests.wording import Letters

HELLO = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


class Talk(Letters):
    chat_template = "some"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * add_generation_prompt


def write(path, *records):
    path.write_text("\n\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_a_chat_is_read_in_the_models_template(tmp_path):
    file = write(tmp_path / "chats.jsonl", HELLO, {"prompt": "Why?"})
    assert Letters().decode(chat_tokens(file, Talk())) == "<user>Hi<assistant>Hello<user>Why?<assistant>"


def test_calibration_takes_chats(tmp_path):
    class Small(Talk):
        def __call__(self, text, **more):
            return {"input_ids": [3 + i % (VOCAB - 3) for i in super().__call__(text)["input_ids"]]}

    file = write(tmp_path / "chats.jsonl", *[HELLO] * 40)
    windows = calibration_windows(Decoder(build("llama")), file, 512, Small())
    assert windows.shape == (4, 128)
    assert torch.equal(windows.flatten(), torch.tensor(chat_tokens(file, Small()))[:512])
    report = kvsink.rewrite(build("llama"), "klt", calibration=str(file), calibration_tokens=512, tokenizer=Small())
    assert report.calibration_tokens == 512


def test_chats_are_told_from_pictures(tmp_path):
    chats = write(tmp_path / "chats.jsonl", HELLO)
    pictures = write(tmp_path / "pictures.jsonl", {"image": "a.png", "text": "A house"})
    assert is_chats(chats) and not is_source(str(chats))
    assert not is_chats(pictures) and is_source(str(pictures))
    broken = write(tmp_path / "broken.jsonl", "{")
    assert not is_chats(broken) and not is_chats(tmp_path / "absent.jsonl") and not is_chats("builtin")


def test_what_is_no_chat(tmp_path):
    file = write(tmp_path / "chats.jsonl", HELLO, {"messages": []})
    with pytest.raises(CalibrationError, match=r"chats.jsonl line 3 is no chat that the template takes \(IndexError.*write \{"):
        chat_tokens(file, Talk())
    with pytest.raises(CalibrationError, match="no chat template; put the model's chat_template.jinja beside"):
        chat_tokens(file, Letters())
