"""Encoder-decoders and classifiers: rows, refusals, exact losses, folders that plain PEFT loads."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
import transformers
from adapters import randomize
from conftest import CONFIGS, byte_tokenizer, closing_tokenizer
from workers import Case, Workers, run_case, state_of, weights_of

from cluster.base_model import empty_base, load_base
from cluster.errors import BaseModelError, DataError, SpecError
from cluster.spec import parse_spec
from cluster.tables import write_table
from cluster.tasks import TASKS, Task
from training import load_adapter
from training.assembly import check_base
from training.class_evaluation import macro_f1
from training.classifier import Classifier, Prediction, collate_labelled
from training.command import plan, resolved
from training.data import fingerprint, tokenize
from training.data_spec import DataSpec, LintSpec
from training.labels import class_number, find_labels
from training.methods import METHODS, trainable_parameters
from training.place import Place
from training.rows import IGNORE, TokenRows
from training.seq2seq import Seq2SeqModel, collate_pairs
from training.spec import TrainingSpec
from training.step import Continuation
from training.task_spec import UNDEFINED
from training.tasks import TASK_PARTS

LABELS = ("bird", "fish", "worm")
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 96, "vocab_size": 261}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BASES: dict[str, Callable[[], Any]] = {
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=261, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=256,
            tie_word_embeddings=True,
        )
    ),
    # As mT5 and the later T5s are: a gated feed-forward, and a head of its own.
    "mt5": lambda: transformers.MT5ForConditionalGeneration(
        transformers.MT5Config(
            vocab_size=261, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=256,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=261, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, dropout=0.0, max_position_embeddings=96, pad_token_id=1,
            bos_token_id=0, eos_token_id=256, decoder_start_token_id=256, forced_eos_token_id=None,
        )
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**SIZE, **HEADS, **QUIET, pad_token_id=0)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SIZE, **HEADS, **QUIET, pad_token_id=1)
    ),
    "llama": lambda: transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()),
    "bloom": lambda: transformers.AutoModelForCausalLM.from_config(CONFIGS["bloom"]()),
}  # fmt: skip
SEQ2SEQ, CLASSIFIERS = ("t5", "mt5", "bart"), ("llama", "bert", "roberta")


def task_of(family: str) -> Task:
    return "seq_2_seq_lm" if family in SEQ2SEQ else "sequence_classification"


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a base of that family, with random weights, made at first use."""
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model = BASES[family]()
            with torch.no_grad():
                for parameter in model.parameters():
                    # Large enough that tokens differ; T5's attention is not scaled.
                    scale = {"t5": 1, "mt5": 1, "bart": 2}.get(family, 3)
                    parameter.mul_(scale if parameter.ndim > 1 else 1)
            model.save_pretrained(folder)
            opening = "<|user|>" if family in ("bart", "bert", "roberta") else None
            causal = family in ("llama", "bloom")
            (byte_tokenizer() if causal else closing_tokenizer(opening)).save_pretrained(folder)
        return made[family]

    return base


def load(base: Path, task: Task) -> Any:
    """A fresh one, its new head the same each time."""
    torch.manual_seed(7)
    labels = LABELS if task == "sequence_classification" else ()
    return load_base(str(base), torch.float32, task=task, labels=labels)


def document(base: Path, task: Task, **settings: Any) -> dict[str, Any]:
    data = {"train": "unused"} | ({"labels": LABELS} if task == "sequence_classification" else {})
    return {"base_model": str(base), "task": task, "method": {"kind": "lora"}, "data": data,
            "output": {"name": "unused"}, **settings}  # fmt: skip


def attach(base: Path, task: Task, method: dict[str, Any]) -> tuple[Any, str]:
    spec = parse_spec(TrainingSpec, document(base, task, method=method)).method
    model = load(base, task)
    torch.manual_seed(1)
    return METHODS[spec.kind].attach(model, spec, str(base)), spec.kind


