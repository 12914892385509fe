"""The `tracking` part of a training job's YAML. Keys and passwords are read from the environment of
the workers' nodes by the trackers themselves; there is no place for them here."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from cluster.spec import Spec


class MlflowSpec(Spec):
    """MLflow (`pip install 'raygraft[mlflow]'` on the nodes and here)."""

    tracking_uri: str | None = Field(
        None,
        description="The server's URL; MLFLOW_TRACKING_URI of the nodes' environment if not given. "
        "User and password are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD there.",
    )
    experiment: str | None = Field(
        None, min_length=1, description="Experiment; the adapter's name if not given."
    )

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).password is not None:
            raise ValueError(
                "holds a password, which would be stored with the adapter; give it to the nodes as "
                "MLFLOW_TRACKING_PASSWORD, and its user as MLFLOW_TRACKING_USERNAME"
            )
        return value


class WandbSpec(Spec):
    """Weights & Biases (`pip install 'raygraft[wandb]'` on the nodes and here)."""

    project: str = Field("graft", min_length=1, description="Project.")
    entity: str | None = Field(
        None, description="User or team; the key's own (WANDB_API_KEY of the nodes) if not given."
    )
    mode: Literal["online", "offline"] = Field(
        "online",
        description="`offline` writes into WANDB_DIR of the worker's node, for `wandb sync`.",
    )


class TrackingSpec(Spec):
    """Where else the run's figures go, beside TensorBoard's events in the job's place in the
    store. What fails here is told once, and the run goes on without it."""

    mlflow: MlflowSpec | None = Field(None, description="Also to MLflow.")
    wandb: WandbSpec | None = Field(None, description="Also to Weights & Biases.")
