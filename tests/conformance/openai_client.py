"""What a user of OpenAI's own client does, run with whatever version of it is installed.

python openai_client.py URL BASE ADAPTER [ADAPTER ...]
"""

import asyncio
import sys

import openai


def check(url: str, base: str, adapters: list[str]) -> None:
    """List, complete, chat and stream, with the base and with every adapter by name."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    models = {model.id: model for model in client.models.list()}
    assert {base, *adapters} <= set(models), models
    assert client.models.retrieve(adapters[0]).id == adapters[0]
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    texts: set[str] = set()
    for model in (base, *adapters):
        ask = {"model": model, "max_tokens": 8, "temperature": 0, "seed": 7}
        completion = client.completions.create(prompt="hello", **ask)
        assert completion.usage.total_tokens == (
            completion.usage.prompt_tokens + completion.usage.completion_tokens
        )
        text = completion.choices[0].text
        texts.add(text)
        assert completion.choices[0].finish_reason in ("stop", "length")
        pieces = [
            chunk.choices[0].text
            for chunk in client.completions.create(prompt="hello", stream=True, **ask)
            if chunk.choices
        ]
        assert "".join(pieces) == text
        chat = client.chat.completions.create(messages=said, **ask)
        assert chat.choices[0].message.role == "assistant"
        content = ""
        usage = None
        stream = client.chat.completions.create(
            messages=said, stream=True, stream_options={"include_usage": True}, **ask
        )
        for chunk in stream:
            usage = chunk.usage or usage
            content += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert content == chat.choices[0].message.content
        assert usage.completion_tokens == chat.usage.completion_tokens
        with client.chat.completions.with_streaming_response.create(messages=said, **ask) as raw:
            assert raw.headers["content-type"].startswith("application/json")
    assert len(texts) > 1, "adapters answer as the base does"
    helper(client, adapters[0], said)
    embeddings(client, base, adapters)
    errors(client, base)
    asyncio.run(asynchronous(url, adapters))


def helper(client: openai.OpenAI, model: str, said: list[dict[str, str]]) -> None:
    """The client's own accumulating stream."""
    with client.chat.completions.stream(model=model, messages=said, max_tokens=8) as stream:
        kinds = {event.type for event in stream}
    assert {"chunk", "content.delta"} <= kinds, kinds


def embeddings(client: openai.OpenAI, base: str, adapters: list[str]) -> None:
    """By the client's own base64, as floats, and cut."""
    found: set[tuple[float, ...]] = set()
    for model in (base, *adapters):
        answer = client.embeddings.create(model=model, input=["hello", "world"])
        assert [part.index for part in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
        plain = client.embeddings.create(model=model, input="hello", encoding_format="float")
        pairs = zip(plain.data[0].embedding, answer.data[0].embedding, strict=True)
        assert all(abs(one - other) < 1e-5 for one, other in pairs)
        cut = client.embeddings.create(model=model, input="hello", dimensions=3)
        assert len(cut.data[0].embedding) == 3
        found.add(tuple(plain.data[0].embedding))
    assert len(found) == len(adapters) + 1, "adapters embed as the base does"


def errors(client: openai.OpenAI, base: str) -> None:
    """The server's failures arrive as the client's own exceptions."""
    try:
        client.completions.create(model="nobody", prompt="x")
        raise AssertionError("an unknown model was answered")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    for options in ({"temperature": -1}, {"max_tokens": -5}, {"n": 1000}, {"prompt": []}):
        try:
            client.completions.create(**{"model": base, "prompt": "x", **options})
            raise AssertionError(f"{options} was answered")
        except openai.BadRequestError as error:
            assert error.param in options, error


async def asynchronous(url: str, adapters: list[str]) -> None:
    """Many at once through the asynchronous client, whole and as streams."""

    async def streamed(client: openai.AsyncOpenAI, model: str, number: int) -> str:
        stream = await client.completions.create(
            model=model, prompt=f"hello {number}", max_tokens=8, temperature=0, stream=True
        )
        return "".join([c.text async for chunk in stream for c in chunk.choices])

    async def chatted(client: openai.AsyncOpenAI, model: str, stream: bool) -> str:
        said = [{"role": "user", "content": "hello"}]
        answer = await client.chat.completions.create(
            model=model, messages=said, max_tokens=8, temperature=0, stream=stream
        )
        if not stream:
            return answer.choices[0].message.content
        return "".join([c.delta.content or "" async for part in answer for c in part.choices])

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        asked = [
            client.completions.create(model=model, prompt=f"hello {i}", max_tokens=8, temperature=0)
            for i in range(4)
            for model in adapters
        ]
        streams = [streamed(client, model, i) for i in range(4) for model in adapters]
        answers, texts = await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*streams))
        chats = [chatted(client, m, stream) for stream in (False, True) for m in adapters]
        said = await asyncio.gather(*chats)
    assert [answer.model for answer in answers] == adapters * 4
    assert [answer.choices[0].text for answer in answers] == texts
    assert said[: len(adapters)] == said[len(adapters) :]


if __name__ == "__main__":
    check(sys.argv[1], sys.argv[2], sys.argv[3:])
    print(f"openai {openai.__version__}: conforms")
