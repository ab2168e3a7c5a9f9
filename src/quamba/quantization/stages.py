"""The stages of a quantization. Each walks through the model once, with one block in working memory.

What a stage finds out of a block is kept in a work folder as soon as it is known, and so are, now and then,
the hidden states at the entrance of the next block: a run that was interrupted goes on there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quamba.calibration.collect import Batch, Watch
from quamba.calibration.observers import AbsMax, ChannelMean
from quamba.calibration.sites import BlockObservers, BlockScales, scale_of
from quamba.formats.weight import QuantizedWeight, WeightFormat
from quamba.models.config import Mamba2Config
from quamba.models.lm import MambaLM
from quamba.quantization.convert import set_block_formats
from quamba.quantization.embedding import loss_metric
from quamba.quantization.gptq import Problem, Solution, SolveLosses, joined
from quamba.quantization.keys import Keys
from quamba.quantization.memory import Budget
from quamba.quantization.parameters import round_block
from quamba.quantization.solve import ProjectionSolver, report_line
from quamba.quantization.source import FloatModel
from quamba.quantization.states import Shelf, states_bytes
from quamba.quantization.streams import Stream, shapes_of
from quamba.quantization.work import WorkFolder, key_of
from quamba.recipes.plan import Plan
from quamba.transforms.head_grouping import ChannelOrder, group_heads

# Writing hidden states to the work folder may take this share of the time, at this speed of the disk.
KEEP_SHARE = 0.1
_DISK_BYTES_PER_SECOND = 200e6
# Hidden states that are there while a stage runs, counting inputs of out_proj that save a walk.
_WITH_KEPT, _OF_TWO_STREAMS = 8, 2


class Progress(Protocol):
    """Told of each stage and of each unit of work done in it."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, count: int = 1) -> None: ...


@dataclass
class Texts:
    """What each stage reads of the calibration text; empty where a plan needs none."""

    statistics: Sequence[Batch] = ()
    scales: Sequence[Batch] = ()
    solver: Sequence[Batch] = ()
    metric: Sequence[Tensor] = ()


class Walk:
    """Streams on their way through the blocks, of which a work folder keeps where they are.

    key  i -> what identifies the hidden states at the entrance of block i
    """

    def __init__(self, work: WorkFolder | None, streams: Sequence[Stream], key: Callable[[int], str]) -> None:
        self._work, self._streams, self._key = work, streams, key
        self._kept: list[str] = []
        self._last = time.perf_counter()
        size = sum(states_bytes([shape[:2] for shape in s.states.shapes], s.width) for s in streams)
        self._interval = size / _DISK_BYTES_PER_SECOND / KEEP_SHARE if KEEP_SHARE else 0.0

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for stream in self._streams:
            stream.close()
        if kind is None:
            self._drop()

    def begin(self, target: int) -> int:
        """Put the streams where they are known, as near before block ``target`` as can be.

        returns  the block they are at
        """
        for i in range(target, 0, -1):
            keys = self._keys(i)
            if self._work is not None and all(self._work.has_blob(key) for key in keys):
                for stream, key in zip(self._streams, keys, strict=True):
                    stream.states.restore(self._work.blob(key))
                self._kept = keys
                return i
        for stream in self._streams:
            stream.begin()
        return 0

    def keep(self, i: int) -> None:
        """The streams are at the entrance of block i now."""
        if self._work is None or time.perf_counter() - self._last < self._interval:
            return
        for stream, key in zip(self._streams, self._keys(i), strict=True):
            self._work.put_blob(key, stream.states.pieces())
        self._drop()
        self._kept, self._last = self._keys(i), time.perf_counter()

    def _keys(self, i: int) -> list[str]:
        return [key_of(self._key(i), number) for number in range(len(self._streams))]

    def _drop(self) -> None:
        for key in self._kept:
            if self._work is not None:
                self._work.drop(key)
        self._kept = []


