"""Tokens a second of llama.cpp on this machine, for models of the sizes that benchmarks/cpu.py measures.

    python benchmarks/llama_cpp.py --bin BUILD/bin --folder GGUF [--models mamba2-130m] [--types Q8_0 Q4_0]
        [--threads 1 2] [--repeats 5] [--out FILE.json]

BUILD/bin holds llama.cpp's llama-bench and llama-quantize. GGUF files that the folder lacks are made there,
of random weights: F16 with the package gguf, every other type from it with llama-quantize. --repeats 0
makes the files and measures nothing. Neither torch nor a tokenizer is needed.

Each row is a llama-bench of its own, with 512 tokens of prompt and 128 decoded ones and else its defaults;
OMP_ and GOMP_ variables, which change how its threads wait, are kept from it. The file that --out names has
the layout of benchmarks/llama_cpp.json, and the repeats beside. What it has already is kept: repeats of the
same row are added to it, so that calls that alternate with another program end in one mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quamba.errors import QuambaError, one_of
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig

if TYPE_CHECKING:
    import numpy as np

MODELS: dict[str, ModelConfig] = {
    "mamba-130m": MambaConfig(d_model=768, n_layer=24, vocab_size=50280),
    "mamba-1.4b": MambaConfig(d_model=2048, n_layer=48, vocab_size=50280),
    "mamba2-130m": Mamba2Config(d_model=768, n_layer=24, vocab_size=50288),
    "mamba2-780m": Mamba2Config(d_model=1536, n_layer=48, vocab_size=50288),
    "mamba2-1.3b": Mamba2Config(d_model=2048, n_layer=48, vocab_size=50288),
}
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K_M")
COLUMNS = ["tokens/s decoding 128", "tokens/s of a prompt of 512"]
BENCH, QUANTIZE = "llama-bench", "llama-quantize"
PROMPT, DECODED = 512, 128
#: llama.cpp's number of a file that is float16 in the main.
_FILE_TYPE_F16 = 1

#: Of one row: tokens a second of each repeat, of decoding and of prompts.
Repeats = list[list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if options.bin is None:
        print("This benchmark needs a build of llama.cpp: name the folder of its programs with --bin.")
        return 0
    try:
        _check(options)
        if options.folder is not None:
            return _measure_all(options, options.folder)
        with tempfile.TemporaryDirectory() as folder:
            return _measure_all(options, Path(folder))
    except QuambaError as error:
        print(error, file=sys.stderr)
        return 2


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bin", type=Path, help=f"folder of {BENCH} and {QUANTIZE}")
    parser.add_argument("--folder", type=Path, help="of the GGUF files, which stay; default: a temporary one")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_0"], help=", ".join(TYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="0: make the files only")
    parser.add_argument("--out", type=Path, help="file of results; default: they are printed only")
    return parser.parse_args(argv)


def _check(options: argparse.Namespace) -> None:
    for what, values, choices in (("model", options.models, MODELS), ("type", options.types, TYPES)):
        for value in values:
            if value not in choices:
                raise one_of(f"The {what}", value, choices)
    if min(options.threads) < 1 or options.repeats < 0:
        raise QuambaError("--threads takes numbers from 1 and --repeats a number from 0.")
    for name in (BENCH, QUANTIZE):
        if not os.access(options.bin / name, os.X_OK) or not (options.bin / name).is_file():
            raise QuambaError(
                f"'{options.bin}' has no program {name}; --bin takes the folder of a build of llama.cpp "
                f"with the targets {BENCH} and {QUANTIZE}."
            )
    if options.folder is not None and options.folder.exists() and not options.folder.is_dir():
        raise QuambaError(f"'{options.folder}' is a file; --folder takes a folder for GGUF files.")
    if options.out is not None and options.out.is_dir():
        raise QuambaError(f"'{options.out}' is a folder; --out takes the name of a JSON file.")
    if options.out is not None and options.out.exists():
        _read(options.out)  # now, not after minutes of measuring


def _measure_all(options: argparse.Namespace, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    results: Results | None = None
    for model in options.models:
        paths = make_files(model, options.types, folder, options.bin / QUANTIZE)
        for kind, path in paths.items():
            if not options.repeats:
                print(f"{path}  {path.stat().st_size / 1e6:.1f} MB", flush=True)
                continue
            for threads in options.threads:
                commit, repeats = bench(options.bin / BENCH, path, threads, options.repeats)
                if results is None:
                    results = Results(options.out, _program(commit, options.repeats))
                    _print("model", "type", "thr", "decode tok/s", "prompt tok/s")
                _print(model, kind, threads, *(f"{m:.1f} +- {s:.1f}" for m, s in map(_mean_sd, repeats)))
                results.add(model, kind, threads, repeats)
    return 0


def _print(*cells: object) -> None:
    widths = (12, 7, 4, 16, 16)
    print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


# Measuring


def bench(program: Path, file: Path, threads: int, repeats: int) -> tuple[str, Repeats]:
    """The commit of llama.cpp, and the repeats of a row."""
    sizes = ["-p", str(PROMPT), "-n", str(DECODED), "-r", str(repeats), "-t", str(threads)]
    output = _run([program, "-m", file, *sizes, "-o", "json"])
    try:
        rows = json.loads(output)
        decode = next(row for row in rows if row["n_gen"] == DECODED)
        prompt = next(row for row in rows if row["n_prompt"] == PROMPT)
        found = [[float(rate) for rate in row["samples_ts"]] for row in (decode, prompt)]
        return str(decode["build_commit"]), found
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise QuambaError(
            f"{BENCH} printed no decoding of {DECODED} tokens and prompt of {PROMPT} as JSON; "
            "expected a llama.cpp of the year 2024 or later."
        ) from error


def _run(command: Sequence[str | Path]) -> str:
    """What a program prints."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise QuambaError(f"{Path(command[0]).name} failed with status {done.returncode}: {last}")
    return done.stdout


