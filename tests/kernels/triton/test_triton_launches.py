"""Who chooses a launch: the user's table, the package's, the heuristic; and what is wrong with a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quamba.errors import QuambaError
from quamba.kernels import registry
from quamba.kernels.triton import launch_tables, launches
from quamba.kernels.triton.gemm import Product, TileLaunch, product_key, tile_candidates, tile_launch
from quamba.kernels.triton.launch_tables import PACKAGED, Entry, Gpu, Schema, Table, read_table, user_table
from quamba.kernels.triton.launches import LaunchChoice, row_bucket
from quamba.kernels.triton.linear import word_launch

GPU = Gpu("NVIDIA H200", "sm90")
PRODUCT = Product(16, 2560, 5120, 4, False, "group", 128)
KEY = product_key(PRODUCT)
LAUNCH = {"features": 32, "tokens": 16, "splits": 5}
FOUND = TileLaunch(32, 16, splits=5)


@pytest.fixture(autouse=True)
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Gpu]]:
    """The machine's GPUs, of which the first is the current one; folders of tables, both empty."""
    found = [GPU]
    monkeypatch.setattr(launches, "_device", lambda: 0)
    monkeypatch.setattr(launches, "gpu", lambda index: found[index])
    monkeypatch.setattr(launch_tables, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("QUAMBA_TABLES", str(tmp_path / "user"))
    launches.forget()
    yield found
    launches.forget()


def put(folder: Path, name: str, splits: int, **fields: Any) -> Path:
    """A table of one entry in a folder."""
    table = Table(**{"architecture": "sm90", **fields})
    table.put("linear.tiles", KEY, Entry({**LAUNCH, "splits": splits}, 9.5, 12.0))
    table.write(folder / name, launches.schemas())
    launches.forget()
    return folder / name


def chosen() -> int:
    """Splits, 8 by the heuristic."""
    return tile_launch(PRODUCT).splits


def test_the_first_table_that_knows_counts(tmp_path: Path) -> None:
    assert chosen() == tile_launch.heuristic(PRODUCT).splits == 8
    put(tmp_path / "packaged", "sm90.json", 5)
    assert chosen() == 5
    put(tmp_path / "packaged", "nvidia-h200.json", 6)
    assert chosen() == 6
    put(tmp_path / "user", "nvidia-h200.json", 7)
    assert chosen() == 7
    other = PRODUCT._replace(features=2561)
    assert tile_launch(other) == tile_launch.heuristic(other), "keys are exact"
    assert tile_launch(PRODUCT._replace(tokens=5)).splits == 7, "but for rows of one bucket"
    assert tile_launch(PRODUCT._replace(tokens=17)) == tile_launch.heuristic(PRODUCT._replace(tokens=17))


@pytest.mark.parametrize(
    ("gpu", "fields", "known"),
    [
        (GPU, {}, True),
        (GPU, {"device": "NVIDIA H200"}, True),
        (GPU, {"device": "NVIDIA H100 PCIe"}, False),
        (GPU, {"architecture": "sm80"}, False),
        (Gpu("NVIDIA A100", "sm80"), {"architecture": "sm80"}, True),
    ],
    ids=["architecture", "device", "other-device", "other-architecture", "its-architecture"],
)
def test_tables_are_for_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[Gpu],
    gpu: Gpu,
    fields: dict[str, Any],
    known: bool,
) -> None:
    gpus[0] = gpu
    monkeypatch.setenv("QUAMBA_TABLES", str(put(tmp_path, "mine.json", 5, **fields)))
    assert (chosen() == 5) == known


def test_each_gpu_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu]) -> None:
    gpus.append(Gpu("NVIDIA A100", "sm80"))
    put(tmp_path / "user", "nvidia-h200.json", 7)
    assert chosen() == 7
    monkeypatch.setattr(launches, "_device", lambda: 1)
    assert chosen() == 8


def test_no_gpu_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert launches.gpu(-1) is None and launches._measured(-1) == {}


def test_tables_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "user", "nvidia-h200.json", 7)
    assert chosen() == 7
    monkeypatch.setattr(launches, "tables_of", None)
    monkeypatch.setattr(tile_launch, "_find", None)
    assert chosen() == 7
    assert len({id(tile_launch(PRODUCT)) for _ in range(3)}) == 1


def test_lengths_of_prompts_do_not_pile_up() -> None:
    for tokens in range(1, launches._MOST_KNOWN + 9):
        tile_launch(PRODUCT._replace(tokens=tokens))
    assert len(tile_launch._known) < 16 and chosen() == 8


