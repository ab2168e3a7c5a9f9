"""``quamba chat`` and chat.py: a conversation in the terminal, or with a script on standard input."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from quamba.cli.console import Command, TqdmProgress, mib, say
from quamba.cli.flags import (
    QuantizeFlags,
    device_option,
    graph_choice,
    graph_option,
    quantize_flags,
    seed_option,
)
from quamba.errors import QuambaError, nearest

if TYPE_CHECKING:
    from quamba.runtime.conversation import Conversation

DEFAULT_MODEL = "havenhq/mamba-chat"
TESTING_PROMPTS = (
    "Explain in two sentences why the sea is salty.",
    "Say that again, but for a child of six.",
    "Which three facts of your answer could I check at home, and how?",
    "What did I ask you first?",
)


@click.command(cls=Command)
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--system", metavar="TEXT", default="", help="Instructions before the first turn.")
@click.option(
    "--template",
    metavar="zephyr|FILE|none",
    help="How turns are written: a built-in chat template, a file with a Jinja template, or none for plain"
    " text (User: ..., Assistant: ...). Default: the model's own.",
)
@click.option(
    "--genlen",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of an answer at most; an end-of-text token ends it earlier.",
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option("--topk", type=int, default=1, show_default=True, help="1 is greedy, 0 is off.")
@click.option("--topp", type=float, default=1.0, show_default=True, help="1 is off.")
@click.option("--minp", type=float, default=0.0, show_default=True, help="0 is off.")
@click.option(
    "--repetition_penalty",
    type=float,
    default=1.2,
    show_default=True,
    help="Of all tokens of the conversation; 1 is off.",
)
@click.option("--use_testing_prompts", is_flag=True, help="Ask four fixed questions and leave.")
@graph_option()
@quantize_flags
@device_option()
@seed_option()
@click.option("--verbose", is_flag=True, help="Progress bars, even if stderr is no terminal.")
def command(model: str, **options: Any) -> None:
    """Talk with MODEL: a folder, a hub id, or a model stored under --pretrained_dir.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. Standard input may be a pipe with one
    message or command a line; then only answers are printed, and the first error ends it.

    Answers are greedy unless --topk says otherwise. A float MODEL is quantized first with --quantize, and
    stored and used again as main.py does.
    """
    flags = QuantizeFlags.take(options)
    conversation = _begin(model, flags, options)
    if options["use_testing_prompts"]:
        for prompt in TESTING_PROMPTS:
            click.echo(f"> {prompt}")
            _answer(conversation, prompt)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        _talk(conversation, _typed_lines(), interactive=True)
    else:
        _talk(conversation, _piped_lines(), interactive=False)


def _begin(argument: str, flags: QuantizeFlags, options: dict[str, Any]) -> Conversation:
    from quamba.cli.obtain import obtain
    from quamba.runtime.conversation import PLAIN, Conversation, find_template
    from quamba.runtime.sampling import SamplingParams

    sampling = SamplingParams(
        temperature=options["temperature"],
        top_k=options["topk"],
        top_p=options["topp"],
        min_p=options["minp"],
        repetition_penalty=options["repetition_penalty"],
    )
    template = options["template"]
    if template not in (None, PLAIN):
        find_template(template)  # refused now rather than after a quantization
    with TqdmProgress(options["verbose"]) as progress:
        model = obtain(
            argument,
            flags,
            device=options["device"],
            backend=options["backend"],
            seed=options["seed"],
            progress=progress,
        ).model
    tokenizer = model.require_tokenizer()
    if template is None and tokenizer.chat_template is None:
        raise QuambaError(
            f"'{model.source}' has no chat template, expected --template zephyr for that of mamba-chat, "
            "--template none for plain text or --template FILE for one of your own."
        )
    return Conversation(
        model.network,
        tokenizer,
        template,
        system=options["system"],
        sampling=sampling,
        max_new_tokens=options["genlen"],
        seed=options["seed"],
        cuda_graph=graph_choice(options["cache_graph"], model.device),
    )


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401 -- input() then edits lines and keeps a history
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            say("Ctrl-D or /exit leaves.")
            continue
        yield line


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise QuambaError(f"Standard input is no UTF-8 text ({error}).") from None


def _talk(conversation: Conversation, lines: Iterable[str], *, interactive: bool) -> None:
    """Answer and obey until the lines end or one says so. In a terminal errors are told and nothing ends."""
    for line in lines:
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return
            elif line.strip():
                _answer(conversation, line.strip(), interactive)
        except QuambaError as error:
            if not interactive:
                raise
            say(f"Error: {error}")
        except KeyboardInterrupt:  # a second one, before the token that the first one waited for
            if not interactive:
                raise
            click.echo()


def _answer(conversation: Conversation, text: str, interactive: bool = False) -> None:
    """Print the answer as it comes, on lines of its own."""
    turns, shown = conversation.stats.turns, ""
    with _interrupting(conversation), closing(conversation.say(_clean(text))) as pieces:
        for piece in pieces:
            piece = piece if shown else piece.lstrip()
            click.echo(piece, nl=False)
            shown = piece or shown
    if not shown.endswith("\n"):
        click.echo()
    stats = conversation.stats
    if stats.turns == turns or stats.last is None:
        say("Stopped before the answer began; the message is taken back.")
        return
    if stats.last.reread:
        say(f"The conversation was read again ({stats.last.read_tokens} tokens).")
    if interactive and stats.last.finished == "length":
        say(f"Cut off after {stats.last.answer_tokens} tokens; --genlen sets this.")


@contextmanager
def _interrupting(conversation: Conversation) -> Iterator[None]:
    """Ctrl-C ends the answer after the current token; a second one does not wait for that."""

    def stop(number: int, frame: FrameType | None) -> None:
        conversation.interrupt()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _clean(text: str) -> str:
    """Bytes of the terminal that are no characters, as tokenizers take them."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _obey(conversation: Conversation, line: str) -> bool:
    """Run one /command; False if it ends the conversation."""
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name not in _COMMANDS:
        listed = ", ".join(f"/{known}" for known in _COMMANDS)
        raise QuambaError(f"There is no '/{name}', expected one of {listed}.{nearest(name, _COMMANDS)}")
    chosen = _COMMANDS[name]
    if chosen.argument == "FILE" and not rest:
        raise QuambaError(f"/{name} lacks a file name, expected /{name} FILE.")
    if not chosen.argument and rest:
        raise QuambaError(f"/{name} takes nothing after it, but there is {rest!r}.")
    if chosen.run is None:
        return False
    chosen.run(conversation, rest)
    return True


