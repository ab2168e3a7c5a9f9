"""The search: only right candidates count, the fastest is taken, what is known is left, time ends it."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from quamba.errors import QuambaError
from quamba.kernels.registry import _kernels_of
from quamba.kernels.triton import launches
from quamba.kernels.triton.gemm import TileLaunch, tile_launch
from quamba.kernels.triton.launch_tables import Gpu, read_table
from quamba.kernels.triton.launches import LaunchChoice
from quamba.models.config import Mamba2Config
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import load_recipe
from quamba.tuning import tune
from quamba.tuning.compilers import compile_ahead, compile_share
from quamba.tuning.networks import random_network
from quamba.tuning.session import Session
from quamba.tuning.trials import Force
from quamba.tuning.tune import Found, LostError, check_ops, search

GPU = Gpu("NVIDIA H200", "sm90")


@dataclass(frozen=True)
class Size:
    size: int
    warps: int = 1


def size_candidates(length: int) -> list[Size]:
    return [Size(size) for size in (1, 2, 3, 4, 5)]


def size_for(length: int) -> Size:
    return Size(2)


@dataclass
class FakeTrial:
    """An op that asks for one choice; launches in ``wrong`` give something else, those in ``fails`` raise."""

    choice: LaunchChoice[Size]
    length: int
    log: list[Any]
    wrong: Collection[int] = ()
    fails: Collection[int] = ()
    op: str = "op"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self) -> None:
        self.choice(self.length)

    def compile(self, force: Force) -> None:
        with force():
            size = self.choice(self.length).size
        self.log.append(("compiled", self.length, size))
        if size in self.fails:
            raise RuntimeError("no")

    def fault(self, force: Force) -> str | None:
        with force():
            size = self.choice(self.length).size
        self.log.append((self.length, size))
        if size in self.fails:
            raise RuntimeError(f"out of resources with {size}\nand more")
        return "off by one" if size in self.wrong else None

    def runs(self, force: Force) -> list[Callable[[], object]]:
        return [lambda: self.choice(self.length).size] * 2


@dataclass
class Setting:
    """rows are lengths here; us of sizes, for every length."""

    choice: LaunchChoice[Size]
    log: list[Any]
    wrong: Collection[int] = ()
    fails: Collection[int] = ()
    us: dict[int, float] = field(default_factory=lambda: {1: 9.0, 2: 8.0, 3: 5.0, 4: 6.0, 5: 7.0})
    known: set[tuple[str, Any]] = field(default_factory=set)
    seconds: float = 1e9

    def trials(self, network: Any, rows: int, ops: Collection[str]) -> Iterator[FakeTrial]:
        assert set(ops) == {"op"}
        yield FakeTrial(self.choice, rows, self.log, self.wrong, self.fails)

    def timer(self, runs: Sequence[Callable[[], object]]) -> float:
        size = runs[0]()
        assert isinstance(size, int) and len(runs) == 2
        self.log.append(("timed", size))
        return self.us[size]

    def search(self, rows: Sequence[int]) -> list[Found]:
        networks: list[Any] = [None]
        return list(
            search(
                networks,
                rows,
                ["op.size"],
                timer=self.timer,
                is_known=lambda op, key: (op, key) in self.known,
                is_over=lambda: len(self.log) > self.seconds,
            )
        )


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    choice: LaunchChoice[Size] = LaunchChoice("op.size", size_for, None, size_candidates)
    monkeypatch.setitem(launches._CHOICES, "op.size", choice)
    found = Setting(choice, [])
    monkeypatch.setattr(tune, "trials", found.trials)
    return found


def test_the_fastest_is_found(setting: Setting) -> None:
    (found,) = setting.search([7])
    assert (found.op, found.key, found.sizes) == ("op.size", (7,), {"length": 7})
    assert found.before == Size(2) and found.best == Size(3)
    assert found.us == {Size(size): us for size, us in setting.us.items()} and found.wrong == {}
    assert setting.log[:2] == [(7, 2), ("timed", 2)], "what is chosen now comes first"
    assert len(setting.log) == 10, "and is not tried twice"


def test_wrong_candidates_do_not_count(setting: Setting) -> None:
    setting.wrong, setting.fails = [3], [4]
    (found,) = setting.search([7])
    assert found.best == Size(5)
    assert found.wrong == {Size(3): "off by one", Size(4): "RuntimeError: out of resources with 4"}
    assert ("timed", 3) not in setting.log and ("timed", 4) not in setting.log


def test_nothing_is_right(setting: Setting) -> None:
    setting.wrong = [1, 2, 3, 4, 5]
    (found,) = setting.search([7])
    assert found.best is None and found.us == {} and len(found.wrong) == 5


def test_the_one_before_may_be_wrong(setting: Setting) -> None:
    setting.wrong = [2]
    (found,) = setting.search([7])
    assert found.best == Size(3)


def test_noise_changes_nothing(setting: Setting) -> None:
    setting.us |= {3: 7.9}
    setting.us |= {4: 8.0, 5: 8.0}
    (found,) = setting.search([7])
    assert found.best == found.before == Size(2)


def test_each_key_once(setting: Setting) -> None:
    setting.known = {("op.size", (8,))}
    assert [found.key for found in setting.search([7, 8, 7, 9])] == [(7,), (9,)]


def test_time_is_over(setting: Setting) -> None:
    setting.seconds = 14
    assert [found.key for found in setting.search([7, 8, 9])] == [(7,)], "no key is half done"
    assert len(setting.log) == 16


def test_a_lost_gpu(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.fails = [3]
    monkeypatch.setattr(tune, "is_usable", lambda device: False)
    found = []
    with pytest.raises(
        LostError, match=r"'op.size' left the GPU unusable: Size\(size=3, warps=1\) gave Runt"
    ):
        for result in search(
            [None],  # type: ignore[list-item]
            [7, 8],
            ["op.size"],
            timer=setting.timer,
            is_known=lambda op, key: False,
            is_over=lambda: False,
        ):
            found.append(result)
    assert [(result.key, result.best) for result in found] == [((7,), Size(2))], "what was measured is kept"


def test_compiling_is_shared_out(setting: Setting) -> None:
    setting.fails = [4]
    networks: list[Any] = [None]
    for number in range(3):
        done = compile_share(networks, [7, 8], ["op.size"], {("op.size", (9,))}, number, 3)
        assert done == [4, 3, 3][number]
    wanted = [("compiled", length, size) for length in (7, 8) for size in (1, 2, 3, 4, 5)]
    assert sorted(setting.log) == wanted, "and nothing ran only to ask"


def found_for(choice: LaunchChoice[Any], key: Any, us: dict[Any, float]) -> Found:
    return Found(choice.name, key, {}, next(iter(us)), us)


KEY = ("int8", "int4 group 128", 2560, 5120, 16)
US = {TileLaunch(64, 16, splits=8): 7.7, TileLaunch(32, 16, slices=4, stages=3): 7.123456}


@pytest.fixture(autouse=True)
def _no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QUAMBA_TABLES", str(tmp_path / "tables"))
    launches.forget()
    yield
    launches.forget()


def test_a_session_writes_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "tables" / "nvidia-h200.json"
    session = Session(path, GPU)
    assert not session.knows("linear.tiles", KEY) and not path.exists()
    session.keep(found_for(tile_launch, KEY, US))
    content = json.loads(path.read_text())
    assert content["device"] == "NVIDIA H200" and content["measured"]["gpu"] == "NVIDIA H200"
    assert set(content["measured"]) == {"gpu", "torch", "triton", "date"}
    (entry,) = content["launches"]["linear.tiles"]
    assert entry["launch"] == {"features": 32, "tokens": 16, "slices": 4, "stages": 3}, "but for defaults"
    assert (entry["us"], entry["before_us"]) == (7.12, 7.7)
    again = Session(path, GPU)
    assert again.knows("linear.tiles", KEY) and not Session(path, GPU, again=True).knows("linear.tiles", KEY)
    again.keep(found_for(tile_launch, (*KEY[:4], 64), US))
    table = read_table(path, launches.schemas())
    assert len(table.launches["linear.tiles"]) == 2
    nothing = Found("linear.tiles", (*KEY[:4], 512), {}, TileLaunch(16, 16), {}, {TileLaunch(16, 16): "bad"})
    again.keep(nothing)
    assert read_table(path, launches.schemas()) == table


def test_what_a_session_keeps_is_chosen_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quamba.kernels.triton.gemm import Product

    monkeypatch.setattr(launches, "_device", lambda: 0)
    monkeypatch.setattr(launches, "gpu", lambda index: GPU)
    product = Product(9, 2560, 5120, 4, False, "group", 128)
    assert tile_launch(product).slices == 1
    Session(tmp_path / "tables" / "nvidia-h200.json", GPU).keep(found_for(tile_launch, KEY, US))
    assert tile_launch(product) == TileLaunch(32, 16, slices=4, stages=3)


def test_tables_that_are_not_filled(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    Session(path, Gpu("NVIDIA A100", "sm80")).keep(found_for(tile_launch, KEY, US))
    before = path.read_text()
    with pytest.raises(QuambaError, match="is for NVIDIA A100, and this is NVIDIA H200; name another --out"):
        Session(path, GPU)
    assert path.read_text() == before
    with pytest.raises(QuambaError, match="cannot be read: Is a directory"):
        Session(tmp_path, GPU)
    with pytest.raises(QuambaError, match="cannot be written"):
        Session(path / "below.json", GPU)
    path.write_text("{")
    with pytest.raises(QuambaError, match="is not valid JSON"):
        Session(path, GPU)


def test_names_of_ops() -> None:
    names = ["decode.mix", "decode.project", "decode.scan_gate", "decode.ssd_gate"]
    names += ["linear.tiles", "linear.wide", "linear.words", "ssd_step.launch"]
    assert check_ops([]) == names
    assert check_ops(["decode"]) == names[:4] and check_ops(["linear.tiles", "decode.mix"]) == names[::4]
    for wrong, hint in (("linear.tile", "'linear.tiles'"), ("embedding", ""), ("decode.", "decode.mix")):
        with pytest.raises(QuambaError, match=f"The op to tune is '{wrong}', expected one of .*{hint}"):
            check_ops([wrong])


def test_a_model_is_tuned(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the model to results, with real kernels and a clock that likes slices. The head is known."""
    config = Mamba2Config(d_model=64, n_layer=1, vocab_size=61, d_state=16, headdim=16, ngroups=2)
    network = random_network(resolve(load_recipe("w8a8"), config), device).use_kernels(_kernels_of("triton"))
    few = [TileLaunch(32, 16), TileLaunch(16, 16, slices=2)]
    monkeypatch.setattr(tile_launch, "candidates", lambda product: few)
    found = list(
        search(
            [network],
            [6, 5],
            ["linear.tiles"],
            timer=lambda runs: 1.0 if tile_launch().slices == 2 else 2.0,
            is_known=lambda op, key: key[2:4] == (64, 64),
            is_over=lambda: False,
        )
    )
    assert [result.key for result in found] == [
        ("int8", "int8 row", 2 * 128 + 2 * 32 + 8, 64, 16),
        ("int8", "int8 row", 64, 128, 16),
    ]
    assert all(result.best == few[1] and result.wrong == {} and len(result.us) == 3 for result in found)


@pytest.mark.slow
def test_processes_end(device: torch.device) -> None:
    """Those that are done, and those that are not."""
    config = Mamba2Config(d_model=64, n_layer=1, vocab_size=61, d_state=16, headdim=16, ngroups=2)
    plans = [resolve(load_recipe("w8a8"), config)]
    for seconds in (0.5, 120.0):
        start = time.monotonic()
        compile_ahead(plans, [6], ["linear.tiles"], set(), device=device, jobs=2, seconds=seconds)
        assert time.monotonic() - start < seconds + 10
    assert not multiprocessing.active_children()
