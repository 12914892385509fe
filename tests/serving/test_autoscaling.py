"""The number of replicas for a load, without a cluster."""

from hypothesis import given
from hypothesis import strategies as st

from serving.autoscaling import replicas_for


def test_replicas_follow_the_tokens() -> None:
    assert [replicas_for(t, target=100, current=1) for t in (0, 90, 101, 1000)] == [0, 1, 2, 10]
    assert replicas_for(190, target=100, current=3) == 3  # two would be at 95 %
    assert replicas_for(150, target=100, current=3) == 2


@given(st.integers(0, 10**6), st.integers(1, 10_000), st.integers(0, 50))
def test_a_steady_load_comes_to_rest(tokens: int, target: int, current: int) -> None:
    """No load makes the same replica come and go, and no replica is left over its target."""
    first = replicas_for(tokens, target=target, current=current)
    assert first * target >= tokens
    assert replicas_for(tokens, target=target, current=first) == first
