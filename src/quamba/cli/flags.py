"""The published flags of quantization, and the recipe and calibration they mean."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quamba.cli.console import NearestChoice, say
from quamba.errors import QuambaError, one_of

if TYPE_CHECKING:
    import torch

    from quamba.models.config import ModelConfig
    from quamba.recipes.recipe import Precision, Recipe

_Function = TypeVar("_Function", bound=Callable[..., Any])

HYBRID_LABELS = ("W4A8", "W4A16", "W8A8", "FP16")
EMBEDDING_PRECISIONS = ("int4", "int8", "float")
STATE_DTYPES = ("int8", "fp16", "fp32")
BACKENDS = ("auto", "reference", "triton", "cpu")
#: One state for all that is random; the published scripts fix the same.
SEED = 1234


@dataclass(frozen=True, kw_only=True)
class QuantizeFlags:
    """The flags of ``quantize_flags`` as given; None is "not given"."""

    quantize: bool = False
    w_bits: int = 8
    a_bits: int = 8
    group_heads: bool = False
    apply_gptq: bool = False
    quantize_embedding: bool = False
    quantize_lm_head: bool = False
    hybrid_blocks: bool = False
    hybrid_blocks_config: str | None = None
    embedding_precision: str | None = None
    head_precision: str | None = None
    percentile_alpha: float | None = None
    state_dtype: str | None = None
    calib_data: str | None = None
    calib_data_num: int = 512
    calib_seqlen: int = 512
    pretrained_dir: str | None = None
    output_subdir: str | None = None
    force: bool = False

    @classmethod
    def take(cls, options: dict[str, Any]) -> QuantizeFlags:
        """Move these flags out of a command's options."""
        return cls(**{field.name: options.pop(field.name) for field in dataclasses.fields(cls)})

    @property
    def beyond_first_paper(self) -> bool:
        """Whether they ask for anything that only the second paper has."""
        ends = self.embedding_precision is not None or self.head_precision is not None
        return ends or (
            self.group_heads or self.apply_gptq or self.quantize_embedding or self.quantize_lm_head
        )

    @property
    def label(self) -> str:
        """``w4a8`` and the like; ``w4aX`` for hybrid blocks: names of recipes, folders and logs."""
        return "w4aX" if self.hybrid_blocks else f"w{self.w_bits}a{self.a_bits}"


