"""The state space recurrences with their cached state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quamba.formats.activation import Activation, Quantized, shape_of
from quamba.formats.parameter import Parameter, QuantizedParameter, as_tensor
from quamba.kernels.reference.state import spread_scale, write_state
from quamba.modules.leaf import Leaf, parameter_or_empty


@dataclass(frozen=True)
class _RealParameters:
    """What was computed from parameters, and of which. Aliases keep their memory, so that an address that is
    theirs still is nobody else's."""

    values: tuple[Tensor, Tensor, Tensor]
    aliases: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, parameters: list[Tensor], values: tuple[Tensor, Tensor, Tensor]) -> _RealParameters | None:
        """None where changes could not be seen, or where the values are not there yet: in a capture."""
        seen = all(not t.is_inference() and not t.requires_grad for t in parameters)
        if not seen or (parameters[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        return cls(values, tuple(t.detach() for t in parameters), tuple(t._version for t in parameters))

    def is_of(self, parameters: list[Tensor], wide: torch.dtype) -> bool:
        same = self.values[0].dtype == wide and len(parameters) == len(self.aliases)
        return same and all(
            t.device == alias.device
            and t.dtype == alias.dtype
            and t.data_ptr() == alias.data_ptr()
            and t._version == version
            for t, alias, version in zip(parameters, self.aliases, self.versions, strict=True)
        )

    def __reduce__(self) -> Any:
        """Copies of a leaf have parameters of their own, and begin with nothing kept."""
        return _nothing, ()


def _nothing() -> None:
    return None


class Recurrence(Leaf):
    """Parameters A_log, D, dt_bias (float or int8) and the format of the cached state.

    A state is as it is stored between tokens, or a working one between the pieces of a prompt: floats of
    ``wide``, which nothing rounds.

    state_shape  of one sequence: channels (in one or two dimensions), then d_state
    state_dtype  torch.int8, torch.float16 or torch.float32 (float64 models keep floats in float64)
    state_scale  (K, N) or (K, 1) float32 for int8 states: one a channel group (and state index)
    state_group  (d_inner,) int32: the group of each channel; None when K = 1
    """

    A_log: Parameter
    D: Parameter
    dt_bias: Parameter
    state_scale: Tensor | None
    state_group: Tensor | None

    def __init__(self, state_shape: tuple[int, ...], A_shape: tuple[int, ...], n_D: int) -> None:
        super().__init__()
        self.state_shape = state_shape
        self.A_log = parameter_or_empty(*A_shape)
        self.D = parameter_or_empty(n_D)
        self.dt_bias = parameter_or_empty(A_shape[0])
        self.register_buffer("state_scale", None)
        self.register_buffer("state_group", None)
        self.state_dtype = torch.float32
        self._real: _RealParameters | None = None

    def new_state(self, batch: int, device: torch.device | str, *, working: bool = False) -> Tensor:
        dtype = self.wide if working else self._stored_dtype
        return torch.zeros(batch, *self.state_shape, dtype=dtype, device=device)

    def working(self, state: Tensor) -> Tensor:
        """A copy of a state, stored or working, as a working one."""
        floats, scale = state.to(self.wide, copy=True), self._scale_of(state)
        return floats if scale is None else floats.mul_(scale.to(self.wide))

    def stored(self, state: Tensor) -> Tensor:
        """A working state as it is stored; itself where that is the same."""
        if state.dtype == self._stored_dtype:
            return state
        stored = torch.empty_like(state, dtype=self._stored_dtype)
        write_state(stored, state, self._scale_of(stored))
        return stored

    @property
    def _stored_dtype(self) -> torch.dtype:
        wide = self.wide == torch.float64 and self.state_dtype != torch.int8
        return torch.float64 if wide else self.state_dtype

    def _scale_of(self, state: Tensor) -> Tensor | None:
        """What the codes of an int8 state are multiplied with, broadcastable to it; None for floats."""
        if state.dtype != torch.int8:
            return None
        return spread_scale(self.state_scale, self.state_group, state.shape[1:-1])

    @property
    def wide(self) -> torch.dtype:
        """What the recurrence is computed in: float32, or float64 in a model of float64."""
        integers = isinstance(self.A_log, QuantizedParameter)
        dtype = self.compute_dtype if integers else self.A_log.dtype
        return torch.float64 if dtype == torch.float64 else torch.float32

    def real_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """A = -exp(A_log), D and dt_bias as floats.

        They are kept until a parameter changes: on a GPU, two launches a layer are a tenth of a step.
        """
        parameters = self._parameters_now()
        if self._real is not None and self._real.is_of(parameters, self.wide):
            return self._real.values
        with torch.inference_mode(False):  # what is kept may be needed in a backward pass later
            A_log, D, dt_bias = (as_tensor(p, self.wide) for p in (self.A_log, self.D, self.dt_bias))
            values = -torch.exp(A_log), D, dt_bias
        self._real = _RealParameters.of(parameters, values)
        return values

    def _parameters_now(self) -> list[Tensor]:
        parameters = (self.A_log, self.D, self.dt_bias)
        integers = [p for p in parameters if isinstance(p, QuantizedParameter)]
        floats = [p for p in parameters if isinstance(p, Tensor)]
        return [*floats, *(t for p in integers for t in (p.data, p.scale))]

    def carried(self, state: Tensor | None) -> dict[str, Any]:
        """What the kernels are told of the state and of their output."""
        codes = state is not None and state.dtype == torch.int8
        return {
            "state": state,
            "state_scale": self.state_scale if codes else None,
            "state_group": self.state_group if codes else None,
            "out_dtype": self.compute_dtype,
        }


class SelectiveScan(Recurrence):
    """Mamba1: (u, dt, B, C, z) -> y (B, L, d_inner) (``kernels/reference/selective_scan.py``)."""

    def __init__(self, d_inner: int, d_state: int) -> None:
        super().__init__((d_inner, d_state), (d_inner, d_state), d_inner)

    def forward(
        self,
        u: Activation,
        dt: Activation,
        B: Activation,
        C: Activation,
        z: Activation,
        state: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """``state`` (B, d_inner, d_state) is read and then overwritten with the final state."""
        A, D, dt_bias = self.real_parameters()
        carried = self.carried(state)
        if is_step(u, state, mask):
            u, dt, B, C, z = (only_token(t) for t in (u, dt, B, C, z))
            y = self.kernels.selective_scan_step(u, dt, A, B, C, D, z, dt_bias, **carried)
            return y[:, None]
        return self.kernels.selective_scan(u, dt, A, B, C, D, z, dt_bias, mask=mask, **carried)


class SSD(Recurrence):
    """Mamba2: (x, dt, B, C) -> y (B, L, nheads * headdim) (``kernels/reference/ssd.py``)."""

    def __init__(
        self,
        nheads: int,
        headdim: int,
        d_state: int,
        *,
        ngroups: int,
        chunk_size: int,
        dt_limit: tuple[float, float],
        D_has_hdim: bool,
    ) -> None:
        super().__init__((nheads, headdim, d_state), (nheads,), nheads * headdim if D_has_hdim else nheads)
        self.chunk_size = chunk_size
        self.sizes = {"headdim": headdim, "ngroups": ngroups, "dt_limit": dt_limit}

    def forward(
        self,
        x: Activation,
        dt: Activation,
        B: Activation,
        C: Activation,
        state: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """``state`` (B, nheads, headdim, d_state) is read and then overwritten with the final state."""
        A, D, dt_bias = self.real_parameters()
        carried = self.carried(state)
        if is_step(x, state, mask):
            x, dt, B, C = (only_token(t) for t in (x, dt, B, C))
            y = self.kernels.ssd_step(x, dt, A, B, C, D, dt_bias, **self.sizes, **carried)
            return y[:, None]
        return self.kernels.ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            chunk_size=self.chunk_size,
            mask=mask,
            **self.sizes,
            **carried,
        )


def is_step(x: Activation, state: Tensor | None, mask: Tensor | None) -> bool:
    return state is not None and mask is None and shape_of(x)[1] == 1


def only_token(x: Activation) -> Activation:
    return Quantized(x.codes[:, 0], x.scale) if isinstance(x, Quantized) else x[:, 0]
