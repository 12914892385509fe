"""The `method` part of a training job's YAML: one class per kind, its fields' reference.

Each is built on a model by the file of its family in training/methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cluster.spec import Spec


def _check_expressions(patterns: Iterable[str], form: str = "{}") -> None:
    """Raise ValueError for a pattern that is no regular expression in the `form` that PEFT gives
    it."""
    for pattern in patterns:
        try:
            re.compile(form.format(pattern))
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error.msg}") from error


class LowRankSpec(Spec):
    """What the low-rank methods share: where the updates are, and what is trained beside them."""

    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="`all-linear`, a list of module-name suffixes, or a regular expression.",
    )
    exclude_modules: str | tuple[str, ...] = Field(
        (), description="Targets to leave out: a list of suffixes, or a regular expression."
    )
    layers_to_transform: tuple[NonNegativeInt, ...] = Field(
        (), description="Numbers of the layers to adapt, from 0; all if empty."
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="Suffixes of modules that are trained and saved whole, such as `lm_head`."
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="Which of the base's biases are trained too."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the update's input.")

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _is_expression(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        _check_expressions([value] if isinstance(value, str) else ())
        return value


class LoraSpec(LowRankSpec):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): W + (alpha / r) B A on chosen linear
    modules; with rsLoRA's scale, LoRA+'s rates, PiSSA's or OLoRA's start, or as DoRA."""

    kind: Literal["lora"] = Field(description="`lora`.")
    r: PositiveInt = Field(8, description="Rank of each update.")
    alpha: PositiveFloat = Field(16, description="Scale: the update is multiplied by alpha / r.")
    use_rslora: bool = Field(
        False, description="Scale by alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732)."
    )
    use_dora: bool = Field(
        False,
        description="Train each output's magnitude apart from its direction (DoRA, "
        "arXiv:2402.09353).",
    )
    init: Literal["default", "gaussian", "pissa", "olora"] = Field(
        "default",
        description="Start of A and B: B zero with A uniform or `gaussian`; or the weight's "
        "largest singular vectors (`pissa`, arXiv:2404.02948) or first QR factors (`olora`, "
        "arXiv:2406.01775), published as a plain LoRA of twice the rank over the unchanged base.",
    )
    lora_plus_ratio: PositiveFloat = Field(
        1.0,
        description="Learning rate of B over that of A (LoRA+, arXiv:2402.12354; 16 is usual).",
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict, description="Module-name pattern -> its own rank."
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="Module-name pattern -> its own alpha."
    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _of_expressions(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_expressions(value, r"(.*\.)?({})$")
        return value


class AdaLoraSpec(LowRankSpec):
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): updates P diag(E) Q whose ranks are cut,
    module by module, to a budget that the most important singular values share."""

    kind: Literal["adalora"] = Field(description="`adalora`.")
    r: PositiveInt = Field(8, description="Mean rank at the end.")
    init_r: PositiveInt = Field(12, description="Rank of every update at the start; above r.")
    alpha: PositiveFloat = Field(
        16, description="Scale: the update is multiplied by alpha / init_r."
    )
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="Share of steps before the first rank is cut."
    )
    final_ratio: float = Field(
        0.3, ge=0, lt=1, description="Share of steps at the end, in which ranks stay as they are."
    )
    allocate_every_steps: PositiveInt = Field(10, description="Steps between two allocations.")
    beta1: float = Field(0.85, gt=0, lt=1, description="Decay of the importance's mean.")
    beta2: float = Field(0.85, gt=0, lt=1, description="Decay of its uncertainty's mean.")
    orthogonality: float = Field(
        0.5,
        ge=0,
        description="Weight in the loss of how far P and Q are from orthogonal; not in the logged "
        "loss.",
    )

    @model_validator(mode="after")
    def _possible(self) -> AdaLoraSpec:
        if self.init_r <= self.r:
            raise ValueError(f"init_r is {self.init_r}, not above r {self.r}; nothing would be cut")
        if self.warmup_ratio + self.final_ratio >= 1:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} and final_ratio {self.final_ratio} leave no "
                "steps in which ranks are cut; lower one"
            )
        return self


class DyLoraSpec(LowRankSpec):
    """DyLoRA (Valipour et al. 2022, arXiv:2210.07558): each step trains a LoRA's first b ranks, so
    that every rank from min_rank to r can be served from one adapter."""

    kind: Literal["dylora"] = Field(description="`dylora`.")
    r: PositiveInt = Field(8, description="Highest rank.")
    min_rank: PositiveInt = Field(1, description="Lowest rank; b is drawn evenly between the two.")
    alpha: PositiveFloat = Field(16, description="Scale: at rank b, alpha / b.")
    frozen: bool = Field(
        False,
        description="A step's gradient is that of its b-th rank alone, not of all up to b; AdamW's "
        "momentum and weight decay move the others on, as in the paper's code.",
    )

    @model_validator(mode="after")
    def _possible(self) -> DyLoraSpec:
        if self.min_rank > self.r:
            raise ValueError(f"min_rank is {self.min_rank}, above r {self.r}; lower it")
        return self


class IA3Spec(Spec):
    """IA3 (Liu et al. 2022, arXiv:2205.05638): learned factors of keys, values and feed-forward
    activations."""

    kind: Literal["ia3"] = Field(description="`ia3`.")
    target_modules: tuple[str, ...] | None = Field(
        None, description="Module-name suffixes; PEFT's choice for the base's family if not given."
    )
    feedforward_modules: tuple[str, ...] | None = Field(
        None, description="Those of them whose input is scaled, not their output; may be empty."
    )


class BitFitSpec(Spec):
    """Bias-only training (Ben Zaken et al. 2021, arXiv:2106.10199)."""

    kind: Literal["bitfit"] = Field(description="`bitfit`.")
    subset: Literal["all", "query_mlp", "norm"] = Field(
        "all",
        description="`all` biases; `query_mlp`: those of the query and of the layer that widens in "
        "the MLP, the paper's small subset; `norm`: those of norms.",
    )
    add_missing: bool = Field(
        True, description="Linear modules without a bias get one that starts at zero."
    )
    target_modules: str | tuple[str, ...] = Field(
        "all",
        description="`all` linear and norm modules, a list of suffixes, or a regular expression.",
    )


class LayerNormSpec(Spec):
    """LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420): the norms' weights and biases."""

    kind: Literal["layernorm"] = Field(description="`layernorm`.")
    target_modules: str | tuple[str, ...] = Field(
        "all", description="`all` norms, a list of module-name suffixes, or a regular expression."
    )


