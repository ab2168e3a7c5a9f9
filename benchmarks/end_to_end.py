"""Size, time of a decode step, time of a prompt, peak memory: models of published sizes, every precision.

    python benchmarks/end_to_end.py [--models mamba2-2.7b] [--recipes fp16 w4a8] [--state_dtype int8]
                                    [--only tpot] [--peers]

Random weights. TPOT is one step of a batch, replayed as a CUDA graph; TTFT is reading prompts as `generate`
does, short ones replayed as graphs, up to the logits of the last token. Medians, with 5th and 95th
percentiles. The bytes of a step are the least it can move: every weight read once (of an embedding table that
is not the head only the rows looked up), every state read and written once. Their rate is compared with that
of a large copy in this run.

The float model has fp16 states, whatever --state_dtype says. Rows go to
benchmarks/results/end-to-end-{machine}.json one by one; those of earlier runs stay there, and a speed-up is
over the fp16 row of this run, or else of the last. --peers adds what the published code (same precision) and
mamba_ssm (fp16) took on the card that benchmarks/peers.json names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    Results,
    Row,
    check_choices,
    chosen_device,
    free_memory,
    parser_with_common_options,
    reason,
    time_runs,
)
from random_models import FLOAT, MODELS, compute_dtype, empty_network, fill

from quamba.errors import QuambaError
from quamba.models.lm import MambaLM
from quamba.profiling.machine import peak_memory, reset_peak
from quamba.profiling.operations import prefill_operations
from quamba.profiling.size import measure_size, step_bytes
from quamba.recipes.recipe import shipped_names
from quamba.runtime.generate import decode_step, prefill
from quamba.runtime.graph import DecodeGraph

KEY = ("model", "precision", "state", "what", "batch", "length")
PEERS = Path(__file__).parent / "peers.json"
WHAT = ("size", "tpot", "ttft")


@dataclass(frozen=True)
class Cell:
    """One measurement of one network; length is that of a prompt, 0 where there is none."""

    what: str
    batch: int = 1
    length: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    try:
        return _measure_all(options)
    except QuambaError as error:
        print(error, file=sys.stderr)
        return 2


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_with_common_options(__doc__)
    parser.add_argument("--recipes", nargs="+", default=[FLOAT, "w8a8", "w4a8", "w4a16"])
    parser.add_argument("--state_dtype", choices=("int8", "fp16"), default="fp16", help="of the recipes")
    parser.add_argument("--only", choices=WHAT, help="default: all three")
    parser.add_argument("--repeats", type=int, default=100, help="of a step; a fifth of it for a prompt")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64], help="of a step")
    parser.add_argument("--prompts", nargs="+", type=_prompt, default=[(1, 512), (1, 2048), (8, 1024)])
    parser.add_argument("--peers", action="store_true", help="columns with the times of other programs")
    return parser.parse_args(argv)


def _prompt(text: str) -> tuple[int, int]:
    """'8x1024' -> 8 prompts of 1,024 tokens."""
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def _measure_all(options: argparse.Namespace) -> int:
    check_choices("The model", options.models, list(MODELS))
    check_choices("The recipe", options.recipes, [FLOAT, *shipped_names()])
    device = chosen_device(options.device)
    if device is None:
        return 0
    results = Results("end-to-end", KEY, device, options)
    table = Table(results, json.loads(PEERS.read_text(encoding="utf-8")) if options.peers else None)
    table.head()
    missed = 0
    for model in options.models:
        for precision in sorted(options.recipes, key=lambda name: name != FLOAT):
            todo = []
            for cell in cells(options):
                row = {"model": model, "precision": precision, "state": _state(precision, options)}
                row |= asdict(cell)
                if not results.has(row):
                    todo.append((cell, row))
            missed += measure_network(todo, results, table, device, options.repeats)
    if missed:
        print(f"{missed} rows were not reached in {options.max_seconds:.0f} s; ask for them with --models.")
    results.say_where()
    return 0


def cells(options: argparse.Namespace) -> list[Cell]:
    every = [
        Cell("size"),
        *(Cell("tpot", batch) for batch in options.batches),
        *(Cell("ttft", batch, length) for batch, length in options.prompts),
    ]
    return [cell for cell in every if options.only in (None, cell.what)]


def _state(precision: str, options: argparse.Namespace) -> str:
    return "fp16" if precision == FLOAT else options.state_dtype


def measure_network(
    todo: list[tuple[Cell, Row]], results: Results, table: Table, device: torch.device, repeats: int
) -> int:
    """All rows of one network, which is made once; returns the number of those there was no time for."""
    network: MambaLM | None = None
    for done, (cell, row) in enumerate(todo):
        if results.out_of_time:
            return len(todo) - done
        failed = False
        try:
            if cell.what == "size":
                row = row | size_of(row)
            else:
                network = network or new_network(row, device)
                row = row | measure(network, cell, device, repeats)
        except Exception as error:  # whatever goes wrong with one row, the others are measured
            row, failed = row | {"error": reason(error)}, True
        free_memory(device)
        row = _compared(row, results)
        results.add(row)
        table.show(row)
        if failed:
            results.restart_if_lost()
    del network
    free_memory(device)
    return 0


def new_network(row: Row, device: torch.device) -> MambaLM:
    named = MODELS[row["model"]], row["precision"], row["state"]
    return fill(empty_network(*named, compute_dtype(device)), device)


def size_of(row: Row) -> Row:
    """With float16 where it is float, whatever the device of the run."""
    size = measure_size(empty_network(MODELS[row["model"]], row["precision"], row["state"], torch.float16))
    return {"weight_bytes": size.weight_bytes, "cache_bytes_per_sequence": size.cache_bytes}


def measure(network: MambaLM, cell: Cell, device: torch.device, repeats: int) -> Row:
    reset_peak(device)
    if cell.what == "tpot":
        with decoding(network, cell.batch, device) as step:
            times = time_runs(step, device, repeats)
        row: Row = {"step_bytes": step_bytes(network, cell.batch)}
    else:
        ids = torch.randint(network.config.vocab_size, (cell.batch, cell.length), device=device)
        times = time_runs(lambda: prefill(network, ids), device, max(1, repeats // 5))
        row = {"operations": prefill_operations(network, cell.batch, cell.length).count}
    peak = peak_memory(device)
    return times.to_dict() | row | {"peak_bytes": None if peak is None else peak.size_bytes}


@contextlib.contextmanager
def decoding(network: MambaLM, batch: int, device: torch.device) -> Iterator[Callable[[], Any]]:
    """A step of random tokens, as a graph on a GPU; its state goes on from run to run."""
    ids = torch.randint(network.config.vocab_size, (batch,), device=device)
    if device.type == "cuda":
        graph = DecodeGraph(network, batch)
        graph.ids.copy_(ids)
        yield lambda: graph.step(graph.ids)
    else:
        cache = network.new_cache(batch)
        yield lambda: decode_step(network, ids, cache)


def _compared(row: Row, results: Results) -> Row:
    """With the rate of the bytes, its share of the copy's, and the speed-up over the float model."""
    if "median_ms" not in row:
        return row
    seconds = row["median_ms"] / 1e3
    if "step_bytes" in row:
        rate = row["step_bytes"] / seconds / 1e9
        row = row | {"gb_per_s": rate, "share_of_copy": rate / results.copy_gb_per_s}
    else:
        row = row | {"tera_operations_per_s": row["operations"] / seconds / 1e12}
    in_float = results.find(**row | {"precision": FLOAT, "state": "fp16"})
    if row["precision"] != FLOAT and in_float is not None and "median_ms" in in_float:
        row = row | {"speedup_over_fp16": in_float["median_ms"] / row["median_ms"]}
    return row


