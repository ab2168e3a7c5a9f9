"""Weight files: every layout reads back exactly, every broken one gives a sentence."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quamba.checkpoints.tensors import StreamedTensor, open_tensors, write_tensors, written_beside
from quamba.errors import QuambaError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(5, 7, generator=generator).half(),
        "brain": torch.randn(33, generator=generator).bfloat16(),
        "codes": torch.randint(-128, 128, (6, 4), generator=generator, dtype=torch.int8),
        "packed": torch.randint(0, 256, (3, 2), generator=generator, dtype=torch.uint8),
        "scalar": torch.tensor(0.5),
        "wide": torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
    }


def put_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_tensors(folder, tensors)


def put_safetensors_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert len(write_tensors(folder, tensors, max_shard_bytes=100)) == 3


def put_zip(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def put_legacy(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def put_zip_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    files = {name: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: t for name, t in tensors.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


LAYOUTS = [put_safetensors, put_safetensors_shards, put_zip, put_legacy, put_zip_shards]


@pytest.mark.parametrize("put", LAYOUTS)
def test_every_layout_reads_back_exactly(tmp_path, put):
    tensors = some_tensors()
    put(tmp_path, tensors)
    source = open_tensors(tmp_path)
    assert set(source.keys()) == set(source) == set(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype == source.get(name).dtype
        assert torch.equal(source.get(name), tensor)
    assert source.values == {}
    assert source.size_bytes() == sum(file.stat().st_size for file in source.files) > 0
    assert all(file.parent == tmp_path for file in source.files)


def test_shapes_and_dtypes_come_from_the_header(tmp_path, monkeypatch):
    put_safetensors(tmp_path, some_tensors())
    source = open_tensors(tmp_path)
    monkeypatch.setattr(type(source), "get", lambda *_: pytest.fail("a tensor was read"))
    assert source.shape("wide") == (2, 3, 4)
    assert source.dtype("packed") == torch.uint8


def test_a_zip_checkpoint_is_mapped_and_not_read(tmp_path, monkeypatch):
    put_zip(tmp_path, some_tensors())
    calls = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: calls.append(kw) or real(*args, **kw))
    open_tensors(tmp_path)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


def test_safetensors_win_over_a_pickle(tmp_path):
    put_zip(tmp_path, {"old": torch.ones(1)})
    put_safetensors(tmp_path, {"new": torch.ones(1)})
    assert open_tensors(tmp_path).keys() == ("new",)


def test_plain_values_of_a_pickle_are_kept_apart(tmp_path):
    torch.save({"w": torch.ones(2), "scale": 0.25, "none": None}, tmp_path / "pytorch_model.bin")
    source = open_tensors(tmp_path)
    assert source.keys() == ("w",)
    assert source.values == {"scale": 0.25, "none": None}


def test_metadata(tmp_path):
    write_tensors(tmp_path, {"w": torch.ones(2)}, metadata={"format_version": "1"})
    assert open_tensors(tmp_path).metadata == {"format": "pt", "format_version": "1"}


def test_a_tensor_that_is_not_there(tmp_path):
    put_safetensors(tmp_path, some_tensors())
    for ask in ("get", "shape", "dtype"):
        with pytest.raises(QuambaError, match=r"lack the tensor 'haf'. Did you mean 'half'?"):
            getattr(open_tensors(tmp_path), ask)("haf")


class Calls:
    def __reduce__(self):
        return (os.mkdir, ("called",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"w": torch.ones(2), "x": Calls()},
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(QuambaError, match=r"its pickle calls '\w+.mkdir'") as caught:
        open_tensors(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("put", [put_safetensors, put_zip, put_legacy])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_file(tmp_path, put, kept):
    put(tmp_path, {"w": torch.zeros(3000)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(QuambaError, match=f"{file.name}' is truncated or no") as caught:
        open_tensors(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04 and no more", b"\x80\x02]q\x00."]
)
def test_a_file_that_is_no_checkpoint(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuambaError, match=f"{name}' (is truncated or no|holds a list)"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(QuambaError, match=r"is a Git LFS pointer and not the weights"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(1)], {1: torch.ones(1)}, torch.ones(1)])
def test_a_pickle_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(QuambaError, match=r"expected tensors by name"):
        open_tensors(tmp_path)


def test_a_bare_pickle(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(QuambaError, match=r"is truncated or no PyTorch checkpoint"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("put", [put_safetensors_shards, put_zip_shards])
def test_a_missing_shard_is_named(tmp_path, put):
    put(tmp_path, some_tensors())
    shards = sorted(file for file in tmp_path.iterdir() if "-of-" in file.name)
    shards[1].unlink()
    with pytest.raises(QuambaError, match=f"lacks 1 of the {len(shards)} weight files of .*{shards[1].name}"):
        open_tensors(tmp_path)


def rewrite_index(folder: Path, **weight_map: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].update(weight_map)
    index.write_text(json.dumps(content))


def test_an_index_that_promises_too_much(tmp_path):
    put_safetensors_shards(tmp_path, some_tensors())
    rewrite_index(tmp_path, ghost="model-00001-of-00003.safetensors")
    with pytest.raises(QuambaError, match=r"lacks the tensor 'ghost'"):
        open_tensors(tmp_path)


def test_an_index_that_leaves_the_folder(tmp_path):
    put_safetensors_shards(tmp_path, some_tensors())
    rewrite_index(tmp_path, half="../model.safetensors")
    with pytest.raises(QuambaError, match=r"expected a file name in the same folder"):
        open_tensors(tmp_path)


def test_a_tensor_that_the_index_forgot_is_still_seen(tmp_path):
    put_safetensors_shards(tmp_path, some_tensors())
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["codes"]
    index.write_text(json.dumps(content))
    assert "codes" in open_tensors(tmp_path)


def test_an_index_without_map(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(QuambaError, match=r"has no 'weight_map'"):
        open_tensors(tmp_path)


def test_a_folder_without_weights(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(QuambaError, match=r"has no weights: expected .*, only weights.safetensors"):
        open_tensors(tmp_path)


def test_shards_stay_under_the_limit(tmp_path):
    files = write_tensors(tmp_path, {name: torch.zeros(10) for name in "abcde"}, max_shard_bytes=80)
    held = [sorted(safe_open(file, "pt").keys()) for file in files]
    assert held == [["a", "b"], ["c", "d"], ["e"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["e"] == "model-00003-of-00003.safetensors"


def test_shared_and_strided_tensors_are_stored(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path, {"table": table, "same": table, "turned": table.T, "row": table[1]})
    source = open_tensors(tmp_path)
    assert torch.equal(source.get("turned"), table.T)
    assert torch.equal(source.get("same"), table)
    assert torch.equal(source.get("row"), table[1])


def test_written_beside_appears_at_once(tmp_path):
    target = tmp_path / "deep" / "model"
    with written_beside(target) as new:
        (new / "file").write_text("x")
        assert new.parent == target.parent
        assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["model"]
    assert (target / "file").read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "model"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(error), written_beside(target, overwrite=True) as new:
        (new / "file").write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (target / "file").read_text() == "old"


def test_overwriting_is_asked_for(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with written_beside(target) as new:  # an empty folder is no obstacle
        (new / "file").write_text("old")
    with pytest.raises(QuambaError, match=r"exists and is not empty"), written_beside(target):
        pytest.fail("the block ran")
    with written_beside(target, overwrite=True) as new:
        (new / "other").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in target.iterdir()] == ["other"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(QuambaError, match=r"is a file"), written_beside(tmp_path / "model", overwrite=True):
        pytest.fail("the block ran")


def test_what_is_large_starts_at_an_aligned_place(tmp_path):
    """Matrix libraries sum in another order where memory is not aligned; mapped tensors are used in place."""
    tensors = {"a": torch.tensor(1.0), "b": torch.ones(3, dtype=torch.int8), "c": torch.ones(7, 64)}
    write_tensors(tmp_path, {**tensors, "d": torch.ones(32, 2).half(), "e": torch.ones(0)})
    source = open_tensors(tmp_path)
    assert source.get("c").data_ptr() % 64 == source.get("d").data_ptr() % 64 == 0
    assert source.get("e").shape == (0,)


def test_other_programs_read_what_is_written(tmp_path):
    from safetensors.torch import load_file

    tensors = some_tensors()
    write_tensors(tmp_path, tensors, metadata={"made_by": "a test"})
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "a test"}


@pytest.mark.parametrize("limit", [100, 10**9], ids=["shards", "one file"])
def test_streamed_tensors_are_written_as_whole_ones(tmp_path, limit):
    plain, streamed = tmp_path / "plain", tmp_path / "streamed"
    plain.mkdir(), streamed.mkdir()
    tensors = some_tensors()
    write_tensors(plain, tensors, max_shard_bytes=limit)
    pieces = {
        name: StreamedTensor(t.shape, t.dtype, lambda t=t: iter(t.split(2) if t.ndim else (t,)))
        for name, t in tensors.items()
    }
    write_tensors(streamed, pieces, max_shard_bytes=limit)
    files = {path.name: path.read_bytes() for path in plain.iterdir()}
    assert files == {path.name: path.read_bytes() for path in streamed.iterdir()}


def test_a_streamed_tensor_keeps_its_word(tmp_path):
    short = StreamedTensor((4, 2), torch.float32, lambda: iter([torch.zeros(3, 2)]))
    with pytest.raises(AssertionError, match="not as announced"):
        write_tensors(tmp_path, {"short": short})
