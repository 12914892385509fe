"""The choice of a replica: who holds the adapter, unless much busier."""

from hypothesis import given
from hypothesis import strategies as st

from serving.router import rank


def test_a_holder_goes_first_within_the_slack() -> None:
    assert rank({"a": 0, "b": 5}, {"b"}, slack=8) == ["b", "a"]
    assert rank({"a": 0, "b": 9}, {"b"}, slack=8) == ["a", "b"]
    assert rank({"a": 3, "b": 1}, set()) == ["b", "a"]
    assert rank({}, {"a"}) == []


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 100), min_size=1),
    st.sets(st.sampled_from("abcdefxyz")),
    st.integers(0, 20),
)
def test_every_replica_is_ranked_and_the_first_is_never_far_above_the_least(
    loads: dict[str, int], holders: set[str], slack: int
) -> None:
    order = rank(loads, holders, slack=slack)
    assert sorted(order) == sorted(loads)
    assert loads[order[0]] <= min(loads.values()) + slack
    welcome = {h for h in holders & set(loads) if loads[h] <= min(loads.values()) + slack}
    if welcome:
        assert order[0] in welcome
        assert loads[order[0]] == min(loads[h] for h in welcome)
