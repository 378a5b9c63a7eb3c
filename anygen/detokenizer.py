"""Tokens of text -> characters, as they come."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Ids, one by one -> text, whole characters only.

    A token may hold a part of a character, and some tokenizers write a token differently at the start of a text.
    So each new piece is decoded behind the piece before it, and what ends in a broken character waits.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = self.end = 0  # ids[start:end] is the piece given out last

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is complete with it, or nothing."""
        self.ids.append(token)
        text = self._new()
        return "" if text.endswith("\ufffd") else self._give(text)

    def flush(self) -> str:
        """Returns what still waits, without a broken character at its end."""
        return self._give(self._new()).rstrip("\ufffd")

    def _new(self) -> str:
        before = self._decode(self.ids[self.start : self.end])
        return self._decode(self.ids[self.start :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self.start, self.end = self.end, len(self.ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
