from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_graphs import emulate_graphs
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from variants import calibration_set, shipped, with_state

from quamba.checkpoints.tokenizer import Tokenizer, load_tokenizer
from quamba.errors import QuambaError
from quamba.kernels.registry import REFERENCE
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.quantization.pipeline import quantize_model
from quamba.runtime.conversation import Conversation, Message, Template, choose_template
from quamba.runtime.decode import decode_step
from quamba.runtime.generate import generate
from quamba.runtime.prefill import prefill
from quamba.runtime.sampling import SamplingParams

QUESTIONS = ("Where is the ship?", "And the captain", "Why?")
PENALISED = SamplingParams(repetition_penalty=1.3)
MORE = 77
FREE = SamplingParams(top_k=0, temperature=2.0, repetition_penalty=1.1)


@pytest.fixture
def tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    """``<|endoftext|>`` = 0, then one id a byte: a text has one tokenization, wherever it is cut."""
    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(params=["mamba", "mamba2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def float_model(family: str, dtype: torch.dtype = torch.float64, **changes: object) -> MambaLM:
    return tiny_model(tiny_config(family, vocab_size=257, tie_embeddings=False, **changes), dtype=dtype)


def held(conversation: Conversation, questions: Sequence[str] = QUESTIONS) -> list[str]:
    return ["".join(conversation.say(question)) for question in questions]


def next_logits(conversation: Conversation) -> Tensor:
    """After all that was said and one more id, read into a clone."""
    memory = conversation._now.memory
    assert memory.cache is not None
    cache = memory.cache.clone()
    for token in (*memory.ids[memory.read :], MORE):
        logits = decode_step(conversation.network, torch.tensor([token]), cache)
    return logits


def tensors(cache: MambaCache | None) -> list[Tensor]:
    assert cache is not None
    return [t for layer in cache.layers for t in (layer.conv_state, layer.ssm_state)]


@dataclass
class Log:
    """A cache that holds what was read."""

    pieces: list[list[int]] = field(default_factory=list)

    nbytes = 100

    def clone(self) -> Log:
        return Log([list(piece) for piece in self.pieces])

    @property
    def ids(self) -> list[int]:
        return [i for piece in self.pieces for i in piece]


class Script:
    """A network that says the given answers in turn, each followed by ``<|endoftext|>``."""

    def __init__(self, tokenizer: Tokenizer, *answers: str) -> None:
        self.config = SimpleNamespace(vocab_size=257)
        self.device = torch.device("cpu")
        self.kernels = REFERENCE
        self.to_say: Iterator[int] = iter([i for a in answers for i in [*tokenizer.encode(a), 0]])
        self.passes = 0
        self.raises: dict[int, BaseException] = {}

    def new_cache(self, batch: int, *, working: bool = False) -> Log:
        return Log()

    def stored_cache(self, cache: Log) -> Log:
        return cache

    def __call__(self, ids: Tensor, cache: Log, mask: None = None, *, last_only: bool) -> Tensor:
        cache.pieces.append(ids[0].tolist())
        self.passes += 1
        if self.passes in self.raises:
            raise self.raises[self.passes]
        logits = torch.zeros(1, 1, 264)
        logits[0, 0, next(self.to_say)] = 1.0
        return logits


def scripted(
    tokenizer: Tokenizer, template: Template | str, *answers: str, **options: Any
) -> tuple[Conversation, Any]:
    script: Any = Script(tokenizer, *answers)
    return Conversation(script, tokenizer, template, **options), script


def rendering(conversation: Conversation, question: str) -> str:
    return conversation.template.render([*conversation.messages, Message("user", question)])


# The state is the whole conversation


@pytest.mark.parametrize("template", ["zephyr", "none"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=["float64", "float32"]
)
def test_the_state_is_that_of_one_pass(
    tokenizer: Tokenizer, family: str, template: str, dtype: torch.dtype, tolerance: float
) -> None:
    network = float_model(family, dtype)
    conversation = Conversation(
        network, tokenizer, template, system="Be kind.", max_new_tokens=12, sampling=PENALISED
    )
    for question in QUESTIONS:
        list(conversation.say(question))
        logits, _ = prefill(network, torch.tensor([[*conversation.ids, MORE]]))
        torch.testing.assert_close(next_logits(conversation), logits, rtol=tolerance, atol=tolerance)
    text = tokenizer.decode(conversation.ids, skip_special_tokens=False)
    assert all(question in text for question in QUESTIONS)
    assert rendering(conversation, "x").encode().startswith(text.encode())


@pytest.mark.parametrize("sampling", [SamplingParams(), PENALISED], ids=["greedy", "penalised"])
def test_answers_are_those_of_reading_everything_anew(
    tokenizer: Tokenizer, family: str, sampling: SamplingParams
) -> None:
    network = float_model(family)
    conversation = Conversation(network, tokenizer, "zephyr", max_new_tokens=12, sampling=sampling)
    for question in QUESTIONS:
        answer = "".join(conversation.say(question))
        last = conversation.stats.last
        assert last is not None and last.answer_tokens == 12
        asked = list(conversation.ids[: -last.answer_tokens])
        (anew,) = generate(network, tokenizer, [asked], max_new_tokens=12, sampling=sampling).collect()
        assert list(conversation.ids) == asked + anew.ids
        assert answer == anew.text == conversation.messages[-1].content


@pytest.mark.parametrize("state", ["int8", "fp16"])
def test_quantized_states_are_those_of_the_same_pieces(tokenizer: Tokenizer, family: str, state: str) -> None:
    model = float_model(family, torch.float32)
    recipe = with_state(shipped("w8a8", model.config), state)
    network = quantize_model(model, recipe, calibration_set(model.config))[0]
    conversation = Conversation(network, tokenizer, "zephyr", max_new_tokens=5)
    cache, known = network.new_cache(1), 0
    for question in QUESTIONS:
        list(conversation.say(question))
        memory = conversation._now.memory
        begin = len(memory.ids) - 5
        for piece in [memory.ids[known:begin], *([i] for i in memory.ids[begin : memory.read])]:
            network(torch.tensor([list(piece)]), cache)
        known = memory.read
        for found, expected in zip(tensors(memory.cache), tensors(cache), strict=True):
            assert torch.equal(found, expected)
    assert {t.dtype for t in tensors(cache)} & {torch.int8, torch.float16}


def test_a_turn_reads_its_own_tokens_only(tokenizer: Tokenizer) -> None:
    conversation, script = scripted(tokenizer, "zephyr", "At sea.", "", "Drowned. So", system="Be brief.")
    assert held(conversation) == ["At sea.", "", "Drowned. So"]
    log = conversation._now.memory.cache
    whole = rendering(conversation, "Why not?")
    assert log.ids == list(conversation.ids) == tokenizer.encode(whole)[: len(log.ids)]
    assert whole[whole.index("Drowned. So") :].startswith("Drowned. So<|endoftext|>")
    opening = ["<|system|>\nBe brief.<|endoftext|>\n<|user|>\nWhere is", "<|endoftext|>\n<|user|>\nAnd the"]
    prompts = [tokenizer.decode(p, skip_special_tokens=False) for p in log.pieces if len(p) > 1]
    assert [p[: len(o)] for p, o in zip(prompts, opening, strict=False)] == opening
    assert len(prompts) == 3
    assert script.passes == 3 + 7 + 0 + 11
    last = conversation.stats.last
    assert last is not None and (last.read_tokens, last.reread) == (len(log.pieces[-12]), False)


def test_an_answer_without_its_last_tokens_read_goes_on(tokenizer: Tokenizer) -> None:
    """At max_new_tokens the last id was chosen and not read; the template then ends the turn."""
    conversation, _ = scripted(tokenizer, "zephyr", "abcdef", "", max_new_tokens=3)
    conversation.network.to_say = iter([*tokenizer.encode("abcx"), 0])
    assert held(conversation, ["one", "two"]) == ["abc", "x"]
    assert conversation.stats.last.finished == "eos"
    log = conversation._now.memory.cache
    assert log.ids == tokenizer.encode(rendering(conversation, "!"))[: len(log.ids)]


# Templates


def test_plain_text_ends_where_the_user_would_speak(tokenizer: Tokenizer) -> None:
    conversation, script = scripted(tokenizer, "none", " Hello.\nUser: no", " Yes\nUs", system="Talk.")
    assert held(conversation, ["Hi"]) == [" Hello."]
    assert conversation.stats.last.finished == "stop"
    script.to_say = iter([*tokenizer.encode(" Yes\nUs"), 0])
    assert held(conversation, ["Well?"]) == [" Yes\nUs"]
    text = "Talk.\n\nUser: Hi\nAssistant: Hello.\nUser: Well?\nAssistant: Yes\nUs"
    assert conversation._now.memory.cache.ids == tokenizer.encode(text) == list(conversation.ids)
    assert not conversation.stats.last.reread


def test_a_template_that_rewrites_answers_is_followed(tokenizer: Tokenizer) -> None:
    def trimmed(messages: Sequence[Message]) -> str:
        return "".join(f"[{m.content.strip()}]" for m in messages) + "["

    conversation, _ = scripted(tokenizer, Template("trimming", trimmed), " one", "two ", "three")
    assert held(conversation) == [" one", "two ", "three"]
    questions = "[Where is the ship?][one][And the captain][two][Why?]["
    assert conversation._now.memory.cache.ids == tokenizer.encode(questions + "three")
    last = conversation.stats.last
    assert (last.reread, last.read_tokens) == (False, len("two][Why?[") + 1), "from before the answer on"


def test_another_system_text_is_read(tokenizer: Tokenizer) -> None:
    conversation, _ = scripted(tokenizer, "zephyr", "one", "two", "three", system="A")
    held(conversation, ["x"])
    conversation.system = "B"
    held(conversation, ["y"])
    assert conversation.stats.last.reread
    ids = tokenizer.encode(rendering(conversation, "z"))
    assert conversation._now.memory.cache.ids == ids[: len(conversation.ids)]
    held(conversation, ["z"])
    assert not conversation.stats.last.reread
    assert [m.content for m in conversation.messages] == ["B", "x", "one", "y", "two", "z", "three"]


def test_a_tokenizer_that_puts_a_space_before_a_text(tokenizer: Tokenizer) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    letters = ["<unk>", "</s>", "▁", *map(chr, range(33, 127)), "\n"]
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space, drop = decoders.Replace("▁", " "), decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([space, decoders.Fuse(), drop])
    spaced = Tokenizer(backend, [])
    conversation, script = scripted(tokenizer, "none")
    conversation.tokenizer = spaced
    for question, answer in (("Hi", " one\nUser:"), ("So", "two\nUser:"), (" x", " three\nUser:")):
        script.to_say = iter(spaced.encode(answer)[1:])
        assert held(conversation, [question]) == [answer.removesuffix("\nUser:")]
        assert conversation.messages[-1].content == answer.removesuffix("\nUser:")
    text = "User: Hi\nAssistant: one\nUser: So\nAssistant:two\nUser:  x\nAssistant: three\nUser:"
    assert list(conversation.ids) == spaced.encode(text)


def test_templates_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [Message("user", "Hi")]
    assert (
        choose_template(tokenizer, "zephyr").render(messages) == "<|user|>\nHi<|endoftext|>\n<|assistant|>\n"
    )
    assert choose_template(tokenizer, "none").render(messages) == "User: Hi\nAssistant:"
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}:")
    assert choose_template(tokenizer, tmp_path / "mine.jinja").render(messages) == "Hi:"
    with pytest.raises(QuambaError, match="has no chat template"):
        choose_template(tokenizer)
    with pytest.raises(QuambaError, match="Did you mean 'zephyr'"):
        choose_template(tokenizer, "zephir")
    (tmp_path / "broken").write_bytes(b"\xff")
    with pytest.raises(QuambaError, match="cannot be read"):
        choose_template(tokenizer, tmp_path / "broken")
    tokenizer.chat_template = "<{{ messages[0].content }}>"
    assert choose_template(tokenizer).render(messages) == "<Hi>"


def test_a_template_that_leaves_the_message_out(tokenizer: Tokenizer) -> None:
    conversation, _ = scripted(tokenizer, Template("mute", lambda messages: ""), "a")
    with pytest.raises(QuambaError, match="'mute' leaves the message out"):
        conversation.say("x")


# Taking back


def test_undo_restores_the_state(tokenizer: Tokenizer, family: str) -> None:
    network = float_model(family)
    conversation = Conversation(network, tokenizer, "zephyr", max_new_tokens=8)
    first = held(conversation, QUESTIONS[:1])
    before = conversation.ids, conversation.messages, next_logits(conversation)
    other = held(conversation, ["something else entirely", "more"])
    assert [conversation.undo(), conversation.undo()] == ["more", "something else entirely"]
    assert (conversation.ids, conversation.messages) == before[:2]
    assert torch.equal(next_logits(conversation), before[2])
    assert held(conversation, ["something else entirely"]) == other[:1]
    conversation.undo()
    conversation.undo()
    assert (conversation.messages, conversation.ids) == ((), ())
    assert held(conversation, QUESTIONS[:1]) == first
    conversation.undo()
    with pytest.raises(QuambaError, match="no turn to take back"):
        conversation.undo()


def test_undo_beyond_the_kept_states_reads_again(tokenizer: Tokenizer) -> None:
    conversation, _ = scripted(tokenizer, "zephyr", "a", "b", "c", "d", kept_turns=1)
    held(conversation)
    assert len(conversation._past) == 1
    conversation.undo()
    assert conversation.ids
    conversation.undo()
    assert (conversation.ids, len(conversation.messages)) == ((), 2)
    assert held(conversation, ["again"]) == ["d"]
    assert conversation.stats.last.reread
    ids = tokenizer.encode(rendering(conversation, "x"))
    assert conversation._now.memory.cache.ids == ids[: len(conversation.ids)]
    assert [m.content for m in conversation.messages] == [QUESTIONS[0], "a", "again", "d"]


def test_reset_forgets_all_but_the_system_text(tokenizer: Tokenizer) -> None:
    conversation, _ = scripted(tokenizer, "zephyr", "a", "b", system="S")
    held(conversation, ["x"])
    conversation.reset()
    assert (conversation.messages, conversation.ids) == ((Message("system", "S"),), ())
    with pytest.raises(QuambaError, match="no turn"):
        conversation.undo()
    assert held(conversation, ["y"]) == ["b"]
    assert not conversation.stats.last.reread


# Interrupts


def consistent(conversation: Conversation, tokenizer: Tokenizer) -> bool:
    """The cache has read the first ids, and the ids are those of the messages."""
    memory: Any = conversation._now.memory
    known = [] if memory.cache is None else memory.cache.ids
    whole = tokenizer.encode(rendering(conversation, "x"))
    return known == list(memory.ids[: memory.read]) and list(memory.ids) == whole[: len(memory.ids)]


@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_an_interrupted_answer_is_kept_as_far_as_printed(tokenizer: Tokenizer, how: str) -> None:
    conversation, script = scripted(tokenizer, "zephyr", "abcdef")
    pieces = conversation.say("x")
    printed = next(pieces) + next(pieces)
    passes = script.passes
    if how == "interrupt":
        conversation.interrupt()
        assert list(pieces) == []
    else:
        pieces.close()
    assert script.passes == passes
    assert printed == conversation.messages[-1].content == "ab"
    assert conversation.stats.last.finished == "interrupted"
    assert consistent(conversation, tokenizer)
    script.to_say = iter([*tokenizer.encode("gh"), 0])
    assert held(conversation, ["y"]) == ["gh"]
    assert consistent(conversation, tokenizer)
    assert not conversation.stats.last.reread


def test_control_c_within_a_step(tokenizer: Tokenizer) -> None:
    """Some layers have read the token and some have not: the turn is read again, from the state before it."""
    conversation, script = scripted(tokenizer, "zephyr", "ab", "cdef", "gh")
    held(conversation, ["x"])
    script.raises[script.passes + 3] = KeyboardInterrupt()
    pieces = conversation.say("y")
    assert next(pieces) + next(pieces) == "cd"
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert conversation.messages[-1].content == "cd"
    assert consistent(conversation, tokenizer)
    script.to_say = iter([*tokenizer.encode("gh"), 0])
    assert held(conversation, ["z"]) == ["gh"]
    assert consistent(conversation, tokenizer)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_answer_that_has_not_begun_leaves_no_trace(
    tokenizer: Tokenizer, error: type[BaseException]
) -> None:
    conversation, script = scripted(tokenizer, "zephyr", "ab", "cd")
    held(conversation, ["x"])
    before = conversation._now
    script.raises[script.passes + 1] = error()
    with pytest.raises(error):
        list(conversation.say("y"))
    assert conversation._now is before
    script.raises[script.passes + 2] = RuntimeError()
    with pytest.raises(RuntimeError):
        list(conversation.say("y"))
    assert conversation._now is before, "another error in the middle of an answer"
    assert consistent(conversation, tokenizer)


@pytest.mark.parametrize("during", [2, 4], ids=["a-piece", "the-last-piece"])
def test_an_interrupt_while_reading(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, during: int
) -> None:
    monkeypatch.setattr("quamba.runtime.prefill.PREFILL_PIECE", 10)
    conversation, script = scripted(tokenizer, "zephyr", "ab")
    passes = script.__class__.__call__

    def interrupted(self: Script, *args: Any, last_only: bool) -> Tensor:
        if self.passes == during - 1:
            conversation.interrupt()
        self.to_say = iter(tokenizer.encode("abcd"))
        return passes(self, *args, last_only=last_only)

    monkeypatch.setattr(Script, "__call__", interrupted)
    assert held(conversation, ["a long question"]) == [""]
    assert script.passes == during
    assert conversation.stats.last is None
    assert (conversation.messages, conversation.ids) == ((), ())


def test_a_conversation_that_moved_on_stays(tokenizer: Tokenizer) -> None:
    conversation, _ = scripted(tokenizer, "zephyr", "ab", "cd")
    held(conversation, ["x"])
    pieces = conversation.say("y")
    next(pieces)
    conversation.reset()
    pieces.close()
    assert conversation.messages == ()


# Sampling


def test_answers_are_drawn_by_the_seed(tokenizer: Tokenizer, family: str) -> None:
    network = float_model(family)

    def draw(seed: int | None) -> list[str]:
        conversation = Conversation(network, tokenizer, "zephyr", sampling=FREE, seed=seed, max_new_tokens=10)
        answers = held(conversation, ["same", "same"])
        conversation.undo()
        return [*answers, *held(conversation, ["same"])]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    first = draw(1)
    assert first[1] != first[2], "after undo another answer"
    asked = choose_template(tokenizer, "zephyr").render([Message("user", "same")])
    run = generate(network, tokenizer, [tokenizer.encode(asked)], sampling=FREE, seed=1, max_new_tokens=10)
    assert first[0] == run.collect()[0].text


@pytest.mark.parametrize("sampling", [SamplingParams(), PENALISED, FREE], ids=["greedy", "penalised", "free"])
def test_answers_as_graphs_are_those_of_steps(
    tokenizer: Tokenizer, family: str, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = emulate_graphs(monkeypatch)
    network = float_model(family)
    ways = [
        Conversation(
            network, tokenizer, "zephyr", sampling=sampling, seed=1, max_new_tokens=10, cuda_graph=graph
        )
        for graph in (False, None)
    ]
    for question in QUESTIONS:
        expected, found = (held(conversation, [question]) for conversation in ways)
        assert found == expected
        one, other = (conversation._now.memory for conversation in ways)
        assert (one.ids, one.read) == (other.ids, other.read)
        for a, b in zip(tensors(one.cache), tensors(other.cache), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert len(graphs.captured) == 1
    assert len(graphs.replayed) == 3 * 9, "no step whose id was not asked for: the state is that of the text"
    assert [turn.undo() for turn in ways] == ["Why?"] * 2
    assert held(ways[0], ["x"]) == held(ways[1], ["x"])


def test_the_states_of_an_answer_are_its_own(
    tokenizer: Tokenizer, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted or not, and whatever the graphs are used for afterwards, or meanwhile."""
    emulate_graphs(monkeypatch)
    network = float_model(family)
    conversation, other, plain = (
        Conversation(network, tokenizer, "zephyr", max_new_tokens=12, cuda_graph=graph)
        for graph in (None, None, False)
    )
    for talk in (conversation, plain):
        pieces = talk.say("Where is the ship?")
        next(pieces)
        next(pieces)
        if talk is conversation:
            assert held(other, ["Why?"]) == held(plain_copy(plain), ["Why?"])
        pieces.close()
    held(other, ["And the captain?"])
    one, two = (talk._now.memory for talk in (conversation, plain))
    assert (one.ids, one.read, one.text) == (two.ids, two.read, two.text)
    for a, b in zip(tensors(one.cache), tensors(two.cache), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert held(conversation, ["And?"]) == held(plain, ["And?"])


def plain_copy(conversation: Conversation) -> Conversation:
    """Another one of the same model and settings in which nothing was said."""
    return Conversation(
        conversation.network, conversation.tokenizer, "zephyr", max_new_tokens=12, cuda_graph=False
    )


def test_a_long_question_is_read_in_pieces_and_rounded_once(
    tokenizer: Tokenizer, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = float_model(family, torch.float32)
    recipe = with_state(shipped("w8a8", model.config), "int8")
    network = quantize_model(model, recipe, calibration_set(model.config))[0].set_compute_dtype(torch.float64)

    def asked() -> list[Tensor]:
        conversation = Conversation(network, tokenizer, "zephyr", max_new_tokens=2)
        held(conversation, ["x", "a longer question than the first"])
        return tensors(conversation._now.asked.cache)

    whole = asked()
    monkeypatch.setattr("quamba.runtime.prefill.PREFILL_PIECE", 10)
    for a, b in zip(asked(), whole, strict=True):
        assert a.dtype in (torch.int8, torch.float64)
        torch.testing.assert_close(a, b, rtol=0, atol=0 if a.dtype == torch.int8 else 1e-9)


def test_only_ids_of_the_tokenizer_are_chosen(tokenizer: Tokenizer) -> None:
    network = float_model("mamba2", pad_vocab_size_multiple=512)
    network.lm_head.weight.data[257:] *= 100.0
    conversation = Conversation(network, tokenizer, "zephyr", max_new_tokens=10)
    held(conversation, ["x"])
    assert max(conversation.ids) < 257


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected an integer of at least 1"),
        ({"kept_turns": 0}, "kept_turns is 0"),
        ({"seed": -1}, "seed is -1, expected an integer of at least 0"),
        ({"seed": True}, "seed is True"),
    ],
    ids=["max_new_tokens", "kept_turns", "seed", "seed-bool"],
)
def test_bad_options(tokenizer: Tokenizer, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(QuambaError, match=sentence):
        scripted(tokenizer, "zephyr", **options)


def test_bad_messages(tokenizer: Tokenizer) -> None:
    conversation, script = scripted(tokenizer, "zephyr", "a")
    with pytest.raises(QuambaError, match="The message is empty"):
        conversation.say(" \n")
    script.config.vocab_size = 100
    with pytest.raises(
        QuambaError, match=r"has the id 1\d\d, expected ids of the model's vocabulary, 0 to 99"
    ):
        conversation.say("x")


# Files


@pytest.fixture
def saved(tokenizer: Tokenizer, family: str, tmp_path: Path) -> tuple[Conversation, Path]:
    conversation = Conversation(
        float_model(family, torch.float32),
        tokenizer,
        "zephyr",
        system="S",
        sampling=FREE,
        seed=3,
        max_new_tokens=8,
    )
    held(conversation, QUESTIONS[:2])
    conversation.save(tmp_path / "talk")
    return conversation, tmp_path / "talk"


def same_model(conversation: Conversation, family: str) -> Conversation:
    network = float_model(family, torch.float32)
    return Conversation(network, conversation.tokenizer, "zephyr", sampling=FREE, seed=3, max_new_tokens=8)


def test_a_saved_conversation_goes_on(saved: tuple[Conversation, Path], family: str) -> None:
    conversation, path = saved
    assert [p.name for p in path.parent.iterdir()] == ["talk"]
    again = same_model(conversation, family)
    held(again, ["to be forgotten"])
    again.load(path)
    assert (again.messages, again.ids) == (conversation.messages, conversation.ids)
    for found, expected in zip(
        tensors(again._now.memory.cache), tensors(conversation._now.memory.cache), strict=True
    ):
        assert torch.equal(found, expected)
    again.network.passes = []
    again.network.lm_head.register_forward_hook(lambda *_: again.network.passes.append(1))
    assert held(again, QUESTIONS[2:]) == held(conversation, QUESTIONS[2:])
    assert again.stats.last.read_tokens < len("<|endoftext|>\n<|user|>\n\n<|assistant|>\n") + 5
    assert len(again.network.passes) == 8, "one for the question and one for each further token"
    assert again.stats.state_bytes == conversation.stats.state_bytes > 0
    again.undo()
    again.undo()
    assert (len(again.messages), again.ids) == (3, ()), "of a loaded conversation only the end has a state"
    assert path.stat().st_size < again.stats.tokens * 8 + 60_000


def test_saving_again_replaces_a_conversation_only(
    saved: tuple[Conversation, Path], tmp_path: Path, family: str
) -> None:
    conversation, path = saved
    conversation.undo()
    conversation.save(str(path))
    again = same_model(conversation, family)
    again.load(path)
    assert again.messages == conversation.messages
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "text").write_text("mine")
    for name in ("weights", "text", "."):
        before = (tmp_path / "text").read_bytes(), (tmp_path / "weights").read_bytes()
        with pytest.raises(QuambaError, match="is no saved conversation; choose another name"):
            conversation.save(tmp_path / name)
        assert before == ((tmp_path / "text").read_bytes(), (tmp_path / "weights").read_bytes())
    with pytest.raises(QuambaError, match="is in no folder that exists; make"):
        conversation.save(tmp_path / "no" / "such" / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["talk", "text", "weights"]


def test_a_failed_save_leaves_the_file_as_it_was(
    saved: tuple[Conversation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, path = saved
    before = path.read_bytes()
    conversation.undo()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(QuambaError, match=r"'.*talk' cannot be written: No space left on device"):
        conversation.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["talk"]


def test_a_conversation_that_has_not_begun(tokenizer: Tokenizer, tmp_path: Path) -> None:
    network = float_model("mamba2")
    Conversation(network, tokenizer, "zephyr", system="S").save(tmp_path / "new")
    again = Conversation(network, tokenizer, "zephyr", max_new_tokens=4)
    again.load(tmp_path / "new")
    assert (again.system, again.messages) == ("S", (Message("system", "S"),))
    assert len(held(again, ["x"])) == 1


def other_sizes(network: MambaLM) -> MambaLM:
    return float_model("mamba2", torch.float32, n_layer=1)


def other_weights(network: MambaLM) -> MambaLM:
    return tiny_model(network.config, seed=1)


def other_dtype(network: MambaLM) -> MambaLM:
    return tiny_model(network.config).set_compute_dtype(torch.float16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            other_sizes,
            "is with another model, .* with 2 layers and d_model 32, expected this one, mamba2 with 1",
        ),
        (other_weights, "another model of the same sizes"),
        (other_dtype, "states of another format, layers.0.conv_state float32 .*, expected float16"),
    ],
)
def test_a_conversation_with_another_model(
    saved: tuple[Conversation, Path], change: Callable[[MambaLM], MambaLM], sentence: str
) -> None:
    conversation, path = saved
    other = Conversation(change(conversation.network), conversation.tokenizer, "zephyr", max_new_tokens=2)
    held(other, ["x"])
    before = other._now
    with pytest.raises(QuambaError, match=sentence):
        other.load(path)
    assert other._now is before


def test_a_conversation_with_another_tokenizer(
    saved: tuple[Conversation, Path], family: str, tmp_path: Path
) -> None:
    conversation, path = saved
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    other = same_model(conversation, family)
    other.tokenizer = Tokenizer(conversation.tokenizer.backend, [tmp_path / "tokenizer.json"], [0])
    with pytest.raises(QuambaError, match="another tokenizer"):
        other.load(path)


def rewritten(path: Path, **changes: Any) -> None:
    """The same file with other fields; a tensor replaces the tensor of its name."""
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 -- no mapping
        metadata = file.metadata()
    fields = json.loads(metadata["conversation"])
    for name, value in changes.items():
        if isinstance(value, Tensor):
            kept[name] = value
        elif name in metadata:
            metadata[name] = value
        else:
            fields[name] = value
    save_file(kept, path, metadata={**metadata, "conversation": json.dumps(fields)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": "2"}, "format version 2, expected 1"),
        ({"format": "other"}, "is no saved conversation"),
        ({"turns": [{"role": "user", "content": "x"}]}, "damaged"),
        ({"turns": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}, "damaged"),
        ({"turns": 3}, "damaged"),
        ({"system": None}, "damaged"),
        ({"read": 10**6}, "damaged"),
        ({"begun": -1}, "damaged"),
        ({"ids": torch.tensor([257])}, "damaged"),
        ({"layers.1.ssm_state": torch.zeros(1)}, r"damaged \(layers.1.ssm_state: float32 \[1\]\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_damaged_files(saved: tuple[Conversation, Path], changes: dict[str, Any], sentence: str) -> None:
    conversation, path = saved
    rewritten(path, **changes)
    before = conversation._now
    with pytest.raises(QuambaError, match=sentence):
        conversation.load(path)
    assert conversation._now is before


def test_files_that_are_none(saved: tuple[Conversation, Path]) -> None:
    conversation, path = saved
    with pytest.raises(QuambaError, match=r"'.*nowhere' does not exist"):
        conversation.load(path.parent / "nowhere")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(QuambaError, match="is no saved conversation"):
        conversation.load(path)
    with pytest.raises(QuambaError, match="is no saved conversation"):
        conversation.load(path.parent)
