"""The logit offset at run time: small bases that run beside the base, for the rows that need one.

    N rows with logits    V vocabulary

A small base's KV memory is the pool's pages twice over: the first half holds what the expert
computed of a sequence, the second what its bare twin did, each in the pages that the sequence has
anyway, those of an expert's prefix included. So the scheduler, preemption, and whoever shares pages
know nothing of small bases. Expert and twin are rows of one forward pass. Used by the engine's
thread alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cluster.base_model import context_tokens
from cluster.errors import BaseModelError
from serving.adapters import LogitOffset, LoweredAdapter, Target
from serving.engine.batch import LoadedAdapter, build
from serving.engine.runner import Runner
from serving.engine.sequence import Chunk
from serving.spec import EngineSpec


@dataclass(frozen=True)
class _Expert:
    runner: Runner
    alpha: float
    loaded: LoadedAdapter


class SmallBases:
    """The small bases of one engine, by resolved path, and the experts on them.

    Raises:
        BaseModelError: one cannot be served, or has another vocabulary than the base.
    """

    def __init__(self, spec: EngineSpec, base: Runner) -> None:
        self._base = base
        self._runners: dict[str, Runner] = {}
        self._experts: dict[str, _Expert] = {}  # by the adapter's unique name
        if spec.small_bases and base.target.is_seq2seq:
            raise BaseModelError(
                f"engine.small_bases: {spec.base_model} is an encoder-decoder, and proxy-tuning is "
                "for decoders alone; leave small_bases out"
            )
        for path in spec.small_bases:
            longest = min(base.max_context_tokens, context_tokens(path) or base.max_context_tokens)
            update = {"base_model": path, "max_context_tokens": longest, "quantization": None}
            runner = Runner(spec.model_copy(update=update))
            sizes = [r.model.get_output_embeddings().weight.shape[0] for r in (base, runner)]
            if sizes[0] != sizes[1]:
                raise BaseModelError(
                    f"engine.small_bases: {path} has a vocabulary of {sizes[1]} tokens and "
                    f"{spec.base_model} one of {sizes[0]}; name a base of the same family"
                )
            self._runners[str(Path(path).resolve())] = runner

    @property
    def targets(self) -> Mapping[str, Target]:
        """What lowering must know of each."""
        return {path: runner.target for path, runner in self._runners.items()}

    @property
    def page_bytes(self) -> int:
        """What a page of the pool costs here."""
        return sum(2 * runner.page_bytes for runner in self._runners.values())

    def allocate(self, num_pages: int) -> None:
        """Make their KV memory for a pool of so many pages. Raises BaseModelError."""
        for runner in self._runners.values():
            runner.allocate(2 * num_pages)

    def check(self, offset: LogitOffset) -> None:
        """Raise AdapterError if the expert changes what cannot be changed for some rows alone."""
        self._runners[offset.small_base].hooks.check(offset.expert.deltas)

    def taken_tokens(self, lowered: LoweredAdapter) -> int:
        """Positions of the base's context that requests of an adapter do not have: its prefix, or
        what is missing of its expert's context."""
        if lowered.offset is None:
            return lowered.prefix_tokens
        runner = self._runners[lowered.offset.small_base]
        left = runner.max_context_tokens - lowered.offset.expert.prefix_tokens
        return self._base.max_context_tokens - left

    def install(self, name: str, offset: LogitOffset) -> None:
        """Take on the expert of an adapter."""
        runner, expert = self._runners[offset.small_base], offset.expert
        runner.hooks.install(expert.deltas)
        loaded = LoadedAdapter(name, expert, "", expert.prefix_tokens)
        self._experts[name] = _Expert(runner, offset.alpha, loaded)

    def uninstall(self, name: str) -> None:
        """Let an expert go, if the adapter of that name has one."""
        expert = self._experts.pop(name, None)
        if expert is not None:
            expert.runner.hooks.uninstall(expert.loaded.lowered.deltas)

    def write_prefix(self, name: str, slots: np.ndarray) -> None:
        """Put the prefix of that adapter's expert into its slots."""
        expert = self._experts[name]
        prefix = expert.loaded.lowered.prefix
        assert prefix is not None
        expert.runner.write_prefix(prefix, slots)

    def without_prefixes(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks as the base sees them: an expert's prefix is not its own."""
        size = self._base.page_tokens
        return [_bare(c, size) if c.sequence.adapter in self._experts else c for c in chunks]

    @torch.inference_mode()
    def add(self, logits_NV: torch.Tensor, chunks: Sequence[Chunk]) -> None:
        """Add each row's offset to its logits, in place; `chunks` are the step's, in order."""
        if not self._runners:
            return
        ends = np.cumsum([len(chunk.wanted) for chunk in chunks]).tolist()
        for runner in self._runners.values():
            own = [
                (chunk, range(end - len(chunk.wanted), end), expert)
                for chunk, end in zip(chunks, ends, strict=True)
                if (expert := self._experts.get(chunk.sequence.adapter)) and expert.runner is runner
            ]
            if not own:
                continue
            batch = build(
                [self._twin(chunk) for chunk, _, _ in own] + [chunk for chunk, _, _ in own],
                {expert.loaded.name: expert.loaded for _, _, expert in own},
                runner.page_tokens,
            )
            bare_NV, expert_NV = runner.forward(batch).logits_NV.chunk(2)
            rows = [row for _, rows, _ in own for row in rows]
            alpha = [expert.alpha for _, rows, expert in own for _ in rows]
            alpha_N1 = torch.tensor(alpha, device=logits_NV.device)[:, None]
            logits_NV[rows] += alpha_N1 * (expert_NV - bare_NV)

    def _twin(self, chunk: Chunk) -> Chunk:
        """The same tokens without the adapter, in the second half of the memory."""
        bare = _bare(chunk, self._base.page_tokens)
        pages = [page + self._base.num_pages for page in bare.sequence.pages]
        return replace(bare, sequence=replace(bare.sequence, adapter="", pages=pages))


def _bare(chunk: Chunk, page_tokens: int) -> Chunk:
    """The same tokens without the prefix in front of them."""
    sequence = chunk.sequence
    if not sequence.prefix_tokens:
        return chunk
    pages = sequence.pages[sequence.prefix_pages(page_tokens) :]
    return replace(chunk, sequence=replace(sequence, prefix_tokens=0, pages=pages))
