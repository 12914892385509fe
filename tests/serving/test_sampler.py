"""Sampling: greedy, the cuts, repeatability, and the right distribution."""

import numpy as np
import pytest
import torch

from serving.engine.sampler import Sampling, sample, uniform


def row(
    temperature: float = 1.0, top_p: float = 1.0, top_k: int | None = None, seed: int = 0,
    position: int = 0,
) -> Sampling:  # fmt: skip
    return Sampling(temperature, top_p, top_k, seed, position)


LOGITS = torch.tensor([0.1, 2.0, 1.9, -1.0, 0.5])


def draws(sampling: dict[str, object], count: int = 4000) -> np.ndarray:
    rows = [row(**sampling, position=p) for p in range(count)]  # type: ignore[arg-type]
    return np.bincount(sample(LOGITS.repeat(count, 1), rows), minlength=5) / count


def test_zero_temperature_takes_the_best() -> None:
    assert sample(LOGITS[None], [row(0.0)]) == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1).numpy()
    assert np.abs(draws({"temperature": temperature}) - expected).max() < 0.03


def test_top_k_and_top_p_cut_the_tail_and_renormalise() -> None:
    two = torch.softmax(LOGITS[[1, 2]], -1).numpy()
    for cut in ({"top_k": 2}, {"top_p": 0.6}):
        found = draws(cut)
        assert found[[0, 3, 4]].sum() == 0
        assert np.abs(found[[1, 2]] - two).max() < 0.03
    assert draws({"top_p": 1e-9})[1] == draws({"top_k": 1})[1] == 1


def test_a_token_is_a_function_of_seed_and_position_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 100)
    rows = [row(0.3 + i % 5, 0.5 + i % 2 / 2, None if i % 3 else 7, i, i * 3) for i in range(64)]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(64)]
    assert together == alone
    assert len({uniform(s, p) for s in range(30) for p in range(30)}) == 900
    assert uniform(-1, 0) == uniform(-1, 0) != uniform(1, 0)


def test_logits_that_are_not_finite_fail_their_row_alone() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = float("nan")
    logits[2] = float("-inf")
    assert sample(logits, [row(0.0), row(1.0), row(0.0)]) == [1, None, None]
