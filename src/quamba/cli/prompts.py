"""The prompts of ``quamba generate``: from the flag, a file, standard input, or at random."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quamba.cli.memory import check_prompt_memory
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from torch import Tensor

    from quamba.api import Model

DEFAULT_PROMPT = "My cat wrote all this code in one night, and"
STDIN = "-"


def check_prompt_flags(prompt: str | None, file: str | None, random_length: int | None) -> None:
    """One source of prompts at most, and no empty text."""
    given = {"--prompt": prompt, "--prompt_file": file, "--promptlen": random_length}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise QuambaError(f"{names[0]} and {names[1]} exclude each other, expected one of them.")
    if prompt == "":
        raise QuambaError("--prompt is empty, expected some text.")


def read_texts(prompt: str | None, file: str | None) -> list[str]:
    """The text of the flag, or the lines of the file or of standard input without the blank ones."""
    if file is None:
        return [_clean(DEFAULT_PROMPT if prompt is None else prompt)]
    if file == STDIN:
        name, text = "Standard input", _decoded(sys.stdin.buffer.read(), "Standard input")
    else:
        name, text = f"--prompt_file '{file}'", _read_file(file)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    found = [line for line in lines if line.strip()]
    if not found:
        raise QuambaError(f"{name} has no prompt in it, expected one a line.")
    return found


def random_ids(model: Model, batch: int, length: int, seed: int) -> list[list[int]]:
    """(batch, length) ids of the model's vocabulary."""
    check_prompt_memory(batch, length, "--promptlen")
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids: Tensor = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    listed: list[list[int]] = ids.tolist()
    return listed


def require_reader(model: Model) -> None:
    """Refuse text for a model that cannot read it."""
    if model.tokenizer is None:
        raise QuambaError(
            f"'{model.source}' has no tokenizer to read a prompt with, expected --promptlen N or a "
            "tokenizer.json in its folder."
        )


def as_text(model: Model, prompt: str | Sequence[int]) -> str:
    """The prompt so that what is printed after it reads on."""
    if isinstance(prompt, str):
        return prompt
    if model.tokenizer is not None:
        return model.tokenizer.decode(prompt)
    return " ".join(map(str, prompt)) + " "


def _read_file(file: str) -> str:
    """Of anything that can be read, pipes of the shell included."""
    path = Path(file).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise QuambaError(
            f"--prompt_file '{file}' cannot be read ({error.strerror}), expected a text file with one "
            "prompt a line, or - for standard input."
        ) from None
    return _decoded(data, f"--prompt_file '{file}'")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QuambaError(f"{name} is not UTF-8 text (byte {error.start}).") from None


def _clean(text: str) -> str:
    """Bytes of the command line that are no characters, as tokenizers take them."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
