"""The YAML of a training job. Every field's description is its reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cluster.errors import SpecError
from cluster.names import default_store
from cluster.quantization import QuantizationSpec
from cluster.spec import Name, Spec, StoreUri, merged, parse_spec
from cluster.tasks import Task
from training.data_spec import DataSpec, EvaluationSpec
from training.method_spec import MethodSpec, ProxyTuningSpec, PTuningSpec, needs_whole_weights
from training.task_spec import check_task
from training.tracking_spec import TrackingSpec

Share = Annotated[float, Field(ge=0, lt=1)]


class OutputSpec(Spec):
    """Where the adapter is published."""

    store: StoreUri = Field(
        default_factory=default_store,
        validate_default=True,
        description="Folder, s3://bucket/prefix or gs://… . If not given: GRAFT_STORE, else "
        "`./graft-store`.",
    )
    name: Name = Field(description="Adapter name; each run publishes its next version.")


class OptimizerSpec(Spec):
    """AdamW and its learning-rate schedule."""

    kind: Literal["adamw", "cpu_adam"] = Field(
        "adamw",
        description="torch's AdamW, or DeepSpeed's for CPUs: the same update by vector "
        "instructions, compiled at first use. On GPUs it needs `zero.offload_optimizer`.",
    )
    learning_rate: PositiveFloat = Field(2e-4, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Decay of the two moments.")
    eps: PositiveFloat = Field(1e-8, description="Added to the root of the second moment.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate after warm-up; the first two end at 0."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of steps spent warming up.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them."
    )
    stop_grad_norm: PositiveFloat = Field(
        1e6,
        description="A step whose gradient's norm, before that, is larger stops the job: it has "
        "exploded.",
    )


class ZeroSpec(Spec):
    """DeepSpeed ZeRO: what is sharded over the workers, and what lies in CPU memory."""

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="0 nothing, 1 optimiser states, 2 and gradients, 3 and parameters."
    )
    offload_optimizer: bool = Field(False, description="Keep optimiser states in CPU memory.")
    offload_parameters: bool = Field(False, description="Keep parameters in CPU memory (stage 3).")

    @model_validator(mode="after")
    def _consistent(self) -> ZeroSpec:
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters needs stage 3")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        return self


class WorkersSpec(Spec):
    """Ray Train's workers."""

    count: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1,
        description="Number of data-parallel workers; `[least, most]` follows the cluster's "
        "nodes as they come and go, going on from the last checkpoint at each change; what other "
        "training jobs have is left to them, what a service has is not known.",
    )
    cpus: PositiveFloat = Field(1, description="CPU cores of each, also its threads.")
    gpus: Literal[0, 1] = Field(0, description="GPUs of each; 0 trains on CPU.")
    max_failures: int = Field(
        3, ge=0, description="Worker failures survived by restarting from the last checkpoint."
    )

    @model_validator(mode="after")
    def _ordered(self) -> WorkersSpec:
        if isinstance(self.count, tuple) and self.count[0] > self.count[1]:
            raise ValueError(f"count is [least, most], and {self.count[0]} > {self.count[1]}")
        return self

    @property
    def least(self) -> int:
        """The smallest number of workers that the job may have."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """The largest number of workers that the job may have."""
        return self.count if isinstance(self.count, int) else self.count[1]


# Methods that change what frozen modules give, token by token, and leave the base as it is.
LINEAR_DELTAS = ("lora", "adalora", "dylora", "ia3", "bitfit", "layernorm")


class AdapterSpec(Spec):
    """One of several adapters: what is other than in the rest of the spec. Sections are merged key
    by key; a `method` of another `kind` replaces the whole section."""

    method: dict[str, Any] = Field(default_factory=dict, description="Keys of `method`.")
    data: dict[str, Any] = Field(default_factory=dict, description="Keys of `data`.")
    optimizer: dict[str, Any] = Field(default_factory=dict, description="Keys of `optimizer`.")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="Keys of `evaluation`.")
    epochs: PositiveFloat | None = Field(None, description="As outside if not given.")
    max_steps: PositiveInt | None = Field(None, description="As outside if not given.")
    batch_size: PositiveInt | None = Field(None, description="As outside if not given.")
    seed: int | None = Field(None, ge=0, lt=2**31, description="As outside if not given.")

    @model_validator(mode="before")
    @classmethod
    def _own_alone(cls, value: Any) -> Any:
        keys = set(value) if isinstance(value, dict) else set[str]()  # type: ignore[reportUnknown]
        for key in sorted(keys & set(TrainingSpec.model_fields) - set(cls.model_fields)):
            raise ValueError(
                f"{key} is the same for all adapters of a run; set it outside of `adapters`"
            )
        return value or {}


class TrainingSpec(Spec):
    """One training job: base model, method, data, output."""

    base_model: str = Field(
        description="Folder of a transformers model that fits `task`, seen by every node."
    )
    task: Task = Field(
        "causal_lm",
        description="What the base learns to do. `causal_lm`: to go on with a prompt; "
        "`seq_2_seq_lm`: the same by an encoder-decoder (T5, mT5, BART, …); "
        "`sequence_classification`: to tell which of the classes a text is of, by an encoder "
        "(BERT, RoBERTa, …) or a causal LM with a head that every method trains and saves.",
    )
    method: MethodSpec = Field(description="How the adapter is built, by `kind`.")
    data: DataSpec = Field(description="The rows.")
    output: OutputSpec = Field(description="Where the adapter goes.")
    optimizer: OptimizerSpec = Field(
        default_factory=lambda: OptimizerSpec.model_validate({}), description="AdamW."
    )
    evaluation: EvaluationSpec = Field(
        default_factory=lambda: EvaluationSpec.model_validate({}),
        description="How the rows of `data.validation` are used.",
    )
    epochs: PositiveFloat = Field(3, description="Passes over the data.")
    max_steps: NonNegativeInt | None = Field(
        None,
        description="Stop after so many optimiser steps, whatever `epochs` says; 0 publishes the "
        "method as it starts, which is all there is of a hard prompt.",
    )
    micro_batch_size: PositiveInt = Field(4, description="Rows of one forward on one worker.")
    gradient_accumulation_steps: PositiveInt | None = Field(
        None,
        description="Micro-batches per worker and optimiser step, 1 by default; give this or "
        "`batch_size`.",
    )
    batch_size: PositiveInt | None = Field(
        None,
        description="Rows of one optimiser step over all workers, however many there are. If not "
        "given: `micro_batch_size` x `gradient_accumulation_steps` x the most of `workers.count`.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Of the frozen base and the forward pass; adapters train in fp32. `fp16`, for "
        "GPUs without bf16, scales the loss; a step that overflows is done again at half the "
        "scale, so no row is lost.",
    )
    quantization: QuantizationSpec | None = Field(
        None,
        description="Keep the frozen base's linear modules in 4 or 8 bits (QLoRA with `lora`). The "
        "adapter is an ordinary one: it fits the plain base too.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only each layer's input for backward and compute the rest again: less "
        "memory, about a third more time, the same result.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of initial values, data order and dropout.")
    zero: ZeroSpec = Field(
        default_factory=lambda: ZeroSpec.model_validate({}), description="DeepSpeed ZeRO."
    )
    workers: WorkersSpec = Field(
        default_factory=lambda: WorkersSpec.model_validate({}), description="Ray Train's workers."
    )
    checkpoint_every_steps: PositiveInt = Field(
        100,
        description="Optimiser steps between checkpoints: what a failure can cost. One more is "
        "saved as soon as the cluster tells that a node of the job will be taken away.",
    )
    checkpoints_kept: PositiveInt = Field(2, description="Older ones are deleted.")
    log_every_steps: PositiveInt = Field(10, description="Optimiser steps between log lines.")
    tracking: TrackingSpec = Field(
        default_factory=lambda: TrackingSpec.model_validate({}),
        description="Where the log lines' figures go too, beside TensorBoard's events.",
    )
    adapters: dict[Name, AdapterSpec] = Field(
        default_factory=dict,
        description="Several adapters in one run, by the name that each is published under: one "
        "forward and backward of the base for all, each with the result that it has alone. "
        "`output.name` is then the job's. Needs `zero.stage` 0 and methods that are linear deltas: "
        + ", ".join(f"`{kind}`" for kind in LINEAR_DELTAS)
        + ".",
    )

    @field_validator("adapters")
    @classmethod
    def _each_fits(
        cls, adapters: dict[str, AdapterSpec], info: ValidationInfo
    ) -> dict[str, AdapterSpec]:
        if not adapters or set(cls.model_fields) - set(info.data) != {"adapters"}:
            return adapters  # the rest has faults of its own
        stage = info.data["zero"].stage
        faults = [f"share a pass at zero.stage 0 alone; set it so (it is {stage})"] if stage else []
        rest = cls.model_construct(**info.data, adapters=adapters)
        for name in adapters:
            try:
                fault = _no_linear_delta(rest.adapter(name).method)
                faults += [f"{name}.{fault}"] if fault else []
            except SpecError as error:
                faults += [f"{name}.{line.strip()}" for line in error.message.splitlines()[1:]]
        if faults:
            raise ValueError("; ".join(faults))
        return adapters

    @model_validator(mode="after")
    def _validated(self) -> TrainingSpec:
        if self.data.validation is None and self.evaluation != EvaluationSpec.model_validate({}):
            raise ValueError("evaluation needs data.validation: a path, or a share of the rows")
        return self

    @model_validator(mode="after")
    def _fits_the_task(self) -> TrainingSpec:
        check_task(self.task, self.method.kind, self.data, self.evaluation)
        if self.adapters and self.task != "causal_lm":
            raise ValueError(f"adapters: task {self.task} trains one at a time; give method")
        if self.quantization is not None and self.task != "causal_lm":
            raise ValueError(
                f"quantization: task {self.task} trains over a plain base alone; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainingSpec:
        if self.batch_size is not None and self.gradient_accumulation_steps is not None:
            raise ValueError("give batch_size or gradient_accumulation_steps, not both")
        return self

    @model_validator(mode="after")
    def _quantized_base_stays(self) -> TrainingSpec:
        if self.quantization is None:
            return self
        if reason := needs_whole_weights(self.method):
            raise ValueError(f"quantization does not fit method {self.method.kind}: {reason}")
        if self.zero.stage == 3:
            raise ValueError(
                "quantization does not fit zero.stage 3, which cannot shard packed weights; take "
                "zero.stage 2, where each worker has the whole base in few bits"
            )
        return self

    @model_validator(mode="after")
    def _runs_in_its_precision(self) -> TrainingSpec:
        trained = getattr(self.method, "expert", self.method)
        is_lstm = isinstance(trained, PTuningSpec) and trained.encoder == "lstm"
        if is_lstm and self.precision == "fp16" and not self.workers.gpus:  # oneDNN has none
            raise ValueError(
                "precision fp16: method p_tuning with encoder lstm needs a GPU for it; take bf16 "
                "or fp32, encoder mlp, or workers.gpus 1"
            )
        return self

    @model_validator(mode="after")
    def _states_where_the_optimizer_is(self) -> TrainingSpec:
        on_gpu = self.workers.gpus and not self.zero.offload_optimizer
        if self.optimizer.kind == "cpu_adam" and on_gpu:
            raise ValueError(
                "optimizer.kind cpu_adam updates what is in CPU memory; set zero.offload_optimizer "
                "(stage 1, 2 or 3), or take adamw"
            )
        return self

    def each(self) -> dict[str, TrainingSpec]:
        """By adapter, the spec of the job that would train it alone; this one without several."""
        if not self.adapters:
            return {self.output.name: self}
        return {name: self.adapter(name) for name in self.adapters}

    def adapter(self, name: str) -> TrainingSpec:
        """The spec of the job that would train one of `adapters` alone.

        Raises:
            SpecError: there is none; lists every fault.
        """
        own = self.adapters[name].model_dump(mode="json", exclude_defaults=True)
        tree = self.model_dump(mode="json", exclude={"adapters"})
        if "batch_size" in own:
            del tree["gradient_accumulation_steps"]
        if own.get("method", {}).get("kind", self.method.kind) != self.method.kind:
            del tree["method"]
        return parse_spec(TrainingSpec, merged(tree, {**own, "output": {"name": name}}))

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimiser step over all workers; the same for any number of them."""
        accumulation = self.gradient_accumulation_steps or 1
        return self.batch_size or self.micro_batch_size * accumulation * self.workers.most

    def memory_advice(self) -> str:
        """What to change where a worker's memory does not suffice, with today's values."""
        knobs = [f"lower micro_batch_size ({self.micro_batch_size}; the batch stays as it is)"]
        if self.precision == "fp32":
            knobs.append("set precision to bf16")
        if not self.gradient_checkpointing:
            knobs.append("set gradient_checkpointing")
        highest = 3 if self.quantization is None else 2
        if not self.adapters and self.workers.most > 1 and self.zero.stage < highest:
            knobs.append(f"raise zero.stage ({self.zero.stage})")
        if self.workers.gpus and not self.adapters and not self.zero.offload_optimizer:
            knobs.append("set zero.offload_optimizer")
        # A job that goes on cannot change these.
        anew = [f"a lower data.max_length ({self.data.max_length})"]
        can_quantize = self.task == "causal_lm" and self.zero.stage < 3
        if self.quantization is None and can_quantize and not needs_whole_weights(self.method):
            anew.append("quantization.bits 4")
        if self.adapters:
            anew.append(f"fewer adapters at once (of {len(self.adapters)})")
        return ", or ".join([*knobs, f"train anew with {' or '.join(anew)}"])

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of a step on each of `world_size` workers, none over
        `micro_batch_size`."""
        return -(-self.global_batch_size // (self.micro_batch_size * world_size))

    def stage_on(self, world_size: int) -> int:
        """The ZeRO stage that so many workers run: a lone one has nobody to share with, and what
        DeepSpeed does to that end, at every micro-batch, would change nothing but its speed."""
        zero = self.zero
        is_alone = world_size == 1 and not (zero.offload_optimizer or zero.offload_parameters)
        return 0 if is_alone else zero.stage

    @property
    def trained_base(self) -> str:
        """The folder of the model that a run loads: `base_model`, or the small one of a proxy."""
        method = self.method
        return method.small_base if isinstance(method, ProxyTuningSpec) else self.base_model


def _no_linear_delta(method: MethodSpec) -> str | None:
    """Why adapters of this method cannot share a pass, if so."""
    if method.kind not in LINEAR_DELTAS:
        return (
            f"method.kind: {method.kind} is no linear delta, so it cannot share a pass; train it "
            f"alone, or take one of {', '.join(LINEAR_DELTAS)}"
        )
    start = getattr(method, "init", "default")
    if start in ("pissa", "olora"):
        return (
            f"method.init: {start} takes a part of the base's weights away, which the others need; "
            "train it alone, or take default or gaussian"
        )
    return None
