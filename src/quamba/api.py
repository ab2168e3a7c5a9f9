"""The library: load, quantize, save, and a model to use. The commands call nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from quamba.calibration.data import CalibrationSet, CalibrationSpec, load_calibration
from quamba.checkpoints.float import read_float
from quamba.checkpoints.quantized import is_quantized, read_quantized, write_quantized
from quamba.checkpoints.source import resolve as resolve_source
from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.checkpoints.upstream import write_state_spaces
from quamba.errors import QuambaError
from quamba.models.cache import MambaCache
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import Progress, quantize_model
from quamba.recipes.plan import Plan
from quamba.recipes.recipe import Recipe, load_recipe
from quamba.recipes.report import Report
from quamba.runtime.generate import Generation, generate
from quamba.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class ModelOutput:
    """logits (B, L, padded_vocab) float."""

    logits: Tensor


@dataclass
class Model:
    """A network with its tokenizer and its history.

    network    the module tree, float or quantized
    tokenizer  None where the folder has none and the model family has no known one
    plan       what the quantization decided; None for a float model
    report     what quantizing cost and lost; None for a float model or a file without one
    source     path or hub id of the float model
    """

    network: MambaLM
    tokenizer: Tokenizer | None
    source: str
    plan: Plan | None = None
    report: Report | None = None

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def recipe(self) -> Recipe | None:
        return None if self.plan is None else self.plan.recipe

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(t.nbytes for t in self.network.named_tensors().values())

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, *, cache: MambaCache | None = None, attention_mask: Tensor | None = None
    ) -> ModelOutput:
        """input_ids (B, L) int64; attention_mask (B, L), 0 or False at left padding. ``cache`` is advanced."""
        mask = None if attention_mask is None else attention_mask.to(self.device, torch.bool)
        return ModelOutput(self.network(input_ids.to(self.device), cache, mask))

    @overload
    def generate(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        max_new_tokens: int = ...,
        sampling: SamplingParams | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        stream: Literal[False] = ...,
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        max_new_tokens: int = ...,
        sampling: SamplingParams | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        stream: Literal[True],
    ) -> Iterator[Tensor]: ...

    def generate(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        max_new_tokens: int = 100,
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
    ) -> list[Generation] | Iterator[Tensor]:
        """Continue one prompt or a batch; greedy unless ``sampling`` says otherwise (``runtime/generate.py``).

        prompts         text, texts, or ids (L,) or (B, L) int64
        max_new_tokens  not counting the prompt; a sequence ends earlier at an end-of-text token or a stop text
        stream          yield the new ids (B,) int64 one step at a time, -1 for sequences that have ended
        """
        steps = generate(
            self.network,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling or SamplingParams(),
            seed=seed,
            stop=stop,
        )
        return steps.stream() if stream else steps.collect()


def load(
    path_or_id: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Model:
    """A float checkpoint (state-spaces or Hugging Face format) or one of our quantized folders.

    device  "cpu", "cuda", "cuda:1", ..., or "auto" for CUDA where there is one
    dtype   of floats between leaves, and of a float model's projections; None: float32 on a CPU,
            float16 on a GPU
    Raises QuambaError in one sentence for anything missing, truncated, newer or unknown.
    """
    target = choose_device(device)
    folder = resolve_source(path_or_id)
    dtype = dtype or (torch.float16 if target.type == "cuda" else torch.float32)
    if is_quantized(folder):
        stored = read_quantized(folder)
        network, plan, source = stored.network, stored.plan, stored.source
        report = stored.report
        network.set_compute_dtype(dtype)
    else:
        checkpoint = read_float(folder)
        network, plan, source, report = (
            MambaLM.from_tensors(checkpoint.config, checkpoint.tensors),
            None,
            str(path_or_id),
            None,
        )
        network.set_compute_dtype(dtype)
    try:
        tokenizer: Tokenizer | None = load_tokenizer(folder, network.config, source)
    except QuambaError:
        tokenizer = None
    return Model(network.to(target), tokenizer, source, plan, report)


def quantize(
    model: Model,
    recipe: Recipe | str,
    calibration: CalibrationSet | CalibrationSpec | str | Path | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """A quantized copy of a float model, and what it cost and lost.

    recipe       a Recipe, the name of a shipped one, or the path of a TOML file
    calibration  texts already chosen, how to choose them, or a path or data set name to choose from
                 (512 samples of 512 tokens); None: the default data set, or nothing where the recipe needs none
    """
    if model.plan is not None:
        raise QuambaError(
            f"'{model.source}' is quantized already ({model.plan.recipe.name}); quantize a float model."
        )
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    texts = _calibration_set(model, recipe, calibration)
    network, plan, report = quantize_model(model.network, recipe, texts, progress)
    network.set_compute_dtype(model.network.lm_head.compute_dtype)
    return Model(network, model.tokenizer, model.source, plan, report), report


def save(model: Model, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a model to a folder that ``load`` reads back: beside it first, then renamed.

    Quantized models in our format (docs/format.md), float ones in the state-spaces layout.
    """
    if model.plan is not None:
        write_quantized(
            folder,
            model.network,
            model.plan,
            source=model.source,
            report=model.report,
            tokenizer=model.tokenizer,
            overwrite=overwrite,
        )
    else:
        write_state_spaces(folder, model.config, model.network.named_tensors(), overwrite=overwrite)


def choose_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise QuambaError(f"The device is '{device}', expected 'auto', 'cpu', 'cuda' or 'cuda:N'.") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise QuambaError(
            "The device 'cuda' was asked for, but torch sees no CUDA device here; use 'cpu' or 'auto'."
        )
    return target


def _calibration_set(
    model: Model, recipe: Recipe, calibration: CalibrationSet | CalibrationSpec | str | Path | None
) -> CalibrationSet | None:
    if isinstance(calibration, CalibrationSet):
        return calibration
    from quamba.recipes.plan import resolve

    plan = resolve(recipe, model.config)
    if not plan.needs_calibration:
        return None
    if model.tokenizer is None:
        raise QuambaError(
            f"Calibration needs a tokenizer, and '{model.source}' has none; put its tokenizer.json into the folder."
        )
    spec = calibration if isinstance(calibration, CalibrationSpec) else CalibrationSpec(data=calibration)
    return load_calibration(spec, model.tokenizer)