METHOD_CASES: list[dict[str, Any]] = [
    {"kind": "lora", "r": 3},
    {"kind": "lora", "r": 3, "use_dora": True, "use_rslora": True},
    {"kind": "lora", "r": 4, "init": "pissa"},
    {"kind": "lora", "r": 4, "init": "olora"},
    {"kind": "adalora", "r": 2, "init_r": 3},
    {"kind": "dylora", "r": 3},
    {"kind": "ia3"},
    {"kind": "bitfit"},
    {"kind": "layernorm"},
    {"kind": "fishmask", "share": 0.02},
    {"kind": "child_tuning"},
    {"kind": "full"},
    {"kind": "bottleneck", "placement": "houlsby", "reduction_factor": 4},
    {"kind": "bottleneck", "placement": "pfeiffer", "reduction_factor": 4},
    {"kind": "bottleneck", "placement": "parallel", "reduction_factor": 4},
    {"kind": "prompt_tuning", "num_virtual_tokens": 4},
    {"kind": "p_tuning", "num_virtual_tokens": 4},
    {"kind": "prefix_tuning", "num_virtual_tokens": 4},
    {"kind": "prefix_tuning", "num_virtual_tokens": 4, "projection": True},
]
RANDOM = {"prompt_tuning", "p_tuning", "prefix_tuning"}


def name_of(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))[:32]


def logits(model: Any, task: Task) -> torch.Tensor:
    ids = torch.arange(14)[None] + 40
    with torch.no_grad():
        if task == "sequence_classification":
            return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return model.eval()(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=torch.arange(6)[None] + 70,
        ).logits


@pytest.mark.parametrize("family", [*SEQ2SEQ, *CLASSIFIERS])
@pytest.mark.parametrize("case", METHOD_CASES, ids=name_of)
def test_a_saved_adapter_loads_to_the_same_logits_in_peft_too(
    base_of: Callable[[str], Path], family: str, case: dict[str, Any], tmp_path: Path
) -> None:
    base, task = base_of(family), task_of(family)
    model, kind = attach(base, task, case)
    randomize(model)
    METHODS[kind].save(model, tmp_path)
    expected = logits(model, task)
    # What starts from a part of the base is saved as a difference, which is rounded once more.
    limit = (1e-4 if "init" in case else 1e-5) * max(1, float(expected.abs().max()))
    assert (expected - logits(load(base, task), task)).abs().max() > 1e-3
    fresh = load(base, task)
    with torch.no_grad():  # whoever loads it has another new head
        for name, parameter in fresh.named_parameters():
            if not name.startswith(fresh.base_model_prefix) and task == "sequence_classification":
                parameter.add_(1.0)
    assert (logits(load_adapter(fresh, tmp_path), task) - expected).abs().max() < limit
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    is_classifier = task == "sequence_classification"
    assert config["task_type"] == ("SEQ_CLS" if is_classifier else "SEQ_2_SEQ_LM")
    if METHODS[kind].peft_type is None:
        auto: Any = peft.AutoPeftModelForSeq2SeqLM
        options: dict[str, Any] = {}
        if is_classifier:
            auto, options = peft.AutoPeftModelForSequenceClassification, {"num_labels": len(LABELS)}
        plain = auto.from_pretrained(tmp_path, **options)
        assert (logits(plain, task) - expected).abs().max() < limit


