"""The base model, its KV memory, and one forward pass over a batch.

The base is transformers' own module, untouched but for its attention function, the way its linear
modules multiply (cluster.linear), norms and rotary embedding that kernels are found to compute
alike, and the hooks of loaded adapters. At start it is proved against
itself (`proof`): first flat, with all rows end to end and our attention; where the family's
attention does not go through AttentionInterface, or is of a kind that ours does not compute,
padded, through transformers' own Cache. A base that neither of them can run is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cluster.base_model import (
    base_config,
    empty_base,
    load_base,
    longest_context,
    rescaled_rope,
)
from cluster.errors import BaseModelError
from cluster.linear import pack
from cluster.memory import keep_freed_memory
from cluster.native import triton_kernels
from serving.adapters import (
    DeltaHooks,
    EmbeddingPrefix,
    KVPrefix,
    Target,
    describe,
    low_rank_kernel,
)
from serving.engine.attention import NAME
from serving.engine.batch import Batch, Computed, Row, Source
from serving.engine.cpu_norm import adopt_norms
from serving.engine.cpu_rotary import adopt_rotary
from serving.engine.flat import FlatPass
from serving.engine.geometry import measured
from serving.engine.kv_memory import KVMemory, make_memory
from serving.engine.logit_rows import LogitRows
from serving.engine.padded import PaddedPass
from serving.engine.proof import own_logits, prove, samples
from serving.spec import EngineSpec

_GIB = 2**30
_CPU_CACHE_GIB = 1.0
_GPU_FREE_SHARE = 0.8
# transformers' plain formula.
_PLAIN = "eager"
_GPU_KERNELS = "serving.engine.gpu_attention"
_log = logging.getLogger("graft.engine")


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
        self.model, takes_ours = _load(spec, self.device)
        self.model.eval().requires_grad_(False).to(self.device)
        if spec.packed_weights:
            pack(self.model)
        self.target: Target = describe(self.model, spec.base_model)
        self.hooks = DeltaHooks(self.model)
        kernel = low_rank_kernel(self.device)
        if kernel is not None:  # before anybody waits for it
            kernel.ready(self.target.dtype, self.target.device)
        self.vocabulary: int = self.model.get_input_embeddings().weight.shape[0]
        self.max_context_tokens = _context(self.model, spec)
        _refuse_by_length(self.model, spec, self.max_context_tokens)
        self.page_tokens, self.num_pages = spec.page_tokens, 0
        self.memory = KVMemory((), ())
        self._pass = self._proved(takes_ours)

    @property
    def page_bytes(self) -> int:
        """Memory of one page, over all layers."""
        target = self.target
        token_bytes = 2 * target.num_layers * target.num_kv_heads * target.head_size
        return token_bytes * target.dtype.itemsize * self.page_tokens

    def allocate(self, num_pages: int) -> None:
        """Make the KV memory, of so many pages."""
        self.num_pages = num_pages
        self.memory = make_memory(self.target, num_pages * self.page_tokens)

    @property
    def start_ids(self) -> list[int]:
        """What an encoder-decoder's decoder begins with; nothing for a decoder alone."""
        if not self.target.is_seq2seq:
            return []
        first = self.model.config.decoder_start_token_id
        forced = getattr(self.model.generation_config, "forced_bos_token_id", None)
        return [int(first)] if forced is None else [int(first), int(forced)]

    def encode(self, sources: Sequence[Source]) -> None:
        """Read an encoder-decoder's sources, sorted by adapter, into their slots."""
        self._pass.encode(sources, self.memory)

    @property
    def hidden_size(self) -> int:
        """Of the states that the output embedding reads."""
        return int(self.model.get_output_embeddings().weight.shape[1])

    def forward(self, batch: Batch) -> Computed:
        """Logits of the wanted rows and states of the pooled ones; new keys and values are in their
        slots."""
        return self._pass.run(batch, self.memory)

    def write_prefix(self, prefix: EmbeddingPrefix | KVPrefix, slots: np.ndarray) -> None:
        """Put an adapter's prefix into its slots: computed by the bare base, or as it is."""
        if isinstance(prefix, KVPrefix):
            self.memory.put(prefix, torch.from_numpy(slots).to(self.device))
            return
        count = prefix.embeddings_PH.shape[0]
        step = Batch(
            ids=np.zeros(count, dtype=np.int64),
            positions=np.arange(count),
            write_slots=slots,
            rows=[Row(0, count, slots)],
            wanted=np.array([count - 1]),
        )
        self._pass.run(step, self.memory, prefix.embeddings_PH)

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

    def _adopt_kernels(self) -> set[torch.nn.Module]:
        """Let modules compute by our kernels for CPU; those that now have a forward of their own.
        Behind the base's own logits, so that the proof sees whether they are the same."""
        if self.device.type != "cpu":
            return set()
        return adopt_norms(self.model) | adopt_rotary(self.model, self.target.dtype)

    def _gpu_kernels(self) -> Any:
        """The module that computes attention on this GPU; None where there is none, or no GPU."""
        kernels = triton_kernels(_GPU_KERNELS) if self.device.type == "cuda" else None
        heads = getattr(self.model.config.get_text_config(), "num_attention_heads", None)
        if kernels is None or heads is None:
            return None
        target = self.target
        own = (target.dtype, target.device, heads, target.num_kv_heads, target.head_size)
        return kernels if kernels.ready(*own) else None

    def _proved(self, takes_ours: bool) -> FlatPass | PaddedPass:
        """The way through a step that gives the base's own logits. Raises BaseModelError."""
        sequences = samples(self.target, self.vocabulary, self.max_context_tokens)
        logit_rows = LogitRows(self.model)
        reason = "it takes no attention function"
        if takes_ours:
            self.model.set_attn_implementation(_PLAIN)
            expected = own_logits(self.model, sequences, self.device)
            self.model.set_attn_implementation(NAME)
            adopted = self._adopt_kernels()
            gpu = self._gpu_kernels()
            for kernels in (gpu, None) if gpu else (None,):
                flat = FlatPass(self.model, self.hooks, logit_rows, kernels)
                try:
                    prove(flat, self.hooks, self.target, sequences, expected)
                    return flat
                except BaseModelError as error:
                    reason = error.message
                if kernels is not None:
                    _log.warning("not by %s, which is slower: %s", _GPU_KERNELS, reason)
            for module in adopted:
                del module.forward
            # transformers' own choice for the family
            self.model.set_attn_implementation(self.model.get_correct_attn_implementation(None))
        try:
            self.target = measured(self.model, self.target)
            expected = own_logits(self.model, sequences, self.device)
            self._adopt_kernels()
            padded = PaddedPass(self.model, self.hooks, logit_rows)
            prove(padded, self.hooks, self.target, sequences, expected)
        except BaseModelError as error:
            raise BaseModelError(
                f"base_model {self.target.name}: {type(self.model).__name__} is not served yet: "
                f"with paged attention, {reason}; padded, through transformers' cache, "
                f"{error.message}"
            ) from error
        self.hooks.has_queries = False
        return padded


