"""A conversation with a model: its recurrent state is the memory, so a turn costs its own tokens only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quamba.checkpoints.chat_template import (
    named_template,
    render_chat,
    require_chat_template,
    template_names,
)
from quamba.checkpoints.tokenizer import Tokenizer
from quamba.errors import QuambaError, one_of
from quamba.models.cache import MambaCache
from quamba.models.lm import MambaLM
from quamba.runtime.choice import Choice
from quamba.runtime.conversation_file import Message, Stored, read_conversation, write_conversation
from quamba.runtime.decode import EagerDecoder, GraphDecoder, new_decoder
from quamba.runtime.graph import graph_wanted, lease
from quamba.runtime.prefill import prefill
from quamba.runtime.sampling import SamplingParams
from quamba.runtime.stream_text import TextStream, stop_index

#: States kept for ``undo``.
KEPT_TURNS = 8
#: The template of models that know none.
PLAIN = "none"

Finished = Literal["eos", "stop", "length", "interrupted"]


@dataclass(frozen=True)
class Template:
    """How a conversation is written as one text for a model to continue.

    render          messages -> the text, up to where the model's answer begins
    stop            texts that end an answer, beside the tokenizer's end-of-text tokens
    special_tokens  whether what the tokenizer puts around a text (such as BOS) goes around the first one; a
                    chat template writes it itself
    """

    name: str
    render: Callable[[Sequence[Message]], str]
    stop: tuple[str, ...] = ()
    special_tokens: bool = False


def choose_template(tokenizer: Tokenizer, name: str | Path | None = None) -> Template:
    """The tokenizer's own chat template for None, a built-in one by name, or a file with Jinja text.

    ``none`` is plain text for models without a chat format: ``User: ...``, then ``Assistant:``.
    """
    if str(name) == PLAIN:
        return Template(PLAIN, _plain_text, stop=("\nUser:",), special_tokens=True)
    text = require_chat_template(tokenizer) if name is None else find_template(name)

    def render(messages: Sequence[Message]) -> str:
        return render_chat(tokenizer, [asdict(message) for message in messages], template=text)

    return Template("of the tokenizer" if name is None else str(name), render)


def find_template(name: str | Path) -> str:
    """The Jinja text of a built-in template or of a file."""
    if str(name) in template_names():
        return named_template(str(name))
    if not Path(name).is_file():
        raise one_of("The chat template", str(name), [*template_names(), PLAIN, "a file"])
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuambaError(f"The chat template '{name}' cannot be read ({error}).") from None


def _plain_text(messages: Sequence[Message]) -> str:
    # Answers as the model gave them, with the space that they mostly begin with.
    forms = {"system": "{}\n", "user": "User: {}", "assistant": "Assistant:{}"}
    return "\n".join([*(forms[m.role].format(m.content) for m in messages), "Assistant:"])


@dataclass(frozen=True)
class TurnStats:
    """What one answer took.

    read_tokens      ids read before the answer began
    reread           whether they are all of the conversation, earlier turns included
    answer_tokens    ids of the answer, without the end-of-text token
    prefill_seconds  from the question to the first id of the answer
    decode_seconds   all further ids; time the caller takes between pieces is not counted
    """

    read_tokens: int
    reread: bool
    answer_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finished: Finished

    @property
    def tokens_per_second(self) -> float:
        """Ids chosen a second once the answer had begun; 0 if nothing came after the first."""
        steps = self.answer_tokens - (self.finished != "eos")
        return steps / self.decode_seconds if steps > 0 else 0.0


@dataclass(frozen=True)
class Stats:
    """The conversation as it is.

    tokens       ids of its text
    state_bytes  of the model's memory of it, the same at any length
    seconds      of all answers that this object gave, taken back ones included
    last         of those the last one; None before the first
    """

    turns: int
    tokens: int
    state_bytes: int
    seconds: float
    last: TurnStats | None


@dataclass(frozen=True)
class _Memory:
    """A text that the model knows: its ids, of which ``cache`` has read the first ``read``.

    Never changed: a turn works on a clone of the cache.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    read: int = 0
    cache: MambaCache | None = None


@dataclass(frozen=True)
class _Point:
    """The conversation between two turns: questions and answers, and what of them the model knows.

    asked  what it knew before the last answer, for templates that write that in another way than it came
    """

    turns: tuple[Message, ...] = ()
    memory: _Memory = field(default_factory=_Memory)
    asked: _Memory = field(default_factory=_Memory)


@dataclass
class _Answer:
    """An answer on its way.

    known  what the model knew of the text that the answer continues
    asked  all of that text, once it is read
    ids    of text and answer; the cache has read the first ``read``
    cache  None while it is being changed
    """

    before: _Point
    turns: tuple[Message, ...]
    known: _Memory
    asked: _Memory
    ids: list[int]
    read: int = 0
    cache: MambaCache | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def new_ids(self) -> list[int]:
        return self.ids[len(self.asked.ids) :]

    def took(self, seconds: float) -> None:
        """The first time is that of reading."""
        if self.prefill_seconds == 0.0:
            self.prefill_seconds = seconds
        else:
            self.decode_seconds += seconds

    def memory(self, text: str) -> _Memory:
        """What the model knows now; ``text`` is that of the answer."""
        read, cache = self.read, self.cache
        if cache is None:  # interrupted half way through the layers: the answer is read with the next turn
            read, cache = self.asked.read, self.asked.cache
        return _Memory(self.asked.text + text, tuple(self.ids), read, cache)


