"""The tree and the table: every class is drawn, mapped, picklable."""

import pickle
import re

import pytest

from cluster import errors
from cluster.errors import OUTCOMES, GraftError, OperationError, RequestError, outcome_of


def tree(cls: type[GraftError]) -> list[type[GraftError]]:
    return [cls, *(c for child in cls.__subclasses__() for c in tree(child))]


CLASSES = [cls for cls in tree(GraftError) if cls.__module__ == "cluster.errors"]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_mapped_and_drawn(cls: type[GraftError]) -> None:
    assert cls in OUTCOMES
    assert re.search(rf"\b{cls.__name__}\b", errors.__doc__ or "")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_retry_helps_exactly_where_the_fault_is_ours(cls: type[GraftError]) -> None:
    assert cls.retryable == issubclass(cls, OperationError)
    if cls is not GraftError:
        assert (OUTCOMES[cls].status in (408, 429, *range(500, 600))) == cls.retryable


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_survive_the_hop_between_processes(cls: type[GraftError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("what, value, remedy")))
    assert type(copy) is cls
    assert copy.message == "what, value, remedy"


def test_a_request_error_keeps_its_field() -> None:
    assert pickle.loads(pickle.dumps(RequestError("bad", param="top_p"))).param == "top_p"


def test_codes_are_unique_so_that_clients_can_map_them_back() -> None:
    codes = [outcome.code for outcome in OUTCOMES.values() if outcome.code]
    assert len(codes) == len(set(codes))


def test_subclasses_outside_the_table_take_their_parents_row_and_strangers_a_plain_500() -> None:
    class Special(errors.AdapterError):
        pass

    assert outcome_of(Special("x")) == OUTCOMES[errors.AdapterError]
    assert outcome_of(KeyError("x")).status == 500
