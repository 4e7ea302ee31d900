// "What the model sees": the conversation after the chat template, token by token.

import { Failure, renderPrompt } from "./api.js";
import { $, el } from "./dom.js";
import { requestFields } from "./generate.js";
import { t } from "./i18n.js";
import { toMessages } from "./state.js";

/** Opens the viewer for a conversation and the message being written. */
export async function openPrompt(chat, draft) {
  const text = $("prompt-text");
  text.textContent = "…";
  $("prompt-count").textContent = "";
  $("prompt").showModal();
  const messages = toMessages(chat);
  if (draft.trim()) messages.push({ role: "user", content: draft });
  if (!messages.some((message) => message.role !== "system")) {
    text.textContent = t("promptEmpty");
    return;
  }
  try {
    const answer = await renderPrompt({ ...requestFields(), messages });
    $("prompt-count").textContent = t("ofContext", { n: answer.count, limit: answer.max_model_len });
    text.replaceChildren(...piecesOf(answer.prompt, answer.tokens, answer.token_ids).map(([piece, ids]) => (
      el("span", { class: "piece", title: ids.join(" ") }, piece))));
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    text.textContent = error.message || t(error.kind);
  }
}

/** The prompt cut at its token borders; tokens that share a character make one piece. [[text, ids], …] */
function piecesOf(prompt, tokens, ids) {
  const pieces = [];
  let at = 0;
  let open = []; // ids of the parts of characters, whose own texts are no text
  tokens.forEach((token, index) => {
    const found = token && !token.includes("\ufffd") ? prompt.indexOf(token, at) : -1;
    if (found < 0 || (found > at && !open.length)) {
      open.push(ids[index]);
      return;
    }
    if (found > at) pieces.push([prompt.slice(at, found), open]);
    pieces.push([token, [ids[index]]]);
    open = [];
    at = found + token.length;
  });
  if (at < prompt.length) pieces.push([prompt.slice(at), open]);
  return pieces;
}
