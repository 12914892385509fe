"""Real clients against a real service, unmodified.

GRAFT_TEST_PYTHONS may name further interpreters (separated by ':') with other versions of openai.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from service import BASE_NAME, publish, running

SCRIPT = Path(__file__).parent / "openai_client.py"
PYTHONS = [sys.executable, *filter(None, os.environ.get("GRAFT_TEST_PYTHONS", "").split(":"))]


@pytest.mark.parametrize("python", PYTHONS)
def test_openais_client(python: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    with running(bases("llama"), tmp_path) as service:
        publish(service.registry, bases("llama"), tmp_path, "lora", "bitfit", "prompt_tuning",
                "prefix_tuning")  # fmt: skip
        result = subprocess.run(
            [python, str(SCRIPT), service.url, BASE_NAME, "lora", "bitfit", "prompt-tuning",
             "prefix-tuning"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "conforms" in result.stdout
