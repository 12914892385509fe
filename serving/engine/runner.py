"""The base model, its KV memory, and one forward pass over a batch.

    T tokens of the step    N rows with logits    V vocabulary    P prefix tokens

The base is transformers' own module, untouched but for its attention function and the hooks of
loaded adapters. At start it is proved against itself: a family whose attention does not go through
AttentionInterface, or that keeps other state between tokens, gives other logits when its rows are
flattened, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from cluster.base_model import load_base
from cluster.errors import BaseModelError
from cluster.memory import keep_freed_memory
from serving.adapters import DeltaHooks, EmbeddingPrefix, KVPrefix, Target, describe
from serving.engine.attention import NAME, AttentionPlan, Span, attend_by
from serving.engine.batch import Batch, Row, page_slots
from serving.spec import EngineSpec

_GIB = 2**30
_CPU_CACHE_GIB = 1.0
_GPU_FREE_SHARE = 0.8
# Largest difference of the proof's logits, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_PROOF_TOKENS = (13, 7)


class Runner:
    """One base model on one device. Used by one thread.

    Raises:
        BaseModelError: the folder is no causal LM, or one of a family that cannot be served.
    """

    def __init__(self, spec: EngineSpec) -> None:
        keep_freed_memory()
        self.device = _device(spec.device)
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        try:
            self.model = load_base(spec.base_model, dtype, attn_implementation=NAME)
        except (AttributeError, KeyError) as error:
            raise BaseModelError(
                f"base_model {spec.base_model}: this family does not take an attention function, "
                f"which paged serving needs ({error})"
            ) from error
        self.model.eval().requires_grad_(False).to(self.device)
        self.target: Target = describe(self.model, spec.base_model)
        self.hooks = DeltaHooks(self.model)
        self.vocabulary: int = self.model.get_input_embeddings().weight.shape[0]
        self.max_context_tokens = _context(self.model, spec)
        _refuse_by_length(self.model, spec, self.max_context_tokens)
        self.page_tokens, self.num_pages = spec.page_tokens, 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._wanted_N: torch.Tensor | None = None
        self.model.get_output_embeddings().register_forward_pre_hook(self._select_wanted)

    @property
    def page_bytes(self) -> int:
        """Memory of one page, over all layers."""
        target = self.target
        token_bytes = 2 * target.num_layers * target.num_kv_heads * target.head_size
        return token_bytes * target.dtype.itemsize * self.page_tokens

    def allocate(self, num_pages: int) -> None:
        """Make the KV memory, of so many pages, and prove the base on it. Raises BaseModelError."""
        self.num_pages = num_pages
        target = self.target
        shape = (num_pages * self.page_tokens, target.num_kv_heads, target.head_size)
        options: dict[str, Any] = {"dtype": target.dtype, "device": self.device}
        self._keys, self._values = (
            [torch.zeros(shape, **options) for _ in range(target.num_layers)] for _ in range(2)
        )
        self._prove()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits of the wanted rows, float32 [N, V]; new keys and values are in their slots."""
        ids_T = torch.from_numpy(batch.ids).to(self.device)
        with self.hooks.active(batch.body, batch.head):
            return self._run(
                {"input_ids": ids_T[None]},
                batch.positions,
                batch.write_slots,
                batch.rows,
                batch.wanted,
            )

    def write_prefix(self, prefix: EmbeddingPrefix | KVPrefix, slots: np.ndarray) -> None:
        """Put an adapter's prefix into its slots: computed by the bare base, or as it is."""
        if isinstance(prefix, EmbeddingPrefix):
            count = prefix.embeddings_PH.shape[0]
            self._run(
                {"inputs_embeds": prefix.embeddings_PH[None]},
                np.arange(count),
                slots,
                [Row(0, count, slots)],
                np.array([count - 1]),
            )
            return
        slots_P = torch.from_numpy(slots).to(self.device)
        for layer in range(self.target.num_layers):
            self._keys[layer][slots_P] = prefix.keys_LPKD[layer]
            self._values[layer][slots_P] = prefix.values_LPKD[layer]

    @torch.inference_mode()
    def _run(
        self,
        inputs: dict[str, torch.Tensor],
        positions: np.ndarray,
        write_slots: np.ndarray,
        rows: Sequence[Row],
        wanted: np.ndarray,
    ) -> torch.Tensor:
        positions_T = torch.from_numpy(positions).to(self.device)
        plan = self._plan(torch.from_numpy(write_slots).to(self.device), rows)
        self._wanted_N = torch.from_numpy(wanted).to(self.device)
        try:
            with attend_by(plan):
                output = self.model(**inputs, position_ids=positions_T[None], use_cache=False)
        finally:
            self._wanted_N = None
        return output.logits[0].float()

    def _plan(self, write_T: torch.Tensor, rows: Sequence[Row]) -> AttentionPlan:
        """Rows of one token go together, padded to the longest; longer ones each alone."""
        plan = AttentionPlan(
            self._keys,
            self._values,
            write_T,
            self.hooks.queries,
            [
                Span(row.start, row.end, torch.from_numpy(row.slots).to(self.device))
                for row in rows
                if row.end - row.start > 1
            ],
        )
        single = [row for row in rows if row.end - row.start == 1]
        if single:
            lengths = np.array([len(row.slots) for row in single])
            # With slots of its own: what is masked must still be finite, or 0 x NaN is NaN.
            padded = np.repeat([row.slots[:1] for row in single], lengths.max(), axis=1)
            for index, row in enumerate(single):
                padded[index, : len(row.slots)] = row.slots
            plan.decode_B = torch.tensor([row.start for row in single], device=self.device)
            plan.decode_slots_BS = torch.from_numpy(padded).to(self.device)
            plan.decode_lengths_B = torch.from_numpy(lengths).to(self.device)
        return plan

    def _select_wanted(
        self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """The output embedding sees the wanted rows alone, as [1, N, hidden]."""
        if self._wanted_N is None:
            return None
        hidden = args[0]
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, self._wanted_N],)

    def fitting_pages(self, spec: EngineSpec, page_bytes: int) -> int:
        """How many pages of `page_bytes` there is memory for, up to what could ever be used.

        Raises:
            BaseModelError: not one context fits.
        """
        wanted = 1 + spec.max_running_requests * -(-self.max_context_tokens // spec.page_tokens)
        if spec.kv_cache_gib is not None:
            pages = int(spec.kv_cache_gib * _GIB / page_bytes)
        elif self.device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(self.device)
            pages = min(wanted, int(free_bytes * _GPU_FREE_SHARE / page_bytes))
        else:
            pages = min(wanted, int(_CPU_CACHE_GIB * _GIB / page_bytes))
        # One more, since what follows an adapter's prefix begins in a page of its own.
        least = -(-self.max_context_tokens // spec.page_tokens) + 1
        if pages < least:
            raise BaseModelError(
                f"base_model {spec.base_model}: one context of {self.max_context_tokens} tokens "
                f"needs {least * page_bytes / _GIB:.2f} GiB of KV pages, and there are "
                f"{pages * page_bytes / _GIB:.2f}; raise engine.kv_cache_gib or lower "
                "engine.max_context_tokens"
            )
        return pages

    def _prove(self) -> None:
        """Compare a mixed, paged, chunked pass with the base's own. Raises BaseModelError."""
        generator = torch.Generator().manual_seed(0)
        length = min(max(_PROOF_TOKENS), self.max_context_tokens)
        sequences = [
            torch.randint(self.vocabulary, (min(tokens, length),), generator=generator)
            for tokens in _PROOF_TOKENS
        ]
        pages = -(-length // self.page_tokens)
        if pages * len(sequences) > self.num_pages:
            sequences = sequences[:1]
        name = f"base_model {self.target.name}: {type(self.model).__name__}"
        try:
            with self._own_attention(), torch.inference_mode():
                reference = [
                    self.model(input_ids=s[None].to(self.device), use_cache=False).logits[0].float()
                    for s in sequences
                ]
            found = self._proof_logits([s.numpy() for s in sequences], pages)
        except BaseModelError as error:
            raise BaseModelError(f"{name}: {error.message}") from error
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BaseModelError(
                f"{name} cannot be served with paged attention: {reason}"
            ) from error
        expected = torch.cat([logits[-1:] for logits in reference])
        scale = max(1e-6, float(expected.abs().max()))
        difference = float((found - expected).abs().max()) / scale
        if not difference < _TOLERANCE[self.target.dtype]:
            raise BaseModelError(
                f"{name} is not served yet: with paged attention its logits differ by "
                f"{difference:.1e} of their size; its attention does not go through "
                "AttentionInterface, or it keeps state that pages do not hold"
            )

    def _proof_logits(self, sequences: Sequence[np.ndarray], pages: int) -> torch.Tensor:
        """The last logits of each sequence, read in two steps, both sequences in each."""
        slots = [
            page_slots(range(index * pages, (index + 1) * pages), self.page_tokens)
            for index in range(len(sequences))
        ]
        logits = torch.empty(0)
        for half in range(2):
            bounds = [((0, len(s) - 1), (len(s) - 1, len(s)))[half] for s in sequences]
            offsets = np.cumsum([0] + [end - start for start, end in bounds])
            ids = [s[a:b] for s, (a, b) in zip(sequences, bounds, strict=True)]
            with nullcontext() if half else self.hooks.learning(int(offsets[-1])):
                logits = self._run(
                    {"input_ids": torch.from_numpy(np.concatenate(ids)).to(self.device)[None]},
                    np.concatenate([np.arange(a, b) for a, b in bounds]),
                    np.concatenate([s[a:b] for s, (a, b) in zip(slots, bounds, strict=True)]),
                    [
                        Row(int(offsets[i]), int(offsets[i + 1]), slots[i][:end])
                        for i, (_, end) in enumerate(bounds)
                    ],
                    offsets[1:] - 1,
                )
        return logits

    @contextmanager
    def _own_attention(self) -> Generator[None]:
        """The base with transformers' plain attention, for the proof's reference."""
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(NAME)


def _device(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise BaseModelError("engine.device is cuda, and there is no GPU; set it to auto or cpu")
    return torch.device(asked)


def _refuse_by_length(model: Any, spec: EngineSpec, context_tokens: int) -> None:
    """Refuse what the start-up proof is too short to see: bases that compute a long sequence by
    another rule than a short one. Raises BaseModelError."""
    config = model.config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    limits: dict[str, int] = {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings")
        limits[f"rope_type {rope['rope_type']!r}"] = int(original or config.max_position_embeddings)
    if getattr(config, "attention_chunk_size", None):
        limits["attention_chunk_size"] = int(config.attention_chunk_size)
    for reason, tokens in limits.items():
        if context_tokens > tokens:
            raise BaseModelError(
                f"base_model {spec.base_model}: with {reason} its answers beyond {tokens} tokens "
                f"depend on what runs beside them; set engine.max_context_tokens to {tokens}"
            )


def _context(model: Any, spec: EngineSpec) -> int:
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = spec.max_context_tokens
    if limit is None and asked is None:
        raise BaseModelError(
            f"base_model {spec.base_model}: its config tells no context length; "
            "set engine.max_context_tokens"
        )
    if limit is not None and asked is not None and asked > limit:
        raise BaseModelError(
            f"engine.max_context_tokens is {asked}, but base_model {spec.base_model} has {limit}"
        )
    return asked or limit or 0
