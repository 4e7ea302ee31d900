// The page: what the buttons and keys do.

import { Failure, listModels } from "./api.js";
import { $, el, icon, speak, toast } from "./dom.js";
import { generate, isRunning, stop } from "./generate.js";
import { t, translatePage } from "./i18n.js";
import { openPrompt } from "./prompt.js";
import { openSettings } from "./settings.js";
import { drawSidebar } from "./sidebar.js";
import * as state from "./state.js";
import { Thread } from "./thread.js";
import { fit } from "./turn.js";

const { settings } = state;
const input = $("input");
const touch = matchMedia("(hover: none) and (pointer: coarse)"); // there Enter makes a new line
let chat = state.newChat();

const acts = {
  send,
  retry: (node) => run(node, Boolean(node.content)),
  onward: (node) => run(node, true),
  openSettings: (field) => openSettings(hooks, field),
  redo(node) {
    if (!isRunning(chat)) run(state.addNode(chat, node.parent, { role: "assistant" }));
  },
  edit(node, text) {
    if (isRunning(chat)) return;
    const fresh = state.addNode(chat, node.parent, { role: node.role, content: text });
    if (node.role === "user") run(state.addNode(chat, fresh.id, { role: "assistant" }));
    else keep();
  },
  pick(node) {
    if (isRunning(chat)) return;
    state.selectBranch(chat, node.id);
    keep();
  },
  answerTools(node, results) {
    let parent = node.id;
    node.toolCalls.forEach((call, index) => {
      parent = state.addNode(chat, parent, { role: "tool", callId: call.id, content: results[index] || "" }).id;
    });
    run(state.addNode(chat, parent, { role: "assistant" }));
  },
};
const thread = new Thread(acts);

const listActs = {
  open: (other) => openChat(other),
  renamed: () => refresh(),
  removed(other) {
    stop(other);
    if (other === chat) openChat(state.newChat());
    else refresh();
  },
};

const hooks = {
  chat: () => chat,
  keyChanged: () => (loadModels(), thread.redraw()),
  changed(name) {
    if (name === "theme") document.documentElement.dataset.theme = settings.theme;
    if (name === "system" && chat.leaf) state.saveChat(chat);
    if (name !== "lang") return;
    translatePage();
    thread.redraw();
    refresh();
    loadModels();
    openSettings(hooks);
  },
  clearAll() {
    for (const id of [...state.chats.keys()]) state.deleteChat(id);
    $("settings").close();
    openChat(state.newChat());
  },
};

// ---- conversations

function refresh() {
  thread.show(chat);
  drawSidebar(chat, listActs);
  const running = isRunning(chat);
  const label = t(running ? "stop" : "send");
  $("send").replaceChildren(icon(running ? "stop" : "send"));
  $("send").title = label;
  $("send").setAttribute("aria-label", label);
  $("send").disabled = !running && !input.value.trim();
  document.title = chat.title ? `${chat.title} · kllm` : "kllm";
}

function keep() {
  state.saveChat(chat);
  refresh();
}

function openChat(other) {
  chat = other;
  showSide(false);
  refresh();
  history.replaceState(null, "", chat.leaf ? `#${chat.id}` : location.pathname);
  if (!touch.matches) input.focus();
}

function send(text) {
  if (isRunning(chat) || !text.trim()) return;
  const asked = state.addNode(chat, chat.leaf, { role: "user", content: text.trim() });
  run(state.addNode(chat, asked.id, { role: "assistant" }));
}

async function run(node, onward = false) {
  const own = chat;
  if (isRunning(own)) return;
  state.saveChat(own);
  history.replaceState(null, "", `#${own.id}`);
  const work = generate(own, node, () => own === chat && thread.touch(), onward);
  refresh();
  thread.toEnd();
  speak(t("answering"));
  await work;
  refresh();
  speak(t("done"));
}

// ---- models

async function loadModels() {
  try {
    const models = await listModels();
    const name = ({ id, parent }) => (parent ? t("adapterOf", { id }) : id);
    $("model").replaceChildren(...models.map((model) => el("option", { value: model.id }, name(model))));
    const known = models.some((model) => model.id === settings.model);
    $("model").value = known ? settings.model : models[0]?.id;
    state.saveSettings({ model: $("model").value });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    $("model").replaceChildren(el("option", { value: "" }, t("noModel")));
    if (error.kind === "key") toast(t("key"), t("openSettings"), () => acts.openSettings("apiKey"));
    else toast(t(error.kind), t("retry"), loadModels);
  }
}

// ---- the composer and the keys

function submit() {
  if (isRunning(chat)) return stop(chat);
  const text = input.value;
  if (!text.trim()) return undefined;
  input.value = "";
  fit(input);
  return send(text);
}

input.addEventListener("input", () => {
  fit(input);
  $("send").disabled = !isRunning(chat) && !input.value.trim();
});
input.addEventListener("keydown", (event) => {
  // An input method's Enter picks a word; some browsers tell it by the key code only.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229 || touch.matches) return;
  event.preventDefault();
  if (!isRunning(chat)) submit();
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if (event.key === "Escape") {
    if (isRunning(chat)) stop(chat);
    else showSide(false);
  }
  if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    openChat(state.newChat());
  }
});

// ---- the sidebar: beside the conversation on wide screens, over it on narrow ones

const narrow = matchMedia("(max-width: 760px)");

function showSide(open) {
  if (narrow.matches) $("app").classList.toggle("side-open", open);
  else if (open) $("app").classList.remove("side-shut");
}

$("open-side").addEventListener("click", () => showSide(true));
$("scrim").addEventListener("click", () => showSide(false));
$("close-side").addEventListener("click", () => $("app").classList.add("side-shut") || showSide(false));
$("new-chat").addEventListener("click", () => openChat(state.newChat()));
$("filter").addEventListener("input", () => drawSidebar(chat, listActs));
$("send").addEventListener("click", submit);
$("model").addEventListener("change", () => state.saveSettings({ model: $("model").value }));
$("open-settings").addEventListener("click", () => openSettings(hooks));
$("open-prompt").addEventListener("click", () => openPrompt(chat, input.value));
for (const name of ["settings", "prompt"]) {
  $(`close-${name}`).addEventListener("click", () => $(name).close());
  $(name).addEventListener("click", ({ target }) => target === $(name) && $(name).close()); // the backdrop
}

$("export").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([state.exportChats(state.newestFirst())], { type: "application/json" }));
  el("a", { href: url, download: `kllm-chats-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
});
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", async ({ target }) => {
  try {
    const count = state.importChats(await target.files[0].text());
    toast(t("imported", { n: count }));
    openChat(state.newestFirst()[0]);
  } catch {
    toast(t("badFile"));
  }
  target.value = "";
});

translatePage();
fit(input);
refresh();
loadModels();
await state.loadChats();
if (!chat.leaf) openChat(state.chats.get(location.hash.slice(1)) || chat);
