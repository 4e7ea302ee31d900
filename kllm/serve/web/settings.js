// The settings sheet. Everything is saved as it is typed; an empty number leaves the choice to the model.

import { $, el } from "./dom.js";
import { t } from "./i18n.js";
import { apiKey, NUMBERS, resetSettings, saveSettings, settings } from "./state.js";

/** Opens the sheet; `hooks`: { chat(), changed(name), keyChanged(), clearAll() }. */
export function openSettings(hooks, focus = "") {
  drawSettings(hooks);
  if (!$("settings").open) $("settings").showModal();
  const field = focus && $(`set-${focus}`);
  if (field) {
    field.scrollIntoView({ block: "center" });
    field.focus();
  }
}

function drawSettings(hooks) {
  const save = (name) => ({ target }) => {
    if (target.type === "number" && !target.validity.valid) return;
    saveSettings({ [name]: target.type === "checkbox" ? target.checked : target.value });
    if (name === "system") hooks.chat().system = target.value;
    hooks.changed(name);
  };
  const choice = (name, label, options) => {
    const group = el("div", { class: "segments", role: "radiogroup", "aria-label": label });
    for (const [value, text] of options) {
      group.append(el("label", {}, el("input", {
        type: "radio", name: `set-${name}`, value, checked: settings[name] === value, onchange: save(name),
      }), el("span", {}, text)));
    }
    return el("div", { class: "row" }, el("span", { class: "label" }, label), group);
  };
  const area = (name, label, hint, value = settings[name]) => el("label", { class: "field" },
    el("span", { class: "label" }, label),
    el("textarea", { id: `set-${name}`, rows: "3", spellcheck: "false", value, oninput: save(name) }),
    el("small", {}, hint));
  const number = ([name, min, max, step]) => el("label", { class: "field number", title: t(`${name}Hint`) },
    el("span", { class: "label" }, t(name), el("small", {}, t(`${name}Hint`))),
    el("input", {
      id: `set-${name}`, type: "number", inputmode: "decimal", min, max, step,
      placeholder: t("default"), value: settings[name], oninput: save(name),
    }));
  const reset = el("button", { class: "plain", onclick: () => {
    resetSettings(NUMBERS.map(([name]) => name));
    drawSettings(hooks);
  } }, t("reset"));
  const setKey = ({ target }) => {
    apiKey.set(target.value.trim());
    hooks.keyChanged();
  };
  const key = el("input", { id: "set-apiKey", type: "password", autocomplete: "off", value: apiKey.get(), onchange: setKey });
  const clear = el("button", { class: "plain danger", onclick: ({ target }) => {
    if (target.dataset.sure) hooks.clearAll();
    target.dataset.sure = "yes";
    target.textContent = t("sureAll");
  } }, t("clearAll"));
  const heading = (word, ...more) => el("h3", {}, t(word), ...more);

  $("fields").replaceChildren(
    heading("appearance"),
    choice("theme", t("theme"), [["auto", t("auto")], ["light", t("light")], ["dark", t("dark")]]),
    choice("lang", t("language"), [["", t("auto")], ["en", "English"], ["zh", "中文"]]),
    heading("behaviour"),
    area("system", t("system"), t("systemHint"), hooks.chat().system),
    choice("thinking", t("thinkMode"), [["auto", t("auto")], ["on", t("on")], ["off", t("off")]]),
    heading("sampling", reset), el("p", { class: "note" }, t("samplingNote")),
    ...NUMBERS.map(number),
    area("stop", t("stopWords"), t("stopWordsHint")),
    heading("advanced"),
    el("label", { class: "row" }, el("span", { class: "label" }, t("logprobs"), el("small", {}, t("logprobsHint"))),
      el("input", {
        id: "set-logprobs", type: "checkbox", class: "switch", checked: settings.logprobs, onchange: save("logprobs"),
      })),
    area("tools", t("tools"), t("toolsHint")),
    heading("access"),
    el("label", { class: "field" }, el("span", { class: "label" }, t("apiKey")), key, el("small", {}, t("apiKeyHint"))),
    clear,
  );
}
