"""Sampling: greedy, the cuts, the penalties, repeatability, and the right distribution."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from serving.engine.request import GenerationRequest, TokenLogprobs, best_choices, choices
from serving.engine.sampler import Sampling, sample, uniform


def row(
    *, seed: int = 0, position: int = 0, prompt: tuple[int, ...] = (), answer: Any = None,
    allowed: Any = None, **options: Any,
) -> Sampling:  # fmt: skip
    request = GenerationRequest(prompt_token_ids=[0], **{"temperature": 1.0, **options})
    tokens = [*prompt, *([0] * position if answer is None else answer)]
    return Sampling(request, seed, tokens, len(prompt), allowed)


def tokens(logits: torch.Tensor, rows: list[Sampling]) -> list[int | None]:
    return [sampled and sampled.token for sampled in sample(logits, rows)]


LOGITS = torch.tensor([0.1, 2.0, 1.9, -1.0, 0.5])


def draws(count: int = 3000, **options: Any) -> np.ndarray:
    rows = [row(position=p, **options) for p in range(count)]
    found = tokens(LOGITS.repeat(count, 1), rows)
    return np.bincount(np.array(found, dtype=np.int64), minlength=5) / count


def test_zero_temperature_takes_the_best() -> None:
    assert tokens(LOGITS[None], [row(temperature=0.0)]) == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, -1).numpy()
    assert np.abs(draws(temperature=temperature) - expected).max() < 0.03


def test_cuts_take_the_tail_away_and_renormalise() -> None:
    two = torch.softmax(LOGITS[[1, 2]], -1).numpy()
    for cut in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}, {"top_k": 3, "top_p": 0.7}):
        found = draws(**cut)
        assert found[[0, 3, 4]].sum() == 0, cut
        assert np.abs(found[[1, 2]] - two).max() < 0.03, cut
    assert draws(top_p=1e-9)[1] == draws(top_k=1)[1] == draws(min_p=1.0)[1] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 40}, {"top_k": 2000, "top_p": 0.95},
        {"top_k": 3000}, {"min_p": 0.05}, {"top_k": 60, "top_p": 0.8, "min_p": 0.1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_the_tokens_left_are_those_of_transformers(options: dict[str, Any], spread: float) -> None:
    """Over more tokens than are looked at first; flat and peaked."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4000) * spread
    warped = logits.double()
    if "top_k" in options:
        warped = transformers.TopKLogitsWarper(options["top_k"])(None, warped)
    if "top_p" in options:
        warped = transformers.TopPLogitsWarper(options["top_p"])(None, warped)
    if "min_p" in options:
        warped = transformers.MinPLogitsWarper(options["min_p"])(None, warped)
    expected = warped.softmax(-1)[0].cumsum(-1)
    rows = [row(position=p, **options) for p in range(300)]
    found = tokens(logits.repeat(300, 1), rows)
    points = torch.tensor([uniform(0, p) for p in range(300)], dtype=torch.float64)
    assert found == torch.searchsorted(expected, points * expected[-1], right=True).tolist()


def test_penalties_are_those_of_transformers_and_openai() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 20) * 3
    prompt, answer = (3, 4, 3, 7), [5, 7, 5, 9]

    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    repeated = processor(torch.tensor([[*prompt, *answer]]), logits.clone())
    counted = logits.clone()
    for token in set(answer):
        counted[0, token] -= 0.9 + 0.7 * answer.count(token)
    cases = [
        ({"repetition_penalty": 1.7}, repeated),
        ({"presence_penalty": 0.9, "frequency_penalty": 0.7}, counted),
    ]
    for options, expected in cases:
        rows = [row(prompt=prompt, answer=answer, seed=s, **options) for s in range(200)]
        plain = [
            row(prompt=(0,) * 4, answer=[0] * 4, seed=s) for s in range(200)
        ]  # the same positions, so the same random numbers
        assert tokens(logits.repeat(200, 1), rows) == tokens(expected.repeat(200, 1), plain)
        assert tokens(logits.repeat(200, 1), plain) != tokens(expected.repeat(200, 1), plain)


def test_a_bias_moves_and_a_mask_forbids() -> None:
    ban = {1: -100.0, 2: -100.0}
    bits = np.array([0b01001], dtype=np.int32)
    found = tokens(
        LOGITS.repeat(4, 1),
        [
            row(temperature=0.0, logit_bias=ban),
            row(temperature=0.0, logit_bias={3: 3.1}),
            row(temperature=0.0, allowed=bits),
            row(temperature=50.0, allowed=np.array([0b10000], dtype=np.int32)),
        ],
    )
    assert found == [4, 3, 0, 4]


def test_a_token_is_a_function_of_seed_and_position_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 2000)
    rows = [
        row(
            temperature=0.3 + i % 5, top_p=0.5 + i % 2 / 2, top_k=None if i % 3 else 7, seed=i,
            position=i * 3, min_p=(i % 4) / 100, repetition_penalty=1 + i % 2,
            presence_penalty=float(i % 3), logit_bias={i: 2.0} if i % 7 else {},
            logprobs=i % 3 or None,
        )
        for i in range(64)
    ]  # fmt: skip
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(64)]
    assert together == alone
    assert len({uniform(s, p) for s in range(30) for p in range(30)}) == 900
    assert uniform(-1, 0) == uniform(-1, 0) != uniform(1, 0)


def test_logits_that_are_not_finite_fail_their_row_alone() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = float("nan")
    logits[2] = float("-inf")
    rows = [row(temperature=t, logprobs=1, top_p=0.5) for t in (0.0, 1.0, 0.0)]
    assert tokens(logits, rows) == [1, None, None]


def test_logprobs_are_of_the_bare_logits() -> None:
    options = {"temperature": 0.0, "logit_bias": {3: 100.0}}
    (got,) = sample(LOGITS[None], [row(logprobs=2, **options)])
    expected = LOGITS.log_softmax(-1)
    assert got is not None
    assert got.logprobs is not None
    assert got.logprobs.token_id == got.token == 3
    assert got.logprobs.logprob == pytest.approx(float(expected[3]))
    assert [token for token, _ in got.logprobs.top] == [1, 2]
    assert got.logprobs.top[0][1] == pytest.approx(float(expected[1]))


def test_choices_have_seeds_of_their_own() -> None:
    request = GenerationRequest(prompt="x", seed=7)
    seeds = [choice.seed for choice in choices(request, 100)]
    assert seeds[0] == 7
    assert (
        len({*seeds, *(c.seed for c in choices(GenerationRequest(prompt="x", seed=8), 100))}) == 200
    )
    answers = [[TokenLogprobs(0, logprob)] * length for logprob, length in
               [(-1.0, 1), (-0.1, 50), (-0.5, 1)]]  # fmt: skip
    assert best_choices(answers, 2) == [1, 2]
