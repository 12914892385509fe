"""Weighted mixes of adapters: how a request names one, "a:0.7+b@3:-0.3", and what it then is.

Only a name with a "+", which no adapter has, is a mix. Each of its parts is a reference as ever
(`adapter`, `adapter@version`, `adapter:alias`), a colon, and a decimal number. The weight is always
there and always last, so an alias that looks like a number is none by accident: in "a:2+b:1" 2 is
the weight, and the adapter that the alias "2" of "a" stands for is "a:2:1".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from cluster.errors import RequestError
from cluster.names import is_mix
from cluster.registry import AdapterVersion

MAX_PARTS = 8
# Few digits: a weight is a number as people write it, and its text says all of it.
_WEIGHT = re.compile(r"-?(?:[0-9]{1,4}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})")
# Methods of which no adapter is a change of weights; of others, that shows when they are added up.
_PROMPT, _BLOCK = "has tokens in front of the prompt", "puts a block beside the base's modules"
_NO_CHANGE_OF_WEIGHTS: Mapping[str, str] = {
    "PROMPT_TUNING": _PROMPT, "P_TUNING": _PROMPT, "PREFIX_TUNING": _PROMPT,
    "BOTTLENECK": _BLOCK, "ADAPTION_PROMPT": _BLOCK, "PROXY_TUNING": "adds logits",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterMix:
    """A sum of adapter versions, each times its weight, sorted by their references."""

    parts: tuple[tuple[AdapterVersion, float], ...]

    # As the metrics have it: one for all mixes, as anybody can ask for as many as he likes. No
    # adapter can be called so.
    name = "(mix)"

    @property
    def ref(self) -> str:
        """The exact reference, "name@version:weight+…", which names the same mix in a request."""
        texts = [format(Decimal(repr(weight)), "f") for _, weight in self.parts]  # no exponent
        return "+".join(f"{v.ref}:{w}" for (v, _), w in zip(self.parts, texts, strict=True))


# What a request can name beside the base.
NamedAdapter = AdapterVersion | AdapterMix


def parse_mix(model: str) -> list[tuple[str, float]] | None:
    """The references and weights of a mix; None if `model` is no mix.

    Raises:
        RequestError: a part has no weight, or there are too many.
    """
    if "+" not in model:
        return None
    texts = model.split("+")
    if len(texts) > MAX_PARTS:
        raise RequestError(
            f"model {model[:120]!r}: mixes {len(texts)} adapters, of {MAX_PARTS} at most",
            param="model",
        )
    parts: list[tuple[str, float]] = []
    for text in texts:
        name, _, weight = text.rpartition(":")
        if not name or not _WEIGHT.fullmatch(weight):
            raise RequestError(
                f"model {model[:120]!r}: a mix is ADAPTER:WEIGHT+ADAPTER:WEIGHT, as in "
                f"'a:0.7+b@3:-0.3', and {text[:120]!r} does not end in a weight",
                param="model",
            )
        parts.append((name, float(weight)))
    return parts


def check_mixable(version: AdapterVersion) -> None:
    """Raise RequestError if its method alone tells that it cannot be added to others, before
    anything of it is fetched."""
    reason = _NO_CHANGE_OF_WEIGHTS.get(version.method)
    if reason is not None:
        raise RequestError(
            f"adapter {version.ref!r} cannot be mixed: it {reason}, which no weight multiplies; "
            "ask for it alone",
            param="model",
        )


def members_of(ref: str) -> list[str]:
    """The exact references of the adapters in AdapterMix.ref, or `ref` itself if it is of one."""
    return [part.rpartition(":")[0] for part in ref.split("+")] if is_mix(ref) else [ref]
