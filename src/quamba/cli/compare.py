"""``quamba compare``: runs of several models side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quamba.cli.console import Command, say, table

if TYPE_CHECKING:
    from quamba.reporting.measures import Comparison

_PNG, _HTML = "compare.png", "compare.html"


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN.json|DIR...")
@click.option("--published", is_flag=True, help="Add the papers' numbers for the same model and precision.")
@click.option("-o", "--output", metavar="DIR", help=f"Write {_PNG} and {_HTML} into DIR.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write every number as one line of CSV.")
@click.option("--title", default="Models compared", show_default=True, help="Of the picture and of the page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    runs: tuple[str, ...],
    published: bool,
    output: str | None,
    csv_file: str | None,
    title: str,
    as_json: bool,
) -> None:
    """Accuracy, perplexity, size and speed of models side by side.

    RUN.json is what evaluate, main.py or profile wrote with --log_dir or --json; of a folder, all of them.
    Runs of one model and recipe become one row; what was measured in another way stands in another column.
    """
    from quamba.reporting.charts import require_pictures
    from quamba.reporting.merge import compare
    from quamba.reporting.runs import read_runs
    from quamba.reporting.write import check_file, check_folder

    folder = None if output is None else check_folder("--output", output)
    if folder is not None:
        require_pictures()
        for name in (_PNG, _HTML):
            if (folder / name).is_dir():
                check_file("--output", folder / name)
    csv_path = None if csv_file is None else check_file("--csv", csv_file)
    found = read_runs(runs)
    comparison = compare(found.runs, published=published, notes=[f"Left out: {s}" for s in found.left_out])
    _write(comparison, folder, csv_path, title)
    _print(comparison, as_json)
    if folder is not None:
        say(f"Picture: '{folder / _PNG}', page: '{folder / _HTML}'.")


def _write(comparison: Comparison, folder: Path | None, csv_path: Path | None, title: str) -> None:
    from quamba.reporting.charts import draw, panels
    from quamba.reporting.page import comparison_page
    from quamba.reporting.tables import csv_text
    from quamba.reporting.write import write_all

    def text(content: str, path: Path) -> None:
        path.write_text(content, encoding="utf-8")

    writers: dict[Path, Callable[[Path], object]] = {}
    if folder is not None:
        writers[folder / _PNG] = lambda path: draw(panels(comparison), path, title)
        writers[folder / _HTML] = lambda path: text(comparison_page(comparison, title), path)
    if csv_path is not None:
        writers[csv_path] = lambda path: text(csv_text(comparison), path)
    write_all(writers)


def _print(comparison: Comparison, as_json: bool) -> None:
    from quamba.cli.log import jsonable
    from quamba.reporting.tables import text_tables, to_dict

    if as_json:
        click.echo(json.dumps(jsonable(to_dict(comparison)), indent=2))
        return
    for i, (title, header, rows, lines) in enumerate(text_tables(comparison)):
        click.echo("\n" * (i > 0) + title)
        click.echo(table(header, rows))
        for line in lines:
            click.echo(line)
    for note in comparison.notes:
        say(f"Note: {note}")
