"""Tool calls: parsed out of answers cut anywhere, and made by a base whose template knows them."""

import asyncio
import copy
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import httpx2
import openai
import pyarrow as pa
import pytest
import transformers
from conftest import byte_tokenizer, make_base
from service import BASE_NAME, Running, running

from cluster.tables import open_table, write_table
from serving.client import Client
from serving.engine import GenerationRequest
from serving.gateway.access import Tenant
from serving.gateway.answers import ChatForm
from serving.gateway.chat import render
from serving.gateway.jobs import Job
from serving.gateway.logprobs import TokenText
from serving.gateway.service import Piece
from serving.gateway.tools import ToolParser
from serving.offline.answering import Asked, answer_rows
from serving.protocol import CalledFunction, ChatMessage, ChatRequest, ToolCall
from training.encoding import render_row

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}"
    "{% endfor %}<|assistant|>"
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def parse(pieces: list[str], *, only_one: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    parser, said, calls = ToolParser(must_call=False, only_one=only_one), "", []
    for piece in pieces:
        text, found = parser.add(piece)
        said += text
        calls += [(call.function.name, json.loads(call.function.arguments)) for call in found]
    rest, last = parser.finish()
    assert last == []
    return said + rest, calls


@pytest.mark.parametrize(
    ("answer", "said", "count"),
    [
        (CALL, "", 1),
        (f"Let me see. {CALL}\n{CALL}", "Let me see.", 2),
        (f"{CALL}\n\nHello  world, \n{CALL} and\n", "Hello  world,and\n", 2),
        ("a \n<tool_call>b</tool_call> c ", "a \n<tool_call>b</tool_call> c ", 0),
        ("a < b, <tool", "a < b, <tool", 0),
        ("<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", 0),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", 0),
        (CALL[:-5], CALL[:-5], 0),
    ],
)
def test_calls_are_found_wherever_the_answer_is_cut(answer: str, said: str, count: int) -> None:
    for size in (1, 2, 7, len(answer)):
        pieces = [answer[i : i + size] for i in range(0, len(answer), size)]
        text, calls = parse(pieces)
        assert text == said, size
        assert calls == [("weather", {"city": "Rome"})] * count
        before, one = parse(pieces, only_one=True)
        assert one == calls[:1]
        assert text.startswith(before)


def deltas(answers: dict[int, list[Piece]], *, only_one: bool) -> dict[int, list[Any]]:
    """The choices of each answer's chunks, of answers whose pieces come in turn."""
    said = [{"role": "user", "content": "?"}]
    asked = {"model": "m", "messages": said, "tools": [WEATHER], "tool_choice": "auto"}
    body = ChatRequest.model_validate(asked | ({"parallel_tool_calls": False} if only_one else {}))
    request = GenerationRequest(prompt_token_ids=[1])
    job = Job("x", "m", None, Tenant(None), [[1]], [request] * len(answers), 0.0)
    form, found = ChatForm(job, body, TokenText(None)), {index: list[Any]() for index in answers}
    for pieces in zip_longest(*answers.values()):
        for piece in filter(None, pieces):
            for chunk in form.chunks(piece, None):
                (choice,) = chunk.model_dump()["choices"]
                found[choice["index"]].append(choice)
    return found


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("only_one", [False, True])
def test_calls_that_a_model_makes_of_itself_are_streamed(size: int, only_one: bool) -> None:
    """Several answers at once, which the model ends, or which end for their length."""
    oslo = CALL.replace("Rome", "Oslo")
    written = {
        0: (f"Let me see. {CALL}\n{oslo}", "stop"),
        1: ("No call.", "stop"),
        2: (f"{oslo} and", "length"),
    }
    answers: dict[int, list[Piece]] = {}
    for index, (text, reason) in written.items():
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        answers[index] = [Piece(index, part, 1, None) for part in parts[:-1]]
        answers[index].append(Piece(index, parts[-1], 1, reason))
    found = deltas(answers, only_one=only_one)
    said, calls = dict[int, str](), dict[int, list[tuple[int, str, str]]]()
    for index, chunks in found.items():
        assert chunks[0]["delta"]["role"] == "assistant"
        assert [chunk["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        said[index] = "".join(chunk["delta"]["content"] or "" for chunk in chunks)
        every = [call for chunk in chunks for call in chunk["delta"]["tool_calls"] or []]
        assert {call["type"] for call in every} <= {"function"}
        assert len({call["id"] for call in every}) == len(every)
        calls[index] = [
            (call["index"], call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in every
        ]
    rome = [(0, "weather", {"city": "Rome"})]
    both = [*rome, (1, "weather", {"city": "Oslo"})]
    assert calls == {
        0: rome if only_one else both, 1: [], 2: [(0, "weather", {"city": "Oslo"})]
    }  # fmt: skip
    assert said == {0: "Let me see.", 1: "No call.", 2: "" if only_one else "and"}
    ends = [chunks[-1]["finish_reason"] for chunks in found.values()]
    assert ends == ["tool_calls", "stop", "length"]


def test_each_tool_keeps_its_own_meaning_of_a_name() -> None:
    other = copy.deepcopy(WEATHER)
    other["function"]["parameters"]["$defs"] = {"City": {"enum": ["Bonn"]}, "Me": {"$ref": "#"}}
    said = [{"role": "user", "content": "?"}]
    asked = {"model": "m", "messages": said, "tools": [WEATHER, other], "tool_choice": "required"}
    form = ChatRequest.model_validate(asked).form
    assert form
    rule = form[1]
    arguments = [call["properties"]["arguments"] for call in rule["anyOf"]]
    assert arguments == [{"$ref": "#/$defs/0"}, {"$ref": "#/$defs/1"}]
    assert rule["$defs"]["0"]["properties"]["city"] == {"$ref": "#/$defs/0/$defs/City"}
    assert rule["$defs"]["1"]["properties"]["city"] == {"$ref": "#/$defs/1/$defs/City"}
    assert rule["$defs"]["1"]["$defs"] == {"City": {"enum": ["Bonn"]}, "Me": {"$ref": "#/$defs/1"}}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_called(mode: str) -> None:
    other = {"type": "function", "function": {"name": "news"}}
    names = {"mode": mode, "tools": [{"type": "function", "function": {"name": "news"}}]}
    said = [{"role": "user", "content": "?"}]
    choice = {"type": "allowed_tools", "allowed_tools": names}
    asked = {"model": "m", "messages": said, "tools": [WEATHER, other], "tool_choice": choice}
    body = ChatRequest.model_validate(asked)
    assert [tool.function.name for tool in body.tools_in_use] == ["news"]
    assert body.must_call == (mode == "required")
    if body.form:
        assert body.form[1]["properties"]["name"] == {"const": "news"}
    assert (body.form is not None) == body.must_call


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, dict[str, Any]]]:
    """A service whose base's template knows tools, and what one asks of it."""
    folder = tmp_path_factory.mktemp("calling")
    base = make_base("llama", folder / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    # A base with random weights could write white space for ever.
    spaces = tokenizer.convert_tokens_to_ids(["Ġ", "Ċ", "ĉ", "č"])
    biases = {str(token): -100 for token in spaces}
    with running(base, folder) as service:
        yield service, {"tools": [WEATHER], "temperature": 0, "logit_bias": biases}


def test_a_tool_whose_parameters_are_no_schema(calling: tuple[Running, dict[str, Any]]) -> None:
    service, _ = calling
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
    said = {"model": BASE_NAME, "messages": [{"role": "user", "content": "hi"}]}
    asked = {**said, "tools": [tool], "tool_choice": "required", "max_tokens": 9}
    response = httpx2.post(f"{service.url}/v1/chat/completions", json=asked)
    detail = response.json()["error"]
    assert (response.status_code, detail["param"]) == (400, "tools")
    assert detail["message"].startswith("tools (json_schema) cannot be compiled")


def test_a_tool_that_must_be_called_is(calling: tuple[Running, dict[str, Any]]) -> None:
    """Through OpenAI's own client, whole and streamed; the conversation goes on behind it."""
    service, asked = calling
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    said: list[Any] = [{"role": "user", "content": "?"}]
    ask: Any = {"model": BASE_NAME, "messages": said, **asked}
    by_name = {"type": "function", "function": {"name": "weather"}}
    for choice, reason in ((by_name, "stop"), ("required", "tool_calls")):  # as OpenAI's
        answer = client.chat.completions.create(tool_choice=choice, **ask).choices[0]
        assert answer.finish_reason == reason, answer
        (call,) = answer.message.tool_calls or []
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    with client.chat.completions.stream(tool_choice="required", **ask) as stream:
        final = stream.get_final_completion().choices[0]
    (streamed,) = final.message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    said += [
        answer.message.model_dump(exclude_none=True) | {"content": None},
        {"role": "tool", "tool_call_id": call.id, "content": "sun"},
    ]
    after = client.chat.completions.create(model=BASE_NAME, messages=said, max_tokens=4)
    assert after.choices[0].message.tool_calls is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_has_a_column_of_calls_where_there_are_tools(
    calling: tuple[Running, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    """As the chat has them, but for their random ids; an offline run has the same."""
    service, asked = calling
    chat = [{"role": "user", "content": "?"}]
    write_table(pa.table({"messages": [chat] * 2}), tmp_path / f"in.{kind}")
    target = tmp_path / f"out.{kind}"
    found: dict[str, Any] = {}
    with Client(service.url) as client:
        for choice in ("required", "none"):
            options: Any = {**asked, "tool_choice": choice}
            client.generate_file(
                tmp_path / f"in.{kind}", target, progress=False, overwrite=True, **options
            )
            found[choice] = open_table(target).to_pylist()[0]
            assert found[choice]["error"] is None
            rows = [{"messages": chat}]
            job = answer_rows(
                service.service, Asked("messages", None, None, options, 1), rows, 0, concurrency=1
            )
            (offline,) = asyncio.run(job)
            for name in ("completion", "finish_reason", "completion_tokens"):
                assert getattr(offline, name) == found[choice][name]
            assert named(offline.tool_calls) == named(found[choice]["tool_calls"])
        expected = client.chat(chat, **{**asked, "tool_choice": "required"})  # type: ignore[arg-type]
        no_tools: Any = {"max_tokens": 4, "progress": False}
        client.generate_file(tmp_path / f"in.{kind}", tmp_path / f"plain.{kind}", **no_tools)
    assert named(found["required"]["tool_calls"]) == [call.function for call in expected.tool_calls]
    assert found["required"]["finish_reason"] == "tool_calls"
    assert found["none"]["tool_calls"] is None
    assert "tool_calls" not in open_table(tmp_path / f"plain.{kind}").column_names


def named(text: str | None) -> list[CalledFunction]:
    """Of a column of calls, what is called."""
    return [ToolCall.model_validate(call).function for call in json.loads(text or "[]")]


def test_a_developer_is_heard_by_templates_that_know_none() -> None:
    """As Qwen's: what is neither a system's, a user's nor an assistant's is passed over."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('system', 'user') %}<{{ m.role }}>{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    texts = {"developer": "in French", "user": "hi"}
    said = [ChatMessage.model_validate({"role": r, "content": t}) for r, t in texts.items()]
    heard = "<system>in French<user>hi"
    assert tokenizer.decode(render(tokenizer, said, [])) == heard
    row = {"messages": [{"role": r, "content": t} for r, t in texts.items()]}
    assert render_row(row, "chat", "", tokenizer) == heard  # as a row is learned
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{% endfor %}{# developer #}"
    assert tokenizer.decode(render(tokenizer, said, [])) == "<developer><user>"
