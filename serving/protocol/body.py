"""How a request's body is read.

Types are strict: "5" is no number. Keys that nobody knows are taken and have no effect, since tools
send what they like; a key that would change the answer and is not served may only hold the value
that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

CROSS_FIELD = "cross_field"  # the type of faults that `fault` makes


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


@dataclass(frozen=True)
class _Neutral:
    values: tuple[object, ...]

    def __call__(self, value: Any) -> Any:
        is_one = any(type(value) is type(v) and value == v for v in self.values)
        if value is not None and not is_one:
            raise ValueError("is not supported yet; leave it out")
        return value


def neutral(*values: object) -> BeforeValidator:
    """For a key that is not served: these values change nothing, as does leaving it out."""
    return BeforeValidator(_Neutral(values))


def is_refused(metadata: Iterable[object]) -> bool:
    """Whether a field of that metadata is not served."""
    return any(isinstance(getattr(each, "func", None), _Neutral) for each in metadata)


Nothing = Annotated[Any, neutral({}, [])]


def fault(param: str, reason: str) -> PydanticCustomError:
    """What a validator of a whole body raises, with the field that is most to the point."""
    return PydanticCustomError(CROSS_FIELD, "{reason}", {"param": param, "reason": reason})
