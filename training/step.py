"""One forward pass and its exact loss.

    T tokens of the micro-batch    P virtual tokens    N label tokens    V vocabulary    H hidden

A step's loss is the sum of the negative log-likelihoods of its label tokens over their number,
counted over all workers and micro-batches, so it does not depend on how the step is cut. Rows lie
end to end without padding where the base allows it (training.packed). Logits are made for label
positions alone and, where nothing behind the output embedding changes them, a few rows at a time:
then no [N, V] exists either. Knows nothing of optimisers or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from cluster.errors import BaseModelError, SpecError
from training.contact import stays_apart, takes_positions
from training.head_loss import HeadAt, HeadLoss
from training.lora_linear import fuse_loras
from training.packed import NAME, Layout, check_packable, packed, prefix_of, recomputation
from training.rows import IGNORE
from training.shortage import lacks_memory

# Of a spec's `precision`.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE_LENGTHS = (5, 9, 2)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Batch:
    """The rows of a micro-batch end to end: `ids_T`, the next token's label `targets_T` (int64),
    and where each row starts and ends."""

    ids_T: torch.Tensor
    targets_T: torch.Tensor
    bounds: Sequence[tuple[int, int]]


def collate(rows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Batch:
    """(ids, labels) rows to a batch; target t is label t + 1, a row's last one none."""
    ids: list[int] = []
    targets: list[int] = []
    bounds: list[tuple[int, int]] = []
    for row_ids, row_labels in rows:
        bounds.append((len(ids), len(ids) + len(row_ids)))
        ids += row_ids
        targets += [*row_labels[1:], IGNORE]
    return Batch(
        torch.tensor(ids, device=device), torch.tensor(targets, device=device), tuple(bounds)
    )


