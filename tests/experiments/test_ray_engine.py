"""The same on a Ray cluster of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from stand_ins import MODULE, diary

from quamba.errors import QuambaError
from quamba.experiments.engines.ray import RETRIES, RayEngine
from quamba.experiments.run import Done, Job
from quamba.experiments.state import RunsFolder


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quamba.experiments.engines.ray.find_spec", lambda name: None)
    with pytest.raises(QuambaError, match=r"needs the package 'ray'.*pip install 'quamba\[ray\]'"):
        RayEngine()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("nowhere", "--ray_address is 'nowhere', expected HOST:PORT"),
        ("ray://h:1", "--ray_address is 'ray://h:1', expected HOST:PORT"),
        ("127.0.0.1:1", "No Ray cluster answers at '127.0.0.1:1' (Connection refused); start one with"),
    ],
)
def test_a_cluster_that_is_not_there(here: Path, address: str, sentence: str) -> None:
    pytest.importorskip("ray", reason="the package 'ray' is not installed")
    job = Job("a", ("m", "--quantize"), "m", "out", os.getcwd(), runner=f"{MODULE}:measure")
    with pytest.raises(QuambaError) as caught:
        RayEngine(1, address).run([job], lambda job: None, lambda done: None)
    assert str(caught.value).startswith(sentence)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(here: Path) -> None:
    pytest.importorskip("ray", reason="the package 'ray' is not installed")
    arguments = ("m", "--quantize", "--device", "cpu")
    names = ("a", "bad", "once", "dies", "b")
    jobs = [
        Job(name, arguments, "m", str(here / "out"), os.getcwd(), share=False, runner=f"{MODULE}:measure")
        for name in names
    ]
    (here / "out").mkdir()
    ended: dict[str, Done] = {}
    RayEngine(2).run(jobs, lambda job: None, lambda done: ended.update({done.name: done}))
    assert {name for name, done in ended.items() if done.ok} == {"a", "once", "b"}
    assert ended["bad"].sentence == "There is no folder 'nowhere'."
    assert f"Ray gave it up after {RETRIES} more attempts" in ended["dies"].sentence
    begun = [name for _, name in diary(here / "out")]
    assert (begun.count("once"), begun.count("dies"), begun.count("a")) == (2, 1 + RETRIES, 1)
    assert RunsFolder.at(here / "out").result("once") is not None
