// What the browser keeps: conversations in IndexedDB, settings in localStorage, the key in sessionStorage.
//
// A conversation is a tree of turns, so an edited question or a second answer loses nothing:
// { id, title, named, created, updated, system, nodes: { id: node }, leaf }; what is shown is the path from
// the root to `leaf`. A node is { id, parent, role, content, chosen } and, of an answer, { reasoning, thinkMs,
// toolCalls, toolEvents, tokens, stats, model, stopped, error }.

import { messagesOf, readEvent } from "./toolevents.js";

const FORMAT = "kllm-chats";
/** The numeric settings: name in the API, least, most, step. Empty means the model's own. */
export const NUMBERS = [
  ["temperature", 0, 2, "any"], ["top_p", 0, 1, "any"], ["top_k", 0, 1000, 1], ["min_p", 0, 1, "any"],
  ["repetition_penalty", 0.5, 2, "any"], ["presence_penalty", -2, 2, "any"], ["frequency_penalty", -2, 2, "any"],
  ["max_tokens", 1, 131072, 1], ["seed", 0, 2 ** 53 - 1, 1],
];
const DEFAULTS = {
  theme: "auto", lang: "", model: "", system: "", thinking: "auto", logprobs: false, tools: "", stop: "",
  ...Object.fromEntries(NUMBERS.map(([name]) => [name, ""])),
};

export const settings = { ...DEFAULTS };
try {
  Object.assign(settings, JSON.parse(localStorage.getItem("kllm.settings")));
} catch {
  // no storage, or junk in it
}

export function saveSettings(changes) {
  Object.assign(settings, changes);
  try {
    localStorage.setItem("kllm.settings", JSON.stringify(settings));
  } catch {
    // private windows: for this page only
  }
}

export const resetSettings = (names) => saveSettings(Object.fromEntries(names.map((name) => [name, DEFAULTS[name]])));

export const apiKey = {
  get: () => sessionStorage.getItem("kllm.key") || "",
  set: (key) => (key ? sessionStorage.setItem("kllm.key", key) : sessionStorage.removeItem("kllm.key")),
};

// ---- the store

export const chats = new Map();
let database = null;

const settled = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

export async function loadChats() {
  try {
    const opening = indexedDB.open("kllm", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("chats", { keyPath: "id" });
    database = await settled(opening);
    for (const chat of await settled(database.transaction("chats").objectStore("chats").getAll())) {
      chats.set(chat.id, chat);
    }
  } catch {
    database = null; // no IndexedDB: conversations live as long as the page
  }
}

const write = (act) => database && act(database.transaction("chats", "readwrite").objectStore("chats"));

export function saveChat(chat) {
  chat.updated = Date.now();
  chats.set(chat.id, chat);
  write((store) => store.put(chat));
}

export function deleteChat(id) {
  chats.delete(id);
  write((store) => store.delete(id));
}

export const newestFirst = () => [...chats.values()].sort((a, b) => b.updated - a.updated);

// ---- the tree

/** Random, also where the page is not a secure context and has no crypto.randomUUID. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(9))].map((byte) => byte.toString(36).padStart(2, "0")).join("");
}

export function newChat() {
  const now = Date.now();
  const { system } = settings;
  return { id: newId(), title: "", named: false, created: now, updated: now, system, nodes: {}, leaf: null };
}

export function addNode(chat, parent, fields) {
  const node = { id: newId(), parent, content: "", ...fields };
  chat.nodes[node.id] = node;
  chat.leaf = node.id;
  noteChoice(chat);
  if (!chat.named && node.role === "user" && !parent) chat.title = node.content.trim().slice(0, 60).split("\n")[0];
  return node;
}

/** The turns from the first to the given one (the leaf when none is given). */
export function pathOf(chat, id = chat.leaf) {
  const path = [];
  for (let node = chat.nodes[id]; node; node = chat.nodes[node.parent]) path.unshift(node);
  return path;
}

const childrenOf = (chat, id) => Object.values(chat.nodes).filter((node) => node.parent === id);
export const siblingsOf = (chat, node) => childrenOf(chat, node.parent);

/** Each turn on the path remembers which of its followers was looked at. */
function noteChoice(chat) {
  for (const node of pathOf(chat)) if (node.parent) chat.nodes[node.parent].chosen = node.id;
}

/** Shows the branch a turn lies on, down to where it was left. */
export function selectBranch(chat, id) {
  let last = id;
  for (let below = childrenOf(chat, last); below.length; below = childrenOf(chat, last)) {
    const { chosen } = chat.nodes[last];
    last = chat.nodes[chosen]?.parent === last ? chosen : below.at(-1).id;
  }
  chat.leaf = last;
  noteChoice(chat);
}

/** The conversation up to a turn as the API wants it. */
export function toMessages(chat, id = chat.leaf) {
  const path = pathOf(chat, id);
  const lastUser = path.findLastIndex((node) => node.role === "user");
  const messages = chat.system.trim() ? [{ role: "system", content: chat.system }] : [];
  path.forEach((node, index) => {
    if (node.role === "tool") messages.push({ role: "tool", tool_call_id: node.callId, content: node.content });
    else if (node.role === "user") messages.push({ role: "user", content: node.content });
    else if (node.content || node.toolCalls?.length || node.toolEvents?.length || (node.id === id && node.reasoning)) {
      messages.push(...messagesOf(node));
      const message = messages.pop(); // the last text
      if (!message.content && node.toolEvents?.length && !node.toolCalls?.length) return;
      if (node.reasoning && index > lastUser) message.reasoning_content = node.reasoning;
      if (node.toolCalls?.length) {
        message.tool_calls = node.toolCalls.map(({ id: callId, name, arguments: args }) => (
          { id: callId, type: "function", function: { name, arguments: args } }));
      }
      messages.push(message);
    }
  });
  return messages;
}

// ---- files

/** OpenAI messages for everyone, the tree beside them for this page. */
export function exportChats(list) {
  const chat = (item) => ({ title: item.title, created: item.created, messages: toMessages(item), tree: item });
  return JSON.stringify({ format: FORMAT, version: 1, chats: list.map(chat) }, null, 1);
}

/** Reads an export, one {"messages": …}, a list of messages, or lines of such; how many came in. */
export function importChats(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    data = text.trim().split("\n").map((line) => JSON.parse(line)); // JSONL
  }
  const isMessage = (item) => typeof item?.role === "string";
  let items = data.format === FORMAT ? data.chats : Array.isArray(data) && !data.every(isMessage) ? data : [data];
  items = items.map((item) => (Array.isArray(item) ? { messages: item } : item));
  const read = items.map((item) => fromTree(item.tree) || fromMessages(item));
  read.forEach(saveChat);
  return read.length;
}

