"""Text that appears token by token: no piece ends inside a character, none is part of a stop string."""

from __future__ import annotations

from collections.abc import Callable


class TextStream:
    """`push` takes ids and returns the text that has become certain; `text` is all of it so far.

    `stopped`: whether a stop string ended it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop_strings: list[str] | None = None):
        self.decode, self.stop_strings = decode, stop_strings or []
        self.text, self.stopped = "", False
        self._pending: list[int] = []  # ids since the last whole character
        self._decoded = 0  # characters of them that `_tail` has got
        self._tail = ""  # what was decoded and may be the beginning of a stop string

    def push(self, token: int) -> str:
        """One more id; the text that has become certain."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self.decode(self._pending)
        cut = text.endswith("\ufffd")  # the last character may lack bytes that are still to come
        self._tail += text[self._decoded : len(text) - cut]
        self._decoded = len(text) - cut
        if not cut:
            self._keep_last()
        return self._release(last=False)

    def _keep_last(self) -> None:
        """Keep the last id, without whose text a tokenizer of word pieces does not say whether a space follows it."""
        text = self.decode(self._pending[-1:])
        self._pending, self._decoded = ([], 0) if "\ufffd" in text else (self._pending[-1:], len(text))

    def finish(self) -> str:
        """The rest of the text, where no more ids come."""
        if self.stopped:
            return ""
        self._tail += self.decode(self._pending)[self._decoded :]
        self._pending = []
        return self._release(last=True)

    def _release(self, last: bool) -> str:
        found = [at for stop in self.stop_strings if (at := self._tail.find(stop)) >= 0]
        if found:
            self.stopped, piece, self._tail = True, self._tail[: min(found)], ""
        else:
            held = 0 if last else max((_overlap(self._tail, stop) for stop in self.stop_strings), default=0)
            piece, self._tail = self._tail[: len(self._tail) - held], self._tail[len(self._tail) - held :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
