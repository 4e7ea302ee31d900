"""The chat page in headless Chromium, before a server whose model is a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("playwright")
pytest.importorskip("nh3")
from browser_window import FAINT, NAMELESS, Chat, until
from playwright.sync_api import sync_playwright
from serve_client import server
from serve_page_support import HOSTILE, Fake, serving

from kllm.chat.conversation import Conversation, Turn
from kllm.chat.saved import save

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here")
TOOLS = '[{"type":"function","function":{"name":"weather","parameters":{"type":"object"}}}]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


@pytest.fixture(scope="module")
def window(browser: Any) -> Iterator[Any]:
    """A new one takes longer than most tests."""
    context = browser.new_context(locale="en-US", viewport={"width": 1200, "height": 800})
    yield context.new_page()
    context.close()


@pytest.fixture
def chat(window: Any, fake: Fake) -> Iterator[Chat]:
    chat = Chat(window, fake)
    try:
        yield chat
    finally:
        chat.leave()


def test_an_answer_grows_and_stops(chat: Chat, fake: Fake) -> None:
    chat.ask("slow please", wait=False)
    chat.until("document.querySelector('.md').textContent.includes('word3')")
    first = len(chat.answer)
    chat.until(f"document.querySelector('.md').textContent.length > {first + 40}")
    assert fake.running == 1
    chat.page.click("#send[aria-label='Stop (Esc)']")
    until(lambda: fake.running == 0)
    assert fake.aborted == 1
    chat.wait()
    assert "word3" in chat.answer and "stopped" in chat.text(".figures")
    assert not chat.page.locator(".error").count()
    chat.ask("slow again", wait=False)
    until(lambda: fake.running == 1)
    chat.page.keyboard.press("Escape")
    until(lambda: fake.running == 0)
    assert not chat.foreign and not chat.troubles


def test_markdown_code_and_maths(chat: Chat) -> None:
    chat.ask("please think and show the demo")
    page = chat.page
    assert page.locator(".md strong").count() and page.locator(".md table td.right").count() == 2
    assert page.locator(".code .kn").first.inner_text() == "from"
    assert page.locator(".md math[display=block] mfrac").first.bounding_box()["height"] > 20
    assert page.locator(".md math").count() >= 3
    assert page.locator("details.think").get_attribute("open") is None
    assert page.locator(".think summary").inner_text().startswith("Thought for 0.")
    page.click(".think summary")
    assert "weigh what is known" in page.locator(".thoughts").inner_text()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("[aria-label='Copy code']")
    until(lambda: page.evaluate("navigator.clipboard.readText()").startswith("from dataclasses"))
    assert "tokens/s" in chat.text(".figures")
    assert not chat.troubles and not chat.foreign  # nothing offends the policy


def test_again_edit_branches_and_onward(chat: Chat, fake: Fake) -> None:
    chat.ask("hello")
    assert chat.answer == "Answer 1 to: hello"
    chat.button("Answer again").click()
    until(lambda: chat.answer == "Answer 2 to: hello")
    chat.wait()
    assert chat.text(".turn.assistant .branches span") == "2 / 2"
    chat.button("Previous version").click()
    until(lambda: chat.answer == "Answer 1 to: hello")
    chat.page.hover(".turn.user")
    chat.page.click(".turn.user [aria-label=Edit]")
    chat.page.fill("textarea.edit", "goodbye")
    chat.page.click(".editor .primary")
    until(lambda: chat.answer == "Answer 3 to: goodbye")
    chat.wait()
    assert fake.requests[-1]["messages"] == [{"role": "user", "content": "goodbye"}]
    chat.button("Continue").click()
    until(lambda: chat.answer == "Answer 3 to: goodbye and so it goes on.")
    sent = fake.requests[-1]
    assert sent["continue_final_message"] is True and sent["add_generation_prompt"] is False
    assert sent["messages"][-1] == {"role": "assistant", "content": "Answer 3 to: goodbye"}
    chat.wait()
    chat.page.hover(".turn.user")
    chat.page.click(".turn.user [aria-label='Previous version']")
    until(lambda: chat.answer == "Answer 1 to: hello")
    chat.ask("and then?")
    roles = [message["role"] for message in fake.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_a_reload_keeps_history(chat: Chat) -> None:
    page = chat.page
    chat.ask("first question")
    page.click("#new-chat")
    chat.ask("second question")
    page.reload()
    chat.wait()
    assert chat.answer == "Answer 2 to: second question"
    assert page.locator(".chat").all_inner_texts() == ["second question", "first question"]
    page.click(".chat:has-text('first')")
    until(lambda: chat.answer == "Answer 1 to: first question")
    page.hover(".chats li:has-text('first')")
    page.click(".chats li:has-text('first') [aria-label=Rename]")
    page.fill(".rename", "renamed")
    page.press(".rename", "Enter")
    page.wait_for_selector(".chat:has-text('renamed')")
    page.hover(".chats li:has-text('second')")
    page.click(".chats li:has-text('second') [aria-label=Delete]")
    until(lambda: page.locator(".chat").count() == 1)
    page.click(".toast button")
    until(lambda: page.locator(".chat").count() == 2)
    page.fill("#filter", "FIRST QUEST")  # finds what was said, too
    until(lambda: page.locator(".chat").all_inner_texts() == ["renamed"])


def test_a_reload_in_mid_answer_keeps_what_came(chat: Chat) -> None:
    chat.ask("slow one", wait=False)
    chat.until("document.querySelector('.md').textContent.includes('word20')")
    chat.page.reload()
    chat.until("document.querySelector('.md')?.textContent.includes('word5')")


def test_export_and_import(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    chat.ask("think of this")
    with page.expect_download() as download:
        page.click("#export")
    saved = tmp_path / "chats.json"
    download.value.save_as(saved)
    data = json.loads(saved.read_text())
    roles = [message["role"] for message in data["chats"][0]["messages"]]
    assert roles == ["user", "assistant"]
    page.set_input_files("#import-file", saved)
    until(lambda: page.locator(".chat").count() == 2)
    plain = tmp_path / "plain.jsonl"
    lines = [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": f"q{i}"}]}
        for i in range(2)
    ]
    plain.write_text("\n".join(map(json.dumps, lines)))
    page.set_input_files("#import-file", plain)
    until(lambda: page.locator(".chat").count() == 4)
    plain.write_text("not JSON")
    page.set_input_files("#import-file", plain)
    page.wait_for_selector(".toast:has-text('no conversation')")


def test_a_conversation_saved_in_the_terminal_goes_on_here(chat: Chat, fake: Fake, tmp_path: Path) -> None:
    called = {
        "id": "c0",
        "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression": "6*7"}'},
    }
    talk = Conversation(SimpleNamespace(name="m"), system="Be brief.")  # type: ignore[arg-type]
    talk.turns.append(
        Turn(
            [
                {"role": "user", "content": "6 times 7?"},
                {"role": "assistant", "content": "", "tool_calls": [called]},
                {"role": "tool", "tool_call_id": "c0", "name": "calculator", "content": "42"},
                {"role": "assistant", "content": "It is 42."},
            ]
        )
    )
    save(talk, tmp_path / "talk.json")
    chat.page.set_input_files("#import-file", tmp_path / "talk.json")
    until(lambda: chat.page.locator(".chat").count() == 1)
    chat.page.locator(".chat").click()
    until(lambda: chat.answer == "It is 42.")
    assert chat.text(".call h3") == "calculator" and "42" in chat.text(".call")
    chat.ask("and then?")
    sent = fake.requests[-1]["messages"]
    assert [m["role"] for m in sent] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert sent[2]["tool_calls"] == [called] and sent[3]["tool_call_id"] == "c0"


def test_settings_reach_the_request_and_stay(chat: Chat, fake: Fake) -> None:
    page = chat.page
    chat.settings(
        system="Be brief.", temperature="0.5", top_k="20", seed="7", max_tokens="64", stop="END\n###"
    )
    page.select_option("#model", "tiny-poet")
    chat.ask("hello")
    page.reload()
    chat.wait()
    chat.ask("again")
    for sent in fake.requests:
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        wanted = {"temperature": 0.5, "top_k": 20, "seed": 7, "max_tokens": 64, "stop": ["END", "###"]}
        assert {name: sent[name] for name in wanted} == wanted
        assert "top_p" not in sent and sent["model"] == "tiny-poet" and sent["stream"] is True
    page.click("#open-settings")
    page.click("label:has(input[name=set-thinking][value=off])")
    page.click("#fields h3 button")  # reset
    assert page.input_value("#set-temperature") == ""
    page.click("#close-settings")
    chat.ask("more")
    assert fake.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "temperature" not in fake.requests[-1]


def test_language_and_theme(browser: Any, fake: Fake) -> None:
    context = browser.new_context(locale="zh-CN", color_scheme="light")
    chat = Chat(context.new_page(), fake)
    page = chat.page
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.inner_text("#new-chat") == "新对话" and page.get_attribute("html", "lang") == "zh-CN"
    light = page.evaluate(background)
    page.click("#open-settings")
    page.click("label:has(input[name=set-theme][value=dark])")
    dark = page.evaluate(background)
    assert light != dark
    page.click("label:has(input[name=set-lang][value=en])")
    assert page.inner_text("#new-chat") == "New chat" and page.inner_text("#settings-title") == "Settings"
    page.reload()
    assert page.evaluate(background) == dark and page.inner_text("#new-chat") == "New chat"
    context.close()


def test_a_phone_never_scrolls_sideways(browser: Any, fake: Fake) -> None:
    context = browser.new_context(
        locale="en-US", viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True
    )
    chat = Chat(context.new_page(), fake)
    page = chat.page

    def fits() -> bool:
        width = (
            "Math.max(document.documentElement.scrollWidth, document.getElementById('scroll').scrollWidth)"
        )
        return page.evaluate(width) <= 360

    assert fits()
    page.fill("#input", "demo and think " + "x" * 300)
    page.press("#input", "Enter")  # there Enter makes a new line
    assert page.input_value("#input").endswith("\n")
    page.click("#send")
    chat.wait()
    assert page.locator(".code").count() and fits()
    page.click("#open-side")
    page.wait_for_selector(".chat")
    assert fits()
    page.click("#close-side")
    page.click("#open-settings")
    assert fits() and page.locator("#settings").bounding_box()["width"] < 361
    context.close()


def test_hostile_output_does_nothing(chat: Chat, fake: Fake) -> None:
    page = chat.page
    chat.ask("hostile " + HOSTILE[0])
    assert "onerror" in chat.answer  # shown as the text it is
    page.wait_for_timeout(300)
    for text in HOSTILE:
        chat.ask(text)
    page.reload()
    chat.wait()
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None
    assert not chat.foreign
    bad = "#thread :is(img, script, iframe, object, embed, form, input, style, link, base, meta, [style], [onerror])"
    assert page.locator(bad).count() == 0
    links = page.evaluate("[...document.querySelectorAll('#thread a')].map(a => a.href)")
    assert all(link.startswith(("http", "mailto:")) or not link for link in links)
    assert page.url.startswith(fake.url)


def test_tool_calls_are_cards_and_take_a_result(chat: Chat, fake: Fake) -> None:
    chat.settings(tools=TOOLS)
    chat.ask("what is the weather?")
    assert chat.text(".call h3") == "weather" and '"days": 3' in chat.text(".call pre")
    chat.page.fill(".call textarea", "sunny")
    chat.button("Send result").click()
    until(lambda: chat.answer == "The tool says: sunny")
    sent = fake.requests[-1]["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool"]
    assert sent[1]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": '{"city": "Paris", "days": 3}',
    }
    assert sent[2] == {"role": "tool", "tool_call_id": sent[1]["tool_calls"][0]["id"], "content": "sunny"}
    assert chat.page.locator(".call").first.locator("h4").inner_text() == "Result"


def test_errors_in_words_and_a_retry(chat: Chat, fake: Fake) -> None:
    page = chat.page
    chat.ask("busy now")
    assert "queue is full" in chat.text(".error") and "3 s" in chat.text(".error")
    chat.button("Try again").click()
    until(lambda: chat.answer == "Answer 2 to: busy now")
    assert page.locator(".error").count() == 0
    chat.wait()
    chat.ask("broken stream")
    assert chat.answer.strip() == "This far and" and "the engine stopped" in chat.text(".error")
    chat.ask("toolong")
    assert "no longer fits" in chat.text(".error")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.ask("are you there?")
    assert "cannot be reached" in chat.text(".error")
    page.unroute("**/v1/chat/completions")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body='data: {"choices":[]}\n\n'),
    )
    chat.ask("half a stream")
    assert "broke before" in chat.text(".error")


def test_the_key_is_asked_for_and_kept_in_the_tab(window: Any) -> None:
    with serving(Fake(key="secret")) as fake:
        chat = Chat(window, fake)
        page = chat.page
        page.click(".toast button")
        page.fill("#set-apiKey", "secret")
        page.press("#set-apiKey", "Tab")
        page.wait_for_selector("#model option[value=tiny-chat]", state="attached")
        page.click("#close-settings")
        chat.ask("hello")
        assert chat.answer == "Answer 1 to: hello"
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        page.wait_for_selector("#model option[value=tiny-chat]", state="attached")
        chat.leave()


def test_keys_and_input_methods(chat: Chat, fake: Fake) -> None:
    page = chat.page
    page.fill("#input", "ni hao")
    page.evaluate("""document.getElementById('input').dispatchEvent(
        new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))""")
    page.evaluate("""document.getElementById('input').dispatchEvent(
        new KeyboardEvent('keydown', { key: 'Enter', keyCode: 229, bubbles: true, cancelable: true }))""")
    page.press("#input", "Shift+Enter")
    assert page.input_value("#input") == "ni hao\n" and not fake.requests
    page.keyboard.type("second line")
    page.press("#input", "Enter")
    chat.wait()
    assert fake.requests[0]["messages"][0]["content"] == "ni hao\nsecond line"
    assert page.input_value("#input") == ""


def test_scrolling_follows_only_at_the_end(chat: Chat) -> None:
    page = chat.page
    for _ in range(2):
        chat.ask("show the demo")
    distance = "(s => s.scrollHeight - s.scrollTop - s.clientHeight)(document.getElementById('scroll'))"
    assert page.evaluate(distance) < 5
    chat.ask("slow now", wait=False)
    chat.until("[...document.querySelectorAll('.md')].at(-1).textContent.includes('word5')")
    assert page.evaluate(distance) < 60
    page.evaluate("document.getElementById('scroll').scrollTop = 0")
    page.wait_for_selector("#to-end", state="visible")
    chat.until("[...document.querySelectorAll('.md')].at(-1).textContent.includes('word40')")
    assert page.evaluate("document.getElementById('scroll').scrollTop") == 0
    page.click("#to-end")
    until(lambda: page.evaluate(distance) < 60)
    page.keyboard.press("Escape")


def test_probabilities_and_the_prompt(chat: Chat, fake: Fake) -> None:
    page = chat.page
    page.click("#open-settings")
    page.check("#set-logprobs")
    page.click("#close-settings")
    chat.ask("hello")
    assert fake.requests[-1]["top_logprobs"] == 5
    chat.button("Token probabilities").click()
    page.hover(".chance >> nth=1")
    assert "74 %" in page.inner_text("#tip") and "15 %" in page.inner_text("#tip")
    page.fill("#input", "next")
    page.click("#open-prompt")
    page.wait_for_selector(".piece")
    assert page.locator(".piece").all_inner_texts()[-3:-1] == ["next", "<|end|>"]
    assert "of 512 tokens" in page.inner_text("#prompt-count")


def test_with_a_real_model(browser: Any) -> None:
    real = server()
    context = browser.new_context(locale="zh-CN")
    chat = Chat(context.new_page(), Fake(url=f"{real.url}/"))
    page = chat.page
    chat.settings(max_tokens="12", temperature="0")
    chat.ask("你好，世界！")
    assert "12 个词元" in chat.text(".figures") and chat.answer.strip()
    page.click("#open-prompt")
    page.wait_for_selector(".piece")
    prompt = "".join(page.locator(".piece").all_text_contents())
    assert "你好，世界！" in prompt and prompt.endswith("<think>\n\n</think>\n\n")
    page.click("#close-prompt")
    chat.settings(max_tokens="1500")
    chat.ask("again", wait=False)
    until(lambda: real.metric("num_requests_running") == 1)
    page.keyboard.press("Escape")
    until(lambda: real.metric("num_requests_running") == 0)
    chat.wait()
    assert not page.locator(".error").count() and not chat.troubles and not chat.foreign
    context.close()


def test_everything_has_a_name_and_can_be_read(chat: Chat) -> None:
    """In both colour schemes."""
    page = chat.page

    def check() -> None:
        assert page.evaluate(NAMELESS) == []
        grounds = set()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate(FAINT) == []
            grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2

    check()
    chat.settings(tools=TOOLS)
    chat.ask("think and show the demo")
    page.click(".think summary")
    chat.ask("how is the weather?")
    chat.page.click("#new-chat")
    chat.ask("broken")
    chat.page.click(".chat:has-text('demo')")
    chat.wait()
    check()
    page.click("#open-settings")
    check()
    page.keyboard.press("Escape")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("Tab")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(outline) != "none"
