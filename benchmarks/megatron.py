"""Time and peak memory of ``quamba convert-megatron``: ``python benchmarks/megatron.py --layers 56``.

The checkpoint has the sizes of nvidia/mamba2-8b-3t-4k, as many layers and tensor-parallel ranks as are asked
for, and random weights of about the spread of trained ones. It is converted in a process of its own, whose
peak memory is all that was resident, pages of mapped files included. ``--keep DIR`` leaves checkpoint and
converted model there.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from quamba.checkpoints.megatron.convert import open_megatron, write_megatron
from quamba.checkpoints.megatron.layout import local_shape, split_of
from quamba.checkpoints.megatron.sizes import stored_shapes
from quamba.checkpoints.sentencepiece_tokenizer import PUBLISHED_8B_FILE
from quamba.models.config import Mamba2Config

FILE = "model_optim_rng.pt"
_POOL_SIZE = 2**25


def config_8b(layers: int) -> Mamba2Config:
    return Mamba2Config(
        d_model=4096,
        n_layer=layers,
        vocab_size=256_000,
        pad_vocab_size_multiple=128,
        ngroups=8,
        chunk_size=128,
        tie_embeddings=False,
    )


def write_checkpoint(folder: Path, config: Mamba2Config, ranks: int) -> None:
    """Files of every rank, made at their full size first and then filled through a shared mapping."""
    pool = torch.randn(_POOL_SIZE, generator=torch.Generator().manual_seed(0))
    for rank in range(ranks):
        file = folder / "iter_0000001" / f"mp_rank_{rank:02d}" / FILE
        file.parent.mkdir(parents=True)
        model = {
            _megatron_name(name): torch.empty(
                local_shape(shape, split_of(name, config), ranks), dtype=_dtype(name)
            )
            for name, shape in stored_shapes(config).items()
        }
        args = argparse.Namespace(num_layers=config.n_layer, tensor_model_parallel_size=ranks)
        with torch.serialization.skip_data():
            torch.save({"args": args, "model": model, "iteration": 1}, file)
        shared = torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
        with shared, torch.serialization.safe_globals([argparse.Namespace]):
            model = torch.load(file, mmap=True, weights_only=True)["model"]
        for name, tensor in model.items():
            _fill(name, tensor, pool, rank)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")


def _fill(name: str, tensor: torch.Tensor, pool: torch.Tensor, rank: int) -> None:
    if ".norm." in name or "final_norm" in name or name.endswith(".D"):
        tensor.fill_(1.0)
        return
    if name.endswith(".A_log"):
        tensor.copy_(torch.linspace(0, 2.7, tensor.numel()))
        return
    mean, scale = (-4.0, 1.0) if name.endswith("dt_bias") else (0.0, tensor[0].numel() ** -0.5)
    if name.endswith("conv1d.bias"):
        scale = 0.1
    values = (mean + scale * pool).to(tensor.dtype)
    for i, part in enumerate(tensor.view(-1).split(_POOL_SIZE // 2)):
        start = (len(name) * 65_537 + i * 4_099 + rank * 257) % (_POOL_SIZE // 2)
        part.copy_(values[start : start + part.numel()])


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name.endswith((".A_log", ".D", ".dt_bias")) else torch.bfloat16


def _megatron_name(name: str) -> str:
    name = name.replace("backbone.embedding.", "embedding.word_embeddings.")
    name = name.replace("backbone.norm_f.", "decoder.final_norm.").replace("lm_head.", "output_layer.")
    return name.replace("backbone.layers.", "decoder.layers.")


def write_vocabulary(file: Path, size: int) -> None:
    """A SentencePiece model that reads any text as bytes, with words that occur nowhere to fill it."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def pieces() -> Iterator[bytes]:
        names = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
        names += [(f"\u2581w{i}", 1) for i in range(size - len(names))]
        for score, (name, kind) in enumerate(names):
            yield field(
                1, field(1, name.encode()) + b"\x15" + struct.pack("<f", -score) + bytes([3 << 3, kind])
            )

    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type BPE, byte_fallback
    file.write_bytes(b"".join(pieces()) + field(2, trainer))


def convert(folder: Path) -> dict[str, float]:
    """In this process: seconds, and its peak of resident memory."""
    before = _resident("VmRSS")
    start = time.perf_counter()
    checkpoint = open_megatron(folder / "checkpoint", folder / PUBLISHED_8B_FILE)
    opened = time.perf_counter() - start
    write_megatron(checkpoint, folder / "mamba2-8b-converted")
    seconds = time.perf_counter() - start
    return {
        "gb": checkpoint.size_bytes / 1e9,
        "seconds_to_open": opened,
        "seconds": seconds,
        "gb_per_s": checkpoint.size_bytes / 1e9 / seconds,
        "rss_before_mb": before / 1e6,
        "peak_rss_mb": _resident("VmHWM") / 1e6,
    }


def _resident(key: str) -> int:
    """Bytes of this process's memory; getrusage would tell the peak of the process that started it, too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def run(folder: Path, layers: int, ranks: int) -> None:
    start = time.perf_counter()
    write_vocabulary(folder / PUBLISHED_8B_FILE, 256_000)
    write_checkpoint(folder / "checkpoint", config_8b(layers), ranks)
    print(f"checkpoint made in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    os.sync()
    command = [sys.executable, __file__, "--convert", str(folder)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    for key, value in json.loads(out).items():
        print(f"{key:<18} {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="56 make 16.6 GB, twice")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument(
        "--convert", type=Path, help="measure converting what is in this folder, in this process"
    )
    options = parser.parse_args()
    if options.convert is not None:
        print(json.dumps(convert(options.convert)))
    elif options.keep is not None:
        options.keep.mkdir(parents=True)
        run(options.keep, options.layers, options.ranks)
    else:
        with tempfile.TemporaryDirectory() as name:
            run(Path(name), options.layers, options.ranks)


if __name__ == "__main__":
    main()
