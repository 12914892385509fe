"""Apply deltas inside one forward pass of the base, each to the rows of its own adapter.

    T tokens of the step    I in    O out

Rows lie sorted by adapter, so each adapter is one contiguous segment and its delta works in place
on a slice of the base's output; the low-rank ones of few rows are one call for a module.
Forward hooks sit on those modules alone that some loaded adapter changes; a step without adapters
runs the base as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.hooks import RemovableHandle

from cluster.errors import AdapterError
from cluster.linear import product
from cluster.native import triton_kernels
from serving.adapters import cpu_low_rank
from serving.adapters.primitives import (
    ACTIVATIONS,
    Block,
    Delta,
    GatedPrompt,
    LinearDelta,
    LowRank,
    Replacement,
)
from serving.adapters.rows import Place, Rows, Segment, learning, parts

# A module's name, and what of it: its input changed, its output changed, or its input kept for a
# block elsewhere.
_Place = tuple[str, Literal["input", "output", "kept"]]


def low_rank_kernel(device: torch.device) -> Any:
    """What computes low-rank deltas of few rows in one call there: cpu_low_rank, gpu_low_rank,
    None."""
    is_cpu = device.type == "cpu"
    return cpu_low_rank if is_cpu else triton_kernels("serving.adapters.gpu_low_rank")


class DeltaHooks:
    """The hooks on one model. Used by one thread; changed only between forward passes."""

    def __init__(self, model: Any) -> None:
        self._modules: dict[str, torch.nn.Module] = dict(model.named_modules())
        self._head = model.get_output_embeddings()
        self._handles: dict[_Place, RemovableHandle] = {}
        self._users: dict[_Place, int] = {}
        self._body: Sequence[Segment] = ()
        self._head_rows: Sequence[Segment] = ()
        self._is_active = False  # outside of a step, modules are the base's own
        self._num_rows = 0  # of a padded batch
        self._rows: dict[str, Place] = {}  # where a module has them, by name
        self._tasks: dict[str, _Tasks] = {}  # of these segments, by module
        self._kept: dict[str, torch.Tensor] = {}  # inputs of this pass, by module
        self.queries: dict[int, torch.Tensor] = {}  # [T, H, D] of this pass, by layer
        self.has_queries = True  # whether passes note them

    def forget(self) -> None:
        """Take back what was learned."""
        self._rows.clear()

    @contextmanager
    def learning(
        self, num_rows: int, dim: int | None = None, width: int | None = None
    ) -> Generator[None]:
        """The scope of one forward pass of `num_rows` rows that shows where each module has
        them: tokens in [1, T, O], [T, O] in experts, [1, H, T, D] in norms of heads; or rows of a
        padded batch, which can only be in `dim`, or, where they are `width` tokens long, lie end to
        end. A module that shows them nowhere, or in two places, cannot be changed for some rows
        alone."""
        with learning(self._modules, self._rows.__setitem__, num_rows, dim, width):
            yield
        if self._head is not None:
            # It sees the wanted rows alone, as [1, N, hidden].
            head = [n for n, m in self._modules.items() if m is self._head]
            self._rows |= dict.fromkeys(head, Place(1))

    def check(self, deltas: Mapping[str, Delta]) -> None:
        """Raise AdapterError for a module that cannot be changed so for some rows alone."""
        if not self.has_queries and any(isinstance(d, GatedPrompt) for d in deltas.values()):
            raise AdapterError(
                "the adapter is a LLaMA-Adapter, which needs each layer's queries; this base's "
                "attention does not show them. Train a LoRA or prefix tuning instead"
            )
        unknown = next((name for name, _ in _places(deltas) if name not in self._modules), None)
        if unknown is not None:
            raise AdapterError(
                f"the adapter changes module {unknown!r}, which this base does not have; it was "
                "made for another base"
            )
        wrong = next((n for n, part in _places(deltas) if not self._fits(n, part, deltas)), None)
        if wrong is not None:
            raise AdapterError(
                f"the adapter changes module {wrong!r}, which does not see the tokens of a step "
                "one by one in this base (a router, an expert or a table of positions, say); leave "
                "it out of the adapter's targets"
            )

    def _fits(self, name: str, part: str, deltas: Mapping[str, Delta]) -> bool:
        place, delta = self._rows.get(name), deltas.get(name)
        if place is None:
            return False
        if part == "kept":
            return not place.is_flat
        if place.is_tuple:
            return isinstance(delta, Replacement)
        return not place.is_flat or isinstance(delta, LinearDelta | Replacement)

    def install(self, deltas: Mapping[str, Delta]) -> None:
        """Count one more adapter with these deltas, by module name."""
        for place in _places(deltas):
            self._users[place] = self._users.get(place, 0) + 1
            if self._users[place] == 1:
                name, part = place
                module = self._modules[name]
                if part == "output":
                    hook = self._output_hook(name, module)
                    self._handles[place] = module.register_forward_hook(hook, with_kwargs=True)
                else:
                    hook = self._input_hook(name) if part == "input" else self._keep_hook(name)
                    self._handles[place] = module.register_forward_pre_hook(hook)

    def uninstall(self, deltas: Mapping[str, Delta]) -> None:
        """Count one adapter less."""
        self._plan((), (), 0)
        for place in _places(deltas):
            self._users[place] -= 1
            if not self._users[place]:
                self._handles.pop(place).remove()

    @contextmanager
    def active(
        self, body: Sequence[Segment], head: Sequence[Segment], num_rows: int = 0
    ) -> Generator[None]:
        """The scope of one forward pass: `body` counts the step's tokens, or the `num_rows` rows of
        a padded batch, `head` the rows of which logits are made."""
        before = (self._body, self._head_rows, self._num_rows)
        if _key(body, head, num_rows) != _key(*before):
            self._plan(body, head, num_rows)  # steps that decode the same have the same tasks
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False
            self._kept.clear()
            self.queries.clear()

    def _plan(self, body: Sequence[Segment], head: Sequence[Segment], num_rows: int) -> None:
        self._body, self._head_rows, self._num_rows = body, head, num_rows
        self._tasks.clear()

    def _keep_hook(self, name: str) -> Any:
        def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._kept[name] = args[0]

        return keep

    def _input_hook(self, name: str) -> Any:
        place = self._rows[name]
        rows_dim = place.dim

        def scale(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
            x: torch.Tensor | None = None
            if not self._is_active:
                return None
            for segment in place.segments(self._body, self._num_rows, args[0].shape[rows_dim]):
                delta = segment.deltas.get(name)
                if isinstance(delta, LinearDelta) and delta.scale_I is not None:
                    x = args[0].clone() if x is None else x  # others may read the same input
                    rows = x.narrow(rows_dim, segment.start, segment.end - segment.start)
                    rows *= delta.scale_I
                elif isinstance(delta, GatedPrompt) and delta.is_projected:
                    x = args[0].clone() if x is None else x
                    rows = x.narrow(rows_dim, segment.start, segment.end - segment.start)
                    rows += self._gated(delta, segment).view(rows.shape)
            return None if x is None else (x, *args[1:])

        return scale

    def _gated(self, prompt: GatedPrompt, segment: Segment) -> torch.Tensor:
        """What the prompt gives the segment's queries, [rows, H D]."""
        query = self.queries[prompt.layer][segment.start : segment.end].transpose(0, 1)
        key, value = (t.transpose(0, 1) for t in (prompt.keys_PKD, prompt.values_PKD))
        parts = (query[None], key[None], value[None])
        output = scaled_dot_product_attention(*parts, enable_gqa=len(query) != len(key))
        return output[0].transpose(0, 1).flatten(1)

    def _output_hook(self, name: str, module: torch.nn.Module) -> Any:
        is_head, place = module is self._head, self._rows[name]
        rows_dim = place.dim

        def apply(
            _: torch.nn.Module, args: tuple[Any, ...], options: Mapping[str, Any], output: Any
        ) -> None:
            if not self._is_active:
                return
            tasks, entered = self._tasks.get(name), args[0]
            # This runs for every module of every step: what follows from shapes is kept.
            if tasks is None or not tasks.fit(entered, output):
                segments = self._head_rows
                if not is_head:
                    shown = parts(output)[0].shape[rows_dim]
                    segments = place.segments(self._body, self._num_rows, shown)
                tasks = self._tasks[name] = _tasks(name, segments, rows_dim, entered, output)
            for segment, delta in tasks.single:
                rows = Rows(rows_dim, parts(output)[0].shape[rows_dim], segment)
                if isinstance(delta, LinearDelta):
                    _add(rows.of(output), rows.of(args[0]), delta)
                    continue
                if isinstance(delta, GatedPrompt):
                    if not delta.is_projected:
                        y = rows.of(output)
                        y += self._gated(delta, segment).view(y.shape)
                    elif delta.shift_O is not None:
                        rows.of(output).add_(delta.shift_O)
                    continue
                if isinstance(delta, Block):
                    y = rows.of(output)
                    x = y if delta.source is None else rows.of(self._kept[delta.source])
                    y += _block(x, delta).view(y.shape)
                    continue
                own = ([rows.of(a) for a in args], {k: rows.of(v) for k, v in options.items()})
                replayed = _run_with(module, delta.parameters, *own)
                for part, new in zip(parts(output), parts(replayed), strict=True):
                    own_part = rows.of(part)
                    own_part.copy_(new.reshape(own_part.shape))
            if tasks.low_rank is not None:
                tasks.low_rank.add(output, entered)

        return apply


