"""``quamba recipes``: what ships."""

from __future__ import annotations

import json

import click

from quamba.cli.console import Command, table


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the shipped recipes, for --recipe of quantize and inspect."""
    from quamba.recipes.recipe import SHIPPED, shipped_names

    lines = {name: _first_comment((SHIPPED / f"{name}.toml").read_text("utf-8")) for name in shipped_names()}
    if as_json:
        click.echo(json.dumps(lines, indent=2))
    else:
        click.echo(table(("recipe", "what it does"), list(lines.items())))


def _first_comment(toml: str) -> str:
    """The comment that opens a recipe file, as one line."""
    comment = []
    for line in toml.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment)
