"""A model of the size of nvidia/mamba2-8b-3t-4k: quantized, saved, loaded, run; seconds and peak memory.

    python benchmarks/large.py --layers 56 --device cuda --folder DIR --max_gpu_memory 8G
    python benchmarks/large.py --layers 8 --device cpu --folder DIR --max_memory 12G --samples 8 --seqlen 256

Random weights in bfloat16 unless --checkpoint names a float model; random calibration tokens. The recipe is
that of `--w_bits 4 --a_bits 8 --group_heads --apply_gptq --quantize_embedding --quantize_lm_head`.

Each stage is a process of its own, whose peak memory is what the system counted for it: with the pages of
files that were mapped (rss) and without (anonymous). A stage that does not end within --max_seconds is
stopped; the same command goes on where it was, since results lie in DIR/work. The JSON that is printed also
goes to DIR/large.json. The stage "draw" makes a quantized model of random codes, to load without quantizing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from random_models import fill
from torch import Tensor

from quamba import api
from quamba.calibration.data import CalibrationSet, CalibrationSpec
from quamba.checkpoints.quantized import write_quantized
from quamba.checkpoints.tensors import open_tensors
from quamba.checkpoints.upstream import config_to_state_spaces, expected_shapes, state_spaces_name
from quamba.cli.flags import QuantizeFlags, recipe_from_flags
from quamba.errors import QuambaError
from quamba.models.config import Mamba2Config, ModelConfig
from quamba.profiling.machine import hardware_name
from quamba.quantization.memory import parse_size
from quamba.quantization.work import WorkFolder
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import HeadGroups, Recipe
from quamba.recipes.skeleton import skeleton

STAGES = ("make", "quantize", "draw", "load", "generate")
_USUAL = ("make", "quantize", "load", "generate")
PROMPT, NEW_TOKENS = 16, 16
_POOL = 1 << 24


def model_config(layers: int, d_model: int, vocab: int) -> Mamba2Config:
    return Mamba2Config(
        d_model=d_model,
        n_layer=layers,
        vocab_size=vocab,
        ngroups=8,
        chunk_size=128,
        tie_embeddings=False,
        pad_vocab_size_multiple=128,
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    try:
        if options.stage is not None:
            print(json.dumps(_measured(STAGE_FUNCTIONS[options.stage], options)))
            return 0
        return _run_all(options)
    except QuambaError as error:
        print(error, file=sys.stderr)
        return 2


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="for the models, results and work")
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--d_model", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--checkpoint", type=Path, help="a float model instead of a random one")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration sequence")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--refinements", type=int, help="of GPTQ; default: the recipe's")
    parser.add_argument("--max_gpu_memory", default=None, metavar="8G")
    parser.add_argument("--max_memory", default=None, metavar="12G")
    parser.add_argument("--max_seconds", type=float, default=math.inf, help="for all stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=_USUAL)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # inside of a stage's process
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def _run_all(options: argparse.Namespace) -> int:
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    device = api.choose_device(options.device)
    record: dict[str, Any] = {
        "machine": hardware_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python", "benchmarks/large.py", *sys.argv[1:]]),
        "stages": {},
    }
    out = options.folder / "large.json"
    for stage in options.stages:
        left = options.max_seconds - (time.perf_counter() - started)
        record["stages"][stage] = found = _in_process(stage, left)
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{stage}: {json.dumps(found)}", file=sys.stderr, flush=True)
        if "error" in found:
            break
    print(json.dumps(record, indent=2))
    return 1 if any("error" in found for found in record["stages"].values()) else 0


def _in_process(stage: str, seconds: float) -> dict[str, Any]:
    """The stage's JSON, or why there is none."""
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            timeout=None if math.isinf(seconds) else max(1.0, seconds),
        )
    except subprocess.TimeoutExpired:
        return {"error": "out of time; the same command goes on where it was"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"status {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class _Memory:
    """The most that this process has taken of the machine's memory, looked at ten times a second."""

    def __init__(self) -> None:
        self.anonymous = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.anonymous = max(self.anonymous, _status("RssAnon"))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return 0


def _measured(
    function: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    device = api.choose_device(options.device)
    before = _status("VmHWM")
    start = time.perf_counter()
    with _Memory() as memory:
        found = function(options)
    record: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_rss_gb": round(_status("VmHWM") / 1e9, 3),
        "peak_anonymous_gb": round(memory.anonymous / 1e9, 3),
        "rss_after_imports_gb": round(before / 1e9, 3),
    }
    if device.type == "cuda":
        record["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        record["peak_gpu_reserved_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 3)
    return {**record, **found}


def make(options: argparse.Namespace) -> dict[str, Any]:
    """A float checkpoint of random weights, one file a block."""
    folder = _checkpoint(options)
    if (folder / "config.json").is_file():
        return {"made": False, "bytes": open_tensors(folder).size_bytes()}
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = model_config(options.layers, options.d_model, options.vocab)
    shapes = expected_shapes(config)
    parts: dict[str, list[str]] = {}
    for name in shapes:
        found = name.split(".")
        parts.setdefault(found[2] if found[1] == "layers" else name, []).append(name)
    draw = _Random(api.choose_device(options.device))
    weight_map = {}
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = draw(name, shapes[name])
            stored = state_spaces_name(name, "mamba2")
            tensors[stored] = tensor.unsqueeze(1) if name.endswith(".conv1d.weight") else tensor
            weight_map[stored] = file
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_to_state_spaces(config)), encoding="utf-8")
    return {"made": True, "bytes": open_tensors(folder).size_bytes()}


