"""The YAML of a service. Every field's description is its reference. No torch, no Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cluster.names import default_store
from cluster.quantization import QuantizationSpec
from cluster.spec import Name, Spec, StoreUri

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class EngineSpec(Spec):
    """One engine: a base model, its KV pages, the limits of a step."""

    base_model: str = Field(
        description="Folder of a transformers causal LM or encoder-decoder, seen by every node."
    )
    small_bases: tuple[str, ...] = Field(
        (),
        description="Folders of the small bases that proxy-tuned adapters may name. Each is loaded "
        "once at start and runs for the rows of those adapters alone.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of weights, activations and KV pages."
    )
    quantization: QuantizationSpec | None = Field(
        None,
        description="Keep the base's linear modules in 4 or 8 bits; not those of small_bases. A "
        "folder that was saved quantised is served as it is.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` takes a GPU if the replica has one."
    )
    tensor_parallel: PositiveInt = Field(
        1,
        description="GPUs that share each weight of the base. Only 1 runs: an engine is one "
        "process with the whole base, which has to fit one GPU, if need be in 4 or 8 bits.",
    )
    packed_weights: bool = Field(
        True,
        description="On CPU, keep a copy of each linear weight in the layout that is multiplied "
        "fastest (with AVX-512 also to the same bits whatever runs beside it): as much memory "
        "again as the weights.",
    )
    threads: PositiveInt | None = Field(
        None, description="CPU threads of the forward pass; torch's default if not given."
    )
    max_context_tokens: int | None = Field(
        None,
        ge=2,
        description="Longest prompt with answer, in tokens; the base's own limit if not given.",
    )
    max_running_requests: PositiveInt = Field(
        64, description="Requests that generate in one step; more wait."
    )
    max_step_tokens: PositiveInt = Field(
        1024, description="Tokens of one forward pass; longer prompts are cut over several."
    )
    page_tokens: PositiveInt = Field(16, description="Tokens of one KV page.")
    kv_cache_gib: PositiveFloat | None = Field(
        None,
        description="Memory for KV pages. If not given: what max_running_requests full contexts "
        "need, but at most 1 GiB on CPU, or 80 % of the free memory of a GPU.",
    )
    prefix_cache: bool = Field(
        True,
        description="Keep full KV pages and share them between requests of one tenant and "
        "adapter (by content) that begin alike, until pages run out.",
    )
    adapters_gib: PositiveFloat = Field(
        1.0,
        description="Memory on the device for adapters, each counted by the bytes of its tensors; "
        "a replica drops those least recently used, and never one in use, for others. Up to four "
        "that are loaded already may wait for room beside it, with one that PEFT merges and a mix.",
    )
    host_adapters_gib: NonNegativeFloat | None = Field(
        None,
        description="Memory beside a GPU for adapters that come back to it without being fetched "
        "and lowered again; pinned. If not given: 4 on a GPU and 0 on CPU, where it is the same "
        "memory and `adapters_gib` is the one to raise.",
    )

    @field_validator("tensor_parallel")
    @classmethod
    def _whole(cls, value: int) -> int:
        if value > 1:
            raise ValueError(
                f"is {value}, and an engine keeps its base whole, on one GPU; leave it out, and "
                "take a base that fits: `quantization` keeps its weights in 4 or 8 bits, "
                "`dtype: bfloat16` in 16. For more throughput raise replicas.max"
            )
        return value


class ReplicasSpec(Spec):
    """Engine replicas: how many, and what each takes of the cluster."""

    min: NonNegativeInt = Field(
        1,
        description="Replicas kept at all times. With 0 the last one goes downscale_delay_s after "
        "the last request, and the next request starts one at once and waits for it, within the "
        "gateway's time-outs.",
    )
    max: PositiveInt = Field(1, description="Replicas at the highest load; at least `min`.")
    cpus: PositiveFloat = Field(1, description="CPU cores of each.")
    gpus: float = Field(0, ge=0, description="GPUs of each.")
    target_outstanding_tokens: PositiveInt = Field(
        16384,
        description="Tokens still to be computed, of prompts and answers, per replica that "
        "autoscaling aims at.",
    )
    look_back_s: PositiveFloat = Field(
        10.0, description="Seconds over which the load is averaged before it counts."
    )
    upscale_delay_s: NonNegativeFloat = Field(
        10.0, description="Seconds for which more replicas must be wanted before they are started."
    )
    downscale_delay_s: NonNegativeFloat = Field(
        120.0, description="Seconds for which fewer must be wanted before one is taken away."
    )
    drain_timeout_s: PositiveFloat = Field(
        600.0,
        description="Seconds that a replica which is taken away has for its running requests; "
        "what is left then goes on at another, or is cut off where the service ends.",
    )
    surge_percent: int = Field(
        0,
        ge=0,
        le=100,
        description="Replicas started beyond the number wanted while an update replaces them, in "
        "percent of it, rounded up; the cluster needs room for them, and the update waits for it. "
        "With 0 one leaves before another starts: a single one then leaves requests waiting, and "
        "if the new one does not come up nothing answers until a further update.",
    )
    max_ongoing_requests: PositiveInt = Field(
        256, description="Requests that a replica accepts; further ones wait at the gateway."
    )

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasSpec:
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, below min {self.min}; raise it")
        return self


class GatewaySpec(Spec):
    """The HTTP side."""

    host: str = Field("127.0.0.1", description="Address to listen on; loopback by default.")
    port: NonNegativeInt = Field(8000, le=65535, description="Port; 0 takes a free one.")
    replicas: PositiveInt = Field(
        1,
        description="Gateway processes. Each counts for itself what the limits of keys allow, and "
        "max_waiting_requests: with two, a key may have up to twice its limits in all.",
    )
    cpus: PositiveFloat = Field(0.5, description="CPU cores reserved for each.")
    max_body_bytes: PositiveInt = Field(
        8 * 2**20, description="Longest request body; longer ones get 413."
    )
    body_timeout_s: PositiveFloat = Field(
        60.0, description="Seconds for a request's body to arrive; a slower one gets 408."
    )
    max_header_bytes: PositiveInt = Field(
        32 * 2**10, description="Longest headers of a request; longer ones get 431."
    )
    max_waiting_requests: PositiveInt = Field(
        4096, description="Requests in progress and waiting per gateway; more get 429."
    )
    request_timeout_s: PositiveFloat = Field(
        600.0,
        description="Seconds from a request's arrival to its whole answer; a later one gets 504.",
    )
    first_token_timeout_s: PositiveFloat = Field(
        300.0,
        description="Seconds from its arrival to a stream's first token; a later one gets 504.",
    )
    pooling: Literal["last", "mean"] = Field(
        "last",
        description="What /v1/embeddings makes its vector of: the last hidden state (after the "
        "final norm) of the prompt's last token, as bases trained to embed have it, or the mean "
        "over the prompt's tokens. Either is divided by its length.",
    )
    traces: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Where an OpenTelemetry collector takes traces over HTTP, as "
        "http://collector:4318/v1/traces. Needs the extra raygraft[otel] on every node.",
    )
    keys: StoreUri | None = Field(
        None,
        description="Store of the API keys (`graft keys create`). If not given, no key is asked "
        "for, and `host` must be this machine's loopback address.",
    )
    imports: bool = Field(
        True,
        description="Register PEFT folders that are put under imports/NAME/ of the store as "
        "versions of NAME, once both files have come to rest; the store must be writable.",
    )
    catalogue_ttl_s: PositiveFloat = Field(
        2.0,
        description="Seconds until a newly published version, a moved alias, or a key that was "
        "made or revoked is seen. While the keys' store does not answer, the known keys count: a "
        "key revoked meanwhile goes on until the store answers again, and some minutes more where "
        "a read of it hangs; a key that is not known gets 503.",
    )

    @model_validator(mode="after")
    def _guarded(self) -> GatewaySpec:
        if self.keys is None and self.host not in LOOPBACK:
            raise ValueError(
                f"host is {self.host}, reachable from outside, and no keys are asked for; set "
                "keys to a store (graft keys create), or host to 127.0.0.1"
            )
        return self


class ServingSpec(Spec):
    """One service: a base model and the adapters of one store."""

    name: Name = Field(description="Model name of the base in requests.")
    store: StoreUri = Field(
        default_factory=default_store,
        validate_default=True,
        description="Where adapters are: a folder, s3://bucket/prefix or gs://… . If not given: "
        "GRAFT_STORE, else `./graft-store`.",
    )
    cache: str = Field(
        "~/.cache/graft/adapters", description="Folder on each node for verified copies."
    )
    engine: EngineSpec = Field(description="The engine of each replica.")
    replicas: ReplicasSpec = Field(
        default_factory=lambda: ReplicasSpec.model_validate({}), description="Engine replicas."
    )
    gateway: GatewaySpec = Field(
        default_factory=lambda: GatewaySpec.model_validate({}), description="The HTTP side."
    )
