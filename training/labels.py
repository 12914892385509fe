"""The classes of a classification job: their names, and a row's number among them.

The names are settled once, where the job is resolved, and stand in its spec from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import DataError
from cluster.tables import stream_rows
from training.data_spec import DataSpec
from training.formats import detect_format, iterate_rows, label_of

_TASK = "sequence_classification"
_MOST_FOUND = 1000  # more are texts or ids by mistake; who means them can name them
_TOLD = 12


def find_labels(data: DataSpec) -> tuple[str, ...]:
    """The names of the classes: `data.labels`, or those that the training rows have.

    Texts are sorted; whole numbers are the numbers of classes and must be 0 to n - 1.

    Raises:
        DataError: there are fewer than two, far too many, or numbers with gaps.
    """
    if data.labels:
        return data.labels
    stream = stream_rows(data.train)
    row_format = detect_format(stream, data.format, _TASK)
    found: set[str | int] = set()
    for row in iterate_rows(stream, row_format, _TASK):
        label = label_of(row, row_format)
        if label is not None:
            found.add(label)
        if len(found) > _MOST_FOUND:
            raise DataError(
                f"data {data.train}: has more than {_MOST_FOUND:,} different labels; check the "
                "column, or name them in data.labels"
            )
    numbers = sorted(label for label in found if isinstance(label, int))
    names = sorted(label for label in found if isinstance(label, str))
    if numbers and names:
        raise DataError(
            f"data {data.train}: has labels by number ({_told(map(str, numbers))}) and by name "
            f"({_told(names)}); name all classes in data.labels"
        )
    if numbers and numbers != list(range(len(numbers))):
        raise DataError(
            f"data {data.train}: has the labels {_told(map(str, numbers))}; numbers of classes are "
            "0 to n - 1, each of them in the rows, or else name all classes in data.labels"
        )
    if len(found) < 2:
        raise DataError(
            f"data {data.train}: has {len(found)} labels, and a classifier needs two; check the "
            "column, or name them in data.labels"
        )
    return (*map(str, numbers), *names)


def class_number(label: str | int, labels: Sequence[str]) -> int:
    """The number of a row's class, from 0. A number counts in `labels`, unless all of their names
    are numbers, which it is then one of. Raises DataError for an unknown one."""
    if isinstance(label, int) and not all(name.lstrip("-").isdecimal() for name in labels):
        if 0 <= label < len(labels):
            return label
    elif str(label) in labels:
        return labels.index(str(label))
    raise DataError(
        f"label {str(label)[:60]!r} is none of {_told(labels)}; mend the row, or name all classes "
        "in data.labels"
    )


def _told(names: Sequence[str] | map[str]) -> str:
    listed = list(names)
    more = f", … ({len(listed):,} in all)" if len(listed) > _TOLD else ""
    return ", ".join(listed[:_TOLD]) + more