def quantize_flags(function: _Function) -> _Function:
    """Options of main.py and generate.py that say how to quantize and where the result is kept."""
    options = [
        click.option("--quantize", is_flag=True, help="Quantize a float model, or reuse the stored result."),
        _bits_option("--w_bits", ["4", "8"], "weights"),
        _bits_option("--a_bits", ["8", "16"], "activations"),
        click.option(
            "--group_heads", is_flag=True, help="Scales for groups of heads and channels (Mamba2, 8-bit A)."
        ),
        click.option("--apply_gptq", is_flag=True, help="Weights by GPTQ instead of rounding to nearest."),
        click.option("--quantize_embedding", is_flag=True, help="The embedding table too."),
        click.option("--quantize_lm_head", is_flag=True, help="The final norm's output and the head too."),
        click.option("--hybrid_blocks", is_flag=True, help="Another precision for every block."),
        click.option(
            "--hybrid_blocks_config",
            metavar="FILE",
            help='JSON list with the precision of every block, such as ["W4A8", "W4A16"].',
        ),
        click.option(
            "--embedding_precision",
            type=NearestChoice(EMBEDDING_PRECISIONS),
            help="Of the embedding table, whatever the other flags say.",
        ),
        click.option(
            "--head_precision",
            type=NearestChoice(HYBRID_LABELS),
            help="Of the final norm's output and the head, whatever the other flags say.",
        ),
        *calibration_options(),
        percentile_option(),
        state_option(),
        click.option("--pretrained_dir", metavar="DIR", help="Where quantized models are stored and found."),
        click.option(
            "--output_subdir",
            metavar="NAME",
            help="Store under DIR/NAME/default, or DIR/NAME/pa-ALPHA with --percentile_alpha.",
        ),
        click.option("--force", is_flag=True, help="Quantize again and replace what is stored."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _bits_option(name: str, choices: list[str], what: str) -> Callable[[_Function], _Function]:
    def as_int(ctx: click.Context, param: click.Parameter, value: str) -> int:
        return int(value)

    return click.option(
        name,
        type=NearestChoice(choices),
        callback=as_int,
        default="8",
        show_default=True,
        help=f"Bits of {what}; the pairs are 8 and 8, 4 and 8, 4 and 16.",
    )


def calibration_options() -> list[Callable[[_Function], _Function]]:
    return [
        click.option(
            "--calib_data",
            metavar="NAME|FILE",
            help="Calibration text: a hub data set, or a .txt, .jsonl or .jsonl.zst file or a folder of them."
            " Default: monology/pile-uncopyrighted; for the bundled models, the bundled text.",
        ),
        click.option(
            "--calib_data_num", type=click.IntRange(min=1), default=512, show_default=True, help="Samples."
        ),
        click.option(
            "--calib_seqlen",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            help="Tokens of a sample, at most.",
        ),
    ]


def percentile_option() -> Callable[[_Function], _Function]:
    return click.option(
        "--percentile_alpha",
        type=float,
        metavar="A",
        help="Share of |x| that the scales of the scan's input x cover; 1.0 is the absolute maximum. Default:"
        " 0.99999 with head groups, 0.9995 in the setting of the first paper (Mamba1, W8A8, no other flag),"
        " else 1.0, since x then has one scale a channel.",
    )


def state_option() -> Callable[[_Function], _Function]:
    return click.option(
        "--state_dtype",
        type=NearestChoice(STATE_DTYPES),
        help="Cached SSM state; default fp16. int8 halves it and costs perplexity in generation.",
    )


def device_option() -> Callable[[_Function], _Function]:
    """--device, and with it --backend and --threads."""
    device = click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda",
        help="auto: CUDA where there is one.",
    )
    backend = click.option(
        "--backend",
        type=NearestChoice(BACKENDS),
        default="auto",
        show_default=True,
        help="Kernels; auto: Triton on a GPU, the compiled ones on a CPU.",
    )
    threads = click.option(
        "--threads",
        type=click.IntRange(min=1),
        callback=_use_threads,
        expose_value=False,
        help="Of the CPU. Default: as many as it has cores.",
    )
    return lambda function: device(backend(threads(function)))


def _use_threads(ctx: click.Context, parameter: click.Parameter, count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)  # the compiled kernels follow it


def graph_option() -> Callable[[_Function], _Function]:
    return click.option(
        "--cache_graph/--no_cache_graph",
        default=None,
        help="Replay prompts and decoding as CUDA graphs. Default: on a GPU with Triton.",
    )


def graph_choice(asked: bool | None, device: torch.device) -> bool | None:
    """What ``--cache_graph`` asks for, as far as the device has graphs; None: wherever they help."""
    if asked and device.type != "cuda":
        say("--cache_graph has no effect on a CPU.")
        return None
    return asked


def seed_option() -> Callable[[_Function], _Function]:
    return click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=SEED,
        show_default=True,
        help="Of the calibration samples and of sampling.",
    )


def recipe_from_flags(flags: QuantizeFlags, config: ModelConfig) -> tuple[Recipe, list[str]]:
    """The recipe that the flags mean for a model of this config, and what the user should know of it.

    Mamba1 with 8-bit weights and activations and nothing else is the setting of the first paper, recipe
    ``quamba1-w8a8``. With --hybrid_blocks, embedding and head are W4A8 as published, unless
    --embedding_precision and --head_precision say otherwise.
    """
    from quamba.recipes.recipe import HeadGroups, Precision, Recipe, Solver, load_recipe, precision

    notes: list[str] = []
    if flags.hybrid_blocks:
        blocks, overrides = _hybrid_precisions(flags, config.n_layer)
        embedding, head = "int4", precision(4, 8)
    else:
        if flags.hybrid_blocks_config is not None:
            raise QuambaError("--hybrid_blocks_config has no effect alone, expected --hybrid_blocks with it.")
        blocks, overrides = precision(flags.w_bits, flags.a_bits, flags.state_dtype), {}
        embedding = blocks.weights if flags.quantize_embedding else "float"
        head = precision(flags.w_bits, flags.a_bits) if flags.quantize_lm_head else Precision()
        if config.family == "mamba" and flags.label == "w8a8" and not flags.beyond_first_paper:
            notes.append(
                "These flags are the first paper's setting (recipe quamba1-w8a8); "
                "'quamba quantize --recipe w8a8' is more accurate."
            )
            paper = load_recipe("quamba1-w8a8")
            alpha = paper.percentile_alpha if flags.percentile_alpha is None else flags.percentile_alpha
            return with_state(paper.replace(percentile_alpha=alpha), flags.state_dtype), notes
    embedding = flags.embedding_precision or embedding
    head = head if flags.head_precision is None else _precision(flags.head_precision, None)
    groups = HeadGroups() if flags.group_heads else None
    if groups is not None and config.family != "mamba2":
        notes.append("--group_heads is ignored: only Mamba2 models have heads.")
        groups = None
    elif groups is not None and all(p.activations == "float" for p in (blocks, *overrides.values())):
        notes.append("--group_heads is ignored: with 16-bit activations there are no scales to group.")
        groups = None
    precisions = (blocks, *overrides.values(), head)
    of_integers = any(p.weights == "int4" and p.activations == "int8" for p in precisions)
    recipe = Recipe(
        name=flags.label.lower(),
        blocks=blocks,
        overrides=_grouped(overrides),
        embedding=embedding,
        head=head,
        int4=load_recipe("w4a8" if of_integers else "w4a16").int4,
        percentile_alpha=flags.percentile_alpha,
        group_heads=groups,
        solver=Solver(kind="gptq" if flags.apply_gptq else "rtn"),
    )
    return recipe, notes


