// What a server's own tools did in an answer: node.toolEvents, as they came, each with `at`, the length of the
// answer's text by then.
//
// { type: "call", id, name, arguments, at } and later { type: "result", id, name, content, is_error, seconds, at }

const resultsOf = (events) => new Map(events.filter((event) => event.type === "result").map((event) => [event.id, event]));

/** Notes the events of a chunk. */
export function noteEvents(node, events) {
  for (const event of events) (node.toolEvents ||= []).push(readEvent({ ...event, at: node.content.length }));
}

/** An event with the known fields only, each of its type: a file or a server may send anything. */
export function readEvent(event) {
  const text = (value) => (typeof value === "string" ? value : "");
  const known = { id: text(event.id), name: text(event.name), at: Number(event.at) || 0 };
  if (event.type !== "result") return { type: "call", ...known, arguments: text(event.arguments) };
  return { type: "result", ...known, content: text(event.content), is_error: event.is_error === true, seconds: Number(event.seconds) || 0 };
}

/** The answer in the order it came: [{ text }, { call, result }, …]; the last is a text, if an empty one. */
export function piecesOf(node) {
  const events = node.toolEvents || [];
  const results = resultsOf(events);
  const pieces = [];
  let from = 0;
  for (const call of events) {
    if (call.type !== "call") continue;
    const text = node.content.slice(from, call.at);
    if (text.trim()) pieces.push({ text });
    from = Math.max(from, call.at);
    pieces.push({ call, result: results.get(call.id) });
  }
  return [...pieces, { text: node.content.slice(from) }];
}

/** The answer as messages of the API: each round's text and calls, their results, and the last text. */
export function messagesOf(node) {
  const events = node.toolEvents || [];
  const results = resultsOf(events);
  const messages = [];
  let calls = [];
  let from = 0;
  const endRound = () => {
    const done = calls.filter((call) => results.has(call.id)); // one that was stopped has no result
    const to = Math.max(from, ...done.map((call) => results.get(call.id).at));
    if (done.length) {
      messages.push({
        role: "assistant", content: node.content.slice(from, to).trim(),
        tool_calls: done.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } })),
      });
      for (const call of done) messages.push({ role: "tool", tool_call_id: call.id, content: results.get(call.id).content });
    }
    from = to;
    calls = [];
  };
  events.forEach((event, index) => {
    if (event.type !== "call") return;
    if (events[index - 1]?.type === "result") endRound();
    calls.push(event);
  });
  endRound();
  const rest = node.content.slice(from);
  return [...messages, { role: "assistant", content: messages.length ? rest.trimStart() : rest }];
}
