"""What a user of langchain-openai does. python langchain_client.py URL MODEL [MODEL ...]"""

import asyncio
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI


def check(url: str, model: str) -> None:
    """Invoke, stream, batch, sync and async, and plain completions."""
    where: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": model,
                             "temperature": 0}  # fmt: skip
    chat = ChatOpenAI(max_tokens=8, **where)
    answer = chat.invoke("hello")
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["input_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("hello")) == answer.content
    assert [one.content for one in chat.batch(["hello"] * 3)] == [answer.content] * 3
    assert asyncio.run(chat.ainvoke("hello")).content == answer.content
    plain = OpenAI(max_tokens=8, **where)
    assert "".join(plain.stream("hello")) == plain.invoke("hello")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        check(sys.argv[1], name)
    print("langchain-openai: conforms")