def with_state(recipe: Recipe, state: str | None) -> Recipe:
    """The recipe with another SSM state in every block; the same one for None."""
    if state is None:
        return recipe

    def changed(precision: Precision) -> Precision:
        return dataclasses.replace(precision, state=state)

    return recipe.replace(
        blocks=changed(recipe.blocks),
        overrides=tuple(
            dataclasses.replace(override, precision=changed(override.precision))
            for override in recipe.overrides
        ),
    )


def read_hybrid_blocks(path: str | Path, n_layer: int) -> list[str]:
    """The precision of every block from a JSON list such as ``["W4A8", "W4A16"]``."""
    path = Path(path).expanduser()
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuambaError(f"The hybrid configuration '{path}' does not exist.") from None
    except OSError as error:
        raise QuambaError(f"The hybrid configuration '{path}' cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QuambaError(f"The hybrid configuration '{path}' is not valid JSON ({error}).") from None
    if not isinstance(labels, list):
        raise QuambaError(
            f"The hybrid configuration '{path}' holds a JSON {type(labels).__name__}, expected a list."
        )
    for i, label in enumerate(labels):
        if label not in HYBRID_LABELS:
            raise one_of(f"Entry {i} of the hybrid configuration '{path}'", label, HYBRID_LABELS)
    if len(labels) != n_layer:
        raise QuambaError(
            f"The hybrid configuration '{path}' has {len(labels)} entries, "
            f"expected {n_layer}: one for every block."
        )
    return labels


def _hybrid_precisions(flags: QuantizeFlags, n_layer: int) -> tuple[Precision, dict[int, Precision]]:
    """The precision of most blocks, and that of each other block."""
    if flags.hybrid_blocks_config is None:
        raise QuambaError(
            "--hybrid_blocks needs --hybrid_blocks_config FILE, a JSON list of the precision of every block."
        )
    labels = read_hybrid_blocks(flags.hybrid_blocks_config, n_layer)
    most = Counter(labels).most_common(1)[0][0]
    others = {i: _precision(label, flags.state_dtype) for i, label in enumerate(labels) if label != most}
    return _precision(most, flags.state_dtype), others


def _precision(label: str, state: str | None) -> Precision:
    """``W4A16`` and the like, as in recipe files."""
    from quamba.recipes.recipe import Recipe

    return with_state(Recipe.from_dict({"name": label, "blocks": label}), state).blocks


def _grouped(overrides: Mapping[int, Precision]) -> tuple[Any, ...]:
    """One ``Override`` for each precision."""
    from quamba.recipes.recipe import Override

    blocks: dict[Precision, list[int]] = {}
    for i, precision in overrides.items():
        blocks.setdefault(precision, []).append(i)
    return tuple(Override(blocks=tuple(numbers), precision=p) for p, numbers in blocks.items())


def given_parameters(ctx: click.Context, names: Sequence[str]) -> list[str]:
    """Those of the named parameters that stand on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    return [name for name in names if ctx.get_parameter_source(name) == source]
