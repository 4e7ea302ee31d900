"""The chat page before a server that runs tools itself: boxes in the answer, kept, sent back and exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright")
pytest.importorskip("nh3")
from browser_window import FAINT, NAMELESS, Chat, until
from playwright.sync_api import sync_playwright
from serve_page_support import Fake, serving

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here")
BODY = "[...document.querySelector('.pieces').children].map(e => e.matches('details') ? e.querySelector('b').innerText : e.innerText.trim())"
ORDER = ["Let me calculate.", "calculator", "That was one.", "python", "It is 144."]


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        try:
            yield browser.new_context(locale="en-US", viewport={"width": 1000, "height": 800}).new_page()
        finally:
            browser.close()


@pytest.fixture
def chat(window: Any) -> Iterator[Chat]:
    with serving(Fake()) as fake:
        chat = Chat(window, fake)
        try:
            yield chat
        finally:
            chat.leave()


def test_calls_are_folded_boxes_in_the_answer(chat: Chat) -> None:
    page = chat.page
    chat.ask("please calculate")
    assert page.evaluate(BODY) == ORDER
    first, second = page.locator(".ran").all()
    assert first.get_attribute("open") is None and not first.locator("pre").first.is_visible()
    assert first.locator(".brief").inner_text() == "12*12" and first.locator(".state").inner_text() == "0.0 s"
    assert second.locator(".state").inner_text() == "failed"
    second.locator("summary").click()
    shown = second.inner_text()
    assert '"code": "print(1/0)"' in shown and "Result" in shown and "<img src=x" in shown
    colour = "e => getComputedStyle(e).color"
    assert second.locator(".outcome").evaluate(colour) != first.locator("b").evaluate(colour)
    assert page.evaluate("window.pwned") is None and page.locator("#thread img").count() == 0
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(FAINT) == [] and page.evaluate(NAMELESS) == []

    page.reload()
    chat.wait()
    assert page.evaluate(BODY) == ORDER
    chat.ask("and now?")
    sent = chat.fake.requests[-1]["messages"]
    assert [m["role"] for m in sent] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
    assert [m["content"] for m in sent if m["role"] == "assistant"] == [
        "Let me calculate.", "That was one.", "It is **144**.",
    ]  # fmt: skip
    call = {"name": "calculator", "arguments": '{"expression": "12*12"}'}
    assert sent[1]["tool_calls"] == [{"id": "c1", "type": "function", "function": call}]
    assert sent[2] == {"role": "tool", "tool_call_id": "c1", "content": "144"}
    assert not chat.troubles and not chat.foreign


def test_they_are_exported_and_imported(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    chat.ask("please calculate")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    (exported,) = json.loads(file.read_text())["chats"]
    roles = ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [message["role"] for message in exported["messages"]] == roles
    page.click("#new-chat")
    page.set_input_files("#import-file", file)
    chat.wait()
    assert page.evaluate(BODY) == ORDER
    page.locator(".ran summary").first.click()
    assert "144" in page.locator(".ran").first.inner_text()
    page.click("#open-settings")
    page.click("#fields label:has-text('中文')")
    page.click("#close-settings")
    assert page.locator(".ran .state").nth(1).inner_text() == "出错"


def test_a_call_that_is_stopped(chat: Chat) -> None:
    page = chat.page
    chat.ask("calculate and stop", wait=False)
    until(lambda: page.locator(".ran.now .state").count() and chat.text(".ran .state") == "running")
    page.keyboard.press("Escape")
    chat.wait()
    assert chat.text(".ran .state") == "stopped"
    chat.ask("hello")
    assert [message["role"] for message in chat.fake.requests[-1]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
