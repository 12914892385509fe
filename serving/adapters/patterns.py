"""A folder's regular expressions over module names, matched in linear time.

Python's own `re` can be busy for ever with a short pattern, and holds the interpreter's lock while
it is, so it never sees one of a folder. RE2 (pyarrow's) reads the same language without look-around
and back-references; of a name, which has one line, it says what `re` says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.adapter_folder import CONFIG, AdapterFolder, fault
from serving.adapters.config import mapping
from serving.adapters.pace import give_way

# What PEFT makes of a pattern before it matches a name with it.
WHOLE = r"\A(?:{})\z"
ENDING = r"\A(.*\.)?({})\z"
_FORMS = {"FOURIERFT": r"\A(?:.*\.{}$)", "C3A": r"\A(?:.*\.{}$)", "OSF": "{}"}
_BY_PATTERN = ("rank_pattern", "alpha_pattern", "block_size_pattern", "n_frequency_pattern")
_MAX_PATTERNS = 10_000
# Both read them, and not alike: a class of POSIX, and a repetition from 0.
_AMBIGUOUS = ("[:", "{,")
_PLAIN_NAME = re.compile(r"[\w.]+")


def matching(
    folder: AdapterFolder, field: str, pattern: str, names: Sequence[str], form: str = WHOLE
) -> list[str]:
    """Those of `names` that a pattern from the config's `field` is for. Raises AdapterError."""
    try:
        if any(text in pattern for text in _AMBIGUOUS):
            raise ValueError(f"with one of {', '.join(_AMBIGUOUS)}")
        _hits(pattern, [""])  # by itself: no bracket of it may close one of the form
        hits = _hits(form.format(pattern), names)
    except ValueError as error:  # RE2's refusal, or half of a surrogate pair
        raise fault(
            folder.path,
            CONFIG,
            f"has {pattern[:120]!r} in {field}, which RE2 does not match ({str(error)[:120]}); "
            "name the modules instead",
        ) from error
    return [name for name, is_hit in zip(names, hits, strict=True) if is_hit]


def _hits(pattern: str, names: Sequence[str]) -> list[bool]:
    texts = [name.encode() for name in names]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    # As pa.array makes it, which first imports pandas.
    array = pa.StringArray.from_buffers(
        len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(texts))
    )
    match: Any = pc.match_substring_regex  # pyright: ignore[reportAttributeAccessIssue]
    return match(array, pattern=pattern).to_pylist()


def by_pattern(
    folder: AdapterFolder, field: str, names: Collection[str], form: str = ENDING
) -> dict[str, Any]:
    """What `field`, an object of patterns, has for each of `names`: the first that matches it
    counts, as in PEFT. Raises AdapterError."""
    patterns = mapping(folder, field)
    if len(patterns) > _MAX_PATTERNS:
        reason = f"has {len(patterns):,} patterns in {field}; {_MAX_PATTERNS:,} are read at most"
        raise fault(folder.path, CONFIG, f"{reason}, train fewer modules")
    found: dict[str, Any] = {}
    left = list(names)
    for pattern, value in patterns.items():
        give_way()
        found |= dict.fromkeys(matching(folder, field, pattern, left, form), value)
        left = [name for name in left if name not in found]
    return found | {name: patterns[name] for name in left if name in patterns}


class _ByName(dict[str, Any]):
    """A value for each module's full name, in which PEFT finds no patterns to match."""

    def __iter__(self) -> Any:
        return iter(())

    def keys(self) -> Any:
        return {}.keys()


def without_patterns(folder: AdapterFolder, config: Any, names: Collection[str]) -> None:
    """Put names in place of the patterns of a PEFT config, for a model with modules of these
    `names`. Raises AdapterError."""
    endings = {ending for name in names for ending in _endings(name)}
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        wanted: Any = getattr(config, field, None)
        if not wanted or not isinstance(wanted, (str, list, set)):
            continue  # PEFT's own default, or what it refuses
        if field == "layers_pattern":
            wanted = [wanted] if isinstance(wanted, str) else wanted
            _refuse_patterns(folder, field, wanted)
        elif isinstance(wanted, str):
            if wanted.lower() == "all-linear":
                continue
            wanted = matching(folder, field, wanted, list(names))
        # What no name ends in has no effect, but on how long PEFT looks for it.
        kept = [name for name in wanted if isinstance(name, str) and name in endings]
        if not kept and field != "exclude_modules":
            reason = f"has {field} = {str(folder.config.get(field))[:120]!r}, which are none of the"
            raise fault(folder.path, CONFIG, f"{reason} base's; it was made for another base")
        setattr(config, field, kept if field == "layers_pattern" else set(kept))
    for field in _BY_PATTERN:
        if getattr(config, field, None):
            form = _FORMS.get(folder.method, ENDING)
            setattr(config, field, _ByName(by_pattern(folder, field, names, form)))


def _refuse_patterns(folder: AdapterFolder, field: str, wanted: Iterable[Any]) -> None:
    """Raise AdapterError for what is no module's plain name."""
    for name in wanted:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            reason = f"has {str(name)[:120]!r} in {field}, which is no name of modules"
            raise fault(folder.path, CONFIG, f"{reason}; name them")


def _endings(name: str) -> Iterable[str]:
    """ "a.b.c" ends in itself, "b.c" and "c"."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))
