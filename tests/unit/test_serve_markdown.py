"""Markdown for the page: what renders, that it is safe, and that it is quick."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest

pytest.importorskip("nh3")
from serve_page_support import DEMO, HOSTILE

from kllm.serve import markdown
from kllm.serve.markdown import render
from kllm.serve.maths import MATHML, formula


class Tags(HTMLParser):
    """Every start tag with its attributes, as a browser would read them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_inert(html: str) -> None:
    allowed = {*markdown._TEXT.split(), *MATHML}
    for tag, attributes in Tags(html).found:
        assert tag in allowed, tag
        for name, value in attributes.items():
            assert name in {"href", "title", "rel", "target", "class", "start", "data-lang"} | set(
                MATHML.get(tag, ())
            ), (tag, name)
            if name == "href":
                assert tag == "a" and str(value).startswith(("http://", "https://", "mailto:")), value


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**b** *i* `c` ~~s~~", "<p><strong>b</strong> <em>i</em> <code>c</code> <s>s</s></p>\n"),
        ("one\ntwo", "<p>one<br>\ntwo</p>\n"),
        ("# 标题", "<h1>标题</h1>\n"),
        ("3. c\n4. d", '<ol start="3">\n<li>c</li>\n<li>d</li>\n</ol>\n'),
        ("<b>x</b>", "<p>&lt;b&gt;x&lt;/b&gt;</p>\n"),
        ("```\na < b\n```", '<pre data-lang=""><code>a &lt; b\n</code></pre>\n'),
    ],
)
def test_markdown(text: str, html: str) -> None:
    assert render(text) == html


def test_code_is_highlighted_by_classes() -> None:
    html = render('```python\ndef f(x):\n    return "<b>"\n```')
    assert 'data-lang="python"' in html
    assert '<span class="k">def</span>' in html and '<span class="nf">f</span>' in html
    assert "&lt;b&gt;" in html and "style" not in html
    assert '<span class="k">' not in render("```brainfuck\ndef\n```")  # not one of the named lexers


def test_tables_scroll_and_align_without_styles() -> None:
    html = render("| a | b |\n|:--|--:|\n| 1 | 2 |")
    assert '<div class="table"><table>' in html
    assert '<th class="left">a</th>' in html and '<td class="right">2</td>' in html
    assert "style" not in html


@pytest.mark.parametrize("text", ["$x^2$", r"\(x^2\)", "so $x^2$, and", "（$x^2$）"])
def test_inline_maths(text: str) -> None:
    assert '<math display="inline"><mrow><msup><mi>x</mi><mn>2</mn></msup></mrow></math>' in render(text)


@pytest.mark.parametrize(
    "text",
    ["$$x^2$$", "$$\nx^2\n$$", r"\[x^2\]", "\\[\nx^2\n\\]", "so\n$$\nx^2\n$$\nthen", "so $$x^2$$ then"],
)
def test_display_maths(text: str) -> None:
    assert '<span class="math"><math display="block">' in render(text)


@pytest.mark.parametrize(
    "text",
    [
        "from $5 to $10",
        "$5-$10",
        r"\$x\$",
        "`$x$`",
        "```\n$x$\n```",
        "$ x $",
        "a $x",
        "$$",
        "US$ and C$",
        "$$ $$",
    ],
)
def test_what_is_not_maths_stays_text(text: str) -> None:
    assert "<math" not in render(text)
    assert "$" in render(text)


def test_formulas_that_models_write() -> None:
    assert "<mtable" in formula(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "block")
    assert "<mtable" in formula(r"\begin{cases} 1 & x<0 \\ 2 & \text{else} \end{cases}", "block")
    assert "<munder><mo>lim</mo>" in formula(r"\lim_{x\to 0} x", "block")
    assert "&lt;b&gt;" in formula(r"\text{<b>}", "inline")
    for bad in (r"\frac{", r"\def\a{\a\a}\a", "{" * 60 + "}" * 60, "x" * 3000, r"\left("):
        assert formula(bad, "inline").startswith('<code class="math-source">'), bad


def test_addresses_become_links() -> None:
    html = render(
        "see https://example.org/a_b(c)?d=1&e=2. And (https://example.org/x) 和https://例子.cn/路，好"
    )
    links = [attributes["href"] for tag, attributes in Tags(html).found if tag == "a"]
    assert links == ["https://example.org/a_b(c)?d=1&e=2", "https://example.org/x", "https://例子.cn/路"]
    assert 'rel="noopener noreferrer nofollow"' in html and 'target="_blank"' in html
    assert render("[x https://a.b](https://c.d)").count("<a ") == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str) -> None:
    for html in (render(text), render(f"- {text}"), render(f"| a |\n|---|\n| {text} |"), render("> " + text)):
        assert_inert(html)


def test_pictures_are_links_never_fetched() -> None:
    html = render("![cat](http://evil.invalid/?q=secret)")
    assert "<img" not in html and ">cat</a>" in html
    assert "href" not in render("[x](/v1/models) [y](//evil.invalid) ![z](relative.png)")
    assert "javascript" not in str([a for _, a in Tags(render("[x](javascript:alert(1))")).found])


def test_a_text_cut_anywhere_renders() -> None:
    text = DEMO + "\n\n".join(HOSTILE)
    for end in range(0, len(text), 7):
        assert_inert(render(text[:end]))
    assert render("so\n\n```python\ndef f(").count("<pre") == 1  # an open fence is a code block
    assert '<pre class="math-source">$$x^2 +</pre>' in render("so\n\n$$\nx^2 +")
    assert "<p>**bo</p>" in render("**bo")


def cpu_ms(text: str) -> float:
    started = time.thread_time()
    render(text)
    return 1000 * (time.thread_time() - started)


def test_four_kilobytes_take_less_than_ten_milliseconds() -> None:
    text = (DEMO * 5)[:4000]
    render(text)
    assert min(cpu_ms(text) for _ in range(7)) < 10


@pytest.mark.parametrize(
    "piece",
    ["[", "![a](", "*a _b ", "$a ", "\\(", "\\[ a\n", "$$ a\n", "`a``b```", "[a](b", "https://", "<a ", "> "],
)
def test_no_text_takes_for_ever(piece: str) -> None:
    assert cpu_ms(piece * (markdown.MAX_TEXT // len(piece))) < 8000
