"""Text as it comes: nothing taken back, nothing of a stop text given out."""

import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.detokenizer import Detokenizer

TOKENIZER = byte_tokenizer()


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What came with each token until a stop, and whether it stopped."""
    detokenizer = Detokenizer(TOKENIZER, TOKENIZER("prompt ä")["input_ids"], stop)
    found: list[str] = []
    for token in TOKENIZER(text)["input_ids"]:
        found.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    found.append(detokenizer.finish())
    return found, detokenizer.stopped


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_pieces_are_the_text(text: str) -> None:
    encodable = text.encode("utf-8", "ignore").decode()
    assert "".join(pieces(encodable)[0]) == encodable


def test_half_a_character_is_held_back() -> None:
    found, _ = pieces("aé€😀")
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop(text: str, stop: list[str]) -> None:
    found, stopped = pieces(text, tuple(stop))
    # The stop that is complete first, as tokens come one by one.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    released = "".join(found)
    if not ends:
        assert released == text
        return
    first_end = min(end for end, _ in ends)
    assert released == text[: min(start for end, start in ends if end == first_end)]


@pytest.mark.parametrize("stop", ["\n\n", "€", "END"])
def test_a_stop_over_several_tokens(stop: str) -> None:
    found, stopped = pieces(f"hello{stop}never seen", (stop,))
    assert ("".join(found), stopped) == ("hello", True)


def test_what_looked_like_a_stop_comes_out_when_it_is_none() -> None:
    found, stopped = pieces("ENDURE", ("ENDE",))
    assert (found, stopped) == (["", "", "", "ENDU", "R", "", "E"], False)
    assert pieces("END", ("ENDE",)) == (["", "", "", "END"], False)
