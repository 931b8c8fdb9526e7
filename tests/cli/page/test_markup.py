"""Whatever a name holds, it is text on the page and nothing else."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.cli.page.markup import Html, escaped, joined, name_of, tag
from lorashard.cli.render import printable

HOSTILE = "<script>alert(1)</script>\"'`&amp;</title><img src=x onerror=alert(1)>\u202e\x1b[31m"


class Reader(HTMLParser):
    """The elements and texts of a page, as a browser's parser splits them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


@given(st.text())
def test_text_and_attributes_are_read_back_as_they_were(text: str) -> None:
    found = read(tag("p", text, title=text))
    shown = printable(text).encode("utf-8", "backslashreplace").decode()
    assert (found.elements, found.text) == ([("p", {"title": shown})], shown)


@pytest.mark.parametrize(
    "wrap", [escaped, name_of, lambda text: tag("p", text), lambda t: joined([t])]
)
def test_hostile_names_add_no_element(wrap) -> None:
    found = read(wrap(HOSTILE))
    assert {name for name, _ in found.elements} <= {"p", "bdi"}
    assert "onerror" in found.text
    assert "\u202e" not in found.text
    assert "\x1b" not in found.text


def test_a_name_that_is_not_utf_8_can_be_written() -> None:
    assert escaped("a\udcff").encode() == b"a\\udcff"


def test_what_is_html_already_stays_so() -> None:
    assert tag("td", Html("<b>x</b>"), "<") == "<td><b>x</b>&lt;</td>"
    assert tag("p", class_="a", aria_label="b", id=None) == '<p class="a" aria-label="b"></p>'