def padded(
    values_T: torch.Tensor, bounds: Sequence[tuple[int, int]], fill: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that lie end to end, as (int64 [B, longest] with `fill` behind them, its mask)."""
    length = max(end - start for start, end in bounds)
    values_BT = values_T.new_full((len(bounds), length), fill)
    mask_BT = torch.zeros_like(values_BT)
    for row, (start, end) in enumerate(bounds):
        values_BT[row, : end - start] = values_T[start:end]
        mask_BT[row, : end - start] = 1
    return values_BT, mask_BT


@dataclass
class Continuation:
    """One row that is being continued: all its ids, and the base's keys and values of those that
    it has seen (none for a base that keeps none: it reads the row anew for each token)."""

    ids: list[int]
    cache: Any = None


class LossModel(torch.nn.Module):
    """A model with its method on; its forward is the loss of a batch, or a row's next logits.

    When it is made, it runs a small batch in each way, and takes packing only where rows stay apart
    and are what they are alone, and the loss by parts only where nothing changes the head's logits:
    other bases are padded, or have whole logits.

    Args:
        precision: What matrix products are computed in; the base's own dtype if not given.
        is_sharded: Weights are not here outside their own module's forward (ZeRO 3), so the loss
            is made within the output embedding's; of a trained or adapted one, logits are whole.
        recomputes: Backward computes each layer again, of which only the input is kept (gradient
            checkpointing, Chen et al. 2016, arXiv:1604.06174).

    Raises:
        BaseModelError: the base fails, or gives a row other states beside longer ones.
        SpecError: the base or the method cannot be computed again.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        precision: torch.dtype | None = None,
        is_sharded: bool = False,
        recomputes: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # Any: PEFT's wrappers and transformers' models have no common type.
        whole: Any = model
        self._base: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        with _named(self._base):
            embedding = self._base.get_input_embeddings().weight
        self._device_type: str = embedding.device.type
        self._precision: torch.dtype = precision or embedding.dtype
        config: Any = getattr(model, "active_peft_config", None)
        self._soft_prompt: str | None = (
            config.peft_type.value if config is not None and config.is_prompt_learning else None
        )
        self.virtual_tokens: int = getattr(config, "num_virtual_tokens", 0)
        self.is_packed = self.has_plain_head = False
        self._is_sharded = is_sharded
        self._within_head: Callable[[torch.Tensor], None] | None = None
        if not is_sharded:
            fuse_loras(model)
        self._choose()
        if recomputes:
            self._recompute()

    def forward(self, asked: Batch | Continuation) -> torch.Tensor:
        """Of a batch: the sum of the label tokens' negative log-likelihoods, float32 scalar with a
        graph. Of a continuation: the next token's logits [V], and its cache grows.

        One call for both, because under ZeRO 3 parameters are gathered around this call alone.
        """
        with self.autocast():
            if isinstance(asked, Continuation):
                return self._next_logits(asked)
            targets_N = asked.targets_T[asked.targets_T != IGNORE]
            if self._is_sharded and self.has_plain_head:
                return self._loss_within_head(asked, targets_N)
            return self.loss(*self.outputs(asked), targets_N)

    def autocast(self) -> AbstractContextManager[object]:
        """The scope of a forward pass: what a method trains is float32 beside a base in half
        precision. Entered here, as DeepSpeed's engine ends a scope around it; its own would add up
        gradients in half precision."""
        if self._precision == torch.float32:
            return nullcontext()
        return torch.autocast(self._device_type, self._precision)

    @property
    def base(self) -> Any:
        """The transformers model, with the method's modules in it."""
        return self._base

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [N, H], logits [N, V]) at label positions; the logits are of no use where
        `has_plain_head`."""
        return self._run_packed(batch) if self.is_packed else self._run(batch)

    def loss(
        self, hidden_NH: torch.Tensor, logits_NV: torch.Tensor, targets_N: torch.Tensor
    ) -> torch.Tensor:
        """The sum of the negative log-likelihoods, of `outputs`."""
        if not self.has_plain_head:
            return cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        head = self._base.get_output_embeddings()
        learns = torch.is_grad_enabled()
        trained = [p for p in head.parameters() if learns and p.requires_grad]
        loss: Any = HeadLoss.apply(hidden_NH, targets_N, head, *trained)
        return loss

    def _loss_within_head(self, batch: Batch, targets_N: torch.Tensor) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        self._within_head = lambda hidden_NH: losses.append(
            self.loss(hidden_NH, hidden_NH, targets_N)
        )
        try:
            self.outputs(batch)
        finally:
            self._within_head = None
        return losses[0]

    def _head_at(self, chosen_BT: torch.Tensor) -> HeadAt:
        whole = not self.has_plain_head
        return HeadAt(self._base, chosen_BT, whole=whole, within=self._within_head)

    def _run(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden [N, H], logits [N, V]) at label positions, rows padded on the right."""
        ids_BL, mask_BL = padded(batch.ids_T, batch.bounds, 0)
        targets_BL, _ = padded(batch.targets_T, batch.bounds, IGNORE)
        with self._head_at(targets_BL != IGNORE) as head:
            logits = self.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
        return head.hidden_NH, logits

    def _run_packed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for rows end to end."""
        model, inputs, layout = self._packed_inputs(batch)
        chosen_T = batch.targets_T != IGNORE
        if (grown := layout.bounds[0][1] - batch.bounds[0][1]) > 0:
            chosen_T = _in_front(chosen_T.new_zeros(grown), chosen_T, batch.bounds)
        with packed(layout), self._head_at(chosen_T[None]) as head:
            logits = model(**inputs, use_cache=False).logits
        return head.hidden_NH, logits

    def _packed_inputs(self, batch: Batch) -> tuple[Any, dict[str, torch.Tensor], Layout]:
        """(the module to run, its inputs, where each row lies); soft prompts are put in front of
        each row here."""
        inputs: dict[str, torch.Tensor] = {"input_ids": batch.ids_T[None]}
        layout, model, first = Layout(batch.bounds), self.model, 0
        if self._soft_prompt is not None:
            prompt: Any = self.model.get_prompt(1)  # type: ignore[operator]
            model = self._base
            if self._soft_prompt == "PREFIX_TUNING":
                prefix = prefix_of(prompt)
                layout, first = Layout(batch.bounds, prefix), prefix[0][0].shape[2]
            else:
                embeddings_TH = self._base.get_input_embeddings()(batch.ids_T)
                inputs = {"inputs_embeds": _in_front(prompt[0], embeddings_TH, batch.bounds)[None]}
                layout = Layout(_grown(batch.bounds, prompt.shape[1]))
        positions_T = torch.cat(
            [torch.arange(first, first + end - start) for start, end in layout.bounds]
        )
        inputs["position_ids"] = positions_T.to(batch.ids_T.device)[None]
        return model, inputs, layout

    def _next_logits(self, row: Continuation) -> torch.Tensor:
        is_fresh, model = row.cache is None, self.model
        device = self._base.get_input_embeddings().weight.device
        ids_1T = torch.tensor([row.ids if is_fresh else row.ids[-1:]], device=device)
        inputs: dict[str, Any] = {"input_ids": ids_1T, "past_key_values": row.cache}
        if self._soft_prompt is not None:
            model = self._base
            prompt: Any = self.model.get_prompt(1) if is_fresh else None  # type: ignore[operator]
            if is_fresh and self._soft_prompt == "PREFIX_TUNING":
                inputs["past_key_values"] = prompt
            elif is_fresh:
                embeddings_1TH = self._base.get_input_embeddings()(ids_1T)
                prompt = prompt.to(embeddings_1TH.dtype)
                inputs["inputs_embeds"] = torch.cat([prompt, embeddings_1TH], 1)
                del inputs["input_ids"]
        last = torch.ones((1, 1), dtype=torch.bool, device=device)
        with self._unpacked(), HeadAt(self._base, last, whole=True):
            output = model(**inputs, use_cache=True)
        row.cache = getattr(output, "past_key_values", None)
        return output.logits.flatten()

    @contextmanager
    def _unpacked(self) -> Generator[None]:
        """A scope in which the base computes its attention as it does without us."""
        if self.is_packed:
            self._base.set_attn_implementation(self._own_attention)
        try:
            yield
        finally:
            if self.is_packed:
                self._base.set_attn_implementation(NAME)

    def _recompute(self) -> None:
        if not self._base.supports_gradient_checkpointing:
            raise SpecError(
                f"gradient_checkpointing: {type(self._base).__name__} cannot compute layers again; "
                "leave it out"
            )
        if self._soft_prompt == "PREFIX_TUNING" and not self.is_packed:
            # Its layers would drop the cache that a padded pass hands the prefix over in.
            raise SpecError(
                "gradient_checkpointing: does not fit prefix_tuning on "
                f"{type(self._base).__name__}, whose rows cannot be packed; leave it out, or take "
                "prompt_tuning or p_tuning"
            )
        # PEFT refuses prefix tuning on a model that has it; so after the method.
        self._base.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": recomputation}
        )

    def _choose(self) -> None:
        """Set `is_packed` and `has_plain_head` by what agrees with each row alone."""
        with _named(self._base), torch.no_grad(), self.autocast():
            self._compare(self._base.get_input_embeddings().weight)

    def _compare(self, parameter: torch.Tensor) -> None:
        rows = [([n + i for i in range(n)], [n + i for i in range(n)]) for n in PROBE_LENGTHS]
        batch = collate(rows, parameter.device)
        was_training = self.training
        self.eval()
        padded_NH = self._compare_head(batch)
        alone_NH = torch.cat([self._run(collate([row], parameter.device))[0] for row in rows])
        limit = TOLERANCE[self._precision] * max(1e-6, float(alone_NH.abs().max()))
        labels = [n - 1 for n in PROBE_LENGTHS]

        def agrees() -> bool:
            packed_NH, _ = self._run_packed(batch)
            return bool((packed_NH - alone_NH).abs().max() <= limit) and stays_apart(
                self._base, batch.bounds, lambda: torch.split(self._run_packed(batch)[0], labels)
            )

        self._try_packing(agrees)
        # Refused for good, so not for rounding alone, which may send a token to another expert.
        slack = 1 if self._precision == torch.float32 else 4
        if not self.is_packed and (padded_NH - alone_NH).abs().max() > slack * limit:
            raise BaseModelError(
                f"{type(self._base).__name__} gives other states to a row beside longer ones; name "
                "a base of another family"
            )
        self.train(was_training)

    def _compare_head(self, batch: Any) -> torch.Tensor:
        """Set `has_plain_head`; returns the padded pass's hidden states [N, H]."""
        made: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, __: Any, output: torch.Tensor) -> None:
            made.append(output.clone())  # a base may cap them in place

        hook = self._base.get_output_embeddings().register_forward_hook(keep)
        try:
            hidden_NH, logits_NV = self._run(batch)
        finally:
            hook.remove()
        # To the bit: a soft cap moves the logits of a short trial by less than bfloat16 rounds.
        is_same = torch.equal(made[0].to(logits_NV.dtype), logits_NV)
        self.has_plain_head = is_same and self._has_head_here()
        return hidden_NH

    def _has_head_here(self) -> bool:
        """Whether the head's weights are here all the time that its loss takes. Under ZeRO 3 those
        of modules within it, as PEFT's have, are not in its own forward, and no trained one is
        where its gradient arrives."""
        head = self._base.get_output_embeddings()
        is_trained = any(parameter.requires_grad for parameter in head.parameters())
        return not (self._is_sharded and (is_trained or any(head.children())))

    def _try_packing(self, agrees: Callable[[], bool]) -> None:
        """Set `is_packed`, and leave the base attending so, if its packed rows agree with what they
        are alone. What a base raises that cannot be packed says that they do not."""
        self._own_attention = self._base.config._attn_implementation
        try:
            check_packable(self._base.config)
            self._base.set_attn_implementation(NAME)
            self.is_packed = takes_positions(self._base) and agrees()
        except (BaseModelError, ValueError, RuntimeError, TypeError, AttributeError, LookupError):
            self.is_packed = False
        if not self.is_packed:
            self._base.set_attn_implementation(self._own_attention)


@contextmanager
def _named(base: Any) -> Generator[None]:
    """A scope in which a base that fails on a small batch is refused by name."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if lacks_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise BaseModelError(
            f"{type(base).__name__} does not compute rows of several lengths as training needs it "
            f"({reason}); name a base of another family"
        ) from error


def _in_front(
    prompt_P: torch.Tensor, values_T: torch.Tensor, bounds: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """`values_T` with `prompt_P` in front of each row."""
    prompt_P = prompt_P.to(values_T.dtype)
    return torch.cat([part for a, b in bounds for part in (prompt_P, values_T[a:b])])


def _grown(bounds: Sequence[tuple[int, int]], by: int) -> list[tuple[int, int]]:
    """The bounds of rows that each got `by` tokens more in front."""
    return [(a + row * by, b + (row + 1) * by) for row, (a, b) in enumerate(bounds)]