class Stages:
    """
    source   the float model
    scratch  gives a folder for hidden states that do not fit into memory
    home     device of the quantized model
    """

    def __init__(
        self,
        source: FloatModel,
        plan: Plan,
        texts: Texts,
        keys: Keys,
        budget: Budget,
        progress: Progress,
        *,
        work: WorkFolder | None,
        scratch: Callable[[], Path],
        home: torch.device,
    ) -> None:
        self._source, self._plan, self._texts, self._keys = source, plan, texts, keys
        self._budget, self._progress = budget, progress
        self._work, self._scratch, self._home = work, scratch, home
        self._layers = len(plan.blocks)

    @torch.inference_mode()
    def head_orders(self) -> dict[int, ChannelOrder]:
        """Layer -> order, for a plan with head groups; from channel means of the float model."""
        groups, config = self._plan.group_heads, self._plan.config
        if groups is None:
            return {}
        assert isinstance(config, Mamba2Config)
        found = [self._get(self._keys.statistics(i)) for i in range(self._layers)]
        missing = [i for i, result in enumerate(found) if result is None]
        sequences = sum(len(ids) for ids, _ in self._texts.statistics)
        self._progress.stage("Head statistics", self._layers * sequences)
        if missing:
            stream = self._stream(
                self._texts.statistics,
                lambda ids: self._source.embed(ids, rotated=False, rounded=False),
                "statistics",
            )
            with Walk(self._work, [stream], self._keys.statistics_stream) as walk:
                start = walk.begin(missing[0])
                self._progress.step(start * sequences)
                for i in range(start, missing[-1] + 1):
                    means = ChannelMean(config.d_inner, self._budget.device)
                    watch = Watch("mixer.conv1d", slice(0, config.d_inner), means)
                    stream.advance(self._source.fused_block(i), [watch], on_batch=self._progress.step)
                    found[i] = self._put(self._keys.statistics(i), {"means": means.value()})
                    walk.keep(i + 1)
        done = missing[-1] + 1 if missing else 0
        self._progress.step((self._layers - done) * sequences)
        orders = {}
        for i, result in enumerate(found):
            assert result is not None
            stats = result["means"].view(config.ngroups, -1, config.headdim)
            orders[i] = group_heads(stats, groups.heads, groups.channels)
        return orders

    @torch.inference_mode()
    def activation_scales(self) -> tuple[list[BlockScales], Tensor | None]:
        """Scales of every block, and of the head's input; from the float model with rounded parameters."""
        plan, keys = self._plan, self._keys
        if not plan.needs_activation_scales:
            return [BlockScales() for _ in plan.blocks], None
        found = [self._get(keys.scales(i)) for i in range(self._layers)]
        head = self._get(keys.head_scale()) if plan.int8_head_input else None
        missing = [i for i, result in enumerate(found) if result is None]
        ends = self._layers if plan.int8_head_input and head is None else missing[-1] + 1 if missing else 0
        sequences = sum(len(ids) for ids, _ in self._texts.scales)
        self._progress.stage("Activation scales", self._layers * sequences)
        if ends:
            stream = self._stream(self._texts.scales, self._source.embed, "scales")
            with Walk(self._work, [stream], keys.scales_stream) as walk:
                start = walk.begin(missing[0] if missing else ends)
                self._progress.step(start * sequences)
                for i in range(start, ends):
                    scales = self._watch_block(stream, i)
                    if found[i] is None:
                        found[i] = self._put(keys.scales(i), _pack(scales))
                    walk.keep(i + 1)
                if ends == self._layers and plan.int8_head_input:
                    head = self._put(keys.head_scale(), {"scale": self._head_scale(stream)})
        self._progress.step((self._layers - ends) * sequences)
        device = self._budget.device
        return (
            [_unpack(result, device) for result in found if result is not None],
            None if head is None else head["scale"].to(device),
        )

    def _watch_block(self, stream: Stream, i: int) -> BlockScales:
        order = self._source.orders.get(i)
        observers = BlockObservers(self._plan, i, None if order is None else order.group, self._budget.device)
        prefix = f"backbone.layers.{i}."
        watches = [Watch(w.path.removeprefix(prefix), w.channels, w.observer) for w in observers.watches]
        states = [w.observer for w in observers.state_watches]
        stream.advance(
            self._source.rounded_block(i),
            watches,
            states[0] if states else None,
            with_state=any(block.state == "int8" for block in self._plan.blocks),
            on_batch=self._progress.step,
        )
        return observers.scales()

    def _head_scale(self, stream: Stream) -> Tensor:
        size, norm_f = self._plan.config.d_model, self._source.norm_f()
        maximum = AbsMax(torch.zeros(size, dtype=torch.int64, device=self._budget.device), 1)
        for x, mask in zip(stream.normed(norm_f), stream.masks, strict=True):
            assert isinstance(x, Tensor)
            maximum.update(x, mask)
        return scale_of(maximum.value())[0]

    def embedding(self, result: MambaLM) -> list[dict[str, Any]]:
        """Put the table into the quantized model; lines for the report.

        Rows are rounded for what their errors cost in loss, or to nearest.
        """
        plan, table, format = self._plan, result.backbone.embedding, self._plan.embedding
        if format is None:
            table.weight = self._parameter(self._source.table_slabs())
            if result.tied:
                result.lm_head.weight = table.weight
            return []
        solver = plan.recipe.solver
        solves = solver.kind == "gptq" and format.bits == 4
        found = self._metric() if solves else None
        table.weight, losses = self._quantize_rows(
            self._source.table_slabs(whole=_couples_rows(format)), format, found, self._keys.embedding
        )
        return [report_line("embedding", format, losses)]

    def _metric(self) -> dict[str, Tensor]:
        key = self._keys.metric()
        found = self._get(key)
        if found is not None:
            return found
        self._progress.stage("Embedding", 2 * self._layers)
        config, batches = self._plan.config, self._texts.metric
        shapes = [(ids.shape[0], ids.shape[1]) for ids in batches] * (self._layers + 1)
        metric = loss_metric(
            batches,
            self._source.embed,
            self._source.rounded_block,
            self._source.norm_f(),
            self._source.head_slabs,
            config=config,
            shelf=self._shelf(states_bytes(shapes, config.d_model)),
            on_block=self._progress.step,
        )
        return self._put(key, {"hessian": metric})

    def weights(
        self, result: MambaLM, scales: Sequence[BlockScales], head_scale: Tensor | None
    ) -> list[dict[str, Any]]:
        """Blocks in order, then the head; lines for the report.

        Each solver sees what the quantized layers before it give.
        """
        plan, keys = self._plan, self._keys
        self._progress.stage("Weights", self._layers + 1)
        found = [self._get(keys.weights(i)) for i in range(self._layers)]
        missing = [i for i, block in enumerate(found) if block is None]
        moments = self._get(keys.moments())
        solves = plan.recipe.solver.kind == "gptq"
        needs_moments = solves and plan.head is not None and moments is None
        ends = self._layers if needs_moments else missing[-1] + 1 if missing else 0
        streams = self._weight_streams(result) if solves and ends else []
        solver = ProjectionSolver(plan.recipe.solver, *_two(streams))
        norm_f = self._source.norm_f()
        norm_f.out_scale = head_scale
        with Walk(self._work, streams, keys.weights_stream) as walk:
            start = walk.begin(missing[0] if missing else ends) if ends else 0
            for i in range(self._layers):
                ready = found[i]
                if ready is None or start <= i < ends:
                    ready = self._finish_block(result, i, ready, scales[i], solver, streams)
                    walk.keep(i + 1)
                found[i] = ready
                _fill(result.blocks[i], ready, self._home)
                self._progress.step()
            if needs_moments:
                aim = self._source.norm_f(rounded=False)
                moments = self._put(keys.moments(), solver.head_moments(result.lm_head, norm_f, aim))
        _fill(result.backbone.norm_f, norm_f.state_dict(), self._home)
        lines = [line for i, ready in enumerate(found) if ready for line in self._lines(i, ready)]
        lines += self._head(result, moments if solves else None)
        self._progress.step()
        return lines

    def _finish_block(
        self,
        result: MambaLM,
        i: int,
        ready: Mapping[str, Tensor] | None,
        scales: BlockScales,
        solver: ProjectionSolver,
        streams: Sequence[Stream],
    ) -> dict[str, Tensor]:
        """The tensors of block i, quantized now unless they are ready; the streams go through it."""
        formats = self._plan.blocks[i]
        exact = self._source.exact_block(i)
        block = copy.deepcopy(exact) if len(streams) == 2 else exact
        if ready is not None:
            block = copy.deepcopy(result.blocks[i])
            _fill(block, ready, self._budget.device)
        else:
            losses = {}
            round_block(block, self._plan, i)
            set_block_formats(block, formats, scales)
            for name, format in formats.weights.items():
                loss = solver.solve_projection(block, exact, name, format)
                if loss is not None:
                    losses[name] = torch.tensor([loss.rtn, loss.gptq], dtype=torch.float64)
            tensors = {**block.state_dict(), **{_LOSSES + name: pair for name, pair in losses.items()}}
            ready = self._put(self._keys.weights(i), tensors)
        for stream, part in zip(streams, (block, exact), strict=False):
            stream.advance(part)
        return dict(ready)

    def _weight_streams(self, result: MambaLM) -> list[Stream]:
        """Through the quantized model, whose table is in place, and the float one if it is aimed at."""
        plan, device = self._plan, self._budget.device
        table = result.backbone.embedding

        def embed(ids: Tensor) -> Tensor:
            if plan.embedding is None:
                return self._source.embed(ids)
            return table(ids.to(self._home)).to(device)

        streams = [self._stream(self._texts.solver, embed, "quantized", _OF_TWO_STREAMS)]
        if plan.recipe.solver.propagate_error:
            exact = lambda ids: self._source.embed(ids, rounded=False)  # noqa: E731
            streams.append(self._stream(self._texts.solver, exact, "float", _OF_TWO_STREAMS))
        return streams

    def _lines(self, i: int, ready: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        lines = []
        for name, format in self._plan.blocks[i].weights.items():
            pair = ready.get(_LOSSES + name)
            losses = None if pair is None else SolveLosses(*pair.tolist())
            lines.append(report_line(f"layers.{i}.mixer.{name}", format, losses))
        return lines

    def _head(self, result: MambaLM, moments: dict[str, Tensor] | None) -> list[dict[str, Any]]:
        format = self._plan.head
        if format is None:
            if not result.tied:
                result.lm_head.weight = self._parameter(self._source.head_slabs())
            return []
        slabs = self._source.head_slabs(whole=_couples_rows(format))
        result.lm_head.weight, losses = self._quantize_rows(slabs, format, moments, self._keys.head)
        return [report_line("lm_head", format, losses)]

    def _quantize_rows(
        self,
        slabs: Iterator[Tensor],
        format: WeightFormat,
        moments: dict[str, Tensor] | None,
        key: Callable[[int], str],
    ) -> tuple[QuantizedWeight, SolveLosses | None]:
        """A table in parts, which are kept one by one."""
        solver = ProjectionSolver(self._plan.recipe.solver, None, None)
        device = self._budget.device
        near = None if moments is None else {name: m.to(device) for name, m in moments.items()}
        problem: Problem | None = None
        solutions = []
        for number, slab in enumerate(slabs):
            found = self._get(key(number))
            if found is None:
                if near is None:
                    solution = Solution(solver.round(slab, format), 0.0, 0.0, 0.0)
                else:
                    problem = problem or solver.problem(near, slab)
                    solution = problem.solve(slab, format)
                found = self._put(key(number), _pack_solution(solution))
            solutions.append(_unpack_solution(found, format, self._home))
        weight, losses = joined(solutions)
        return weight, None if moments is None else losses

    def _parameter(self, slabs: Iterator[Tensor]) -> nn.Parameter:
        return nn.Parameter(torch.cat([slab.to(self._home) for slab in slabs]), requires_grad=False)

    def _stream(
        self, batches: Sequence[Batch], embed: Callable[[Tensor], Tensor], name: str, streams: int = 1
    ) -> Stream:
        size = states_bytes(shapes_of(batches), self._plan.config.d_model) * streams
        nearest = "device" if self._budget.device.type == "cuda" else "memory"  # what is kept stays there
        keeps = self._budget.place(size * _WITH_KEPT) == nearest
        return Stream(batches, embed, self._plan.config.d_model, self._shelf(size), name, keeps=keeps)

    def _shelf(self, size: int) -> Shelf:
        place = self._budget.place(size)
        return Shelf(place, self._budget.device, self._scratch() if place == "file" else None)

    def _get(self, key: str) -> dict[str, Tensor] | None:
        return None if self._work is None else self._work.get(key)

    def _put(self, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors: with a work folder, mapped from it."""
        if self._work is None:
            return tensors
        self._work.put(key, tensors)
        return self._work.get(key) or tensors


_LOSSES = "losses."


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], home: torch.device) -> None:
    """Assign every tensor of a part of the skeleton."""
    kept = {name: t.to(home) for name, t in tensors.items() if not name.startswith(_LOSSES)}
    module.load_state_dict(kept, strict=True, assign=True)
    module.requires_grad_(False)


def _two(streams: Sequence[Stream]) -> tuple[Stream | None, Stream | None]:
    return streams[0] if streams else None, streams[1] if len(streams) > 1 else None


def _couples_rows(format: WeightFormat) -> bool:
    return format.granularity in ("tensor", "split")


def _pack(scales: BlockScales) -> dict[str, Tensor]:
    tensors = {f"activations.{leaf}": scale for leaf, scale in scales.activations.items()}
    extra = {"state_scale": scales.state_scale, "state_group": scales.state_group}
    return {**tensors, **{name: t for name, t in extra.items() if t is not None}}


def _unpack(tensors: Mapping[str, Tensor], device: torch.device) -> BlockScales:
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    state_scale, state_group = on_device.pop("state_scale", None), on_device.pop("state_group", None)
    activations = {name.removeprefix("activations."): scale for name, scale in on_device.items()}
    return BlockScales(activations, state_scale, state_group)


def _pack_solution(solution: Solution) -> dict[str, Tensor]:
    lost = torch.tensor([solution.lost_rtn, solution.lost, solution.whole], dtype=torch.float64)
    return {**solution.weight.state_dict(), "lost": lost}


def _unpack_solution(tensors: Mapping[str, Tensor], format: WeightFormat, home: torch.device) -> Solution:
    parts = {name: tensor.to(home) for name, tensor in tensors.items()}
    weight = QuantizedWeight(parts["data"], parts["scale"], format, parts.get("channel_scale"))
    return Solution(weight, *parts["lost"].tolist())
