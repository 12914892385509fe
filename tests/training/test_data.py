"""Rows to tokens: what each format means, where the loss falls, what becomes of bad rows."""

import json
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import byte_tokenizer

from cluster.base_model import load_tokenizer
from cluster.errors import DataError, StoreError
from cluster.spec import parse_spec
from cluster.store import open_store
from cluster.tables import stream_rows, write_table
from cluster.tasks import Task
from training import job
from training.command import plan
from training.data import fingerprint, tokenize
from training.data_spec import DataSpec, LintSpec
from training.encoding import render_alpaca
from training.formats import detect_format, iterate_rows
from training.lint import DataReport
from training.rows import (
    IGNORE,
    TokenRows,
    epoch_batches,
    micro_batches,
    row_hash,
    split,
    write_rows,
)
from training.spec import TrainingSpec

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
LENIENT = LintSpec(**dict.fromkeys(LintSpec.model_fields, 1.0))
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "area", "arguments": '{"r": [2, null]}'}}
]
BAD_CALL = {"type": "function", "function": {"name": "f", "arguments": "x"}}
TOOLS = [
    {"type": "function", "function": {"name": "area", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "wait", "description": "A while."}},
]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "1", "content": "12.6"},
    {"role": "assistant", "content": "yo"},
]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% for call in m.tool_calls %}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def run(
    tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, **settings: Any
) -> tuple[DataReport, TokenRows]:
    write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    spec = DataSpec(train=str(tmp_path / "rows.parquet"), **{"lint": LENIENT, **settings})
    report = tokenize(spec, tokenizer, tmp_path / "tokens")
    return report, TokenRows(tmp_path / "tokens")


def learned(ids: list[int], labels: list[int]) -> str:
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return TOKENIZER.decode([label for label in labels if label != IGNORE])


def test_alpaca_learns_the_response_alone(tmp_path: Path) -> None:
    rows = [{"instruction": "Say it", "input": "now", "output": "done"},
            {"instruction": "Say it", "input": None, "output": "ok"}]  # fmt: skip
    report, tokens = run(tmp_path, rows, template="alpaca_short")
    assert learned(*tokens.row(0)) == "done<|end|>"
    assert learned(*tokens.row(1)) == "ok<|end|>"
    text = TOKENIZER.decode(tokens.row(0)[0])
    assert text == (
        "### Instruction:\nSay it\n\n### Input:\nnow\n\n### Response:\ndone<|end|>"
    )  # fmt: skip
    assert "### Input" not in TOKENIZER.decode(tokens.row(1)[0])
    assert (report.rows, report.kept, report.label_tokens) == (2, 2, 8)


def test_the_long_template_has_the_preamble_of_alpaca() -> None:
    with_input = render_alpaca({"instruction": "i", "input": "x"}, "alpaca")
    without = render_alpaca({"instruction": "i", "input": ""}, "alpaca")
    assert with_input.startswith("Below is an instruction that describes a task, paired with")
    assert without.startswith("Below is an instruction that describes a task. Write")


def test_prompt_and_completion(tmp_path: Path) -> None:
    _, tokens = run(tmp_path, [{"prompt": "2+2=", "completion": "4"}])
    assert learned(*tokens.row(0)) == "4<|end|>"


def test_plain_text_is_learned_whole(tmp_path: Path) -> None:
    report, tokens = run(tmp_path, [{"text": "abc"}])
    assert learned(*tokens.row(0)) == "abc<|end|>"
    assert report.label_tokens == 3  # the first token is predicted from nothing


def test_chat_learns_every_assistant_turn_alone(tmp_path: Path) -> None:
    _, tokens = run(tmp_path, [{"messages": CHAT}])
    assert learned(*tokens.row(0)) == "yo<|end|>no<|end|>"


def test_keys_that_arrow_gives_every_turn_do_not_reach_the_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    mark = "{% if 'tool_calls' in m %}[calls]{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content", mark + "{{ m.content")
    calling = [CHAT[0], {**CHAT[1], "tool_calls": CALLS}, *CHAT[2:]]
    _, tokens = run(tmp_path, [{"messages": calling}], tokenizer)
    assert tokenizer.decode(tokens.row(0)[0]).count("[calls]") == 1