@dataclass(frozen=True)
class _Tasks:
    """What one step's segments do to one module's output: one by one, and then in one call, which
    is made for an input and an output of these forms."""

    single: Sequence[tuple[Segment, Delta]]
    low_rank: Any  # LowRankRows, or what is the same on a GPU
    forms: tuple[object, ...]

    def fit(self, x: Any, y: Any) -> bool:
        """Whether they are for this input and output."""
        return self.forms == _forms(x, y)


def _forms(x: Any, y: Any) -> tuple[object, ...]:
    y = parts(y)[0]
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return ()
    return x.shape, x.dtype, y.shape, y.dtype, y.is_contiguous()


def _tasks(name: str, segments: Sequence[Segment], rows_dim: int, x: Any, y: Any) -> _Tasks:
    row_tokens = _row_tokens(x, y, rows_dim)
    single: list[tuple[Segment, Delta]] = []
    parts: list[tuple[int, int, LinearDelta]] = []
    kernel = low_rank_kernel(x.device) if isinstance(x, torch.Tensor) else None
    for segment in segments:
        delta = segment.deltas.get(name)
        if isinstance(delta, LinearDelta) and row_tokens is not None and kernel is not None:
            start, end = segment.start * row_tokens, segment.end * row_tokens
            if kernel.takes(delta, end - start, x, y):
                parts.append((start, end, delta))
                delta = delta.without_low_rank
        if delta is not None:
            single.append((segment, delta))
    return _Tasks(single, kernel.together(parts) if kernel and parts else None, _forms(x, y))


