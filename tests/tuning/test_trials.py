"""Calls to be tried: right kernels pass, wrong ones do not, and what is timed has weights of its own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from quamba.kernels.registry import _kernels_of
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import Override, Precision, Recipe, load_recipe
from quamba.tuning import trials as module
from quamba.tuning.networks import PUBLISHED, one_block_plans, random_network
from quamba.tuning.step_reference import KNOWN
from quamba.tuning.trials import OpTrial, StepTrial, Trial, trials
from quamba.tuning.tune import check_ops, unknown

CONFIGS: dict[str, ModelConfig] = {
    "mamba": MambaConfig(d_model=64, n_layer=1, vocab_size=61),
    "mamba2": Mamba2Config(d_model=64, n_layer=1, vocab_size=61, d_state=16, headdim=16, ngroups=2),
}
STEPS = {
    "mamba": ["project", "project", "scan_gate", "mix", "project", "project"],
    "mamba2": ["project", "ssd_gate", "mix", "project", "project"],
}


@functools.cache
def network(family: str, recipe: str, device: torch.device) -> MambaLM:
    """Its floats are float16, as on a GPU."""
    asked = Recipe(name="float", blocks=Precision()) if recipe == "float" else load_recipe(recipe)
    model = random_network(resolve(asked, CONFIGS[family]), device)
    return model.set_compute_dtype(torch.float16).use_kernels(_kernels_of("triton"))


@pytest.fixture(autouse=True)
def _few_programs() -> Iterator[None]:
    """The interpreter's time is theirs."""
    from quamba.kernels.triton.decode.project import RowLaunch, row_launch
    from quamba.kernels.triton.decode.scan import ScanLaunch, scan_launch

    with row_launch.forced(RowLaunch(64, 128, 1)), scan_launch.forced(ScanLaunch(64, 1)):
        yield


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("mamba", "w4a8"), ("mamba2", "w8a8"), ("mamba2", "w4a16"), ("mamba2", "float")],
)
def test_launches_of_a_step_are_as_the_reference_has_them(
    family: str, recipe: str, device: torch.device
) -> None:
    found = list(trials(network(family, recipe, device), 2, ["decode"]))
    assert [name_of(trial) for trial in found] == STEPS[family]
    with torch.inference_mode():
        assert [trial.fault(nullcontext) for trial in found] == [None] * len(found)


def name_of(trial: Trial) -> str:
    """Of the kernel's function."""
    assert isinstance(trial, StepTrial)
    return trial.op.removeprefix("decode.")


