"""Quantize the bundled Mamba2 model to 4-bit weights and 8-bit activations, save, load, continue prompts.

python examples/quantize_and_generate.py [FOLDER] [SAMPLES]
"""

from __future__ import annotations

import sys
from pathlib import Path

import quamba

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def main(folder: str = "out/mamba2-demo-w4a8", samples: str = "64") -> None:
    model = quamba.load(ASSETS / "models/mamba2-demo")
    texts = quamba.CalibrationSpec(ASSETS / "data/calibration.txt", num=int(samples), seqlen=256)
    small, report = quamba.quantize(model, "w4a8", texts)
    print(f"{model.size_bytes / 2**20:.1f} MiB -> {small.size_bytes / 2**20:.1f} MiB")
    print(f"{len(report.layers)} matrices in {sum(report.seconds.values()):.0f} s")
    quamba.save(small, folder, overwrite=True)

    again = quamba.load(folder)
    sampling = quamba.SamplingParams(temperature=0.7, top_k=0, top_p=0.9)
    for answer in again.generate(["It was a", "The captain"], max_new_tokens=40, sampling=sampling, seed=0):
        print(again.tokenizer.decode(answer.prompt_ids) + answer.text)


if __name__ == "__main__":
    main(*sys.argv[1:])
