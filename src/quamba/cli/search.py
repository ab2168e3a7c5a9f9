"""``quamba search``: precisions of blocks under a budget."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, NearestChoice, TqdmProgress, say, table
from quamba.cli.flags import calibration_options, device_option, seed_option
from quamba.errors import QuambaError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor

    from quamba.api import Model
    from quamba.calibration.data import CalibrationSet, CalibrationSpec
    from quamba.models.config import ModelConfig
    from quamba.search.search import Outcome, SearchSpec

_METHODS = ("auto", "ranking", "greedy", "evolutionary", "integer", "exhaustive")
_OBJECTIVES = ("kl", "perplexity", "accuracy")


def _calibration(function: Any) -> Any:
    for option in reversed(calibration_options()):
        function = option(function)
    return function


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--budget",
    required=True,
    multiple=True,
    metavar="B",
    help="14xW4A16: so many blocks of that precision; weights=1.4GB, tpot=1.2ms, ttft=80ms: at most so much."
    " Several with commas between them, or the option several times.",
)
@click.option("-o", "--output", required=True, metavar="DIR", help="Folder of the search and its results.")
@click.option(
    "--recipe",
    default="w4a8",
    show_default=True,
    metavar="NAME|FILE",
    help="Of embedding, head and the blocks that the budget leaves as they are.",
)
@click.option(
    "--precisions",
    metavar="A,B",
    help="What blocks may be instead: W8A8, W4A8, W4A16, FP16. Default: those of the budget, or W4A16.",
)
@click.option("--method", type=NearestChoice(_METHODS), default="auto", show_default=True)
@click.option(
    "--objective",
    type=NearestChoice(_OBJECTIVES),
    default="kl",
    show_default=True,
    help="To minimise: KL divergence to the float model, perplexity, or 1 - accuracy of --task_list.",
)
@click.option(
    "--objective_num",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Samples of the calibration text that candidates are scored on, besides those of --calib_data_num.",
)
@click.option(
    "--objective_seqlen",
    type=click.IntRange(min=2),
    help="Tokens of such a sample, at most. Default: 1024, or --calib_seqlen where that is more.",
)
@click.option("--task_list", metavar="A,B", help="lm-eval's tasks, for --objective accuracy.")
@click.option("--limit", type=click.IntRange(min=1), help="Samples of each task. Default: all.")
@_calibration
@click.option(
    "--time",
    "how",
    type=NearestChoice(["measured", "predicted"]),
    default="measured",
    show_default=True,
    help="tpot= and ttft=: of models run here, or tpot= of the bytes that a step moves.",
)
@click.option(
    "--bandwidth", type=click.FloatRange(min=0, min_open=True), metavar="GB/S", help="For predicted times."
)
@click.option(
    "--batch_size", type=click.IntRange(min=1), default=1, show_default=True, help="Of tpot= and ttft=."
)
@click.option(
    "--prompt_len", type=click.IntRange(min=1), default=512, show_default=True, help="Of tpot= and ttft=."
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="That score candidates: on a CPU so many, on GPUs one each.",
)
@click.option("--save", "save_to", metavar="DIR", help="Save the model that was found, as it was scored.")
@click.option("--force", is_flag=True, help="Replace the model in the --save folder.")
@device_option()
@seed_option()
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
def command(model: str, as_json: bool, verbose: bool, **options: Any) -> None:
    """Choose the precision of each block of MODEL, a folder or hub id of a float model, under a budget.

    DIR gets hybrid_blocks_config.json (for --hybrid_blocks_config), recipe.toml (for quamba quantize),
    candidates, pictures and a page. A run that was cut off goes on from there, and further searches of the
    same model take blocks and scores from there.
    """
    from quamba.api import load
    from quamba.checkpoints.float import read_float_config
    from quamba.checkpoints.source import resolve as resolve_source
    from quamba.cli.store import check_replaceable
    from quamba.reporting.write import check_folder
    from quamba.search.result import write_result
    from quamba.search.search import SearchFolder, search

    spec = _spec(options)
    folder = check_folder("--output", options["output"])
    if options["save_to"] is not None:
        check_replaceable(Path(options["save_to"]).expanduser(), options["force"])
    local = resolve_source(model)
    config = read_float_config(local)
    spec.check(config)
    SearchFolder(folder).check()
    texts = _text_spec(spec, config, local, options)
    loaded = load(model, options["device"], backend=options["backend"])
    calibration, sequences = _texts(loaded, spec, texts, options)
    say(f"Searching precisions of '{model}' among {', '.join(spec.labels)} by the recipe {spec.base.name}.")
    with TqdmProgress(verbose) as progress:
        outcome = search(str(local), loaded.network, calibration, sequences, spec, folder, progress)
    pictures = find_spec("matplotlib") is not None
    if not pictures:
        say(str(missing_extra("matplotlib", "plot", "A picture")))
    written = write_result(outcome, folder, pictures=pictures)
    if options["save_to"] is not None:
        _save(outcome, loaded, options)
    _print(outcome, written, options["save_to"], as_json)


def _spec(options: dict[str, Any]) -> SearchSpec:
    """All that can be refused without looking at the model."""
    from quamba.cli.task_scores import task_names
    from quamba.recipes.recipe import load_recipe
    from quamba.search.budget import check_label, parse_budget
    from quamba.search.costs import TimeSpec
    from quamba.search.objective import ObjectiveSpec
    from quamba.search.search import SearchSpec

    base = load_recipe(options["recipe"])
    budget = parse_budget(options["budget"], base.blocks.label)
    if options["precisions"] is None:
        listed = tuple(budget.counts) or ("W4A16",)
    else:
        listed = tuple(check_label(label.strip()) for label in options["precisions"].split(","))
    if options["objective"] == "accuracy":
        from quamba.evaluation.lm_eval_model import import_lm_eval

        import_lm_eval()
    tasks = () if options["task_list"] is None else tuple(task_names(options["task_list"]))
    return SearchSpec(
        base=base,
        precisions=tuple(dict.fromkeys(label for label in listed if label != base.blocks.label)),
        budget=budget,
        method=options["method"],
        objective=ObjectiveSpec(kind=options["objective"], tasks=tasks, limit=options["limit"]),
        seed=options["seed"],
        time=TimeSpec(
            how=options["how"],
            batch_size=options["batch_size"],
            prompt_len=options["prompt_len"],
            bandwidth_gb_per_s=options["bandwidth"],
        ),
        devices=_devices(options["device"], options["processes"]),
        backend=options["backend"],
    )


def _devices(device: str, processes: int) -> tuple[str, ...]:
    from quamba.api import choose_device

    chosen = choose_device(device)
    if processes == 1 or chosen.type == "cpu":
        return (str(chosen),) * processes
    import torch

    if processes > torch.cuda.device_count():
        raise QuambaError(
            f"--processes is {processes}, but the number of CUDA devices here is {torch.cuda.device_count()};"
            " expected one process a GPU at most."
        )
    return tuple(f"cuda:{i}" for i in range(processes))


def _text_spec(
    spec: SearchSpec, config: ModelConfig, local: Path, options: dict[str, Any]
) -> CalibrationSpec:
    """The text of quantizing and of the objective."""
    from quamba.calibration.data import CalibrationSpec
    from quamba.calibration.reading import resolve_source
    from quamba.cli.store import default_calibration

    chosen = options["calib_data"] or default_calibration(local)
    resolve_source(chosen)
    return CalibrationSpec(
        data=chosen,
        num=options["calib_data_num"],
        seqlen=options["calib_seqlen"],
        seed=options["seed"],
    )


def _texts(
    model: Model, spec: SearchSpec, texts: CalibrationSpec, options: dict[str, Any]
) -> tuple[CalibrationSet, list[Tensor]]:
    """Samples that blocks are quantized with, and others that candidates are scored on: scores on the former
    would praise what was fitted to them."""
    from quamba.cli.obtain import read_calibration
    from quamba.search.texts import objective_seqlen, objective_sequences

    length = objective_seqlen(options["objective_seqlen"], texts)
    calibration = read_calibration(model, texts)
    if spec.objective.kind == "accuracy":
        return calibration, []
    return calibration, objective_sequences(
        lambda more: read_calibration(model, more), texts, calibration, options["objective_num"], length
    )


def _save(outcome: Outcome, loaded: Model, options: dict[str, Any]) -> None:
    import dataclasses

    from quamba.api import save

    network = outcome.bank.assemble(outcome.chosen)
    plan, report = outcome.bank.plan(outcome.chosen), outcome.bank.report(outcome.chosen)
    found = dataclasses.replace(loaded, network=network, plan=plan, report=report)
    save(found, Path(options["save_to"]).expanduser(), overwrite=options["force"])


def _print(outcome: Outcome, written: list[Path], saved: str | None, as_json: bool) -> None:
    if as_json:
        files = {"files": [str(path) for path in written], "saved": saved}
        click.echo(json.dumps({**outcome.to_dict(), **files}, indent=1))
        return
    title = outcome.spec.objective.title
    rows = [("found", " ".join(outcome.chosen), f"{outcome.score:.6g}")]
    rows += [(f"all {label}", "", f"{score:.6g}") for label, score in outcome.uniform.items()]
    click.echo(table(("", "blocks", title), rows))
    for label in outcome.problem.labels[1:]:
        blocks = [str(i) for i, own in enumerate(outcome.chosen) if own == label]
        click.echo(f"{label}: {len(blocks)} blocks ({', '.join(blocks) or 'none'}).")
    costs = [
        f"{limit.name} {outcome.costs[limit.name]:,.6g} of at most {limit.most:,.6g} {limit.unit}"
        for limit in outcome.problem.limits
    ]
    if costs:
        click.echo(f"{'; '.join(costs)}.")
    click.echo(
        f"{outcome.spec.method}: {outcome.evaluations} candidates, {outcome.seconds:.1f} s to score them."
    )
    click.echo(f"Written: {', '.join(repr(str(path)) for path in written)}.")
    if saved is not None:
        click.echo(f"Saved to '{saved}'.")
