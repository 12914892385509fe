"""ROUGE-L of two texts in any script. Knows words, nothing of models."""

from __future__ import annotations

import re
import unicodedata

# Scripts without spaces count by character in ROUGE: Japanese, Chinese, Korean.
_ALONE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_JOINERS = "\u200c\u200d"  # within words of Indic scripts and Persian
# Over a text's classes: marks go on a word, and make none themselves (an emoji may have one).
_WORD = re.compile("am*|w[wm]*")


def rouge_l(given: str, expected: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, ROUGE-L), case aside; of texts
    without any word, whether they are the same."""
    one, other = _folded(given), _folded(expected)
    words, others = _words(one), _words(other)
    if not words or not others:
        return float(one == other)
    lengths = [0] * (len(others) + 1)
    for word in words:
        before = lengths.copy()
        for j, candidate in enumerate(others):
            is_same = word == candidate
            lengths[j + 1] = before[j] + 1 if is_same else max(before[j + 1], lengths[j])
    return 2 * lengths[-1] / (len(words) + len(others))


def _folded(text: str) -> str:
    """Without case, and every accented letter one character, however it was written."""
    return unicodedata.normalize("NFC", text.casefold()).strip()


def _words(text: str) -> list[str]:
    """Runs of letters and digits with their marks, which `\\w` leaves out."""
    classes = "".join(map(_class, text))
    return [text[found.start() : found.end()] for found in _WORD.finditer(classes)]


def _class(character: str) -> str:
    """m: a mark; a: a word alone; w: a part of one; or a blank."""
    category = unicodedata.category(character)[0]
    if category == "M" or character in _JOINERS:
        return "m"
    if category in "LN" or character == "_":
        return "a" if _ALONE.match(character) else "w"
    return " "