def test_a_forced_launch(tmp_path: Path) -> None:
    put(tmp_path / "user", "nvidia-h200.json", 7)
    with tile_launch.forced(FOUND):
        assert tile_launch(PRODUCT) is FOUND and word_launch(PRODUCT).words == 64
        with tile_launch.forced(TileLaunch(16, 16)):
            assert chosen() == 1
        assert chosen() == 5
    assert chosen() == 7


def test_what_is_asked_for() -> None:
    tile_launch(PRODUCT)
    with launches.asked() as asked:
        tile_launch(PRODUCT)
        tile_launch(PRODUCT)
        word_launch(PRODUCT)
    word_launch(PRODUCT._replace(tokens=2))
    assert [(a.choice, a.arguments, a.launch) for a in asked] == [
        (choice, {"product": PRODUCT}, choice(PRODUCT)) for choice in (tile_launch, word_launch)
    ]
    assert asked[0].key == ("int8", "int4 group 128", 2560, 5120, 16)


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (8192, 8192), (10**6, 8192)]
)
def test_buckets_of_rows(rows: int, bucket: int) -> None:
    assert row_bucket(rows) == bucket


def test_where_the_users_table_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_table(GPU) == tmp_path / "user" / "nvidia-h200.json"
    monkeypatch.setenv("QUAMBA_TABLES", str(tmp_path / "one.json"))
    assert user_table(GPU) == tmp_path / "one.json"
    monkeypatch.delenv("QUAMBA_TABLES")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert user_table(GPU) == tmp_path / "config" / "quamba" / "tables" / "nvidia-h200.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_table(GPU) == tmp_path / ".config" / "quamba" / "tables" / "nvidia-h200.json"


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = Table("sm90", "NVIDIA H200", {"gpu": "NVIDIA H200", "date": "2026-11"})
    for rows in (512, 64, 16):
        table.put("linear.tiles", KEY._replace(rows=rows), Entry(LAUNCH, 9.5))
    table.put("linear.words", KEY, Entry({"rows": 1, "words": 64, "warps": 1}, 4.25, 5.5))
    table.put("decode.mix", (1, 40, 64, True, False), Entry({"columns": 16, "warps": 4}))
    schemas = launches.schemas()
    table.write(tmp_path / "new" / "t.json", schemas)
    assert read_table(tmp_path / "new" / "t.json", schemas) == table
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.json"]
    lines = (tmp_path / "new" / "t.json").read_text().splitlines()
    rows = [json.loads(line.strip(" ,"))["rows"] for line in lines if '"features": 2560' in line]
    assert rows == [16, 64, 512, 16], "an entry a line, in order"


def spoilt(change: Any) -> Any:
    """A table with one thing wrong: ``change`` gets the file, its entry and the launch of that."""
    entry = {**KEY._asdict(), "launch": dict(LAUNCH), "us": 9.5}
    content: dict[str, Any] = {"format": 1, "architecture": "sm90", "device": None, "measured": {}}
    content["launches"] = {"linear.tiles": [entry]}
    change(content, entry, entry["launch"])
    return content


FAULTS: dict[str, tuple[Any, str]] = {
    "format": (lambda c, e, f: c.update(format=2), "has format 2, expected 1"),
    "field": (lambda c, e, f: c.update(lunches={}), "unknown field 'lunches' in the table"),
    "architecture": (lambda c, e, f: c.update(architecture=90), "has 90 for 'architecture' in the table"),
    "no-launches": (lambda c, e, f: c.pop("launches"), "lacks 'launches' in the table"),
    "op": (
        lambda c, e, f: c["launches"].update({"linear.tile": []}),
        "unknown op 'linear.tile'; without it, 'quamba tune' makes a new one. Did you mean 'linear.tiles'?",
    ),
    "no-list": (lambda c, e, f: c["launches"].update({"linear.words": {}}), "expected a list"),
    "no-entry": (lambda c, e, f: c["launches"]["linear.tiles"].append(3), "has 3 as entry 1 of"),
    "key": (lambda c, e, f: e.update(row=1), "unknown field 'row' in entry 0 of 'linear.tiles'"),
    "no-key": (lambda c, e, f: e.pop("rows"), "lacks 'rows' in entry 0 of 'linear.tiles'"),
    "text": (lambda c, e, f: e.update(rows="16"), "has '16' for 'rows' in entry 0"),
    "launch": (lambda c, e, f: f.update(split=4), "Did you mean 'splits'?"),
    "no-launch": (lambda c, e, f: f.pop("features"), "lacks 'features' in the launch of entry 0"),
    "true": (lambda c, e, f: f.update(splits=True), "has True for 'splits'"),
    "negative": (lambda c, e, f: f.update(splits=-1), "has -1 for 'splits'"),
    "time": (lambda c, e, f: e.update(us="fast"), "has 'fast' for 'us'"),
    "twice": (lambda c, e, f: c["launches"]["linear.tiles"].append(e), "has entry 1 of 'linear.tiles' twice"),
}


