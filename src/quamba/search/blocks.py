"""Every block in every precision, quantized once: models of mixed precision are put together from these.

One model of the recipe's own precision is quantized as ever, its weights making up for the errors of the
layers before them. What another precision means is then kept apart from what another rounding of weights
would do by chance:

- int4 weights are the same integers with int8 activations (W4A8) and without (W4A16);
- float blocks are the float model's, in the quantized model's coordinates;
- weights of another width are those of a second model, solved without making up for earlier errors: these are
  not the errors that the blocks before them have in a mixed model.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from quamba.analysis.align import align, channel_orders
from quamba.calibration.sites import BlockScales
from quamba.checkpoints.quantized import StoredModel, read_quantized, write_quantized
from quamba.kernels.registry import Kernels
from quamba.models.config import Mamba2Config, ModelConfig
from quamba.models.lm import Block, MambaLM
from quamba.quantization.convert import set_block_formats
from quamba.quantization.parameters import round_parameters
from quamba.quantization.pipeline import Progress, quantize_model
from quamba.quantization.work import WorkFolder
from quamba.recipes.plan import Plan, resolve
from quamba.recipes.recipe import Override, Precision, Recipe
from quamba.recipes.report import Report

_Module = TypeVar("_Module", bound=nn.Module)
#: Float activations -> the label whose integer weights are theirs too.
_SAME_WEIGHTS = {"W4A16": "W4A8"}
_FLOAT = "FP16"


def precision_of(label: str, state: str) -> Precision:
    """``W4A8`` and the like, with this SSM state."""
    return dataclasses.replace(Recipe.from_dict({"name": label, "blocks": label}).blocks, state=state)


def uniform_recipe(base: Recipe, label: str) -> Recipe:
    """The base recipe with all its blocks in one precision."""
    return base.replace(blocks=precision_of(label, base.blocks.state), overrides=())


def mixed_recipe(base: Recipe, labels: Sequence[str], name: str) -> Recipe:
    """The base recipe with one precision a block; the most frequent one is that of ``blocks``."""
    most = max(dict.fromkeys(labels), key=list(labels).count)
    overrides = tuple(
        Override(
            blocks=tuple(i for i, other in enumerate(labels) if other == label),
            precision=precision_of(label, base.blocks.state),
        )
        for label in dict.fromkeys(labels)
        if label != most
    )
    return base.replace(name=name, blocks=precision_of(most, base.blocks.state), overrides=overrides)


@dataclass(frozen=True)
class BankPlan:
    """Which models are quantized for a bank.

    labels   of the search; the first is the base recipe's own
    main     the label of the model that embedding and head are taken from
    recipes  label -> recipe of its model; labels not named here get their blocks from the main one's
    """

    labels: tuple[str, ...]
    main: str
    recipes: Mapping[str, Recipe]


def plan_bank(base: Recipe, labels: Sequence[str], config: ModelConfig) -> BankPlan:
    main = _SAME_WEIGHTS.get(labels[0], labels[0])
    if main not in labels:
        main = labels[0]
    if main == _FLOAT:
        main = next(label for label in labels if label != _FLOAT)
    recipes = {main: uniform_recipe(base, main)}
    for label in labels:
        if label not in (main, _FLOAT) and (_donor(label, labels) is None or _other(base, label, config)):
            solver = dataclasses.replace(base.solver, propagate_error=False)
            recipes[label] = uniform_recipe(base, label).replace(solver=solver)
    return BankPlan(tuple(labels), main, recipes)


def _donor(label: str, labels: Sequence[str]) -> str | None:
    """Whose weights a label has too."""
    donor = _SAME_WEIGHTS.get(label)
    return donor if donor in labels else None


def _other(base: Recipe, label: str, config: ModelConfig) -> list[str]:
    """The projections that a label cannot take from its donor: their formats differ, or their columns contain
    the scales of the int8 codes that they are multiplied with."""
    donor, own = (resolve(uniform_recipe(base, p), config).blocks[0] for p in (_SAME_WEIGHTS[label], label))
    folded = ("x_proj",) if donor.folds_x_scale else ()
    return [n for n in own.weights if n in folded or own.weights[n] != donor.weights.get(n)]


@dataclass(frozen=True)
class BlockBank:
    """
    base     recipe of embedding, head and solver
    ends     the model whose embedding, final norm and head all models have
    blocks   label -> the block of every layer
    reports  label -> what is known of these blocks
    """

    base: Recipe
    ends: StoredModel
    blocks: Mapping[str, Sequence[Block]]
    reports: Mapping[str, Report]

    @property
    def config(self) -> ModelConfig:
        return self.ends.network.config

    @property
    def device(self) -> torch.device:
        return self.ends.network.device

    def plan(self, labels: Sequence[str], name: str = "w4ax") -> Plan:
        return resolve(mixed_recipe(self.base, labels, name), self.config)

    def assemble(self, labels: Sequence[str]) -> MambaLM:
        """The model with block i of ``blocks[labels[i]]``; it shares all tensors with the bank."""
        plan = self.plan(labels)
        return self._around([_fitting(self.blocks[label][i], plan, i) for i, label in enumerate(labels)])

    def _around(self, blocks: Sequence[Block]) -> MambaLM:
        network, ends = MambaLM.empty(self.config), self.ends.network
        network.backbone.embedding = ends.backbone.embedding
        network.backbone.norm_f = ends.backbone.norm_f
        network.lm_head, network.tied = ends.lm_head, ends.tied
        for i, block in enumerate(blocks):
            network.backbone.layers[i] = block
        return network

    def report(self, labels: Sequence[str], name: str = "w4ax") -> Report:
        """What is known of an assembled model: of each block the lines of the model that it is from."""
        plan = self.plan(labels, name)
        lines = [line for i, label in enumerate(labels) for line in _lines(self.reports[label], i)]
        assert self.ends.report is not None
        ends = [line for line in self.ends.report.layers if not line["name"].startswith("layers.")]
        embedding = [line for line in ends if line["name"] == "embedding"]
        head = [line for line in ends if line["name"] != "embedding"]
        orders = []
        if plan.group_heads is not None:
            own = [self.reports[label].head_groups for label in labels]
            orders = [own[i][i] if own[i] else _unmoved(plan) for i in range(len(labels))]
        calibration = self.ends.calibration
        return Report(plan.recipe.to_dict(), calibration, [*embedding, *lines, *head], orders)

    def to(self, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> BlockBank:
        """In place."""
        for blocks in self.blocks.values():
            self._around(blocks).set_compute_dtype(dtype).to(device).use_kernels(kernels)
        return self


def bank_folders(root: Path, plan: BankPlan, identity: object) -> dict[str, Path]:
    """Where each label's model is kept: under a name that changes with all that went into it.

    identity  JSON-ready, of the float model and the calibration text
    """
    return {
        label: root / f"{label}-{digest([recipe.to_dict(), identity])}"
        for label, recipe in plan.recipes.items()
    }


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def fill_bank(
    folders: Mapping[str, Path],
    plan: BankPlan,
    network: MambaLM,
    calibration: Any,
    source: str,
    work: Path,
    progress: Progress,
) -> int:
    """Quantize the models that are not there yet; how many these were. Each folder appears complete.

    work  where stages that are done are kept until all models are there: a killed run goes on from them, and
          what two precisions have in common is computed once
    """
    missing = [label for label, folder in folders.items() if not folder.is_dir()]
    if not missing:
        return 0
    stages = WorkFolder(work)
    for label in missing:
        small, resolved, report = quantize_model(
            network, plan.recipes[label], calibration, progress, work=stages
        )
        small.set_compute_dtype(network.lm_head.compute_dtype)
        write_quantized(folders[label], small, resolved, source=source, report=report, tokenizer=None)
    stages.clear()
    return len(missing)


@torch.no_grad()
def read_bank(folders: Mapping[str, Path], plan: BankPlan, base: Recipe, network: MambaLM) -> BlockBank:
    """The bank on the CPU: quantized models mapped from their files, other blocks made of these.

    network  the float model, on the CPU
    """
    models = {label: read_quantized(folder) for label, folder in folders.items()}
    main = models[plan.main]
    blocks: dict[str, Sequence[Block]] = {}
    reports: dict[str, Report] = {}
    for label in plan.labels:
        donor = _donor(label, plan.labels)
        lacks = _other(base, label, main.network.config) if donor is not None else []
        takes_all = label in models and (donor is None or (lacks and main.network.config.family == "mamba2"))
        if takes_all:
            blocks[label], reports[label] = models[label].network.blocks, _report(models[label])
            continue
        source = models[donor] if donor is not None else main
        blocks[label] = _derived(base, label, source, models.get(label), lacks, network)
        reports[label] = _derived_report(label, source, models.get(label), lacks)
    return BlockBank(base, main, blocks, reports)


def _derived(
    base: Recipe,
    label: str,
    source: StoredModel,
    own: StoredModel | None,
    lacks: Sequence[str],
    network: MambaLM,
) -> list[Block]:
    """Blocks of a label with float activations, in the coordinates of another label's model.

    source  whose integer weights they have, but for those that they lack and have of their ``own`` model
    """
    plan = resolve(uniform_recipe(base, label), network.config)
    aligned = align(source.network, channel_orders(source.plan, source.report), network).network
    round_parameters(aligned, plan)
    aligned.set_compute_dtype(source.network.lm_head.compute_dtype)
    for i, block in enumerate(aligned.blocks):
        ssm = source.network.blocks[i].mixer.ssm
        scales = BlockScales(state_scale=ssm.state_scale, state_group=ssm.state_group)
        set_block_formats(block, plan.blocks[i], scales)
        for name in plan.blocks[i].weights:
            donor = own if name in lacks else source
            assert donor is not None, f"{label} has no {name} of its own"
            getattr(block.mixer, name).set_weight(getattr(donor.network.blocks[i].mixer, name).weight)
    return aligned.blocks


def _derived_report(label: str, source: StoredModel, own: StoredModel | None, lacks: Sequence[str]) -> Report:
    theirs, mine = _report(source), None if own is None else _report(own)
    lines = [] if label == _FLOAT else list(theirs.layers)
    if mine is not None:
        known = {line["name"]: line for line in mine.layers}
        lines = [known[n] if (n := line["name"]).rpartition(".")[2] in lacks else line for line in lines]
    return dataclasses.replace(theirs, layers=lines)


def _fitting(block: Block, plan: Plan, layer: int) -> Block:
    """The block itself, or one with the scales of its int8 state in the shape of the mixed model.

    Head groups are those of the whole model. A block from a model without them has one scale for all groups;
    in a model without them a block has the largest scale of its groups.
    """
    ssm, grouped = block.mixer.ssm, plan.group_heads is not None
    scale = ssm.state_scale
    if plan.blocks[layer].state != "int8" or scale is None or grouped == (ssm.state_group is not None):
        return block
    block = _twin(block)
    block.mixer = _twin(block.mixer)
    block.mixer.ssm = ssm = _twin(ssm)
    if grouped:
        ssm.state_scale = scale.expand(plan.state_groups, -1).contiguous()
        ssm.state_group = torch.zeros(plan.config.d_inner, dtype=torch.int32, device=scale.device)
    else:
        ssm.state_scale, ssm.state_group = scale.amax(dim=0, keepdim=True), None
    return block


def _twin(module: _Module) -> _Module:
    """Another module around the same tensors and parts, which may then be given others."""
    twin = copy.copy(module)
    twin._modules, twin._buffers = dict(module._modules), dict(module._buffers)
    return twin


def _lines(report: Report, layer: int) -> list[dict[str, Any]]:
    return [line for line in report.layers if line["name"].startswith(f"layers.{layer}.")]


def _report(model: StoredModel) -> Report:
    assert model.report is not None, "models of the bank are written with their reports"
    return model.report


def _unmoved(plan: Plan) -> dict[str, Any]:
    """The ``ChannelOrder`` of a block whose heads and channels stay where they are, as a dict."""
    config, groups = plan.config, plan.group_heads
    assert isinstance(config, Mamba2Config) and groups is not None
    head_ends = _even_ends(config.nheads // config.ngroups, groups.heads)
    channel_ends = _even_ends(config.headdim, groups.channels)
    return {
        "head_perm": list(range(config.nheads)),
        "channel_perm": list(range(config.d_inner)),
        "head_group_range": [head_ends] * config.ngroups,
        "dim_group_range": [[channel_ends] * groups.heads] * config.ngroups,
    }


def _even_ends(size: int, parts: int) -> list[int]:
    return [size * (k + 1) // parts for k in range(parts)]
