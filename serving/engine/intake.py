"""From a request to an answer in progress, or to a refusal that names the field.

What any engine would refuse is `GenerationRequest.check`; here is what this base cannot do.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

from cluster.base_model import encode_prompt, encode_text, load_tokenizer
from cluster.errors import RequestError
from serving.adapters import EmbeddingPrefix, LoweredAdapter
from serving.engine.answer import Answer
from serving.engine.batch import LoadedAdapter
from serving.engine.detokenizer import Detokenizer
from serving.engine.grammar import Grammar, Grammars
from serving.engine.pages import next_key, root_key
from serving.engine.pooling import Pooled
from serving.engine.ranges import check_token_ids, room
from serving.engine.request import GenerationRequest, ResponseFormat
from serving.engine.runner import Runner
from serving.engine.sequence import Sequence
from serving.spec import EngineSpec


class Intake:
    """Knows the base's tokenizer and limits; keeps nothing of a request."""

    def __init__(self, spec: EngineSpec, runner: Runner) -> None:
        # Without tokenizer files it takes token ids alone.
        has_tokenizer = any(Path(spec.base_model).glob("tokenizer*"))
        self.tokenizer: Any = load_tokenizer(spec.base_model) if has_tokenizer else None
        self._is_caching = spec.prefix_cache
        self._vocabulary = runner.vocabulary
        self._context, self._hidden = runner.max_context_tokens, runner.hidden_size
        self._end_tokens = _end_tokens(runner.model, self.tokenizer)
        self._is_seq2seq, self._start_ids = runner.target.is_seq2seq, runner.start_ids
        self._grammars = Grammars(self.tokenizer, self._vocabulary, self._end_tokens)

    def open(
        self,
        request: GenerationRequest,
        request_id: str,
        adapter: LoadedAdapter | None,
        scored: Many[int] | None = None,
    ) -> Answer:
        """The answer to `request`, which is checked already, with nothing said yet.

        Args:
            scored: Logits are wanted behind every token, these behind the prompt included.

        Raises:
            RequestError: it asks the impossible.
        """
        if self._is_seq2seq and scored is None and request.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs (and echo with logprobs) are not defined for this base: its "
                "encoder reads the prompt, and nothing predicts it; leave them out",
                param="prompt_logprobs",
            )
        if request.pooling is not None:
            self._check_pooling(request, adapter)
        ids, param = self._prompt_ids(request)
        # The length goes first: it bounds what the rest costs.
        max_tokens = self._room(request, len(ids), adapter.taken_tokens if adapter else 0)
        check_token_ids(ids, self._vocabulary, param)
        check_token_ids(request.logit_bias, self._vocabulary, "logit_bias")
        check_token_ids(request.stop_token_ids, self._vocabulary, "stop_token_ids")
        if request.stop and self.tokenizer is None:
            raise RequestError("stop needs a tokenizer, and the base has none", param="stop")
        generated = [*self._generated(request, max_tokens), *(scored or ())]
        check_token_ids(scored or (), self._vocabulary, "answer_token_ids")
        before = self._start_ids if self._is_seq2seq else [int(token) for token in ids]
        detokenizer = Detokenizer(self.tokenizer, before, request.stop) if self.tokenizer else None
        if detokenizer:
            for token in generated:
                detokenizer.add(token)  # its text was given out with it
        is_scored = request.prompt_logprobs is not None and (not generated or scored is not None)
        grammar = self._grammar(request, generated)
        ends = frozenset() if request.ignore_eos and not grammar else self._end_tokens
        sequence = self._sequence(request, request_id, adapter, ids if self._is_seq2seq else ())
        sequence.tokens = [*before, *generated]
        sequence.scored_tokens = len(before) + len(scored or ()) if is_scored else 0
        if request.pooling is not None:
            sequence.pooled_from = 0 if request.pooling == "mean" else len(ids) - 1
        return Answer(
            request,
            sequence,
            prompt_tokens=len(before),
            max_tokens=max_tokens,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
            end_tokens=ends | frozenset(request.stop_token_ids),
            detokenizer=detokenizer,
            grammar=grammar,
            pooled=None if request.pooling is None else Pooled(request.dimensions),
        )

    def _check_pooling(self, request: GenerationRequest, adapter: LoadedAdapter | None) -> None:
        """Raise RequestError unless the base and the adapter have such a vector."""
        if self._is_seq2seq:
            raise RequestError(
                "embeddings are of decoders alone, and this base is an encoder-decoder; ask "
                "another service",
                param="pooling",
            )
        if adapter is not None and adapter.lowered.offset is not None:
            raise RequestError(
                f"adapter {request.adapter!r} is proxy-tuned: it changes logits and no hidden "
                "state; ask for the base's embedding",
                param="adapter",
            )
        if request.dimensions is not None and request.dimensions > self._hidden:
            raise RequestError(
                f"dimensions is {request.dimensions}, and this base's vectors have {self._hidden}; "
                "lower it, or leave it out",
                param="dimensions",
            )

    def _sequence(
        self,
        request: GenerationRequest,
        request_id: str,
        adapter: LoadedAdapter | None,
        source: Many[int],
    ) -> Sequence:
        """A sequence of no tokens yet, with what stands in front of them: the adapter's prefix, and
        what an encoder reads."""
        lowered = adapter.lowered if adapter else LoweredAdapter()
        identity = adapter.identity if adapter else ""
        shared = root_key("tokens", request.cache_salt, identity) if self._is_caching else None
        sequence = Sequence(
            request_id,
            [],
            adapter=adapter.name if adapter else "",
            tenant=request.cache_salt,
            prefix_tokens=lowered.prefix_tokens + len(source),
            prefix_key=root_key("prefix", identity),
            root=shared,
        )
        if source:
            # Decoders of one source share what they have of it, and their first tokens.
            sequence.source = tuple(int(token) for token in source)
            vectors = isinstance(lowered.prefix, EmbeddingPrefix)
            sequence.source_tokens = len(source) + (lowered.prefix_tokens if vectors else 0)
            own = root_key("alone", secrets.token_hex())
            sequence.prefix_key = next_key(shared or own, sequence.source)
            sequence.root = shared and next_key(sequence.prefix_key, ())
        return sequence

    def _prompt_ids(self, request: GenerationRequest) -> tuple[list[int], str]:
        """The prompt, and the field that it was given in."""
        if request.prompt_token_ids is not None:
            ids, param = list(request.prompt_token_ids), "prompt_token_ids"
        elif self.tokenizer is None:
            raise RequestError("the base has no tokenizer; give prompt_token_ids", param="prompt")
        else:
            encode = encode_prompt if request.pooling is None else encode_text
            ids, param = encode(self.tokenizer, request.prompt or ""), "prompt"
        if not ids:
            raise RequestError(f"{param} is empty; give at least one token", param=param)
        return ids, param

    def _generated(self, request: GenerationRequest, max_tokens: int) -> list[int]:
        """The tokens that the answer begins with. Raises RequestError unless more can follow."""
        given, field = request.generated_token_ids, "generated_token_ids"
        if given and len(given) >= max_tokens:
            raise RequestError(
                f"{field} has {len(given)} tokens, and the answer has {max_tokens} in all; "
                "it is over",
                param=field,
            )
        check_token_ids(given, self._vocabulary, field)
        return [int(token) for token in given]

    def compile_grammar(self, wanted: ResponseFormat) -> None:
        """As Engine.compile_grammar, of what is checked already."""
        self._grammars.compiled(wanted)

    def _grammar(self, request: GenerationRequest, generated: list[int]) -> Grammar | None:
        """Where its grammar stands behind what was generated. Raises RequestError."""
        if request.response_format is None:
            return None
        grammar = self._grammars.open(request.response_format)
        if not grammar.accept(generated):
            field = "generated_token_ids"
            raise RequestError(f"{field} do not follow response_format", param=field)
        return grammar

    def _room(self, request: GenerationRequest, prompt_tokens: int, taken_tokens: int) -> int:
        """How many tokens it may generate. Raises ContextLengthError."""
        return room(
            self._context,
            prompt_tokens,
            request.max_tokens,
            taken_tokens=taken_tokens + len(self._start_ids),
            taker="adapter and decoder take" if self._is_seq2seq else "the adapter takes",
            is_pooled=request.pooling is not None,
        )


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the generation config and the tokenizer."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    found = [*found, getattr(tokenizer, "eos_token_id", None)]
    return frozenset(int(token) for token in found if token is not None)
