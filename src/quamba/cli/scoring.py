"""Perplexity for the commands: texts, window lengths, what was scored, and the leak guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import TqdmProgress, table
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from torch import Tensor

    from quamba.api import Model
    from quamba.calibration.data import CalibrationSet
    from quamba.evaluation.perplexity import PerplexityResult
    from quamba.evaluation.texts import EvalText

#: The published figures of the named data sets; files are cut shorter, as small models are trained.
NAMED_SEQLEN, FILE_SEQLEN = 2048, 1024
#: Logits of one batch in bytes: bounds the memory where no batch size is given.
_LOGITS_BYTES = 1 << 28
_MOST_WINDOWS = 8


@dataclass(frozen=True)
class Scored:
    """One text's perplexity. complete: whether all its windows were scored."""

    text: EvalText
    result: PerplexityResult
    complete: bool

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.text.source, "complete": self.complete, **self.result.to_dict()}

    @property
    def sentence(self) -> str:
        r = self.result
        part = "all" if self.complete else "the first"
        return (
            f"{self.text.name}: {part} {r.windows} windows of {r.window_length:,} tokens, "
            f"{r.tokens_scored:,} tokens scored ({r.rule})."
        )


def load_texts(names: Sequence[str]) -> list[EvalText]:
    """The texts by name or file, each once; two files of one name would be one key in the log."""
    from quamba.evaluation.texts import load_text

    texts = [load_text(name) for name in dict.fromkeys(names)]
    seen: dict[str, str] = {}
    for text in texts:
        if text.name in seen:
            raise QuambaError(
                f"The texts '{seen[text.name]}' and '{text.source}' have the same name; score one at a time."
            )
        seen[text.name] = text.source
    return texts


def score(
    model: Model,
    text: EvalText,
    progress: TqdmProgress,
    *,
    seqlen: int | None = None,
    batch_size: int | None = None,
    max_windows: int | None = None,
) -> Scored:
    """The perplexity of one text; seqlen None is 2,048 for a named data set and 1,024 for a file."""
    from quamba.evaluation.perplexity import perplexity, windows

    ids = encode(model, text)
    cut = windows(ids, seqlen or (FILE_SEQLEN if Path(text.source).is_file() else NAMED_SEQLEN))
    if batch_size is None:
        row_bytes = 4 * cut.shape[1] * model.config.padded_vocab_size
        batch_size = max(1, min(_MOST_WINDOWS, _LOGITS_BYTES // row_bytes))
    total = len(cut) if max_windows is None else min(max_windows, len(cut))
    progress.stage(f"Perplexity of {text.name}", total)
    done = 0

    def advance(so_far: int, _: int) -> None:
        nonlocal done
        progress.step(so_far - done)
        done = so_far

    result = perplexity(lambda batch: model(batch).logits, cut, batch_size, advance, max_windows)
    return Scored(text, result, total == len(cut))


def encode(model: Model, text: EvalText) -> Tensor:
    """The ids of the text that are meant, (tokens,) int64."""
    import torch

    if model.tokenizer is None:
        raise QuambaError(
            f"Perplexity needs a tokenizer, and '{model.source}' has none; "
            "put its tokenizer.json into the folder."
        )
    return torch.tensor(model.tokenizer.encode(text.text)[: text.max_tokens], dtype=torch.int64)


def refuse_leak(source: str | None, texts: Sequence[EvalText]) -> None:
    """Refuse to score a text that the calibration text has passages of; ``source`` None: no calibration."""
    from quamba.calibration.overlap import texts_overlap
    from quamba.calibration.reading import DEFAULT_DATASET

    if source is None:
        return
    # Reports name the default data set with its file.
    source = DEFAULT_DATASET if source.startswith(f"{DEFAULT_DATASET} ") else source
    for text in texts:
        name = text.source if Path(text.source).is_file() else text.name
        _refuse(texts_overlap(source, name), source, text.name)


def refuse_drawn_leak(calibration: CalibrationSet, model: Model, texts: Sequence[EvalText]) -> None:
    """The same for the calibration samples that were drawn, token by token."""
    from quamba.calibration.overlap import tokens_overlap

    for text in texts:
        _refuse(tokens_overlap(calibration, encode(model, text)), calibration.source, text.name)


def calibration_source(model: Model) -> str | None:
    """The text that a quantized model was calibrated on."""
    source = None if model.report is None else model.report.calibration.get("source")
    return None if source is None else str(source)


def print_scores(scores: Sequence[Scored]) -> None:
    rows = [(s.text.name, f"{s.result.perplexity:.4f}", f"{s.result.seconds:.1f}") for s in scores]
    click.echo(table(("text", "perplexity", "seconds"), rows))
    for scored in scores:
        click.echo(scored.sentence)


def _refuse(reason: str, calibration: str, evaluation: str) -> None:
    if reason:
        raise QuambaError(
            f"The calibration text '{calibration}' leaks into the evaluation text '{evaluation}' ({reason}); "
            "use another text, or --allow_leak to score it all the same."
        )
