"""guidellm's load over both kinds of completion: guidellm_client.py URL TOKENIZER MODEL ..."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

REQUESTS, STREAMS, TOKENS = 12, 4, 8


def check(url: str, tokenizer: str, model: str, route: str) -> None:
    """Every request succeeds, and each has its tokens and its time to first token."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = {
            "backend": f"kind=openai_http,target={url},model={model},request_format={route}",
            "profile": f"kind=concurrent,streams={STREAMS}",
            "constraint": f"kind=max_requests,count={REQUESTS}",
            "tokenizer": f"kind=huggingface_auto,model={tokenizer}",
            "data": f"kind=synthetic_text,prompt_tokens=12,output_tokens={TOKENS}",
            "output": f"kind=json,path={report}",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        command = [str(Path(sys.executable).with_name("guidellm")), "run", *arguments]
        result = subprocess.run(
            [*command, "--disable-console"],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        (found,) = json.loads(report.read_text())["benchmarks"]
    answered = found["requests"]["successful"]
    assert not found["requests"]["errored"], found["requests"]["errored"][:1]
    assert len(answered) == REQUESTS
    for request in answered:
        assert request["output_tokens"] == TOKENS, request
        assert request["time_to_first_token_ms"] > 0, request


if __name__ == "__main__":
    for name in sys.argv[3:]:
        for path in ("/v1/completions", "/v1/chat/completions"):
            check(sys.argv[1], sys.argv[2], name, path)
    print("guidellm: conforms")
