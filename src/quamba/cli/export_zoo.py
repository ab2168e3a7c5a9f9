"""``quamba export-zoo``: a quantized model in the published format."""

from __future__ import annotations

import click

from quamba.cli.console import Command, say


@click.command(cls=Command)
@click.argument("model")
@click.argument("out_dir")
@click.option("--pretrained_dir", metavar="DIR", help="Where MODEL may be found by its name.")
@click.option("--force", is_flag=True, help="Replace a model in OUT_DIR.")
def command(model: str, out_dir: str, pretrained_dir: str | None, force: bool) -> None:
    """Write MODEL to OUT_DIR as config.json and pytorch_model.bin of the published Quamba code.

    That format holds what the recipes zoo-w8a8, zoo-w4a8 and zoo-w4a16 make, and published models; others are
    refused with the reason.
    """
    from pathlib import Path

    from quamba.api import export_zoo
    from quamba.cli.store import check_replaceable, find_model

    folder = Path(out_dir).expanduser()
    check_replaceable(folder, force)
    source = find_model(model, pretrained_dir)
    for note in export_zoo(source, folder, overwrite=force):
        say(note)
    click.echo(f"{source}: exported to '{out_dir}'.")