class _Random:
    """Weights of about the spread of trained ones, from one pool of normal numbers: each starts elsewhere."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self._pool = torch.randn(_POOL, generator=generator, device=device, dtype=torch.float32)
        self._pool = self._pool.to(torch.bfloat16).cpu()
        self._at = 0

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        self._at = (self._at + 7_919_003) % _POOL
        repeats = (self._at + size) // _POOL + 1
        values = torch.cat([self._pool[self._at :], *[self._pool] * repeats])[:size].view(shape)
        scale, mean = _spread(name, shape)
        return values.mul_(scale).add_(mean)


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return 0.5, 0.5
    if leaf == "dt_bias":
        return 1.0, -2.0
    if leaf == "D" or "norm" in name:
        return 0.2, 1.0
    if "conv1d" in name:
        return 0.4, 0.0
    return (1.0, 0.0) if "embedding" in name else (shape[-1] ** -0.5, 0.0)


def quantize(options: argparse.Namespace) -> dict[str, Any]:
    folder, device = _checkpoint(options), api.choose_device(options.device)
    if (_quantized(options) / "config.json").is_file():
        return {"quantized": "is there already"}
    limit = _size(options.max_gpu_memory)
    if (
        limit is not None and device.type == "cuda"
    ):  # what is asked for beyond it is refused, as on a small GPU
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device.index or 0)
    model = api.open_float(folder)
    recipe = _recipe(options, model.config)
    work = WorkFolder(options.folder / "work")
    progress = _Lines()
    small, report = api.quantize(
        model,
        recipe,
        _texts(options, model.config.vocab_size),
        progress=progress,
        device=device,
        work=work,
        max_gpu_memory=limit,
        max_memory=_size(options.max_memory),
    )
    quantized_in = _status("VmHWM")
    start = time.perf_counter()
    api.save(small, _quantized(options))
    saved = time.perf_counter() - start
    losses = [line["relative_loss"] for line in report.layers if "relative_loss" in line]
    found = {
        "stages": report.seconds,
        "save_seconds": round(saved, 2),
        "peak_rss_before_save_gb": round(quantized_in / 1e9, 3),
        "work_bytes": work.size_bytes(),
        "bytes": open_tensors(_quantized(options)).size_bytes(),
        "tokens": options.samples * options.seqlen,
        "worst_relative_loss": max(losses, default=None),
    }
    work.clear()
    return found


def _recipe(options: argparse.Namespace, config: ModelConfig) -> Recipe:
    flags = QuantizeFlags(
        quantize=True,
        w_bits=4,
        a_bits=8,
        group_heads=True,
        apply_gptq=True,
        quantize_embedding=True,
        quantize_lm_head=True,
    )
    recipe, _ = recipe_from_flags(flags, config)
    assert isinstance(config, Mamba2Config)
    if (
        config.nheads // config.ngroups < HeadGroups().heads
    ):  # of models that are smaller than any published one
        recipe = recipe.replace(group_heads=HeadGroups(heads=config.nheads // config.ngroups))
    if options.refinements is None:
        return recipe
    return recipe.replace(solver=dataclasses.replace(recipe.solver, refinements=options.refinements))


class _Lines:
    """A line on stderr whenever a stage begins, and every ten seconds in it."""

    def stage(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._start = self._said = time.perf_counter()
        self._say()

    def step(self, count: int = 1) -> None:
        self._done += count
        if time.perf_counter() - self._said > 10 or self._done == self._total:
            self._say()

    def _say(self) -> None:
        self._said = time.perf_counter()
        rss = _status("VmRSS") / 1e9
        print(
            f"{self._name} {self._done}/{self._total}, {self._said - self._start:.0f} s, {rss:.1f} GB",
            file=sys.stderr,
            flush=True,
        )


def draw(options: argparse.Namespace) -> dict[str, Any]:
    """A quantized model whose codes and scales are random."""
    if (_quantized(options) / "config.json").is_file():
        return {"made": False}
    config = model_config(options.layers, options.d_model, options.vocab)
    plan = resolve(_recipe(options, config), config)
    network = fill(skeleton(plan), torch.device("cpu"))
    write_quantized(_quantized(options), network, plan, source="random", report=None, tokenizer=None)
    return {"made": True}


def load(options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    model = api.load(_quantized(options), options.device)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return {"load_seconds": round(time.perf_counter() - start, 3), "bytes": model.size_bytes}


def generate(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    model = api.load(_quantized(options), options.device)
    loaded = time.perf_counter()
    ids = torch.arange(PROMPT)
    (first,) = model.generate(ids, max_new_tokens=NEW_TOKENS)
    once = time.perf_counter()
    model.generate(ids, max_new_tokens=NEW_TOKENS)  # the second prompt of a length is captured
    start = time.perf_counter()
    (again,) = model.generate(ids, max_new_tokens=NEW_TOKENS)
    seconds = time.perf_counter() - start
    assert first.ids == again.ids
    return {
        "load_seconds": round(loaded - begun, 3),
        "first_seconds": round(once - loaded, 3),
        "tokens_per_second": round(NEW_TOKENS / seconds, 2),
    }


def _texts(options: argparse.Namespace, vocab: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (options.samples, options.seqlen), generator=generator)
    spec = CalibrationSpec(num=options.samples, seqlen=options.seqlen, batch_size=options.batch_size)
    return CalibrationSet(list(ids), spec, "random tokens", "0" * 64)


def _checkpoint(options: argparse.Namespace) -> Path:
    return options.checkpoint or options.folder / "float"


def _quantized(options: argparse.Namespace) -> Path:
    folder: Path = options.folder / "w4a8"
    return folder


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)


STAGE_FUNCTIONS = {"make": make, "quantize": quantize, "draw": draw, "load": load, "generate": generate}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