class _InterruptedError(Exception):
    """The reading of a question was interrupted."""


class Conversation:
    """Questions and answers, each read once.

    template        how turns are written; None: the tokenizer's own (``choose_template``)
    system          instructions before the first turn; may be changed at any time
    sampling        None: greedy. The repetition penalty counts every id of the conversation so far.
    max_new_tokens  of an answer
    seed            None: one from torch's global generator. Each answer draws with a generator made from seed
                    and the number of answers before it, so the same calls give the same answers.
    kept_turns      states kept for ``undo``
    cuda_graph      replay steps, and what is read from the beginning, as CUDA graphs; None: on a GPU with
                    kernels of its own

    The model reads the template's text as far as it is new, and its own answers as the ids that it gave. If
    the new text does not continue what it has read (another system text, a template that rewrites answers),
    the latest kept state that it does continue is taken; without any, everything is read again.
    """

    def __init__(
        self,
        network: MambaLM,
        tokenizer: Tokenizer,
        template: Template | str | Path | None = None,
        *,
        system: str = "",
        sampling: SamplingParams | None = None,
        max_new_tokens: int = 512,
        seed: int | None = None,
        kept_turns: int = KEPT_TURNS,
        cuda_graph: bool | None = None,
    ) -> None:
        _check_integer("max_new_tokens", max_new_tokens, 1)
        _check_integer("kept_turns", kept_turns, 1)
        _check_integer("seed", 0 if seed is None else seed, 0)
        self.network = network
        self.cuda_graph = graph_wanted(cuda_graph, network)
        self.tokenizer = tokenizer
        self.template = template if isinstance(template, Template) else choose_template(tokenizer, template)
        self.system = system
        self.sampling = sampling or SamplingParams()
        self.max_new_tokens = max_new_tokens
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._now = _Point()
        self._past: deque[_Point] = deque(maxlen=kept_turns)
        self._begun = 0  # answers, taken back ones included
        self._interrupted = False
        self._seconds = 0.0
        self._last: TurnStats | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The system text, if there is one, and all turns."""
        system = (Message("system", self.system),) if self.system else ()
        return (*system, *self._now.turns)

    @property
    def ids(self) -> tuple[int, ...]:
        """What the model has read, and at the end what it said last and reads with the next turn."""
        return self._now.memory.ids

    @property
    def stats(self) -> Stats:
        cache = self._now.memory.cache
        return Stats(
            turns=sum(message.role == "user" for message in self._now.turns),
            tokens=len(self.ids),
            state_bytes=0 if cache is None else cache.nbytes,
            seconds=self._seconds,
            last=self._last,
        )

    def say(self, text: str) -> Generator[str, None, None]:
        """Ask; the answer comes in non-empty pieces, and joined they are the message that is kept.

        The turn counts once the answer is over: at an end-of-text token, a stop text, after max_new_tokens,
        or by ``interrupt``, by closing the iterator or by Ctrl-C, where it is kept as far as it came. An
        answer that had not begun then, or that another exception ended, leaves no trace.
        """
        if not text.strip():
            raise QuambaError("The message is empty, expected some text.")
        before, question = self._now, Message("user", text)
        rendered = self.template.render([*self.messages, question])
        return self._turn(self._asked(before, question, rendered))

    def interrupt(self) -> None:
        """End the answer that is being given after the current token; signal handlers may call this."""
        self._interrupted = True

    def undo(self) -> str:
        """Take the last turn back, its question is returned: the state is again that before it.

        Where that is no longer kept, and after ``load``, the earlier turns are read again with the next.
        """
        turns = self._now.turns
        if not turns:
            raise QuambaError("There is no turn to take back.")
        self._now = self._past.pop() if self._past else _Point(turns[:-2])  # a question and its answer
        return turns[-2].content

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self._now = _Point()
        self._past.clear()

    def save(self, path: str | Path) -> None:
        """Write the conversation and the model's state: beside ``path`` first, then renamed.

        A file that is there is replaced only if it holds a conversation.
        """
        memory = self._now.memory
        stored = Stored(
            self.system, self._now.turns, self._begun, memory.text, memory.ids, memory.read, memory.cache
        )
        write_conversation(path, stored, self.network, self.tokenizer)

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation. A file of another model is an error and changes nothing."""
        stored = read_conversation(path, self.network, self.tokenizer)
        self.reset()
        self.system, self._begun = stored.system, stored.begun
        self._now = _Point(stored.turns, _Memory(stored.text, stored.ids, stored.read, stored.cache))

    def _asked(self, before: _Point, question: Message, rendered: str) -> _Answer:
        """The ids to read for the new text, and the latest state that they continue."""
        memories = [memory for p in (before, *reversed(self._past)) for memory in (p.memory, p.asked)]
        known = next((m for m in memories if m.text and rendered.startswith(m.text)), _Memory())
        new = self._encode(rendered[len(known.text) :], known)
        ids = [*known.ids, *new]
        if known.read == len(ids):
            raise QuambaError(f"The chat template '{self.template.name}' leaves the message out.")
        vocab = self.network.config.vocab_size
        outside = next((i for i in new if not 0 <= i < vocab), None)
        if outside is not None:
            raise QuambaError(
                f"The message has the id {outside}, expected ids of the model's vocabulary, 0 to {vocab - 1}."
            )
        return _Answer(before, (*before.turns, question), known, _Memory(rendered, tuple(ids)), ids)

    def _encode(self, text: str, known: _Memory) -> list[int]:
        """The ids of a text that continues what is known."""
        if not known.ids:
            return self.tokenizer.encode(text, add_special_tokens=self.template.special_tokens)
        # SentencePiece models put a space before a text: so let it begin one character earlier.
        last = known.text[-1:]
        before, ids = self.tokenizer.encode_batch([last, last + text], add_special_tokens=False)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _turn(self, answer: _Answer) -> Generator[str, None, None]:
        self._interrupted = False
        start = time.perf_counter()
        logits = self._read(answer)
        if logits is None:
            return
        try:
            finished = yield from self._write(answer, logits, start)
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(answer, "interrupted")
            raise
        self._keep(answer, finished)

    def _read(self, answer: _Answer) -> Tensor | None:
        """Logits (1, padded_vocab) after the new text; None if interrupted before its end."""
        known = answer.known
        ids = torch.tensor([answer.ids[known.read :]], device=self.network.device)
        try:
            logits, cache = prefill(
                self.network,
                ids,
                cache=known.cache,
                graph=None if self.cuda_graph else False,
                before_piece=self._check_interrupted,
            )
        except _InterruptedError:
            return None
        answer.asked = replace(answer.asked, read=len(answer.ids), cache=cache.clone())
        answer.read, answer.cache = len(answer.ids), cache
        return logits

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise _InterruptedError

    def _write(self, answer: _Answer, logits: Tensor, start: float) -> Generator[str, None, Finished]:
        """The answer in pieces. No step is taken before it is wanted: the state is that of the text."""
        assert answer.cache is not None
        with lease(self.network, 1) if self.cuda_graph else nullcontext() as graphs:
            decoder = new_decoder(
                self.network,
                logits,
                answer.cache,
                self._next_choice(answer.ids),
                steps=self.max_new_tokens - 1,
                graphs=graphs,
            )
            try:
                return (yield from self._pieces(answer, decoder, start))
            finally:
                if decoder.shares_cache:
                    shared, answer.cache = answer.cache, None
                    answer.cache = None if shared is None else shared.clone()

    def _pieces(
        self, answer: _Answer, decoder: EagerDecoder | GraphDecoder, start: float
    ) -> Generator[str, None, Finished]:
        text = TextStream(self.tokenizer, self.template.stop, answer.asked.ids)
        finished: Finished | None = None
        while not self._interrupted:
            (token,) = decoder.tokens()
            piece = ""
            if token in self.tokenizer.eos_token_ids:
                finished = "eos"
            else:
                answer.ids.append(token)
                piece = text.push(token)
                if text.stopped:
                    finished = "stop"
                elif len(answer.new_ids) == self.max_new_tokens:
                    finished = "length"
            answer.took(time.perf_counter() - start)
            if piece:
                yield piece
            if finished is not None or self._interrupted:
                break
            start = time.perf_counter()
            answer.cache = None  # a Ctrl-C in between finds no cache rather than a wrong one
            decoder.go_on()
            answer.read, answer.cache = len(answer.ids), decoder.cache
        if piece := text.end():
            yield piece
        return finished or "interrupted"

    def _next_choice(self, ids: Sequence[int]) -> Choice:
        """Of one answer, with a generator of its own."""
        vocab = min(self.network.config.vocab_size, self.tokenizer.vocab_size)
        self._begun += 1
        return Choice.seeded(vocab, self.sampling, [list(ids)], self.seed, first=self._begun - 1)

    def _keep(self, answer: _Answer, finished: Finished) -> None:
        """The turn becomes part of the conversation, unless that has gone another way meanwhile."""
        new = answer.new_ids
        if self._now is not answer.before or (finished == "interrupted" and not new):
            return
        text = self.tokenizer.decode_after(answer.asked.ids, new)
        reply = Message("assistant", text[: stop_index(text, self.template.stop)])
        self._past.append(answer.before)
        self._now = _Point((*answer.turns, reply), answer.memory(text), answer.asked)
        self._seconds += answer.prefill_seconds + answer.decode_seconds
        self._last = TurnStats(
            read_tokens=answer.asked.read - answer.known.read,
            reread=bool(answer.before.turns) and answer.known.read == 0,
            answer_tokens=len(new),
            prefill_seconds=answer.prefill_seconds,
            decode_seconds=answer.decode_seconds,
            finished=finished,
        )


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise QuambaError(f"{name} is {value!r}, expected an integer of at least {least}.")
