"""Our own format: a quantized model in a folder, as docs/format.md says tensor by tensor."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quamba.checkpoints.source import read_json
from quamba.checkpoints.tensors import (
    ALIGNMENT_BYTES,
    MAX_SHARD_BYTES,
    TensorSource,
    open_tensors,
    write_tensors,
    written_beside,
)
from quamba.checkpoints.tokenizer import Tokenizer
from quamba.checkpoints.zoo.config import ZOO_KEYS, is_zoo_config
from quamba.errors import QuambaError, nearest, one_of
from quamba.models.config import Family, ModelConfig, config_from_dict
from quamba.models.lm import MambaLM
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.recipe import Recipe
from quamba.recipes.report import Report
from quamba.recipes.skeleton import skeleton

QUANT_METHOD = "quamba"
FORMAT_VERSION = 1
MODEL_TYPES: dict[Family, str] = {"mamba": "quamba", "mamba2": "quamba2"}
#: What ``dtype`` in config.json may be: floats between leaves, and weights that stay float.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

CONFIG_FILE, REPORT_FILE = "config.json", "quantization_report.json"
#: Keys of config.json beside the model's own sizes and switches.
_LABELS = ("model_type", "dtype", "eos_token_id", "quantization_config")
#: What quantization_config must hold beside quant_method and format_version.
_QUANTIZATION_FIELDS: dict[str, type] = {"recipe": dict, "source": str, "calibration": dict}

_T = TypeVar("_T")


@dataclass(frozen=True)
class StoredModel:
    """A quantized model as read.

    network      on the CPU; its tensors are mapped from the files, not copied
    plan         what the stored recipe says for this model
    source       path or hub id of the float model it was made from
    report       None where the folder has no quantization_report.json
    calibration  what identifies the calibration text; empty where none was used
    """

    network: MambaLM
    plan: Plan
    source: str
    report: Report | None
    calibration: dict[str, Any]


def is_quantized(folder: str | Path) -> bool:
    """Whether the folder holds a model in our format, of any version; no weight file is looked at."""
    path = Path(folder) / CONFIG_FILE
    return path.is_file() and _is_ours(read_json(path))


def describe_quantized(fields: Mapping[str, Any]) -> str | None:
    """What kind of quantized model a config.json belongs to, to go after "is"; None for a float one."""
    if is_zoo_config(fields):
        return f"a model of the published Quamba zoo (its {CONFIG_FILE} has {' or '.join(ZOO_KEYS)})"
    quantization = fields.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == QUANT_METHOD:
        return f"a model that quamba has quantized (quant_method '{QUANT_METHOD}' in {CONFIG_FILE})"
    return f"a model quantized by another program (quant_method {method!r} in {CONFIG_FILE})"


def read_quantization_config(folder: str | Path) -> dict[str, Any]:
    """``quantization_config`` of a folder in our format: enough to tell whether it is the model asked for.

    Reads config.json only. Keys: docs/format.md; ``recipe``, ``source`` and ``calibration`` are always there.
    """
    return _quantization_fields(Path(folder), read_json(Path(folder) / CONFIG_FILE))


def write_quantized(
    folder: str | Path,
    network: MambaLM,
    plan: Plan,
    *,
    source: str,
    report: Report | None,
    tokenizer: Tokenizer | None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write what ``read_quantized`` reads back to a model with bit-equal logits.

    folder  appears complete or not at all; one that is there and not empty needs ``overwrite``
    source  path or hub id of the float model
    """
    tensors = network.named_tensors()
    dtype = network.lm_head.compute_dtype
    faults = _misfits(_layout(tensors), _layout(_empty(plan, dtype).named_tensors()))
    if faults:
        raise QuambaError(f"The network's tensors do not fit its plan: {'; '.join(faults)}.")
    fields = _config_fields(plan, dtype, tokenizer, source, report)
    check_space(folder, tensors)
    with _full_disk_said(folder), written_beside(folder, overwrite=overwrite) as new:
        write_tensors(new, tensors, max_shard_bytes=max_shard_bytes)
        for file in tokenizer.files if tokenizer is not None else ():
            shutil.copyfile(file, new / file.name)
        if report is not None:
            _write_json(new / REPORT_FILE, report.to_dict())
        _write_json(new / CONFIG_FILE, fields)


def check_space(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a folder whose disk has no room for these tensors, which may be on the meta device.

    A model that is replaced is there until the new one is complete, so its bytes do not count.
    """
    needed = sum(tensor.nbytes for tensor in tensors.values())
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise QuambaError(
            f"The model takes {needed / 2**20:,.0f} MiB, and the disk of '{folder}' has"
            f" {free / 2**20:,.0f} MiB free; make room or give another folder."
        )


@contextmanager
def _full_disk_said(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise QuambaError(f"The disk of '{folder}' is full; nothing of the model was left there.") from error


def read_quantized(folder: str | Path) -> StoredModel:
    """Read a folder in our format; tensors are mapped to memory, so the weights exist once.

    Raises QuambaError in one sentence for a folder that is not in our format or in a newer version of
    it, for a recipe or a model config that is not understood, and when the tensors are not exactly
    those, in shape and dtype, that the recipe gives for the model.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG_FILE)
    stored = _quantization_fields(folder, fields)
    plan = _plan(folder, fields, stored)
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise one_of(f"'dtype' in the {CONFIG_FILE} of '{folder}'", dtype, DTYPES)
    network = _empty(plan, DTYPES[dtype])
    _fill(network, open_tensors(folder), folder)
    return StoredModel(network, plan, stored["source"], _read_report(folder), stored["calibration"])


