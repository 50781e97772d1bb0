"""Stop strings: a turn of the model ends with the token that completes the first of them.

Text is bytes here, those that the tokens stand for. So a character whose bytes are in several tokens, or whose last bytes never
come, needs no special care: a complete UTF-8 string is found in bytes exactly where it is in the text. Special tokens stand for
nothing. Where a text ends depends neither on how it is cut into tokens nor on interruptions.

The token that completes a stop string is a token like others: it is learned, with the log-probability it was sampled at, also
if it spells more than the string. Only the text that the task sees is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stops:
    """What ends a turn. `spelled[id]` is the bytes of a token; ids beyond it stand for nothing."""

    strings: tuple[bytes, ...]  # none of them empty
    spelled: tuple[bytes, ...]
    included: bool  # whether the task sees the string, too

    def __post_init__(self) -> None:
        assert self.strings and all(self.strings), self.strings

    def tail(self, token_ids: Sequence[int]) -> bytes:
        """The end of a turn without a stop string, as far as one may have begun there."""
        return self._end(self._bytes(token_ids))

    def after(self, tail: bytes, token_id: int) -> tuple[bytes, bool]:
        """(the tail after one more token, whether the token completes a stop string)."""
        text = tail + self._bytes((token_id,))
        return self._end(text), self._first(text) is not None

    def text(self, token_ids: Sequence[int]) -> str:
        """A turn as the task sees it: up to the stop string or with it. Bytes that are not UTF-8 become U+FFFD."""
        text = self._bytes(token_ids)
        found = self._first(text)
        if found is not None:
            text = text[: found[1] if self.included else found[0]]
        return text.decode(errors="replace")

    def _first(self, text: bytes) -> tuple[int, int] | None:
        """(begin, end) of the stop string that is complete first; of several that end there, the longest."""
        begins = ((text.find(string), len(string)) for string in self.strings)
        found = [(begin + length, begin) for begin, length in begins if begin >= 0]
        if not found:
            return None
        end, begin = min(found)
        return begin, end

    def _end(self, text: bytes) -> bytes:
        return text[max(0, len(text) - max(map(len, self.strings)) + 1) :]

    def _bytes(self, token_ids: Sequence[int]) -> bytes:
        return b"".join(self.spelled[token] for token in token_ids if token < len(self.spelled))