def _row_tokens(x: Any, y: Any, rows_dim: int) -> int | None:
    """How many tokens stand for one row, if rows follow each other in memory; else None."""
    if not isinstance(y, torch.Tensor) or not isinstance(x, torch.Tensor):
        return None
    if x.dtype is not y.dtype or not y.is_contiguous() or y.shape[:-1] != x.shape[:-1]:
        return None
    before, after = y.shape[:rows_dim], y.shape[rows_dim + 1 : -1]
    return math.prod(after) if math.prod(before) == 1 else None


def _key(body: Sequence[Segment], head: Sequence[Segment], num_rows: int) -> list[object]:
    own = [[(part.start, part.end, id(part.deltas)) for part in side] for side in (body, head)]
    return [*own, num_rows]


def _places(deltas: Mapping[str, Delta]) -> Generator[_Place]:
    """Every module's output, its input where that is scaled, and what blocks read elsewhere."""
    for name, delta in deltas.items():
        yield name, "output"
        if isinstance(delta, LinearDelta) and delta.scale_I is not None:
            yield name, "input"
        if isinstance(delta, GatedPrompt) and delta.is_projected:
            yield name, "input"
        if isinstance(delta, Block) and delta.source is not None:
            yield delta.source, "kept"


def _add(y: torch.Tensor, x: torch.Tensor, delta: LinearDelta) -> None:
    """y = scale ∘ y + (x A) B + x D + x S + shift, in place. y is [..., O]; x [..., I], or token
    ids for an embedding."""
    if delta.scale_O is not None:
        y *= delta.scale_O
    if delta.a_Ir is not None and delta.b_rO is not None:
        is_hidden = x.is_floating_point()
        low_Tr = product(x.flatten(0, -2), delta.a_Ir.T) if is_hidden else delta.a_Ir[x.flatten()]
        y.view(-1, y.shape[-1]).addmm_(low_Tr, delta.b_rO, alpha=delta.factor)
    if delta.dense_IO is not None:
        y.view(-1, y.shape[-1]).add_(product(x.flatten(0, -2), delta.dense_IO.T))
    if delta.sparse is not None:
        y += _times_sparse(x, delta.sparse).reshape(y.shape)
    if delta.shift_O is not None:
        y += delta.shift_O