def tool_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("content", [{"content": None}, {}])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "texts"])
def test_tools_and_their_calls_are_what_the_template_renders(
    tmp_path: Path, kind: str, content: dict[str, None]
) -> None:
    """As OpenAI's fine-tuning files have them, and only what the assistant said is learned."""
    calling = {"role": "assistant", "tool_calls": CALLS, **content}
    messages = [TOOL_CHAT[0], calling, *TOOL_CHAT[2:]]
    rows: list[dict[str, Any]] = [{"messages": messages, "tools": TOOLS}, {"messages": CHAT}]
    if kind == "texts":
        rows[0]["tools"] = json.dumps(TOOLS)
    path = tmp_path / "rows.parquet"
    if kind == "jsonl":
        path = jsonl(tmp_path / "rows.jsonl", *rows)
    else:
        rows[1]["tools"] = None
        write_table(pa.Table.from_pylist(rows), path)
    spec, tokenizer = DataSpec(train=str(path)), tool_tokenizer()
    report = tokenize(spec, tokenizer, tmp_path / "tokens")
    tokens = TokenRows(tmp_path / "tokens")
    head = f"{json.dumps(TOOLS)}<|user|>hi<|assistant|>"
    called = 'area {"r": [2, null]}<|end|>'
    assert tokenizer.decode(tokens.row(0)[0]) == f"{head}{called}<|tool|>12.6<|assistant|>yo<|end|>"
    assert learned(*tokens.row(0)) == f"{called}yo<|end|>"
    assert learned(*tokens.row(1)) == "yo<|end|>no<|end|>"
    assert report.causes() == dict.fromkeys(report.causes(), 0)


def test_a_row_that_calls_a_tool_and_says_nothing_is_not_empty(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"messages": TOOL_CHAT[:2], "tools": TOOLS})
    report = tokenize(DataSpec(train=str(path)), tool_tokenizer(), tmp_path / "tokens")
    assert (report.empty, report.kept) == (0, 1)


def test_other_tools_are_other_tokens(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    """So the store's tokens of one file are not those of another."""
    found: list[tuple[str, list[int]]] = []
    for number, tools in enumerate((TOOLS, TOOLS[:1])):
        path = jsonl(tmp_path / f"{number}.jsonl", {"messages": TOOL_CHAT, "tools": tools})
        spec = DataSpec(train=str(path))
        tokenize(spec, tool_tokenizer(), tmp_path / f"tokens{number}")
        ids, _ = TokenRows(tmp_path / f"tokens{number}").row(0)
        found.append((fingerprint(spec, str(bases("llama"))), ids))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TOOL_CHAT, "tools": TOOLS}, "row 0: .* knows no tools; leave them out"),
        ({"messages": TOOL_CHAT}, "row 0: .* knows no tool_calls"),
    ],
)
def test_a_template_that_would_pass_over_tools_is_refused(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=reason):
        tokenize(DataSpec(train=str(path)), TOKENIZER, tmp_path / "tokens")


@pytest.mark.parametrize("task", ["seq_2_seq_lm", "sequence_classification"])
def test_a_call_is_no_target_and_no_class(tmp_path: Path, task: Any) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"messages": TOOL_CHAT[:2]})
    with pytest.raises(DataError, match=rf"row 0: messages\[1\] calls tools, and task {task}"):
        tokenize(DataSpec(train=str(path)), tool_tokenizer(), tmp_path / "tokens", task)


def test_what_is_rendered_as_text_has_the_tools_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"messages": TOOL_CHAT, "tools": TOOLS})
    tokenize(DataSpec(train=str(path)), tool_tokenizer(), tmp_path / "tokens", "seq_2_seq_lm")
    source, target = map(TOKENIZER.decode, TokenRows(tmp_path / "tokens").row(0))
    called = 'area {"r": [2, null]}<|end|>'
    head = f"{json.dumps(TOOLS)}<|user|>hi<|assistant|>"
    assert source == f"{head}{called}<|tool|>12.6<|assistant|>"
    assert target == "yo<|end|>"


