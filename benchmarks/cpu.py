"""Tokens a second on a CPU: decoding and prompts, by model, precision and number of threads.

    python benchmarks/cpu.py [--models mamba2-130m] [--recipes w8a8 w4a8 w4a16] [--threads 1 2] [--repeats 5]

Random weights of published sizes, saved and loaded as a user would, each row in a process of its own.
Decoding is 128 steps from an empty state, greedy; a prompt is 512 tokens, up to the logits of the last one.
Tokens a second are the mean of the repeats, with their standard deviation, after one unmeasured run. GB/s
of decoding are the bytes a step cannot do without (every weight read once, of an embedding table that is
not the head one row, every state read and written) times the steps, compared with what reading 512 MiB on
the same threads gave, the best of just before and just after. Peak memory is that of the process; what
importing torch took of it stands beside.

llama.cpp: its tokens a second on the machine that benchmarks/llama_cpp.json, or --peer, names, at equal
weight bits (Q8_0 for w8a8, Q4_0 for the others), and the ratio to them. Rows go to
benchmarks/results/cpu-{machine}.json one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import Results, Row, check_choices
from random_models import FLOAT, MODELS, empty_network, fill, recipe

from quamba.checkpoints.quantized import read_quantized, write_quantized
from quamba.errors import QuambaError
from quamba.kernels.cpu import library
from quamba.kernels.registry import choose_kernels
from quamba.models.lm import MambaLM
from quamba.profiling.size import measure_size, step_bytes
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import shipped_names
from quamba.runtime.prefill import prefill
from quamba.runtime.step import step_of

KEY = ("model", "precision", "state", "threads")
DEFAULT_MODELS = ("mamba-130m", "mamba-1.4b", "mamba2-130m", "mamba2-780m", "mamba2-1.3b")
PEER = Path(__file__).parent / "llama_cpp.json"
DECODED, PROMPT = 128, 512
_READ_BYTES = 1 << 29


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    try:
        if options.measure is not None:
            print(
                json.dumps(
                    measure(options.measure, options.threads[0], options.repeats, options.read_gb_per_s)
                )
            )
            return 0
        return _measure_all(options)
    except QuambaError as error:
        print(error, file=sys.stderr)
        return 2


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=DEFAULT_MODELS, help=", ".join(MODELS))
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a8", "w4a16"])
    parser.add_argument("--state_dtype", choices=("int8", "fp16"), default="fp16")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max_seconds", type=float, default=3600.0, help="start no further row after these")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/, named after the machine")
    parser.add_argument("--peer", type=Path, default=PEER, help="a file of benchmarks/llama_cpp.py")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a folder: measure it in this process
    parser.add_argument("--read_gb_per_s", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _measure_all(options: argparse.Namespace) -> int:
    check_choices("The model", options.models, list(MODELS))
    check_choices("The recipe", options.recipes, [FLOAT, *shipped_names()])
    results = Results("cpu", KEY, torch.device("cpu"), options)
    peer = json.loads(options.peer.read_text(encoding="utf-8"))
    _print(
        "model", "precision", "thr", "decode tok/s", "ratio", "GB/s", "of read", "prompt tok/s", "ratio", "MB"
    )
    for model in options.models:
        for precision in options.recipes:
            with tempfile.TemporaryDirectory() as folder:
                saved = False
                for threads in options.threads:
                    row = {
                        "model": model,
                        "precision": precision,
                        "state": options.state_dtype,
                        "threads": threads,
                    }
                    if results.has(row) or results.out_of_time:
                        continue
                    if not saved:
                        _save(model, precision, options.state_dtype, Path(folder))
                        saved = True
                    row |= _in_own_process(folder, threads, options.repeats)
                    row |= _compared(row, peer)
                    results.add(row)
                    _print_row(row)
    results.say_where()
    return 0


def _save(model: str, precision: str, state: str, folder: Path) -> None:
    plan = resolve(recipe(precision, state), MODELS[model])
    network = fill(empty_network(MODELS[model], precision, state, torch.float32), torch.device("cpu"))
    write_quantized(folder, network, plan, source=model, report=None, tokenizer=None, overwrite=True)


def _in_own_process(folder: str, threads: int, repeats: int) -> Row:
    command = [sys.executable, __file__, "--measure", folder, "--threads", str(threads)]
    command += ["--repeats", str(repeats), "--read_gb_per_s", str(_read_gb_per_s(threads))]
    # As the commands have it: threads of torch that wait for work would take the time of ours.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise QuambaError(f"The measuring process failed: {done.stderr.strip().splitlines()[-1:]}.")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


@torch.inference_mode()
def measure(folder: str, threads: int, repeats: int, before: float) -> Row:
    torch.set_num_threads(threads)
    alone = _peak_mb()
    start = time.perf_counter()
    network = read_quantized(folder).network.use_kernels(choose_kernels(torch.device("cpu")))
    loaded = time.perf_counter() - start
    ids = torch.randint(network.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    decode = _tokens_per_s(lambda: _decode(network), DECODED, repeats)
    prompt = _tokens_per_s(lambda: prefill(network, ids), PROMPT, repeats)
    peak = _peak_mb()
    read = max(_read_gb_per_s(threads), before)
    rate = step_bytes(network) * statistics.mean(decode) / 1e9
    return {
        "decode_tokens_per_s": statistics.mean(decode),
        "decode_sd": statistics.stdev(decode) if repeats > 1 else 0.0,
        "prompt_tokens_per_s": statistics.mean(prompt),
        "prompt_sd": statistics.stdev(prompt) if repeats > 1 else 0.0,
        "repeats": repeats,
        "weight_mb": measure_size(network).weight_bytes / 1e6,
        "step_mb": step_bytes(network) / 1e6,
        "decode_gb_per_s": rate,
        "read_gb_per_s": read,
        "share_of_read": rate / read,
        "peak_mb": peak,
        "peak_of_torch_alone_mb": alone,
        "load_s": loaded,
        "kernels": network.kernels.name,
        "instruction_set": library.instruction_set() if library.available() else None,
    }


def _decode(network: MambaLM) -> None:
    """As `generate` does: the step on a fixed cache, then the choice of the next id."""
    cache = network.new_cache(1)
    step = step_of(network, cache)
    ids = torch.zeros(1, dtype=torch.int64)
    for _ in range(DECODED):
        ids = step(ids)[:, : network.config.vocab_size].argmax(-1)


def _tokens_per_s(run: Callable[[], object], tokens: int, repeats: int) -> list[float]:
    run()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        rates.append(tokens / (time.perf_counter() - start))
    return rates


def _read_gb_per_s(threads: int) -> float:
    torch.set_num_threads(threads)
    memory = torch.zeros(_READ_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        library.read_memory(memory.data_ptr(), _READ_BYTES)
        seconds.append(time.perf_counter() - start)
    return _READ_BYTES / min(seconds) / 1e9


def _peak_mb() -> float:
    """Of this program: what getrusage tells includes the process it was started from."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1.024 / 1e3