def _reset(conversation: Conversation, rest: str) -> None:
    conversation.reset()
    say("All turns are forgotten" + ("; the system text stays." if conversation.system else "."))


def _system(conversation: Conversation, rest: str) -> None:
    conversation.system = _clean(rest)
    say("The system text is set." if rest else "There is no system text now.")


def _save(conversation: Conversation, rest: str) -> None:
    conversation.save(rest)
    say(f"Saved to '{rest}'.")


def _load(conversation: Conversation, rest: str) -> None:
    conversation.load(rest)
    stats = conversation.stats
    say(f"Loaded {_count(stats.turns, 'turn')} ({_count(stats.tokens, 'token')}) from '{rest}'.")


def _undo(conversation: Conversation, rest: str) -> None:
    say(f"Taken back: {conversation.undo()}")


def _stats(conversation: Conversation, rest: str) -> None:
    stats = conversation.stats
    click.echo(
        f"{_count(stats.turns, 'turn')}, {_count(stats.tokens, 'token')}, "
        f"state {mib(stats.state_bytes):.2f} MiB, {stats.seconds:.2f} s."
    )
    if stats.last is not None:
        last = stats.last
        click.echo(
            f"Last answer: {last.read_tokens} tokens read in {last.prefill_seconds:.2f} s, "
            f"{last.answer_tokens} written in {last.decode_seconds:.2f} s "
            f"({last.tokens_per_second:.1f} tokens/s)."
        )


def _help(conversation: Conversation, rest: str) -> None:
    for name, chosen in _COMMANDS.items():
        click.echo(f"{f'/{name} {chosen.argument}':<14} {chosen.help}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class _Chosen:
    """argument: what follows the name, for the help; ``run`` is None for the command that leaves."""

    argument: str
    help: str
    run: Callable[[Conversation, str], None] | None


_COMMANDS = {
    "reset": _Chosen("", "Forget all turns.", _reset),
    "system": _Chosen("TEXT", "Change the instructions before the first turn; without TEXT, none.", _system),
    "save": _Chosen("FILE", "Write the conversation and the model's state.", _save),
    "load": _Chosen("FILE", "Go on with a saved conversation.", _load),
    "undo": _Chosen("", "Take the last turn back.", _undo),
    "stats": _Chosen("", "Show tokens, memory and speed.", _stats),
    "help": _Chosen("", "Show this list. A line that begins with a space is no command.", _help),
    "exit": _Chosen("", "Leave, as Ctrl-D does.", None),
}
