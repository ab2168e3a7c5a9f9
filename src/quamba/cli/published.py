"""The published command line of main.py: quantize, keep, measure."""

from __future__ import annotations

from typing import Any

import click

from quamba.cli.console import Command, TqdmProgress, mib, say
from quamba.cli.flags import QuantizeFlags, device_option, given_parameters, quantize_flags, seed_option
from quamba.errors import QuambaError

_TASK_FLAGS = ("eval_zero_shot", "eval_few_shot", "eval_generation", "task_list", "fewshot")
_TESTING_WINDOWS = 100


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
@click.option("--batch_size", type=click.IntRange(min=1), help="Windows at once. Default: as memory allows.")
@click.option("--testing", is_flag=True, help=f"Score at most {_TESTING_WINDOWS} windows of a text.")
@click.option("--log_dir", metavar="DIR", help="Write a JSON log of the run into DIR.")
@click.option("--allow_leak", is_flag=True, help="Score a text that the model was calibrated on.")
@device_option()
@seed_option()
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
@click.option("--eval_zero_shot", is_flag=True, hidden=True)
@click.option("--eval_few_shot", is_flag=True, hidden=True)
@click.option("--eval_generation", is_flag=True, hidden=True)
@click.option("--task_list", hidden=True)
@click.option("--fewshot", hidden=True)
@click.pass_context
def command(ctx: click.Context, model: str, **options: Any) -> None:
    """Quantize MODEL and keep the result, or take it as it is; then measure its perplexity.

    MODEL is a folder, a hub id, or the name of a model stored under --pretrained_dir. With --quantize
    and --pretrained_dir DIR the result is stored as DIR/ut-enyac/NAME and used again on the next run if it
    was made from the same model, recipe and calibration.
    """
    flags = QuantizeFlags.take(options)
    _check(ctx, flags, options)
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

    check_log_dir(options["log_dir"])
    texts = load_texts(options["ppl_dataset"]) if options["eval_ppl"] else []
    guarded = [] if options["allow_leak"] else texts
    scores = []
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
        )
        if not got.fresh:
            refuse_leak(calibration_source(got.model), guarded)
        most = _TESTING_WINDOWS if options["testing"] else None
        for text in texts:
            scores.append(
                score(got.model, text, progress, batch_size=options["batch_size"], max_windows=most)
            )
    _print_model(got.model, got.fresh, got.seconds)
    if got.folder is not None:
        click.echo(f"Stored in '{got.folder}'.")
    if scores:
        print_scores(scores)
    if options["log_dir"] is not None:
        from quamba.cli.evaluate import describe_run

        record = describe_run(got.model, dict(ctx.params))
        record["ppl"] = {s.text.name: s.result.perplexity for s in scores}
        record["scored"] = {s.text.name: s.to_dict() for s in scores}
        record["timings"] = {
            **got.seconds,
            **{f"perplexity {s.text.name}": s.result.seconds for s in scores},
        }
        name = _log_name(model_name(model), flags, got.model.plan is not None)
        say(f"Log: '{write_log(options['log_dir'], name, record)}'.")


def _check(ctx: click.Context, flags: QuantizeFlags, options: dict[str, Any]) -> None:
    """What can be refused from the flags alone."""
    tasks = given_parameters(ctx, _TASK_FLAGS)
    if tasks:
        raise QuambaError(
            f"--{tasks[0]} belongs to the lm-eval tasks, which come in a later release; "
            "--eval_ppl with --ppl_dataset works now."
        )
    if not flags.quantize and not options["eval_ppl"]:
        raise QuambaError("There is nothing to do, expected --quantize, --eval_ppl or both.")


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