def _compared(row: Row, peer: Row) -> Row:
    """The other program's rates at equal weight bits, where it was measured with as many threads."""
    found = (
        peer["tokens_per_s"].get(row["model"], {}).get("Q8_0" if row["precision"] == "w8a8" else "Q4_0", {})
    )
    rates = found.get(str(row["threads"]))
    if rates is None:
        return {}
    decode, prompt = rates
    return {
        "peer_decode_tokens_per_s": decode,
        "peer_prompt_tokens_per_s": prompt,
        "decode_ratio": row["decode_tokens_per_s"] / decode,
        "prompt_ratio": row["prompt_tokens_per_s"] / prompt,
    }


def _print_row(row: Row) -> None:
    _print(
        row["model"],
        row["precision"],
        row["threads"],
        f"{row['decode_tokens_per_s']:.1f} +- {row['decode_sd']:.1f}",
        f"{row['decode_ratio']:.2f}" if "decode_ratio" in row else "",
        f"{row['decode_gb_per_s']:.1f}",
        f"{100 * row['share_of_read']:.0f} % of {row['read_gb_per_s']:.0f}",
        f"{row['prompt_tokens_per_s']:.0f} +- {row['prompt_sd']:.0f}",
        f"{row['prompt_ratio']:.2f}" if "prompt_ratio" in row else "",
        f"{row['weight_mb']:.0f}, peak {row['peak_mb']:.0f}",
    )


def _print(*cells: object) -> None:
    widths = (12, 10, 4, 16, 6, 6, 12, 14, 6, 16)
    print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