def test_bitfits_small_subset_is_found_in_the_papers_own_base(
    base_of: Callable[[str], Path],
) -> None:
    model, _ = attach(
        base_of("bert"), "sequence_classification", {"kind": "bitfit", "subset": "query_mlp"}
    )
    trained = {name.removeprefix("bert.encoder.layer.") for name in trainable_parameters(model)}
    biases = ("attention.self.query.bias", "intermediate.dense.bias")
    expected = {f"{layer}.{name}" for layer in (0, 1) for name in biases}
    assert trained == expected | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_demonstrations_stand_before_the_source(
    base_of: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Exactly as if their tokens did."""
    base, text = base_of(family), "abc -> cba"
    model, _ = attach(base, "seq_2_seq_lm", {"kind": "hard_prompt", "text": text})
    METHODS["hard_prompt"].save(model, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    first = tokenizer(text)["input_ids"][:-1]
    ids, decoder = torch.arange(9)[None] + 40, torch.arange(6)[None] + 70
    plain, adapted = load(base, "seq_2_seq_lm").eval(), load(base, "seq_2_seq_lm")
    with torch.no_grad():
        found = load_adapter(adapted, tmp_path)(input_ids=ids, decoder_input_ids=decoder)
        whole = torch.cat([torch.tensor([first]), ids], 1)
        expected = plain(input_ids=whole, decoder_input_ids=decoder)
    assert (found.logits - expected.logits).abs().max() < 1e-5


# Rows of two to thirteen tokens; a source or text, and a target or class.
PAIRS = [([40 + n, *range(60, 60 + n)], [*range(70, 71 + n % 4), 256]) for n in (5, 12, 1, 7)]
TEXTS = [(ids, [n % 3]) for n, (ids, _) in enumerate(PAIRS)]


@pytest.mark.parametrize("family", [*SEQ2SEQ, *CLASSIFIERS, "bloom"])
@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prompt_tuning", "prefix_tuning"])
def test_the_loss_is_that_of_each_row_alone(
    base_of: Callable[[str], Path], family: str, kind: str
) -> None:
    """By transformers' own loss, through PEFT's own forward."""
    if (family, kind) == ("bloom", "bottleneck"):
        pytest.skip("BLOOM's sublayers add the residual themselves")
    task = task_of(family)
    model, _ = attach(base_of(family), task, {"kind": kind})
    randomize(model)
    parts = TASK_PARTS[task]
    measured = parts.model(model).eval()
    rows = PAIRS if task == "seq_2_seq_lm" else TEXTS
    trained = trainable_parameters(model)
    loss = measured(parts.collate(rows, torch.device("cpu")))
    gradients = torch.autograd.grad(loss, [*trained.values()])
    expected = torch.zeros(())
    with measured._unpacked():  # as it computes without us
        for ids, labels in rows:
            inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
            if task == "sequence_classification":
                inputs["labels"] = torch.tensor(labels)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            count = len(labels) if task == "seq_2_seq_lm" else 1
            expected = expected + model(**inputs).loss * count
    wanted = torch.autograd.grad(expected, [*trained.values()])
    assert abs(float((loss - expected).detach())) < 1e-5 * max(1, float(expected.detach()))
    for name, mine, theirs in zip(trained, gradients, wanted, strict=True):
        assert (mine - theirs).abs().max() < 1e-3 * max(1, float(theirs.abs().max())), name
    nothing = [(ids, [IGNORE] * len(labels)) for ids, labels in rows[:1]]
    empty = measured(parts.collate(nothing, torch.device("cpu")))
    assert float(empty.detach()) == 0
    empty.backward()
    assert all(p.grad is not None and not p.grad.any() for p in trained.values())


def test_a_classifier_reads_what_transformers_reads(base_of: Callable[[str], Path]) -> None:
    """Behind an end token that is the padding token too, it is the token before it."""
    model = load(base_of("llama"), "sequence_classification")
    pad = model.config.pad_token_id
    measured = Classifier(model).eval()
    assert measured.is_packed
    rows = [([50, 51, 52, pad], [0]), ([60, 61], [1]), ([pad, pad], [2])]
    with torch.no_grad():
        found = measured(Prediction(collate_labelled(rows, torch.device("cpu"))))
        with measured._unpacked():
            alone = [model(input_ids=torch.tensor([ids])).logits for ids, _ in rows]
    assert (found - torch.cat(alone)).abs().max() < 1e-5


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_encoders_are_padded_and_causal_bases_are_not(
    base_of: Callable[[str], Path], family: str
) -> None:
    model, _ = attach(base_of(family), "sequence_classification", {"kind": "lora"})
    assert Classifier(model).is_packed == (family == "llama")


UNFIT: dict[str, Callable[[], Any]] = {
    "Canine": lambda: transformers.CanineForSequenceClassification(
        transformers.CanineConfig(**SIZE, num_attention_heads=4, max_position_embeddings=512)
    ),
    "Funnel": lambda: transformers.FunnelForSequenceClassification(
        transformers.FunnelConfig(
            vocab_size=261, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48
        )
    ),
}


@pytest.mark.parametrize("family", UNFIT)
def test_a_base_that_fails_as_a_classifier_is_refused_by_name(family: str) -> None:
    with pytest.raises(BaseModelError, match=f"{family}ForSequence.*name a base of another family"):
        Classifier(UNFIT[family]())


def test_a_classifier_whose_window_only_the_mask_tells_is_padded() -> None:
    config = transformers.PhimoeConfig(
        **SIZE, **HEADS, num_key_value_heads=2, num_local_experts=4, sliding_window=12,
        initializer_range=0.3, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    rows = [(list(range(3, 3 + n)), [0]) for n in (30, 5)]
    measured = Classifier(model).eval()
    assert not measured.is_packed
    with torch.no_grad():
        found = measured(Prediction(collate_labelled(rows, torch.device("cpu"))))
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids, _ in rows])
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("kind", ["lora", "prompt_tuning", "prefix_tuning"])
def test_greedy_answers_are_those_of_generate(
    base_of: Callable[[str], Path], family: str, kind: str
) -> None:
    model, _ = attach(base_of(family), "seq_2_seq_lm", {"kind": kind})
    randomize(model)
    measured = Seq2SeqModel(model).eval()
    source = torch.tensor([[*range(40, 52), 256]])
    row, answer = Continuation(source[0].tolist()), list[int]()
    with torch.no_grad():
        for _ in range(8):
            answer.append(int(measured(row).argmax()))
            row.ids.append(answer[-1])
            if answer[-1] == 256:
                break
        expected = model.generate(
            input_ids=source, attention_mask=torch.ones_like(source), max_new_tokens=8,
            do_sample=False, num_beams=1,
        )  # fmt: skip
    assert answer == expected[0, 1 : 1 + len(answer)].tolist()


def test_an_answer_begins_as_targets_do_where_these_wrap_around() -> None:
    """mBART's decoder reads a target's last token first, whatever the source ends with; its
    configuration names that token."""
    config = transformers.MBartConfig(
        vocab_size=261, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=256, max_position_embeddings=96,
    )  # fmt: skip
    torch.manual_seed(0)
    measured = Seq2SeqModel(transformers.MBartForConditionalGeneration(config)).eval()
    source, target = [40, 41, 42], [50, 51, 2, 256]
    loss = measured(collate_pairs([(source, target)], torch.device("cpu")))
    row = Continuation(source)
    learned = torch.zeros(())
    for token in target:
        learned -= measured(row).log_softmax(0)[token].detach()
        row.ids.append(token)
    assert float(loss.detach()) == pytest.approx(float(learned), rel=1e-5)


def test_a_base_that_leaves_out_layers_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["bart"]()
    config.encoder_layerdrop = 0.05
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # never opened
    base = empty_base(str(tmp_path), task="seq_2_seq_lm")
    spec = parse_spec(TrainingSpec, document(tmp_path, "seq_2_seq_lm"))
    with pytest.raises(BaseModelError, match=r"set encoder_layerdrop to 0 in its config\.json"):
        check_base(base, spec)


@pytest.mark.parametrize(("task", "kind"), UNDEFINED)
def test_a_method_that_a_task_has_not_is_refused_with_the_reason(task: Task, kind: str) -> None:
    method = {"kind": kind}
    if kind == "proxy_tuning":
        method |= {"small_base": "x", "expert": {"kind": "lora"}}
    with pytest.raises(SpecError, match=f"{kind} is not defined for task {task}: .*; take "):
        parse_spec(TrainingSpec, document(Path("x"), task, method=method))


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("seq_2_seq_lm", {"data": {"train": "x", "format": "text"}}, "has no source"),
        ("causal_lm", {"data": {"train": "x", "labels": ["a", "b"]}}, "has no classes"),
        ("sequence_classification", {"data": {"train": "x", "labels": ["a"]}}, "at least two"),
        ("sequence_classification", {"data": {"train": "x", "labels": ["a", "a"]}}, "different"),
        ("sequence_classification",
         {"data": {"train": "x", "validation": 0.1}, "evaluation": {"best": "rouge_l"}},
         "take loss, accuracy, macro_f1, none"),
        ("seq_2_seq_lm",
         {"data": {"train": "x", "validation": 0.1}, "evaluation": {"best": "accuracy"}},
         "take loss, exact_match, rouge_l, none"),
        ("classification", {}, "did you mean 'sequence_classification'"),
    ],
)  # fmt: skip
def test_a_setting_that_a_task_has_not_is_refused(
    task: Task, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(TrainingSpec, document(Path("x"), task, **settings))


@pytest.mark.parametrize(
    ("family", "task", "message"),
    [
        ("t5", "causal_lm", "T5ForConditionalGeneration is an encoder-decoder.*seq_2_seq_lm"),
        ("bart", "causal_lm", "BartForConditionalGeneration is an encoder-decoder"),
        ("t5", "sequence_classification", "is an encoder-decoder.*learns the label as text"),
        ("llama", "seq_2_seq_lm", "LlamaForCausalLM is no encoder-decoder.*causal_lm"),
        ("bert", "causal_lm", "BertModel is an encoder.*sequence_classification"),
        ("roberta", "seq_2_seq_lm", "is no encoder-decoder"),
    ],
)
def test_a_base_for_another_task_is_refused_by_name(
    base_of: Callable[[str], Path], family: str, task: Task, message: str
) -> None:
    for make in (empty_base, partial(load_base, dtype=torch.float32)):
        with pytest.raises(BaseModelError, match=message):
            make(str(base_of(family)), task=task, labels=LABELS)


def test_a_body_with_new_weights_is_refused(tmp_path: Path) -> None:
    """BERT's pooler is not in what a masked LM was saved as, and in no adapter."""
    config = transformers.BertConfig(**SIZE, **HEADS)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"lacks bert.pooler.dense.bias, .*random"):
        load_base(str(tmp_path), torch.float32, task="sequence_classification", labels=LABELS)


