// The turns of the open conversation, and scrolling that follows an answer only while one is at the end.

import { $, el } from "./dom.js";
import { isWriting } from "./generate.js";
import { t } from "./i18n.js";
import { pathOf, siblingsOf } from "./state.js";
import { Turn } from "./turn.js";

const NEAR = 60; // px from the end that count as being at the end
const PACE = 30; // ms between two updates of a growing answer

export class Thread {
  constructor(acts) {
    this.acts = acts;
    this.column = $("thread");
    this.scroller = $("scroll");
    this.turns = new Map();
    this.following = true;
    this.top = 0;
    this.scroller.addEventListener("scroll", () => this.noteScroll());
    new ResizeObserver(() => this.following && this.toEnd()).observe(this.column);
    $("to-end").addEventListener("click", () => this.toEnd());
  }

  /** Shows a conversation as it is now; turns that stay keep their elements. */
  show(chat) {
    if (chat !== this.chat) {
      this.turns.clear();
      this.following = true;
    }
    this.chat = chat;
    const path = pathOf(chat).filter((node) => node.role !== "tool");
    for (const node of path) {
      if (!this.turns.has(node.id)) this.turns.set(node.id, new Turn(node, this.acts));
    }
    const elements = path.map((node) => this.turns.get(node.id).element);
    const shown = elements.length ? elements : [this.welcome()];
    const there = [...this.column.children];
    if (shown.length !== there.length || shown.some((item, index) => item !== there[index])) {
      this.column.replaceChildren(...shown);
    }
    this.column.classList.toggle("empty", !elements.length);
    this.updateAll();
  }

  updateAll() {
    const path = pathOf(this.chat);
    const last = path.findLast((node) => node.role !== "tool");
    const results = new Map(path.filter((node) => node.role === "tool").map((node) => [node.callId, node.content]));
    for (const node of path) {
      this.turns.get(node.id)?.update({
        writing: isWriting(this.chat, node),
        last: node === last,
        siblings: siblingsOf(this.chat, node),
        results: new Map((node.toolCalls || []).map(({ id }) => [id, results.get(id)]).filter(([id]) => results.has(id))),
      });
    }
  }

  /** A turn has grown. */
  touch() {
    this.timer ||= setTimeout(() => {
      this.timer = 0;
      this.updateAll();
    }, PACE);
  }

  redraw() {
    this.turns.clear();
    this.show(this.chat);
  }

  welcome() {
    const idea = (key) => el("button", { class: "idea", onclick: () => this.acts.send(t(key)) }, t(key));
    return el("div", { class: "welcome" }, el("h1", {}, t("hello")),
      el("div", { class: "ideas", role: "group", "aria-label": t("ideas") }, ["idea1", "idea2", "idea3", "idea4"].map(idea)));
  }

  noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    const near = scrollHeight - scrollTop - clientHeight < NEAR;
    // The event comes a frame late, when the text may have grown: only going up means leaving the end.
    if (near || scrollTop < this.top) this.following = near;
    this.top = scrollTop;
    $("to-end").hidden = this.following;
    $("tip").hidden = true;
  }

  toEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}
