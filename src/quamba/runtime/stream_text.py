"""Token ids as text, piece by piece: no broken characters, nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from quamba.checkpoints.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # what decoders give for bytes that are no whole character


def stream_text(
    steps: Iterable[Tensor],
    tokenizer: Tokenizer,
    stop: Sequence[str] = (),
    *,
    context: Sequence[int] = (),
    row: int = 0,
) -> Iterator[str]:
    """The text of one sequence of a batch, in pieces that can be printed as they come.

    context  the ids of the prompt
    steps    new ids (B,) int64 of each step, as ``Run.stream`` gives them; a negative id ends the text
    yields   non-empty pieces; joined they are ``Generation.text`` of that row
    """
    text = TextStream(tokenizer, stop, context)
    for ids in steps:
        token = int(ids[row])
        if token < 0:
            break
        if piece := text.push(token):
            yield piece
        if text.stopped:
            return
    if piece := text.end():
        yield piece


class TextStream:
    """The new ids of one sequence in, certain text out.

    Held back until it is certain: a character of which not all bytes are there, and an end of the text that
    could be the beginning of a stop text. Joined, the pieces are the decoded ids up to the first stop text.
    (Decoders with byte fallback replace all of a run of bytes if one is broken; pieces that are out stay.)

    context  the ids before the text
    stopped  a stop text has appeared; nothing more comes
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Only the latest ids are decoded again, so that the cost of a token does not grow with the text.
        # The window begins at ids whose text is out already: decoders treat the first token specially. It is
        # more than spaces, because some decoders drop all spaces that a text begins with.
        self._window = tokenizer.context(context)
        self._settled = len(self._window)  # ids of the window whose text is out
        self._given = len(tokenizer.decode(self._window))  # characters of the window's text that are out
        self._held = ""

    def push(self, token: int) -> str:
        """The text that became certain with one more id; may be empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(_BROKEN)
        new = whole[self._given :]
        if new:
            self._given = len(whole)
        if new and len(whole) == len(text):
            self._shorten()
        return self._release(new)

    def end(self) -> str:
        """What was held back, now that no id follows."""
        rest = self._tokenizer.decode(self._window)[self._given :] if self._window else ""
        self._window, self._settled, self._given = [], 0, 0
        out = self._release(rest)
        out, self._held = out + self._held, ""
        return out

    def _shorten(self) -> None:
        """Begin the window at the ids that it got since the last time, all of whose text is out."""
        latest = self._window[self._settled :]
        text = self._tokenizer.decode(latest)
        if text.strip(" "):
            self._window, self._settled, self._given = latest, len(latest), len(text)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        # A stop text cannot begin before the held part, or more would have been held.
        text = self._held + new
        end = stop_index(text, self._stop)
        if end is not None:
            self.stopped, self._held = True, ""
            return text[:end]
        certain = len(text) - _possible_beginning(text, self._stop)
        self._held = text[certain:]
        return text[:certain]


def stop_index(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop text begins, or None."""
    found = [index for index in (text.find(s) for s in stop) if index >= 0]
    return min(found, default=None)


def _possible_beginning(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that some stop text begins with."""
    longest = min(len(text), max((len(s) - 1 for s in stop), default=0))
    for length in range(longest, 0, -1):
        if any(s.startswith(text[-length:]) for s in stop):
            return length
    return 0
