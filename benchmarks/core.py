"""Accuracy and time of the demo models: float and every shipped precision, on the whole held-out text.

    python benchmarks/core.py [--device cpu] [--models mamba2-demo mamba-demo] [--recipes w8a8 w4a8 w4a16]

Perplexity of 96 windows of 1,024 tokens; calibration on 256 texts of 512 tokens. Prints a table and writes
benchmarks/results/core-{device}.json. Times are wall time of one run each, with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import quamba
from quamba.api import Model
from quamba.evaluation.perplexity import perplexity, windows

ROOT = Path(__file__).parent.parent
WINDOW = 1024
HEADER = f"{'model':12} {'precision':10} {'MiB':>6} {'perplexity':>10} {'quantize s':>10} {'evaluate s':>10}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=["mamba2-demo", "mamba-demo"])
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a8", "w4a16"])
    parser.add_argument("--calib_data_num", type=int, default=256)
    arguments = parser.parse_args()
    rows = []
    print(HEADER)
    for name in arguments.models:
        model = quamba.load(ROOT / "assets" / "models" / name, arguments.device, torch.float32)
        rows.append(report(name, "float", model, 0.0))
        for recipe in arguments.recipes:
            rows.append(quantized(name, model, recipe, arguments.calib_data_num))
    write(rows, arguments)


def quantized(name: str, model: Model, recipe: str, samples: int) -> dict[str, Any]:
    texts = quamba.CalibrationSpec(data=ROOT / "assets" / "data" / "calibration.txt", num=samples)
    start = time.perf_counter()
    small, _ = quamba.quantize(model, recipe, texts)
    return report(name, recipe, small, time.perf_counter() - start)


def report(name: str, precision: str, model: Model, seconds: float) -> dict[str, Any]:
    text = (ROOT / "assets" / "data" / "heldout.txt").read_text(encoding="utf-8")
    assert model.tokenizer is not None
    ids = windows(torch.tensor(model.tokenizer.encode(text)), WINDOW)
    result = perplexity(lambda batch: model(batch).logits, ids)
    row = {
        "model": name,
        "precision": precision,
        "size_mib": model.size_bytes / 2**20,
        "perplexity": result.perplexity,
        "windows": result.windows,
        "quantize_seconds": seconds,
        "evaluate_seconds": result.seconds,
    }
    print(
        f"{name:12} {precision:10} {row['size_mib']:6.1f} {result.perplexity:10.4f} {seconds:10.1f} "
        f"{result.seconds:10.1f}",
        flush=True,
    )
    return row


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    on_gpu = arguments.device.startswith("cuda")
    stamp = {
        "hardware": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "quamba": quamba.__version__,
        "calib_data_num": arguments.calib_data_num,
    }
    path = ROOT / "benchmarks" / "results" / f"core-{'cuda' if on_gpu else 'cpu'}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**stamp, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(ROOT)}")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