def _program(commit: str, repeats: int) -> str:
    return f"llama.cpp {commit}; {BENCH} -p {PROMPT} -n {DECODED} -r {repeats}"


def _hardware() -> str:
    """Name and family of the CPU, which its name alone may not tell, and how many there are."""
    found: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    family = f" (family {found['cpu family']} model {found['model']})" if "cpu family" in found else ""
    return f"{name}{family}, {os.cpu_count()} CPUs"


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


class Results:
    """The file of one program on one machine; written after every row."""

    def __init__(self, path: Path | None, program: str) -> None:
        self.path = path
        self._content: dict[str, Any] = {
            "program": program,
            "hardware": _hardware(),
            "date": date.today().isoformat(),
            "columns": COLUMNS,
            "tokens_per_s": {},
            "repeats": {},
        }
        if path is not None and path.exists():
            old = _read(path)
            for name in ("program", "hardware"):
                if old[name] != self._content[name]:
                    raise QuambaError(
                        f"'{path}' has results of '{old[name]}', and this is '{self._content[name]}'; "
                        "name another --out."
                    )
            self._content |= {name: old[name] for name in ("tokens_per_s", "repeats")}

    def add(self, model: str, kind: str, threads: int, repeats: Repeats) -> None:
        if self.path is None:
            return
        kept = self._content["repeats"].setdefault(model, {}).setdefault(kind, {})
        before = kept.get(str(threads), [[], []])
        rates = [old + [round(rate, 2) for rate in new] for old, new in zip(before, repeats, strict=True)]
        kept[str(threads)] = rates
        means = self._content["tokens_per_s"].setdefault(model, {}).setdefault(kind, {})
        means[str(threads)] = [round(statistics.mean(column), 2) for column in rates]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(_layout(self._content), encoding="utf-8")
        partial.replace(self.path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        repeats = content["repeats"]
        if not {"program", "hardware", "tokens_per_s"} <= content.keys() or not isinstance(repeats, dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuambaError(
            f"'{path}' is no file that this script has written; name another one with --out."
        ) from error
    return content


def _layout(content: dict[str, Any]) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\s+([-+.\de,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


# Files


def make_files(model: str, types: Sequence[str], folder: Path, quantize: Path) -> dict[str, Path]:
    """The GGUF file of each type; those that are there already stay as they are."""
    paths = {kind: folder / f"{model}-{kind}.gguf" for kind in types}
    missing = [kind for kind, path in paths.items() if not path.exists()]
    if not missing:
        return paths
    source = folder / f"{model}-F16.gguf"
    there = source.exists()
    if not there:
        with _whole(source) as partial:
            write_random(model, partial)
    try:
        for kind in missing:
            if kind != "F16":
                with _whole(paths[kind]) as partial:
                    _run([quantize, source, partial, kind])
    finally:
        if not there and "F16" not in types:
            source.unlink()
    return paths


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path that becomes ``path`` when all went well, and nothing otherwise."""
    partial = path.with_suffix(".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_random(model: str, path: Path) -> None:
    """An F16 file of random weights, tensor by tensor: memory for the largest one is enough."""
    try:
        import gguf
        import numpy as np
    except ImportError as error:
        raise QuambaError(
            "Making GGUF files needs the package 'gguf', which is not installed; "
            "install it with: pip install gguf"
        ) from error
    config = MODELS[model]
    writer = gguf.GGUFWriter(path, config.family)
    _write_fields(writer, model, config)
    tensors = tensor_shapes(config)
    for name, shape in tensors.items():
        kind = np.dtype("float16" if is_half(name) else "float32")
        writer.add_tensor_info(name, shape, kind, math.prod(shape) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, shape in tensors.items():
        values = _values(name, shape, random)
        writer.write_tensor_data(values.astype("float16" if is_half(name) else "float32"))
    writer.close()


def _write_fields(writer: Any, model: str, config: ModelConfig) -> None:
    writer.add_name(model)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    if isinstance(config, Mamba2Config):
        writer.add_ssm_time_step_rank(config.nheads)
        writer.add_ssm_group_count(config.ngroups)
    else:
        writer.add_ssm_time_step_rank(config.dt_rank)
        writer.add_ssm_dt_b_c_rms(False)
    writer.add_tokenizer_model("no_vocab")  # llama-bench draws ids; it reads and writes no text
    writer.add_file_type(_FILE_TYPE_F16)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file by its name, slowest dimension first; the head is the embedding table."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.padded_vocab_size, config.d_model),
        "output_norm.weight": (config.d_model,),
    }
    block = _shapes_of_mamba2(config) if isinstance(config, Mamba2Config) else _shapes_of_mamba(config)
    for layer in range(config.n_layer):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _shapes_of_mamba(config: MambaConfig) -> dict[str, tuple[int, ...]]:
    return {
        "attn_norm.weight": (config.d_model,),
        "ssm_in.weight": (2 * config.d_inner, config.d_model),
        "ssm_conv1d.weight": (config.d_inner, config.d_conv),
        "ssm_conv1d.bias": (config.d_inner,),
        "ssm_x.weight": (config.dt_rank + 2 * config.d_state, config.d_inner),
        "ssm_dt.weight": (config.d_inner, config.dt_rank),
        "ssm_dt.bias": (config.d_inner,),
        "ssm_a": (config.d_inner, config.d_state),
        "ssm_d": (config.d_inner,),
        "ssm_out.weight": (config.d_model, config.d_inner),
    }


def _shapes_of_mamba2(config: Mamba2Config) -> dict[str, tuple[int, ...]]:
    return {
        "attn_norm.weight": (config.d_model,),
        "ssm_in.weight": (config.d_inner + config.conv_dim + config.nheads, config.d_model),
        "ssm_conv1d.weight": (config.conv_dim, config.d_conv),
        "ssm_conv1d.bias": (config.conv_dim,),
        "ssm_dt.bias": (config.nheads,),
        "ssm_a": (config.nheads, 1),
        "ssm_d": (config.nheads, 1),
        "ssm_norm.weight": (config.ngroups, config.d_inner // config.ngroups),
        "ssm_out.weight": (config.d_model, config.d_inner),
    }


def is_half(name: str) -> bool:
    """Float16 are the embedding table and the projections, the rest is float32."""
    parts = ("token_embd.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")
    return name.endswith(parts)


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Float32 that keep activations near unit size and the states bounded."""
    import numpy as np

    if name.endswith(("norm.weight", "ssm_d")):
        return np.ones(shape, np.float32)
    if name.endswith("ssm_a"):
        return -random.uniform(1.0, 16.0, shape).astype(np.float32)
    if name.endswith("ssm_dt.bias"):  # softplus takes them to steps of 0.001 to 0.1
        return np.log(np.expm1(np.exp(random.uniform(math.log(1e-3), math.log(0.1), shape))))
    return random.standard_normal(shape, np.float32) / math.sqrt(shape[-1])


if __name__ == "__main__":
    sys.exit(main())
