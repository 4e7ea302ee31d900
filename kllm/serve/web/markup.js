// Shows a text as markdown while it grows: the server renders it about ten times a second, what came since
// stands behind it as plain text, and only blocks that changed are replaced (a selection survives).

import { MAX_MARKDOWN, renderMarkdown } from "./api.js";
import { copyButton, el } from "./dom.js";
import { t } from "./i18n.js";

const PACE = 100; // ms between two renders of a growing text
const INTO = new Set("P UL OL LI BLOCKQUOTE FIGURE PRE H1 H2 H3 H4 H5 H6".split(" "));

export class Markup {
  constructor(element) {
    this.element = element;
    this.tail = el("span", { class: "tail" });
    this.text = "";
    this.shown = "";
    this.sources = [];
    this.blocks = [];
    this.started = 0;
    this.timer = 0;
    element.append(this.tail);
  }

  /** Shows `text`; `growing` while more is to come. */
  update(text, growing) {
    this.growing = growing;
    if (text !== this.text) {
      this.text = text;
      if (!text.startsWith(this.shown)) this.shown = "";
      this.showTail();
    }
    this.element.classList.toggle("growing", growing);
    if (text.length <= MAX_MARKDOWN) this.schedule();
  }

  schedule() {
    if (this.timer || this.text === this.shown) return;
    this.timer = setTimeout(() => this.render(), Math.max(0, this.started + PACE - performance.now()));
  }

  async render() {
    const text = this.text;
    this.started = performance.now();
    try {
      const html = await renderMarkdown(text, !this.growing);
      if (this.text.startsWith(text)) {
        this.patch(html);
        this.shown = text;
        this.showTail();
      }
      this.timer = 0;
      this.schedule();
    } catch {
      this.timer = 0; // no key, or no server: the text stays plain until the next change
    }
  }

  patch(html) {
    const template = document.createElement("template");
    template.innerHTML = html; // from /web/render only, which sanitises
    const sources = [...template.content.children].map((block) => block.outerHTML);
    let same = 0;
    while (same < sources.length && sources[same] === this.sources[same]) same += 1;
    this.tail.remove();
    this.blocks.slice(same).forEach((block) => block.remove());
    template.content.querySelectorAll("pre[data-lang]").forEach(frame);
    const fresh = [...template.content.children].slice(same);
    this.element.append(...fresh);
    this.blocks = [...this.blocks.slice(0, same), ...fresh];
    this.sources = sources;
  }

  showTail() {
    this.tail.textContent = this.text.slice(this.shown.length);
    this.tail.remove();
    const inCode = (this.shown.match(/^\s*(```|~~~)/gm) || []).length % 2;
    const ended = !this.shown || (this.shown.endsWith("\n") && !inCode);
    (ended ? this.element : deepest(this.element)).append(this.tail);
  }
}

/** The innermost last block: where a text goes on. */
function deepest(element) {
  const last = element.lastElementChild;
  return last && INTO.has(last.tagName) ? deepest(last) : element;
}

/** A code block's frame: its language and a copy button above it. */
function frame(pre) {
  const figure = el("figure", { class: "code" });
  pre.replaceWith(figure);
  const bar = el("div", { class: "code-bar" }, el("span", {}, pre.dataset.lang || t("code")));
  bar.append(copyButton(t("copyCode"), () => pre.textContent));
  pre.tabIndex = 0; // scrolls sideways: reachable by keyboard
  figure.append(bar, pre);
}
