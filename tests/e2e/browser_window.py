"""A browser window on the chat page, with what a person does there, and scripts that look at the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from serve_page_support import Fake

NAMELESS = """[...document.querySelectorAll('button, input, select, textarea, [role=radiogroup], nav, aside, dialog')]
  .filter(e => !(e.getAttribute('aria-label') || e.labels?.length || e.innerText?.trim()
    || document.getElementById(e.getAttribute('aria-labelledby'))?.innerText))
  .map(e => e.outerHTML.slice(0, 120))"""
FAINT = """(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (color.startsWith('rgb(')) return channels(color);
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const shown = element.checkVisibility() && element.getBoundingClientRect().width > 1;
    if (!own || !shown || element.matches(':disabled, option')) continue;
    const [a, b] = [light(channels(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) faint.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)} ${element.textContent.slice(0, 30)}`);
  }
  return faint;
})()"""


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


class Chat:
    """A browser window on the page, with what a person does there."""

    def __init__(self, page: Any, fake: Fake) -> None:
        self.fake, self.page = fake, page
        self.foreign: list[str] = []
        self.troubles: list[str] = []
        self.listeners = {
            "request": lambda r: r.url.startswith(fake.url) or self.foreign.append(r.url),
            "console": lambda m: m.type == "error" and self.troubles.append(m.text),
            "pageerror": lambda e: self.troubles.append(str(e)),
        }
        for event, listener in self.listeners.items():
            self.page.on(event, listener)
        self.page.set_default_timeout(15_000)
        self.page.goto(fake.url)
        self.page.wait_for_selector("#model option", state="attached")

    def leave(self) -> None:
        """Nothing stays in the window or its storage."""
        for event, listener in self.listeners.items():
            self.page.remove_listener(event, listener)
        self.page.unroute_all()
        self.page.context.clear_permissions()
        self.page.emulate_media(color_scheme="null")
        self.page.mouse.move(0, 0)
        self.page.goto("about:blank")
        session = self.page.context.new_cdp_session(self.page)
        session.send("Storage.clearDataForOrigin", {"origin": self.fake.url[:-1], "storageTypes": "all"})
        session.detach()

    def ask(self, text: str, wait: bool = True) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the answer is there and drawn."""
        self.page.wait_for_selector(".turn.assistant.last[aria-busy=false] .actions")
        self.until(
            "[...document.querySelectorAll('.tail')].every(e => !e.textContent || e.closest('[hidden]'))"
        )

    def until(self, expression: str) -> None:
        """Until it is true on the page (the policy forbids Playwright's own waiting, which uses eval)."""
        until(lambda: self.page.evaluate(expression), 15)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).last.inner_text()

    @property
    def answer(self) -> str:
        return self.text(".turn.assistant .md")

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True).last

    def settings(self, **values: str) -> None:
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill(f"#set-{name}", value)
        self.page.click("#close-settings")
