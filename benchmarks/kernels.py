"""Every op of the kernels at the shapes that models of published sizes give it, against what it must move.

    python benchmarks/kernels.py [--models mamba2-2.7b] [--recipes w4a8] [--ops linear ssd_step] [--rows 1 16]
                                 [--tokens 512]

A network of one block, with random weights and states, is run once by the reference, and what each op was
called with is kept: --rows are sequences of one token (decoding), --tokens the length of one prompt. The op's
result is then compared with the reference's; one that differs by more than rounding is reported as 'wrong'
and gets no speed.

Times are of one call in a CUDA graph of many, the median of several replays. Weights and states come in
copies (512 at most) that together are larger than the cache, so that every call reads them from memory;
activations, which the op before has just written, and rows of embedding tables stay as they are. KB is the
least the op must move: inputs once, results once, states both ways. 'torch us' is the time of the same op on
float16 tensors by torch's own functions, where it has them. The head reads one token of a prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from common import (
    Results,
    Row,
    Times,
    captured,
    check_choices,
    chosen_device,
    free_memory,
    parser_with_common_options,
    reason,
    time_runs,
)
from op_calls import OPS, Call, difference, recorded_calls, torch_equivalent
from random_models import FLOAT, MODELS, PUBLISHED, compute_dtype, empty_network, fill

from quamba.errors import QuambaError
from quamba.kernels.registry import REFERENCE, Kernels, choose_kernels
from quamba.models.lm import MambaLM
from quamba.recipes.recipe import shipped_names

KEY = ("model", "precision", "state", "leaf", "op", "rows", "tokens")
#: Calls in one graph, unless copies of the weights ask for more.
CALLS = 20
_MOST_COPIES = 512


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    try:
        return _measure_all(options)
    except QuambaError as error:
        print(error, file=sys.stderr)
        return 2


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_with_common_options(__doc__)
    parser.set_defaults(models=[name for name in PUBLISHED if name != "mamba-130m"])
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a8", "w4a16"])
    parser.add_argument("--state_dtype", choices=("int8", "fp16"), default="fp16", help="of the recipes")
    parser.add_argument("--ops", nargs="+", default=list(OPS), help="default: all")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 16, 64], help="sequences of one token")
    parser.add_argument("--tokens", nargs="*", type=int, default=[512, 2048], help="lengths of one prompt")
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args(argv)


def _measure_all(options: argparse.Namespace) -> int:
    check_choices("The model", options.models, list(MODELS))
    check_choices("The recipe", options.recipes, [FLOAT, *shipped_names()])
    check_choices("The op", options.ops, OPS)
    device = chosen_device(options.device)
    if device is None:
        return 0
    results = Results("kernels", KEY, device, options)
    print(f"copy bandwidth of this run: {results.copy_gb_per_s:.0f} GB/s, read and written")
    print(
        f"{'model':12} {'precision':9} {'leaf':9} {'op':19} {'rows':>6} {'KB':>10} {'Mop':>9} {'us':>9} "
        f"{'GB/s':>6} {'copy':>5} {'torch us':>9}"
    )
    timer = Timer(choose_kernels(device), device, options.repeats, results.copy_gb_per_s)
    for model in options.models:
        for precision in options.recipes:
            for call, row in _calls(model, precision, options, device):
                if results.out_of_time:
                    print(f"{options.max_seconds:.0f} s are over; ask for the rest with --models, --recipes.")
                    results.say_where()
                    return 0
                if results.has(row):
                    continue
                if call is not None:
                    row = row | timer.measure(call)
                results.add(row)
                _show(row)
                if "error" in row:
                    results.restart_if_lost()
    results.say_where()
    return 0


def _calls(
    model: str, precision: str, options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Call | None, Row]]:
    """The calls of a network, each kind and shape once, with the columns that name it.

    None with a row of all ops, where the network cannot be made or run.
    """
    config = dataclasses.replace(MODELS[model], n_layer=1)
    state = "fp16" if precision == FLOAT else options.state_dtype
    named: Row = {"model": model, "precision": precision, "state": state}
    network: MambaLM | None = None
    seen = set()
    for batch, length in [*((rows, 1) for rows in options.rows), *((1, tokens) for tokens in options.tokens)]:
        size = {"rows": batch, "tokens": length}
        try:
            if network is None:
                network = fill(empty_network(config, precision, state, compute_dtype(device)), device)
            calls = recorded_calls(network, batch, length)
        except Exception as error:
            yield None, named | {"leaf": "all", "op": "all"} | size | {"error": reason(error)}
            continue
        for call in calls:
            if call.op in options.ops and call.signature not in seen:
                seen.add(call.signature)
                yield call, named | {"leaf": call.leaf, "op": call.op} | size
        del calls
        free_memory(device)


@dataclass(frozen=True)
class Timer:
    kernels: Kernels
    device: torch.device
    repeats: int
    copy_gb_per_s: float

    def measure(self, call: Call) -> Row:
        row: Row = {"bytes": call.moved_bytes, "operations": call.operations}
        try:
            wrong = self.gate(call)
            if wrong is not None:
                return row | {"wrong": wrong}
            copies = [call.copy() for _ in range(self.count(call.rotated_bytes))]
            ours = self.times([copy.bound(self.kernels) for copy in copies])
            del copies
            row |= {"us": 1e3 * ours.median_ms, "p5_us": 1e3 * ours.p5_ms, "p95_us": 1e3 * ours.p95_ms}
            rate = call.moved_bytes / row["us"] / 1e3
            row |= {"gb_per_s": rate, "share_of_copy": rate / self.copy_gb_per_s}
            theirs = torch_equivalent(call, compute_dtype(self.device), self.count)
            if theirs is not None:
                row["torch_us"] = 1e3 * self.times(theirs).median_ms
        except Exception as error:  # whatever goes wrong with one row, the others are measured
            row["error"] = reason(error)
        free_memory(self.device)
        return row

    def gate(self, call: Call) -> str | None:
        """What is wrong with the result, and with the state that the op leaves behind."""
        with torch.inference_mode():
            mine, expected = call.copy(), call.copy()
            found, wanted = mine.outcome(self.kernels), expected.outcome(REFERENCE)
        return next((text for pair in zip(found, wanted, strict=True) if (text := difference(*pair))), None)

    def count(self, rotated_bytes: int) -> int:
        """Copies that are three times the cache together, as far as the memory has room for them."""
        if self.device.type != "cuda" or rotated_bytes == 0:
            return 1
        wanted = math.ceil(3 * torch.cuda.get_device_properties(self.device).L2_cache_size / rotated_bytes)
        room = torch.cuda.mem_get_info(self.device)[0] // 4 // rotated_bytes
        return max(1, min(wanted, room, _MOST_COPIES))

    def times(self, runs: Sequence[Callable[[], object]]) -> Times:
        """Of one call: a graph does all in turn, again and again."""
        calls = max(CALLS, len(runs)) if self.device.type == "cuda" else 1

        def all_calls() -> None:
            for i in range(calls):
                runs[i % len(runs)]()

        with torch.inference_mode():
            times = time_runs(captured(all_calls, self.device), self.device, self.repeats)
        return Times(times.median_ms / calls, times.p5_ms / calls, times.p95_ms / calls, times.runs)


def _show(row: Row) -> None:
    rows = f"{row['rows']}x{row['tokens']}" if row["tokens"] > 1 else str(row["rows"])
    line = f"{row['model']:12} {row['precision']:9} {row['leaf']:9} {row['op']:19} {rows:>6} "
    if "error" in row or "wrong" in row:
        print(line + row.get("error", f"wrong: {row.get('wrong')}"), flush=True)
        return
    operations = row["operations"]
    line += f"{row['bytes'] / 1e3:10.1f} {'' if operations is None else f'{operations / 1e6:.1f}':>9} "
    torch_us = "" if "torch_us" not in row else f"{row['torch_us']:.2f}"
    line += f"{row['us']:9.2f} {row['gb_per_s']:6.0f} {row['share_of_copy']:>5.0%} {torch_us:>9}"
    print(line.rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
