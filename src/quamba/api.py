"""The library: load, quantize, save, and a model to use. The commands call nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from quamba.calibration.data import CalibrationSet, CalibrationSpec, load_calibration
from quamba.checkpoints.float import read_float
from quamba.checkpoints.mapping import drop_pages
from quamba.checkpoints.quantized import describe_quantized, write_quantized
from quamba.checkpoints.source import read_json
from quamba.checkpoints.source import resolve as resolve_source
from quamba.checkpoints.stored import StoredModel, read_stored, stored_format
from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.checkpoints.transfer import to_device
from quamba.checkpoints.upstream import write_state_spaces
from quamba.checkpoints.zoo.write import write_zoo
from quamba.errors import QuambaError, nearest
from quamba.kernels.registry import choose_kernels
from quamba.models.cache import MambaCache
from quamba.models.config import ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.memory import Budget
from quamba.quantization.pipeline import Progress, quantize_model
from quamba.quantization.work import WorkFolder, file_identity
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.recipe import Recipe, load_recipe
from quamba.recipes.report import Report
from quamba.recipes.skeleton import set_flags
from quamba.runtime.generate import Generation, Prompts, generate
from quamba.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class ModelOutput:
    """logits (B, L, padded_vocab) float."""

    logits: Tensor


@dataclass
class Model:
    """A network with its tokenizer and its history.

    network          the module tree, float or quantized
    tokenizer        None where the folder has none that can be read and the model family has no known one
    plan             what the quantization decided; None for a float model
    report           what quantizing cost and lost; None for a float model or a file without one
    source           path or hub id of the float model
    tokenizer_error  why there is no tokenizer; empty if there is one
    identity         of the files that a float model's tensors are mapped from (``open_float``); else empty
    """

    network: MambaLM
    tokenizer: Tokenizer | None
    source: str
    plan: Plan | None = None
    report: Report | None = None
    tokenizer_error: str = ""
    identity: str = ""

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
        """input_ids (B, L) int64; attention_mask (B, L) 0 or False at left padding; ``cache`` is advanced."""
        mask = None if attention_mask is None else attention_mask.to(self.device, torch.bool)
        return ModelOutput(self.network(input_ids.to(self.device), cache, mask))

    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = ...,
        sampling: SamplingParams | None = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] = ...,
        stream: Literal[False] = ...,
        cuda_graph: bool | None = ...,
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = ...,
        sampling: SamplingParams | None = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] = ...,
        stream: Literal[True],
        cuda_graph: bool | None = ...,
    ) -> Iterator[Tensor]: ...

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 100,
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stream: bool = False,
        cuda_graph: bool | None = None,
    ) -> list[Generation] | Iterator[Tensor]:
        """Continue one prompt or a batch, greedily unless ``sampling`` is given (``runtime/generate.py``).

        prompts         text, texts, ids (L,) or (B, L) int64, or lists of ids
        max_new_tokens  not counting the prompt; a sequence ends earlier at an end-of-text token or stop text
        seed            None: one from torch's global generator
        stop            texts that end a sequence, or one such text
        cuda_graph      replay prompts and steps as CUDA graphs; None: on a GPU with its own kernels
        stream          yield the new ids (B,) int64 one step at a time, -1 for sequences that have ended;
                        ``runtime.stream_text.stream_text`` makes text of them
        """
        if self.tokenizer is None and (stop or _has_text(prompts)):
            self.require_tokenizer()
        run = generate(
            self.network,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            cuda_graph=cuda_graph,
        )
        return run.stream() if stream else run.collect()

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or the error that says why there is none."""
        if self.tokenizer is None:
            raise QuambaError(self.tokenizer_error or f"'{self.source}' has no tokenizer.")
        return self.tokenizer