def test_a_head_of_another_number_of_classes_is_refused_by_a_plan(tmp_path: Path) -> None:
    """Before any weights are read; the remedy that it names works."""
    task: Task = "sequence_classification"
    config = transformers.BertConfig(**SIZE, **HEADS, num_labels=2)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    reason = r"classifier.weight is \[2, 32\], where 3 .* take \[3, 32\]; .*AutoModel"
    with pytest.raises(BaseModelError, match=reason):
        empty_base(str(tmp_path), task, LABELS)
    assert empty_base(str(tmp_path), task, LABELS[:2]).config.num_labels == 2
    transformers.AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "body")
    assert empty_base(str(tmp_path / "body"), task, LABELS).config.num_labels == 3
    load_base(str(tmp_path / "body"), torch.float32, task=task, labels=LABELS)


def tokenized(
    folder: Path, rows: list[dict[str, Any]], task: Task, tokenizer: Any, **settings: Any
) -> tuple[Any, TokenRows]:
    write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    lenient = LintSpec(**dict.fromkeys(LintSpec.model_fields, 1.0))
    spec = DataSpec(train=str(folder / "rows.parquet"), **{"lint": lenient, **settings})
    report = tokenize(spec, tokenizer, folder / "tokens", task)
    return report, TokenRows(folder / "tokens")


