"""From mapped files to a GPU, by way of two small pinned buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.checkpoints.mapping import drop_pages

_BUFFER_BYTES = 1 << 26
# Bytes of a tensor whose pages are worth a look at what is mapped.
_LARGE = 1 << 20


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move a module; from the CPU to a GPU so that no tensor is in the machine's memory as a whole.

    Tensors that are mapped from files must be as the files have them: their pages are given back.
    """
    if device.type != "cuda":
        module.to(device)
        return
    staging = Staging(device)
    module._apply(staging.moved)  # as nn.Module.to does; weights of integers keep their dtypes in it
    staging.finish()


class Staging:
    """Copies tensors to a device piece by piece: while one buffer is on its way, the other one is filled."""

    def __init__(self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)
        ]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy on the device; the tensor itself if it is there already."""
        if tensor.device == self.device and self._on_gpu:
            return tensor
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return tensor.to(self.device)
        target = torch.empty_like(tensor, device=self.device)
        source, sink = (t.detach().reshape(-1).view(torch.uint8) for t in (tensor, target))
        size = self._buffers[0].numel()
        for start in range(0, source.numel(), size):
            self._send(source[start : start + size], sink[start : start + size])
        if tensor.nbytes >= _LARGE:
            drop_pages([tensor.detach()])
        return target

    def finish(self) -> None:
        """Wait until all is there."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def _send(self, source: Tensor, sink: Tensor) -> None:
        self._turn = 1 - self._turn
        buffer, sent = self._buffers[self._turn][: source.numel()], self._sent[self._turn]
        if sent is not None:
            sent.synchronize()
        buffer.copy_(source)
        sink.copy_(buffer, non_blocking=True)
        if self._on_gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._sent[self._turn] = event
