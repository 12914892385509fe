"""The base of every YAML spec: frozen, unknown keys refused, all errors at once.

A spec is read from YAML, overridden by `a.b=c` options, validated whole, and never changed. An
error names the file, the dotted path, the value, and for an unknown key or choice the nearest
known one. Knows nothing of what any spec means; training, serving and the CLI build on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import SpecError
from cluster.names import absolute_uri, check_name


class Spec(BaseModel):
    """Base of all specs. Every field carries a description with its unit."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


def _store_uri(value: str) -> str:
    try:
        return absolute_uri(value)
    except SpecError as error:
        raise ValueError(error.message) from error


def _name(value: str) -> str:
    try:
        check_name(value, "this")
    except SpecError as error:
        raise ValueError(error.message) from error
    return value


StoreUri = Annotated[str, AfterValidator(_store_uri)]
Name = Annotated[str, AfterValidator(_name)]
S = TypeVar("S", bound=Spec)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML forbids a key twice in one mapping; PyYAML takes the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def load_spec(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `path`, apply `a.b=c` overrides (c is parsed as YAML), validate.

    Raises:
        SpecError: the file is missing or not a YAML mapping, an override is malformed, or any
            number of fields are wrong; one message lists them all.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path}: holds {type(data).__name__}, not a mapping of keys to values")
    return _overridden(cls, cast("dict[str, Any]", data), overrides, str(path))


def override_spec(spec: S, overrides: Sequence[str], *, source: str) -> S:
    """`spec` with `a.b=c` overrides. Raises SpecError as `load_spec` does."""
    return _overridden(type(spec), spec.model_dump(mode="json"), overrides, source)


def parse_spec(cls: type[S], data: Mapping[str, Any], *, source: str = "spec") -> S:
    """Validate `data` as `cls`; `source` names it in errors. Raises SpecError with every fault."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        lines = [f"  {_describe(fault, cls)}" for fault in faults]
        noun = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        raise SpecError(f"{source}: {noun}\n" + "\n".join(lines)) from error


def merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the values of `over` in place of its own, key by key where both are mappings."""
    result = dict(tree)
    for key, value in over.items():
        own = result.get(key)
        if isinstance(own, dict) and isinstance(value, dict):
            value = merged(cast("dict[str, Any]", own), cast("dict[str, Any]", value))
        result[key] = value
    return result


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint "; did you mean 'x'?" for the known word nearest to `word`, or what there is."""
    names = sorted(known)
    matches = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 12 else ""


def _overridden(cls: type[S], tree: dict[str, Any], overrides: Sequence[str], source: str) -> S:
    for override in overrides:
        _apply_override(tree, override)
    return parse_spec(cls, tree, source=source)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise SpecError(f"--set {override!r}: write it as key=value, for example --set method.r=8")
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    for part in path[:-1]:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise SpecError(f"--set {override!r}: {part!r} is a value, not a section")
        tree = cast("dict[str, Any]", child)
    tree[path[-1]] = value


def _describe(fault: ErrorDetails, cls: type[Spec]) -> str:
    """One pydantic fault as a sentence that starts with its dotted path."""
    location, kind = fault["loc"], fault["type"]
    path = ".".join(str(part) for part in location) or "(top level)"
    context = fault.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        return f"{path}: unknown key{nearest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{path}: required, and not given"
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(context["expected_tags"]).split(",")]
        field = str(context["discriminator"]).strip("'")
        tag = str(context["tag"])
        return f"{path}.{field}: unknown value {tag!r}{nearest(tag, tags)}"
    if kind == "union_tag_not_found":
        return f"{path}.{str(context['discriminator']).strip(chr(39))}: required, and not given"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    hint = ""
    if kind == "literal_error" and isinstance(fault["input"], str):
        expected = str(context["expected"]).replace(" or ", ", ").split(", ")
        hint = nearest(fault["input"], [choice.strip("'") for choice in expected])
    value = "" if isinstance(fault["input"], (dict, list)) else f" (got {fault['input']!r})"
    return f"{path}: {message}{value}{hint}"


def _known_keys(cls: type[Spec], location: tuple[int | str, ...]) -> set[str]:
    """The keys allowed at `location`, walking nested specs and tagged unions."""
    candidates: list[type[Spec]] = [cls]
    for part in location:
        found: list[type[Spec]] = []
        for candidate in candidates:
            if part in candidate.model_fields:
                found += _specs_in(candidate.model_fields[str(part)].annotation)
            elif any(part in get_args(f.annotation) for f in candidate.model_fields.values()):
                found.append(candidate)  # the tag of a union: `method` -> `lora`
        candidates = found or candidates
    return {key for candidate in candidates for key in candidate.model_fields}


def _specs_in(annotation: Any) -> list[type[Spec]]:
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for argument in get_args(annotation) for spec in _specs_in(argument)]