def test_rows_of_an_encoder_decoder(tmp_path: Path) -> None:
    """Both sides close as the tokenizer has it, and a cut one says what it is."""
    tokenizer = closing_tokenizer("<|user|>")
    rows = [{"prompt": "abcdef", "completion": "xyz"}, {"prompt": "abcdefgh", "completion": "x"},
            {"prompt": "a", "completion": "123456789"},
            {"prompt": "a", "completion": ""}]  # fmt: skip
    report, tokens = tokenized(tmp_path, rows, "seq_2_seq_lm", tokenizer, max_length=8)
    text = [tuple(map(tokenizer.decode, tokens.row(i))) for i in range(4)]
    assert text[0] == ("<|user|>abcdef<|end|>", "<|user|>xyz<|end|>")
    assert text[1] == ("<|user|>abcdef<|end|>", "<|user|>x<|end|>")
    assert text[2][1] == "<|user|>1234567"
    assert (report.truncated, report.empty, report.missing_eos, report.kept) == (2, 1, 0, 4)
    assert report.shown[0] == "<|user|>abcdef<|end|>⟦<|user|>xyz<|end|>⟧"
    assert tokens.label_counts.tolist() == [5, 3, 8, 2]
    assert tokens.lengths.tolist() == [13, 11, 11, 5]
    assert report.tokens == 40
    assert len(set(tokens.hashes.tolist())) == 4