class FishMaskSpec(Spec):
    """FishMask (Sung et al. 2021, arXiv:2111.09839): the weights with the largest empirical
    Fisher information. Weight decay draws them towards the base."""

    kind: Literal["fishmask"] = Field(description="`fishmask`.")
    share: float = Field(0.005, gt=0, le=1, description="Trained share of the base's parameters.")
    num_samples: PositiveInt = Field(
        1024, description="Rows whose gradients choose, at most all; each worker reads them."
    )
    target_modules: str | tuple[str, ...] = Field(
        "all", description="`all` modules, a list of suffixes, or a regular expression."
    )


class ChildTuningSpec(Spec):
    """Child-tuning (Xu et al. 2021, arXiv:2109.05687): a part of the base learns."""

    kind: Literal["child_tuning"] = Field(description="`child_tuning`.")
    form: Literal["task_driven", "task_free"] = Field(
        "task_driven",
        description="`task_driven`: the weights with the largest Fisher information, all along; "
        "`task_free`: others each step, by chance.",
    )
    share: float = Field(0.3, gt=0, le=1, description="Share of weights that learn (p).")
    num_samples: PositiveInt = Field(
        1024, description="Rows whose gradients choose, in the task-driven form."
    )
    target_modules: str | tuple[str, ...] = Field(
        "all",
        description="`all` modules, a list of suffixes, or a regular expression; the task-free "
        "form takes all.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ChildTuningSpec:
        if self.form == "task_free" and self.target_modules != "all":
            raise ValueError("target_modules: the task-free form trains all modules")
        return self


class FullSpec(Spec):
    """Full fine-tuning, to compare with; published as the change of every weight."""

    kind: Literal["full"] = Field(description="`full`.")


class BottleneckSpec(Spec):
    """Bottleneck adapters: a small two-layer network in each layer of the base."""

    kind: Literal["bottleneck"] = Field(description="`bottleneck`.")
    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer",
        description="`houlsby`: behind attention and feed-forward (arXiv:1902.00751); `pfeiffer`: "
        "behind feed-forward (arXiv:2005.00247); `parallel`: beside it (arXiv:2110.04366).",
    )
    reduction_factor: PositiveFloat = Field(
        16, description="The base's hidden size over the width of the bottleneck."
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "relu", description="Between its two layers."
    )
    scaling: PositiveFloat = Field(1.0, description="Factor of what is added.")


class LlamaAdapterSpec(Spec):
    """LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): attention to a learned prompt behind a
    gate that starts at zero; for llama, mistral and gpt2."""

    kind: Literal["llama_adapter"] = Field(description="`llama_adapter`.")
    adapter_len: PositiveInt = Field(10, description="Length of the prompt, in tokens.")
    adapter_layers: PositiveInt | None = Field(
        None, description="So many layers from the top get one; all if not given."
    )