const string = (value) => (typeof value === "string" ? value : "");

function fromTree(tree) {
  if (!tree?.nodes || !tree.nodes[tree.leaf]) return null;
  const nodes = {};
  for (const [id, node] of Object.entries(tree.nodes)) { // known fields only: a file may hold anything
    if (!["user", "assistant", "tool"].includes(node.role)) throw new Error("role");
    const calls = Array.isArray(node.toolCalls) ? node.toolCalls.map(readCall) : [];
    const events = Array.isArray(node.toolEvents) ? node.toolEvents.map(readEvent) : [];
    nodes[id] = {
      id, role: node.role, parent: tree.nodes[node.parent] ? node.parent : null, chosen: string(node.chosen),
      content: string(node.content), reasoning: string(node.reasoning), thinkMs: Number(node.thinkMs) || 0,
      model: string(node.model), toolCalls: calls, toolEvents: events, callId: string(node.callId),
    };
  }
  const chat = { ...newChat(), title: string(tree.title), named: true, system: string(tree.system), nodes, leaf: tree.leaf };
  for (const id of Object.keys(nodes)) { // a loop of parents would never end
    const seen = new Set();
    for (let node = nodes[id]; node; node = nodes[node.parent]) {
      if (seen.has(node.id)) throw new Error("loop");
      seen.add(node.id);
    }
  }
  return chat;
}

const readCall = (call) => {
  const { name, arguments: args } = call.function || call;
  const text = typeof args === "string" ? args : JSON.stringify(args ?? {});
  return { id: string(call.id), name: string(name), arguments: text };
};

function fromMessages(item) {
  const messages = item.messages || item.conversations || (Array.isArray(item) ? item : null);
  if (!messages?.length) throw new Error("messages");
  const chat = { ...newChat(), system: "" };
  for (const message of messages) {
    const content = string(message.content);
    if (message.role === "system") chat.system = content;
    else if (message.role === "tool") {
      addNode(chat, chat.leaf, { role: "tool", content, callId: string(message.tool_call_id) });
    } else {
      const fields = { role: message.role === "assistant" ? "assistant" : "user", content };
      if (message.reasoning_content) fields.reasoning = string(message.reasoning_content);
      if (Array.isArray(message.tool_calls)) fields.toolCalls = message.tool_calls.map(readCall);
      addNode(chat, chat.leaf, fields);
    }
  }
  if (item.title) Object.assign(chat, { title: string(item.title), named: true });
  return chat;
}
