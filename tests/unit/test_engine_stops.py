"""Stop strings: what is shown never depends on where the text was cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kllm.engine.stops import StopMatcher


def run(stops, pieces):
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.feed(piece))
        if matcher.stopped:
            return shown, True
    return [*shown, matcher.flush()], False


@pytest.mark.parametrize(
    ("stops", "text", "wanted"),
    [
        ((), "anything", "anything"),
        (("END",), "one END two", "one "),
        (("END",), "one EN", "one EN"),
        (("aab",), "aaab", "a"),
        (("b", "ab"), "xab", "x"),  # both end together: the longer one
        (("abcd", "bc"), "abcd", "a"),  # the one that ends first
        (("。",), "你好。再见", "你好"),
        (("\n\n",), "a\nb\n\nc", "a\nb"),
    ],
)
def test_text_before_the_first_stop(stops, text, wanted):
    for pieces in ([text], list(text)):
        shown, _ = run(stops, pieces)
        assert "".join(shown) == wanted


def test_only_a_possible_beginning_is_held_back():
    matcher = StopMatcher(("STOP",))
    assert [matcher.feed(p) for p in ("abc", "S", "T", "x", "ST")] == ["abc", "", "", "STx", ""]
    assert matcher.flush() == "ST"


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_pieces_do_not_matter(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    borders = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    shown, stopped = run(stops, pieces)
    ends = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    assert stopped == bool(ends)
    assert "".join(shown) == (text[: min(ends)[1]] if ends else text)
