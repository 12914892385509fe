"""Which modules a method's `target_modules` names, for the methods that PEFT does not know."""

from __future__ import annotations

import re

from cluster.errors import SpecError


def is_targeted(name: str, targets: str | tuple[str, ...]) -> bool:
    """Whether `targets` (`all`, a regular expression, or suffixes) names the module `name`.

    Raises:
        SpecError: the expression is none.
    """
    if isinstance(targets, str):
        try:
            return targets == "all" or re.fullmatch(targets, name) is not None
        except re.error as error:
            raise SpecError(
                f"method.target_modules: {targets!r} is no regular expression: {error}"
            ) from error
    return any(name == target or name.endswith("." + target) for target in targets)
