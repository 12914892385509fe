"""One forward and backward for several adapters over one base.

    T tokens of all micro-batches    N label tokens    H hidden    V vocabulary    I in    O out

Each adapter has a model of its own, as if it were alone, whose base shares the frozen weights. The
micro-batches of all lie end to end in one sequence, each adapter's tokens in one segment. A frozen
linear module is computed once for all tokens, and its backward too; each adapter then changes its
own segment. Any other module that an adapter changes is that adapter's module on its segment. No
row sees another, so each adapter's loss and gradients are those that it would have alone. Knows
models and batches; no optimisers, no data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from cluster.errors import BaseModelError, SpecError
from cluster.linear import is_plain
from cluster.quantized_linear import is_quantized
from training.lora_linear import Segment, lora_linear, plain_lora, weight_and_bias
from training.rows import IGNORE
from training.step import TOLERANCE, Batch, LossModel, collate

_PROBE_TOKENS = 5


def sharing(base: Any) -> Any:
    """A copy of `base` that shares its matrices. Vectors are its own: methods train biases and
    norms in place."""
    shared = {id(p): p for p in base.parameters() if p.ndim > 1}
    return copy.deepcopy(base, shared)


class Draws:
    """A random stream of its own, as a run alone has: dropout must not depend on the others."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, list[torch.Tensor]()

    @contextmanager
    def __call__(self) -> Generator[None]:
        """The scope in which torch's default generators are those of this stream."""
        on_gpu = self._device.type == "cuda"
        with torch.random.fork_rng([self._device] if on_gpu else []):
            if self._own:
                torch.set_rng_state(self._own[0])
            if self._own and on_gpu:
                torch.cuda.set_rng_state(self._own[1], self._device)
            yield
            self._own = [torch.get_rng_state()]
            if on_gpu:
                self._own.append(torch.cuda.get_rng_state(self._device))


class _Part(NamedTuple):
    """The tokens of one adapter in the pass."""

    name: str
    start: int
    end: int


