"""Log probabilities of tokens in the two forms that OpenAI has for them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, overload

from serving.engine.request import TokenLogprobs
from serving.protocol import ChatLogprob, CompletionLogprobs

_KEPT = 2**16  # tokens; the largest vocabularies have four times as many
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """The text and bytes of single tokens of one tokenizer. They are kept: a long answer with many
    log probabilities asks for the same ones again and again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kept = lru_cache(_KEPT)(self._read)

    def bytes(self, token_id: int) -> bytes:
        """Its part of the text; a token may be a part of a character."""
        return self._kept(token_id)[0]

    def text(self, token_id: int) -> str:
        """As a text; part of a character as OpenAI writes it, bytes:\\xe2."""
        return self._kept(token_id)[1]

    def of(self, token_ids: Sequence[int]) -> str:
        """The text of many, special tokens included."""
        return self._tokenizer.decode(list(token_ids))

    def _read(self, token_id: int) -> tuple[bytes, str]:
        part = self._bytes(token_id)
        try:
            return part, part.decode()
        except UnicodeDecodeError:
            return part, "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)

    def _bytes(self, token_id: int) -> bytes:
        text = self._tokenizer.decode([token_id])
        if "\ufffd" not in text:
            return text.encode()
        token = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if found := _BYTE.fullmatch(token):
            return bytes([int(found[1], 16)])
        values = [_byte_alphabet().get(character) for character in token]
        return bytes(v for v in values if v is not None) if None not in values else text.encode()


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


class ChatEntries(Sequence[ChatLogprob]):
    """In the form of /v1/chat/completions, each made when it is read: four thousand places with
    twenty tokens each, all at once, keep the garbage collector busy for a second."""

    def __init__(self, texts: TokenText, entries: Sequence[TokenLogprobs]) -> None:
        self._texts, self._entries = texts, entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, place: int) -> ChatLogprob: ...

    @overload
    def __getitem__(self, place: slice) -> ChatEntries: ...

    def __getitem__(self, place: int | slice) -> ChatLogprob | ChatEntries:
        if isinstance(place, slice):
            return ChatEntries(self._texts, self._entries[place])
        entry = self._entries[place]
        return ChatLogprob.model_validate(
            {
                **self._fields(entry.token_id, entry.logprob),
                "top_logprobs": [self._fields(token, logprob) for token, logprob in entry.top],
            }
        )

    def _fields(self, token_id: int, logprob: float) -> dict[str, Any]:
        part = self._texts.bytes(token_id)
        return {"token": self._texts.text(token_id), "logprob": logprob, "bytes": list(part)}


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes, as byte-level tokenizers write them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
