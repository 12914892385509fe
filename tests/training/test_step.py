"""The loss of one pass: packed rows, logits by parts, against the textbook: all logits, alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers
from adapters import load, randomize
from conftest import CONFIGS, VOCABULARY, byte_tokenizer
from torch.nn.functional import cross_entropy
from workers import Case, difference, run_cases, state_of

from cluster.errors import BaseModelError, SpecError
from cluster.spec import parse_spec
from cluster.tables import write_table
from training.assembly import check_base
from training.command import resolved
from training.data import tokenize
from training.data_spec import DataSpec
from training.head_loss import HeadLoss
from training.methods import METHODS, trainable_parameters
from training.methods.course import Course
from training.packed import check_packable
from training.rows import IGNORE, TokenRows
from training.seq2seq import Seq2SeqModel
from training.spec import TrainingSpec
from training.step import LossModel, collate

Bases = Callable[[str], Path]
DEVICE = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 4},
    "dora": {"kind": "lora", "r": 4, "use_dora": True, "modules_to_save": ["lm_head"]},
    "adalora": {"kind": "adalora", "r": 2, "init_r": 4},
    "ia3": {"kind": "ia3"},
    "bitfit": {"kind": "bitfit"},
    "layernorm": {"kind": "layernorm"},
    "fishmask": {"kind": "fishmask", "share": 0.02, "num_samples": 8},
    "child_tuning": {"kind": "child_tuning", "num_samples": 8},
    "child_tuning_free": {"kind": "child_tuning", "form": "task_free"},
    "full": {"kind": "full"},
    "llama_adapter": {"kind": "llama_adapter", "adapter_len": 4},
    "bottleneck": {"kind": "bottleneck", "placement": "houlsby", "reduction_factor": 4},
    "parallel": {"kind": "bottleneck", "placement": "parallel", "reduction_factor": 4},
    "prompt_tuning": {"kind": "prompt_tuning", "num_virtual_tokens": 4},
    "p_tuning": {"kind": "p_tuning", "num_virtual_tokens": 4, "encoder": "lstm"},
    "prefix_tuning": {"kind": "prefix_tuning", "num_virtual_tokens": 4, "projection": True},
}
ROWS = [
    ([1, 2, 3, 4, 5], [IGNORE, IGNORE, 3, 4, 5]),
    ([9, 8, 7], [9, 8, 7]),
    (list(range(30, 60)), [IGNORE] * 10 + list(range(40, 60))),
    ([4, 4], [IGNORE, 4]),
]


def adapted(base: Path, method: str) -> Any:
    return adapted_with_course(base, method)[0].eval()


def adapted_with_course(base: Path, method: str) -> tuple[Any, Course]:
    document = {
        "base_model": str(base), "method": SETTINGS[method], "data": {"train": "x"},
        "output": {"name": "x"},
    }  # fmt: skip
    spec = parse_spec(TrainingSpec, document).method
    torch.manual_seed(0)
    model = METHODS[spec.kind].attach(load(base), spec, str(base))
    randomize(model)
    return model, METHODS[spec.kind].course(model, spec, 0)


def textbook(model: Any) -> torch.Tensor:
    """Each row alone, all of its logits, labels shifted by one."""
    loss = torch.zeros(())
    for ids, labels in ROWS:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].float()
        target = torch.tensor(labels[1:])
        loss = loss + cross_entropy(logits[:-1], target, reduction="sum", ignore_index=IGNORE)
    return loss


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2", "bloom"])
def test_loss_and_gradients_are_those_of_the_textbook(
    bases: Bases, family: str, method: str
) -> None:
    if method == "llama_adapter" and family in ("qwen3", "bloom"):
        pytest.skip("PEFT has no LLaMA-Adapter for this family, and it is refused")
    model = adapted(bases(family), method)
    expected = textbook(model)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in trainable_parameters(model).items()}
    model.zero_grad()
    measured = LossModel(model).eval()
    loss = measured(collate(ROWS, DEVICE))
    loss.backward()
    assert measured.is_packed == (family != "bloom")
    assert measured.has_plain_head
    assert abs(float(loss.detach() / expected.detach()) - 1) < 1e-5
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in trainable_parameters(model).items():
        assert (parameter.grad - gradients[name]).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_computed_again_in_backward_change_nothing(
    bases: Bases, family: str, method: str
) -> None:
    """With the dropout of GPT-2 and with what a method adds to the loss."""
    found: list[list[torch.Tensor]] = []
    passes: list[bool] = []
    for recomputes in (False, True):
        model, course = adapted_with_course(bases(family), method)
        measured = LossModel(model, recomputes=recomputes).train()
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        layers[-1].mlp.register_forward_pre_hook(lambda *_, r=recomputes: passes.append(r))
        values: list[torch.Tensor] = []
        for _ in range(2):
            torch.manual_seed(1)
            loss, penalty = measured(collate(ROWS, DEVICE)), course.penalty()
            values.append(loss.detach())
            (loss if penalty is None else loss + penalty).backward()
        found.append(values + [p.grad for p in trainable_parameters(model).values()])
    assert passes == [False] * 2 + [True] * 4
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def test_a_prefix_that_recomputation_would_drop_is_refused(bases: Bases) -> None:
    with pytest.raises(SpecError, match="gradient_checkpointing: does not fit prefix_tuning"):
        LossModel(adapted(bases("bloom"), "prefix_tuning"), recomputes=True)


def test_a_head_with_something_behind_it_keeps_its_whole_logits(bases: Bases) -> None:
    """A soft cap on the logits, as Gemma 2 has: the parts would be wrong, and it is noticed."""
    model = adapted(bases("llama"), "lora")

    def cap(_module: object, _inputs: object, output: Any) -> None:
        output.logits = 3 * torch.tanh(output.logits / 3)

    model.get_base_model().register_forward_hook(cap)
    expected = textbook(model)
    measured = LossModel(model).eval()
    assert not measured.has_plain_head
    assert abs(float((measured(collate(ROWS, DEVICE)) - expected).detach())) < 1e-3


def of_config(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_soft_cap_that_moves_logits_by_less_than_rounding_does_is_seen(
    dtype: torch.dtype,
) -> None:
    model = of_config(CONFIGS["gemma2"](), dtype)
    measured = LossModel(model).eval()
    with torch.no_grad():
        assert not measured.has_plain_head
        assert float(measured(collate(ROWS, DEVICE)) / textbook(model)) == pytest.approx(
            1, rel=1e-3
        )
        model.config.final_logit_softcapping = None
        assert LossModel(model).has_plain_head


def test_rows_do_not_touch(bases: Bases) -> None:
    """What stands in one row changes nothing of another's loss."""
    measured = LossModel(adapted(bases("llama"), "lora")).eval()
    one, other = ROWS[2], ([5] * 30, [IGNORE] * 30)
    with torch.no_grad():
        alone = measured(collate([one], DEVICE))
        beside = measured(collate([other, one, other], DEVICE))
    assert abs(float(alone - beside)) < 1e-4


