"""One family of bases: an engine with every adapter that is tried on it, and what PEFT says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapters import load, make_adapter, variants_of
from conftest import CONTEXT

from serving.engine import Engine, EngineSpec, GenerationRequest, GenerationResult, TokenOutput
from serving.engine.request import result_of
from training import load_adapter

TOLERANCE = 1e-4
NEW_TOKENS = 64  # of the families below; others share their code, and answer with fewer
FEW_TOKENS = 16
LONG = {"llama", "qwen3", "gpt2", "bloom", "t5"}
START = 256  # what an encoder-decoder's decoder begins with
# Tokens of an answer behind which its pages are taken: at once, so that it is often in the middle
# of its prompt, and then twice on the way.
_TAKEN_BEHIND = (0, 4, 12)


class SideBySide:
    """An engine and PEFT over one base, with the same folders."""

    def __init__(self, base: Path, folder: Path, family: str) -> None:
        self.base = base
        self.folders = {v: make_adapter(v, base, folder / v) for v in variants_of(family)}
        # BLOOM's config tells no context.
        self.spec = EngineSpec(base_model=str(base), max_context_tokens=CONTEXT, max_step_tokens=48)
        self.engine = self.make_engine()
        self._new_tokens = NEW_TOKENS if family in LONG else FEW_TOKENS
        self._references: dict[str | None, Any] = {}

    def make_engine(self, **limits: Any) -> Engine:
        engine = Engine(self.spec.model_copy(update=limits))
        for variant, path in self.folders.items():
            engine.add_adapter(variant, path)
        return engine

    def reference(self, variant: str | None) -> Any:
        if variant not in self._references:
            model = load(self.base)
            adapted = model if variant is None else load_adapter(model, self.folders[variant])
            self._references[variant] = adapted.eval()
        return self._references[variant]

    def logits(
        self, variant: str | None, prompt: Sequence[int], answer: Sequence[int] = ()
    ) -> torch.Tensor:
        return logits_of(self.reference(variant), prompt, answer)

    def requests(self, *prompts: Sequence[int], **options: Any) -> list[GenerationRequest]:
        """Of the base and every adapter, for greedy answers."""
        asked: dict[str, Any] = {"max_tokens": self._new_tokens, "ignore_eos": True} | options
        return [
            GenerationRequest(prompt_token_ids=prompt, adapter=variant, **asked)
            for prompt in prompts
            for variant in (None, *self.folders)
        ]

    def assert_as_peft(
        self, requests: Sequence[GenerationRequest], results: Sequence[GenerationResult]
    ) -> None:
        for request, result in zip(requests, results, strict=True):
            assert len(result.token_ids) == request.max_tokens
            assert_greedy(self.reference(request.adapter), request, result)

    def assert_the_same_when_preempted(
        self, requests: Sequence[GenerationRequest], expected: Sequence[Sequence[int]]
    ) -> None:
        """In small steps, with the prefix cache and then without it in few pages."""
        page_bytes = 16 * 2 * sum(keys[0].nbytes for keys in self.engine.runner.memory.keys)
        few = {"prefix_cache": False, "kv_cache_gib": 40.5 * page_bytes / 2**30}
        for limits in ({}, few):
            engine = self.make_engine(max_step_tokens=11, **limits)
            results = answers_of_preempted(engine, requests)
            for request, result, tokens in zip(requests, results, expected, strict=True):
                assert result.token_ids == tokens, request.adapter
            assert engine.stats.cached_tokens > 0 or limits is few


@torch.no_grad()
def logits_of(model: Any, prompt: Sequence[int], answer: Sequence[int] = ()) -> torch.Tensor:
    """[tokens, vocabulary] behind each token of prompt and answer, without the rows of virtual
    tokens; of an encoder-decoder, behind its decoder's first token and each of the answer."""
    config = getattr(model, "config", None)  # a proxy-tuned one has several
    if config is not None and config.is_encoder_decoder:
        decoder = torch.tensor([[START, *answer]])
        found = model(input_ids=torch.tensor([[*prompt]]), decoder_input_ids=decoder)
        return found.logits[0].float()
    ids = torch.tensor([[*prompt, *answer]])
    return model(input_ids=ids).logits[0, -ids.shape[1] :].float()


def assert_greedy(model: Any, request: GenerationRequest, result: GenerationResult) -> None:
    """The answer is the model's greedy one: in one pass over prompt and answer, the likeliest token
    of each place is the one that stands there. What the engine tells of log probabilities is the
    model's too."""
    assert request.prompt_token_ids is not None
    answer = result.token_ids
    logits = logits_of(model, request.prompt_token_ids, answer)[-len(answer) - 1 : -1]
    assert answer == logits.argmax(-1).tolist(), request.adapter
    if request.logprobs is None:
        return
    expected = logits.log_softmax(-1)
    assert [told.token_id for told in result.logprobs] == answer
    ids = torch.tensor([[token for token, _ in told.top] for told in result.logprobs])
    found = torch.tensor([[value for _, value in told.top] for told in result.logprobs])
    assert found.shape == (len(answer), request.logprobs)
    for wanted in (expected.gather(-1, ids), expected.topk(request.logprobs).values):
        gaps = (found - wanted).abs().amax(-1)
        told = f"{request.adapter}: {gaps.max()}"
        # A place in fifty may be ill-conditioned: PEFT in float32 is up to 2.6e-4 from itself in
        # float64 there (a DyLoRA at rank 2, a router), and 1e-6 elsewhere.
        assert (gaps <= TOLERANCE).double().mean() >= 0.98, told
        assert gaps.max() <= 10 * TOLERANCE, told


def answers_of_preempted(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> list[GenerationResult]:
    """Whole answers to requests of which each has lost all its pages three times on the way."""
    sequences = [engine._answers[engine.submit(request)].sequence for request in requests]
    outputs: dict[str, list[TokenOutput]] = {sequence.id: [] for sequence in sequences}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        for sequence in list(engine._scheduler.running):
            due = _TAKEN_BEHIND[sequence.preemptions :][:1]
            if due and len(outputs[sequence.id]) >= due[0]:
                engine._scheduler.preempt(sequence)
        engine.check()
    assert min(sequence.preemptions for sequence in sequences) >= len(_TAKEN_BEHIND)
    return [result_of(outputs[s.id], s.source_tokens) for s in sequences]
