"""What a user of litellm does. python litellm_client.py URL MODEL [MODEL ...]"""

import asyncio
import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network at import

import litellm

SAID = [{"role": "user", "content": "hello"}]


def check(url: str, model: str) -> None:
    """Chat, stream and complete, sync and async; errors are the classes that retries look at."""
    ask: dict[str, Any] = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none",
                           "max_tokens": 8, "temperature": 0, "num_retries": 0}  # fmt: skip
    whole = litellm.completion(messages=SAID, **ask).choices[0].message.content
    chunks = litellm.completion(messages=SAID, stream=True, **ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    text = {**ask, "model": f"text-completion-openai/{model}"}
    assert litellm.text_completion(prompt="hello", **text).usage.completion_tokens > 0
    answer = asyncio.run(litellm.acompletion(messages=SAID, **ask))
    assert answer.choices[0].message.content == whole
    try:
        litellm.completion(messages=SAID, **{**ask, "model": "openai/nobody"})
        raise AssertionError("an unknown model was answered")
    except litellm.NotFoundError:
        pass
    try:
        litellm.completion(messages=[{"role": "user", "content": "x" * 9000}], **ask)
        raise AssertionError("a prompt over the context was answered")
    except litellm.ContextWindowExceededError:
        pass


if __name__ == "__main__":
    for name in sys.argv[2:]:
        check(sys.argv[1], name)
    print("litellm: conforms")