def read_plan(folder: str | Path) -> Plan:
    """What a folder in our format holds, from its config.json alone."""
    folder = Path(folder)
    fields = read_json(folder / CONFIG_FILE)
    return _plan(folder, fields, _quantization_fields(folder, fields))


def _plan(folder: Path, fields: Mapping[str, Any], stored: Mapping[str, Any]) -> Plan:
    what = f"The recipe in the {CONFIG_FILE} of '{folder}'"
    return resolve(_parse(what, Recipe.from_dict, stored["recipe"]), _model_config(folder, fields))


def _empty(plan: Plan, dtype: torch.dtype) -> MambaLM:
    """Every tensor of the plan with its shape and dtype, no values."""
    return skeleton(plan).set_compute_dtype(dtype)


def _config_fields(
    plan: Plan, dtype: torch.dtype, tokenizer: Tokenizer | None, source: str, report: Report | None
) -> dict[str, Any]:
    quantization = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "quamba_version": _package_version(),
        "source": source,
        "calibration": {} if report is None else report.calibration,
        "recipe": plan.recipe.to_dict(),
    }
    labels: dict[str, Any] = {
        "model_type": MODEL_TYPES[plan.config.family],
        "dtype": _short(dtype),
    }
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        first = tokenizer.eos_token_id
        ids = [first, *sorted(tokenizer.eos_token_ids - {first})]
        labels["eos_token_id"] = ids if len(ids) > 1 else first
    return {**labels, **plan.config.to_dict(), "quantization_config": quantization}


def _is_ours(fields: Mapping[str, Any]) -> bool:
    quantization = fields.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _quantization_fields(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config``, once it is known to be ours and of a version that is understood."""
    if not _is_ours(fields):
        kind = describe_quantized(fields) or f"a float model (no quantization_config in {CONFIG_FILE})"
        raise QuambaError(f"'{folder}' is {kind}, expected one that quamba has quantized and saved.")
    stored = fields["quantization_config"]
    version = stored.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise QuambaError(f"format_version of '{folder}' is {version!r}, expected {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise QuambaError(
            f"'{folder}' has format version {version}, this release reads up to {FORMAT_VERSION}; "
            "update quamba."
        )
    for key, json_type in _QUANTIZATION_FIELDS.items():
        if not isinstance(stored.get(key), json_type):
            raise QuambaError(
                f"'{key}' in the quantization_config of '{folder}' is {stored.get(key)!r}, "
                f"expected {'an object' if json_type is dict else 'a string'}."
            )
    return dict(stored)


def _model_config(folder: Path, fields: Mapping[str, Any]) -> ModelConfig:
    sizes = {key: value for key, value in fields.items() if key not in _LABELS}
    config = _parse(f"The {CONFIG_FILE} of '{folder}'", config_from_dict, sizes)
    expected = MODEL_TYPES[config.family]
    if fields.get("model_type") != expected:
        raise QuambaError(
            f"model_type of '{folder}' is {fields.get('model_type')!r}, expected '{expected}' for the family "
            f"'{config.family}'."
        )
    return config


def _parse(what: str, parse: Callable[[dict[str, Any]], _T], fields: dict[str, Any]) -> _T:
    """``parse(fields)``; a value of the wrong JSON type is bad input and not a defect of ours."""
    try:
        return parse(fields)
    except QuambaError as error:
        raise QuambaError(f"{what} is not understood: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise QuambaError(f"{what} has a value of the wrong type ({error}).") from error


def _read_report(folder: Path) -> Report | None:
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    fields = read_json(path)
    known = {field.name for field in dataclasses.fields(Report)}
    optional = {field.name for field in dataclasses.fields(Report) if field.default is None}
    for key in (fields.keys() ^ known) - (optional - fields.keys()):
        state = "lacks" if key in known else "has the unknown key"
        raise QuambaError(f"'{path}' {state} '{key}'.{nearest(key, known - {key})}")
    return Report(**fields)


_Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _fill(network: MambaLM, source: TensorSource, folder: Path) -> None:
    """Assign every tensor of an empty network from the files, which must hold exactly those."""
    found: _Layout = {name: (source.dtype(name), source.shape(name)) for name in source}
    faults = _misfits(found, _layout(network.named_tensors()))
    if faults:
        raise QuambaError(f"The tensors in '{folder}' do not fit its recipe: {'; '.join(faults)}.")
    network.load_tensors({name: _aligned(source.get(name)) for name in source})


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch itself could have put it.

    Matrix libraries sum in another order where memory is not aligned: the logits of a reloaded
    model would differ in the last bits. ``write_tensors`` aligns what is large.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT_BYTES == 0 else tensor.clone()


def _misfits(found: _Layout, expected: _Layout) -> list[str]:
    """What is wrong, at most three names a kind; empty if all is right."""
    wrong_shape, wrong_dtype = [], []
    for name in expected.keys() & found.keys():
        (dtype, shape), (found_dtype, found_shape) = expected[name], found[name]
        if found_shape != shape:
            wrong_shape.append(f"{name} {list(found_shape)} instead of {list(shape)}")
        elif found_dtype != dtype:
            wrong_dtype.append(f"{name} {_short(found_dtype)} instead of {_short(dtype)}")
    kinds = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "misshapen": wrong_shape,
        "of the wrong dtype": wrong_dtype,
    }
    return [
        f"{kind} {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    ]


def _package_version() -> str:
    """For whoever looks into the file; nothing reads it back."""
    try:
        return metadata.version("quamba")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
