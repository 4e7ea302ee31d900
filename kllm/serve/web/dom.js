// Small helpers for building the page. Text always goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** An element: `el("button", { class: "icon", onclick }, "text", child)`. */
export function el(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child || child === 0));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that is an icon only; its label is for screen readers and the tooltip. */
export function iconButton(name, label, onclick, extra = {}) {
  return el("button", { class: "icon", type: "button", "aria-label": label, title: label, onclick, ...extra }, icon(name));
}

export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "unseen", value: text }); // plain http has no clipboard API
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A copy button that turns into a tick for a moment. */
export function copyButton(label, read) {
  const button = iconButton("copy", label, async () => {
    await copyText(read());
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1400);
  });
  return button;
}

/** A short notice at the bottom, with an action where one helps. */
export function toast(text, action = "", act = null) {
  const note = el("div", { class: "toast" }, el("span", {}, text));
  if (act) note.append(el("button", { onclick: () => (act(), note.remove()) }, action));
  $("toasts").append(note);
  setTimeout(() => note.remove(), act ? 8000 : 4000);
}

/** Said to screen readers only. */
export function speak(text) {
  $("spoken").textContent = text;
}
