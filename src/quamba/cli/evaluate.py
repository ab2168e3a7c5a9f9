"""``quamba evaluate``: the perplexity of a model, and lm-eval's tasks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, TqdmProgress, mib, say
from quamba.cli.flags import SEED, device_option, given_parameters
from quamba.cli.task_scores import (
    LOG_DIR_HELP,
    TESTING_SAMPLES,
    add_to_record,
    answer_store,
    batch_size_option,
    print_task_scores,
    score_tasks,
    task_names,
)
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.api import Model

_TASK_OPTIONS = ("fewshot", "task_dir", "limit", "max_length")
_PERPLEXITY_OPTIONS = ("seqlen", "max_windows")


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--ppl_dataset",
    multiple=True,
    metavar="NAME|FILE",
    default=("wikitext2",),
    show_default=True,
    help="wikitext2, ptb, c4, pile, or a .txt or .jsonl file; may be given several times.",
)
@click.option(
    "--seqlen",
    type=click.IntRange(min=2),
    help="Tokens of a window. Default: 2048 for a named data set, 1024 for a file.",
)
@click.option("--max_windows", type=click.IntRange(min=1), help="Score only the first so many.")
@click.option(
    "--task_list",
    metavar="A,B,C",
    help="Run these tasks, groups or tags of lm-eval (extra 'eval'), and perplexity only if --ppl_dataset is"
    " given. lambada_local needs no network.",
)
@click.option(
    "--fewshot",
    type=click.IntRange(min=0),
    metavar="N",
    help="Examples in each context. Default: as each task says.",
)
@click.option("--task_dir", metavar="DIR", help="Task files of your own.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N samples of each task.")
@click.option(
    "--max_length",
    type=click.IntRange(min=2),
    help="Tokens of a task's text that are read, the last ones. Default: 2048.",
)
@click.option(
    "--testing",
    is_flag=True,
    help=f"--limit {TESTING_SAMPLES} and --max_windows {TESTING_SAMPLES} where they are not given.",
)
@batch_size_option()
@device_option()
@click.option("--pretrained_dir", metavar="DIR", help="Where MODEL may be found by its name.")
@click.option("--log_dir", metavar="DIR", help=LOG_DIR_HELP)
@click.option("--allow_leak", is_flag=True, help="Score a text that the model was calibrated on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
@click.pass_context
def command(ctx: click.Context, model: str, as_json: bool, verbose: bool, **options: Any) -> None:
    """Perplexity of MODEL, float or quantized, over non-overlapping windows; or lm-eval's tasks."""
    _check(ctx, options)
    from quamba.api import choose_device, load
    from quamba.cli.log import check_log_dir, jsonable, write_log
    from quamba.cli.scoring import calibration_source, load_texts, print_scores, refuse_leak, score
    from quamba.cli.store import find_model, model_name

    if options["testing"]:
        options["limit"] = options["limit"] or TESTING_SAMPLES
        options["max_windows"] = options["max_windows"] or TESTING_SAMPLES
    check_log_dir(options["log_dir"])
    choose_device(options["device"])
    source = find_model(model, options["pretrained_dir"])
    texts = load_texts(options["ppl_dataset"]) if _wants_perplexity(ctx, options) else []
    tasks = _load_tasks(options)
    loaded = load(source, options["device"], backend=options["backend"])
    if not options["allow_leak"]:
        refuse_leak(calibration_source(loaded), texts)
    sizes = {name: options[name] for name in ("seqlen", "batch_size", "max_windows")}
    runs, store = [], None
    with TqdmProgress(verbose) as progress:
        scores = [score(loaded, text, progress, **sizes) for text in texts]
        if tasks is not None:
            store = answer_store(loaded, options["log_dir"], options["max_length"], SEED)
            chosen = {name: options[name] for name in ("limit", "batch_size", "max_length")}
            chosen.update(shots=[options["fewshot"]], seed=SEED, store=store)
            runs = score_tasks(loaded, tasks, progress, **chosen)
    record = describe_run(loaded, dict(ctx.params))
    record["ppl"] = {s.text.name: s.result.perplexity for s in scores}
    record["scored"] = {s.text.name: s.to_dict() for s in scores}
    add_to_record(record, runs)
    if as_json:
        keys = ("model", "recipe", "calibration", "size_mib", "ppl", "scored", "lm_eval", "tasks")
        click.echo(json.dumps(jsonable({key: record[key] for key in keys}), indent=2))
    else:
        if scores:
            print_scores(scores)
        if runs:
            print_task_scores(runs)
    if options["log_dir"] is not None:
        name = model_name(source) if loaded.plan is not None else f"{model_name(source)}_fp16"
        say(f"Log: '{write_log(options['log_dir'], name, record)}'.")
    if store is not None:
        store.clear()


def _check(ctx: click.Context, options: dict[str, Any]) -> None:
    """What can be refused from the flags alone."""
    alone = given_parameters(ctx, _TASK_OPTIONS)
    if alone and options["task_list"] is None:
        raise QuambaError(f"--{alone[0]} has no effect alone, expected --task_list with it.")
    unused = given_parameters(ctx, _PERPLEXITY_OPTIONS)
    if unused and not _wants_perplexity(ctx, options):
        raise QuambaError(f"--{unused[0]} has no effect on tasks, expected --ppl_dataset with it.")


def _wants_perplexity(ctx: click.Context, options: dict[str, Any]) -> bool:
    return options["task_list"] is None or bool(given_parameters(ctx, ("ppl_dataset",)))


def _load_tasks(options: dict[str, Any]) -> Any:
    """The tasks that are asked for, None without any."""
    if options["task_list"] is None:
        return None
    from quamba.evaluation.tasks import load_tasks

    return load_tasks(task_names(options["task_list"]), options["task_dir"], seed=SEED)


def describe_run(model: Model, args: dict[str, Any]) -> dict[str, Any]:
    """What every log says: the published keys, then what was run on what."""
    from quamba.cli.log import versions

    return {
        "args": args,
        "ppl": {},
        "lm_eval": {},
        "model": {"source": model.source, "device": str(model.device), "config": model.config.to_dict()},
        "recipe": None if model.recipe is None else model.recipe.to_dict(),
        "calibration": {} if model.report is None else model.report.calibration,
        "size_mib": round(mib(model.size_bytes), 3),
        "versions": versions(),
        "timings": {},
    }
