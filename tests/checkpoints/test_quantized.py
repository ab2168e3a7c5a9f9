"""Our format: every combination of formats comes back bit for bit, every broken folder gives a sentence."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model

from quamba.checkpoints.float import read_float
from quamba.checkpoints.quantized import (
    is_quantized,
    read_quantization_config,
    read_quantized,
    write_quantized,
)
from quamba.checkpoints.tokenizer import load_tokenizer
from quamba.errors import QuambaError
from quamba.formats.weight import WeightFormat
from quamba.models.config import Mamba2Config, MambaConfig, ModelConfig
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.recipes.plan import resolve
from quamba.recipes.recipe import HeadGroups, Override, Precision, Recipe, Solver
from quamba.recipes.skeleton import skeleton

FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {"family": "mamba"},
    "falcon": {"family": "mamba", "bcdt_rms_eps": 1e-6},
    "mamba2": {"family": "mamba2"},
    "mamba2-g2": {"family": "mamba2", "ngroups": 2},
}
#: Precision of block 0, of block 1, of a quantized head; and the format of a quantized embedding.
PRECISIONS = {
    "w8a8": (("int8", "int8"), ("int8", "int8"), ("int8", "int8"), "int8"),
    "w4a8": (("int4", "int8"), ("int4", "int8"), ("int4", "int8"), "int4"),
    "w4a16": (("int4", "float"), ("int4", "float"), ("int4", "float"), "int4"),
    "w4a8+fp16": (("int4", "int8"), ("float", "float"), ("int4", "float"), "int4"),
    "fp16": (("float", "float"), ("float", "float"), ("int4", "int8"), "int8"),
}
#: One of each is drawn for a combination, by its name.
SWITCHES: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"conv_bias": False},
    {"tie_embeddings": False},
    {"bias": True, "conv_bias": False, "tie_embeddings": False},
]
SCALES: list[dict[str, Any]] = [
    {},
    {"activation_scales": "tensor"},
    {"conv_scales": "tensor", "dt_proj": "int4"},
    {"int8": WeightFormat(8, "tensor")},
    {"int4": WeightFormat(4, "channel"), "int8": WeightFormat(8, "group", 16)},
]


def combinations() -> Iterator[tuple[Any, ...]]:
    """The full product, but for the models without rotation, which changes no shape: they have one state."""
    either = (False, True)
    for family, precision, embedding, head, state, rotate, grouped in itertools.product(
        FAMILIES, PRECISIONS, either, either, ("int8", "fp16", "fp32"), either, either
    ):
        integers = "int8" in (PRECISIONS[precision][0][1], PRECISIONS[precision][1][1])
        groups_fit = integers and family.startswith("mamba2")
        if (groups_fit or not grouped) and (rotate or state == "fp16"):
            yield family, precision, embedding, head, state, rotate, grouped


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


class Texts:
    """Stands in for a calibration set."""

    def batches(self) -> Iterator[tuple[torch.Tensor, None]]:
        yield torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1)), None

    def to_dict(self) -> dict[str, Any]:
        return {"source": "random", "num": 2, "seqlen": 16, "seed": 1, "fingerprint": "f00"}


def recipe_for(
    precision: str, embedding: bool, head: bool, state: str, rotate: bool, grouped: bool, **changes: Any
) -> Recipe:
    first, second, head_precision, table = PRECISIONS[precision]
    blocks = [Precision(weights=w, activations=a, state=state) for w, a in (first, second)]
    fields: dict[str, Any] = {
        "name": "test",
        "blocks": blocks[0],
        "overrides": (Override(blocks=(1,), precision=blocks[1]),) if second != first else (),
        "embedding": table if embedding else "float",
        "head": Precision(weights=head_precision[0], activations=head_precision[1]) if head else Precision(),
        "int4": WeightFormat(4, "group", 16),
        "embedding_int4": WeightFormat(4, "group", 16),
        "rotate": rotate,
        "group_heads": HeadGroups(heads=2, channels=2) if grouped else None,
        "solver": Solver(kind="rtn"),
    }
    return Recipe(**{**fields, **changes})


@functools.cache
def float_model(config: ModelConfig) -> MambaLM:
    return tiny_model(config)


def quantized(config: ModelConfig, recipe: Recipe) -> tuple[Any, Any, Any]:
    return quantize_model(float_model(config), recipe, Texts())


def flags(network: MambaLM) -> dict[str, dict[str, Any]]:
    """Everything that modules know besides tensors: dtypes, switches, sizes, formats."""
    return {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in network.named_modules()
    }


def layout(network: MambaLM) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in network.named_tensors().items()}


@torch.inference_mode()
def outputs(network: MambaLM) -> list[torch.Tensor]:
    """Logits of a whole text, of a prompt and three single tokens after it, and the states these leave."""
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    cache = network.new_cache(2)
    steps = [network(part, cache) for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:])]
    states = [state for layer in cache.layers for state in (layer.conv_state, layer.ssm_state)]
    return [network(ids), *steps, *states]


def assert_same(network: MambaLM, reloaded: MambaLM) -> None:
    assert flags(reloaded) == flags(network)
    assert layout(reloaded) == layout(network)
    for ours, theirs in zip(outputs(reloaded), outputs(network), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def round_trip(folder: Path, config: ModelConfig, recipe: Recipe) -> None:
    network, plan, report = quantized(config, recipe)
    assert layout(skeleton(plan)) == layout(network)
    write_quantized(folder, network, plan, source="here", report=report, tokenizer=None)
    stored = read_quantized(folder)
    assert (stored.plan, stored.source, stored.report) == (plan, "here", report)
    assert_same(network, stored.network)


@pytest.mark.parametrize(
    ("family", "precision", "embedding", "head", "state", "rotate", "grouped"), list(combinations())
)
def test_every_combination_comes_back(
    tmp_path, family, precision, embedding, head, state, rotate, grouped, request
):
    draw = zlib.crc32(request.node.name.encode())
    config = tiny_config(**FAMILIES[family], **SWITCHES[draw % len(SWITCHES)])
    scales = SCALES[draw // 7 % len(SCALES)]
    recipe = recipe_for(precision, embedding, head, state, rotate, grouped, **scales)
    round_trip(tmp_path / "model", config, recipe)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("precision", ["w4a8", "w4a16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_switch_comes_back(tmp_path, family, precision, switches):
    config = tiny_config(**FAMILIES[family], **switches)
    round_trip(tmp_path / "model", config, recipe_for(precision, True, True, "fp16", True, False))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_granularity_comes_back(tmp_path, family, scales):
    recipe = recipe_for("w4a8+fp16", True, True, "int8", True, True, **scales)
    round_trip(tmp_path / "model", tiny_config(**FAMILIES[family]), recipe)


@pytest.mark.parametrize(
    "changes", [{"D_has_hdim": True}, {"norm_before_gate": True}, {"dt_limit": (0.01, 0.1)}]
)
def test_mamba2_switches_come_back(tmp_path, changes):
    recipe = recipe_for("w4a8", True, True, "int8", True, True)
    round_trip(tmp_path / "model", tiny_config("mamba2", **changes), recipe)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_norm_model_with_a_quantized_embedding_comes_back(tmp_path, family, tied):
    config = tiny_config(**FAMILIES[family], rms_norm=False, tie_embeddings=tied)
    round_trip(tmp_path / "model", config, recipe_for("fp16", True, False, "fp32", True, False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dtype_of_floats_comes_back(tmp_path, family, dtype):
    recipe = recipe_for("w4a8+fp16", False, False, "fp16", True, False)
    network, plan, report = quantized(tiny_config(**FAMILIES[family]), recipe)
    network.set_compute_dtype(dtype)
    write_quantized(tmp_path / "model", network, plan, source="", report=report, tokenizer=None)
    reloaded = read_quantized(tmp_path / "model").network
    assert reloaded.lm_head.compute_dtype == reloaded.lm_head.weight.dtype == dtype
    assert_same(network, reloaded)


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, Any, Any]:
    """Mamba2 with an integer and a float block, groups, a float head."""
    recipe = recipe_for("w4a8+fp16", True, False, "int8", True, True)
    return quantized(tiny_config("mamba2", bias=True), recipe)


@pytest.fixture
def folder(tmp_path: Path, mixed: tuple[Any, Any, Any]) -> Path:
    network, plan, report = mixed
    write_quantized(tmp_path / "model", network, plan, source="here", report=report, tokenizer=None)
    return tmp_path / "model"


def test_shards_come_back(tmp_path, mixed):
    network, plan, report = mixed
    write_quantized(
        tmp_path / "m", network, plan, source="", report=report, tokenizer=None, max_shard_bytes=9999
    )
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    assert_same(network, read_quantized(tmp_path / "m").network)


def test_weights_are_mapped_and_aligned(folder):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps to see what is mapped")
    network = read_quantized(folder).network
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(folder) in line
    ]
    for name, tensor in network.named_tensors().items():
        assert tensor.data_ptr() % 64 == 0, name
        mapped = any(start <= tensor.data_ptr() < end for start, end in ranges)
        assert mapped or tensor.nbytes % 64, name


def test_weights_that_another_program_saved_again_give_the_same_logits(tmp_path):
    """The library packs a scalar before everything else, so that no matrix is aligned in such a file."""
    network, plan, report = quantized(
        tiny_config("mamba2", d_model=64), recipe_for("w4a8+fp16", False, False, "int8", True, False)
    )
    write_quantized(tmp_path / "m", network, plan, source="", report=report, tokenizer=None)
    file = tmp_path / "m" / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, file)
    reloaded = read_quantized(tmp_path / "m").network
    assert all(tensor.data_ptr() % 64 == 0 for tensor in reloaded.named_tensors().values())
    with torch.inference_mode():
        one = torch.tensor([[5]])
        assert torch.equal(reloaded(one), network(one))
    assert_same(network, reloaded)


def test_a_model_can_be_saved_over_the_folder_it_is_mapped_from(folder, mixed):
    network = mixed[0]
    stored = read_quantized(folder)
    write_quantized(
        folder, stored.network, stored.plan, source="there", report=None, tokenizer=None, overwrite=True
    )
    again = read_quantized(folder)
    assert (again.source, again.report) == ("there", None)
    assert_same(network, again.network)
    assert_same(network, stored.network)


def test_an_occupied_folder_is_kept(folder, mixed):
    network, plan, report = mixed
    before = (folder / "config.json").read_bytes()
    with pytest.raises(QuambaError, match="exists and is not empty"):
        write_quantized(folder, network, plan, source="x", report=report, tokenizer=None)
    assert (folder / "config.json").read_bytes() == before


def test_a_crash_leaves_nothing(tmp_path, mixed, monkeypatch):
    network, plan, report = mixed

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quamba.checkpoints.quantized._write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        write_quantized(tmp_path / "m", network, plan, source="", report=report, tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_says_what_it_is(folder, mixed):
    _, plan, report = mixed
    assert is_quantized(folder)
    stored = read_quantization_config(folder)
    assert stored["quant_method"] == "quamba"
    assert stored["format_version"] == 1
    assert stored["source"] == "here"
    assert stored["calibration"] == Texts().to_dict()
    assert Recipe.from_dict(stored["recipe"]) == plan.recipe
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["model_type"], fields["dtype"]) == ("quamba2", "float32")
    assert fields.items() >= plan.config.to_dict().items()
    assert json.loads((folder / "quantization_report.json").read_text()) == report.to_dict()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "quantization_report.json",
    ]


def test_the_light_reading_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert is_quantized(folder)
    assert read_quantization_config(folder)["source"] == "here"


def test_float_folders_are_not_quantized(tmp_path):
    assert not is_quantized(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 8}')
    assert not is_quantized(tmp_path)
    with pytest.raises(QuambaError, match="is a float model"):
        read_quantized(tmp_path)


def test_a_model_of_the_published_zoo_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text('{"d_model": 8, "norm_cfg": {"norm": "QRMSNorm"}}')
    assert not is_quantized(tmp_path)
    for read in (read_quantized, read_quantization_config, read_float):
        with pytest.raises(QuambaError, match=r"is a model of the published Quamba zoo.*, expected"):
            read(tmp_path)


def test_the_tokenizer_goes_along(tmp_path, mixed, tiny_tokenizer_folder):
    network, plan, report = mixed
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_bytes((tiny_tokenizer_folder / "tokenizer.json").read_bytes())
    (source / "config.json").write_text('{"eos_token_id": [7, 5]}')
    tokenizer = load_tokenizer(source)
    write_quantized(tmp_path / "m", network, plan, source="", report=report, tokenizer=tokenizer)
    again = load_tokenizer(tmp_path / "m")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.eos_token_id, again.eos_token_ids) == (7, {5, 7})
    assert again.encode("text") == tokenizer.encode("text")


def test_one_end_of_text_id_is_a_number(tmp_path, mixed, tiny_tokenizer_folder):
    network, plan, report = mixed
    tokenizer = load_tokenizer(tiny_tokenizer_folder)
    write_quantized(tmp_path / "m", network, plan, source="", report=report, tokenizer=tokenizer)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["eos_token_id"] == 0


def test_a_network_of_another_plan_is_not_written(tmp_path, mixed):
    network, plan, report = mixed
    other = resolve(plan.recipe.replace(embedding="float"), plan.config)
    with pytest.raises(
        QuambaError, match=r"do not fit its plan: missing backbone.embedding.weight; unexpected"
    ):
        write_quantized(tmp_path / "m", network, other, source="", report=report, tokenizer=None)
    assert list(tmp_path.iterdir()) == []


WEIGHT = "backbone.layers.0.mixer.in_proj.weight.data"


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[WEIGHT]


def _with_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["extra"] = torch.zeros(1)


def _misshapen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT] = tensors[WEIGHT][:-1].clone()


def _float_codes(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].float()


def _half_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.layers.0.norm.out_scale"] = tensors["backbone.layers.0.norm.out_scale"].half()


def _half_recurrence(tensors: dict[str, torch.Tensor]) -> None:
    tensors["backbone.layers.1.mixer.ssm.A_log"] = tensors["backbone.layers.1.mixer.ssm.A_log"].half()


def _nothing_left(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without, rf"do not fit its recipe: missing {WEIGHT}\.$"),
        (_with_more, r"recipe: unexpected extra\.$"),
        (_misshapen, rf"recipe: misshapen {WEIGHT} \[167, 16\] instead of \[168, 16\]\.$"),
        (_float_codes, rf"recipe: of the wrong dtype {WEIGHT} float32 instead of uint8\.$"),
        (_half_scale, r"of the wrong dtype backbone.layers.0.norm.out_scale float16 instead of float32\.$"),
        (_half_recurrence, r"of the wrong dtype .*A_log float16 instead of float32\.$"),
        (_nothing_left, r"recipe: missing .* and \d+ more\.$"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, sentence):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(QuambaError, match=sentence):
        read_quantized(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(QuambaError, match=r"model.safetensors' is truncated or no safetensors file"):
        read_quantized(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(QuambaError, match="has no weights"):
        read_quantized(folder)


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return change


def _drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        for key in path[:-1]:
            fields = fields[key]
        del fields[path[-1]]

    return change


Q = "quantization_config"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set(Q, "format_version", value=2), "has format version 2, this release reads up to 1; update"),
        (_set(Q, "format_version", value="1"), "format_version of .* is '1', expected 1"),
        (_set(Q, "format_version", value=True), "format_version of .* is True"),
        (_drop(Q, "format_version"), "format_version of .* is None"),
        (_set(Q, "quant_method", value="gptq"), r"by another program \(quant_method 'gptq' in config.json\)"),
        (_set(Q, "quant_method", value=None), "by another program"),
        (_set(Q, value=[1]), "by another program"),
        (_drop(Q), "is a float model"),
        (_set(Q, value=None), "is a float model"),
        (_drop(Q, "recipe"), "'recipe' in the quantization_config of .* is None, expected an object"),
        (_set(Q, "source", value=3), "'source' .* is 3, expected a string"),
        (_drop(Q, "calibration"), "'calibration' .* is None, expected an object"),
        (_set(Q, "recipe", "rotat", value=True), "Unknown recipe field 'rotat'. Did you mean 'rotate'"),
        (_set(Q, "recipe", "embedding", value="int3"), "embedding precision is 'int3', expected one of"),
        (
            _set(Q, "recipe", "overrides", value=5),
            "The recipe .* is not understood: The recipe's overrides are 5, expected a list of tables",
        ),
        (_set(Q, "recipe", "version", value=2), "recipe has version 2"),
        (_set("dtype", value="int8"), "'dtype' .* is 'int8', expected one of 'float32'"),
        (_set("dtype", value=["float32"]), "'dtype' .* expected one of"),
        (_drop("dtype"), "'dtype' .* is None"),
        (_set("model_type", value="quamba"), "model_type of .* is 'quamba', expected 'quamba2'"),
        (_set("family", value="rwkv"), "family in the config is 'rwkv'"),
        (_set("d_modle", value=3), "Unknown config field 'd_modle'"),
        (_set("d_model", value="wide"), "d_model is 'wide'"),
        (_set("dt_limit", value=3), "config.json of .* value of the wrong type"),
    ],
)
def test_a_config_that_is_not_understood(folder, change, sentence):
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(QuambaError, match=sentence) as raised:
        read_quantized(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [read_quantized, read_quantization_config, is_quantized])
def test_a_config_that_is_not_json(folder, read):
    (folder / "config.json").write_text('{"d_model": ')
    with pytest.raises(QuambaError, match=r"config.json' is not valid JSON"):
        read(folder)


@pytest.mark.parametrize("read", [read_quantized, read_quantization_config])
def test_no_config(tmp_path, read):
    with pytest.raises(QuambaError, match=r"has no config.json"):
        read(tmp_path)


def test_a_report_is_read_whole_or_not_at_all(folder):
    (folder / "quantization_report.json").write_text('{"recipe": {}}')
    with pytest.raises(QuambaError, match=r"quantization_report.json' lacks '"):
        read_quantized(folder)
    (folder / "quantization_report.json").unlink()
    assert read_quantized(folder).report is None


def test_a_report_says_what_a_gpu_needed(folder, mixed):
    _, _, report = mixed
    assert "peak_gpu_bytes" not in report.to_dict()
    measured = dataclasses.replace(report, peak_gpu_bytes=7)
    (folder / "quantization_report.json").write_text(json.dumps(measured.to_dict()))
    assert read_quantized(folder).report == measured


def test_reading_it_as_a_float_model_says_what_it_is(folder):
    with pytest.raises(QuambaError, match=r"is a model that quamba has quantized .*, expected a float model"):
        read_float(folder)


def _filled(recipe: Recipe, config: ModelConfig) -> tuple[MambaLM, Any]:
    plan = resolve(recipe, config)
    network = skeleton(plan)
    network.load_tensors(
        {name: torch.ones(t.shape, dtype=t.dtype) for name, t in network.named_tensors().items()}
    )
    return network, plan


PEAK_OF_LOADING = """
import sys
from quamba.checkpoints.quantized import read_quantized
network = read_quantized(sys.argv[1]).network
total = sum(float(tensor.max()) for tensor in network.named_tensors().values())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        (
            recipe_for("w8a8", True, True, "int8", True, False),
            MambaConfig(d_model=2048, n_layer=9, vocab_size=16000),
        ),
        (
            recipe_for("w4a16", False, False, "fp16", True, False),
            Mamba2Config(d_model=1024, n_layer=6, vocab_size=32000),
        ),
    ],
    ids=["integers", "float embedding and head"],
)
def test_memory_while_loading(tmp_path, recipe, config):
    """At most 1.3 x the file plus 300 MB, with every weight touched and the interpreter counted in."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status to measure the peak of memory")
    network, plan = _filled(recipe, config)
    write_quantized(tmp_path / "m", network, plan, source="", report=None, tokenizer=None)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size > 250e6
    del network
    script = [sys.executable, "-c", PEAK_OF_LOADING, str(tmp_path / "m")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert size < int(done.stdout) < 1.3 * size + 300e6
