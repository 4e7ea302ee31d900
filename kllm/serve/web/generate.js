// Runs one answer: asks, reads the stream into the turn, keeps it saved. One at a time in a conversation.

import { Failure, streamChat } from "./api.js";
import { readTokens } from "./chances.js";
import { NUMBERS, saveChat, settings, toMessages } from "./state.js";
import { noteEvents } from "./toolevents.js";

const SAVE_EVERY = 500; // ms; a reload in mid-answer keeps what came

const runs = new Map();

export const isRunning = (chat) => runs.has(chat?.id);
export const isWriting = (chat, node) => runs.get(chat?.id)?.node === node;
export const stop = (chat) => runs.get(chat?.id)?.controller.abort();

/** The request's fields from the settings; what is empty is left to the model. */
export function requestFields() {
  const fields = settings.model ? { model: settings.model } : {};
  for (const [name] of NUMBERS) {
    if (settings[name] !== "") fields[name] = Number(settings[name]);
  }
  const stops = settings.stop.split("\n").filter(Boolean);
  if (stops.length) fields.stop = stops;
  if (settings.thinking !== "auto") fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.tools.trim()) {
    try {
      fields.tools = JSON.parse(settings.tools);
    } catch {
      throw new Failure("tools");
    }
  }
  return fields;
}

/** Fills `node`, a new answer or (with `onward`) one that goes on; `changed(node)` after each step. */
export async function generate(chat, node, changed, onward = false) {
  const run = { controller: new AbortController(), node };
  runs.set(chat.id, run);
  Object.assign(node, { error: null, stopped: false, stats: null });
  if (!onward) Object.assign(node, { content: "", reasoning: "", thinkMs: 0, toolCalls: [], toolEvents: [], tokens: null });
  const clock = { start: performance.now(), first: 0, saved: 0, thinking: 0, chunks: 0 };
  changed(node);
  try {
    const body = { ...requestFields(), messages: toMessages(chat, onward ? node.id : node.parent) };
    if (onward) Object.assign(body, { add_generation_prompt: false, continue_final_message: true });
    if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: 5 });
    for await (const chunk of streamChat(body, run.controller.signal)) {
      readChunk(node, chunk, clock);
      if (performance.now() - clock.saved > SAVE_EVERY) {
        clock.saved = performance.now();
        saveChat(chat);
      }
      changed(node);
    }
  } catch (error) {
    if (error.name === "AbortError") node.stopped = true;
    else if (error instanceof Failure) node.error = { kind: error.kind, message: error.message, wait: error.wait };
    else throw error;
  } finally {
    if (clock.thinking) node.thinkMs = (node.thinkMs || 0) + performance.now() - clock.thinking;
    finishStats(node, clock);
    runs.delete(chat.id);
    saveChat(chat);
    changed(node);
  }
}

function readChunk(node, chunk, clock) {
  const now = performance.now();
  node.model = chunk.model || node.model;
  if (chunk.usage) {
    node.stats = {
      ...node.stats, prompt: chunk.usage.prompt_tokens, tokens: chunk.usage.completion_tokens,
      cached: chunk.usage.prompt_tokens_details?.cached_tokens || 0,
    };
  }
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta || {};
  const thought = delta.reasoning_content ?? delta.reasoning;
  const spoken = delta.content || delta.tool_calls || delta.tool_events;
  if ((thought || spoken) && !clock.first) clock.first = now;
  if (thought) {
    clock.thinking ||= now;
    node.reasoning = (node.reasoning || "") + thought;
  }
  if (spoken && clock.thinking) {
    node.thinkMs = (node.thinkMs || 0) + now - clock.thinking;
    clock.thinking = 0;
  }
  if (delta.content) node.content += delta.content;
  for (const part of delta.tool_calls || []) addCall(node, part);
  noteEvents(node, delta.tool_events || []);
  if (choice.logprobs?.content) (node.tokens ||= []).push(...readTokens(choice.logprobs.content));
  clock.chunks += 1;
  if (clock.first && now - clock.first > 500 && !clock.end) { // until the usage tells the true count
    node.stats = { ...node.stats, rate: (1000 * clock.chunks) / (now - clock.first) };
  }
  if (choice.finish_reason) {
    clock.end = now;
    node.stats = { ...node.stats, finish: choice.finish_reason };
  }
}

function addCall(node, part) {
  node.toolCalls ||= [];
  const call = (node.toolCalls[part.index] ||= { id: "", name: "", arguments: "" });
  call.id ||= part.id || "";
  call.name += part.function?.name || "";
  call.arguments += part.function?.arguments || "";
}

function finishStats(node, clock) {
  if (!clock.first) return;
  const seconds = ((clock.end || performance.now()) - clock.first) / 1000;
  const tokens = node.stats?.tokens;
  const rate = tokens > 1 && seconds > 0.02 ? (tokens - 1) / seconds : 0;
  node.stats = { ...node.stats, first: (clock.first - clock.start) / 1000, rate };
}
