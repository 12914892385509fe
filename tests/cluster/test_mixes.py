"""How a request names a mix."""

import pytest

from cluster.errors import RequestError
from cluster.mixes import check_mixable, members_of, parse_mix
from cluster.registry import AdapterVersion


def test_a_weight_is_what_stands_behind_the_last_colon() -> None:
    assert parse_mix("a:0.7+b:0.3") == [("a", 0.7), ("b", 0.3)]
    assert parse_mix("a@3:2+b:stable:-.5") == [("a@3", 2.0), ("b:stable", -0.5)]
    assert parse_mix("a:2:1+b:1") == [("a:2", 1.0), ("b", 1.0)]  # the alias "2"
    for name in ("a", "a@3", "a:2", "a:0.5", ""):
        assert parse_mix(name) is None


@pytest.mark.parametrize(
    "model", ["a+b", "a:0.7+b", "a:0.7+", "+", "a:nan+b:1", "a:1e3+b:1", "a:inf+b:1", ":1+b:1",
              "a:1+b: 1", "a:99999+b:1", "a:0.1234567890+b:1", "a:stable+b:1", "a:+1+b:1"],
)  # fmt: skip
def test_a_part_without_a_weight_is_refused(model: str) -> None:
    with pytest.raises(RequestError, match="does not end in a weight"):
        parse_mix(model)


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(RequestError, match="mixes 9 adapters, of 8 at most"):
        parse_mix("+".join(f"a{i}:1" for i in range(9)))


def test_members_are_told_from_a_reference() -> None:
    assert members_of("a@3:0.7+b@1:-1e-09") == ["a@3", "b@1"]
    assert members_of("a@3") == ["a@3"]


def test_what_is_no_change_of_weights_is_known_by_its_method() -> None:
    def version(method: str) -> AdapterVersion:
        return AdapterVersion("a", 3, method, None, "hash", "now", {}, {})

    for method in ("LORA", "IA3", "LOHA"):
        check_mixable(version(method))
    with pytest.raises(RequestError, match=r"'a@3' cannot be mixed: it has tokens in front"):
        check_mixable(version("PREFIX_TUNING"))
    with pytest.raises(RequestError, match=r"'a@3' cannot be mixed: it puts a block"):
        check_mixable(version("BOTTLENECK"))