def test_a_second_job_takes_the_tokens_of_the_first(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the store, until a row changes."""

    def prepare(*texts: str) -> tuple[str, DataReport]:
        write_table(pa.table({"text": texts}), tmp_path / "rows.arrow")
        document = {
            "base_model": str(bases("llama")), "method": {"kind": "lora"},
            "data": {"train": str(tmp_path / "rows.arrow")},
            "output": {"name": "mine", "store": str(tmp_path / "store")},
        }  # fmt: skip
        spec = parse_spec(TrainingSpec, document)
        return job._prepare_tokens(spec, spec.data, open_store(spec.output.store))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    first = prepare("one", "two")
    monkeypatch.setattr(job, "tokenize", refuse)
    assert prepare("one", "two") == first
    with pytest.raises(AssertionError, match="tokenised again"):
        prepare("one", "three")


def test_of_several_chat_templates_the_default_is_taken(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    own = tokenizer.chat_template.replace("{% generation %}", "{%-generation-%}")
    tokenizer.chat_template = {"default": own, "tool_use": "{{ messages }}"}
    _, tokens = run(tmp_path, [{"messages": CHAT}], tokenizer)
    assert learned(*tokens.row(0)) == "yo<|end|>no<|end|>"


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path) -> None:
    resource.prlimit(0, resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(StoreError, match=r"tokens: tokenised rows cannot be written .*TMPDIR"):
            run(tmp_path, [{"text": f"{n} " * 900} for n in range(200)])
    finally:
        resource.prlimit(0, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        signal.signal(signal.SIGXFSZ, before)


def test_chat_without_generation_marks_is_refused(tmp_path: Path) -> None:
    bare = byte_tokenizer()
    bare.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="generation"):
        run(tmp_path, [{"messages": CHAT}], bare)
    bare.chat_template = None
    with pytest.raises(DataError, match="chat template"):
        run(tmp_path, [{"messages": CHAT}], bare)


@pytest.mark.parametrize(
    ("over_long", "counted"), [("truncate", "truncated"), ("drop", "dropped"), ("fail", None)]
)
def test_longer_rows(tmp_path: Path, over_long: str, counted: str | None) -> None:
    rows = [{"text": "a" * 50}, {"text": "b" * 5}]
    if counted is None:
        with pytest.raises(DataError, match="row 0 has 51 tokens"):
            run(tmp_path, rows, max_length=20, over_long=over_long)
        return
    report, tokens = run(tmp_path, rows, max_length=20, over_long=over_long)
    assert getattr(report, counted) == 1
    assert counted in report.summary()
    assert max(tokens.lengths) <= 20


def test_rows_without_a_learned_token_are_counted_out(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 40, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    report, tokens = run(tmp_path, rows, max_length=20)
    assert (report.without_label, report.kept, len(tokens)) == (1, 1, 1)
    with pytest.raises(DataError, match="no row is left to learn from"):
        run(tmp_path, rows[:1], max_length=20)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"instruction": "i", "output": None}], "row 0: column 'output' holds NoneType"),
        ([{"instruction": "i", "output": "o"}, {"instruction": "i", "output": None}], "row 1"),
        ([{"text": 3}], "'text' holds int"),
        ([{"text": b"x"}], "'text' holds bytes"),
        ([{"text": {"a": 1}}], "'text' holds dict"),
        ([{"messages": []}], "row 0: messages"),
        (
            [{"messages": [{"role": "user", "content": None}]}],
            r"row 0: messages\[0\].content holds",
        ),
        ([{"messages": [{"role": "user", "content": "", "tool_calls": CALLS}]}], "'user' cannot"),
        ([{"messages": [{"role": "assistant", "tool_calls": "f()"}]}], "tool_calls must be a list"),
        (
            [{"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}],
            r"messages\[1\].weight is 0, and all",
        ),
        ([{"messages": CHAT, "tools": "{"}], "row 0: tools are no JSON: '{'"),
        ([{"messages": CHAT, "tools": "3"}], "row 0: tools must be a list"),
        ([{"messages": CHAT, "tools": ["f"]}], "row 0: tools must be a list"),
        ([{"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}], "no JSON: 'x'"),
        ([{"question": "q", "answer": "a"}], "fit no known format"),
    ],
)
def test_bad_cells_are_named(tmp_path: Path, rows: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        run(tmp_path, rows)


@pytest.mark.parametrize("task", ["causal_lm", "seq_2_seq_lm", "sequence_classification"])
def test_a_token_that_the_base_has_no_embedding_of_is_named(
    bases: Callable[[str], Path], tmp_path: Path, task: Task
) -> None:
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    grown = byte_tokenizer()
    grown.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    grown.save_pretrained(base)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a<|new|>", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(train=str(tmp_path / "rows.jsonl"), labels=("b",))
    reason = r"row 1: has the token '<\|new\|>', number 261, .* vocabulary of 261 .*; save the base"
    with pytest.raises(DataError, match=reason):
        tokenize(spec, load_tokenizer(str(base)), tmp_path / "tokens", task)


def test_an_input_that_only_a_late_line_has_is_read(tmp_path: Path) -> None:
    rows = [{"instruction": "i", "output": "o"}] * 300
    lines = [json.dumps(row) for row in [*rows, {**rows[0], "input": "late"}]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    stream = stream_rows(tmp_path / "rows.jsonl")
    *_, last = iterate_rows(stream, detect_format(stream, "auto"))
    assert last["input"] == "late"


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs column 'output'; the file has instruction"):
        run(tmp_path, [{"instruction": "i"}], format="alpaca")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    column = pa.array([b"ok", b"\xff\xfe"]).view(pa.binary())
    text = pa.StringArray.from_buffers(2, *column.buffers()[1:])
    write_table(pa.table({"text": text}), tmp_path / "rows.arrow")
    spec = DataSpec(train=str(tmp_path / "rows.arrow"))
    with pytest.raises(DataError, match="not UTF-8"):
        tokenize(spec, TOKENIZER, tmp_path / "tokens.arrow")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        run(tmp_path, [{"text": "abc"}], endless)


def test_counts_agree_with_the_rows(tmp_path: Path) -> None:
    report, tokens = run(tmp_path, [{"prompt": "p" * n, "completion": "c" * n} for n in (1, 5, 9)])
    assert tokens.lengths.tolist() == [3, 11, 19]
    assert tokens.label_counts.tolist() == [2, 6, 10]
    assert (report.tokens, report.label_tokens) == (33, 18)


def test_the_fingerprint_follows_all_that_shapes_the_tokens(
    tmp_path: Path, bases: Callable[[str], Path]
) -> None:
    write_table(pa.table({"text": ["abc"]}), tmp_path / "rows.parquet")
    base = str(bases("llama"))
    spec = DataSpec(train=str(tmp_path / "rows.parquet"))
    first = fingerprint(spec, base)
    assert fingerprint(spec, base) == first
    assert fingerprint(spec.model_copy(update={"max_length": 9}), base) != first
    write_table(pa.table({"text": ["abd"]}), tmp_path / "rows.parquet")
    assert fingerprint(spec, base) != first


FOUND: dict[str, list[dict[str, Any]]] = {
    "empty": [{"prompt": "p", "completion": " "}],
    "without_label": [{"prompt": "p" * 40, "completion": "c"}],
    "truncated": [{"prompt": "p", "completion": "c" * 40}],
    "duplicate": [{"prompt": "p", "completion": "same"}] * 2,
    "doubled_eos": [{"prompt": "p", "completion": "done<|end|>"}],
    "doubled_bos": [{"prompt": "<|user|>p", "completion": "c"}],
}


@pytest.mark.parametrize("cause", FOUND)
def test_what_is_wrong_is_counted_by_cause_and_fails_the_job(tmp_path: Path, cause: str) -> None:
    tokenizer = byte_tokenizer(opening="<|user|>")
    fine = [{"prompt": f"p{i}", "completion": "c"} for i in range(9)]
    report, _ = run(tmp_path, fine + FOUND[cause], tokenizer, max_length=20)
    counted = {name for name, count in report.causes().items() if count}
    assert counted - {cause} <= {"truncated"}  # the row without a label was cut, too
    assert getattr(report, cause) == 1
    assert f"1 {cause.replace('_', ' ')}" in report.summary()
    strict = LENIENT.model_copy(update={cause: 0.05})
    with pytest.raises(DataError, match=rf"{cause}: 1 of 1\d .* data.lint.{cause} 0.05; "):
        run(tmp_path, fine + FOUND[cause], tokenizer, max_length=20, lint=strict)


def test_chat_rows_without_an_opening_or_an_end_are_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(opening="<|system|>")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"
    )
    report, _ = run(tmp_path, [{"messages": CHAT}], tokenizer)
    assert (report.missing_bos, report.missing_eos) == (1, 1)


def test_the_first_rows_are_shown_with_what_is_learned_marked(tmp_path: Path) -> None:
    long = {"prompt": "a\n" + "p" * 400, "completion": "c" * 400}
    report, _ = run(tmp_path, [{"prompt": "2+2=", "completion": "4"}, long, long, long])
    assert report.shown[0] == "2+2=⟦4<|end|>⟧"
    assert len(report.shown) == 3
    assert report.shown[1].startswith("a↵ppp")
    assert re.fullmatch(r"a↵p+ … p+⟦c+ … c+<\|end\|>⟧", report.shown[1])


def test_the_tokens_lie_in_files_of_bounded_size(tmp_path: Path) -> None:
    rows = [([i, i + 1, i + 2], [IGNORE, i + 1, i + 2]) for i in range(5_000)]
    write_rows(((*row, row_hash(*row)) for row in rows), tmp_path, part_bytes=60_000)
    sizes = [part.stat().st_size for part in sorted(tmp_path.iterdir())]
    assert len(sizes) > 2
    assert max(sizes) < 120_000
    assert [TokenRows(tmp_path).row(i) for i in (0, 1023, 1024, 4_999)] == [
        rows[i] for i in (0, 1023, 1024, 4_999)
    ]


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data._PROGRESS_S", -1.0)
    write_table(pa.table({"text": ["abc"] * 3}), tmp_path / "rows.parquet")
    spec, told = DataSpec(train=str(tmp_path / "rows.parquet"), lint=LENIENT), []
    tokenize(spec, TOKENIZER, tmp_path, on_progress=lambda *at: told.append(at))
    assert told == [(0, 3), (1, 3), (2, 3)]


def test_rows_that_the_cut_made_alike_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": "a" * 20 + end} for end in "xyz"]
    report, tokens = run(tmp_path, rows, max_length=10)
    assert (report.truncated, report.duplicate, len(set(tokens.hashes))) == (3, 0, 1)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5])
def test_the_split_follows_from_the_seed_and_the_rows_alone(tmp_path: Path, share: float) -> None:
    texts = [f"row {i}" for i in range(200)] + ["twice"] * 20
    rows = [{"text": text} for text in texts]
    _, one = run(tmp_path, rows)
    _, other = run(tmp_path, rows[::-1])

    def sides(tokens: TokenRows, seed: int) -> list[list[str]]:
        return [
            sorted(TOKENIZER.decode(part.row(i)[0][:-1]) for i in range(len(part)))
            for part in split(tokens, share, seed)
        ]

    train, validation = sides(one, 3)
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert abs(len(validation) - share * 220) <= 20
    assert sides(other, 3) == [train, validation]
    assert sides(one, 4) != [train, validation]
    _, same = run(tmp_path, rows[-20:])
    with pytest.raises(DataError, match="leaves none of 20 rows to train on"):
        split(same, share, 3)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("is_packed", [True, False])
def test_each_row_is_seen_once_per_epoch_on_any_number_of_workers(
    rows: int, world_size: int, is_packed: bool
) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    seen: list[int] = []
    for batch in epoch_batches(lengths, 6, seed=3, epoch=1, is_packed=is_packed):
        for rank in range(world_size):
            parts = micro_batches(batch, lengths[batch], rank, world_size, 2, is_packed=is_packed)
            assert len(parts) == 2
            for part in parts:
                assert len(part) <= -(-len(batch) // (2 * world_size))
                seen += part.tolist()
    assert sorted(seen) == list(range(rows))


def test_packed_micro_batches_have_about_as_many_tokens() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.6, 32).astype(int)
    rows = np.arange(32)
    tokens = [
        int(lengths[part].sum())
        for rank in range(2)
        for part in micro_batches(rows, lengths, rank, 2, 4, is_packed=True)
    ]
    assert len(tokens) == 8
    assert max(tokens) < 1.1 * np.mean(tokens)


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(is_packed: bool) -> None:
    lengths = np.arange(1, 301)
    order = [np.concatenate(epoch_batches(lengths, 4, *at, is_packed=is_packed)).tolist() for at in
             ((0, 0), (0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert order[0] == order[1]
    assert order[0] != order[2] != order[3] != order[0]


def test_a_plan_of_rows_that_teach_nothing_fails(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Also where there are more than it reads."""
    rows = [{"prompt": f"{i}", "completion": "yes"} for i in range(300)]
    write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    document = {
        "base_model": str(bases("llama")), "method": {"kind": "lora"}, "output": {"name": "x"},
        "data": {"train": str(tmp_path / "rows.parquet"), "max_length": 1},
    }  # fmt: skip
    with pytest.raises(DataError, match=r"its first 200 rows .*data\.max_length"):
        plan(parse_spec(TrainingSpec, document))
