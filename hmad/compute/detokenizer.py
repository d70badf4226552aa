"""Token ids to text as they come: every delta is final, whole characters, and free of what may become a stop string."""

import codecs
from collections.abc import Sequence

from hmad.compute.tokenizer import Tokenizer


class StopString:
    """Looks for one string in text that comes character by character (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # the longest beginning of ``text`` that the characters so far end with
        self._fallback = fallbacks(text)

    def advance(self, char: str) -> bool:
        """Take one character; whether the string is complete with it. Not to be called again after that."""
        while self.num_matched and self.text[self.num_matched] != char:
            self.num_matched = self._fallback[self.num_matched - 1]
        self.num_matched += self.text[self.num_matched] == char
        return self.num_matched == len(self.text)


def fallbacks(text: str) -> list[int]:
    """Of each beginning of a text: the length of its longest proper beginning that is also its end."""
    lengths = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = lengths[length - 1]
        length += text[i] == text[length]
        lengths[i] = length
    return lengths


class IncrementalDetokenizer:
    """The text of one choice: all deltas of ``feed`` and ``flush`` are its decoded tokens, cut at a stop string.

    Of several stop strings it is the one that is complete first, the longest if two are at once. The work per byte
    does not grow with the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self.stopped: str | None = None  # the stop string that ended the text
        self._tokenizer = tokenizer
        self._stops = [StopString(text) for text in stop if text]
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # text that may be the beginning of a stop string

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character or a stop string may be under way."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """The rest, when no token follows: an unfinished character becomes U+FFFD."""
        delta = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return delta

    def _release(self, text: str) -> str:
        """Take newly decoded text; what of it and of the held text is certain."""
        if self.stopped is not None:
            return ""
        for i, char in enumerate(text if self._stops else ""):
            complete = [stop.text for stop in self._stops if stop.advance(char)]
            if complete:
                return self._stop(max(complete, key=len), self._held + text[: i + 1])
        pending = self._held + text
        certain = len(pending) - max((stop.num_matched for stop in self._stops), default=0)
        self._held = pending[certain:]
        return pending[:certain]

    def _stop(self, stop: str, pending: str) -> str:
        """The last delta: ``pending`` ends with the stop string."""
        self.stopped, self._held = stop, ""
        return pending if self._include_stop else pending.removesuffix(stop)
