"""``quamba inspect``: the plan as a table, from config files only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, mib, table
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.formats.weight import WeightFormat
    from quamba.kernels.registry import Kernels
    from quamba.recipes.plan import BlockPlan, Plan
    from quamba.recipes.recipe import Recipe


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--recipe", metavar="NAME|FILE", help="What this recipe would do to a float MODEL.")
@click.option("--pretrained_dir", metavar="DIR", help="Where MODEL may be found by its name.")
@click.option("--device", metavar="cpu|cuda", help="Also say on which backend every op would run there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None, recipe: str | None, pretrained_dir: str | None, device: str | None, as_json: bool
) -> None:
    """Show how a quantized MODEL is stored, or what --recipe does, without loading weights."""
    from quamba.recipes.recipe import load_recipe

    if model is None:
        if recipe is None:
            raise QuambaError("There is nothing to inspect, expected MODEL, --recipe or both.")
        _print_recipe(load_recipe(recipe), as_json)
        return
    from quamba.cli.planned import read_plan

    planned = read_plan(model, recipe, pretrained_dir)
    plan, stored = planned.plan, planned.stored
    rows = plan_rows(plan)
    size_bytes = sum(row["bytes"] for row in rows)
    facts = {
        "model": model,
        "family": plan.config.family,
        "recipe": plan.recipe.name,
        "format": {"quamba": "ours", "zoo": "published"}.get(planned.format or ""),
        "source": stored.get("source"),
        "calibration": _described(stored.get("calibration")),
        "solver": plan.recipe.solver.kind,
        "rotated": plan.rotate,
        "percentile_alpha": None if plan.recipe.solver.kind == "unknown" else plan.alpha,
        "size_mib": round(mib(size_bytes), 3),
    }
    kernels: dict[str, Any] = {"kernels": None} if device is None else _kernels(device, plan)
    if as_json:
        click.echo(json.dumps({**facts, **kernels, "plan": rows}, indent=2))
        return
    for key, value in facts.items():
        if value is not None:
            click.echo(f"{key:<17} {value}")
    shown = ("part", "precision", "weights", "activations", "state")
    cells = [[row[key] for key in shown] + [f"{mib(row['bytes']):.2f}"] for row in rows]
    click.echo(table((*shown, "MiB"), cells))
    if device is not None:
        _print_kernels(kernels, device)


def _print_kernels(kernels: dict[str, Any], device: str) -> None:
    reason = f" {kernels['reason']}" if kernels["reason"] else ""
    click.echo(f"\nKernels on {device}: {kernels['kernels']}.{reason}")
    click.echo(f"A step of decoding: {kernels['decoding']}.")
    click.echo(table(("op", "backend"), list(kernels["ops"].items())))


def _kernels(device: str, plan: Plan) -> dict[str, Any]:
    """kernels: those that a model is bound to on this device; reason: why not the fast ones, or None;
    ops: the backend of every op; decoding: whether a step is fused."""
    import torch

    from quamba.api import choose_device
    from quamba.kernels.registry import REFERENCE, choose_kernels, why_not_fast

    kernels, reason = REFERENCE, None
    if device.partition(":")[0] == "cuda" and torch.cuda.device_count() == 0:
        reason = "The Triton kernels need a CUDA device, and torch sees none here."
    else:
        target = choose_device(device)
        kernels = choose_kernels(target)
        reason = why_not_fast(target)
    return {
        "kernels": kernels.name,
        "reason": reason,
        "ops": {
            field.name: _backend(getattr(kernels, field.name))
            for field in dataclasses.fields(kernels)
            if field.name != "name"
        },
        "decoding": _decoding(kernels, plan),
    }


def _decoding(kernels: Kernels, plan: Plan) -> str:
    if kernels.name == "reference":
        return "op by op"
    import torch

    from quamba.recipes.skeleton import skeleton
    from quamba.runtime.step import describe_step

    dtype = torch.float16 if kernels.name == "triton" else torch.float32
    return describe_step(skeleton(plan).set_compute_dtype(dtype).use_kernels(kernels))


def _backend(op: Callable[..., Any]) -> str:
    """The folder of ``kernels/`` that a function is from."""
    return op.__module__.removeprefix("quamba.kernels.").partition(".")[0]


def _described(calibration: dict[str, Any] | None) -> str | None:
    if not calibration:
        return None
    c = calibration
    return f"{c.get('num')} x {c.get('seqlen')} tokens of {c.get('source')}, seed {c.get('seed')}"


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row for the embedding, for each run of equal blocks, and for the head; bytes as stored."""
    sizes = _sizes(plan)
    rows = [_row("embedding", "", _format(plan.embedding), "", "", sizes.get("backbone.embedding", 0))]
    start = 0
    for end in range(1, len(plan.blocks) + 1):
        if end < len(plan.blocks) and plan.blocks[end] == plan.blocks[start]:
            continue
        name = f"block {start}" if end == start + 1 else f"blocks {start}-{end - 1}"
        size = sum(sizes[f"backbone.layers.{i}"] for i in range(start, end))
        rows.append(_block_row(name, plan.blocks[start], plan, size))
        start = end
    head_input = "int8" if plan.int8_head_input else "float"
    size = sizes.get("lm_head", 0) + sizes.get("backbone.norm_f", 0)
    tied = plan.config.tie_embeddings and not plan.folds_norms and plan.embedding is None
    rows.append(_row("head", "", "the embedding" if tied else _format(plan.head), head_input, "", size))
    return rows


def _block_row(name: str, block: BlockPlan, plan: Plan, size: int) -> dict[str, Any]:
    from quamba.recipes.plan import projections

    formats: dict[str, list[str]] = {}
    for projection in projections(plan.config):
        formats.setdefault(_format(block.weights.get(projection)), []).append(projection)
    formats.setdefault(_format(block.conv), []).append("conv1d")
    weights = "; ".join(f"{', '.join(names)}: {format}" for format, names in formats.items())
    activations = "int8" if block.int8_activations else "float"
    if block.int8_activations and plan.group_heads is not None:
        activations += f", {plan.group_heads.heads} x {plan.group_heads.channels} groups"
    return _row(name, block.label, weights, activations, block.state, size)


def _row(
    part: str, precision: str, weights: str, activations: str, state: str, size_bytes: int
) -> dict[str, Any]:
    return {
        "part": part,
        "precision": precision,
        "weights": weights,
        "activations": activations,
        "state": state,
        "bytes": size_bytes,
    }


def _format(format: WeightFormat | None) -> str:
    if format is None:
        return "float"
    scales = format.granularity.replace("_", " ")
    size = "" if format.group_size is None else f" {format.group_size}"
    return f"int{format.bits} {scales}{size}{'' if format.multiples is None else ', whole multiples'}"


def _sizes(plan: Plan) -> dict[str, int]:
    """Bytes of each block, the embedding, the final norm and the head, floats in float16."""
    import torch

    from quamba.recipes.skeleton import skeleton

    sizes: dict[str, int] = {}
    for name, tensor in skeleton(plan).set_compute_dtype(torch.float16).named_tensors().items():
        parts = name.split(".")
        depth = {"lm_head": 1, "backbone": 3 if parts[1] == "layers" else 2}[parts[0]]
        part = ".".join(parts[:depth])
        sizes[part] = sizes.get(part, 0) + tensor.nbytes
    return sizes


def _print_recipe(recipe: Recipe, as_json: bool) -> None:
    fields = recipe.to_dict()
    if as_json:
        click.echo(json.dumps(fields, indent=2))
    else:
        click.echo(table(("field", "value"), [(key, json.dumps(value)) for key, value in fields.items()]))
