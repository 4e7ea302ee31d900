// One turn on the page: a question as a bubble; an answer with its thoughts, text, tool calls, errors,
// figures and buttons.

import { chancesView } from "./chances.js";
import { copyButton, el, icon, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { Pieces, pretty } from "./pieces.js";
import { piecesOf } from "./toolevents.js";

const seconds = (ms) => (ms / 1000).toFixed(ms < 9950 ? 1 : 0);
const WORDS = { model: "noSuchModel", cut: "cutOff", tools: "badTools" }; // kinds named otherwise in i18n.js

export class Turn {
  /** `acts`: what the buttons do, each with the node: redo, onward, edit, pick, retry, answerTools, openSettings. */
  constructor(node, acts) {
    this.node = node;
    this.acts = acts;
    this.element = el("article", { class: `turn ${node.role}`, "aria-label": t(node.role === "user" ? "you" : "answer") });
    this.buttons = el("div", { class: "actions" });
    if (node.role === "user") {
      this.body = el("div", { class: "bubble" }, node.content);
      this.element.append(this.body, this.buttons);
      return;
    }
    this.thoughts = el("div", { class: "thoughts" });
    this.thinkLabel = el("span");
    this.think = el("details", { class: "think" }, el("summary", {}, this.thinkLabel), this.thoughts);
    this.body = el("div", { class: "pieces" });
    this.pieces = new Pieces(this.body);
    this.extra = el("div", { class: "extra" });
    this.element.append(this.think, this.body, this.extra, this.buttons);
  }

  /** Brings the turn up to date. `place`: { writing, last, siblings, results }. */
  update(place) {
    const { node } = this;
    this.place = place;
    if (node.role === "user") {
      this.body.textContent = node.content;
    } else {
      this.element.setAttribute("aria-busy", String(place.writing));
      if (place.writing && this.chances) this.toggleChances();
      this.updateThoughts();
      this.pieces.update(node, place.writing);
      const thinks = this.think.classList.contains("now") && !this.think.hidden;
      this.element.classList.toggle("waiting", this.pieces.silent && !thinks && !node.toolCalls?.length);
      const shown = [node.toolCalls, place.writing, place.last, [...place.results], node.error];
      this.drawOnce("extra", shown, () => this.drawExtra());
    }
    const siblings = place.siblings.map((item) => item.id);
    const shown = [place.writing, place.last, siblings, node.error, node.stats, node.stopped, !node.content];
    this.drawOnce("buttons", shown, () => this.drawButtons());
  }

  /** Calls `draw` when what it shows has changed, so that a focused button or half-typed result stays. */
  drawOnce(name, shown, draw) {
    const key = JSON.stringify(shown);
    if (this[`${name}Key`] === key) return;
    this[`${name}Key`] = key;
    draw();
  }

  updateThoughts() {
    const { node, place } = this;
    this.think.hidden = !node.reasoning;
    if (!node.reasoning) return;
    this.thoughts.textContent = node.reasoning;
    const now = place.writing && !node.content && !node.toolCalls?.length && !node.toolEvents?.length;
    this.think.classList.toggle("now", now);
    const done = node.thinkMs ? t("thought", { s: seconds(node.thinkMs) }) : t("thoughtSome");
    this.thinkLabel.textContent = now ? t("thinking") : done;
  }

  // ---- tool calls and errors

  drawExtra() {
    const { node, place } = this;
    const calls = node.toolCalls || [];
    this.extra.replaceChildren(...calls.map((call, index) => this.callCard(call, index)));
    const asks = calls.length && place.last && !place.writing && !place.results.size;
    if (asks) {
      const given = () => [...this.extra.querySelectorAll("textarea")].map((area) => area.value);
      const send = () => this.acts.answerTools(node, given());
      this.extra.append(el("button", { class: "plain", onclick: send }, t("sendResult")));
    }
    if (node.error) this.extra.append(this.errorCard(node.error));
  }

  callCard(call, index) {
    const result = this.place.results.get(call.id);
    const card = el("section", { class: "call", "aria-label": t("call", { name: call.name }) },
      el("h3", {}, icon("tool"), call.name), el("pre", { tabindex: "0" }, pretty(call.arguments)));
    if (result !== undefined) card.append(el("h4", {}, t("result")), el("pre", { tabindex: "0" }, pretty(result)));
    else if (this.place.last && !this.place.writing) {
      const label = `${t("giveResult")} ${index + 1}`;
      card.append(el("textarea", { rows: "2", "aria-label": label, placeholder: t("giveResult") }));
    }
    return card;
  }

  errorCard(error) {
    const details = error.message && el("p", { class: "details" }, error.message);
    const askKey = () => this.acts.openSettings("apiKey");
    const wait = error.wait ? ` ${t("retryIn", { s: error.wait })}` : "";
    return el("div", { class: "error", role: "alert" },
      el("p", {}, t(WORDS[error.kind] || error.kind) + wait), details,
      el("div", {},
        el("button", { class: "plain", onclick: () => this.acts.retry(this.node) }, t("retry")),
        error.kind === "key" && el("button", { class: "plain", onclick: askKey }, t("openSettings"))));
  }

  // ---- buttons and figures

  drawButtons() {
    const { node, acts, place } = this;
    this.element.classList.toggle("last", place.last);
    this.buttons.replaceChildren();
    if (place.writing) {
      this.buttons.append(this.figures());
      return;
    }
    if (place.siblings.length > 1) this.buttons.append(this.branches());
    if (node.content) this.buttons.append(copyButton(t("copy"), () => node.content));
    if (node.role === "user" || node.content) this.buttons.append(iconButton("edit", t("edit"), () => this.edit()));
    if (node.role !== "assistant") return;
    this.buttons.append(iconButton("redo", t("redo"), () => acts.redo(node)));
    if (place.last && piecesOf(node).at(-1).text.trim() && !node.toolCalls?.length) {
      this.buttons.append(iconButton("more", t("continue"), () => acts.onward(node)));
    }
    if (node.tokens?.length) {
      this.buttons.append(iconButton("chance", t("chances"), () => this.toggleChances(), { "aria-pressed": "false" }));
    }
    this.buttons.append(this.figures());
  }

  branches() {
    const { siblings } = this.place;
    const at = siblings.findIndex((item) => item.id === this.node.id);
    const step = (by) => () => siblings[at + by] && this.acts.pick(siblings[at + by]);
    return el("span", { class: "branches" },
      iconButton("left", t("older1"), step(-1), { disabled: at === 0 }), el("span", {}, `${at + 1} / ${siblings.length}`),
      iconButton("right", t("newer1"), step(1), { disabled: at === siblings.length - 1 }));
  }

  figures() {
    const { model, stats, stopped } = this.node;
    const words = [];
    if (stats?.rate) words.push(t("rate", { n: stats.rate.toFixed(stats.rate < 10 ? 1 : 0) }));
    if (stats?.tokens) words.push(t("tokens", { n: stats.tokens }));
    if (!this.place.writing && stopped) words.push(t("stopped"));
    if (stats?.finish === "length") words.push(t("cut"));
    const more = [model];
    if (stats?.first) more.push(t("first", { s: stats.first.toFixed(2) }));
    if (stats?.prompt) more.push(t(stats.cached ? "cachedOf" : "prompted", { n: stats.prompt, c: stats.cached }));
    return el("span", { class: "figures", title: more.filter(Boolean).join(" · ") }, words.join(" · "));
  }

  toggleChances() {
    const on = !this.chances;
    this.buttons.querySelector("[aria-pressed]")?.setAttribute("aria-pressed", String(on));
    if (on) this.body.after((this.chances = chancesView(this.node.tokens)));
    else this.chances = this.chances.remove();
    this.body.hidden = on;
  }

  // ---- editing in place

  edit() {
    if (this.chances) this.toggleChances();
    const area = el("textarea", { class: "edit", "aria-label": t("edit"), value: this.node.content });
    const close = () => {
      editor.remove();
      this.body.hidden = this.buttons.hidden = false;
    };
    const send = () => {
      const text = area.value.trim();
      close();
      if (text) this.acts.edit(this.node, text);
    };
    const label = this.node.role === "user" ? t("sendEdit") : t("save");
    const editor = el("div", { class: "editor" }, area, el("div", { class: "editor-foot" },
      el("button", { class: "plain", onclick: close }, t("cancel")),
      el("button", { class: "primary", onclick: send }, label)));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") (event.stopPropagation(), close());
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    });
    area.addEventListener("input", () => fit(area));
    this.body.after(editor);
    this.body.hidden = this.buttons.hidden = true;
    fit(area);
    area.focus();
  }
}

/** A text field as tall as its text. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}
