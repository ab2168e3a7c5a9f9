"""The published command line of main.py: quantize, keep, measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, TqdmProgress, mib, say
from quamba.cli.flags import QuantizeFlags, device_option, given_parameters, quantize_flags, seed_option
from quamba.cli.task_scores import LOG_DIR_HELP, TESTING_SAMPLES, batch_size_option, task_names
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.cli.obtain import Load
    from quamba.quantization.work import WorkFolder

_MODES = ("eval_zero_shot", "eval_few_shot", "eval_generation")
_TASK_OPTIONS = ("task_list", "fewshot", "task_dir", "max_length", "limit")


@click.command(cls=Command)
@click.argument("model")
@quantize_flags
@click.option("--eval_ppl", is_flag=True, help="Measure perplexity.")
@click.option(
    "--ppl_dataset",
    multiple=True,
    metavar="NAME|FILE",
    default=("wikitext2",),
    show_default=True,
    help="wikitext2, ptb, c4, pile (windows of 2048 tokens), or a .txt or .jsonl file (windows of 1024);"
    " may be given several times.",
)
@click.option("--eval_zero_shot", is_flag=True, help="Run lm-eval's tasks without examples.")
@click.option("--eval_few_shot", is_flag=True, help="Run them with --fewshot examples in each context.")
@click.option("--eval_generation", is_flag=True, help="The same, as published for tasks that generate.")
@click.option(
    "--task_list",
    default="lambada_openai",
    show_default=True,
    metavar="A,B,C",
    help="Tasks, groups or tags of lm-eval; lambada_local needs no network.",
)
@click.option(
    "--fewshot", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Examples."
)
@click.option("--task_dir", metavar="DIR", help="Task files of your own.")
@click.option(
    "--max_length",
    type=click.IntRange(min=2),
    help="Tokens of a task's text that are read, the last ones. Default: 2048.",
)
@batch_size_option()
@click.option(
    "--testing",
    is_flag=True,
    help=f"Score at most {TESTING_SAMPLES} windows of a text and {TESTING_SAMPLES} samples of a task.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N samples of each task.")
@click.option(
    "--max_windows", type=click.IntRange(min=1), metavar="N", help="The first N windows of each text."
)
@click.option("--log_dir", metavar="DIR", help=LOG_DIR_HELP)
@click.option("--allow_leak", is_flag=True, help="Score a text that the model was calibrated on.")
@device_option()
@seed_option()
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
@click.pass_context
def command(ctx: click.Context, **options: Any) -> None:
    """Quantize MODEL and keep the result, or take it as it is; then measure it.

    MODEL is a folder, a hub id, or the name of a model stored under --pretrained_dir. With --quantize
    and --pretrained_dir DIR the result is stored as DIR/ut-enyac/NAME and used again on the next run if it
    was made from the same model, recipe and calibration.
    """
    perform(ctx)


def check(ctx: click.Context) -> None:
    """Refuse what can be refused from the flags alone."""
    options = dict(ctx.params)
    _check(ctx, QuantizeFlags.take(options), options)


def perform(
    ctx: click.Context, load_float: Load | None = None, work: WorkFolder | None = None
) -> dict[str, Any]:
    """What a parsed command line asks for: print it, log it, return what the log says.

    load_float  instead of ``api.load`` for the float model that is quantized
    work        where results of stages are kept and found
    """
    options = dict(ctx.params)
    model = options.pop("model")
    flags = QuantizeFlags.take(options)
    _check(ctx, flags, options)
    from quamba.cli.evaluate import describe_run
    from quamba.cli.log import check_log_dir, write_log
    from quamba.cli.obtain import obtain
    from quamba.cli.scoring import (
        calibration_source,
        load_texts,
        print_scores,
        refuse_drawn_leak,
        refuse_leak,
        score,
    )
    from quamba.cli.store import model_name
    from quamba.cli.task_scores import add_to_record, answer_store, print_task_scores, score_tasks

    check_log_dir(options["log_dir"])
    texts = load_texts(options["ppl_dataset"]) if options["eval_ppl"] else []
    tasks = _load_tasks(options)
    guarded = [] if options["allow_leak"] else texts
    with TqdmProgress(options["verbose"]) as progress:
        got = obtain(
            model,
            flags,
            device=options["device"],
            backend=options["backend"],
            seed=options["seed"],
            progress=progress,
            check_calibration=lambda source: refuse_leak(source, guarded),
            check_drawn=lambda drawn, loaded: refuse_drawn_leak(drawn, loaded, guarded),
            load_float=load_float,
            work=work,
        )
        if not got.fresh:
            refuse_leak(calibration_source(got.model), guarded)
        most = TESTING_SAMPLES if options["testing"] else None
        sizes = {"batch_size": options["batch_size"], "max_windows": options["max_windows"] or most}
        scores = [score(got.model, text, progress, **sizes) for text in texts]
        runs, store = [], None
        if tasks is not None:
            store = answer_store(got.model, options["log_dir"], options["max_length"], options["seed"])
            runs = score_tasks(
                got.model,
                tasks,
                progress,
                shots=_shots(options),
                limit=options["limit"] or most,
                batch_size=options["batch_size"],
                max_length=options["max_length"],
                seed=options["seed"],
                store=store,
            )
    _print_model(got.model, got.fresh, got.seconds)
    if got.folder is not None:
        click.echo(f"Stored in '{got.folder}'.")
    if scores:
        print_scores(scores)
    if runs:
        print_task_scores(runs)
    record = describe_run(got.model, dict(ctx.params))
    record["ppl"] = {s.text.name: s.result.perplexity for s in scores}
    record["scored"] = {s.text.name: s.to_dict() for s in scores}
    record["timings"] = {**got.seconds, **{f"perplexity {s.text.name}": s.result.seconds for s in scores}}
    add_to_record(record, runs)
    if options["log_dir"] is not None:
        name = _log_name(model_name(model), flags, got.model.plan is not None)
        say(f"Log: '{write_log(options['log_dir'], name, record)}'.")
    if store is not None:
        store.clear()
    return record


def _check(ctx: click.Context, flags: QuantizeFlags, options: dict[str, Any]) -> None:
    """What can be refused from the flags alone."""
    modes = [mode for mode in _MODES if options[mode]]
    given = given_parameters(ctx, _TASK_OPTIONS)
    if given and not modes:
        raise QuambaError(
            f"--{given[0]} has no effect alone, expected --eval_zero_shot, --eval_few_shot or "
            "--eval_generation with it."
        )
    if given_parameters(ctx, ("max_windows",)) and not options["eval_ppl"]:
        raise QuambaError("--max_windows has no effect alone, expected --eval_ppl with it.")
    if "fewshot" in given and modes == ["eval_zero_shot"]:
        raise QuambaError(
            "--fewshot has no effect on --eval_zero_shot, expected --eval_few_shot or --eval_generation."
        )
    if not flags.quantize and not options["eval_ppl"] and not modes:
        raise QuambaError(
            "There is nothing to do, expected --quantize, --eval_ppl, or tasks (--eval_zero_shot)."
        )


def _load_tasks(options: dict[str, Any]) -> Any:
    """The tasks that are asked for, None without any."""
    if not any(options[mode] for mode in _MODES):
        return None
    from quamba.evaluation.tasks import load_tasks

    return load_tasks(task_names(options["task_list"]), options["task_dir"], seed=options["seed"])


def _shots(options: dict[str, Any]) -> list[int]:
    """Zero-shot, and the number for few-shot and generation, each once."""
    few = options["eval_few_shot"] or options["eval_generation"]
    numbers = ([0] if options["eval_zero_shot"] else []) + ([options["fewshot"]] if few else [])
    return list(dict.fromkeys(numbers))


def _print_model(model: Any, fresh: bool, seconds: dict[str, float]) -> None:
    precision = "float" if model.recipe is None else model.recipe.name
    done = "quantized" if fresh else "loaded"
    click.echo(
        f"{model.source}: {precision}, {mib(model.size_bytes):.1f} MiB in memory, "
        f"{done} in {sum(seconds.values()):.1f} s on {model.device}."
    )


def _log_name(name: str, flags: QuantizeFlags, quantized: bool) -> str:
    """The published rule, but a quantized model is never called fp16."""
    if name.startswith("quamba"):
        return name
    if flags.quantize:
        return f"{name}_{flags.label}"
    return name if quantized else f"{name}_fp16"
