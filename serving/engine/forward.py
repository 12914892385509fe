"""One forward pass of what the scheduler chose, behind the prefixes that it stands on.

Knows pages, adapters and the bases that run; of requests and what becomes of logits, the engine.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np

from serving.adapters import EmbeddingPrefix, KVPrefix, LoweredAdapter
from serving.engine.bank import AdapterBank
from serving.engine.batch import Computed, Source, build, context_slots
from serving.engine.offset import SmallBases
from serving.engine.runner import Runner
from serving.engine.sequence import Chunk, Sequence
from serving.spec import EngineSpec

_NOTHING = LoweredAdapter()


class Forward:
    """The passes of one engine, whose parts it is given."""

    def __init__(
        self, spec: EngineSpec, runner: Runner, small_bases: SmallBases, bank: AdapterBank
    ) -> None:
        self._page_tokens = spec.page_tokens
        self._runner, self._small_bases, self._bank = runner, small_bases, bank

    def run(self, chunks: list[Chunk]) -> Computed:
        """Logits and states of the rows that chunks want, behind the prefixes that are not there
        yet."""
        fresh = [c.sequence for c in chunks if c.sequence.prefix_tokens]
        self._write_prefixes([sequence for sequence in fresh if not sequence.has_prefix])
        own = self._small_bases.without_prefixes(chunks)
        computed = self._runner.forward(build(own, self._bank.held, self._page_tokens))
        self._small_bases.add(computed.logits_NV, chunks)
        return computed

    def _write_prefixes(self, fresh: Many[Sequence]) -> None:
        """Fill the slots in front of sequences, which are sorted by adapter: what an encoder reads,
        then what belongs to the adapter."""
        sources: list[Source] = []
        for sequence in fresh:
            slots = context_slots(sequence, self._page_tokens)[: sequence.prefix_tokens]
            lowered = self._bank.held[sequence.adapter].lowered if sequence.adapter else _NOTHING
            prefix = lowered.prefix
            if sequence.source:
                vectors = prefix.embeddings_PH if isinstance(prefix, EmbeddingPrefix) else None
                slots, rest = np.split(slots, [sequence.source_tokens])
                ids = np.array(sequence.source, dtype=np.int64)
                sources.append(Source(ids, slots, lowered.deltas, vectors))
                if isinstance(prefix, KVPrefix):
                    self._runner.write_prefix(prefix, rest)
            elif prefix is None:
                self._small_bases.write_prefix(sequence.adapter, slots)
            else:
                self._runner.write_prefix(prefix, slots)
        if sources:
            self._runner.encode(sources)
