"""What a request costs its gateway before an engine has it, in CPU time of the event loop."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import Request
from replicas import ask, run
from service import BASE_NAME, Running

from cluster.errors import ContextLengthError
from serving.gateway.access import Tenant
from serving.gateway.bodies import read_body
from serving.gateway.jobs import Job
from serving.ingress import BODY
from serving.protocol import CompletionRequest
from serving.spec import GatewaySpec

MANY = [[5]] * 4096
BIASES = {str(token): 1.0 for token in range(1024)}
SCHEMA = {"type": "string", "enum": ["x" * 50 + str(i) for i in range(1000)]}
FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}


def loop_s(work: Callable[[], Awaitable[Any]]) -> tuple[Any, float]:
    """What it gives, and the seconds in which the event loop's thread computed for it."""
    given: list[Any] = []

    async def timed() -> float:
        began = time.thread_time()
        given.append(await work())
        return time.thread_time() - began

    seconds = asyncio.run(timed())  # it writes the repr of what it returns
    return given[0], seconds


def job_of(service: Running, **body: Any) -> tuple[Job, float]:
    asked = CompletionRequest.model_validate({"model": BASE_NAME, **body})
    began_s = time.monotonic()
    return loop_s(lambda: service.service.completion_job(asked, Tenant(None), began_s))


def test_what_prompts_share_is_made_once_and_off_the_loop(service: Running) -> None:
    job, seconds = job_of(service, prompt=MANY, logit_bias=BIASES, response_format=FORMAT)
    assert len(job.requests) == len(MANY)
    assert len({id(request.logit_bias) for request in job.requests}) == 1
    assert len({id(request.response_format) for request in job.requests}) == 1
    assert seconds < 0.2


def test_a_long_body_is_read_off_the_loop() -> None:
    raw = json.dumps({"model": "m", "prompt": [1] * 700_000, "zzz": [[1.5]] * 50_000}).encode()
    request = Request({"type": "http", BODY: raw})
    spec = GatewaySpec.model_validate({})
    body, seconds = loop_s(lambda: read_body(request, CompletionRequest, spec))
    assert len(body.prompt) == 700_000
    assert seconds < 0.05


@pytest.mark.parametrize("options", [{}, {"max_tokens": 128}], ids=str)
def test_a_prompt_over_the_context_is_refused_in_the_engines_words(
    service: Running, options: dict[str, Any]
) -> None:
    """Before there is a request for each answer."""
    prompt = [1] * (127 if options else 2_000_000)
    with pytest.raises(ContextLengthError) as engines:
        run(ask(service.replica, None, prompt_token_ids=prompt, **({"max_tokens": 16} | options)))
    with pytest.raises(ContextLengthError) as gateways:
        job_of(service, prompt=prompt, n=128, **options)
    assert gateways.value.message == engines.value.message
    assert gateways.value.param == engines.value.param


def test_a_prompt_that_is_given_twice_has_two_chances(service: Running) -> None:
    drawn, _ = job_of(service, prompt=["a", "a"], n=2)
    assert len({request.seed for request in drawn.requests}) == 4
    fixed, _ = job_of(service, prompt=["a", "a"], n=2, seed=7)
    seeds = [request.seed for request in fixed.requests]
    assert seeds[:2] == seeds[2:] == [7, seeds[1]]
