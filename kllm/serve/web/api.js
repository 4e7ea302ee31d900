// Talks to the server: models, streamed answers, rendered markdown, the rendered prompt.

import { apiKey } from "./state.js";

/** What went wrong, by kind: offline, key, busy, loading, model, context, request, server, cut. */
export class Failure extends Error {
  constructor(kind, message = "", wait = 0) {
    super(message);
    this.kind = kind;
    this.wait = wait;
  }
}

const KINDS = { 401: "key", 403: "key", 404: "model", 429: "busy", 503: "loading" };

function failureOf(status, error, headers) {
  let kind = KINDS[status] || (status >= 500 ? "server" : "request");
  if (error?.code === "context_length_exceeded") kind = "context";
  return new Failure(kind, error?.message || `HTTP ${status}`, Number(headers?.get("retry-after")) || 0);
}

async function call(path, body, signal) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (body) headers["Content-Type"] = "application/json";
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("offline");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw failureOf(response.status, answer?.error, response.headers);
}

export async function listModels() {
  return (await (await call("v1/models")).json()).data;
}

export async function renderPrompt(body) {
  return (await call("v1/chat/completions/render", body)).json();
}

/** The chunks of a streamed answer. Ends at [DONE]; a stream that ends without it was cut. */
export async function* streamChat(body, signal) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", streamed, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new Failure("cut");
    }
    if (read.done) throw new Failure("cut");
    const events = (buffer + read.value.replaceAll("\r", "")).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const lines = event.split("\n").filter((line) => line.startsWith("data:")); // comments keep the line open
      if (!lines.length) continue;
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw failureOf(Number(chunk.error.code) || 500, chunk.error);
      yield chunk;
    }
  }
}

// ---- markdown: what is asked for in one moment goes in one request; finished texts are remembered

export const MAX_MARKDOWN = 60_000;
const remembered = new Map();
let waiting = [];

/** The server's sanitised HTML of a text. */
export function renderMarkdown(text, remember = true) {
  if (remembered.has(text)) return Promise.resolve(remembered.get(text));
  return new Promise((resolve, reject) => {
    waiting.push({ text, remember, resolve, reject });
    if (waiting.length === 1) queueMicrotask(() => setTimeout(flush));
  });
}

async function flush() {
  while (waiting.length) {
    let size = 0;
    const count = waiting.findIndex((job, index) => index === 100 || (size += job.text.length) > 3 * MAX_MARKDOWN);
    const batch = waiting.splice(0, count < 0 ? waiting.length : Math.max(count, 1));
    renderBatch(batch);
  }
}

async function renderBatch(batch) {
  try {
    const { html } = await (await call("web/render", { texts: batch.map((job) => job.text) })).json();
    batch.forEach((job, index) => {
      if (job.remember) remembered.set(job.text, html[index]);
      job.resolve(html[index]);
    });
    while (remembered.size > 400) remembered.delete(remembered.keys().next().value);
  } catch (error) {
    batch.forEach((job) => job.reject(error));
  }
}
