"""What a user of the command `llm` does. python llm_client.py URL MODEL [MODEL ...]"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def check(url: str, models: list[str]) -> None:
    """The last model by name, streamed and whole, as a chat and as a plain completion."""
    with tempfile.TemporaryDirectory() as folder:
        known = [{"model_id": f"{name}{end}", "model_name": name, "api_base": f"{url}/v1",
                  "completion": bool(end)}
                 for name in models[-1:] for end in ("", "-plain")]  # fmt: skip
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps(known))  # JSON is YAML
        for model in known:
            said = [
                _llm(folder, "-m", model["model_id"], "hello", "-o", "temperature", "0",
                     "-o", "max_tokens", "8", *stream)
                for stream in ((), ("--no-stream",))
            ]  # fmt: skip
            assert said[0] == said[1], said


def _llm(folder: str, *arguments: str) -> str:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("llm")), *arguments, "--key", "none"],
        env={**os.environ, "LLM_USER_PATH": folder}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


if __name__ == "__main__":
    check(sys.argv[1], sys.argv[2:])
    print("llm: conforms")
