// The list of conversations: by age, with search, renaming, and deleting that can be undone.

import { $, el, iconButton, toast } from "./dom.js";
import { isRunning } from "./generate.js";
import { t } from "./i18n.js";
import { deleteChat, newestFirst, saveChat } from "./state.js";

const DAY = 86_400_000;

/** Draws the list; `acts`: { open(chat), removed(chat) }. */
export function drawSidebar(current, acts) {
  const wanted = $("filter").value.trim().toLowerCase();
  const said = (chat) => Object.values(chat.nodes).some((node) => node.content.toLowerCase().includes(wanted));
  const list = newestFirst().filter((chat) => !wanted || chat.title.toLowerCase().includes(wanted) || said(chat));
  const midnight = new Date().setHours(0, 0, 0, 0);
  const groups = new Map([["today", []], ["week", []], ["older", []]]);
  for (const chat of list) {
    groups.get(chat.updated >= midnight ? "today" : chat.updated >= midnight - 7 * DAY ? "week" : "older").push(chat);
  }
  const parts = [];
  for (const [name, items] of groups) {
    if (items.length) parts.push(el("h2", {}, t(name)), el("ul", {}, items.map((chat) => entry(chat, current, acts))));
  }
  $("chats").replaceChildren(...(parts.length ? parts : [el("p", { class: "note" }, t(wanted ? "noMatch" : "noChats"))]));
}

function entry(chat, current, acts) {
  const here = chat === current ? "page" : null;
  const open = el("button", { class: "chat", "aria-current": here, title: chat.title, onclick: () => acts.open(chat) },
    el("span", {}, chat.title || t("newChat")), isRunning(chat) && el("i", { class: "dot", "aria-label": t("running") }));
  const item = el("li", {}, open,
    iconButton("edit", t("rename"), () => rename(chat, item, acts)),
    iconButton("trash", t("delete"), () => {
      deleteChat(chat.id);
      acts.removed(chat);
      toast(t("deleted"), t("undo"), () => (saveChat(chat), acts.open(chat)));
    }));
  return item;
}

function rename(chat, item, acts) {
  const input = el("input", { class: "rename", "aria-label": t("rename"), value: chat.title });
  let done = false;
  const finish = (keep) => {
    if (done) return;
    done = true;
    const title = input.value.trim();
    if (keep && title) {
      Object.assign(chat, { title, named: true });
      saveChat(chat);
    }
    acts.renamed();
  };
  input.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
    event.stopPropagation();
  });
  input.addEventListener("blur", () => finish(true));
  item.replaceChildren(input);
  input.select();
}