def _block(x: torch.Tensor, block: Block) -> torch.Tensor:
    """What the block adds, [rows, H] for x [..., H]."""
    low_TR = torch.addmm(block.down_R, x.flatten(0, -2), block.down_HR)
    return torch.addmm(block.up_H, ACTIVATIONS[block.activation](low_TR), block.up_RH)


def _times_sparse(x: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """x S, [rows, O] in float32; see LinearDelta."""
    if not x.is_floating_point():
        return _rows_of(sparse, x.flatten())
    return torch.mm(sparse, x.flatten(0, -2).T.to(sparse.dtype)).T


def _rows_of(sparse: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
    """Rows of a CSR matrix, dense. (`index_select` of a large one leaves inference mode in its
    threads, and fails there.)"""
    first, place = sparse.crow_indices(), sparse.col_indices()
    count_T = first[ids_T + 1] - first[ids_T]
    row = torch.arange(len(ids_T), device=ids_T.device).repeat_interleave(count_T)
    before_T = count_T.cumsum(0) - count_T
    index = (first[ids_T] - before_T)[row] + torch.arange(len(row), device=ids_T.device)
    dense = sparse.values().new_zeros(len(ids_T), sparse.shape[1])
    dense[row, place[index]] = sparse.values()[index]
    return dense


class _Experts:
    """A stack p of matrices and its change, of which a forward asks for one expert at a time."""

    def __init__(self, own: torch.Tensor, change: LowRank) -> None:
        self._own, self._change = own, change

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        left, right = self._change.left[expert], self._change.right[expert]
        return torch.addmm(self._own[expert], left, right)


def _run_with(
    module: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor | LowRank],
    args: Sequence[Any],
    options: Mapping[str, Any],
) -> Any:
    """The module's own output, with other parameters and without hooks."""
    forward: Callable[..., Any] = module.forward
    # A module's attribute hides its parameter of that name.
    for name, value in parameters.items():
        if not isinstance(value, LowRank):
            module.__dict__[name] = value
        elif value.left.ndim == 3 and hasattr(module, "has_gate"):
            # Whatever way transformers' classes of experts go (`has_gate` is of these), each has
            # one that takes those that are asked for one by one: a change is as cheap as they are
            # few.
            module.__dict__[name] = _Experts(module.get_parameter(name), value)
            forward = partial(inspect.unwrap(type(module).forward), module)
        else:
            module.__dict__[name] = value.added_to(module.get_parameter(name))
    try:
        return forward(*args, **options)
    finally:
        for name in parameters:
            del module.__dict__[name]
