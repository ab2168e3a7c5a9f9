"""Which errors of an embedding row the model minds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from quamba.calibration.collect import Batch
from quamba.models.config import MambaConfig, ModelConfig
from quamba.models.lm import Block
from quamba.modules.norm import AddNorm
from quamba.quantization.states import HiddenStates, Shelf

# Second moments of d_model gradients need some multiple of d_model tokens; the start of a text is as good
# as its rest.
TOKENS_PER_SEQUENCE = 128
MAX_SEQUENCES = 128
# Bytes that the recurrence of a block may keep for the backward pass at once.
CPU_MEMORY_BYTES = 1 << 30
GPU_MEMORY_BYTES = 1 << 32
# Logits that are there at once.
_LOGITS = 1 << 27


def metric_batches(batches: Iterable[Batch], config: ModelConfig, device: torch.device) -> list[Tensor]:
    """The ids (B, L) that the metric is made from.

    The last TOKENS_PER_SEQUENCE tokens of each sequence are read, so that left padding rarely matters;
    sequences with padding there are passed over.
    """
    sequences = _sequences(batches)
    step = _batch_size(config, device)
    return [torch.stack(sequences[i : i + step]) for i in range(0, len(sequences), step)]


def loss_metric(
    batches: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    block: Callable[[int], Block],
    norm_f: AddNorm,
    head_slabs: Callable[[], Iterator[Tensor]],
    *,
    config: ModelConfig,
    shelf: Shelf,
    on_block: Callable[[], None] = lambda: None,
) -> Tensor:
    """M = mean_t g_t g_t^T, g_t the gradient of the text's cross-entropy by the embedding of token t.

    An error e of an embedding row then costs about e^T M e / 2 (the empirical Fisher matrix for the
    Hessian), which is what the weight solver minimises when M is given to it as the moments of its inputs.

    batches     of ``metric_batches``
    embed       ids (B, L) -> (B, L, d_model) float32, in the basis that the table is quantized in
    block       i -> a copy of the float block i; one is there at a time, each is asked for twice
    head_slabs  the rows of the float head, in parts; asked for twice
    shelf       for the hidden states at the entrances of all blocks
    on_block    told of each block, forward and backward
    returns     (d_model, d_model) float32 on the shelf's device
    """
    size, layers = config.d_model, config.n_layer
    metric = torch.zeros(size, size, device=shelf.device)
    if not batches:
        return metric
    count = len(batches)
    shapes = [(ids.shape[0], ids.shape[1]) for ids in batches]
    states = HiddenStates(shapes * (layers + 1), size, shelf, "metric")
    try:
        for b, ids in enumerate(batches):
            states[b] = embed(ids)
        for i in range(layers):
            part = block(i)
            for b in range(count):
                hidden, residual = part(states[i * count + b], None, None, None)
                states[(i + 1) * count + b] = residual + hidden
            on_block()
        _head_gradients(states, layers * count, batches, norm_f, head_slabs)
        for i in reversed(range(layers)):
            part = block(i)
            for b in range(count):
                # The gradient takes the place of the states it belongs to.
                states[i * count + b] = _pull_back(part, states[i * count + b], states[(i + 1) * count + b])
            on_block()
        for b in range(count):
            gradient = states[b].reshape(-1, size)
            metric.addmm_(gradient.t(), gradient)
    finally:
        states.close()
    return metric / max(1, sum(rows * TOKENS_PER_SEQUENCE for rows, _ in shapes))


def _sequences(batches: Iterable[Batch]) -> list[Tensor]:
    found: list[Tensor] = []
    for ids, mask in batches:
        for row in range(ids.shape[0]):
            if ids.shape[1] >= TOKENS_PER_SEQUENCE and (
                mask is None or mask[row, -TOKENS_PER_SEQUENCE:].all()
            ):
                found.append(ids[row, -TOKENS_PER_SEQUENCE:])
            if len(found) == MAX_SEQUENCES:
                return found
    return found


def _batch_size(config: ModelConfig, device: torch.device) -> int:
    """Sequences whose backward pass through one block fits: Mamba1 keeps a few states a token, Mamba2 little.

    A GPU needs more sequences to be busy.
    """
    on_cpu = device.type == "cpu"
    most = 8 if on_cpu else 32
    if not isinstance(config, MambaConfig):
        return most
    kept = 16 * TOKENS_PER_SEQUENCE * config.d_inner * config.d_state
    return max(1, min(most, (CPU_MEMORY_BYTES if on_cpu else GPU_MEMORY_BYTES) // kept))


def _pull_back(block: Block, entrance: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by what enters the block, from that by what leaves it; the block runs once more."""
    with torch.enable_grad():
        start = entrance.clone().requires_grad_()
        hidden, residual = block(start, None, None, None)
        (found,) = torch.autograd.grad(residual + hidden, start, gradient)
    return found


def _head_gradients(
    states: HiddenStates,
    first: int,
    batches: Sequence[Tensor],
    norm_f: AddNorm,
    head_slabs: Callable[[], Iterator[Tensor]],
) -> None:
    """Put d(sum of cross-entropy) / d(state) where the states after the last block are.

    The logits are never there as a whole: one walk over the head sums their exponentials, a second one
    multiplies their softmax with the head.
    """
    normed = [norm_f(states[first + b], None)[0] for b in range(len(batches))]
    targets = [ids[:, 1:].flatten().to(normed[0].device) for ids in batches]
    inputs = [x[:, :-1].flatten(0, 1) for x in normed]  # the last token predicts nothing
    total = [x.new_full((len(x),), -torch.inf) for x in inputs]
    for slab in head_slabs():
        for b, x in enumerate(inputs):
            for rows in _row_parts(x, slab):
                total[b][rows] = torch.logaddexp(total[b][rows], (x[rows] @ slab.t()).logsumexp(-1))
    gradients = [torch.zeros_like(x) for x in inputs]
    start = 0
    for slab in head_slabs():
        for b, x in enumerate(inputs):
            for rows in _row_parts(x, slab):
                softmax = (x[rows] @ slab.t()).sub_(total[b][rows, None]).exp_()
                token = targets[b][rows] - start
                here = (token >= 0) & (token < len(slab))
                softmax[here.nonzero()[:, 0], token[here]] -= 1
                gradients[b][rows].addmm_(softmax, slab)
        start += len(slab)
    for b, gradient in enumerate(gradients):
        wanted = torch.zeros_like(normed[b])
        wanted[:, :-1] = gradient.view(len(wanted), -1, wanted.shape[-1])
        with torch.enable_grad():
            state = states[first + b].clone().requires_grad_()
            (found,) = torch.autograd.grad(norm_f(state, None)[0], state, wanted)
        states[first + b] = found


def _row_parts(x: Tensor, slab: Tensor) -> Iterator[slice]:
    step = max(1, _LOGITS // len(slab))
    for start in range(0, len(x), step):
        yield slice(start, start + step)
