"""Plain text for calibration and evaluation: the built-in excerpt, files, and WikiText without its tokenizer's spaces.

Built in    WikiText-2, CC BY-SA 3.0 (the README beside the files states source and changes): part of the validation
            split for calibration (61,600 SmolLM2 tokens), the test split for evaluation (296,800), never swapped
Exact       `detokenize_wikitext` follows the rules that evaluation harnesses use, line by line; `<unk>` stays
Raises      CalibrationError for a text that cannot be read
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib import resources
from pathlib import Path

from kvsink.errors import CalibrationError

# Each step removes spaces that the WikiText tokenizer put in. Order matters: separators inside numbers come first.
_STEPS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"s '(?= |$)", "s'"),  # the possessive of a plural
        (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 -> 1,000
        (r" ([:;.!?,]) ", r"\1 "),
        (r" ([:;.!?,])$", r"\1"),
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"(?<!\w)'\s+([^']*?)\s*'(?!\w)", r"'\1'"),
        (r"= = = =", "===="),
        (r"= = =", "==="),
        (r"= =", "=="),
        (r" ° ", "°"),
        (r" ('(?:s|re|ve|ll|d|m|t)\b)", r"\1"),
    )
)


@cache
def builtin_text() -> str:
    """The text behind `--calibration builtin`: whole articles of the WikiText-2 validation split, detokenized."""
    return resources.files(__package__).joinpath("wikitext2_valid.txt").read_text(encoding="utf-8")


@cache
def evaluation_text() -> str:
    """The text `kvsink-eval` uses unless told otherwise: the WikiText-2 test split, detokenized."""
    return resources.files(__package__).joinpath("wikitext2_test.txt").read_text(encoding="utf-8")


def detokenize_wikitext(text: str) -> str:
    """WikiText as people write it: `1 @,@ 000 lobsters ( big )` -> `1,000 lobsters (big)`; lines stay lines.

    >>> detokenize_wikitext(' = Title = \\n It was 0 @.@ 5 % " red " , wasn \\'t it ? \\n')
    '= Title =\\nIt was 0.5 % "red", wasn\\'t it?\\n'
    """
    return "\n".join(_detokenize_line(line) for line in text.split("\n"))


def _detokenize_line(line: str) -> str:
    line = line.strip(" ")
    for pattern, into in _STEPS:
        line = pattern.sub(into, line)
    return line


def looks_like_wikitext(text: str) -> bool:
    """True for text that still carries the WikiText tokenizer's marks (` @-@ `, ` @,@ `, ` @.@ `)."""
    return re.search(r" @[-,.]@ ", text[:200_000]) is not None


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file; a CalibrationError names what is wrong with it and the way out."""
    file = Path(path).expanduser()
    hint = "Pass a UTF-8 text file, or `builtin`"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CalibrationError(f"text file {file} does not exist. {hint}") from error
    except IsADirectoryError as error:
        raise CalibrationError(f"{file} is a folder, not a text file. {hint}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{file} is not UTF-8 text (byte {error.start}). {hint}") from error
    except OSError as error:
        raise CalibrationError(f"cannot read {file}: {error.strerror or error}. {hint}") from error
    if not text.strip():
        raise CalibrationError(f"text file {file} is empty. {hint}")
    return text