def test_a_chats_last_turn_is_the_target(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    tokenizer = closing_tokenizer(None)
    _, tokens = tokenized(tmp_path, [{"messages": turns}], "seq_2_seq_lm", tokenizer)
    assert tokenizer.decode(tokens.row(0)[0]) == "<|user|>hi<|assistant|><|end|>"
    assert tokenizer.decode(tokens.row(0)[1]) == "yo<|end|>"
    with pytest.raises(DataError, match="row 0: a chat row must end with the assistant's turn"):
        tokenized(tmp_path, [{"messages": turns[:1]}], "seq_2_seq_lm", tokenizer)


def test_rows_of_a_classifier(tmp_path: Path) -> None:
    rows = [{"text": "swims", "label": "fish"}, {"text": "flies far away", "label": " bird "},
            {"text": " ", "label": "worm"}, {"text": "digs", "label": None}]  # fmt: skip
    report, tokens = tokenized(
        tmp_path, rows, "sequence_classification", closing_tokenizer("<|user|>"),
        labels=LABELS, max_length=8,
    )  # fmt: skip
    assert [tokens.row(i)[1] for i in range(3)] == [[1], [0], [2]]
    assert tokens.row(1)[0][-1] == 256
    assert len(tokens.row(1)[0]) == 8
    assert (report.without_label, report.empty, report.truncated, report.kept) == (1, 1, 1, 3)
    assert tokens.label_counts.tolist() == [1, 1, 1]
    assert report.shown[0] == "<|user|>swims<|end|>⟦fish⟧"
    with pytest.raises(DataError, match=r"row 1: label 'cat' is none of bird, fish, worm"):
        tokenized(tmp_path, [rows[0], {"text": "purrs", "label": "cat"}],
                  "sequence_classification", byte_tokenizer(), labels=LABELS)  # fmt: skip
    with pytest.raises(DataError, match=r"column 'label' holds float, not a name or a whole"):
        tokenized(tmp_path, [{"text": "x", "label": 1.0}], "sequence_classification",
                  byte_tokenizer(), labels=LABELS)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b", None], ("a", "b")),
        ([2, 0, 1, 1], ("0", "1", "2")),
        ([True, False], ("false", "true")),
        ([1, 2], "numbers of classes are 0 to n - 1"),
        (["a", "a"], "has 1 labels"),
        (list(map(str, range(1001))), "more than 1,000 different labels"),
    ],
)
def test_classes_are_found_in_the_rows(
    tmp_path: Path, values: list[Any], expected: tuple[str, ...] | str
) -> None:
    path = tmp_path / "rows.parquet"
    write_table(pa.table({"text": ["x"] * len(values), "label": values}), path)
    if isinstance(expected, tuple):
        assert find_labels(DataSpec(train=str(path))) == expected
        return
    with pytest.raises(DataError, match=expected):
        find_labels(DataSpec(train=str(path)))


def test_a_number_is_a_class_or_a_name() -> None:
    assert class_number(2, LABELS) == 2
    assert class_number(2, ("1", "2", "4")) == 1
    for label, labels in ((3, LABELS), (-1, LABELS), (0, ("1", "2")), ("Fish", LABELS)):
        with pytest.raises(DataError, match="is none of"):
            class_number(label, labels)


