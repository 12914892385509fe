"""What is behind an output embedding: the loss by parts, so that no [N, V] exists.

N label tokens    R of them at once    V vocabulary    H hidden
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.func import functional_call

# Rows of logits that exist at once: 128 x 128,000 in float32 are 64 MiB.
_LOGIT_ROWS = 128
# What gradients of float16 logits, none over 1, are multiplied by while they are that: a share of
# 1e-6 is then no longer rounded to the next 6e-8, and the head's weights may be up to 100.
_FLOAT16_GAIN = 2.0**8
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")  # of a module


class HeadLoss(torch.autograd.Function):
    """Cross entropy behind an output embedding, summed, with its gradients made on the way.

    Each part of logits serves the loss and the gradients at once, so neither logits nor their
    gradient exist in full, and nothing is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        targets_N: torch.Tensor,
        head: torch.nn.Module,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        """The sum, float32; `trained` are all of the head's parameters that want gradients. Without
        these and with hidden states that want none, no gradient is made."""
        loss = hidden_NH.new_zeros((), dtype=torch.float32)
        learns = any(ctx.needs_input_grad)
        gain = _FLOAT16_GAIN if hidden_NH.dtype == torch.float16 else 1.0
        gradients = [torch.zeros_like(tensor) for tensor in (hidden_NH, *trained) if learns]
        # Not the parameters themselves: hooks on them run once, when the whole gradient is there.
        names = [name for name, p in head.named_parameters() if learns and p.requires_grad]
        aliases = [tensor.detach().requires_grad_() for tensor in trained]
        parameters = dict(zip(names, aliases, strict=True))
        for start in range(0, len(targets_N), _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            hidden_RH = hidden_NH[rows].detach().requires_grad_()
            with torch.set_grad_enabled(learns):
                logits_RV = functional_call(head, parameters, (hidden_RH,))
            target_R1 = targets_N[rows, None]
            gradient_RV = logits_RV.detach().float()
            log_sum_R1 = gradient_RV.logsumexp(-1, keepdim=True)
            loss += (log_sum_R1 - gradient_RV.gather(-1, target_R1)).sum()
            if not learns:
                continue
            # In place, of float32 logits too: a linear head's backward does not read them.
            gradient_RV.sub_(log_sum_R1).exp_()
            gradient_RV.scatter_add_(-1, target_R1, -torch.ones_like(log_sum_R1)).mul_(gain)
            parts = torch.autograd.grad(
                logits_RV, (hidden_RH, *aliases), gradient_RV.to(logits_RV.dtype)
            )
            gradients[0][rows] = parts[0]
            for whole, part in zip(gradients[1:], parts[1:], strict=True):
                whole += part
        ctx.save_for_backward(*gradients)
        ctx.gain = gain
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the hidden states and of what is trained in the head."""
        # In float32: a loss scale over few label tokens is more than float16 holds.
        scale = grads[0] / ctx.gain
        first, *others = ((g.float() * scale).to(g.dtype) for g in ctx.saved_tensors)
        return first, None, None, *others


class HeadAt:
    """The scope of a forward pass in which the output embedding sees label positions alone.

    `hidden_NH` is what it would have seen. Unless `whole`, it gets only the first of them, to
    satisfy the model that calls it. Soft prompts of a padded pass make the sequence longer at
    its front, so positions count from the end. `within` is called with `hidden_NH` inside its
    forward, where it may be called without its hooks.
    """

    hidden_NH: torch.Tensor

    def __init__(
        self,
        base: Any,
        chosen_BT: torch.Tensor,
        *,
        whole: bool,
        within: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._chosen_BT, self._whole, self._within = chosen_BT, whole, within
        self._head = base.get_output_embeddings()

    def __enter__(self) -> HeadAt:
        self._own = self._head.__dict__.get("forward")
        if self._within is not None:
            self._head.forward = partial(self._forward, self._head.forward, self._within)
        self._hook = self._head.register_forward_pre_hook(self._select)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        if self._within is not None:
            self._restore()

    def _select(self, _: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        self.hidden_NH = args[0][:, -self._chosen_BT.shape[1] :][self._chosen_BT]
        return (self.hidden_NH if self._whole else self.hidden_NH[:1],)

    def _forward(
        self,
        own: Callable[[torch.Tensor], torch.Tensor],
        within: Callable[[torch.Tensor], None],
        first_1H: torch.Tensor,
    ) -> torch.Tensor:
        self._restore()
        hooks = {name: self._head.__dict__[name] for name in _HOOKS}
        self._head.__dict__.update({name: type(found)() for name, found in hooks.items()})
        try:
            within(self.hidden_NH)
        finally:
            self._head.__dict__.update(hooks)
        return own(first_1H)

    def _restore(self) -> None:
        """Give the head its own forward back; some methods gave it another than its class's."""
        if self._own is not None:
            self._head.forward = self._own
        else:
            self._head.__dict__.pop("forward", None)