class SharedPass:
    """The pass of several models over what they share.

    Args:
        base: The base's model without any method, whose matrices the models' bases share. It is
            changed.
        models: By adapter; each is left usable on its own.
        draws: The random stream that each adapter's dropout takes from.

    Raises:
        SpecError: the base, or a method on it, cannot be computed so.
    """

    host_model: type[LossModel] = LossModel

    def __init__(
        self,
        base: Any,
        models: Mapping[str, LossModel],
        draws: Mapping[str, Callable[[], AbstractContextManager[None]]],
        *,
        recomputes: bool = False,
    ) -> None:
        self._models, self._draws = models, draws
        self._parts: list[_Part] = []
        self._token_dims: dict[torch.nn.Module, int] = {}
        self._host = self.host_model(base.requires_grad_(False).train(), recomputes=recomputes)
        self._check(recomputes)
        self._check_heads(base)
        self._join(base)
        self._compare()

    def losses(self, batches: Mapping[str, Batch]) -> dict[str, torch.Tensor]:
        """By adapter, the sum of its label tokens' negative log-likelihoods: float32 scalars with
        one graph."""
        joined = _joined(list(batches.values()))
        self._parts, start = [], 0
        for name, batch in batches.items():
            self._parts.append(_Part(name, start, start + len(batch.ids_T)))
            start += len(batch.ids_T)
        targets = [batch.targets_T[batch.targets_T != IGNORE] for batch in batches.values()]
        counts = [len(part) for part in targets]
        with self._host.autocast():
            hidden_NH, logits_NV = self._host.outputs(joined)
            hidden = hidden_NH.split(counts)
            logits = [logits_NV] * len(counts)
            if not self._host.has_plain_head:
                logits = logits_NV.split(counts)
            return {
                name: self._models[name].loss(*found)
                for name, *found in zip(batches, hidden, logits, targets, strict=True)
            }

    def _check(self, recomputes: bool) -> None:
        if not self._host.is_packed:
            raise SpecError(
                f"adapters: the rows of {type(self._host.base).__name__} cannot lie end to end, so "
                "several adapters cannot share a pass over it; train them one by one"
            )
        for name, model in self._models.items():
            if recomputes and any(True for _ in _dropouts(model)):
                raise SpecError(
                    f"adapters.{name}: its dropout, or the base's, would draw anew where "
                    "gradient_checkpointing computes a layer again; leave out one of the two"
                )

    def _check_heads(self, base: Any) -> None:
        """Refuse an adapter that changes the output embedding where the pass takes the host's
        whole logits: its own would never be called, nor learn."""
        if self._host.has_plain_head:
            return
        head = base.get_output_embeddings()
        for name, model in self._models.items():
            if _is_changed(model.base.get_output_embeddings(), head):
                raise SpecError(
                    f"adapters.{name}: it changes the output embedding of {type(base).__name__}, "
                    "which scales or caps its logits, so that all adapters' are made at once; "
                    "train this one alone"
                )

    def _join(self, base: Any) -> None:
        """Let every module that an adapter changes be computed segment by segment."""
        head, joined = base.get_output_embeddings(), "."
        for name, module in base.named_modules():
            if not name or module is head or name.startswith(joined):
                continue
            own = {
                adapter: model.base.get_submodule(name) for adapter, model in self._models.items()
            }
            if any(_is_changed(each, module) for each in own.values()):
                joined = f"{name}."  # what is inside is the adapters' own
                module.forward = partial(self._forward, module, own, module.forward)

    def _forward(
        self,
        module: Any,
        own: Mapping[str, Any],
        unchanged: Callable[[torch.Tensor], torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`module`'s forward, which was `unchanged`, with what the adapters have in its place."""
        if len(args) != 1 or kwargs:
            raise BaseModelError(
                f"{type(module).__name__} gets more than its tokens, which cannot be parted"
            )
        x: torch.Tensor = args[0]
        dim = self._token_dim(module, x)
        is_flat = dim == x.ndim - 2 and x.numel() == x.shape[dim] * x.shape[-1]
        is_linear = is_plain(module) or is_quantized(module)
        if is_linear and is_flat:
            return self._linear(module, own, unchanged, x, dim)
        outputs: list[torch.Tensor] = []
        for part, own_x in zip(self._parts, self._split(x, dim), strict=True):
            with self._drawn(part.name, own[part.name]):
                outputs.append(own[part.name](own_x))
        return torch.cat(outputs, dim)

    def _linear(
        self,
        module: Any,
        own: Mapping[str, Any],
        unchanged: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        dim: int,
    ) -> torch.Tensor:
        """W x + b once, with each adapter's change of it. x [1, T, I] or [T, I]."""
        x = self._scaled(own, x, dim)
        segments: list[Segment] = []
        factors: list[torch.Tensor] = []
        others: list[int] = []
        for index, (name, start, end) in enumerate(self._parts):
            lora = _plain_lora(own[name])
            if lora is not None:
                factors += lora[:2]
                segments.append(Segment(start, end, lora[2]))
            elif _is_changed(own[name], module):
                others.append(index)
        if segments:
            y = lora_linear(x, *weight_and_bias(module), tuple(segments), *factors)
        else:
            y = unchanged(x)
        if not others:
            return y
        # Unsafe where y itself is read afterwards, which it is not: PEFT may add to parts in place.
        ys = list(y.unsafe_split_with_sizes([end - start for _, start, end in self._parts], dim))
        xs = self._split(x, dim)
        for index in others:
            name = self._parts[index].name
            with self._drawn(name, own[name]):
                ys[index] = _changed(own[name], module, xs[index], ys[index])
        return torch.cat(ys, dim)

    def _scaled(self, own: Mapping[str, Any], x: torch.Tensor, dim: int) -> torch.Tensor:
        """x with the segments scaled of those adapters that change the module's input."""
        scales = [_input_scale(own[part.name]) for part in self._parts]
        if all(scale is None for scale in scales):
            return x
        parts = [
            own_x if scale is None else (own_x * scale).to(x.dtype)
            for scale, own_x in zip(scales, self._split(x, dim), strict=True)
        ]
        return torch.cat(parts, dim)

    def _split(self, x: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
        return x.split([end - start for _, start, end in self._parts], dim)

    def _token_dim(self, module: torch.nn.Module, x: torch.Tensor) -> int:
        """Where the tokens of `x` are; learned when this is made, of a pass whose number of tokens
        is no other size of the base."""
        if module not in self._token_dims:
            tokens = self._parts[-1].end
            if list(x.shape).count(tokens) != 1:
                raise BaseModelError(
                    f"{type(module).__name__} sees {tuple(x.shape)} of {tokens} tokens"
                )
            self._token_dims[module] = list(x.shape).index(tokens)
        return self._token_dims[module]

    @contextmanager
    def _drawn(self, name: str, own: torch.nn.Module) -> Generator[None]:
        if own.training and any(True for _ in _dropouts(own)):
            with self._draws[name]():
                yield
        else:
            yield

    def _compare(self) -> None:
        """Learn where the tokens are, and check that each adapter's loss is the one it has alone,
        dropout included.

        Raises:
            SpecError: it is not.
        """
        embedding = self._host.base.get_input_embeddings().weight
        batches = self._probes(embedding.device)
        tolerance = TOLERANCE[embedding.dtype]
        alone: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, model in self._models.items():
                with self._draws[name]():
                    torch.manual_seed(0)
                    alone[name] = model(batches[name])
                with self._draws[name]():
                    torch.manual_seed(0)
            try:
                found = self.losses(batches)
            except BaseModelError as error:
                raise SpecError(f"adapters: {error.message}; train them one by one") from error
        for name, loss in found.items():
            # Weights that diverged go on to their own end.
            is_finite = bool(alone[name].isfinite())
            if is_finite and not torch.isclose(loss, alone[name], rtol=tolerance, atol=tolerance):
                raise SpecError(
                    f"adapters.{name}: has another loss beside the others ({float(loss):.6g}) than "
                    f"alone ({float(alone[name]):.6g}) on {type(self._host.base).__name__}. If its "
                    "config has dropout above 0 (of attention, say), set that to 0, or train the "
                    "adapters one by one"
                )

    def _probes(self, device: torch.device) -> dict[str, Batch]:
        """A row for each adapter, together of a length that is no other size of the base."""
        base = self._host.base
        sizes = {size for parameter in base.parameters() for size in parameter.shape}
        sizes |= {size for size in base.config.to_dict().values() if isinstance(size, int)}
        length = _PROBE_TOKENS
        while sum(length + n for n in range(len(self._models))) in sizes:
            length += 1
        ids = [[*range(n, n + length + n)] for n in range(len(self._models))]
        rows = zip(self._models, ids, strict=True)
        return {name: collate([(own, own)], device) for name, own in rows}


def _joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all, end to end."""
    bounds: list[tuple[int, int]] = []
    start = 0
    for batch in batches:
        bounds += [(a + start, b + start) for a, b in batch.bounds]
        start += len(batch.ids_T)
    ids_T = torch.cat([batch.ids_T for batch in batches])
    return Batch(ids_T, torch.cat([batch.targets_T for batch in batches]), bounds)


def _is_changed(own: torch.nn.Module, module: torch.nn.Module) -> bool:
    """Whether an adapter's module is not just the base's, or draws random numbers."""
    trained = any(p.requires_grad for p in own.parameters(recurse=False))
    return type(own) is not type(module) or trained or own in _dropouts(own)


def _dropouts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout) and part.p:
            yield part


def _plain_lora(own: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    from peft.tuners.lora import Linear

    return plain_lora(own) if type(own) is Linear else None


def _input_scale(own: Any) -> torch.Tensor | None:
    """IA3's factors [I] of a feed-forward module's input."""
    from peft.tuners.ia3 import IA3Layer

    is_scaled = isinstance(own, IA3Layer) and own.is_feedforward
    return own.ia3_l["default"].flatten() if is_scaled else None


def _changed(own: Any, module: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What an adapter makes of y = W x + b: its own module's output, whose product this is.

    Its bias may be trained; PEFT's module then calls its base layer once, which answers with y.
    """
    layer = getattr(own, "base_layer", own)
    if layer.bias is not None and layer.bias.requires_grad:
        shift = layer.bias if module.bias is None else layer.bias - module.bias
        y = y + shift.to(y.dtype)
    if layer is own or _input_scale(own) is not None:
        return y

    def product(*_: Any, **__: Any) -> torch.Tensor:
        return y

    before = vars(layer).get("forward")  # a quantised module has one of its own
    layer.forward = product
    try:
        return own(x)
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
