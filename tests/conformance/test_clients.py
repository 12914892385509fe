"""Clients that other people wrote, unmodified, in an environment of their own: `make conformance`.

GRAFT_CONFORMANCE names that environment's Python, GRAFT_GUIDELLM that of guidellm's own; without
them they are left out.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import torch
import yaml
from adapters import load
from peft import PeftModel
from service import BASE_NAME, Running, publish, running

from cluster.base_model import load_tokenizer

PYTHON = os.environ.get("GRAFT_CONFORMANCE", "")
GUIDELLM = os.environ.get("GRAFT_GUIDELLM", "")
HERE = Path(__file__).parent
OPENAI = HERE / "openai.yaml"
pytestmark = pytest.mark.skipif(not PYTHON, reason="the clients are installed by make conformance")


@pytest.fixture(scope="module")
def served(
    bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Path]]:
    folder = tmp_path_factory.mktemp("served")
    with running(bases("llama"), folder) as service:
        publish(service.registry, bases("llama"), folder, "lora", "prefix_tuning")
        yield service, folder


def run(*command: object, cwd: Path | None = None, python: str = PYTHON) -> str:
    result = subprocess.run(
        [python, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=240,
        check=False, env={**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("client", ["openai", "litellm", "langchain", "llm"])
def test_client(served: tuple[Running, Path], client: str) -> None:
    url = served[0].url
    output = run(HERE / f"{client}_client.py", url, BASE_NAME, "lora", "prefix-tuning")
    assert "conforms" in output


@pytest.mark.parametrize("model", [BASE_NAME, "lora", "prefix-tuning"])
def test_lm_evals_likelihoods_are_pefts(
    served: tuple[Running, Path], bases: Callable[[str], Path], model: str
) -> None:
    pairs = [("the cat", " sat"), ("hello ", "world"), ("a", "b")]
    base = bases("llama")
    output = run(HERE / "lm_eval_client.py", served[0].url, model, base, json.dumps(pairs))
    found = json.loads(output.splitlines()[-1])
    tokenizer, reference = load_tokenizer(str(base)), load(base)
    if model != BASE_NAME:
        folder = served[1] / model.replace("-", "_")
        reference = PeftModel.from_pretrained(reference, str(folder)).eval()
    for (context, text), (likelihood, is_greedy) in zip(pairs, found, strict=True):
        # lm-eval counts the spaces at a context's end to what follows.
        context, text = context.rstrip(), context[len(context.rstrip()) :] + text
        before, ids = (tokenizer.encode(part) for part in (context, context + text))
        with torch.no_grad():
            logprobs = reference(torch.tensor([ids])).logits[0, -len(ids) - 1 :].log_softmax(-1)
        rows = logprobs[-len(ids) :][len(before) - 1 : -1]
        told = rows[range(len(rows)), ids[len(before) :]].sum()
        assert likelihood == pytest.approx(float(told), abs=1e-3)
        assert is_greedy == (rows.argmax(-1).tolist() == ids[len(before) :])


@pytest.mark.skipif(not GUIDELLM, reason="guidellm is installed by make conformance")
def test_guidellms_load(served: tuple[Running, Path], bases: Callable[[str], Path]) -> None:
    client = HERE / "guidellm_client.py"
    arguments = (served[0].url, bases("llama"), BASE_NAME, "lora")
    assert "conforms" in run(client, *arguments, python=GUIDELLM)


@pytest.mark.parametrize("schema", ["our own", "openai's"])
def test_schemathesis_finds_no_server_error(
    served: tuple[Running, Path], tmp_path: Path, schema: str
) -> None:
    """Of whatever it makes of our own /openapi.json, or of OpenAI's schema pruned to our routes,
    nothing is answered with a 5xx."""
    url = served[0].url
    where = {"our own": (f"{url}/openapi.json", url), "openai's": (OPENAI, f"{url}/v1")}[schema]
    run(
        "-m", "schemathesis.cli", "run", where[0], "--url", where[1], "--checks",
        "not_a_server_error", "--max-examples", "25", "--seed", "1", "--generation-database",
        "none", "--request-timeout", "60", "--phases", "examples,coverage,fuzzing",
        cwd=tmp_path,
    )  # fmt: skip
    assert served[0].stats.running == served[0].stats.waiting == 0


def test_what_openais_schema_gives_as_examples_is_answered(served: tuple[Running, Path]) -> None:
    """Its routes are all there, and what is made of them above gets further than to a refusal."""
    document, url = yaml.safe_load(OPENAI.read_text()), f"{served[0].url}/v1"
    assert len(document["paths"]) == 5
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {"": {}})
            ((_, body),) = content.items()
            for example in body.get("examples", {"none": {"value": None}}).values():
                where = url + path.replace("{model}", BASE_NAME)
                answer = httpx2.request(method, where, json=example["value"], timeout=60)
                assert answer.status_code == 200, (path, example, answer.text)
