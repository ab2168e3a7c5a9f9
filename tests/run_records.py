"""What evaluate and profile write, in short."""

from __future__ import annotations

from typing import Any

RULE = "mean over the L-1 predicted tokens of each non-overlapping window"


def recipe(name: str = "w8a8", weights: str = "int8", **changes: Any) -> dict[str, Any]:
    activations = "float" if name.endswith("a16") else "int8"
    return {"name": name, "blocks": {"weights": weights, "activations": activations}, **changes}


def text(perplexity: float | str, *, windows: int = 4, complete: bool = False) -> dict[str, Any]:
    return {
        "source": "eval.txt",
        "complete": complete,
        "perplexity": perplexity,
        "tokens_scored": windows * 1023,
        "windows": windows,
        "window_length": 1024,
        "rule": RULE,
    }


def task(
    name: str, metric: str, value: float, *, samples: int | None = 100, shots: int | None = 0
) -> dict[str, Any]:
    return {
        "task": name,
        "shots": shots,
        "samples": samples,
        "metric": metric,
        "value": value,
        "stderr": 0.01,
    }


def log(source: str = "models/demo", **fields: Any) -> dict[str, Any]:
    """A log of a float model; ``fields`` replace and add."""
    config = {"family": "mamba2", "d_model": 384, "n_layer": 6, "vocab_size": 4096}
    return {
        "args": {"limit": None, "testing": False, "fewshot": None, "max_length": None, "allow_leak": False},
        "ppl": {},
        "model": {"source": source, "device": "cpu", "config": config},
        "recipe": None,
        "calibration": {},
        "size_mib": 28.75,
        "versions": {"lm_eval": "0.4.13"},
        "scored": {},
        "tasks": [],
        **fields,
    }


def quantized(source: str = "models/demo", **fields: Any) -> dict[str, Any]:
    calibration = {"source": "calib.txt", "num": 16, "fingerprint": "1"}
    return log(source, **{"recipe": recipe(), "calibration": calibration, "size_mib": 8.886, **fields})


def profile(source: str = "models/demo", precision: str = "w8a8", **fields: Any) -> dict[str, Any]:
    """What ``quamba profile --json`` prints."""
    latency = {
        mode: {"median_ms": ms, "p5_ms": 0.9 * ms, "p95_ms": 1.2 * ms, "tokens_per_s": 1000.0 / ms}
        for mode, ms in (("ttft", 40.0), ("tpot", 8.0), ("ttlt", 300.0))
    }
    return {
        "model": source,
        "precision": precision,
        "spec": {"batch_size": 1, "prompt_len": 256, "gen_len": 32, "cuda_graph": False},
        "device": "cpu",
        "hardware": "A CPU",
        "threads": 2,
        "size": {
            "weights_bytes": {"total": 9317844},
            "cache_bytes_per_sequence": {"total": 2**20},
        },
        "latency": latency,
        "compare": None,
        **fields,
    }
