"""Bodies in parts are the same bodies, and a long one holds no other request up."""

import asyncio
import json
import random
import time
from typing import Any

import pytest
from service import BASE_NAME, Running

from serving.engine.request import TokenLogprobs
from serving.gateway import routes
from serving.gateway.access import Tenant
from serving.gateway.answers import ChatForm, CompletionForm, Form
from serving.gateway.jobs import Job
from serving.gateway.logprobs import ChatEntries, TokenText
from serving.gateway.service import Piece
from serving.gateway.writing import write
from serving.protocol import (
    ChatLogprobs,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    ModelCard,
    ModelList,
    Usage,
)

USED = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
TENANT = Tenant(None)


def entries(places: int) -> tuple[TokenLogprobs, ...]:
    """Twenty tokens at each place, as many as can be asked for."""
    draw = random.Random(0)

    def token() -> tuple[int, float]:
        return draw.randrange(256), -draw.random()

    return tuple(TokenLogprobs(*token(), tuple(token() for _ in range(20))) for _ in range(places))


def form_of(service: Running, kind: str) -> Form:
    """A whole answer of that kind, with log probabilities."""
    texts = TokenText(service.service.tokenizer)
    job = Job("x", BASE_NAME, None, TENANT, [[1]], [None], 0.0)  # type: ignore[list-item]
    if kind == "chat":
        said = [{"role": "user", "content": "x"}]
        body: dict[str, Any] = {"model": BASE_NAME, "messages": said}
        return ChatForm(job, ChatRequest(**body, logprobs=True, top_logprobs=20), texts)
    return CompletionForm(job, CompletionRequest(model=BASE_NAME, prompt="x", logprobs=5), texts)


def test_what_is_written_in_parts_is_what_pydantic_writes() -> None:
    logprobs = CompletionLogprobs(
        tokens=["\u00e9", '"'], token_logprobs=[None, -0.5], top_logprobs=[None, {"a": -1e-9}],
        text_offset=[0, 1],
    )  # fmt: skip
    choice = CompletionChoice(index=0, text="\u2028\n\x00", logprobs=logprobs)
    head: dict[str, Any] = {"id": "x", "created": 1, "model": "m"}
    bodies = [
        Completion(**head, choices=[choice, choice], usage=USED),
        Completion(**head, choices=[], usage=None),
        ModelList(data=[ModelCard(id="x", created=0, root="x")]),
        ModelList(data=[]),
        USED,
    ]
    for body in bodies:
        assert write(body) == body.model_dump_json().encode()


def test_what_is_no_number_in_json_is_null() -> None:
    head: dict[str, Any] = {"tokens": [], "top_logprobs": [], "text_offset": []}
    whole = CompletionLogprobs(**head, token_logprobs=[float("-inf"), float("nan"), -1.0])
    assert json.loads(write(whole))["token_logprobs"] == [None, None, -1.0]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_log_probabilities_of_a_long_answer_hold_nobody_up(service: Running, kind: str) -> None:
    """As many as an answer can have; the event loop turns while they are written."""
    piece = Piece(0, "x", 4096, "stop", logprobs=entries(4096))
    form = form_of(service, kind)

    async def written() -> tuple[bytes, int, float]:
        made = asyncio.create_task(routes._made(lambda: write(form.whole([piece], USED)), [piece]))
        turns, longest_s = 0, 0.0
        while not made.done():
            began = time.monotonic()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.monotonic() - began)
            turns += 1
        return await made, turns, longest_s

    began = time.monotonic()
    body, turns, longest_s = asyncio.run(written())
    assert turns > 20
    assert longest_s < 0.5 * (time.monotonic() - began)
    (choice,) = json.loads(body)["choices"]
    if kind == "chat":
        found = choice["logprobs"]["content"]
        assert {len(place["top_logprobs"]) for place in found} == {20}
        texts = TokenText(service.service.tokenizer)
        same = ChatLogprobs(content=list(ChatEntries(texts, piece.logprobs[:3])))
        assert found[:3] == same.model_dump()["content"]
    else:
        found = choice["logprobs"]["tokens"]
    assert len(found) == 4096


def test_what_one_step_brings_a_client_travels_together(service: Running) -> None:
    """One message for all answers of a request, as long as none has ended."""

    async def messages() -> list[int]:
        body = CompletionRequest(model=BASE_NAME, prompt="x", n=8, max_tokens=12, ignore_eos=True)
        job = await service.service.completion_job(body, TENANT, time.monotonic())
        return [len(pieces) async for pieces in service.service.run(job, stream=True)]

    found = asyncio.run(messages())
    assert sum(found) <= 8 * 12
    assert found.count(8) >= 8
