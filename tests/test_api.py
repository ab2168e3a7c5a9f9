from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model

import quamba
from quamba import CalibrationSpec, QuambaError, SamplingParams
from quamba.api import choose_device
from quamba.checkpoints.upstream import write_state_spaces
from quamba.formats.weight import WeightFormat

FREE = SamplingParams(top_k=0, temperature=2.0)
IDS = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["mamba", "mamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, tiny_tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A float checkpoint with the byte tokenizer."""
    config = tiny_config(family, vocab_size=257, tie_embeddings=False)
    folder = tmp_path / "float"
    write_state_spaces(folder, config, tiny_model(config).named_tensors())
    shutil.copy(tiny_tokenizer_folder / "tokenizer.json", folder)
    return folder


@pytest.fixture
def calibration(tmp_path: Path) -> CalibrationSpec:
    path = tmp_path / "calibration.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return CalibrationSpec(path, num=4, seqlen=32)


def answers(model: quamba.Model) -> list[tuple[list[int], str]]:
    found = model.generate(["Once", "A longer prompt"], max_new_tokens=12, sampling=FREE, seed=7)
    return [(answer.ids, answer.text) for answer in found]


@pytest.mark.parametrize(
    ("recipe", "state"),
    [("w8a8", "int8"), ("w4a8", "int8"), ("w8a8", "fp16"), ("w4a8", "fp16"), ("w4a16", "fp16")],
)
def test_quantize_save_and_load_give_the_same_bits(
    folder: Path, calibration: CalibrationSpec, tmp_path: Path, recipe: str, state: str
) -> None:
    model = quamba.load(folder)
    before = model(IDS).logits
    groups = WeightFormat(4, "group", 16)  # the shipped 128 is wider than this model
    shipped = quamba.load_recipe(recipe)
    blocks = dataclasses.replace(shipped.blocks, state=state)
    fitting = shipped.replace(blocks=blocks, int4=groups, embedding_int4=groups)
    small, report = quamba.quantize(model, fitting, calibration)
    assert torch.equal(model(IDS).logits, before), "the float model stays as it is"
    assert small.report is report and small.recipe == fitting and small.tokenizer is model.tokenizer
    assert small.size_bytes < 0.6 * model.size_bytes
    assert not torch.equal(small(IDS).logits, before)

    quamba.save(small, tmp_path / "small")
    again = quamba.load(tmp_path / "small")
    assert torch.equal(again(IDS).logits, small(IDS).logits)
    assert answers(again) == answers(small)
    assert again.recipe == fitting and again.config == model.config
    assert again.source == str(folder), "where the float model was"
    assert again.report is not None and again.report.to_dict() == report.to_dict()
    assert again.size_bytes == small.size_bytes

    with pytest.raises(QuambaError, match=rf"'{folder}' is quantized already \({recipe}\)"):
        quamba.quantize(again, fitting, calibration)


def test_a_float_model_saves_with_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    model = quamba.load(folder)
    quamba.save(model, tmp_path / "copy")
    again = quamba.load(tmp_path / "copy")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert answers(again) == answers(model)
    assert again.plan is None and again.recipe is None and again.report is None
    with pytest.raises(QuambaError, match="exists and is not empty"):
        quamba.save(model, tmp_path / "copy")
    quamba.save(again, tmp_path / "copy", overwrite=True)  # over the files it was read from
    assert answers(quamba.load(tmp_path / "copy")) == answers(model)


def test_logits_with_a_cache_and_a_mask(folder: Path) -> None:
    model = quamba.load(folder, dtype=torch.float64)
    whole = model(IDS).logits
    assert whole.shape == (2, 40, 264) and whole.dtype == torch.float64
    cache = model.network.new_cache(2)
    parts = [model(part, cache=cache).logits for part in IDS.split([30, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-11, atol=1e-11)
    padded = torch.cat([torch.zeros_like(IDS[:, :5]), IDS], dim=1)
    mask = (torch.arange(45) >= 5).expand(2, -1).long()
    found = model(padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)


def test_dtypes(folder: Path) -> None:
    assert quamba.load(folder).network.lm_head.weight.dtype == torch.float32
    half = quamba.load(folder, dtype=torch.float16)
    assert half.network.lm_head.weight.dtype == torch.float16
    assert half.network.backbone.layers[0].mixer.ssm.A_log.dtype == torch.float32
    assert len(half.generate("a", max_new_tokens=3)[0].ids) == 3


def test_generate_streams(folder: Path) -> None:
    model = quamba.load(folder)
    steps = model.generate("Once", max_new_tokens=5, sampling=FREE, seed=7, stream=True)
    (whole,) = model.generate("Once", max_new_tokens=5, sampling=FREE, seed=7)
    assert [int(ids) for ids in steps] == whole.ids


def test_without_a_tokenizer_ids_still_work(folder: Path, calibration: CalibrationSpec) -> None:
    (folder / "tokenizer.json").unlink()
    model = quamba.load(folder)
    assert model.tokenizer is None
    assert len(model.generate(IDS, max_new_tokens=3)) == 2
    why = rf"'{folder}' has no tokenizer.json, .*; put the model's tokenizer.json .*into '{folder}'"
    for prompts, stop in (("a", ()), (["a", "b"], ()), (IDS, "stop")):
        with pytest.raises(QuambaError, match=why):
            model.generate(prompts, stop=stop)
    with pytest.raises(QuambaError, match=why):
        quamba.quantize(model, "quamba1-w8a8", calibration)


def test_a_broken_tokenizer_is_named_when_it_is_needed(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    model = quamba.load(folder)
    assert model(IDS).logits.shape == (2, 40, 264)
    with pytest.raises(QuambaError, match=r"tokenizer\.json' is no tokenizer file"):
        model.generate("a")


def test_calibration_is_read_only_where_it_is_needed(folder: Path, tmp_path: Path) -> None:
    model = quamba.load(folder)
    rounding = quamba.Recipe.from_dict({"name": "w8a16", "blocks": {"weights": "int8"}})
    small, report = quamba.quantize(model, rounding, tmp_path / "missing.txt")
    assert report.calibration == {} and small.plan is not None
    with pytest.raises(QuambaError, match=r"missing\.txt"):
        quamba.quantize(model, "quamba1-w8a8", tmp_path / "missing.txt")


def test_a_recipe_is_an_object_a_name_or_a_file(
    folder: Path, calibration: CalibrationSpec, tmp_path: Path
) -> None:
    model = quamba.load(folder)
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nblocks = { weights = "int8" }\n', encoding="utf-8")
    for given in (path, str(path), quamba.load_recipe(path)):
        assert quamba.quantize(model, given)[0].recipe == quamba.load_recipe(path)
    with pytest.raises(QuambaError, match=r"The recipe is 'w4a9', expected one of .* Did you mean 'w4a8'\?"):
        quamba.quantize(model, "w4a9", calibration)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "mps", ""])
def test_an_unknown_device(device: str) -> None:
    with pytest.raises(QuambaError, match=rf"The device is '{device}', expected 'auto', 'cpu', 'cuda' or"):
        choose_device(device)


def test_devices_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(
            QuambaError, match=rf"The device is '{device}', but the number .* is 0; use 'cpu'"
        ):
            quamba.load("nowhere", device=device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device(torch.device("cuda", 1)) == torch.device("cuda:1")
    with pytest.raises(QuambaError, match="the number of CUDA devices torch sees here is 2"):
        choose_device("cuda:2")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "mamba2-demo").mkdir()
    with pytest.raises(QuambaError, match=r"was not found.* Did you mean 'mamba2-demo'\?"):
        quamba.load(tmp_path / "mamba2-dem")


def test_importing_quamba_does_not_wait_for_torch(repo_root: Path) -> None:
    code = (
        "import sys, json, quamba; early = 'torch' in sys.modules\n"
        "missing = [name for name in quamba.__all__ if not hasattr(quamba, name)]\n"
        "print(json.dumps([early, 'torch' in sys.modules, missing]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(repo_root / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [False, True, []]
    with pytest.raises(AttributeError, match="module 'quamba' has no attribute 'laod'"):
        quamba.laod  # noqa: B018


@pytest.mark.slow
def test_the_demo_models_through_the_library(assets: Path, tmp_path: Path) -> None:
    model = quamba.load(assets / "models" / "mamba2-demo")
    texts = CalibrationSpec(assets / "data" / "calibration.txt", num=8, seqlen=128)
    small, _ = quamba.quantize(model, "w8a8", texts)
    quamba.save(small, tmp_path / "small")
    again = quamba.load(tmp_path / "small")
    ids = torch.tensor([model.tokenizer.encode("It was in the year 1813 that the ship was lost.")])
    assert torch.equal(again(ids).logits, small(ids).logits)
    error = (small(ids).logits - model(ids).logits)[..., :4096].double()
    spread = model(ids).logits[..., :4096].double().std()
    assert error.square().mean().sqrt() < 0.15 * spread, "8 bits lose little"
    text = again.generate("It was in the year", max_new_tokens=30)[0].text
    assert sum(character.isalpha() or character.isspace() for character in text) > 0.8 * len(text)
