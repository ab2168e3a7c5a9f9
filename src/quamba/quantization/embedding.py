"""Which errors of an embedding row the model minds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from quamba.calibration.collect import Batch
from quamba.formats.activation import Activation
from quamba.models.config import MambaConfig
from quamba.models.lm import Backbone, MambaLM

# Second moments of d_model gradients need some multiple of d_model tokens; the start of a text is as good
# as its rest.
TOKENS_PER_SEQUENCE = 128
MAX_SEQUENCES = 128
# Bytes that the recurrences may keep for the backward pass at once.
CPU_MEMORY_BYTES = 1 << 30
GPU_MEMORY_BYTES = 1 << 32


def loss_metric(model: MambaLM, batches: Iterable[Batch]) -> Tensor:
    """M = mean_t g_t g_t^T, g_t the gradient of the text's cross-entropy by the embedding of token t.

    An error e of an embedding row then costs about e^T M e / 2 (the empirical Fisher matrix for the
    Hessian), which is what the weight solver minimises when M is given to it as the moments of its inputs.

    model    float, in the basis that the table is quantized in; its parameters get no gradients
    batches  (ids (B, L), mask (B, L) or None); the last TOKENS_PER_SEQUENCE tokens of each sequence are
             read, so that left padding rarely matters; sequences with padding there are passed over
    returns  (d_model, d_model) float32
    """
    size = model.config.d_model
    metric = torch.zeros(size, size, device=model.device)
    sequences = _sequences(batches)
    step = _batch_size(model)
    for start in range(0, len(sequences), step):
        ids = torch.stack(sequences[start : start + step]).to(model.device)
        gradient = _gradient(model, ids, keep=ids.device.type == "cpu").reshape(-1, size)
        metric.addmm_(gradient.t(), gradient)
    return metric / max(1, len(sequences) * TOKENS_PER_SEQUENCE)


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


def _batch_size(model: MambaLM) -> int:
    """Sequences whose backward pass fits: Mamba1 keeps a few states a token, Mamba2 little.

    A GPU keeps those of one block at a time, and needs more sequences to be busy.
    """
    config, on_cpu = model.config, model.device.type == "cpu"
    most = 8 if on_cpu else 32
    if not isinstance(config, MambaConfig):
        return most
    kept = 16 * TOKENS_PER_SEQUENCE * config.d_inner * config.d_state * (config.n_layer if on_cpu else 1)
    return max(1, min(most, (CPU_MEMORY_BYTES if on_cpu else GPU_MEMORY_BYTES) // kept))


def _gradient(model: MambaLM, ids: Tensor, *, keep: bool) -> Tensor:
    """d(sum of cross-entropy) / d(embedding of each token): (B, L, d_model).

    keep  all that the backward pass needs; else it goes through each block once more
    """
    backbone = model.backbone
    with torch.enable_grad():
        start = backbone.embedding(ids).detach().requires_grad_()
        normed = backbone.read(start, None, None) if keep else _read_again(backbone, start)
        logits = model.lm_head(normed)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, start)
    return gradient.float()


def _read_again(backbone: Backbone, hidden: Tensor) -> Activation:
    """``Backbone.read`` that keeps nothing inside of blocks."""
    residual = None
    for block in backbone.blocks:
        hidden, residual = checkpoint(
            block, hidden, residual, None, None, use_reentrant=False, preserve_rng_state=False
        )
    return backbone.norm_f(hidden, residual)[0]
