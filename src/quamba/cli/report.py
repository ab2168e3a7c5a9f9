"""``quamba report``: what a sweep measured, against what was expected."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quamba.cli.console import Command, say, table


@click.command(cls=Command)
@click.argument("runs", metavar="RUNS/")
@click.option("--out", metavar="DIR", help="Where to write report.md, .csv and .html. Default: RUNS/report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def command(runs: str, out: str | None, as_json: bool) -> None:
    """Tables and plots of the sweep in RUNS, and which expected values it reproduces.

    A sweep that is not finished gives a report of what is.
    """
    from quamba.experiments.outcomes import read_outcomes
    from quamba.experiments.report import report_dict, summary, table_rows, verdict_line, write_report
    from quamba.reporting.write import check_folder

    outcomes = read_outcomes(runs)
    folder = check_folder("--out", out or Path(runs) / "report")
    files = write_report(outcomes, folder)
    if as_json:
        click.echo(json.dumps(report_dict(outcomes), indent=2))
    else:
        click.echo(table(*table_rows(outcomes)))
        for run, verdict in outcomes.verdicts:
            click.echo(f"{run.name}: {verdict_line(verdict)}")
        click.echo(summary(outcomes))
    for note in outcomes.notes:
        say(f"Note: {note}")
    say(f"Written: {', '.join(repr(str(file)) for file in files)}.")
