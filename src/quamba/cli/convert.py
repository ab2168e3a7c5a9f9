"""``quamba convert``: a published checkpoint in our format."""

from __future__ import annotations

from typing import Any

import click

from quamba.cli.console import Command, NearestChoice, mib


@click.command(cls=Command)
@click.argument("model")
@click.argument("out_dir")
@click.option("--pretrained_dir", metavar="DIR", help="Where MODEL may be found by its name.")
@click.option(
    "--overflow",
    type=NearestChoice(("saturate", "wrap")),
    default="saturate",
    show_default=True,
    help="What the Hadamard rotation does with values beyond int8; wrap is what the published kernels do.",
)
@click.option("--force", is_flag=True, help="Replace a model in OUT_DIR.")
def command(model: str, out_dir: str, pretrained_dir: str | None, **options: Any) -> None:
    """Write MODEL, a checkpoint of the published Quamba zoo, to OUT_DIR in our format.

    MODEL is a folder, a name under --pretrained_dir, or a hub id such as ut-enyac/quamba2-2.7b-w4a8. Every
    other command takes such a model as it is, too; a converted one loads faster and is safetensors.
    """
    from pathlib import Path

    from quamba.api import convert
    from quamba.cli.store import check_replaceable, find_model

    check_replaceable(Path(out_dir).expanduser(), options["force"])
    source = find_model(model, pretrained_dir)
    made = convert(
        source,
        Path(out_dir).expanduser(),
        changes={"overflow": options["overflow"]},
        overwrite=options["force"],
    )
    assert made.recipe is not None
    click.echo(f"{source}: {made.recipe.name}, {mib(made.size_bytes):.1f} MiB, converted to '{out_dir}'.")
