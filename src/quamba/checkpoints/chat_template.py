"""Chat templates: where a checkpoint keeps its own, the built-in one, and messages as one text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quamba.checkpoints.source import read_json
from quamba.errors import QuambaError, one_of

if TYPE_CHECKING:
    import jinja2

    from quamba.checkpoints.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

_TEXT_FILE = "chat_template.jinja"
_JSON_FILES = ("chat_template.json", "tokenizer_config.json")
_BUILT_IN = Path(__file__).parent / "chat_templates"


def template_names() -> list[str]:
    """The templates that ``named_template`` knows."""
    return sorted(folder.name for folder in _BUILT_IN.iterdir() if folder.is_dir())


def named_template_file(name: str) -> Path:
    """The file of a built-in template, which has the name that it must have in a checkpoint."""
    if name not in template_names():
        raise one_of("The chat template", name, template_names())
    return _BUILT_IN / name / _TEXT_FILE


def named_template(name: str) -> str:
    """The Jinja text of a built-in template.

    ``zephyr`` is ``<|role|>``, a newline, the content and the end-of-text token for each message, on lines of
    their own; the format of zephyr-7b-beta and mamba-chat.
    """
    return named_template_file(name).read_text(encoding="utf-8")


def read_chat_template(folder: str | Path) -> str | None:
    """The Jinja text in chat_template.jinja, else chat_template.json, else tokenizer_config.json, else None.

    Of several templates in a JSON file it is the one named ``default``. Raises QuambaError for a file that
    cannot be read or that has something else under ``chat_template``.
    """
    folder = Path(folder)
    file = folder / _TEXT_FILE
    if file.is_file():
        return _read_text(file) or None
    for path in (folder / name for name in _JSON_FILES):
        if path.is_file() and (text := _from_json(read_json(path).get("chat_template"), path)):
            return text
    return None


def require_chat_template(tokenizer: Tokenizer, source: str = "") -> str:
    """The tokenizer's chat template, or the error that says that there is none.

    source  what the user asked for, for the message
    """
    if tokenizer.chat_template is None:
        whose = f"'{source}'" if source else "The tokenizer"
        raise QuambaError(
            f"{whose} has no chat template, expected {_TEXT_FILE} or 'chat_template' in "
            f"tokenizer_config.json in its folder; built in and to be chosen by name: "
            f"{', '.join(repr(name) for name in template_names())}."
        )
    return tokenizer.chat_template


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> str:
    """A conversation as the one text that the model was trained on, as transformers renders it.

    messages               each with a ``role`` of ``ROLES`` and a ``content``
    add_generation_prompt  end with what begins an answer of the assistant
    template               Jinja text, run in a sandbox; None: that of the tokenizer

    The text has its own special tokens: encode it with ``add_special_tokens=False``. Raises QuambaError for
    messages of another shape and when the template refuses them or fails.
    """
    text = require_chat_template(tokenizer) if template is None else template
    tokens = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
    }
    variables: dict[str, Any] = {
        "messages": _checked_messages(messages),
        "add_generation_prompt": add_generation_prompt,
        "tools": None,  # templates test these with "is not none", which an undefined variable would pass
        "documents": None,
        **{name: token for name, token in tokens.items() if token is not None},
    }
    try:
        return _compiled(text).render(variables)
    except Exception as error:  # a template is a program, and may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QuambaError(f"The chat template cannot render the messages ({reason}).") from error


def _checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not messages or isinstance(messages, str | Mapping):
        raise QuambaError("There is no message to render, expected a list of at least one.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise QuambaError(
                f"Message {number} is {message!r}, expected a 'role' and a 'content', both text."
            )
        if message["role"] not in ROLES:
            raise one_of(f"The role of message {number}", message["role"], ROLES)
    return [dict(message) for message in messages]


@lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    return _environment().from_string(text)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """The settings, filters and functions that transformers gives to chat templates."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlocks(Extension):
        """``{% generation %}`` marks what a trainer learns from; the text is the same without the marks."""

        tags = {"generation"}  # noqa: RUF012 -- as the base class declares it

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would write ``<`` as ``\\u003c``."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise QuambaError(f"'{file}' cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise QuambaError(f"'{file}' is not UTF-8 text ({error}).") from None


def _from_json(value: Any, path: Path) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        found = [entry.get("template") for entry in value if entry.get("name") == "default"]
        if not found:
            return None
        if isinstance(found[0], str):
            return found[0]
    raise QuambaError(
        f"'chat_template' in '{path}' is no text and no list of templates with 'name' and 'template'."
    )
