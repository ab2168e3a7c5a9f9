"""What every command shares: errors as one sentence, progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import Any

import click

from quamba.errors import QuambaError, nearest

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Sentences(click.Command):
    """A command whose bad input is one sentence on stderr and status 2, and whose Ctrl-C is status 130.

    Any other exception passes: a traceback means a defect of ours.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            status = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.Abort:
            click.echo("Interrupted.", err=True)
            sys.exit(EXIT_INTERRUPTED)
        except click.ClickException as error:
            _fail(error.format_message(), getattr(error, "ctx", None))
        except QuambaError as error:
            _fail(str(error))
        except OSError as error:  # a full disk, a folder that may not be written
            if error.filename is None:
                raise
            _fail(f"'{error.filename}': {error.strerror}.")
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            _fail(
                "There is not enough memory for this run, expected fewer sequences at once or shorter "
                "prompts (--batch_size, --promptlen, --prompt_len, --seqlen)."
            )
        sys.exit(status if isinstance(status, int) else 0)


class Command(_Sentences):
    """One command."""


class LazyGroup(_Sentences, click.Group):
    """Commands that are imported when they are run.

    commands_by_name  name -> (module of ``quamba.cli`` that holds ``command``, its line in the help)
    """

    def __init__(self, *args: Any, commands_by_name: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = commands_by_name

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        command: click.Command = import_module(f"quamba.cli.{self._lazy[cmd_name][0]}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self._lazy:
            listed = ", ".join(self._lazy)
            raise click.UsageError(
                f"There is no command '{args[0]}', expected one of {listed}.{nearest(args[0], self._lazy)}",
                ctx,
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list from the table, so that help imports no command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._lazy.items()])


class NearestChoice(click.Choice):
    """A choice whose error names the nearest one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            listed = ", ".join(repr(choice) for choice in self.choices)
            self.fail(f"{value!r} is not one of {listed}.{nearest(str(value), self.choices)}", param, ctx)


class TqdmProgress:
    """``pipeline.Progress`` as bars on stderr, if that is a terminal or ``verbose`` is set; else nothing.

    enabled  whether there are bars
    """

    def __init__(self, verbose: bool = False) -> None:
        self.enabled = verbose or sys.stderr.isatty()
        self._bar: Any = None

    def stage(self, name: str, total: int) -> None:
        self.close()
        if self.enabled:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=name, file=sys.stderr, dynamic_ncols=True)

    def step(self, count: int = 1) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> TqdmProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def say(message: str) -> None:
    """One line about what is being done, on stderr."""
    click.echo(message, err=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text; those whose cells are all numbers (or "-") stand to the right."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        parts = [
            value.rjust(width) if to_right else value.ljust(width)
            for value, width, to_right in zip(values, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(header)), line(["-" * width for width in widths]), *map(line, cells)])


def mib(size_bytes: float) -> float:
    return size_bytes / 2**20


def _is_number(cell: str) -> bool:
    if cell == "-":
        return True
    try:
        float(cell.replace(",", ""))
    except ValueError:
        return False
    return True


def out_of_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or of the CPU, for which torch has no class of its own."""
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "DefaultCPUAllocator" in str(error)


def _fail(message: str, ctx: click.Context | None = None) -> None:
    click.echo(f"Error: {message}", err=True)
    if ctx is not None:
        click.echo(f"Try '{ctx.command_path} --help'.", err=True)
    sys.exit(EXIT_BAD_INPUT)
