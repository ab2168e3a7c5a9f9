"""``quamba demo``: the whole job on the bundled Mamba2 model."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quamba.cli.console import Command, TqdmProgress, mib, say, table
from quamba.cli.flags import SEED
from quamba.errors import QuambaError

if TYPE_CHECKING:
    from quamba.api import Model
    from quamba.calibration.data import CalibrationSet
    from quamba.evaluation.texts import EvalText
    from quamba.runtime.sampling import SamplingParams

MODEL = "mamba2-demo"
RECIPES = ("w8a8", "w4a8", "w4a16")
WINDOW_TOKENS = 1024
#: (windows scored, calibration samples); None is all of them.
SLICE, FULL = (16, 64), (None, 256)
PROMPT = "The old man looked out over the sea. He had not spoken since the morning, and at last he turned"


@dataclass(frozen=True)
class _Row:
    precision: str
    size_mib: float
    perplexity: float
    quantize_seconds: float | None
    evaluate_seconds: float


@click.command(cls=Command)
@click.option("--full", is_flag=True, help="Score all the text and calibrate on 256 samples instead of 64.")
@click.option("--assets", metavar="DIR", help="The assets folder of the repository, if it is not found.")
@click.option(
    "-o", "--output", default="out/demo", show_default=True, metavar="DIR", help="Where the models are kept."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
def command(full: bool, assets: str | None, output: str, as_json: bool, verbose: bool) -> None:
    """Quantize the bundled Mamba2 model three ways, save, reload and measure each, then write a paragraph."""
    folder = _assets(assets)
    from quamba.api import load
    from quamba.calibration.data import CalibrationSpec, load_calibration
    from quamba.cli.store import check_replaceable
    from quamba.evaluation.texts import load_text

    targets = {name: Path(output) / f"quamba2-demo-{name}" for name in RECIPES}
    for target in targets.values():
        check_replaceable(target, force=True)
    max_windows, samples = FULL if full else SLICE
    source = folder / "models" / MODEL
    text = load_text(folder / "data" / "heldout.txt")
    model = load(source)
    assert model.tokenizer is not None
    spec = CalibrationSpec(data=folder / "data" / "calibration.txt", num=samples, seed=SEED)
    with TqdmProgress(verbose) as progress:
        say(f"Scoring the float model '{source}'.")
        row, sentence = _measure(model, source, "float", None, text, max_windows, progress)
        rows = [row]
        calibration = load_calibration(spec, model.tokenizer)
        writer = None
        for name, target in targets.items():
            say(f"Quantizing to {name.upper()}.")
            seconds = _quantize(model, name, calibration, target, progress)
            small = load(target)
            writer = small if name == "w4a8" else writer
            rows.append(_measure(small, target, name.upper(), seconds, text, max_windows, progress)[0])
    assert writer is not None
    story = writer.generate(PROMPT, max_new_tokens=120, sampling=_sampling(), seed=SEED)[0].text
    if as_json:
        fields = {"rows": [asdict(row) for row in rows], "scored": sentence, "text": PROMPT + story}
        click.echo(json.dumps(fields, indent=2))
        return
    header = ("precision", "size, MiB", "perplexity", "quantize, s", "evaluate, s")
    click.echo(table(header, [_cells(row) for row in rows]))
    click.echo(f"Scored: {sentence}")
    click.echo(f"Calibrated on {calibration.description}.")
    if not full:
        click.echo("A slice, to be quick; `make demo FULL=1` or `quamba demo --full` does it all.")
    click.echo(f"\nWritten by '{targets['w4a8']}' (W4A8), reloaded from disk:\n\n{PROMPT}{story}")


def _quantize(
    model: Model, recipe: str, calibration: CalibrationSet, target: Path, progress: TqdmProgress
) -> float:
    """Quantize and save; wall seconds, saving included."""
    from quamba.api import quantize, save

    start = time.perf_counter()
    small, _ = quantize(model, recipe, calibration, progress=progress)
    save(small, target, overwrite=True)
    progress.close()
    return time.perf_counter() - start


def _measure(
    model: Model,
    folder: Path,
    precision: str,
    quantize_seconds: float | None,
    text: EvalText,
    max_windows: int | None,
    progress: TqdmProgress,
) -> tuple[_Row, str]:
    """A line of the table, and what was scored."""
    from quamba.checkpoints.tensors import open_tensors
    from quamba.cli.scoring import score

    scored = score(model, text, progress, seqlen=WINDOW_TOKENS, max_windows=max_windows)
    progress.close()
    size_mib = mib(open_tensors(folder).size_bytes())
    result = scored.result
    row = _Row(precision, size_mib, result.perplexity, quantize_seconds, result.seconds)
    return row, scored.sentence


def _sampling() -> SamplingParams:
    from quamba.runtime.sampling import SamplingParams

    return SamplingParams(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.1)


def _cells(row: _Row) -> tuple[str, ...]:
    took = "-" if row.quantize_seconds is None else f"{row.quantize_seconds:.1f}"
    return (
        row.precision,
        f"{row.size_mib:.2f}",
        f"{row.perplexity:.2f}",
        took,
        f"{row.evaluate_seconds:.1f}",
    )


def _assets(given: str | None) -> Path:
    """The given folder, else the repository's, else the one here."""
    places = [Path(given)] if given else [Path(__file__).parents[3] / "assets", Path("assets")]
    for place in places:
        if (place / "models" / MODEL / "config.json").is_file():
            return place
    raise QuambaError(
        f"'{places[-1]}' has no models/{MODEL}, expected the assets folder of the Quamba repository; "
        "run this from the repository or give --assets DIR."
    )