def off_by(change: Callable[[dict[str, Any]], Tensor]) -> Callable[..., Callable[..., None]]:
    """Makes a kernel's function add 3 to one of its results."""

    def wrong(kernel: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(kernel)
        def function(*args: Any, **named: Any) -> None:
            kernel(*args, **named)
            result = change(inspect.signature(kernel).bind(*args, **named).arguments)
            result.view(-1)[0] += 3

        return function

    return wrong


RESULTS = {
    "project.project": lambda given: given["residual"] if given.get("residual") is not None else given["out"],
    "project.project.window": lambda given: given["conv"].window if given.get("conv") else given["out"],
    "mix.mix": lambda given: given["out"].values,
    "ssd.ssd_gate": lambda given: given["out"],
    "ssd.ssd_gate.squares": lambda given: given["squares"],
    "ssd.ssd_gate.state": lambda given: given["state"],
    "scan.scan_gate": lambda given: given["out"],
    "scan.scan_gate.state": lambda given: given["state"],
}


@pytest.mark.parametrize("where", RESULTS)
def test_a_wrong_launch_is_seen(where: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are bound when a step is made, so they are replaced before that."""
    module_name, name, *_ = where.split(".")
    decode = import_module(f"quamba.kernels.triton.decode.{module_name}")
    monkeypatch.setattr(decode, name, off_by(RESULTS[where])(getattr(decode, name)))
    model = network("mamba" if name == "scan_gate" else "mamba2", "w8a8", device)
    trial = next(t for t in trials(model, 1, ["decode"]) if name_of(t) == name)
    with torch.inference_mode():
        assert trial.fault(nullcontext) is not None


def test_every_launch_with_a_choice_is_known() -> None:
    from quamba.kernels.triton.launches import choices

    tuned = [n for n, choice in choices().items() if choice.candidates is not None]
    assert sorted(n.removeprefix("decode.") for n in tuned if n.startswith("decode.")) == sorted(KNOWN)


@pytest.mark.parametrize(("rows", "count", "head"), [(1, 3, 1), (6, 3, 6), (64, 3, 64), (65, 3, 1)], ids=str)
def test_rows_are_sequences_or_a_prompt(rows: int, count: int, head: int, device: torch.device) -> None:
    found = [t for t in trials(network("mamba2", "w8a8", device), rows, ["linear"])]
    assert len(found) == count and all(isinstance(t, OpTrial) for t in found)
    sizes = [t._call.args[0].codes.shape for t in found if isinstance(t, OpTrial)]
    assert [size[0] * size[1] for size in sizes] == [rows, rows, head]
    assert [size[2] for size in sizes] == [64, 128, 64]


def test_more_sequences_have_no_fused_step(device: torch.device) -> None:
    assert list(trials(network("mamba2", "w8a8", device), 5, ["decode"])) == []


def test_an_op_is_compared_with_the_reference(device: torch.device) -> None:
    trial = next(iter(trials(network("mamba2", "w4a8", device), 5, ["linear"])))
    assert isinstance(trial, OpTrial)
    assert trial.fault(nullcontext) is None
    good, poisoned = trial._kernels.linear, []

    def late(*args: Any, **named: Any) -> Tensor:
        poisoned.append(bool(torch.empty(8).isnan().all()))
        y = good(*args, **named)
        y.view(-1)[0] += 3
        return y

    trial._kernels = dataclasses.replace(trial._kernels, linear=late)
    assert trial.fault(nullcontext) is not None
    assert poisoned == [True], "what nobody writes does not pass by luck"


def test_buffers_of_a_step_are_poisoned(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = import_module("quamba.kernels.triton.decode.ssd")
    poisoned = []

    def nothing(*args: Any, **named: Any) -> None:
        given = inspect.signature(decode_ssd_gate).bind(*args, **named).arguments
        poisoned.append([bool(given[name].isnan().all()) for name in ("out", "squares", "state")])

    decode_ssd_gate = decode.ssd_gate
    monkeypatch.setattr(decode, "ssd_gate", functools.wraps(decode_ssd_gate)(nothing))
    model = network("mamba2", "w4a16", device)
    trial = next(t for t in trials(model, 1, ["decode"]) if name_of(t) == "ssd_gate")
    with torch.inference_mode():
        assert trial.fault(nullcontext) is not None
    assert poisoned == [[True, True, False]]


def test_what_is_timed_has_weights_of_its_own(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_count", lambda size, device: 3 if size else 1)
    model = network("mamba2", "w4a8", device)
    with torch.inference_mode():
        for trial in trials(model, 1, ["decode"]):
            runs = trial.runs(nullcontext)
            launches = [run for run in runs if isinstance(run, functools.partial)]
            owned = [launch.keywords.get("matrix", launch.keywords.get("state")) for launch in launches]
            places = {(w if isinstance(w, Tensor) else w.data).data_ptr() for w in owned if w is not None}
            assert len(places) == (0 if name_of(trial) == "mix" else 3)
            assert len(trial.runs(nullcontext)) == len(runs)
        launches[0]()
        for trial in trials(model, 5, ["linear"]):
            assert isinstance(trial, OpTrial)
            assert len(trial.runs(nullcontext)) == len(trial.runs(nullcontext)) == 3
            assert len({call.args[1].data.data_ptr() for call in trial._copies}) == 3


@pytest.mark.parametrize(
    ("ops", "rows", "names"),
    [
        (["decode.mix", "decode.ssd_gate"], 2, ["decode.ssd_gate", "decode.mix"]),
        (["linear"], 5, ["linear.tiles"] * 3),
    ],
    ids=["decode", "linear"],
)
def test_what_is_asked_for_is_known_before_it_runs(
    ops: list[str], rows: int, names: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ops = network("mamba2", "w4a8", device), check_ops(ops)
    ran = [(a.choice.name, a.key) for _, a in unknown([model], [rows], ops, lambda op, key: False)]
    assert [name for name, _ in ran] == names
    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", None)
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", None)
    found = unknown([model], [rows], ops, lambda op, key: False, only_ask=True)
    assert [(a.choice.name, a.key) for _, a in found] == ran


def test_one_block_of_each_kind() -> None:
    recipe = load_recipe("w4a8")
    recipe = recipe.replace(overrides=(Override(blocks=(1, 3), precision=load_recipe("w8a8").blocks),))
    plans = one_block_plans(resolve(recipe, PUBLISHED["mamba2-130m"]))
    assert [plan.config.n_layer for plan in plans] == [1, 1]
    assert [plan.blocks[0].label for plan in plans] == ["W4A8", "W8A8"]
