"""Log probabilities of tokens in the two forms that OpenAI has for them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from serving.engine.request import TokenLogprobs
from serving.protocol import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """The text and bytes of single tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def bytes(self, token_id: int) -> bytes:
        """Its part of the text; a token may be a part of a character."""
        text = self._tokenizer.decode([token_id])
        if "\ufffd" not in text:
            return text.encode()
        token = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if found := _BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        values = [_byte_alphabet().get(character) for character in token]
        return bytes(v for v in values if v is not None) if None not in values else text.encode()

    def of(self, token_ids: Sequence[int]) -> str:
        """The text of many, special tokens included."""
        return self._tokenizer.decode(list(token_ids))

    def text(self, token_id: int) -> str:
        """As a text; part of a character as OpenAI writes it, bytes:\\xe2."""
        found = self.bytes(token_id)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class CompletionEntries:
    """Of one answer to /v1/completions, piece by piece; offsets count characters of its text."""

    def __init__(self, texts: TokenText) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def first(self, token_id: int) -> CompletionLogprobs:
        """The entry of a prompt's first token, which nothing predicts."""
        return CompletionLogprobs(
            tokens=[self._texts.text(token_id)],
            token_logprobs=[None],
            top_logprobs=[None],
            text_offset=[self._place(token_id)],
        )

    def add(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """The entries of further tokens."""
        text = self._texts.text
        return CompletionLogprobs(
            tokens=[text(entry.token_id) for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[{text(t): logprob for t, logprob in entry.top} for entry in entries],
            text_offset=[self._place(entry.token_id) for entry in entries],
        )

    def _place(self, token_id: int) -> int:
        place = self._offset
        self._offset += len(self._decoder.decode(self._texts.bytes(token_id)))
        return place


def joined(parts: Iterable[CompletionLogprobs]) -> CompletionLogprobs:
    """The parts of one answer as one."""
    whole = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for part in parts:
        whole.tokens += part.tokens
        whole.token_logprobs += part.token_logprobs
        whole.top_logprobs += part.top_logprobs
        whole.text_offset += part.text_offset
    return whole


def chat_entries(texts: TokenText, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """In the form of /v1/chat/completions."""

    def top(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=texts.text(token_id), logprob=logprob, bytes=list(texts.bytes(token_id))
        )

    return ChatLogprobs(
        content=[
            ChatLogprob(
                **top(entry.token_id, entry.logprob).model_dump(),
                top_logprobs=[top(t, logprob) for t, logprob in entry.top],
            )
            for entry in entries
        ]
    )


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes, as byte-level tokenizers write them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