def test_the_cache_knows_the_task_and_the_labels(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "rows.parquet")
    spec, base = DataSpec(train=str(tmp_path / "rows.parquet")), str(base_of("llama"))
    named = [spec.model_copy(update={"labels": labels}) for labels in (("a", "b"), ("b", "a"))]
    found = [fingerprint(spec, base, task) for task in TASKS]
    found += [fingerprint(data, base, "sequence_classification") for data in named]
    assert len(set(found)) == 5


def test_macro_f1() -> None:
    given, expected = np.array([0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 0])
    # 0: TP 1 FP 1 FN 1; 1: TP 2 FP 0 FN 1; 3: TP 0 FP 1.
    assert macro_f1(given, expected) == pytest.approx((0.5 + 0.8 + 0) / 3)


def test_a_plan_names_the_classes_and_roberta_has_two_positions_less(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    write_table(pa.table({"text": [*"abcdefghi"], "label": [*"xyz"] * 3}), path)
    settings = document(base_of("roberta"), "sequence_classification", data={"train": str(path)})
    spec = resolved(parse_spec(TrainingSpec, settings))
    assert spec.data.labels == ("x", "y", "z")
    assert spec.data.max_length == 94
    # LoRA of rank 8 on 12 modules of two layers, and the head: 32 x 32 + 32 and 32 x 3 + 3.
    assert plan(spec).trainable_parameters == 2 * 8 * (4 * 64 + 2 * 80) + 1056 + 99
    too_long = spec.model_copy(update={"data": spec.data.model_copy(update={"max_length": 95})})
    with pytest.raises(SpecError, match="at most 94"):
        resolved(too_long)


# One method of each way to train and save a head, or to reach both stacks.
RUNS: dict[str, list[dict[str, Any]]] = {
    "t5": [{"kind": "lora", "r": 4, "use_dora": True},
           {"kind": "prefix_tuning", "num_virtual_tokens": 4}],
    "mt5": [{"kind": "lora", "r": 4}, {"kind": "prompt_tuning", "num_virtual_tokens": 4}],
    "llama": [{"kind": "bottleneck", "reduction_factor": 4}],
    "bert": [{"kind": "prefix_tuning", "num_virtual_tokens": 4}],
}  # fmt: skip
HOWS: dict[str, tuple[int, int, int]] = {"2x4": (0, 4, 1), "zero2": (2, 2, 2), "zero3": (3, 4, 1)}
STEPS, HALF = 4, 2


def case_of(base: Path, family: str, number: int, workers: int, how: tuple[int, int, int]) -> Any:
    stage, micro, accumulation = how
    method = RUNS[family][number]
    settings = document(base, task_of(family), method=method) | {
        "optimizer": {"learning_rate": 0.003}, "max_steps": STEPS, "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation, "zero": {"stage": stage},
        "workers": {"count": workers}, "checkpoint_every_steps": HALF, "log_every_steps": 1,
        "evaluation": {"every_steps": HALF, "generations": 2, "max_new_tokens": 2},
        # A prefix on a padded base cannot be computed again, and is refused below.
        "gradient_checkpointing": stage == 2 and method["kind"] != "prefix_tuning",
    }  # fmt: skip
    settings["data"] = settings["data"] | {"validation": 0.2}
    return settings


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as workers:
        yield workers


ALL_RUNS = [(family, number) for family in RUNS for number in range(len(RUNS[family]))]


@pytest.fixture(scope="module", params=ALL_RUNS, ids="{0[0]}{0[1]}".format)
def runs(
    request: pytest.FixtureRequest,
    base_of: Callable[[str], Path],
    workers: Workers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Finished runs of one of RUNS, alone and on two workers as HOWS has it."""
    family, number = request.param
    folder, task = tmp_path_factory.mktemp(family), task_of(family)
    rows = [{"prompt": "ab" * (i % 7 + 1) + chr(97 + i), "completion": LABELS[i % 3]}
            for i in range(29)]  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_of(family))
    labels = {"labels": LABELS} if task == "sequence_classification" else {}
    tokenized(folder, rows, task, tokenizer, **labels)
    make = partial(case_of, base_of(family), family, number)
    run_case(Case(make(1, (0, 8, 1)), folder / "alone"), folder / "tokens", Place())
    for name, how in HOWS.items():
        half = folder / name / f"checkpoint-{HALF}"
        cases = [Case(make(2, how), folder / name), Case(make(2, how), folder / f"{name}-on", half)]
        workers.run(cases, folder / "tokens")
    return folder


@pytest.mark.parametrize("how", HOWS)
def test_a_run_is_the_same_however_it_is_cut_and_where_it_goes_on(
    runs: Path, how: str, request: pytest.FixtureRequest
) -> None:
    alone, cut, resumed = (runs / name for name in ("alone", how, f"{how}-on"))
    last = f"checkpoint-{STEPS}"
    for name in (
        f"{last}/state.safetensors", f"{last}/best.safetensors", "adapter/adapter_model.safetensors"
    ):  # fmt: skip
        assert (resumed / name).read_bytes() == (cut / name).read_bytes(), name
    one, other = state_of(alone), state_of(cut)
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key] - other[key]).abs().max() < 1e-5, key
    assert weights_of(alone).keys() == weights_of(cut).keys()
    measured = [
        json.loads((folder / f"checkpoint-{STEPS}/progress.json").read_text())
        for folder in (alone, cut)
    ]
    for mine, theirs in zip(*(m["curve"] for m in measured), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    for mine, theirs in zip(*(m["evaluations"] for m in measured), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
        is_classifier = request.node.callspec.params["runs"][0] not in SEQ2SEQ
        assert (mine["accuracy"] is not None) == (mine["macro_f1"] is not None) == is_classifier
        assert (mine["rouge_l"] is None) == is_classifier


def test_the_head_learns_nothing_while_a_mask_is_chosen(base_of: Callable[[str], Path]) -> None:
    base, task = base_of("bert"), "sequence_classification"
    method = {"kind": "fishmask", "share": 0.01, "num_samples": 4}
    spec = parse_spec(TrainingSpec, document(base, task, method=method)).method
    model, kind = attach(base, task, method)
    count = sum(p.numel() for n, p in trainable_parameters(model).items() if "classifier" not in n)
    measured = Classifier(model)
    samples = (collate_labelled([row], torch.device("cpu")) for row in TEXTS)
    METHODS[kind].course(model, spec, 0).prepare(measured, samples)
    trained = trainable_parameters(model)
    assert all(parameter.grad is None for parameter in trained.values())
    assert sum(p.numel() for n, p in trained.items() if "classifier" not in n) == count
    assert {"classifier.weight", "classifier.bias"} < trained.keys()


def test_a_prefix_on_a_padded_base_cannot_be_computed_again(base_of: Callable[[str], Path]) -> None:
    for family in ("t5", "bert"):
        task = task_of(family)
        model, _ = attach(base_of(family), task, {"kind": "prefix_tuning"})
        with pytest.raises(SpecError, match="does not fit prefix_tuning"):
            TASK_PARTS[task].model(model, recomputes=True)


@pytest.mark.parametrize(
    ("dtype", "family"),
    [
        *((torch.bfloat16, family) for family in ("t5", "mt5", "bert", "llama")),
        *((torch.float16, family) for family in ("bart", "bert", "llama")),
    ],
)
def test_half_precision_trains_the_head_in_fp32(
    base_of: Callable[[str], Path], dtype: torch.dtype, family: str
) -> None:
    task = task_of(family)
    labels = LABELS if task == "sequence_classification" else ()
    for kind in ("lora", "bitfit", "ia3", "prompt_tuning"):
        base = load_base(str(base_of(family)), dtype, task=task, labels=labels)
        spec = parse_spec(TrainingSpec, document(base_of(family), task, method={"kind": kind}))
        model = METHODS[kind].attach(base, spec.method, str(base_of(family)))
        assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
        measured = TASK_PARTS[task].model(model)
        rows = PAIRS if task == "seq_2_seq_lm" else TEXTS
        loss = measured(TASK_PARTS[task].collate(rows, torch.device("cpu")))
        loss.backward()
        assert torch.isfinite(loss)
