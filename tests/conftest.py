"""What every test may ask for: where things are, a fixed seed, poisoned allocations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before any import of huggingface_hub, which reads it once: no test reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Triton kernels run on a GPU if there is one, else in Triton's interpreter on the CPU. Read when the kernels
# are defined, so before any test imports them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

REPO_ROOT = Path(__file__).resolve().parent.parent
POISON_BYTE = 0x5A


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO_ROOT


@pytest.fixture(scope="session")
def assets(repo_root: Path) -> Path:
    """The folder with the demo models and the texts."""
    folder = repo_root / "assets"
    if not (folder / "models").is_dir():
        pytest.skip("assets/ is missing: it comes with the repository, not with the installed package")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``tokenizer.json``: ``<|endoftext|>`` = 0, then the 256 bytes, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch hands out uninitialised, so that an element nobody wrote is seen.

    Floats become NaN, integers repeat the byte 0x5A, bools become True. Covers ``torch.empty``,
    ``empty_like``, ``empty_strided`` and ``Tensor.new_empty`` as called from Python.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_and_fill(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype == torch.bool:
            poison: float | bool = True
        elif tensor.is_floating_point() or tensor.is_complex():
            poison = float("nan")
        else:
            poison = int.from_bytes(bytes([POISON_BYTE]) * tensor.element_size(), "little")
        with torch.no_grad():
            return tensor.fill_(poison)

    return allocate_and_fill
