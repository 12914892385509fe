"""DeepSpeed ZeRO as a backend: settings from the spec, and state that no stage or size binds.

(The name `deepspeed` belongs to the library.) DeepSpeed's own checkpoints are pickles bound to
stage and world size; here the full values are gathered and set by parameter name instead.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from training.backend import PARTS, build_optimizer
from training.methods import trainable_parameters
from training.spec import TrainingSpec
from training.step import LossModel

_REDUCE_BUCKET = 500_000_000  # DeepSpeed's own, in elements


def deepspeed_settings(spec: TrainingSpec, world_size: int, trained: int) -> dict[str, Any]:
    """The DeepSpeed configuration that the spec means on so many workers for so many trained
    parameters."""
    zero: dict[str, Any] = {
        "stage": spec.zero.stage,
        "overlap_comm": False,
        # A buffer that each backward makes in full: 2 GB, however small the adapter.
        "reduce_bucket_size": min(_REDUCE_BUCKET, trained),
    }
    if spec.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if spec.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if spec.zero.stage == 3:
        # Small trained tensors are sharded too, or their states would be on every worker.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": spec.micro_batch_size,
        "gradient_accumulation_steps": spec.accumulation(world_size),
        "gradient_clipping": spec.optimizer.max_grad_norm,  # DeepSpeed's own default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


class ZeroBackend:
    """AdamW under ZeRO stage 1, 2 or 3. Needs torch.distributed to be initialised."""

    def __init__(self, model: LossModel, spec: TrainingSpec) -> None:
        # Not what the machine has: a job without GPUs may run beside one that it must not touch.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if spec.workers.gpus else "cpu")
        import deepspeed

        # Its shared-memory all-reduce would be compiled at first use, for half a minute and only
        # where there is a compiler; adapters' gradients are megabytes, gloo carries them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine: Any
        optimizer: Any
        engine, optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, spec.optimizer),
            config=deepspeed_settings(
                spec,
                dist.get_world_size(),
                sum(p.numel() for p in trainable_parameters(model).values()),
            ),
            dist_init_required=False,
        )
        self.model: Any = engine
        self.adapted: Any = model.model
        self._optimizer: Any = optimizer
        self._parameters = trainable_parameters(engine.module)
        # DeepSpeed averages over workers and micro-batches; the loop hands in shares of a sum.
        self.gradient_scale = self._workers = float(dist.get_world_size())
        self._shares = self._workers * spec.accumulation(dist.get_world_size())
        self._loss_scale = 1.0
        self._make_moments()

    def set_learning_rate(self, value: float) -> None:
        """See Backend."""
        for group in self._optimizer.param_groups:
            group["lr"] = value * group["rate_ratio"]

    def set_loss_scale(self, value: float) -> None:
        """See Backend. Not by DeepSpeed's own fp16, which keeps its scale in its own checkpoints,
        holds every weight in float16 and drops the rows of a step that overflowed: told of a scale,
        it multiplies losses, divides gradients, and leaves out an update whose norm is infinite."""
        if value != self._loss_scale:
            self._optimizer.override_loss_scale(value)
            self._loss_scale, self.gradient_scale = value, self._workers * value

    def backward(self, loss: torch.Tensor) -> None:
        """See Backend."""
        self.model.backward(loss * (self._shares / self._loss_scale))
        self.model.step()  # updates at the last micro-batch of a step, counts until then

    def finish_step(self) -> float:
        """See Backend."""
        return float(self.model.get_global_grad_norm())

    def full_state(self, *, moments: bool = True, keep: bool = True) -> dict[str, torch.Tensor]:
        """See Backend."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            values: list[Any] = [safe_get_full_fp32_param(parameter)]
            if moments:
                values += [safe_get_full_optimizer_state(parameter, part) for part in PARTS[1:]]
            # Copied here, so that what was gathered is in memory for one parameter at a time.
            for part, value in zip(PARTS, values, strict=False) if keep else ():
                state[f"{part}/{name}"] = value.detach().float().cpu().clone()
        return state

    def load_full_state(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """See Backend."""
        for name, parameter in self._parameters.items():
            _set(parameter, *(state[f"{part}/{name}"] for part in PARTS))
        self._set_step(step)

    def set_parameter(self, parameter: Any, value: torch.Tensor) -> None:
        """See Backend."""
        _set(parameter, value)

    @contextmanager
    def whole_parameters(self) -> Generator[None]:
        """See Backend."""
        import deepspeed

        sharded = [p for p in self._parameters.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded):
            yield

    def _make_moments(self) -> None:
        """DeepSpeed has none to read or set before its first step, and finds those of the first
        group alone after it; at stage 3 that step was run on zeros, and must not count."""
        zero = self._optimizer
        is_sharded = hasattr(zero, "fp32_partitioned_groups_flat")  # stage 3
        for partition in (
            zero.fp32_partitioned_groups_flat
            if is_sharded
            else zero.single_partition_of_fp32_groups
        ):
            moments = {part: torch.zeros_like(partition) for part in PARTS[1:]}
            zero.optimizer.state[partition] = {"step": torch.tensor(0.0), **moments}
        if not is_sharded:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_step(self, step: int) -> None:
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        for moments in inner.state.values():
            if "step" in moments:
                moments["step"] = torch.tensor(float(step))


def _set(parameter: Any, *values: torch.Tensor) -> None:
    """Set a parameter's value, and its two moments if they are given."""
    set_values = _set_shards if hasattr(parameter, "ds_id") else _set_whole
    set_values(parameter, *values)


def _set_whole(parameter: Any, *values: torch.Tensor) -> None:
    """The same for stages 1 and 2."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, values[0])
    parameter.data.copy_(values[0])  # the forward's own copy, which only a step would refresh
    for part, value in zip(PARTS[1:], values[1:], strict=False):
        safe_set_full_optimizer_state(parameter, value, part)


def _set_shards(parameter: Any, *values: torch.Tensor) -> None:
    """The same for stage 3, shard by shard: DeepSpeed's call for whole values fails where the
    number of workers does not divide the parameter, and leaves the forward's copy as it was."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    # A forward without a backward, as in an evaluation, leaves the whole value behind, which would
    # be taken for the shards' own.
    parameter.partition(has_been_updated=False)
    size = parameter.ds_tensor.numel()
    shards: list[torch.Tensor] = []
    for value in values:
        padded = torch.zeros(size * dist.get_world_size())
        padded[: value.numel()] = value.flatten()
        shards.append(padded.narrow(0, size * dist.get_rank(), size))
    safe_set_local_fp32_param(parameter, shards[0])
    parameter.ds_tensor.data.copy_(shards[0])
    for part, shard in zip(PARTS[1:], shards[1:], strict=False):
        safe_set_local_optimizer_state(parameter, shard, part)