def test_rows_whose_place_in_the_sequence_counts_are_not_packed() -> None:
    """Llama 4 scales queries by it from the 8,192nd token on, which no short trial shows."""
    with pytest.raises(BaseModelError, match="llama4_text: attention_chunk_size counts places"):
        check_packable(transformers.Llama4TextConfig(num_hidden_layers=2))
    check_packable(transformers.LlamaConfig(num_hidden_layers=2))


HALVES = (torch.bfloat16, torch.float16)
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mistral", "gemma", "gpt2", "opt", "phi", "qwen3_moe", "gptj"]
)
def test_rows_that_stay_apart_are_packed_in_every_precision(
    family: str, dtype: torch.dtype
) -> None:
    """GPT-J keeps them apart by a mask of its own."""
    assert LossModel(of_config(CONFIGS[family](), dtype)).is_packed


# Each of these moves a row of the trial by less than half precision rounds: tokens counted by
# place, a convolution, attention over all.
_IN_TOUCH: dict[str, Callable[[], Any]] = {
    "blenderbot": lambda: transformers.BlenderbotSmallConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=48, is_decoder=True, is_encoder_decoder=False,
    ),
    "lfm2": lambda: transformers.Lfm2Config(**TINY, layer_types=["conv", "full_attention"]),
    "openai_gpt": lambda: transformers.OpenAIGPTConfig(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=2, n_head=4
    ),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=VOCABULARY, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("family", _IN_TOUCH)