@dataclass(frozen=True)
class Table:
    """Rows as they come. With ``peers``, the content of peers.json, two columns more."""

    results: Results
    peers: dict[str, Any] | None

    def head(self) -> None:
        print(f"copy bandwidth of this run: {self.results.copy_gb_per_s:.0f} GB/s, read and written")
        columns = (
            f"{'model':12} {'precision':12} {'state':5} {'what':12} {'MB':>9} {'ms':>9} {'p5':>9} {'p95':>9} "
            f"{'GB/s':>6} {'copy':>5} {'x fp16':>6} {'peak MB':>8}"
        )
        if self.peers is not None:
            print(f"published and mamba_ssm: milliseconds on {self.peers['hardware']}")
            columns += f" {'published':>9} {'mamba_ssm':>9}"
        print(columns, flush=True)

    def show(self, row: Row) -> None:
        what = _label(row)
        start = f"{row['model']:12} {row['precision']:12} {row['state']:5} {what:12} "
        if "error" in row:
            print(start + row["error"], flush=True)
            return
        moved = row.get("step_bytes", row.get("weight_bytes"))
        line = start + _number(moved and moved / 1e6, 9, 1)
        line += "".join(" " + _number(row.get(name), 9, 3) for name in ("median_ms", "p5_ms", "p95_ms"))
        share = row.get("share_of_copy")
        line += f" {_number(row.get('gb_per_s'), 6, 0)} {'' if share is None else f'{share:.0%}':>5}"
        peak = row.get("peak_bytes")
        line += f" {_number(row.get('speedup_over_fp16'), 6, 2)} {_number(peak and peak / 1e6, 8, 0)}"
        if self.peers is not None:
            line += "".join(" " + _number(value, 9, 3) for value in self.of_peers(row, what))
        print(line.rstrip(), flush=True)

    def of_peers(self, row: Row, what: str) -> list[float | None]:
        """Of the published code in the row's precision, of mamba_ssm in fp16; None where it is not known."""
        assert self.peers is not None
        found: list[float | None] = []
        for peer, precision in (("published", row["precision"]), ("mamba_ssm", FLOAT)):
            times = self.peers[peer].get(row["model"], {}).get(precision)
            columns = self.peers["columns"]
            found.append(times[columns.index(what)] if times and what in columns else None)
        return found


def _label(row: Row) -> str:
    if row["what"] == "ttft":
        return f"ttft {row['batch']}x{row['length']}"
    return f"tpot {row['batch']}" if row["what"] == "tpot" else "size"


def _number(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
