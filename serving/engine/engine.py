"""The engine: requests of any adapters in, tokens out, one forward pass per step.

Offline and in one thread: `generate` and `score` run to the end; a server calls `submit`, `step`
and `cancel` from the one thread that owns the engine. No Ray, no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConflictError, EngineError
from serving.adapters import LoweredAdapter, Part, lower, mixed
from serving.engine.answer import Answer
from serving.engine.attempt import computed
from serving.engine.bank import AdapterBank
from serving.engine.batch import LoadedAdapter
from serving.engine.figures import EngineStats, Figures
from serving.engine.forward import Forward
from serving.engine.host_tier import HostTier
from serving.engine.intake import Intake
from serving.engine.offset import SmallBases
from serving.engine.pages import PagePool
from serving.engine.ranges import is_number, require, shown
from serving.engine.request import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    ScoreRequest,
    TokenOutput,
    result_of,
)
from serving.engine.runner import Runner
from serving.engine.sampler import Sampled
from serving.engine.scheduler import Scheduler
from serving.spec import EngineSpec

_GIB = 2**30
_HOST_ADAPTERS_GIB = 4.0  # beside a GPU


class Engine:
    """One base model and its adapters. Not thread-safe, but for what says so.

    Raises:
        BaseModelError: the base cannot be loaded or is of a family that cannot be served.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.runner = Runner(spec)
        self._small_bases = SmallBases(spec, self.runner)
        page_bytes = self.runner.page_bytes + self._small_bases.page_bytes
        num_pages = self.runner.fitting_pages(spec, page_bytes)
        self.runner.allocate(num_pages)
        self._small_bases.allocate(num_pages)
        self._pool = PagePool(self.runner.num_pages)
        self._scheduler = Scheduler(
            self._pool,
            page_tokens=spec.page_tokens,
            max_running=spec.max_running_requests,
            max_step_tokens=spec.max_step_tokens,
        )
        self._intake = Intake(spec, self.runner)
        self._bank = AdapterBank(spec, self.runner, self._small_bases)
        self._forward = Forward(spec, self.runner, self._small_bases, self._bank)
        self.host_tier = HostTier(_host_bytes(spec, self.runner.device), self.runner.device)
        self._answers: dict[str, Answer] = {}
        self._figures = Figures()
        self._count = self._steps = 0

    @property
    def tokenizer(self) -> Any:
        """The base's; None if it has none."""
        return self._intake.tokenizer

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that requests can name."""
        return self._bank.names

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._answers)

    @property
    def max_context_tokens(self) -> int:
        """Longest prefix + prompt + answer."""
        return self.runner.max_context_tokens

    @property
    def stats(self) -> EngineStats:
        """Counts as of now; on the thread that owns the engine."""
        figures = self._figures
        left = [(a.sequence, a.prompt_tokens + a.max_tokens) for a in self._answers.values()]
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            free_pages=self._pool.num_free,
            num_pages=self._pool.num_pages,
            adapters=len(self._bank.names),
            steps=self._steps,
            generated_tokens=figures.generated_tokens,
            cached_tokens=self._scheduler.cached_tokens,
            preemptions=figures.preemptions,
            outstanding_tokens=sum(
                end - sequence.num_computed + sequence.unread_source for sequence, end in left
            ),
            adapter_hits=self._bank.hits,
            adapter_loads=self._bank.loads,
            adapter_evictions=self._bank.evictions,
            adapter_bytes=self._bank.num_bytes,
            host_adapter_bytes=self.host_tier.num_bytes,
            host_adapter_hits=self.host_tier.hits,
            host_adapter_evictions=self.host_tier.evictions,
            step_seconds=figures.seconds.now,
            step_rows=figures.rows.now,
            step_tokens=figures.tokens.now,
        )

    def lower(self, path: str | Path, content: str | None = None) -> LoweredAdapter:
        """Read an adapter folder for this base. Safe to call from another thread, since it
        touches nothing that runs. Raises AdapterError.

        Args:
            content: A hash of its config and weights, from who has verified them.
        """
        lowered = lower(path, self.runner.target, self._small_bases.targets, content)
        self.runner.hooks.check(lowered.deltas)
        if lowered.offset is not None:
            self._small_bases.check(lowered.offset)
        return lowered

    def add_adapter(self, name: str, path: str | Path) -> None:
        """Load the PEFT folder at `path` under `name`.

        Raises:
            AdapterError: the folder does not fit; nothing changed.
            ConflictError: the name is taken.
            OverloadedError: there is no room in engine.adapters_gib.
        """
        self.install_adapter(name, self.lower(path))

    def mix(self, parts: Many[Part]) -> LoweredAdapter:
        """The weighted sum of lowered adapters. Safe to call from another thread. Raises
        RequestError for what does not add up to a change of weights."""
        return mixed(parts, self.runner.target)

    def add_mix(self, name: str, weights: Mapping[str, float]) -> None:
        """Make the sum of loaded adapters, each times its weight, available under `name`. It
        stays when they are removed.

        Raises:
            ModelNotFoundError: one of them is not loaded.
            RequestError: there is none, one of them is no change of weights, or a weight is no
                finite number.
            ConflictError: the name is taken.
            OverloadedError: there is no room in engine.adapters_gib.
        """
        require(len(weights) > 0, "weights", "weights is empty; give at least one adapter")
        for part, weight in weights.items():
            wrong = f"weights[{shown(part)}] is {shown(weight)}; it must be a finite number"
            require(is_number(weight), "weights", wrong)
        parts = [Part(n, self._bank.get(n).lowered, weight) for n, weight in weights.items()]
        self.install_adapter(name, self.mix(parts))

    def held_adapter(self, name: str) -> LoweredAdapter | None:
        """The adapter of that name, if it is loaded. Safe to call from another thread."""
        return self._bank.find(name)

    def install_adapter(self, name: str, lowered: LoweredAdapter, *, evict: bool = False) -> None:
        """Make a lowered adapter available to requests.

        Args:
            evict: Drop least recently used adapters without requests where there is no room.

        Raises:
            AdapterError: its prefix, or its bytes, can never fit.
            ConflictError: the name is taken.
            OverloadedError: there is no room in engine.adapters_gib.
        """
        self._bank.install(name, lowered, evict=evict)

    def hold_adapter(self, name: str) -> str:
        """Keep a loaded adapter from leaving for another, as its requests do; what it returns is
        for `release_adapter`."""
        return self._bank.hold(name)

    def release_adapter(self, held: str) -> None:
        """Undo one `hold_adapter`."""
        self._bank.end_use(held)

    def least_used_adapter(self) -> str | None:
        """The adapter that is soonest without requests, as far as their number tells: mixes go
        first. None if there is no adapter."""
        return self._bank.least_used()

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away. Requests that use it finish; new ones are refused.

        Raises:
            ModelNotFoundError: there is no such adapter.
        """
        self._bank.remove(name)

    def submit(self, request: GenerationRequest, request_id: str | None = None) -> str:
        """Queue a request; it joins at the next step. Returns its id.

        Raises:
            RequestError: it asks the impossible; nothing was queued.
            ModelNotFoundError: its adapter is not loaded.
        """
        while request_id is None:
            self._count += 1
            own = f"request-{self._count}"
            request_id = None if own in self._answers else own
        answer = self._prepare(request, request_id)
        self._start(answer)
        return answer.sequence.id

    def compile_grammar(self, request: GenerationRequest) -> None:
        """Compile what the request's answer has to follow, so that `submit` finds it compiled. Safe
        to call from another thread, which a large JSON schema takes tenths of a second of. Raises
        RequestError."""
        request.check()
        if request.response_format is not None:
            self._intake.compile_grammar(request.response_format)

    def cancel(self, request_id: str) -> bool:
        """Forget a request; its pages are free at once. False if it is over already."""
        answer = self._answers.get(request_id)
        if answer is not None:
            self._end(answer)
        return answer is not None

    def step(self) -> list[TokenOutput]:
        """Run one forward pass over what the scheduler chose; one output per request that got a
        token or ended. A request that fails, fails alone."""
        began = time.perf_counter()
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        self._steps += 1
        cost = sum(chunk.cost for chunk in chunks)
        for chunk in chunks:
            self._answers[chunk.sequence.id].clock.schedule(began)
        outputs: list[TokenOutput] = []
        for chunk, sampled, failure in computed(self._forward, chunks, self._answers):
            answer = self._answers[chunk.sequence.id]
            if failure is not None:
                outputs.append(self._fail(answer, failure))
                continue
            self._scheduler.advance(chunk)
            if chunk.is_last:
                try:
                    outputs.append(self._accept(answer, sampled))
                except Exception as error:  # a tokenizer's decode; it must not end the engine
                    outputs.append(self._fail(answer, f"{type(error).__name__}: {error}"))
        self._figures.step(time.perf_counter() - began, len(chunks), cost)
        return outputs

    def generate(self, requests: Many[GenerationRequest]) -> list[GenerationResult]:
        """Run requests to their ends; results in the order of requests.

        Raises:
            RequestError: one of them asks the impossible; none was started.
            EngineError: one of them failed on the way.
        """
        self._check_idle()
        answers = [self._prepare(r, f"generate-{i}") for i, r in enumerate(requests)]
        for answer in answers:
            self._start(answer)
        outputs: dict[str, list[TokenOutput]] = {answer.sequence.id: [] for answer in answers}
        try:
            while self.has_work:
                for output in self.step():
                    outputs[output.request_id].append(output)
                    if output.finish_reason is FinishReason.ERROR:
                        raise EngineError(f"{output.request_id}: {output.error}")
        finally:
            for answer in answers:
                self.cancel(answer.sequence.id)
        return [result_of(outputs[a.sequence.id], a.read_tokens) for a in answers]

    def score(self, requests: Many[ScoreRequest]) -> list[torch.Tensor]:
        """Logits after every token of each request: float32 [tokens, vocabulary], on CPU. Of an
        encoder-decoder, after every token that its decoder begins with and of the answer.

        Raises:
            RequestError: one of them asks the impossible.
        """
        self._check_idle()
        scored: list[torch.Tensor] = []
        for number, request in enumerate(requests):
            asked = GenerationRequest(
                prompt_token_ids=request.token_ids,
                adapter=request.adapter,
                adapter_rank=request.adapter_rank,
                max_tokens=len(request.answer_token_ids),
                prompt_logprobs=0,
            )
            answer = self._prepare(asked, f"score-{number}", request.answer_token_ids)
            self._start(answer)
            parts: list[torch.Tensor] = []
            try:
                while answer.sequence.num_left:
                    chunks = self._scheduler.schedule()
                    parts.append(self._forward.run(chunks).logits_NV.cpu())
                    self._scheduler.advance(chunks[0])
            finally:
                self._end(answer)
            scored.append(torch.cat(parts))
        return scored

    def check(self) -> None:
        """Raise AssertionError unless pages, sequences and adapters agree (for tests)."""
        self._scheduler.check()
        waiting = {sequence.id for sequence in self._scheduler}
        assert waiting == set(self._answers), "a request is not scheduled"
        unknown = {s.adapter for s in self._scheduler if s.adapter} - set(self._bank.held)
        assert not unknown, f"requests use adapters that are gone: {unknown}"

    def _prepare(
        self, request: GenerationRequest, request_id: str, scored: Many[int] | None = None
    ) -> Answer:
        request.check()
        adapter: LoadedAdapter | None = None
        if request.adapter is not None:
            adapter = self._bank.get(request.adapter, request.adapter_rank)
        return self._intake.open(request, request_id, adapter, scored)

    def _start(self, answer: Answer) -> None:
        if answer.sequence.id in self._answers:
            raise ConflictError(f"request {answer.sequence.id!r}: is in progress already")
        if answer.request.adapter is not None:
            self._bank.begin_use(answer.request.adapter)
        self._answers[answer.sequence.id] = answer
        self._scheduler.add(answer.sequence)

    def _accept(self, answer: Answer, sampled: Sampled | None) -> TokenOutput:
        if answer.pooled is not None:
            output = answer.embed()
        else:
            output = None if sampled is None else answer.accept(sampled)
        if output is None:
            return self._fail(
                answer, "logits or states are not finite; the adapter or base is damaged"
            )
        self._figures.generated_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._end(answer)
        return answer.clock.give(output)

    def _fail(self, answer: Answer, message: str) -> TokenOutput:
        self._end(answer)
        return TokenOutput(answer.sequence.id, (), "", FinishReason.ERROR, message)

    def _end(self, answer: Answer) -> None:
        """Take a request out, and a removed adapter with its last request."""
        del self._answers[answer.sequence.id]
        self._figures.preemptions += answer.sequence.preemptions
        self._scheduler.remove(answer.sequence)
        if answer.sequence.adapter:
            self._bank.end_use(answer.sequence.adapter)

    def _check_idle(self) -> None:
        if self.has_work:
            raise ConflictError(
                "submitted requests are in progress; step them to their ends, or cancel them"
            )


def _host_bytes(spec: EngineSpec, device: torch.device) -> int:
    if spec.host_adapters_gib is not None:
        return int(spec.host_adapters_gib * _GIB)
    return int(_HOST_ADAPTERS_GIB * _GIB) if device.type == "cuda" else 0