def _load(spec: EngineSpec, device: torch.device) -> tuple[Any, bool]:
    """The base, and whether it takes an attention function. Raises BaseModelError."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    kept = (spec.quantization, device)
    if base_config(spec.base_model).is_encoder_decoder:
        model = load_base(spec.base_model, dtype, *kept, task="seq_2_seq_lm")
        if any(p.is_floating_point() and p.dtype != dtype for p in model.parameters()):
            # T5's wo, which overflows in float16; adapters have the engine's dtype.
            raise BaseModelError(
                f"base_model {spec.base_model}: transformers keeps a part of it in float32 where "
                f"{spec.dtype} is asked for; set engine.dtype to bfloat16 or float32"
            )
        return model, False
    # Asked before loading: some families fail at a name that they do not know, others ignore it.
    takes_ours: bool = type(empty_base(spec.base_model))._can_set_attn_implementation()
    options: dict[str, Any] = {"attn_implementation": NAME} if takes_ours else {}
    try:
        model = load_base(spec.base_model, dtype, *kept, **options)
    except (AttributeError, KeyError) as error:
        raise BaseModelError(
            f"base_model {spec.base_model}: this family cannot be loaded for serving ({error})"
        ) from error
    return model, takes_ours


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
    limits: dict[str, int] = {}
    if (rope := rescaled_rope(config)) is not None:
        kind, original = rope
        limits[f"rope_type {kind!r}"] = int(original or config.max_position_embeddings)
    if getattr(config, "attention_chunk_size", None):
        limits["attention_chunk_size"] = int(config.attention_chunk_size)
    for reason, tokens in limits.items():
        if context_tokens > tokens:
            raise BaseModelError(
                f"base_model {spec.base_model}: with {reason} its answers beyond {tokens} tokens "
                f"depend on what runs beside them; set engine.max_context_tokens to {tokens}"
            )


def _context(model: Any, spec: EngineSpec) -> int:
    limit = longest_context(model.config)
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