def test_rows_in_touch_are_not_packed_in_any_precision(family: str, dtype: torch.dtype) -> None:
    assert not LossModel(of_config(_IN_TOUCH[family](), dtype)).is_packed


_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "initializer_range": 0.3}
# A window of which attention is told by the mask alone, and which no row of the trial exceeds.
_MASKED: dict[str, Callable[[], Any]] = {
    "phimoe": lambda: transformers.PhimoeConfig(
        **TINY, **_EXPERTS, num_local_experts=4, sliding_window=12
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **TINY, **_EXPERTS, num_experts=4, moe_intermediate_size=16, sliding_window=12,
        shared_expert_intermediate_size=16, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "doge": lambda: transformers.DogeConfig(**TINY, initializer_range=0.3, sliding_window=12),
}  # fmt: skip


@pytest.mark.parametrize("family", _MASKED)
def test_a_window_that_only_the_mask_tells_is_kept(family: str) -> None:
    model = of_config(_MASKED[family]())
    with torch.no_grad():
        expected = textbook(model)
        measured = LossModel(model).eval()
        assert not measured.is_packed
        assert float(measured(collate(ROWS, DEVICE)) / expected) == pytest.approx(1, rel=1e-5)


def test_a_window_that_no_row_exceeds_does_not_keep_rows_from_being_packed() -> None:
    config = transformers.PhimoeConfig(**TINY, num_local_experts=4, sliding_window=128)
    assert LossModel(of_config(config)).is_packed


def test_a_base_that_counts_places_is_padded() -> None:
    config = transformers.Llama4TextConfig(
        **TINY, intermediate_size_mlp=48, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    model = of_config(config)
    measured = LossModel(model).eval()
    assert not measured.is_packed
    with torch.no_grad():
        found = measured(collate(ROWS, DEVICE)) / textbook(model)
    assert float(found) == pytest.approx(1, rel=1e-5)


def test_a_base_whose_padded_rows_are_not_those_alone_is_refused() -> None:
    config = transformers.CpmAntConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48,
        num_hidden_layers=2,
    )  # fmt: skip
    with pytest.raises(BaseModelError, match="CpmAntForCausalLM gives other states to a row"):
        LossModel(of_config(config))


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_base_that_fails_on_the_trial_is_refused_by_name(is_decoder: bool) -> None:
    config = transformers.ProphetNetConfig(
        vocab_size=VOCABULARY, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48,
        num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, is_decoder=is_decoder, is_encoder_decoder=not is_decoder,
    )  # fmt: skip
    model = (
        of_config(config) if is_decoder else transformers.ProphetNetForConditionalGeneration(config)
    )
    of_task = LossModel if is_decoder else Seq2SeqModel
    with pytest.raises(BaseModelError, match=r"ProphetNet.*IndexError.*another family"):
        of_task(model)


def test_a_lack_of_memory_is_not_the_bases_fault(
    bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(LossModel, "_compare", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        LossModel(load(bases("llama")))


@pytest.mark.parametrize(
    ("length", "virtual", "message"),
    [
        (32, 0, None),
        (33, 0, r"data\.max_length, now 33, to at most 32$"),
        (None, 0, r"now not set, to at most 32$"),
        (30, 2, None),
        (31, 2, r"now 31, to at most 32 less its 2 virtual tokens$"),
    ],
)
def test_rows_that_turn_their_neighbours_otherwise_are_refused(
    length: int | None, virtual: int, message: str | None
) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4, "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = transformers.Phi3Config(
        **TINY, rope_parameters=rope, original_max_position_embeddings=32
    )
    method = {"kind": "lora"}
    if virtual:
        method = {"kind": "prompt_tuning", "num_virtual_tokens": virtual}
    document = {
        "base_model": "phi", "method": method, "data": {"train": "x", "max_length": length},
        "output": {"name": "x"},
    }  # fmt: skip
    spec = parse_spec(TrainingSpec, document)
    if message is None:
        check_base(of_config(config), spec)
        return
    with pytest.raises(BaseModelError, match=message):
        check_base(of_config(config), spec)


def test_a_batch_without_labels_is_a_zero_with_a_graph(bases: Bases) -> None:
    measured = LossModel(adapted(bases("llama"), "lora"))
    loss = measured(collate([([1, 2, 3], [IGNORE] * 3)], DEVICE))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(
        not p.grad.any() for p in trainable_parameters(measured).values() if p.grad is not None
    )


@pytest.mark.parametrize("is_trained", [True, False])
def test_an_evaluation_makes_no_gradients(
    bases: Bases, monkeypatch: pytest.MonkeyPatch, is_trained: bool
) -> None:
    model = load(bases("llama")).requires_grad_(is_trained)
    measured = LossModel(model)
    assert measured.has_plain_head
    batch = collate([([1, 2, 3], [IGNORE, 2, 3])], DEVICE)
    expected = measured(batch).detach()

    def refuse(*_: object) -> None:
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        assert torch.equal(measured(batch), expected)


@pytest.mark.parametrize("count", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("is_trained", [True, False])
def test_the_loss_by_parts_is_cross_entropy(count: int, is_trained: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).requires_grad_(is_trained)
    targets = torch.randint(50, (count,))
    hidden = torch.randn(count, 8)
    whole, parts = (hidden.clone().requires_grad_() for _ in range(2))
    expected = cross_entropy(head(whole), targets, reduction="sum")
    (2 * expected).backward()
    gradients = [p.grad for p in head.parameters()]
    head.zero_grad()
    trained = [p for p in head.parameters() if p.requires_grad]
    loss = HeadLoss.apply(parts, targets, head, *trained)
    (2 * loss).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts.grad, whole.grad)
    for parameter, gradient in zip(trained, gradients if is_trained else [], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.slow
def test_logits_never_exist_in_full(bases: Bases, tmp_path: Path) -> None:
    """Neither plain nor sharded, of either task: nothing as large is made in a step."""
    rows = [{"prompt": "ab", "completion": f"{i:02}" + "c" * 22} for i in range(60)]
    write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for family, task in (("llama", "causal_lm"), ("t5", "seq_2_seq_lm")):
        data, tokens = {"train": str(tmp_path / "rows.parquet")}, tmp_path / task
        tokenize(parse_spec(DataSpec, data), byte_tokenizer(), tokens, task)
        labels = int(TokenRows(tokens).label_counts.sum())
        cases: list[Case] = []
        for stage in (0, 3):
            document: dict[str, Any] = {
                "base_model": str(bases(family)), "task": task, "method": {"kind": "lora"},
                "data": data, "max_steps": 1, "batch_size": 60, "micro_batch_size": 60,
                # Without offload a lone worker does without DeepSpeed.
                "zero": {"stage": stage, "offload_optimizer": stage == 3},
                "output": {"name": "unused"},
            }  # fmt: skip
            spec = resolved(parse_spec(TrainingSpec, document)).model_dump(mode="json")
            cases.append(Case(spec, tmp_path / f"{family}-{stage}", most=labels * VOCABULARY))
        run_cases(1, cases, tokens)
        one, other = (state_of(case.folder) for case in cases)
        assert difference(one, other) < 1e-5
