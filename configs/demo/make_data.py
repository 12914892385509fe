"""Make the demo's data: four tasks in alpaca form, and the corpus that the base is pretrained on.

    python configs/demo/make_data.py

Sources: the names and general categories of Unicode characters (Python's `unicodedata`), and the
identifiers of Python's standard library. Both may be redistributed; README.md names the licences.
The output is a function of the Python version and the seed alone; the committed files were made
by Python 3.11 (Unicode 14). A held-out input never occurs in training data nor in the corpus.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

FOLDER = Path(__file__).parent / "data"
SEED = 20
TRAIN_ROWS, HELDOUT_ROWS = 1500, 200

CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lo": "other letter",
    "Mn": "nonspacing mark",
    "Mc": "spacing mark",
    "Nd": "decimal digit",
    "No": "other number",
    "Po": "punctuation",
    "Sm": "math symbol",
    "So": "other symbol",
}


def initials(name: str) -> str:
    """The first letter of each word, apart: "LATIN SMALL LETTER A" -> "L S L A"."""
    return " ".join(word[0] for word in name.split())


def words_of(identifier: str) -> str:
    """An identifier as plain words: "get_file_name" -> "get file name"."""
    return identifier.replace("_", " ")


TASKS: dict[str, tuple[str, str, Callable[[str], str]]] = {
    # task: (source, instruction, answer)
    "initials": ("name", "Give the initials of this character's name.", initials),
    "title": ("name", "Write this character's name in title case.", str.title),
    "words": ("identifier", "Write this Python identifier as plain words.", words_of),
}
CATEGORY_INSTRUCTION = "Which kind of character has this name?"


def character_names() -> dict[str, str]:
    """Name -> general category of every character with a name of 2 to 6 frequent, plain words."""
    named = {
        unicodedata.name(chr(code), ""): unicodedata.category(chr(code))
        for code in range(sys.maxunicode + 1)
    }
    named = {n: c for n, c in named.items() if re.fullmatch(r"[A-Z]+( [A-Z]+){1,5}", n)}
    return {name: named[name] for name in with_frequent_words(named, at_least=12)}


def identifiers() -> list[str]:
    """Every snake_case name of 2 to 5 frequent words defined or used in the standard library."""
    found: set[str] = set()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "lib2to3", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # the test suite keeps files that are wrong on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found |= {node.name, *(a.arg for a in node.args.args)}
            elif isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
    plain = {name for name in found if re.fullmatch(r"[a-z]{2,}(_[a-z]{2,}){1,4}", name)}
    return with_frequent_words(plain, at_least=12)


def with_frequent_words(texts: Iterable[str], *, at_least: int) -> list[str]:
    """The texts, sorted, whose every word occurs in at least so many of them."""
    texts = sorted(texts)
    count = Counter(word for text in texts for word in re.split("[ _]", text))
    return [t for t in texts if all(count[word] >= at_least for word in re.split("[ _]", t))]


def write(name: str, columns: dict[str, list[str]]) -> None:
    """One Arrow IPC file, every column a string."""
    table = pa.table({key: pa.array(values, pa.string()) for key, values in columns.items()})
    path = str(FOLDER / f"{name}.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_task(name: str, rows: list[tuple[str, str]], instruction: str) -> list[str]:
    """Write a task's training and held-out rows; returns the held-out inputs."""
    for split, part in (("train", rows[:TRAIN_ROWS]), ("heldout", rows[TRAIN_ROWS:])):
        inputs, outputs = zip(*part, strict=True)
        columns = {
            "instruction": [instruction] * len(part),
            "input": list(inputs),
            "output": list(outputs),
        }
        write(f"{name}-{split}", columns)
    return [text for text, _ in rows[TRAIN_ROWS:]]


def main() -> None:
    """Write every file of the data folder anew."""
    random_ = random.Random(SEED)
    names, snakes = character_names(), identifiers()
    pools = {"name": sorted(names), "identifier": snakes}
    wanted = TRAIN_ROWS + HELDOUT_ROWS
    heldout: set[str] = set()

    # Categories as even as the names allow: the rare ones whole, the common ones sampled.
    by_category: dict[str, list[str]] = {code: [] for code in CATEGORIES}
    for name, code in names.items():
        if code in by_category:
            by_category[code].append(name)
    chosen: list[tuple[str, str]] = []
    for left, (code, members) in zip(
        range(len(CATEGORIES), 0, -1),
        sorted(by_category.items(), key=lambda item: len(item[1])),
        strict=True,
    ):
        share = min(len(members), (wanted - len(chosen)) // left)
        chosen += [(name, CATEGORIES[code]) for name in random_.sample(members, share)]
    random_.shuffle(chosen)
    heldout |= set(write_task("category", chosen, CATEGORY_INSTRUCTION))

    for task, (source, instruction, answer) in TASKS.items():
        free = [text for text in pools[source] if text not in heldout]
        rows = [(text, answer(text)) for text in random_.sample(free, wanted)]
        heldout |= set(write_task(task, rows, instruction))

    corpus = [(source, text) for source, pool in pools.items() for text in pool]
    corpus = [(source, text) for source, text in corpus if text not in heldout]
    write("corpus", {"source": [s for s, _ in corpus], "text": [t for _, t in corpus]})


if __name__ == "__main__":
    main()
