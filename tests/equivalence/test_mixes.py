"""Weighted mixes of adapters equal what PEFT, or the sum of merged weights, gives."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import load, make_adapter

from cluster.errors import ModelNotFoundError, RequestError
from serving.adapters import Part
from serving.engine import Engine, EngineSpec, GenerationRequest, ScoreRequest

TOLERANCE = 1e-4
PROMPT = list(range(40, 70))
WEIGHTS = {"a": 0.7, "b": -0.3}
Bases = Callable[[str], Path]


def engine_of(base: Path, folders: Mapping[str, Path]) -> Engine:
    engine = Engine(EngineSpec(base_model=str(base), max_context_tokens=128))
    for name, folder in folders.items():
        engine.add_adapter(name, folder)
    return engine


@torch.no_grad()
def sum_of_merged(base: Path, folders: Mapping[str, Path], weights: Mapping[str, float]) -> Any:
    """The base with W + Σ w (W' - W), each W' as PEFT merges it."""
    own = {n: t.clone() for n, t in load(base).state_dict().items()}
    total = {n: t.clone() for n, t in own.items()}
    for name, weight in weights.items():
        merged: Any = peft.PeftModel.from_pretrained(load(base), folders[name]).merge_and_unload()
        for key, value in merged.state_dict().items():
            total[key] += weight * (value - own[key])
    model = load(base)
    model.load_state_dict(total)
    return model.eval()


def test_a_mix_of_loras_is_pefts(bases: Bases, tmp_path: Path) -> None:
    """Also greedy, in a batch with its members, whose pages it does not share."""
    base = bases("llama")
    folders = {n: make_adapter("lora", base, tmp_path / n, seed) for seed, n in enumerate("ab")}
    model: Any = peft.PeftModel.from_pretrained(load(base), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS.values()), "mix", combination_type="cat")
    model.set_adapter("mix")
    model.eval()
    engine = engine_of(base, folders)
    engine.add_mix("mix", WEIGHTS)
    (logits,) = engine.score([ScoreRequest(PROMPT, "mix")])
    ids = list(PROMPT)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        for _ in range(16):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    names = ["a", "mix", None, "b"]
    requests = [
        GenerationRequest(prompt_token_ids=PROMPT, adapter=n, max_tokens=16, ignore_eos=True)
        for n in names
    ]
    for _ in range(2):  # the second time out of the prefix cache
        results = [r.token_ids for r in engine.generate(requests)]
        assert list(results[1]) == ids[len(PROMPT) :]
    for name in "ab":
        engine.remove_adapter(name)
    assert engine.generate(requests[1:2])[0].token_ids == results[1]  # it stands alone
    engine.check()


@pytest.mark.parametrize(
    ("family", "variants"),
    [
        ("llama", ("dora", "vera", "trainable_tokens", "layernorm")),
        ("gpt2", ("lora_patterns", "dora", "vera")),
        ("llama", ("ia3", "trainable_tokens", "layernorm")),
        ("mixtral", ("experts", "parameters")),
    ],
)
def test_a_mix_is_the_sum_of_the_changes_of_weights(
    bases: Bases, tmp_path: Path, family: str, variants: tuple[str, ...]
) -> None:
    base = bases(family)
    folders = {v: make_adapter(v, base, tmp_path / v) for v in variants}
    weights = dict(zip(variants, (0.5, 0.4, -0.2, 0.3), strict=False))
    engine = engine_of(base, folders)
    engine.add_mix("mix", weights)
    (logits,) = engine.score([ScoreRequest(PROMPT, "mix")])
    with torch.no_grad():
        expected = sum_of_merged(base, folders, weights)(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_two_sparse_changes_and_two_replaced_norms_add_up(bases: Bases, tmp_path: Path) -> None:
    """Of one adapter with itself, half and half, which is that adapter."""
    base = bases("llama")
    for variant in ("fishmask", "layernorm", "bitfit"):
        family = bases("gpt2") if variant == "bitfit" else base
        folder = make_adapter(variant, family, tmp_path / variant)
        engine = engine_of(family, {"a": folder, "b": folder})
        engine.add_mix("mix", {"a": 0.5, "b": 0.5})
        mix, alone = engine.score([ScoreRequest(PROMPT, name) for name in ("mix", "a")])
        torch.testing.assert_close(mix, alone, atol=TOLERANCE, rtol=0)


def test_what_is_no_change_of_weights_is_refused_by_name(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    variants = ("lora", "ia3", "prompt_tuning", "prefix_tuning", "bottleneck", "saved_modules",
                "trainable_tokens")  # fmt: skip
    engine = engine_of(base, {v: make_adapter(v, base, tmp_path / v) for v in variants})
    for one, other, message in [
        ("lora", "prompt_tuning", "'prompt_tuning' cannot be mixed: it has tokens in front"),
        ("lora", "prefix_tuning", "'prefix_tuning' cannot be mixed: it has tokens in front"),
        ("lora", "bottleneck", "'bottleneck' cannot be mixed: it puts a block beside"),
        ("lora", "ia3", "'ia3' cannot be mixed: it scales the input of 'model.layers"),
        ("trainable_tokens", "saved_modules", "'saved_modules' cannot be mixed: it holds"),
    ]:
        with pytest.raises(RequestError, match=message):
            engine.add_mix("mix", {one: 0.5, other: 0.5})
    with pytest.raises(ModelNotFoundError, match="'nobody'"):
        engine.add_mix("mix", {"lora": 0.5, "nobody": 0.5})
    for weight in (float("nan"), 10**400, "1", None):
        with pytest.raises(RequestError, match=r"weights\['lora'\] is .*must be a finite number"):
            engine.add_mix("mix", {"lora": weight})  # type: ignore[dict-item]
    with pytest.raises(RequestError, match="is empty"):
        engine.add_mix("mix", {})
    assert "mix" not in engine.adapters


def test_mixes_leave_before_adapters(bases: Bases, tmp_path: Path) -> None:
    """They are summed again from members that are held, and there are any number of them."""
    base = bases("llama")
    engine = engine_of(base, {n: make_adapter("lora", base, tmp_path / n) for n in "ab"})
    engine._bank._max_bytes = engine.stats.adapter_bytes * 5 // 2
    for weight in (0.1, 0.2, 0.3):
        parts = [Part(n, engine._bank.get(n).lowered, weight) for n in "ab"]
        engine.install_adapter(f"a:{weight}+b:{weight}", engine.mix(parts), evict=True)
        assert engine.adapters == ["a", "b", f"a:{weight}+b:{weight}"]
