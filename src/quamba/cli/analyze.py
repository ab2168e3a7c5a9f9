"""``quamba analyze``: where a quantized model departs from its float model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, TqdmProgress, say, table
from quamba.cli.flags import device_option
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from torch import Tensor

    from quamba.analysis.analyze import Analysis, SiteReport
    from quamba.api import Model
    from quamba.cli.planned import Planned
    from quamba.evaluation.texts import EvalText

_DEFAULT_TEXT = "wikitext2"
_BUNDLED_TEXT = "heldout.txt"
_REPORT = "analysis.json"
_NOTABLE = 3


@click.command(cls=Command)
@click.argument("model")
@click.option(
    "--against",
    metavar="FLOAT",
    help="The float model. Default: the one that MODEL was made from, where its files name it.",
)
@click.option(
    "--data",
    metavar="NAME|FILE",
    help="Text: wikitext2, ptb, c4, pile, or a .txt or .jsonl file. Default: wikitext2; for the bundled"
    " models, the bundled text.",
)
@click.option(
    "--windows", type=click.IntRange(min=1), default=8, show_default=True, help="Windows to read, at most."
)
@click.option(
    "--seqlen", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window."
)
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Worst sites that are listed."
)
@click.option("-o", "--output", metavar="DIR", help=f"Write pictures and {_REPORT} into DIR.")
@device_option()
@click.option("--pretrained_dir", metavar="DIR", help="Where MODEL may be found by its name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verbose", is_flag=True, help="A progress bar, even if stderr is no terminal.")
def command(model: str, as_json: bool, **options: Any) -> None:
    """Compare the activations, weights and predictions of MODEL with those of its float model on a text."""
    _check_output(options["output"])
    from quamba.analysis.align import check_pair
    from quamba.api import choose_device
    from quamba.cli.log import jsonable
    from quamba.cli.planned import read_plan

    choose_device(options["device"])
    planned = read_plan(model, None, options["pretrained_dir"])
    against = options["against"] or _float_source(model, planned)
    other = read_plan(against, None, options["pretrained_dir"])
    check_pair(planned.plan.config, other.plan.config)
    text = _text(options["data"], against)
    mine, theirs = _load(model, planned, options), _load(against, other, options)
    cut = _windows(mine, theirs, text, options["seqlen"])[: options["windows"]]
    analysis = _analyze(mine, theirs, cut, options["verbose"])
    title = f"{model} ({_precision(mine)}) against {against} ({_precision(theirs)})"
    record = {
        "model": model,
        "against": against,
        "recipe": None if mine.recipe is None else mine.recipe.to_dict(),
        "text": text.source,
        "device": str(mine.device),
        **analysis.to_dict(),
    }
    shown = json.dumps(jsonable(record), indent=2)
    if options["output"] is not None:
        _keep(analysis, options["output"], title, shown)
    if as_json:
        click.echo(shown)
    else:
        click.echo(f"{title}: {_scope(analysis, text)}")
        _print(analysis, options["top"])


def _check_output(folder: str | None) -> None:
    """Refuse what cannot be written, before the work that would be lost."""
    if folder is None:
        return
    from quamba.analysis.plot import require_plots

    require_plots()
    if Path(folder).expanduser().exists() and not Path(folder).expanduser().is_dir():
        raise QuambaError(f"--output '{folder}' is a file, expected a folder.")


def _float_source(model: str, planned: Planned) -> str:
    """The float model that MODEL was made from, known to be there."""
    from quamba.checkpoints.quantized import is_quantized
    from quamba.checkpoints.source import resolve as resolve_source

    source = planned.stored.get("source")
    if source is None:
        kind = "is float" if planned.format is None else "is a published model, which does not name it"
        raise QuambaError(f"'{model}' {kind}; say with --against what to compare it with.")
    try:
        folder = resolve_source(source)
    except QuambaError as error:
        raise QuambaError(
            f"'{model}' was made from '{source}', which is not found ({error.args[0].rstrip('.')}); say with"
            " --against where it is."
        ) from None
    if is_quantized(folder):
        raise QuambaError(
            f"'{model}' was made from '{source}', which is quantized now; say with --against where the float"
            " model is."
        )
    return str(source)


def _text(data: str | None, against: str) -> EvalText:
    """The text to read; of a bundled model the text bundled with it."""
    from quamba.checkpoints.source import resolve as resolve_source
    from quamba.cli.store import default_calibration
    from quamba.evaluation.texts import load_text

    if data is None:
        bundled = default_calibration(resolve_source(against))
        data = _DEFAULT_TEXT if bundled is None else str(bundled.with_name(_BUNDLED_TEXT))
    return load_text(data)


def _load(model: str, planned: Planned, options: dict[str, Any]) -> Model:
    """A float model in float32 on any device, a quantized one as it is used."""
    import torch

    from quamba.api import load
    from quamba.cli.store import find_model

    dtype = torch.float32 if planned.format is None else None
    source = find_model(model, options["pretrained_dir"])
    return load(source, options["device"], dtype=dtype, backend=options["backend"])


def _windows(mine: Model, theirs: Model, text: EvalText, length: int) -> Tensor:
    """The text as ids (n, length), which must be the same for both models."""
    from quamba.cli.scoring import encode
    from quamba.evaluation.perplexity import windows

    tokenized = [encode(model, text) for model in (mine, theirs) if model.tokenizer is not None]
    if not tokenized:
        raise QuambaError(f"{mine.tokenizer_error} A text needs the tokenizer of one of the two models.")
    if len(tokenized) == 2 and tokenized[0].tolist() != tokenized[1].tolist():
        raise QuambaError(
            "The tokenizers of the two models read the text differently, expected the float model that the"
            " quantized one was made from."
        )
    return windows(tokenized[0], length)


def _analyze(mine: Model, theirs: Model, cut: Tensor, verbose: bool) -> Analysis:
    from quamba.analysis.align import channel_orders
    from quamba.analysis.analyze import analyze

    with TqdmProgress(verbose) as progress:
        return analyze(
            mine.network,
            theirs.network,
            cut,
            orders=channel_orders(mine.plan, mine.report),
            reference_orders=channel_orders(theirs.plan, theirs.report),
            progress=progress,
        )


def _precision(model: Model) -> str:
    if model.recipe is not None:
        return model.recipe.name
    return str(model.network.lm_head.compute_dtype).removeprefix("torch.")


def _scope(analysis: Analysis, text: EvalText) -> str:
    plural = "" if analysis.windows == 1 else "s"
    return f"{analysis.windows} window{plural} of {analysis.window_length} tokens of {text.name}"


def _print(analysis: Analysis, top: int) -> None:
    logits = analysis.logits
    click.echo(
        f"KL {logits.kl_mean:.4g} nats a token, {logits.kl_max:.3g} at most; same most likely token at "
        f"{100 * logits.top1_agreement:.1f}%; perplexity {logits.float_perplexity:.4f} -> "
        f"{logits.perplexity:.4f}"
    )
    worst = analysis.worst(top)
    if worst:
        click.echo("\nWorst sites, by the error that a block adds to what the float model gives it:")
        header = (
            "layer",
            "site",
            "own dB",
            "dB",
            "absmax",
            "99.9%",
            "std",
            "kurtosis",
            "outlier",
            "clipped %",
        )
        click.echo(table(header, [_site_row(site) for site in worst]))
    for line in _notable(analysis):
        click.echo(line)
    click.echo("\nSignal-to-noise ratio in dB, errors of all layers before included:")
    click.echo(_by_layer([(s.layer, s.site, s.snr_db) for s in analysis.sites]))
    if analysis.weights:
        click.echo("\nQuantized weights, signal-to-noise ratio in dB:")
        click.echo(_by_layer([(w.layer, w.name, w.snr_db) for w in analysis.weights]))
    for reason in dict.fromkeys(analysis.left_out.values()):
        names = ", ".join(name for name, why in analysis.left_out.items() if why == reason)
        click.echo(f"Left out: {names}; {reason}.")


def _site_row(site: SiteReport) -> list[str]:
    cells = [_layer(site.layer), site.site, _db(site.own_snr_db), _db(site.snr_db)]
    if site.range is None:
        cells += ["-"] * 5
    else:
        r = site.range
        values = (r.absmax, r.percentiles["99.9"], r.std, r.kurtosis, r.outlier_ratio)
        cells += [f"{value:.3g}" for value in values]
    return [*cells, "-" if site.clipped is None else f"{100 * site.clipped:.3f}"]


def _notable(analysis: Analysis) -> list[str]:
    """The strongest outliers, and where most values are clipped."""
    ranged = [(site, site.range) for site in analysis.sites if site.range is not None]
    ranged.sort(key=lambda pair: -pair[1].outlier_ratio)
    outliers = [
        f"{_place(site)} channel {r.outlier_channels[0][0]} ({r.absmax:.3g}, {r.outlier_ratio:.1f} x)"
        for site, r in ranged[:_NOTABLE]
    ]
    shares = [(site, site.clipped) for site in analysis.sites if site.clipped]
    shares.sort(key=lambda pair: -pair[1])
    clipped = [f"{_place(site)} ({100 * share:.3f}%)" for site, share in shares[:_NOTABLE]]
    lines = [f"Largest channels, next to the median one: {'; '.join(outliers)}."] if outliers else []
    return lines + ([f"Most values clipped: {'; '.join(clipped)}."] if clipped else [])


def _by_layer(values: Sequence[tuple[int | None, str, float]]) -> str:
    """One row a layer, one column a name; a line for what is in no layer."""
    rows: dict[int, dict[str, str]] = {}
    outside = []
    for layer, name, value in values:
        if layer is None:
            outside.append(f"{name} {_db(value)}")
        else:
            rows.setdefault(layer, {})[name] = _db(value)
    lines = []
    if rows:
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        cells = [[str(layer), *(row.get(name, "-") for name in names)] for layer, row in rows.items()]
        lines.append(table(("layer", *names), cells))
    return "\n".join([*lines, *([f"Outside the layers: {', '.join(outside)}"] if outside else [])])


def _place(site: SiteReport) -> str:
    return site.site if site.layer is None else f"layer {site.layer} {site.site}"


def _layer(layer: int | None) -> str:
    return "-" if layer is None else str(layer)


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else str(value)


def _keep(analysis: Analysis, folder: str, title: str, shown: str) -> None:
    from quamba.analysis.plot import plot

    paths = plot(analysis, folder, title)
    report = Path(folder).expanduser() / _REPORT
    draft = report.with_name(f".{report.name}")
    draft.write_text(shown + "\n", encoding="utf-8")
    draft.replace(report)
    say(f"Written: {', '.join(repr(str(path)) for path in (*paths, report))}.")
