"""What an fp16 run's loss is multiplied by, so that small gradients are not rounded to 0.

float16 ends at 6e-8 and at 65,504. Backward starts from loss x scale, and the gradients, float32
where they are summed, are divided by it (Micikevicius et al. 2018, arXiv:1710.03740). The scale is
a power of two, so it changes no digit of what neither under- nor overflows. The usual scalers drop
the batch of a step that overflowed; here the step is done again with half the scale, so that no row
is lost. Knows numbers; no models.
"""

from __future__ import annotations

_FIRST = 2.0**16
_LEAST, _MOST = 1.0, 2.0**24
_GROWS_AFTER = 1_000  # steps that all were finite


class LossScale:
    """The scale of one run. `value` and `good_steps` are what a checkpoint keeps of it.

    Args:
        is_dynamic: Whether it is used at all; if not, it stays 1.
        value: Where a run goes on; None for the first of all.
    """

    def __init__(
        self, *, is_dynamic: bool, value: float | None = None, good_steps: int = 0
    ) -> None:
        self.is_dynamic = is_dynamic
        self.value = (value or _FIRST) if is_dynamic else 1.0
        self.good_steps = good_steps

    def grow(self) -> None:
        """A step was finite; double the scale if so many were."""
        self.good_steps += self.is_dynamic
        if self.is_dynamic and self.good_steps % _GROWS_AFTER == 0:
            self.value = min(_MOST, self.value * 2)

    def halve(self) -> bool:
        """A step overflowed; returns whether it is worth another try."""
        self.value, self.good_steps = self.value / 2, 0
        return self.is_dynamic and self.value >= _LEAST