def load(
    path_or_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Model:
    """A float checkpoint (state-spaces or Hugging Face format) or a quantized one, ours or published.

    device  "cpu", "cuda", "cuda:1", ..., or "auto" for CUDA where there is one
    dtype   of floats between leaves, and of a float model's projections; None: float16 on a GPU; on a CPU
            float32, or what the model was saved in if it is quantized with int8 activations
    backend  "auto", "reference", "triton" or "cpu" (``kernels/registry.py``): its kernels, chosen once
    Raises QuambaError in one sentence for anything missing, truncated, newer or unknown.
    """
    target = choose_device(device)
    kernels = choose_kernels(target, backend)
    folder = resolve_source(path_or_id)
    usual = torch.float16 if target.type == "cuda" else torch.float32
    if stored_format(folder) is not None:
        stored = read_stored(folder, str(path_or_id))
        model = Model(stored.network, None, stored.source, stored.plan, stored.report)
        if target.type == "cpu" and stored.plan.needs_activation_scales:
            # The scales were chosen for floats of this width: others move codes to their neighbours.
            usual = stored.network.lm_head.compute_dtype
    else:
        checkpoint = read_float(folder)
        network = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
        model = Model(network, None, str(path_or_id))
    to_device(model.network.set_compute_dtype(dtype or usual), target)
    model.network.use_kernels(kernels)
    _add_tokenizer(model, folder, str(path_or_id))
    return model


def open_float(path_or_id: str | Path) -> Model:
    """A float checkpoint to quantize: its tensors stay in its files until they are looked at.

    It is on the CPU, in the dtype of the files, and not to be changed; to run a float model, ``load`` it.
    """
    folder = resolve_source(path_or_id)
    checkpoint = read_float(folder)
    network = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
    model = Model(network, None, str(path_or_id), identity=file_identity(folder))
    _add_tokenizer(model, folder, str(path_or_id))
    return model


def convert(
    path_or_id: str | Path,
    folder: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Model:
    """Write a published checkpoint in our format, its floats as they are stored; returns the model.

    changes  recipe fields that need no other tensors, such as {"overflow": "wrap"}
    Raises QuambaError for anything but a published checkpoint, and as ``load`` does.
    """
    found = resolve_source(path_or_id)
    if stored_format(found) != "zoo":
        kind = describe_quantized(read_json(found / "config.json")) or "a float model"
        raise QuambaError(f"'{path_or_id}' is {kind}, expected a model of the published Quamba zoo.")
    stored = read_stored(found, str(path_or_id))
    model = Model(stored.network, None, stored.source, _changed(stored, changes or {}))
    _add_tokenizer(model, found, str(path_or_id))
    save(model, folder, overwrite=overwrite)
    return model


def export_zoo(path_or_id: str | Path, folder: str | Path, *, overwrite: bool = False) -> list[str]:
    """Write a quantized model in the published format, for the code that made it popular.

    Returns what a user should know of the result, one sentence each. Raises QuambaError for models that the
    format cannot hold, with the reason.
    """
    found = resolve_source(path_or_id)
    if stored_format(found) is None:
        raise QuambaError(f"'{path_or_id}' is not quantized, expected a quantized model; quantize it first.")
    stored = read_stored(found, str(path_or_id))
    model = Model(stored.network, None, stored.source, stored.plan)
    _add_tokenizer(model, found, str(path_or_id))
    files = () if model.tokenizer is None else model.tokenizer.files
    return write_zoo(folder, stored.network, stored.plan, tokenizer_files=files, overwrite=overwrite)


def quantize(
    model: Model,
    recipe: Recipe | str | Path,
    calibration: CalibrationSet | CalibrationSpec | str | Path | None = None,
    *,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    work: WorkFolder | str | Path | None = None,
    max_gpu_memory: int | None = None,
    max_memory: int | None = None,
) -> tuple[Model, Report]:
    """A quantized copy of a float model, and what it cost and lost.

    One block of the model is worked on at a time, so that a model of ``open_float`` may be larger than the
    memory of the GPU, or of the machine.

    recipe       a Recipe, the name of a shipped one, or the path of a TOML file
    calibration  texts already chosen, how to choose them, or a path or data set name to choose from
                 (512 samples of 512 tokens); None: the default data set, nothing if the recipe needs none
    device       computes, and holds the result; None: the model's
    backend      kernels of a result of ``open_float``, as for ``load``
    work         a folder in which results of stages are kept, so that an interrupted run goes on where it
                 stopped, and runs of other recipes for this model and text share what they have in common;
                 whoever gives it clears it (``WorkFolder.clear``)
    max_gpu_memory, max_memory
                 bytes that a GPU and the machine may spend; None: what they have. Batches and the place of
                 hidden states (GPU, memory, or files in ``work``) follow from them
    """
    if model.plan is not None:
        raise QuambaError(
            f"'{model.source}' is quantized already ({model.plan.recipe.name}); quantize a float model."
        )
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    texts = _calibration_set(model, recipe, calibration)
    target = model.device if device is None else choose_device(device)
    dtype, kernels = model.network.lm_head.compute_dtype, model.network.kernels
    if model.identity:
        dtype = torch.float16 if target.type == "cuda" else torch.float32
        kernels = choose_kernels(target, backend)
    network, plan, report = quantize_model(
        model.network,
        recipe,
        texts,
        progress,
        work=WorkFolder(work) if isinstance(work, str | Path) else work,
        budget=Budget(target, max_gpu_memory, max_memory),
        identity=model.identity or None,
        release=drop_pages if model.identity else None,
    )
    network.set_compute_dtype(dtype).to(target).use_kernels(kernels)
    return dataclasses.replace(model, network=network, plan=plan, report=report, identity=""), report


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
        write_state_spaces(
            folder,
            model.config,
            model.network.named_tensors(),
            tokenizer_files=model.tokenizer.files if model.tokenizer is not None else (),
            overwrite=overwrite,
        )


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cpu", "cuda"):
        raise QuambaError(
            f"The device is '{device}', expected 'auto', 'cpu', 'cuda' or 'cuda:N'."
            f"{nearest(str(device), ('auto', 'cpu', 'cuda'))}"
        )
    count = torch.cuda.device_count()
    if target.type == "cuda" and (target.index or 0) >= count:
        raise QuambaError(
            f"The device is '{device}', but the number of CUDA devices torch sees here is {count}; "
            "use 'cpu' or 'auto'."
        )
    return target


def _add_tokenizer(model: Model, folder: Path, source: str) -> None:
    try:
        model.tokenizer = load_tokenizer(folder, model.config, source)
    except QuambaError as error:  # ids need none; whatever needs one raises this
        model.tokenizer_error = str(error)


def _changed(stored: StoredModel, changes: Mapping[str, Any]) -> Plan:
    """The plan with other recipe fields, which the network's leaves are told."""
    plan = resolve(stored.plan.recipe.replace(**changes), stored.plan.config)
    for block, formats in zip(stored.network.blocks, plan.blocks, strict=True):
        set_flags(block, formats)
    return plan


def _has_text(prompts: Prompts) -> bool:
    return isinstance(prompts, str) or (
        not isinstance(prompts, Tensor) and any(isinstance(prompt, str) for prompt in prompts)
    )


def _calibration_set(
    model: Model, recipe: Recipe, calibration: CalibrationSet | CalibrationSpec | str | Path | None
) -> CalibrationSet | None:
    if isinstance(calibration, CalibrationSet):
        return calibration
    if not resolve(recipe, model.config).needs_calibration:
        return None
    spec = calibration if isinstance(calibration, CalibrationSpec) else CalibrationSpec(data=calibration)
    return load_calibration(spec, model.require_tokenizer())
