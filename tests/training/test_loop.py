"""What the loop does by itself: the rate of each step."""

import pytest

from training.loop import learning_rate
from training.spec import OptimizerSpec


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.5, 0.00030458650), ("linear", 0.5, 1 / 90), ("constant", 1.0, 1.0)],
)
def test_the_rate_follows_its_schedule(schedule: str, middle: float, last: float) -> None:
    """Ten steps of warm-up, then ninety: 0.5 (1 + cos(pi x)), 1 - x, or 1 of the rate at x."""
    raw = {"schedule": schedule, "learning_rate": 0.002, "warmup_ratio": 0.1}
    spec = OptimizerSpec.model_validate(raw)
    shares = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: middle, 99: last}
    found = {step: learning_rate(spec, step, 100) / 0.002 for step in shares}
    assert found == pytest.approx(shares, rel=1e-6)


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    raw = {"schedule": "linear", "learning_rate": 0.002, "warmup_ratio": 0.0}
    spec = OptimizerSpec.model_validate(raw)
    assert [learning_rate(spec, step, 4) for step in (0, 2)] == pytest.approx([0.002, 0.001])
