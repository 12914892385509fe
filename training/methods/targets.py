"""Which modules a method's `target_modules` names.

PEFT and a loop over modules both pass over a name of a list that matches nothing, and train the
others alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def check_targets(
    targets: str | tuple[str, ...],
    names: Iterable[str],
    there: Iterable[str],
    base_path: str,
    field: str = "target_modules",
) -> None:
    """Raise SpecError for an expression, or a name of a list, that matches no module of `names`;
    it tells the last names of those in `there`."""
    known = tuple(names)
    each = [targets] if isinstance(targets, str) else [(target,) for target in targets]
    wrong = [part for part in each if not any(is_targeted(name, part) for name in known)]
    if wrong or not each:
        told = [repr(part if isinstance(part, str) else part[0]) for part in wrong]
        last = sorted({name.rsplit(".", 1)[-1] for name in there})
        raise SpecError(
            f"method.{field}: {', '.join(told) or 'an empty list'} matches no module of "
            f"{base_path}; it has {', '.join(last)}"
        )