@pytest.mark.parametrize(("change", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_table_that_cannot_be_used(tmp_path: Path, change: Any, fault: str) -> None:
    path = tmp_path / "user" / "nvidia-h200.json"
    path.parent.mkdir()
    path.write_text(json.dumps(spoilt(change)))
    with pytest.raises(QuambaError) as error:
        chosen()
    assert fault in str(error.value) and f"The launch table '{path}' " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_is_not_loaded_with_a_broken_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_without_triton", lambda device: None)
    assert registry.choose_kernels(torch.device("cuda:0")).name == "triton"
    path = put(tmp_path / "user", "nvidia-h200.json", 7)
    path.write_text(path.read_text().replace("splits", "split"))
    for backend in ("auto", "triton"):
        with pytest.raises(QuambaError, match="unknown field 'split' in the launch of entry 0"):
            registry.choose_kernels(torch.device("cuda:0"), backend)
    assert registry.choose_kernels(torch.device("cuda:0"), "reference").name == "reference"


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"], ids=["broken", "list", "bytes"])
def test_a_file_that_is_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(QuambaError, match=r"is not valid JSON|holds a JSON list"):
        read_table(path, launches.schemas())
    with pytest.raises(QuambaError, match="cannot be read"):
        read_table(tmp_path, launches.schemas())


def test_a_valid_table_passes(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(spoilt(lambda c, e, f: None)))
    table = read_table(tmp_path / "t.json", launches.schemas())
    assert table.launches == {"linear.tiles": {KEY: Entry(LAUNCH, 9.5)}}


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.json")), ids=lambda path: path.stem)
def test_packaged_tables(path: Path) -> None:
    table = read_table(path, launches.schemas())
    assert path.stem in (table.architecture, table.device and Gpu(table.device, "").slug)
    assert set(table.measured) == {"gpu", "torch", "triton", "date"}
    for op, entries in table.launches.items():
        choice = launches.choices()[op]
        assert choice.candidates is not None and entries
        for entry in entries.values():
            choice.launch(entry)


def test_what_was_measured_is_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_tables, "PACKAGED", PACKAGED)
    launches.forget()
    assert tile_launch(Product(12, 2560, 5120, 8, False, "row", 5120)) == TileLaunch(16, 16, slices=4)
    assert tile_launch(Product(9, 10576, 2560, 8, False, "row", 2560)).splits == 2


def test_every_choice_has_a_schema() -> None:
    for name, choice in launches.choices().items():
        assert name == choice.name and choice.__doc__ == choice.heuristic.__doc__
        schema = choice.schema
        assert set(schema.key.values()) <= {str, int, bool} and schema.required <= set(schema.launch)
        assert set(schema.launch.values()) <= {int, bool}


def test_candidates_of_products() -> None:
    for tokens in (1, 5, 16, 17, 33, 64, 65, 512, 2048, 8192):
        for features, inputs in ((24, 160), (2560, 5120), (10576, 2560), (50288, 2560)):
            for bits, half in ((8, False), (4, False), (4, True)):
                product = Product(tokens, features, inputs, bits, half, "row", inputs)
                found = tile_candidates(product)
                assert 1 <= len(found) <= 28 and len(set(found)) == len(found)
                assert all(c.slices == 1 or c.splits == 1 for c in found)
                assert all(c.inputs <= 256 for c in found)


@dataclasses.dataclass(frozen=True)
class Parts:
    parts: int = 1
    early: bool = False


def parts_for(rows: int, wide: bool = False) -> Parts | None:
    return None if wide else Parts(rows)


def test_a_choice_of_its_own() -> None:
    """Keys are the arguments where no other are named; a heuristic may find nothing."""
    choice: LaunchChoice[Any] = LaunchChoice("op.parts", parts_for, None, None)
    assert choice.schema == Schema({"rows": int, "wide": bool}, {"parts": int, "early": bool}, frozenset())
    assert choice(3) == choice(rows=3) == Parts(3) and choice(3, wide=True) is None
    assert choice.launch(Entry({"early": True})) == Parts(1, True)
