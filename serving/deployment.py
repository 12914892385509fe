"""The two Ray Serve deployments: engine replicas, and gateways in front of them.

What they do is in `replica` and `gateway`; here is only how Ray starts and calls them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from ray import serve

from cluster.errors import GraftError, UnavailableError
from cluster.mixes import NamedAdapter
from cluster.session import store_credentials
from cluster.spec import parse_spec
from serving.autoscaling import METRIC, OutstandingTokens
from serving.engine.request import GenerationRequest, TokenOutput
from serving.spec import ServingSpec

_FIGURES_PERIOD_S = 5.0
_READY_TIMEOUT_S = 5.0
# What is asked for /ready waits behind all requests, and a service that is full is not one that is
# away: where a replica told its figures lately, the question alone shows whether it has died since.
_REPORT_COUNTS_S, _DEATH_SHOWS_S = 3 * _FIGURES_PERIOD_S, 0.5
_BASES = "GRAFT_BASES"  # read by nobody but `running_bases`
# How Serve moves requests and tokens, read by its processes when they start. Of its own accord each
# piece of a stream is an object of Ray's, which takes ten times as long as a message over gRPC, and
# crosses two threads more at either end.
_TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Long bodies, prompts with their log probabilities: of its own accord 4 MiB are the most.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # Serve's own metrics, which Ray collects every ten seconds, are otherwise set ten times a
    # second in each process: 8 % of the CPU time of a gateway with 32 streams.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
}
# Of Serve's controller, whose environment its proxies have too. A deployment that never had a
# replica counts as failed, for good, after so many failed starts for each that it should have, or
# after its own max_constructor_retry_count if that is less; that alone shall decide here.
CONTROLLER = {
    **_TRANSPORT,
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000000",
    # A proxy asks the gateways of its own node alone as long as they take requests, and they take
    # thousands: whoever knows one node's address would never reach the others.
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
    # On a machine that starts other things too, a proxy may well need more than 5 s. One that hangs
    # is replaced that much later.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
}
# On a cluster of our own: on another its proxies may serve others, and have a callback of theirs.
PROXY = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.ingress:middleware"}
# A gateway's places beyond max_waiting_requests, so that it is the one who refuses, with a reason,
# and /health, /ready and /metrics are answered; bodies on their way take some too.
_BESIDE_WAITING = 512
_STARTS = 3
_PATIENTLY = 1_000_000


class EngineReplica:
    """A deployment of `serving.replica.Replica`."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        from serving.replica import Replica

        self._replica = Replica(parse_spec(ServingSpec, spec))
        self._figures: Mapping[str, Any] = {}
        self._reports, self._told_s = 0, -math.inf

    async def generate(
        self, request: GenerationRequest, adapter: NamedAdapter | None, stream: bool
    ) -> AsyncGenerator[TokenOutput]:
        """One request's outputs; Ray cancels the generator when the caller leaves."""
        try:
            async with aclosing(self._replica.generate(request, adapter, stream=stream)) as outputs:
                async for output in outputs:
                    yield output
        except UnavailableError:
            # A stopped engine never comes back; without its process, Serve starts another at once.
            os._exit(1)

    async def answers(self) -> bool:
        """For the gateway's /ready."""
        await self._replica.check_health()
        return True

    async def record_routing_stats(self) -> dict[str, Any]:
        """Read by Ray Serve every second, for the router and, less often, for /metrics: whatever
        changes is sent to every gateway."""
        if time.monotonic() - self._told_s >= _FIGURES_PERIOD_S:
            self._figures = asdict(await self._replica.stats())
            self._reports, self._told_s = self._reports + 1, time.monotonic()
        return {
            "adapters": self._replica.adapters,
            "host_adapters": self._replica.host_adapters,
            "figures": self._figures,
            "reports": self._reports,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Read by Ray Serve several times within the look-back, for `autoscaling`."""
        return {METRIC: (await self._replica.stats()).outstanding_tokens}

    async def check_health(self) -> None:
        """Called by Ray Serve; raising makes it replace this replica."""
        await self._replica.check_health()


class RayBackend:
    """serving.gateway.failover.Backend over a Serve handle."""

    def __init__(self, handle: Any, *, min_replicas: int) -> None:
        self._streaming = handle.options(stream=True)
        self._plain = handle
        self._min_replicas = min_replicas

    async def generate(
        self, request: GenerationRequest, adapter: NamedAdapter | None, *, stream: bool
    ) -> AsyncGenerator[TokenOutput]:
        """See Backend."""
        outputs: Any = self._streaming.generate.remote(request, adapter, stream)
        is_over = False
        try:
            async for output in outputs:
                is_over = output.finish_reason is not None
                yield output
        except GraftError:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not ours: the replica ended what it was doing, and Ray Serve sends on what it raised.
            raise UnavailableError("the replica has ended the request; try again") from error
        except Exception as error:
            raise _unwrapped(error) from error
        finally:
            if not is_over:
                outputs.cancel()

    async def figures(self) -> Mapping[str, Mapping[str, Any]]:
        """See Backend."""
        from serving.reports import latest

        return latest()

    async def check_health(self) -> None:
        """See Backend. A service that may have no replica is ready without one."""
        from serving.reports import age_s

        if not self._min_replicas:
            return
        is_heard = age_s() < _REPORT_COUNTS_S
        try:  # Serve waits for a replica for ever
            async with asyncio.timeout(_DEATH_SHOWS_S if is_heard else _READY_TIMEOUT_S):
                await self._plain.answers.remote()
        except Exception as error:
            if isinstance(error, TimeoutError) and age_s() < _REPORT_COUNTS_S:
                return
            raise UnavailableError("no replica answers yet; try again soon") from error


class Gateway:
    """A deployment of the HTTP app."""

    def __init__(self, spec: Mapping[str, Any], engines: str) -> None:
        self._spec = parse_spec(ServingSpec, spec)
        self._engines = serve.get_app_handle(engines)

    def __serve_build_asgi_app__(self) -> Any:
        import structlog

        from serving.gateway.assembly import gateway_app

        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ]
        )
        engines = RayBackend(self._engines, min_replicas=self._spec.replicas.min)
        return gateway_app(self._spec, engines, is_behind_serve=True)


def build(spec: ServingSpec, *, patiently: bool = False) -> tuple[Any, Any]:
    """The two Ray Serve applications of `spec`: engines, and gateways that ask those running.

    Apart, so that the gateways can end first: what they have taken is still answered. Each gets
    what concerns it alone, and is replaced in an update only where that has changed.

    Args:
        patiently: An engine that fails to start is started again and again as long as one is
            wanted, where a deployment would otherwise be given up that never had one.
    """
    env = _environment(spec)
    document = spec.model_dump(mode="json", include={"name", "store", "cache", "engine"})
    starts = _PATIENTLY if patiently else _STARTS * max(1, spec.replicas.min)
    engines = _versioned(_engines(spec, env, starts), document).bind(document)
    document = spec.model_dump(mode="json", include={"name", "store", "gateway"})
    document["engine"] = spec.engine.model_dump(
        mode="json", include={"base_model", "max_context_tokens"}
    )
    document["replicas"] = {"min": spec.replicas.min, "max": max(1, spec.replicas.min)}
    return engines, _versioned(_gateways(spec, env), document).bind(document, engines_of(spec))


def _versioned(deployment: Any, document: Mapping[str, Any]) -> Any:
    """Left to itself Serve takes every deployment for a new one, and replaces all its replicas."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return deployment.options(version=digest, _internal=True)


def engines_of(spec: ServingSpec) -> str:
    """The name of the application of a service's engines."""
    return f"{spec.name}-engines"


def bases_of(spec: ServingSpec) -> str:
    """The bases of a service, for a comparison."""
    return ", ".join((spec.engine.base_model, *sorted(spec.engine.small_bases)))


def running_bases(details: Mapping[str, Any], spec: ServingSpec) -> str:
    """`bases_of` the running service of that name, by Serve's details, which need no replica."""
    config = details["applications"][engines_of(spec)]["deployments"]["engine"]["deployment_config"]
    return str(config["ray_actor_options"]["runtime_env"]["env_vars"].get(_BASES, "others"))


def _environment(spec: ServingSpec) -> dict[str, str]:
    """Variables of both deployments' processes."""
    return {
        **store_credentials(),
        "TOKENIZERS_PARALLELISM": "false",
        _BASES: bases_of(spec),
        **_TRANSPORT,
    }


# Any, here and below: Serve's decorators are typed for their other uses.
def _engines(spec: ServingSpec, env: Mapping[str, str], starts: int) -> Any:
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    from serving.router import STATS_PERIOD_S, AdapterRouter

    deployment: Any = serve.deployment
    replicas = spec.replicas
    threads = str(spec.engine.threads or max(1, int(replicas.cpus)))
    router = {
        "request_router_class": AdapterRouter,
        "request_routing_stats_period_s": STATS_PERIOD_S,
    }
    return deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=replicas.max_ongoing_requests,
        max_constructor_retry_count=starts,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            # Of its own accord Serve reports loads every ten seconds, however short the look-back,
            # which must be longer than that. It is deprecated, and in 2.60 the only way.
            metrics_interval_s=min(10.0, replicas.look_back_s / 2),
            look_back_period_s=replicas.look_back_s,
            upscale_delay_s=replicas.upscale_delay_s,
            downscale_delay_s=replicas.downscale_delay_s,
            policy=AutoscalingPolicy(
                policy_function=OutstandingTokens,
                policy_kwargs={"target": replicas.target_outstanding_tokens},
            ),
        ),
        max_surge_percent=replicas.surge_percent,
        health_check_period_s=5,
        request_router_config=RequestRouterConfig.model_validate(router),
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            "runtime_env": {"env_vars": {**env, "OMP_NUM_THREADS": threads}},
        },
        **_shared(spec),
    )


