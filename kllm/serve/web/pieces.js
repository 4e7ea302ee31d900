// The body of an answer: its text as markdown, and between the texts the calls that the server ran, folded.

import { el, icon } from "./dom.js";
import { t } from "./i18n.js";
import { Markup } from "./markup.js";
import { piecesOf } from "./toolevents.js";

const BRIEF = 80; // characters of the arguments beside the name

export class Pieces {
  constructor(element) {
    this.element = element;
    this.views = [];
  }

  /** Shows what the node has; `growing` while more is to come. Views of pieces that stay are kept. */
  update(node, growing) {
    const pieces = piecesOf(node);
    const other = (view, index) => !pieces[index] || Boolean(pieces[index].call) !== view instanceof CallView;
    const stale = this.views.findIndex(other);
    if (stale >= 0) this.views.splice(stale).forEach((view) => view.element.remove());
    pieces.forEach((piece, index) => {
      const last = index === pieces.length - 1;
      const view = (this.views[index] ||= this.add(piece));
      if (piece.call) view.update(piece, growing);
      else view.update(last ? piece.text : piece.text.trimEnd(), growing && last);
    });
    const [before, end] = [pieces.at(-2), pieces.at(-1)];
    /** The model is at work, and nothing on the page says so. */
    this.silent = growing && !end.text.trim() && (!before || Boolean(before.result));
  }

  add(piece) {
    const view = piece.call ? new CallView(piece.call) : new Markup(el("div", { class: "md" }));
    this.element.append(view.element);
    return view;
  }
}

/** One call: a line with its name, and folded away its arguments and what came of it. */
class CallView {
  constructor(call) {
    this.state = el("span", { class: "state" });
    const brief = el("span", { class: "brief" }, briefly(call.arguments));
    this.element = el("details", { class: "call ran" },
      el("summary", { "aria-label": t("call", { name: call.name }) }, icon("tool"), el("b", {}, call.name), brief, this.state),
      el("pre", { tabindex: "0" }, onlyValue(call.arguments) ?? pretty(call.arguments)));
  }

  update({ result }, growing) {
    this.element.classList.toggle("now", growing && !result);
    if (!result) this.state.textContent = t(growing ? "toolRuns" : "stopped");
    if (!result || this.done) return;
    this.done = true;
    this.element.classList.toggle("failed", result.is_error);
    this.state.textContent = result.is_error ? t("toolFailed") : t("toolTook", { s: result.seconds.toFixed(result.seconds < 9.95 ? 1 : 0) });
    this.element.append(el("h4", {}, t("result")), el("pre", { tabindex: "0", class: "outcome" }, pretty(result.content)));
  }
}

/** Of arguments that are a single text, such as code: that text. */
function onlyValue(text) {
  try {
    const values = Object.values(JSON.parse(text));
    return values.length === 1 && typeof values[0] === "string" ? values[0] : null;
  } catch {
    return null; // not JSON, or null
  }
}

/** The arguments in one line. */
function briefly(text) {
  const line = (onlyValue(text) ?? (text === "{}" ? "" : text)).replace(/\s+/g, " ").trim();
  return line.length > BRIEF ? `${line.slice(0, BRIEF - 1)}…` : line;
}

/** JSON with its lines, other texts as they are. */
export function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still being written, or not JSON
  }
}
