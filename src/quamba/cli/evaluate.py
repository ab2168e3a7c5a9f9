"""``quamba evaluate``: the perplexity of a model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, TqdmProgress, mib, say
from quamba.cli.flags import device_option

if TYPE_CHECKING:
    from quamba.api import Model


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
@click.option("--batch_size", type=click.IntRange(min=1), help="Windows at once. Default: as memory allows.")
@click.option("--max_windows", type=click.IntRange(min=1), help="Score only the first so many.")
@device_option()
@click.option("--pretrained_dir", metavar="DIR", help="Where MODEL may be found by its name.")
@click.option("--log_dir", metavar="DIR", help="Write a JSON log of the run into DIR.")
@click.option("--allow_leak", is_flag=True, help="Score a text that the model was calibrated on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
@click.pass_context
def command(ctx: click.Context, model: str, as_json: bool, verbose: bool, **options: Any) -> None:
    """Perplexity of MODEL, float or quantized, over non-overlapping windows."""
    from quamba.api import choose_device, load
    from quamba.cli.log import check_log_dir, write_log
    from quamba.cli.scoring import calibration_source, load_texts, print_scores, refuse_leak, score
    from quamba.cli.store import find_model, model_name

    check_log_dir(options["log_dir"])
    choose_device(options["device"])
    source = find_model(model, options["pretrained_dir"])
    texts = load_texts(options["ppl_dataset"])
    loaded = load(source, options["device"], backend=options["backend"])
    if not options["allow_leak"]:
        refuse_leak(calibration_source(loaded), texts)
    sizes = {name: options[name] for name in ("seqlen", "batch_size", "max_windows")}
    with TqdmProgress(verbose) as progress:
        scores = [score(loaded, text, progress, **sizes) for text in texts]
    record = describe_run(loaded, dict(ctx.params))
    record["ppl"] = {s.text.name: s.result.perplexity for s in scores}
    record["scored"] = {s.text.name: s.to_dict() for s in scores}
    if as_json:
        click.echo(json.dumps({key: record[key] for key in ("model", "size_mib", "ppl", "scored")}, indent=2))
    else:
        print_scores(scores)
    if options["log_dir"] is not None:
        name = model_name(source) if loaded.plan is not None else f"{model_name(source)}_fp16"
        say(f"Log: '{write_log(options['log_dir'], name, record)}'.")


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
