"""Time and peak memory of reading a published checkpoint of a given size: ``python benchmarks/zoo.py``.

The file holds random integers in the layout of a W4A8 Mamba2 of the 2.7b's width, with as many layers as fit.
Reading is measured in a process of its own, on one thread: wall time, and the growth of its resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from quamba.checkpoints.zoo.config import ZooConfig, zoo_config_fields
from quamba.checkpoints.zoo.layout import Entry, zoo_layout
from quamba.checkpoints.zoo.read import read_zoo
from quamba.models.config import Mamba2Config

SCALE = 2.0**-6


def write_random(folder: Path, layers: int) -> None:
    """A file whose entries have the right shapes, its integers random, every scale a power of two."""
    model = Mamba2Config(d_model=2560, n_layer=layers, vocab_size=50277, tie_embeddings=False)
    config = ZooConfig(model=model, layers=("W4A8",) * layers, hybrid=False, embedding="int4", head="W4A8")
    entries = {name: _value(name, entry) for name, entry in zoo_layout(config, grouped=True).items()}
    torch.save(entries, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(zoo_config_fields(config)))


def _value(name: str, entry: Entry) -> torch.Tensor | float | None:
    if entry.kind != "tensor":
        return SCALE if entry.kind == "float" else None
    assert entry.dtype is not None
    if name.endswith("head_group_range"):
        return torch.tensor([[20, 40, 60, 80]], dtype=torch.int32)
    if name.endswith("dim_group_range"):
        return torch.tensor([16, 32, 48, 64], dtype=torch.int32).expand(entry.shape).contiguous()
    if entry.dtype.is_floating_point:
        return torch.full(
            entry.shape, 1.0 if name.endswith("norm.weight") or "norm_f" in name else SCALE, dtype=entry.dtype
        )
    low, high = (-(2**31), 2**31 - 1) if entry.dtype == torch.int32 else (-127, 127)
    return torch.randint(low, high, entry.shape, dtype=entry.dtype)


def measure(folder: Path) -> dict[str, float]:
    """In this process: seconds to read the file, and how its memory grew, in units of the file's size."""
    torch.set_num_threads(1)
    size = (folder / "pytorch_model.bin").stat().st_size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    stored = read_zoo(folder)
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    own = sum(t.nbytes for t in stored.network.named_tensors().values())
    return {
        "file_gb": size / 1e9,
        "seconds": seconds,
        "seconds_per_gb": seconds / (size / 1e9),
        "peak_rss_per_file": peak / size,
        "model_per_file": own / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=40, help="40 make about 1 GB")
    parser.add_argument("--read", type=Path, help="measure reading this folder, in this process")
    options = parser.parse_args()
    if options.read is not None:
        print(json.dumps(measure(options.read)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_random(Path(name), options.layers)
        command = [sys.executable, __file__, "--read", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    for key, value in json.loads(out).items():
        print(f"{key:<18} {value:.3f}")


if __name__ == "__main__":
    main()
