"""Where a quantized model departs from its float model: site by site, weight by weight, token by token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quamba.analysis.align import Aligned, Orders, align, check_pair
from quamba.analysis.sites import Need, Site, block_sites
from quamba.analysis.statistics import Codes, LogitReport, Noise, Predictions, RangeReport, Ranges
from quamba.analysis.weights import WeightReport, weight_errors
from quamba.calibration.collect import listening
from quamba.errors import QuambaError
from quamba.formats.activation import Activation, as_float, rows
from quamba.models.lm import MambaLM, on_device
from quamba.quantization.pipeline import Progress, Silent

# Tokens that go through a block at once, and bytes of the logits of one slice: they bound the memory.
_TOKENS_AT_ONCE = 2048
_LOGITS_BYTES = 1 << 25

#: Sites outside the blocks; ``layer`` is None there.
OUTER_SITES = ("embedding", "residual", "norm_f", "logits")


@dataclass(frozen=True)
class SiteReport:
    """One site. Signal is the float model's, noise what the model departs from it.

    snr_db      both models read the same text from its start: errors of all layers before are in it
    own_snr_db  the block reads what the float model's block reads: its own error alone. None for the
                residual, which has none, and where it cannot be had (one model's stream is rotated)
    absmax      of the quantized model; that of the float model is in ``range``
    at_limit    share of int8 codes at or beyond +-127; None where the site has none
    clipped     share of the float model's values that are beyond 127.5 steps of the codes' scale
    range       of the float model; None for logits
    """

    layer: int | None
    site: str
    snr_db: float
    own_snr_db: float | None
    absmax: float
    at_limit: float | None
    clipped: float | None
    range: RangeReport | None

    @property
    def blamed_db(self) -> float:
        """What ranks sites from bad to good: the own error where it is known, NaN as the worst."""
        value = self.snr_db if self.own_snr_db is None else self.own_snr_db
        return -math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Analysis:
    """sites     in the order data meets them
    weights   of every quantized matrix, in the same order
    left_out  sites that cannot be compared, and why
    """

    sites: list[SiteReport]
    weights: list[WeightReport]
    logits: LogitReport
    windows: int
    window_length: int
    left_out: dict[str, str] = field(default_factory=dict)

    def worst(self, count: int) -> list[SiteReport]:
        """The sites with the largest error of their own; those that have none are not among them."""
        ranked = [site for site in self.sites if site.own_snr_db is not None] or self.sites
        faulty = [site for site in ranked if site.blamed_db != math.inf]
        return sorted(faulty, key=lambda site: site.blamed_db)[:count]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.inference_mode()
def analyze(
    network: MambaLM,
    reference: MambaLM,
    windows: Tensor,
    *,
    orders: Orders = None,
    reference_orders: Orders = None,
    progress: Progress | None = None,
) -> Analysis:
    """Compare a model with its float model on windows [n, L] int64 of text, each from an empty state.

    network, reference  of one architecture and on one device; usually quantized and float, any pair goes
    orders              how heads and channels were reordered (``align.channel_orders``); None: not known

    Both go through the text block by block, and only one block's tensors of a few windows are kept.
    """
    check_pair(network.config, reference.config)
    if network.device != reference.device:
        raise QuambaError(
            f"The models are on {network.device} and {reference.device}, expected both on one device."
        )
    progress = progress or Silent()
    aligned = align(network, _known(orders, network), reference, _known(reference_orders, reference))
    run = _Run(network, aligned, windows.shape[1])
    batch = max(1, _TOKENS_AT_ONCE // windows.shape[1])
    progress.stage("Windows", len(windows))
    with run.listening(), on_device(network.device):
        for ids in windows.split(batch):
            run.read(ids.to(network.device))
            progress.step(len(ids))
    return run.report(len(windows), weight_errors(network, aligned.network, aligned.left_out))


def _known(orders: Orders, network: MambaLM) -> Orders:
    """Mamba1 has no heads to reorder."""
    return {} if network.config.family == "mamba" else orders


class _Stream:
    """One model on its way through the text, a block at a time; seen: what the last block's leaves gave."""

    def __init__(self, network: MambaLM, leaves: set[str]) -> None:
        self.network = network
        self._leaves = leaves
        self.seen: dict[str, object] = {}
        self.hidden: Tensor
        self.residual: Tensor | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        def keep(leaf: str) -> Callable[[object], None]:
            return lambda output: self.seen.__setitem__(leaf, output)

        layers = range(len(self.network.blocks))
        paths = {f"backbone.layers.{i}.{leaf}": keep(leaf) for i in layers for leaf in self._leaves}
        with listening(self.network, paths):
            yield

    def start(self, ids: Tensor) -> None:
        self.hidden, self.residual = self.network.backbone.embedding(ids), None

    def walk(self, layer: int) -> None:
        self.hidden, self.residual = self.network.blocks[layer](self.hidden, self.residual, None, None)

    def visit(self, layer: int, other: _Stream) -> dict[str, object]:
        """What the leaves give where the block reads another model's stream."""
        self.network.blocks[layer](*self._borrow(other), None, None)
        return dict(self.seen)

    def end(self) -> tuple[Activation, Tensor]:
        """Normalised for the head, and the residual stream."""
        return self.network.backbone.norm_f(self.hidden, self.residual)

    def end_of(self, other: _Stream) -> Activation:
        return self.network.backbone.norm_f(*self._borrow(other))[0]

    def _borrow(self, other: _Stream) -> tuple[Tensor, Tensor | None]:
        """Another model's stream in this one's dtypes."""
        residual = other.residual
        if residual is not None and self.residual is not None:
            residual = residual.to(self.residual.dtype)
        return other.hidden.to(self.hidden.dtype), residual


class _Tally:
    """All sums of one site."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._noise, self._own, self._codes = Noise(device), Noise(device), Codes(device)
        self._has_own = False
        self._absmax = torch.zeros((), dtype=torch.float32, device=device)
        self._ranges: Ranges | None = None

    def update(
        self, wanted: Activation, got: Activation, own: Activation | None = None, *, ranges: bool = True
    ) -> None:
        wanted = as_float(wanted)
        self._noise.update(wanted, got)
        if own is not None:
            self._own.update(wanted, own)
            self._has_own = True
        self._codes.update(wanted, got)
        self._absmax = torch.maximum(self._absmax, as_float(got).abs().amax().float())
        if ranges:
            self._ranges = self._ranges or Ranges(wanted.shape[-1], self._device)
            self._ranges.update(wanted)

    def report(self, layer: int | None, site: str) -> SiteReport:
        return SiteReport(
            layer=layer,
            site=site,
            snr_db=self._noise.snr_db,
            own_snr_db=self._own.snr_db if self._has_own else None,
            absmax=float(self._absmax),
            at_limit=self._codes.at_limit,
            clipped=self._codes.clipped,
            range=None if self._ranges is None else self._ranges.report(),
        )


class _Run:
    """Both models, and the tallies of every site that they can be compared at."""

    def __init__(self, network: MambaLM, aligned: Aligned, length: int) -> None:
        sites = block_sites(network.config)
        self._sites = [site for site in sites if not set(site.needs) & aligned.left_out.keys()]
        outer: dict[str, tuple[Need, ...]] = {
            "embedding": ("rotation",),
            "residual": ("rotation",),
            "norm_f": ("rotation", "norms"),
            "logits": (),
        }
        self._outer = [name for name in OUTER_SITES if not set(outer[name]) & aligned.left_out.keys()]
        needs = {**outer, **{site.name: site.needs for site in sites}}
        self._left_out = {
            name: aligned.left_out[need]
            for name, wanted in needs.items()
            for need in wanted
            if need in aligned.left_out
        }
        self._borrows = "rotation" not in aligned.left_out
        leaves = {site.leaf for site in self._sites}
        self._ours, self._theirs = _Stream(network, leaves), _Stream(aligned.network, leaves)
        device = network.device
        self._blocks = [{site.name: _Tally(device) for site in self._sites} for _ in network.blocks]
        self._ends = {name: _Tally(device) for name in self._outer}
        self._predictions = Predictions(length, device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._ours.listening())
            stack.enter_context(self._theirs.listening())
            yield

    def read(self, ids: Tensor) -> None:
        """Both models through some windows (B, L)."""
        self._ours.start(ids)
        self._theirs.start(ids)
        self._compare("embedding", self._theirs.hidden, self._ours.hidden, self._ours.hidden)
        for layer, tallies in enumerate(self._blocks):
            own = self._ours.visit(layer, self._theirs) if self._borrows else None
            self._ours.walk(layer)
            self._theirs.walk(layer)
            for site in self._sites:
                self._compare_site(tallies[site.name], site, own)
        self._read_end(ids)

    def _compare_site(self, tally: _Tally, site: Site, own: dict[str, object] | None) -> None:
        wanted, got = (site.take(stream.seen[site.leaf]) for stream in (self._theirs, self._ours))
        shown = own is not None and not site.stream
        tally.update(wanted, got, site.take(own[site.leaf]) if shown and own is not None else None)

    def _read_end(self, ids: Tensor) -> None:
        own = self._ours.end_of(self._theirs) if self._borrows else None
        got, residual = self._ours.end()
        wanted, float_residual = self._theirs.end()
        self._compare("residual", float_residual, residual)
        self._compare("norm_f", wanted, got, own)
        batch, length = ids.shape
        heads = self._ours.network.lm_head, self._theirs.network.lm_head
        step = max(1, _LOGITS_BYTES // (8 * batch * heads[0].out_features))
        self._predictions.add_windows(batch)
        for start in range(0, length, step):
            stop = min(start + step, length)
            ours = as_float(heads[0](rows(got, start, stop, 1)))
            theirs = as_float(heads[1](rows(wanted, start, stop, 1)))
            alone = None if own is None else heads[0](rows(own, start, stop, 1))
            self._ends["logits"].update(theirs, ours, alone, ranges=False)
            self._predictions.update(theirs, ours, ids, start)

    def _compare(self, name: str, wanted: Activation, got: Activation, own: Activation | None = None) -> None:
        if name in self._ends:
            self._ends[name].update(wanted, got, own)

    def report(self, windows: int, weights: list[WeightReport]) -> Analysis:
        ends = {name: tally.report(None, name) for name, tally in self._ends.items()}
        sites = [ends.pop("embedding")] if "embedding" in ends else []
        for layer, tallies in enumerate(self._blocks):
            sites += [tally.report(layer, name) for name, tally in tallies.items()]
        logits = self._predictions.report()
        length = len(logits.kl_by_position)
        return Analysis([*sites, *ends.values()], weights, logits, windows, length, self._left_out)