def _gateways(spec: ServingSpec, env: Mapping[str, str]) -> Any:
    from ray.serve.config import BackpressureConfig

    deployment: Any = serve.deployment
    ingress: Any = serve.ingress()
    places = spec.gateway.max_waiting_requests + _BESIDE_WAITING
    return deployment(
        ingress(Gateway),
        name="gateway",
        num_replicas=spec.gateway.replicas,
        max_constructor_retry_count=_STARTS * spec.gateway.replicas,
        max_ongoing_requests=places,
        # What no gateway has a place for waits in a proxy, where none of our time-outs counts; and
        # for a moment whatever comes at once.
        max_queued_requests=places,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": spec.gateway.cpus, "runtime_env": {"env_vars": env}},
        **_shared(spec),
    )


def _shared(spec: ServingSpec) -> dict[str, Any]:
    """How either deployment ends and logs."""
    return {
        "graceful_shutdown_timeout_s": spec.replicas.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }


def _unwrapped(error: Exception) -> Exception:
    """What the replica raised, without Ray's wrapping; a lost replica as UnavailableError."""
    from grpc.aio import AioRpcError
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import DeploymentUnavailableError

    if isinstance(error, RayTaskError):
        return error.cause
    # Whatever else Ray and gRPC raise here tells of the process or node, and not of the request.
    if isinstance(error, RayError | AioRpcError):
        return UnavailableError(f"the replica was lost ({type(error).__name__}); try again")
    if isinstance(error, DeploymentUnavailableError):
        return UnavailableError("no engine comes up; see the logs of Ray Serve's controller")
    return error