class PromptTuningSpec(Spec):
    """Prompt tuning (Lester et al. 2021): learned embeddings in front of the input."""

    kind: Literal["prompt_tuning"] = Field(description="`prompt_tuning`.")
    num_virtual_tokens: PositiveInt = Field(20, description="Length of the prompt, in tokens.")
    init: Literal["random", "vocabulary", "text"] = Field(
        "random",
        description="What the prompt starts as: random vectors, embeddings of tokens drawn from "
        "the vocabulary by the job's seed, or those of `init_text`.",
    )
    init_text: str | None = Field(
        None,
        min_length=1,
        description="The text of `init: text`; its tokens are repeated or cut to the prompt.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> PromptTuningSpec:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("give init: text and init_text both, or neither")
        return self


class PTuningSpec(Spec):
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): a prompt trained through an encoder."""

    kind: Literal["p_tuning"] = Field(description="`p_tuning`.")
    num_virtual_tokens: PositiveInt = Field(20, description="Length of the prompt, in tokens.")
    encoder: Literal["mlp", "lstm"] = Field(
        "mlp", description="What the prompt is trained through; the result is stored without it."
    )
    encoder_hidden_size: PositiveInt | None = Field(
        None, description="Width of the encoder; the base's hidden size by default."
    )
    encoder_layers: PositiveInt = Field(
        2, description="Layers of the LSTM; the MLP always has three linear ones."
    )


class PrefixTuningSpec(Spec):
    """Prefix tuning (Li & Liang 2021, arXiv:2101.00190): learned keys and values in front of every
    layer; without projection also P-tuning v2 (Liu et al. 2022, arXiv:2110.07602)."""

    kind: Literal["prefix_tuning"] = Field(description="`prefix_tuning`.")
    num_virtual_tokens: PositiveInt = Field(20, description="Length of the prefix, in tokens.")
    projection: bool = Field(
        False, description="Train through a two-layer MLP; the result is stored without it."
    )
    projection_hidden_size: PositiveInt | None = Field(
        None, description="Width of that MLP; the base's hidden size by default."
    )


class HardPromptSpec(Spec):
    """Few-shot demonstrations (Brown et al. 2020, arXiv:2005.14165) as an adapter: nothing is
    trained; their tokens' embeddings are published as a prompt."""

    kind: Literal["hard_prompt"] = Field(description="`hard_prompt`.")
    demonstrations: PositiveInt = Field(
        4, description="Rows of the data, laid out by the job's template, that make the prompt."
    )
    choose: Literal["random", "first"] = Field(
        "random", description="Which rows: drawn by the job's seed, or the first ones."
    )
    separator: str = Field("\n\n", description="Stands after each of them.")
    text: str | None = Field(
        None, min_length=1, description="The prompt itself; made of the rows if not given."
    )


# What trains parameters of one model: all but what is built of them below.
ExpertSpec = Annotated[
    LoraSpec
    | AdaLoraSpec
    | DyLoraSpec
    | IA3Spec
    | BitFitSpec
    | LayerNormSpec
    | FishMaskSpec
    | ChildTuningSpec
    | FullSpec
    | BottleneckSpec
    | LlamaAdapterSpec
    | PromptTuningSpec
    | PTuningSpec
    | PrefixTuningSpec,
    Field(discriminator="kind"),
]


class ProxyTuningSpec(Spec):
    """Proxy-tuning (Liu et al. 2024, arXiv:2401.08565): an expert is trained on a small base, and
    what it changes there is added to the logits of the large one, which is never loaded here."""

    kind: Literal["proxy_tuning"] = Field(description="`proxy_tuning`.")
    small_base: str = Field(
        description="Folder of a small transformers causal LM with the tokenizer of `base_model`, "
        "seen by every node; the service must list it in engine.small_bases."
    )
    alpha: PositiveFloat = Field(1.0, description="Factor of the expert's change.")
    expert: ExpertSpec = Field(description="How the small base is trained, by `kind`.")


MethodSpec = Annotated[ExpertSpec | HardPromptSpec | ProxyTuningSpec, Field(discriminator="kind")]


def needs_whole_weights(method: MethodSpec) -> str | None:
    """Why the method cannot be trained on a base in 4 or 8 bits, and what to do; None if it can."""
    if isinstance(method, FullSpec) or (
        isinstance(method, ChildTuningSpec) and method.form == "task_free"
    ):
        return "it trains the base's own weights, which 4 or 8 bits cannot follow; take lora"
    if isinstance(method, FishMaskSpec | ChildTuningSpec):
        return "it trains chosen places of the base's own weights; take lora"
    if isinstance(method, LoraSpec) and method.init in ("pissa", "olora"):
        return (
            f"init {method.init} takes a part of the base's weights away, and what is left would "
            "have to be quantised anew; take init default or gaussian"
        )
    if isinstance(method, ProxyTuningSpec):
        return "its large base is never loaded, and its small one is small; leave quantization out"
    if isinstance(method, HardPromptSpec):
        return "it trains nothing; leave quantization out"
    return None
