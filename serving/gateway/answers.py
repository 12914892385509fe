"""Pieces of answers to OpenAI's bodies: whole, or chunk by chunk. One class per route."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from serving.engine.request import best_choices
from serving.gateway.jobs import Job
from serving.gateway.logprobs import ChatEntries, CompletionEntries, TokenText, joined
from serving.gateway.service import Piece
from serving.gateway.tools import ToolParser
from serving.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Delta,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    ToolCall,
    ToolCallDelta,
    Usage,
)


class Form(Protocol):
    """How one route writes its answers, whole or as a stream."""

    def whole(self, answers: Sequence[Piece], used: Usage) -> BaseModel:
        """The body; `answers` has the one piece of each answer, in order of index."""
        ...

    def chunks(self, piece: Piece, used: Usage | None) -> list[BaseModel]:
        """The chunks of one piece; `used` goes on each."""
        ...

    def last(self, used: Usage) -> BaseModel:
        """The chunk after all answers, with the usage alone."""
        ...


class CompletionForm:
    """/v1/completions."""

    def __init__(self, job: Job, body: CompletionRequest, texts: TokenText) -> None:
        self._job, self._body, self._texts = job, body, texts
        self._head: dict[str, Any] = {
            "id": job.id,
            "created": int(time.time()),
            "model": job.model,
        }
        self._entries: dict[int, CompletionEntries] = {}

    def chunks(self, piece: Piece, used: Usage | None) -> list[BaseModel]:
        """See Form."""
        choice = self._choice(piece)
        if not (choice.text or choice.finish_reason or choice.logprobs):
            return []
        return [Completion(**self._head, choices=[choice], usage=used)]

    def last(self, used: Usage) -> BaseModel:
        """See Form."""
        return Completion(**self._head, choices=[], usage=used)

    def whole(self, answers: Sequence[Piece], used: Usage) -> BaseModel:
        """See Form. Of best_of answers to a prompt, the n best remain."""
        per_prompt, n = self._job.per_prompt, self._body.n or 1
        kept: list[Piece] = []
        for first in range(0, len(answers), per_prompt):
            group = answers[first : first + per_prompt]
            best = best_choices([p.logprobs for p in group], n) if per_prompt > n else range(n)
            kept += [group[place] for place in best]
        choices = [
            self._choice(piece).model_copy(update={"index": place})
            for place, piece in enumerate(kept)
        ]
        return Completion(**self._head, choices=choices, usage=used)

    def _choice(self, piece: Piece) -> CompletionChoice:
        """With the prompt in front of the answer's first piece, if it is to be echoed."""
        is_first = piece.index not in self._entries
        entries = self._entries.setdefault(piece.index, CompletionEntries(self._texts))
        text, logprobs = piece.text, list[CompletionLogprobs]()
        wants_logprobs = self._body.logprobs is not None
        if is_first and self._body.echo:
            place = piece.index // self._job.per_prompt
            text = self._prompt_text(place) + text
            if wants_logprobs:
                logprobs += [
                    entries.first(self._job.prompts[place][0]),
                    entries.add(piece.prompt_logprobs),
                ]
        if wants_logprobs and piece.logprobs:
            logprobs.append(entries.add(piece.logprobs))
        return CompletionChoice(
            index=piece.index,
            text=text,
            finish_reason=piece.finish_reason,
            logprobs=joined(logprobs) if logprobs else None,
        )

    def _prompt_text(self, place: int) -> str:
        prompt = self._body.prompts[place]
        return prompt if isinstance(prompt, str) else self._texts.of(prompt)


def embedding_body(job: Job, body: EmbeddingRequest, answers: Sequence[Piece]) -> bytes:
    """The body of /v1/embeddings, which never streams: an EmbeddingList in JSON.

    For a thread of its own, as it may have millions of numbers. They are not validated again, and
    each vector is written by a call of its own: during one no other thread runs.
    """
    read = EmbeddingUsage(prompt_tokens=job.prompt_tokens, total_tokens=job.prompt_tokens)
    whole = EmbeddingList(data=[], model=job.model, usage=read).model_dump()
    del whole["data"]
    entry = Embedding(index=0, embedding="").model_dump()
    data: list[str] = []
    for piece in answers:
        assert piece.embedding is not None, "every answer is a vector"
        vector: list[float] | str = (
            base64.b64encode(piece.embedding.astype("<f4").tobytes()).decode()
            if body.encoding_format == "base64"
            else piece.embedding.tolist()
        )
        data.append(json.dumps({**entry, "index": piece.index, "embedding": vector}))
    return f'{json.dumps(whole)[:-1]}, "data": [{", ".join(data)}]}}'.encode()


class ChatForm:
    """/v1/chat/completions."""

    def __init__(self, job: Job, body: ChatRequest, texts: TokenText) -> None:
        self._body, self._texts = body, texts
        self._head: dict[str, Any] = {
            "id": job.id,
            "created": int(time.time()),
            "model": job.model,
        }
        self._parsers: dict[int, ToolParser] = {}

    def chunks(self, piece: Piece, used: Usage | None) -> list[BaseModel]:
        """See Form."""
        found: list[BaseModel] = []
        if piece.index not in self._parsers:
            found.append(self._chunk(piece.index, Delta(role="assistant", content=""), used))
        text, calls, reason = self._parse(piece)
        first = self._parsers[piece.index].calls - len(calls)
        deltas = [
            ToolCallDelta(index=first + place, **call.model_dump())
            for place, call in enumerate(calls)
        ]
        logprobs = self._logprobs(piece)
        if text or deltas or reason or logprobs:
            delta = Delta(content=text or None, tool_calls=deltas or None)
            found.append(self._chunk(piece.index, delta, used, reason, logprobs))
        return found

    def last(self, used: Usage) -> BaseModel:
        """See Form."""
        return ChatChunk(**self._head, choices=[], usage=used)

    def whole(self, answers: Sequence[Piece], used: Usage) -> ChatCompletion:
        """See Form."""
        choices: list[ChatChoice] = []
        for piece in answers:
            text, calls, reason = self._parse(piece)
            message = AnswerMessage(
                content=None if calls and not text else text, tool_calls=calls or None
            )
            choices.append(
                ChatChoice(
                    index=piece.index,
                    message=message,
                    finish_reason=reason,
                    logprobs=self._logprobs(piece),
                )
            )
        return ChatCompletion(**self._head, choices=choices, usage=used)

    def _parse(self, piece: Piece) -> tuple[str, list[ToolCall], str | None]:
        """Text, calls and finish reason of a piece."""
        only_one = self._body.parallel_tool_calls is False
        parser = self._parsers.setdefault(
            piece.index, ToolParser(must_call=self._body.must_call, only_one=only_one)
        )
        if not self._body.tools_in_use:
            return piece.text, [], piece.finish_reason
        text, calls = parser.add(piece.text)
        if piece.finish_reason is None:
            return text, calls, None
        rest, last = parser.finish()
        # Where the one function was given by name, nothing was decided: OpenAI's is `stop` then.
        is_call = parser.calls and piece.finish_reason == "stop" and not self._body.names_a_function
        reason = "tool_calls" if is_call else piece.finish_reason
        return text + rest, calls + last, reason

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not piece.logprobs:
            return None
        # As they are: validated, they would be made.
        return ChatLogprobs.model_construct(content=ChatEntries(self._texts, piece.logprobs))

    def _chunk(
        self,
        index: int,
        delta: Delta,
        used: Usage | None,
        reason: str | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)
        return ChatChunk(**self._head, choices=[choice], usage=used)
