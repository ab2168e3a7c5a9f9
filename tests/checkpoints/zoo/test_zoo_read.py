"""Published checkpoints against the logits that the published code gives for them, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_fixtures import FIXTURES, zoo_path

import quamba
from quamba.api import Model
from quamba.checkpoints.stored import read_stored, read_stored_plan, stored_format
from quamba.checkpoints.zoo.read import channel_groups, read_zoo, read_zoo_plan
from quamba.errors import QuambaError
from quamba.formats.weight import QuantizedWeight
from quamba.runtime.generate import decode_step, prefill

Edit = Callable[[dict[str, Any]], None]

# Relative L2 error of all logits, and the least cosine of a position. Why it is not zero: docs/zoo.md.
BOUNDS = {"w8a8": (0.03, 0.998), "w4a8": (0.03, 0.998), "w4a16": (0.003, 0.9999)}


def expected_logits(folder: Path) -> tuple[Tensor, Tensor]:
    """ids (1, 64) and the logits (64, vocab) of the published code, float64."""
    stored = torch.load(folder / "expected.pt", weights_only=True)
    return stored["input_ids"], stored["logits"].double()


@pytest.mark.parametrize("zoo_folder", FIXTURES, indirect=True)
def test_logits_of_the_published_code(zoo_folder: Path) -> None:
    ids, expected = expected_logits(zoo_folder)
    logits = quamba.load(zoo_folder)(ids).logits[0].double()
    worst, least = BOUNDS[zoo_folder.name.rpartition("-")[2]]
    assert float((logits - expected).norm() / expected.norm()) < worst
    assert float(torch.cosine_similarity(logits, expected, dim=-1).min()) > least
    top = expected.topk(2, dim=-1).values
    clear = top[:, 0] - top[:, 1] > 0.1
    assert int(clear.sum()) >= 50
    assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("zoo_folder", FIXTURES, indirect=True)
def test_a_converted_model_is_the_same_model(zoo_folder: Path, tmp_path: Path) -> None:
    ids, _ = expected_logits(zoo_folder)
    quamba.convert(zoo_folder, tmp_path / "ours")
    original, converted = quamba.load(zoo_folder), quamba.load(tmp_path / "ours")
    assert stored_format(tmp_path / "ours") == "quamba"
    assert stored_format(zoo_folder) == "zoo"
    assert torch.equal(original(ids).logits, converted(ids).logits)
    ours, theirs = converted.network.named_tensors(), original.network.named_tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert converted.recipe == original.recipe
    assert read_stored_plan(zoo_folder)[0] == read_stored_plan(tmp_path / "ours")[0] == original.plan


@pytest.mark.parametrize("zoo_folder", FIXTURES, indirect=True)
def test_reading_token_by_token_gives_the_logits_of_one_pass(zoo_folder: Path) -> None:
    """Equal up to the rounding of the cached state, int8 where activations are."""
    ids, _ = expected_logits(zoo_folder)
    network = quamba.load(zoo_folder, dtype=torch.float32).network
    with torch.inference_mode():
        whole = network(ids[:, :24])[0].double()
    _, cache = prefill(network, ids[:, :8])
    steps = torch.stack([decode_step(network, ids[:, t], cache)[0] for t in range(8, 24)]).double()
    error = float((steps - whole[8:]).norm() / whole[8:].norm())
    assert error < (1e-4 if zoo_folder.name.endswith("w4a16") else 0.1)


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
def test_row_scales_come_back_as_the_float16_numbers_they_were(zoo_folder: Path) -> None:
    """The file holds their quotients by the output scales."""
    network = read_zoo(zoo_folder).network
    weight = network.blocks[0].mixer.in_proj.weight
    assert isinstance(weight, QuantizedWeight) and weight.channel_scale is not None
    assert torch.equal(weight.channel_scale, weight.channel_scale.half().float())
    integers, _ = weight.integers()
    assert int(integers.abs().max()) == 127
    assert bool((integers.abs().amax(1) >= 126).all())


def test_a_hybrid_model_is_made_of_its_blocks(repo_root: Path, tmp_path: Path) -> None:
    """Block 0 of the W4A8 file, block 1 of the W4A16 one, in the layout of hybrid files."""
    folders = [zoo_path(repo_root, f"quamba2-demo2-{kind}") for kind in ("w4a8", "w4a16")]
    kinds = ("W4A8", "W4A16")
    files = [torch.load(f / "pytorch_model.bin", map_location="cpu", weights_only=True) for f in folders]
    state = {name: value for name, value in files[0].items() if ".layers." not in name}
    for i, (kind, file) in enumerate(zip(kinds, files, strict=True)):
        for name, value in file.items():
            if f".layers.{i}." in name:
                for part in ("norm", "mixer"):
                    if f".layers.{i}.{part}." in name:
                        state[name.replace(f".{part}.", f".{part}s.{kind}.", 1)] = value
    fields = json.loads((folders[0] / "config.json").read_text())
    fields["ssm_cfg"]["layer"] = [{kind: f"{kind}QMamba2"} for kind in kinds]
    fields["norm_cfg"]["norm"] = [{"W4A8": "QRMSNorm"}, {"W4A16": "RMSNorm"}]
    hybrid = tmp_path / "quamba2-demo2-w4aX"
    hybrid.mkdir()
    (hybrid / "config.json").write_text(json.dumps({**fields, "is_hybrid": True}))
    torch.save(state, hybrid / "pytorch_model.bin")

    model, (first, second) = quamba.load(hybrid), [quamba.load(f, dtype=torch.float16) for f in folders]
    assert model.recipe is not None and model.plan is not None
    assert model.recipe.name == "zoo-w4ax"
    assert [block.label for block in model.plan.blocks] == list(kinds)
    assembled = first.network
    assembled.backbone.layers[1] = second.network.backbone.layers[1]
    ids, _ = expected_logits(folders[0])
    with torch.inference_mode():
        assert torch.equal(model.network(ids), assembled(ids))
    quamba.convert(hybrid, tmp_path / "ours")
    assert torch.equal(quamba.load(tmp_path / "ours")(ids).logits, model(ids).logits)
    assert quamba.export_zoo(tmp_path / "ours", tmp_path / "back") == []
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", map_location="cpu", weights_only=True)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(back[name], value) if isinstance(value, Tensor) else back[name] == value, name


def test_channel_groups_of_a_small_case() -> None:
    """2 SSD groups of 3 heads of 4 channels, 2 head groups, 2 channel groups."""
    heads = torch.tensor([[1, 3], [2, 3]], dtype=torch.int32)
    channels = torch.tensor([[[1, 4], [2, 4]], [[3, 4], [4, 4]]], dtype=torch.int32)
    first = [0, 1, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    second = [4, 4, 4, 5, 4, 4, 4, 5, 6, 6, 6, 6]
    assert channel_groups(heads, channels, 3, 4).tolist() == first + second


def edited(folder: Path, tmp_path: Path, edit: Edit | None = None, config: Edit | None = None) -> Path:
    """A copy of a fixture with other entries, other config fields."""
    copy = tmp_path / folder.name
    copy.mkdir()
    fields = json.loads((folder / "config.json").read_text())
    if config is not None:
        config(fields)
    (copy / "config.json").write_text(json.dumps(fields))
    if edit is None:
        shutil.copyfile(folder / "pytorch_model.bin", copy / "pytorch_model.bin")
        return copy
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    edit(state)
    torch.save(state, copy / "pytorch_model.bin")
    return copy


def _set(name: str, value: Any) -> Edit:
    return lambda state: state.__setitem__(name, value)


def _drop(state: dict[str, Any]) -> None:
    for i in (0, 1):
        del state[f"backbone.layers.{i}.mixer.in_proj.s_group"]
    del state["lm_head.workspace"]
    state["lm_head.bias"] = torch.zeros(4096)


BLOCK = "backbone.layers.1.mixer."
WRONG_ENTRIES: list[tuple[str, Edit, str]] = [
    (
        "missing and unknown",
        _drop,
        "missing: backbone.layers.{0-1}.mixer.in_proj.s_group, lm_head.workspace; unknown: lm_head.bias.",
    ),
    (
        "number for tensor",
        _set("lm_head.input_scale", 0.04),
        "wrong: lm_head.input_scale is a number instead of float32 [].",
    ),
    (
        "tensor for number",
        _set("backbone.norm_f.output_scale", torch.tensor(0.04)),
        "wrong: backbone.norm_f.output_scale is float32 [] instead of a number.",
    ),
    (
        "number for None",
        _set(f"{BLOCK}norm.output_scale", 1.0),
        f"wrong: {BLOCK}norm.output_scale is a number instead of None.",
    ),
    (
        "shape",
        _set("lm_head.s_channel", torch.ones(1, 4032)),
        "wrong: lm_head.s_channel is float32 [1, 4032] instead of float32 [1, 4096].",
    ),
    (
        "dtype",
        _set("backbone.embedding.scales", torch.ones(4096)),
        "wrong: backbone.embedding.scales is float32 [4096] instead of float16 [4096].",
    ),
    (
        "text",
        _set(f"{BLOCK}norm.z_scale", "0.1"),
        f"wrong: {BLOCK}norm.z_scale is the str '0.1' instead of a number.",
    ),
    (
        "infinity",
        _set(f"{BLOCK}norm.z_scale", float("inf")),
        f"wrong: {BLOCK}norm.z_scale is the float inf instead of a number.",
    ),
]


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
@pytest.mark.parametrize(
    ("edit", "sentence"), [w[1:] for w in WRONG_ENTRIES], ids=[w[0] for w in WRONG_ENTRIES]
)
def test_wrong_entries_are_named(zoo_folder: Path, tmp_path: Path, edit: Edit, sentence: str) -> None:
    folder = edited(zoo_folder, tmp_path, edit)
    with pytest.raises(QuambaError) as caught:
        read_zoo(folder)
    assert str(caught.value) == (
        f"The entries of '{folder / 'pytorch_model.bin'}' do not fit config.json; {sentence}"
    )


def _shift(name: str, by: float = 1.01) -> Edit:
    def edit(state: dict[str, Any]) -> None:
        state[name] = state[name] * by

    return edit


def _ranges(state: dict[str, Any]) -> None:
    for module in ("conv1d", "qchunk_scan"):
        state[f"{BLOCK}{module}.x_head_group_range"][0, -1] = 11


CONTRADICTIONS: list[tuple[str, str, Edit, str]] = [
    (
        "w4a8",
        f"{BLOCK}in_proj.input_scale",
        _shift("backbone.layers.1.norm.output_scale"),
        "norm.output_scale",
    ),
    ("w4a8", f"{BLOCK}out_proj.input_scale", _shift(f"{BLOCK}out_proj.input_scale"), "had.x_H_scale"),
    ("w4a8", "lm_head.input_scale", _shift("lm_head.input_scale"), "backbone.norm_f.output_scale"),
    ("w4a8", f"{BLOCK}conv1d.x_out_scales", _shift(f"{BLOCK}qchunk_scan.x_scales"), "qchunk_scan.x_scales"),
    ("w4a8", f"{BLOCK}conv1d.B_out_scales", _shift(f"{BLOCK}conv1d.B_out_scales"), "qchunk_scan.B_scale"),
    ("w4a8", f"{BLOCK}conv1d.C_out_scales", _shift(f"{BLOCK}qchunk_scan.C_scale"), "qchunk_scan.C_scale"),
    ("w4a8", f"{BLOCK}norm.z_scale", _set(f"{BLOCK}norm.z_scale", -0.1), "positive scales"),
    (
        "w4a8",
        f"{BLOCK}qchunk_scan.ssm_state_scale",
        _shift(f"{BLOCK}qchunk_scan.ssm_state_scale", 0.0),
        "positive",
    ),
    ("w4a8", "x_head_group_range", _ranges, "expected ends of groups that rise to 12"),
    ("w4a8", "backbone.layers.0.norm.weight", _shift("backbone.layers.0.norm.weight"), "not all ones"),
    ("m1-w8a8", f"{BLOCK}in_proj.a", _shift(f"{BLOCK}in_proj.a"), "norm.output_scale"),
    ("m1-w8a8", f"{BLOCK}in_proj.alpha", _shift(f"{BLOCK}in_proj.alpha"), f"{BLOCK}in_proj.b"),
    ("m1-w8a8", f"{BLOCK}x_proj.a", _shift(f"{BLOCK}x_proj.a"), "conv1d.output_scale"),
    ("m1-w8a8", f"{BLOCK}dt_proj.a", _shift(f"{BLOCK}dt_proj.a"), "selective_scan.B_scale"),
    ("m1-w8a8", f"{BLOCK}selective_scan.z_scale", _shift(f"{BLOCK}selective_scan.z_scale"), "input_scale"),
    ("m1-w8a8", f"{BLOCK}selective_scan.u_scale", _shift(f"{BLOCK}selective_scan.u_scale"), "output_scale"),
    ("m1-w8a8", f"{BLOCK}selective_scan.C_scale", _shift(f"{BLOCK}selective_scan.C_scale"), "B_scale"),
]


@pytest.mark.parametrize(
    ("zoo_folder", "name", "edit", "reason"),
    [
        ({"w4a8": "quamba2-demo2-w4a8", "m1-w8a8": "quamba-demo2-w8a8"}[kind], *rest)
        for kind, *rest in CONTRADICTIONS
    ],
    indirect=["zoo_folder"],
    ids=[f"{kind}-{name.removeprefix(BLOCK)}-{i}" for i, (kind, name, *_) in enumerate(CONTRADICTIONS)],
)
def test_scales_that_contradict_each_other(
    zoo_folder: Path, tmp_path: Path, name: str, edit: Edit, reason: str
) -> None:
    folder = edited(zoo_folder, tmp_path, edit)
    with pytest.raises(QuambaError) as caught:
        read_zoo(folder)
    sentence = str(caught.value)
    assert name in sentence and reason in sentence and str(folder) in sentence
    assert sentence.endswith(".") and sentence.count(". ") == 0


WRONG_CONFIGS: list[tuple[str, Edit, str]] = [
    (
        "mixer",
        lambda f: f["ssm_cfg"].update(layer="W4A8QMamba3"),
        "The mixer class in ssm_cfg of config.json is 'W4A8QMamba3', expected one of",
    ),
    (
        "float mixer",
        lambda f: f["ssm_cfg"].update(layer="Mamba2"),
        "The mixer class in ssm_cfg of config.json",
    ),
    (
        "embedding",
        lambda f: f["embedding_cfg"].update(layer="W3O16Embedding"),
        "The class in embedding_cfg of config.json is 'W3O16Embedding', expected one of 'W8O16Embedding',"
        " 'W4O16Embedding', 'Embedding'. Did you mean 'W8O16Embedding'?",
    ),
    (
        "head",
        lambda f: f["lm_head_cfg"].update(layer=None),
        "The class in lm_head_cfg of config.json is None",
    ),
    (
        "norm",
        lambda f: f["norm_cfg"].update(norm="RMSNorm"),
        "config.json gives W4A8 blocks the norm RMSNorm, expected QRMSNorm.",
    ),
    (
        "norm class",
        lambda f: f["norm_cfg"].update(norm="LayerNorm"),
        "The norm class in config.json is 'LayerNorm'",
    ),
    (
        "extra key",
        lambda f: f["norm_cfg"].update(eps=1),
        "'norm_cfg' in config.json has the keys ['eps', 'norm'], expected 'norm' alone.",
    ),
    ("no head", lambda f: f.pop("lm_head_cfg"), "'lm_head_cfg' in config.json is None, expected the object"),
    ("tied", lambda f: f.update(tie_embeddings=True), "config.json ties the embedding to the head"),
    ("unknown key", lambda f: f.update(colour="red"), "Unknown key 'colour' in config.json."),
    (
        "hybrid flag",
        lambda f: f.update(is_hybrid=True),
        "config.json has is_hybrid True and a 'layer' in ssm_cfg that is one name",
    ),
    (
        "too few layers",
        lambda f: (
            f.update(is_hybrid=True),
            f["ssm_cfg"].update(layer=[{"W4A8": "W4A8QMamba2"}]),
            f["norm_cfg"].update(norm=[{"W4A8": "QRMSNorm"}]),
        ),
        "config.json lists 1 entries under 'layer' for hybrid blocks, expected 2: one for each block.",
    ),
    (
        "two precisions in a layer",
        lambda f: (
            f.update(is_hybrid=True),
            f["ssm_cfg"].update(layer=[{"W4A8": "W4A8QMamba2", "W4A16": "W4A16QMamba2"}] * 2),
        ),
        "Block 0 of config.json holds",
    ),
    (
        "label and class",
        lambda f: (
            f.update(is_hybrid=True),
            f["ssm_cfg"].update(layer=[{"W4A8": "W4A16QMamba2"}] * 2),
            f["norm_cfg"].update(norm=[{"W4A8": "QRMSNorm"}] * 2),
        ),
        "Block 0 of config.json names W4A8, W4A16QMamba2 and W4A8, expected one precision in all three.",
    ),
]


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
@pytest.mark.parametrize(
    ("edit", "sentence"), [w[1:] for w in WRONG_CONFIGS], ids=[w[0] for w in WRONG_CONFIGS]
)
def test_wrong_configs(zoo_folder: Path, tmp_path: Path, edit: Edit, sentence: str) -> None:
    folder = edited(zoo_folder, tmp_path, config=edit)
    for read in (read_zoo, read_zoo_plan):
        with pytest.raises(QuambaError) as caught:
            read(folder)
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
def test_a_truncated_file(zoo_folder: Path, tmp_path: Path) -> None:
    folder = edited(zoo_folder, tmp_path)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(QuambaError, match=r"is truncated or no PyTorch checkpoint\.$"):
        quamba.load(folder)


class _Attack:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
def test_a_pickle_with_code_is_refused_and_not_run(zoo_folder: Path, tmp_path: Path, zipped: bool) -> None:
    folder, witness = edited(zoo_folder, tmp_path), tmp_path / "was-run"
    content = {"lm_head.weight": torch.zeros(2), "hook": _Attack(witness)}
    if zipped:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"hook": _Attack(witness)}, protocol=2))
    with pytest.raises(QuambaError, match=r"is refused: its pickle calls '[\w.]+', and only plain tensors"):
        quamba.load(folder)
    assert not witness.exists()


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
def test_a_float_model_in_place_of_integers(zoo_folder: Path, tmp_path: Path, assets: Path) -> None:
    folder = edited(zoo_folder, tmp_path)
    (folder / "pytorch_model.bin").unlink()
    shutil.copyfile(assets / "models" / "mamba2-demo" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(QuambaError) as caught:
        quamba.load(folder)
    assert str(caught.value) == (
        f"The weights in '{folder}' are those of a float model ('backbone.layers.0.mixer.in_proj.weight' is"
        " float16 [1804, 384]), expected the integers that its config.json promises."
    )


@pytest.mark.parametrize(
    ("kind", "sentence"), [("float", "a float model"), ("ours", "that quamba has quantized")]
)
def test_only_published_models_are_converted(
    tmp_path: Path, repo_root: Path, kind: str, sentence: str
) -> None:
    source = repo_root / "assets" / "models" / "mamba2-demo"
    if kind == "ours":
        source = tmp_path / "ours"
        quamba.convert(repo_root / "tests" / "data" / "zoo" / "quamba2-demo2-w4a16", source)
    with pytest.raises(QuambaError, match=f"{sentence}.*, expected a model of the published Quamba zoo"):
        quamba.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
def test_the_wrap_of_the_published_kernels_is_an_option(zoo_folder: Path, tmp_path: Path) -> None:
    """With a tenth of the scale, most of the rotation's values do not fit int8."""

    def edit(state: dict[str, Any]) -> None:
        for i in (0, 1):
            state[f"backbone.layers.{i}.mixer.had.x_H_scale"] *= 0.1
            state[f"backbone.layers.{i}.mixer.out_proj.input_scale"] *= 0.1

    folder = edited(zoo_folder, tmp_path, edit)
    logits = {}
    for overflow in ("saturate", "wrap"):
        quamba.convert(folder, tmp_path / overflow, changes={"overflow": overflow})
        model = quamba.load(tmp_path / overflow)
        assert model.recipe is not None and model.recipe.overflow == overflow
        logits[overflow] = model(expected_logits(zoo_folder)[0]).logits
    assert torch.equal(logits["saturate"], quamba.load(folder)(expected_logits(zoo_folder)[0]).logits)
    assert not torch.equal(logits["saturate"], logits["wrap"])


@pytest.mark.parametrize("zoo_folder", ["quamba2-demo2-w4a8"], indirect=True)
def test_where_it_came_from_is_kept(zoo_folder: Path, tmp_path: Path) -> None:
    stored = read_stored(zoo_folder, "ut-enyac/quamba2-demo2-w4a8")
    assert (stored.source, stored.report, stored.calibration) == ("ut-enyac/quamba2-demo2-w4a8", None, {})
    made: Model = quamba.convert(zoo_folder, tmp_path / "ours")
    assert quamba.load(tmp_path / "ours").source == made.source == str(zoo_folder)
