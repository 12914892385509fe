"""Answers that follow a JSON schema, a regular expression or a choice, by llguidance.

A grammar says which tokens may come next; the sampler leaves the others out. Compiled grammars are
kept, so many and no more; each answer has a copy of its own state. No torch.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer

from cluster.errors import EngineError, RequestError
from serving.engine.request import ResponseFormat

# Compiled ones are a few kB to a few MB.
_MAX_KEPT = 128
# llguidance's own limits bound the work for one grammar and for one token (fractions of a second
# and a few ms); errors must not tell one request's text to another's log.
_LIMITS = LLParserLimits(verbose_errors=False)


class Grammar:
    """The state of one answer: what it has said, and so what may follow."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> np.ndarray:
        """A bit for each token that may come next: int32 [M], the lowest bit first."""
        return np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)

    def accept(self, tokens: Iterable[int]) -> bool:
        """Go on behind `tokens`; False if they do not follow the grammar."""
        return self._matcher.consume_tokens(list(tokens))

    def check(self) -> None:
        """Raise EngineError if the grammar became too complex on the way."""
        if self._matcher.is_error():
            reason = self._matcher.get_error().splitlines()[0]
            raise EngineError(f"response_format cannot be followed any further: {reason:.200}")


class Grammars:
    """Compiled grammars for one tokenizer; `end_tokens` may follow a whole answer. Safe to use from
    several threads; llguidance compiles without the interpreter's lock."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: Collection[int]) -> None:
        self._tokenizer = None
        if tokenizer is not None and tokenizer.is_fast and end_tokens:
            size = max(vocabulary, len(tokenizer))
            self._tokenizer = from_tokenizer(tokenizer, size, eos_token=sorted(end_tokens))
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()  # least recent first

    def open(self, wanted: ResponseFormat) -> Grammar:
        """The beginning of an answer that follows `wanted`, which is checked already.

        Raises:
            RequestError: it is no grammar, too complex, or nothing can follow it.
        """
        return Grammar(self.compiled(wanted).deep_copy())

    def compiled(self, wanted: ResponseFormat) -> LLMatcher:
        """`wanted` compiled, once for all who ask at the same time, and kept; as `open`."""
        key = json.dumps([wanted.kind, wanted.rule])  # properties are in order
        with self._lock:
            found = self._kept.pop(key, None)
            future = self._kept[key] = found or Future()
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        if found is None:
            try:
                future.set_result(self._compile(wanted))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(key, None)
                future.set_exception(error)
        return future.result()

    def _compile(self, wanted: ResponseFormat) -> LLMatcher:
        if self._tokenizer is None:
            raise _refusal("needs a fast tokenizer with an end token, and the base has none")
        matcher = LLMatcher(self._tokenizer, _source(wanted), log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            matcher.compute_bitmask()
        _refuse_failed(wanted, matcher)
        if matcher.is_stopped() and not matcher.is_accepting():
            raise _refusal(f"({wanted.kind}) is followed by no text at all")
        _try_token(wanted, matcher.deep_copy())
        return matcher


def _try_token(wanted: ResponseFormat, trial: LLMatcher) -> None:
    """Raise RequestError for what shows at an answer's first token alone."""
    trial.consume_tokens([])
    if trial.is_stopped():
        raise _refusal(f"({wanted.kind}) allows no text but an empty one; leave it out")
    mask = np.frombuffer(trial.compute_bitmask(), dtype=np.uint8)
    trial.consume_tokens([int(np.unpackbits(mask, bitorder="little").argmax())])
    _refuse_failed(wanted, trial)


def _refuse_failed(wanted: ResponseFormat, matcher: LLMatcher) -> None:
    if matcher.is_error():
        reason = " ".join(matcher.get_error().split())
        if "NoExtensionBias" in reason:  # llguidance's word for it
            reason = "nothing can follow it, as where a $ref leads to itself and nothing else"
        raise _refusal(f"({wanted.kind}) cannot be compiled: {reason:.300}; make it simpler")


def _source(wanted: ResponseFormat) -> str:
    rule: Any = wanted.rule
    if wanted.kind == "regex":
        return LLMatcher.grammar_from_regex(rule)
    if wanted.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in rule))
    schema: Mapping[str, Any] | bool = {"type": "object"} if wanted.kind == "json_object" else rule
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


def _refusal(reason: str) -> RequestError:
    return RequestError(f"response_format {reason}", param="response_format")
