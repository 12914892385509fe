"""Adapter folders of every method with weights that matter, as training would leave them."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from pydantic import TypeAdapter
from safetensors.torch import load_file

from training.method_spec import MethodSpec
from training.methods import METHODS, trainable_parameters


def load(base: Path) -> Any:
    auto: Any = transformers.AutoModelForCausalLM
    if transformers.AutoConfig.from_pretrained(base).is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    return auto.from_pretrained(base, dtype=torch.float32)


def _peft(config: peft.PeftConfig) -> Callable[[Path], Any]:
    def attach(base: Path) -> Any:
        model = load(base)
        own = copy.deepcopy(config)  # PEFT writes what it learns of the base into it
        if model.config.is_encoder_decoder:
            own.task_type = "SEQ_2_SEQ_LM"
        return peft.get_peft_model(model, own)

    return attach


def _own(**method: Any) -> Callable[[Path], Any]:
    """A method by its spec; the model knows how to save itself by `method_kind`."""
    spec: Any = TypeAdapter(MethodSpec).validate_python(method)

    def attach(base: Path) -> Any:
        model: Any = METHODS[spec.kind].attach(load(base), spec, str(base))
        model.method_kind = spec.kind
        return model

    return attach


def _adalora(base: Path) -> Any:
    """Ranks as an allocation leaves them: some modules with all, some with one, one with none."""
    attach = _own(kind="adalora", r=2, init_r=3, alpha=5)
    model = attach(base)
    names = [name for name, _ in model.base_model.model.named_parameters() if ".lora_E." in name]
    model.peft_config["default"].use_rslora = True  # which PEFT's AdaLoRA does not look at
    model.peft_config["default"].rank_pattern = {
        name: [place % 3 > 0, place % 2 > 0, place > 0] for place, name in enumerate(names)
    }
    return model


_CAUSAL = {"task_type": "CAUSAL_LM"}
_SOME = ["q_proj", "down_proj", "fc1", "c_attn", "c_proj"]
_QUERIES = ["q_proj", "c_attn", "query_key_value", "SelfAttention.q"]
_EMBEDDINGS = ["embed_tokens", "wte", "word_embeddings", "shared"]
# What a family's first attention and its second feed-forward layer end in.
_QUERIES_0 = r"0\.(self_attn\.q_proj|attn\.c_attn|self_attention\.query_key_value|SelfAttention\.q)"
_OUT_1 = r"1\..*(down_proj|c_proj|fc2|dense_4h_to_h|wo)"
# name -> base folder -> a model with the method on it.
VARIANTS: Mapping[str, Callable[[Path], Any]] = {
    "lora": _peft(peft.LoraConfig(**_CAUSAL, r=4, lora_alpha=9, target_modules="all-linear")),
    "lora_patterns": _peft(
        peft.LoraConfig(
            **_CAUSAL,
            r=4,
            use_rslora=True,
            target_modules="all-linear",
            rank_pattern={_QUERIES_0: 2},
            alpha_pattern={_OUT_1: 3},
            lora_bias=True,
        )
    ),
    "dora": _peft(
        peft.LoraConfig(
            **_CAUSAL,
            r=4,
            use_dora=True,
            target_modules="all-linear",
            bias="all",
            rank_pattern={_QUERIES_0: 2},
        )
    ),
    "dora_embeddings": _peft(
        peft.LoraConfig(**_CAUSAL, r=3, use_dora=True, target_modules=["lm_head", *_EMBEDDINGS])
    ),
    # Of an embedding, both are plain.
    "pissa": _peft(
        peft.LoraConfig(
            **_CAUSAL, r=3, init_lora_weights="pissa", target_modules=[*_SOME, *_EMBEDDINGS]
        )
    ),
    "olora": _peft(
        peft.LoraConfig(
            **_CAUSAL, r=3, init_lora_weights="olora", target_modules=[*_SOME, *_EMBEDDINGS]
        )
    ),
    "saved_modules": _peft(
        peft.LoraConfig(
            **_CAUSAL,
            r=3,
            target_modules=_QUERIES,
            modules_to_save=["lm_head", *_EMBEDDINGS, "norm", "0.mlp", "1.DenseReluDense"],
        )
    ),
    # PEFT saves copies of the base's own weights beside it.
    "embeddings": _peft(
        peft.LoraConfig(**_CAUSAL, r=3, target_modules=["lm_head", *_EMBEDDINGS, *_QUERIES])
    ),
    "trainable_tokens": _peft(
        peft.TrainableTokensConfig(**_CAUSAL, token_indices=[*range(254, 2, -3), 7, 13])
    ),
    "lora_tokens": _peft(
        peft.LoraConfig(
            **_CAUSAL,
            r=3,
            target_modules=["q_proj"],
            trainable_token_indices=[40, 13, 7],
            velora_config=peft.VeloraConfig(),
        )
    ),
    "head_tokens": _peft(
        peft.LoraConfig(
            **_CAUSAL,
            r=3,
            target_modules=["q_proj"],
            trainable_token_indices={"lm_head": [40, 13, 7]},
        )
    ),
    # What a spec that says no more makes of a mixture: PEFT takes experts and router in.
    "experts": _own(kind="lora"),
    "parameters": _peft(
        peft.LoraConfig(
            **_CAUSAL,
            r=3,
            use_rslora=True,
            target_modules=["q_proj"],
            target_parameters=[
                "experts.gate_up_proj",
                "experts.down_proj",
                "router.weight",
                "up_proj.weight",
            ],
            rank_pattern={r".*(experts\.down_proj|\.up_proj\.weight)": 2},
            alpha_pattern={r".*up_proj(\.weight)?": 5},
        )
    ),
    "vera": _peft(peft.VeraConfig(**_CAUSAL, r=3, target_modules=_SOME)),
    "lokr": _peft(peft.LoKrConfig(**_CAUSAL, r=2, target_modules=_SOME)),
    "oft": _peft(
        peft.OFTConfig(**_CAUSAL, r=0, oft_block_size=8, target_modules=_SOME, bias="all")
    ),
    "adalora": _adalora,
    "dylora": _own(kind="dylora", r=4, min_rank=2),
    "ia3": _peft(
        peft.IA3Config(
            **_CAUSAL,
            target_modules=r".*\.(k_proj|v_proj|down_proj|c_attn|query_key_value|mlp\.c_proj|fc2"
            r"|dense_4h_to_h|k|v|wo)",
            feedforward_modules=r".*\.(down_proj|mlp\.c_proj|fc2|dense_4h_to_h|wo)",
        )
    ),
    "bitfit": _own(kind="bitfit"),
    "layernorm": _own(kind="layernorm"),
    "fishmask": _own(kind="fishmask", share=0.05),
    "child_tuning": _own(kind="child_tuning", share=0.1),
    "full": _own(kind="full"),
    "shira": _peft(
        peft.ShiraConfig(
            **_CAUSAL,
            r=2,
            target_modules=[*_QUERIES, "down_proj", "dense_4h_to_h", "wo"],
            init_weights=False,
        )
    ),
    "bottleneck": _own(kind="bottleneck", placement="houlsby", reduction_factor=4),
    "parallel": _own(kind="bottleneck", placement="parallel", activation="tanh", scaling=2.0),
    "pfeiffer": _own(kind="bottleneck", placement="pfeiffer", activation="silu"),
    "llama_adapter": _peft(peft.AdaptionPromptConfig(**_CAUSAL, adapter_len=4, adapter_layers=2)),
    "hard_prompt": _own(kind="hard_prompt", text="2 + 2 = 4"),
    "prompt_tuning": _peft(
        # PEFT asks for the heads, which it does not find in MPT's config, and does not use.
        peft.PromptTuningConfig(**_CAUSAL, num_virtual_tokens=5, num_attention_heads=4)
    ),
    "p_tuning": _peft(
        peft.PromptEncoderConfig(**_CAUSAL, num_virtual_tokens=3, encoder_hidden_size=24)
    ),
    "p_tuning_lstm": _peft(
        peft.PromptEncoderConfig(
            **_CAUSAL,
            num_virtual_tokens=3,
            encoder_hidden_size=8,
            encoder_num_layers=1,
            encoder_reparameterization_type="LSTM",
        )
    ),
    "prefix_tuning": _peft(peft.PrefixTuningConfig(**_CAUSAL, num_virtual_tokens=21)),
    "prefix_projection": _peft(
        peft.PrefixTuningConfig(
            **_CAUSAL, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=24
        )
    ),
    "cartridge": _peft(peft.CartridgeConfig(**_CAUSAL, num_virtual_tokens=5)),
    "cpt": _peft(
        peft.CPTConfig(**_CAUSAL, cpt_token_ids=[65, 66, 67, 68], cpt_tokens_type_mask=[1, 2, 3, 4])
    ),
}


# Variants that differ little between families: on these alone.
_FIVE = {"llama", "qwen3", "gpt2", "bloom", "t5"}
_FAMILIES: Mapping[str, set[str]] = {
    "dora": _FIVE | {"opt"},
    "dora_embeddings": {"gemma"},
    "pissa": {"llama", "gpt2"},
    "olora": {"llama"},  # PEFT has none of GPT-2's modules
    "saved_modules": _FIVE | {"gemma"},
    "embeddings": _FIVE | {"gemma"},
    "adalora": _FIVE,
    "dylora": _FIVE,
    "trainable_tokens": {"llama", "gemma", "t5", "bart"},
    "lora_tokens": {"llama", "qwen3"},
    "head_tokens": {"qwen3", "phi"},  # one with a tied embedding, one with a bias
    "vera": {"llama", "gpt2"},
    "lokr": {"llama"},
    "oft": {"opt"},
    "experts": {"mixtral", "qwen3_moe", "deepseek_v3"},
    "parameters": {"llama", "mixtral", "qwen2_moe", "gpt_oss"},
    "child_tuning": {"llama", "gpt2"},
    "shira": _FIVE - {"gpt2"},  # PEFT has none of its modules
    "pfeiffer": {"llama", "gpt2", "bloom", "t5"},
    "llama_adapter": {"llama", "mistral", "gpt2"},  # where PEFT has it
    "hard_prompt": {"llama", "gpt2", "t5"},
    "cartridge": _FIVE,
    "cpt": {"llama", "gpt2", "bloom"},
}
# Families that differ from others in how they attend, or in their experts: with these variants.
_VARIANTS: Mapping[str, tuple[str, ...]] = {
    "falcon": ("lora", "bitfit", "prompt_tuning", "prefix_tuning"),
    "falcon_alibi": ("lora", "layernorm", "prompt_tuning", "prefix_tuning"),
    "falcon_multi_query": ("lora", "layernorm", "bitfit", "prompt_tuning"),
    "gptj": ("lora", "bitfit", "prompt_tuning", "prefix_tuning"),
    "mpt": ("lora", "layernorm", "prompt_tuning"),
    "mixtral": ("experts", "parameters"),
    "qwen3_moe": ("experts",),
    "deepseek_v3": ("experts",),
    "gpt_oss": ("parameters",),
    "gemma2": ("lora", "layernorm", "prompt_tuning", "prefix_tuning"),
    "t5": (
        "lora",
        "lora_patterns",
        "dora",
        "saved_modules",
        "embeddings",
        "trainable_tokens",
        "adalora",
        "dylora",
        "ia3",
        "layernorm",
        "shira",
        "bottleneck",
        "parallel",
        "pfeiffer",
        "hard_prompt",
        "prompt_tuning",
        "p_tuning",
        "p_tuning_lstm",
        "prefix_tuning",
        "prefix_projection",
        "cartridge",
    ),
    "mt5": ("lora", "prompt_tuning", "prefix_tuning"),
    "bart": (
        "lora",
        "trainable_tokens",
        "ia3",
        "bitfit",
        "layernorm",
        "prompt_tuning",
        "prefix_tuning",
    ),
}


def variants_of(family: str) -> list[str]:
    """The variants that are tried on a family."""
    tried = _VARIANTS.get(family, VARIANTS)
    return [variant for variant in tried if family in _FAMILIES.get(variant, {family})]


def make_adapter(variant: str, base: Path, folder: Path, seed: int = 1) -> Path:
    """The folder of an adapter whose every trained weight is random."""
    torch.manual_seed(seed)
    model = VARIANTS[variant](base)
    # T5's attention divides by nothing, so that what is large gets beyond float32's 1e-4.
    randomize(model, 0.1 if "t5" in load(base).config.model_type else 0.3)
    METHODS[getattr(model, "method_kind", "lora")].save(model, folder)
    _assert_patterns_matched(model, folder)
    if load(base).config.is_encoder_decoder:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_2_SEQ_LM"}))
    return folder


def _assert_patterns_matched(model: Any, folder: Path) -> None:
    """PEFT only warns of a pattern that no module has, and is as if it were not there."""
    config = getattr(model, "peft_config", {}).get("default")
    if getattr(config, "rank_pattern", None):
        tensors = load_file(folder / "adapter_model.safetensors")
        ranks = {len(tensor) for key, tensor in tensors.items() if ".lora_A" in key}
        assert len(ranks) > 1, f"{config.rank_pattern} leaves all at rank {ranks}"
    if getattr(config, "alpha_pattern", None):
        layers = [m for m in model.modules() if hasattr(m, "lora_alpha")]
        alphas = {layer.lora_alpha["default"] for layer in layers}
        assert len(alphas) > 1, f"{config.alpha_pattern} leaves all at alpha {alphas}"


def randomize(model: Any, size: float = 0.3) -> None:
    """Move every trained weight away from where the method starts."""
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * size)
