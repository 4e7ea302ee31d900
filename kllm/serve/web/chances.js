// The tokens of an answer shaded by their probability; pointing at one shows what else was likely.

import { $, el } from "./dom.js";

const level = (chance) => (chance >= 0.9 ? 0 : chance >= 0.6 ? 1 : chance >= 0.3 ? 2 : chance >= 0.1 ? 3 : 4);
const percent = (chance) => `${(100 * chance).toFixed(chance >= 0.0995 ? 0 : 1)} %`;
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll(" ", "␣"));

/** What is kept of a chunk's logprobs: [text, probability, [[text, probability], …]] a token. */
export function readTokens(entries) {
  const pair = ({ token, logprob }) => [token, Math.exp(logprob)];
  return entries.map((entry) => [...pair(entry), (entry.top_logprobs || []).map(pair)]);
}

export function chancesView(tokens) {
  const view = el("div", { class: "chances" });
  view.append(...tokens.map(([text, chance], index) => (
    el("span", { class: `chance c${level(chance)}`, "data-index": index, tabindex: "-1" }, text))));
  const show = ({ target }) => target.dataset.index && showTip(target, tokens[target.dataset.index]);
  view.addEventListener("pointerover", show);
  view.addEventListener("click", show);
  view.addEventListener("pointerout", () => ($("tip").hidden = true));
  return view;
}

function showTip(target, [text, chance, others]) {
  const tip = $("tip");
  const list = others.some(([other]) => other === text) ? others : [[text, chance], ...others];
  tip.replaceChildren(...list.map(([other, probability]) => {
    const bar = el("i", { class: "meter" });
    bar.style.width = `${Math.max(2, 100 * probability)}%`; // through CSSOM, which the policy allows
    return el("div", { class: other === text ? "row taken" : "row" },
      el("code", {}, visible(other)), el("span", { class: "bar-track" }, bar), el("span", {}, percent(probability)));
  }));
  tip.hidden = false;
  const at = target.getBoundingClientRect();
  const below = at.bottom + tip.offsetHeight + 8 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : at.top - tip.offsetHeight - 6}px`;
}
