"""Chat templates: where they are read from, what they render (as transformers does), and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from quamba.checkpoints.chat_template import (
    named_template,
    named_template_file,
    read_chat_template,
    render_chat,
    require_chat_template,
    template_names,
)
from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.errors import QuambaError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ASK = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Größe < 3 & 世界?\n\nYes"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "{{ 1 + 1 }} </s> {% raw %}"},
]
CHATML = """{{ bos_token }}{% set ns = namespace(first=true) %}
{% for message in messages %}
    {% if message.role == 'tool' %}
        {% continue %}
    {% endif %}
    {%- if loop.first and message['role'] != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
    {% generation %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
    {% endgeneration %}
    {% set ns.first = false %}
{% endfor %}
{% if tools is not none %}{{ raise_exception('no tools') }}{% endif %}
{{ messages | map(attribute='role') | list | tojson }} {{ {'a': '<é>'} | tojson(indent=2) }}
{{ ns.first }} {{ pad_token }} {{ unk_token }} {{ messages[0].nothing }} {{ strftime_now('%%') }}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


def put(folder: Path, **side: object) -> Path:
    """One token a byte, BOS added by the file, and JSON side files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (BOS, EOS, PAD)])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    backend.save(str(folder / "tokenizer.json"))
    for name, content in side.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": {"content": PAD}}
    return load_tokenizer(put(tmp_path, tokenizer_config=named))


def transformers_renders(
    folder: Path, template: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> str:
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    theirs.chat_template = template
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
    assert load_tokenizer(folder).encode(text, add_special_tokens=False) == ids
    return str(text)


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no-prompt"])
@pytest.mark.parametrize("messages", [ASK, TALK, TALK[:3]], ids=["ask", "talk", "answered"])
@pytest.mark.parametrize("template", [named_template("zephyr"), CHATML], ids=["zephyr", "chatml"])
def test_text_and_ids_are_those_of_transformers(
    tokenizer: Tokenizer, tmp_path: Path, template: str, messages: list[dict[str, str]], prompt: bool
) -> None:
    ours = render_chat(tokenizer, messages, add_generation_prompt=prompt, template=template)
    assert ours == transformers_renders(tmp_path, template, messages, prompt)


def test_chatml_in_full(tokenizer: Tokenizer) -> None:
    """What the comparison above goes through, so that it is not two empty texts."""
    messages = [*ASK, {"role": "tool", "content": "gone"}]
    assert render_chat(tokenizer, messages, template=CHATML) == (
        "<s><|im_start|>system\nYou help.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        '["user", "tool"] {\n  "a": "<é>"\n}\n'
        "False <pad>   %\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("messages", "prompt", "text"),
    [
        (ASK, True, "<|user|>\nHi</s>\n<|assistant|>\n"),
        (ASK, False, "<|user|>\nHi</s>\n"),
        (
            TALK[:3],
            True,
            "<|system|>\nBe brief.\n</s>\n<|user|>\n  Größe < 3 & 世界?\n\nYes</s>\n"
            "<|assistant|>\n</s>\n<|assistant|>\n",
        ),
    ],
    ids=["ask", "no-prompt", "talk"],
)
def test_zephyr(tokenizer: Tokenizer, messages: list[dict[str, str]], prompt: bool, text: str) -> None:
    template = named_template("zephyr")
    assert render_chat(tokenizer, messages, add_generation_prompt=prompt, template=template) == text


def test_the_tokenizer_s_own_template_is_the_default(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}{{ bos_token is defined }}{{ eos_token }}"
    tokenizer = load_tokenizer(put(tmp_path, tokenizer_config={"chat_template": template, "eos_token": EOS}))
    assert tokenizer.chat_template == require_chat_template(tokenizer) == template
    assert render_chat(tokenizer, ASK) == f"HiFalse{EOS}"


PLACES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"tokenizer_config": {"chat_template": "config"}}, "config"),
    ({"tokenizer_config": {"chat_template": None}}, None),
    ({"tokenizer_config": {"chat_template": ""}}, None),
    ({"tokenizer_config": {"chat_template": "config"}, "chat_template": {"chat_template": "json"}}, "json"),
    ({"tokenizer_config": {"chat_template": "config"}, "chat_template": {}}, "config"),
    (
        {
            "tokenizer_config": {
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "plain"},
                ]
            }
        },
        "plain",
    ),
    ({"tokenizer_config": {"chat_template": [{"name": "tool_use", "template": "tools"}]}}, None),
]


@pytest.mark.parametrize(("side", "expected"), PLACES, ids=range(len(PLACES)))
def test_where_a_template_is_read_from(tmp_path: Path, side: dict[str, Any], expected: str | None) -> None:
    put(tmp_path, **side)
    assert read_chat_template(tmp_path) == load_tokenizer(tmp_path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("é file\n", encoding="utf-8")
    assert read_chat_template(tmp_path) == load_tokenizer(tmp_path).chat_template == "é file\n"


@pytest.mark.parametrize(
    "value",
    [3, {"default": "x"}, ["x"], [{"name": "default", "template": 3}]],
    ids=["number", "object", "texts", "default-is-a-number"],
)
def test_a_template_that_is_none(tmp_path: Path, value: object) -> None:
    put(tmp_path, tokenizer_config={"chat_template": value})
    with pytest.raises(QuambaError, match=r"'chat_template' in '.*tokenizer_config.json' is no text"):
        load_tokenizer(tmp_path)


def test_a_template_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(QuambaError, match=r"chat_template.jinja' is not UTF-8"):
        read_chat_template(tmp_path)


def test_no_template_says_what_is_missing_and_what_there_is(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        QuambaError, match=r"^'owner/base' has no chat template, expected chat_template.jinja .*'zephyr'"
    ):
        require_chat_template(tokenizer, "owner/base")
    with pytest.raises(QuambaError, match=r"^The tokenizer has no chat template"):
        render_chat(tokenizer, ASK)


def test_named_templates() -> None:
    assert template_names() == ["zephyr"]
    file = named_template_file("zephyr")
    assert (file.name, file.read_text(encoding="utf-8")) == ("chat_template.jinja", named_template("zephyr"))
    for name in ("zephir", "", "..", "zephyr/"):
        with pytest.raises(QuambaError, match=r"The chat template is '.*', expected one of 'zephyr'"):
            named_template(name)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], r"There is no message to render"),
        (ASK[0], r"There is no message to render, expected a list"),
        ("Hi", r"There is no message to render, expected a list"),
        (["Hi"], r"Message 1 is 'Hi', expected a 'role' and a 'content'"),
        ([*ASK, {"role": "user"}], r"Message 2 is \{'role': 'user'\}"),
        ([{"role": "user", "content": None}], r"Message 1 is .*both text"),
        ([{"role": "usr", "content": "Hi"}], r"The role of message 1 is 'usr'.*Did you mean 'user'\?"),
        ([{"role": "tool", "content": "3"}], r"the roles are system, user and assistant, not tool"),
    ],
    ids=["none", "one", "text", "texts", "no-content", "null-content", "misspelt", "not-of-zephyr"],
)
def test_messages_that_are_wrong(
    tokenizer: Tokenizer, messages: list[Mapping[str, str]], sentence: str
) -> None:
    with pytest.raises(QuambaError, match=sentence):
        render_chat(tokenizer, messages, template=named_template("zephyr"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('roles\n must  alternate') }}", "roles must alternate"),
        ("{{ 'a' + cls_token }}", "'cls_token' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content.format_map }}{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{% include 'x' %}", "loader"),
    ],
    ids=["syntax", "refuses", "undefined", "fails", "changes", "escapes", "escapes-by-globals", "includes"],
)
def test_a_template_that_fails(tokenizer: Tokenizer, template: str, reason: str) -> None:
    with pytest.raises(
        QuambaError, match=rf"^The chat template cannot render the messages \(.*{reason}.*\)\.$"
    ) as caught:
        render_chat(tokenizer, ASK, template=template)
    assert "\n" not in str(caught.value)


def test_a_template_does_not_change_the_messages(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    render_chat(tokenizer, messages, template="{% set m = messages[0] %}{{ m.content }}")
    assert messages == ASK
