"""Every kind that PEFT merges into weights: served from its folder, equal to PEFT, in a batch."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, randomize
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from safetensors.torch import load_file, save_file

from cluster.errors import AdapterError
from serving.adapters import LinearDelta, describe, lower
from serving.adapters.dense import factored
from serving.adapters.merged import KINDS
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest

TOLERANCE = 1e-4
PROMPT = list(range(40, 70))
NEW_TOKENS = 64
# OPT's modules have the biases that BEFT trains; the tiny modules are too small for some defaults.
TARGETS = ["q_proj", "k_proj", "fc1"]
OPTIONS: Mapping[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4, "bias": "boft_only"},
    "C3A": {"block_size": 8},
    "DELORA": {"r": 3},
    "FOURIERFT": {"n_frequency": 60},
    "GRALORA": {"r": 4},
    "HRA": {"r": 2},
    "LOHA": {"r": 2},
    "MISS": {"r": 8},
    "OFT": {"r": 0, "oft_block_size": 8},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 3},
    "VERA": {"r": 3, "save_projection": False},
    "WAVEFT": {"n_frequency": 60},
}


def make_folder(
    kind: str, base: Path, folder: Path, new_tokens: int = 0, **options: Any
) -> tuple[Path, torch.Tensor]:
    """A folder as PEFT saves it, and PEFT's logits with it for PROMPT and so many greedy tokens
    behind it."""
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    given = {
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
        **OPTIONS.get(kind, {}),
        **options,
    }
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(load(base), config(**given)).eval()
    randomize(model, 0.05)
    model.save_pretrained(str(folder))
    # As it is when it is loaded: VB-LoRA saves the largest of its logits alone.
    loaded: Any = peft.PeftModel.from_pretrained(load(base), folder).eval()
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids.append(int(loaded(torch.tensor([ids])).logits[0, -1].argmax()))
        return folder, loaded(torch.tensor([ids])).logits[0]


@pytest.fixture(autouse=True)
def no_kernel_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's BOFT would first compile one, under a lock that whoever is killed then leaves."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


# PEFT's RandLora and VeRA speak of what they do not save.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_kind_is_served_as_peft_computes_it(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("opt")
    engine = Engine(EngineSpec(base_model=str(base)))
    made = {kind: make_folder(kind, base, tmp_path / kind, NEW_TOKENS) for kind in KINDS}
    for kind, (folder, _) in made.items():
        engine.add_adapter(kind, folder)
    plain, *scored = engine.score([ScoreRequest(PROMPT, kind) for kind in (None, *KINDS)])
    mixed = engine.generate(
        [
            GenerationRequest(
                prompt_token_ids=PROMPT, adapter=kind, max_tokens=NEW_TOKENS, ignore_eos=True
            )
            for kind in KINDS
        ]
    )
    for (kind, (_, expected)), logits, result in zip(made.items(), scored, mixed, strict=True):
        assert (logits - expected[: len(PROMPT)]).abs().max() < TOLERANCE, kind
        assert (logits - plain).abs().max() > 0.01, kind
        assert result.token_ids == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist(), kind
    engine.check()


# PEFT saves copies of the base's own embeddings where one is a target.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LOHA", {"modules_to_save": ["lm_head", "final_layer_norm"]}),
        ("SHIRA", {"r": 2, "modules_to_save": ["lm_head", "final_layer_norm"]}),
        ("IA3", {"feedforward_modules": ["fc1"], "modules_to_save": ["final_layer_norm"]}),
        ("IA3", {"target_modules": ["fc1", "lm_head"], "feedforward_modules": ["fc1"]}),
        ("LN_TUNING", {"target_modules": ["embed_tokens"], "modules_to_save": ["fc2"]}),
        ("UNILORA", {"save_indices": True}),
    ],
)
def test_a_folder_with_more_than_the_methods_own_weights(
    bases: Callable[[str], Path], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    base = bases("opt")
    folder, expected = make_folder(kind, base, tmp_path, **options)
    engine = Engine(EngineSpec(base_model=str(base)))
    engine.add_adapter("a", folder)
    (logits,) = engine.score([ScoreRequest(PROMPT, "a")])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("LOHA", {"r": 10**9}, r"has r = 1000000000, where base and tensors allow"),
        ("LOHA", {"r": 3}, r"is refused by PEFT: .*size mismatch"),
        ("LOHA", {"alpha": "eight"}, r"is refused by PEFT"),
        ("LOHA", {"rank_of_the_future": 3}, r"has rank_of_the_future = '3', which is not served"),
        ("LOHA", {"target_modules": ["q_proj"]}, r"has '.*', which PEFT's LOHA does not have"),
        ("LOHA", {"target_modules": ["q_proj", "k_proj", "fc1", "fc2"]}, r"lacks '.*fc2"),
        ("LILY", {}, r"LILY.*PEFT does not merge"),
    ],
)
def test_a_folder_that_peft_would_not_take_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    folder, _ = make_folder(kind, bases("opt"), tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=message):
        lower(folder, describe(load(bases("opt")), "opt"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", ["OFT", "HIRA", "TINYLORA"])
def test_what_is_on_an_embedding_is_refused_by_name(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    folder, _ = make_folder(kind, bases("llama"), tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match=rf"of the embedding '.*', where {kind} is served of"):
        lower(folder, describe(load(bases("llama")), "llama"))


def test_a_method_that_does_more_than_its_merged_weight_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose layer is no product with a weight: the load itself finds it out."""
    from peft.tuners.loha.layer import Linear

    folder, _ = make_folder("LOHA", bases("opt"), tmp_path)
    plain: Any = Linear.forward

    def bent(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(plain(self, x))

    monkeypatch.setattr(Linear, "forward", bent)
    with pytest.raises(AdapterError, match=r"computes on '.*' something else than the weight"):
        lower(folder, describe(load(bases("opt")), "opt"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folders_lowered_in_threads_do_not_disturb_each_other(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT replaces a method of every torch module meanwhile; BOFT would compile for a GPU."""
    from peft.tuners.boft import layer

    target = describe(load(bases("opt")), "opt")
    folders = [make_folder(kind, bases("opt"), tmp_path / kind)[0] for kind in ("LOHA", "BOFT")]
    one_by_one = [lower(folder, target).deltas for folder in folders]
    plain, compiled = torch.nn.Module.register_parameter, list[str]()
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: compiled.append("again"))
    with ThreadPoolExecutor(4) as threads:
        found = [lowered.deltas for lowered in threads.map(lower, folders * 8, repeat(target))]
    assert torch.nn.Module.register_parameter is plain
    assert not compiled
    for deltas, expected in zip(found, one_by_one * 8, strict=True):
        assert deltas.keys() == expected.keys()
        for module, delta in deltas.items():
            torch.testing.assert_close(vars(delta), vars(expected[module]))


def test_a_change_is_kept_at_its_true_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    b_Or, a_rI = (torch.randn(s, generator=generator) for s in ((96, 5), (5, 64)))
    delta = factored(b_Or @ a_rI, 1e-4)
    assert delta.dense_IO is None
    assert delta.a_Ir is not None
    assert delta.b_rO is not None
    assert delta.a_Ir.shape == (64, 5)
    torch.testing.assert_close((delta.a_Ir @ delta.b_rO).T, b_Or @ a_rI)
    full_OI = torch.randn(96, 64, generator=generator)
    dense = factored(full_OI, 1e-4)
    assert dense.dense_IO is not None
    assert torch.equal(dense.dense_IO.T, full_OI)
    assert factored(full_OI * 1e-9, 1e-4) == LinearDelta()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([8, 101, 5], r"has '.*trainable_tokens_delta' with shape \(4, 32\)"),
        ([8, 101, 5, 999], r"tokens up to 999 need \(4, 32\) of 261"),
        ([8, 101, 5, 5], r"not different token ids"),
        ([8, 101, 5, -1], r"not different token ids"),
        (None, r"not different token ids"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    bases: Callable[[str], Path], tmp_path: Path, tokens: Any, message: str
) -> None:
    key = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    save_file({key: torch.ones(4, 32)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": tokens}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        lower(tmp_path, describe(load(bases("llama")), "llama"))


def test_tokens_of_a_quantised_module_are_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    plain, name = describe(load(bases("llama")), "llama"), "model.layers.0.mlp.up_proj"
    key = f"base_model.model.{name}.trainable_tokens_delta"
    save_file({key: torch.ones(1, 32)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    hidden = {"weight": torch.empty(48, 32, device="meta")}
    shape = replace(plain.modules[name], parameters=hidden, is_quantized=True)
    with pytest.raises(AdapterError, match="keeps in 4 or 8 bits; serve it over the plain base"):
        lower(tmp_path, replace(plain, modules={**plain.modules, name: shape}))


def test_tokens_of_a_weight_that_is_saved_whole_too_are_refused(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """Qwen3's head is its embedding; PEFT itself would not train both."""
    base, key = bases("qwen3"), "base_model.model.model.embed_tokens"
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tensors = {
        f"{key}.token_adapter.trainable_tokens_delta": torch.ones(1, 32),
        "base_model.model.lm_head.weight": head + 1,
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "trainable_token_indices": [3], "modules_to_save": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"changes 'lm_head' and has it saved whole too"):
        lower(tmp_path, describe(load(base), "qwen3"))
