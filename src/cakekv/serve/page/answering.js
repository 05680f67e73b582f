// Asks the server for an answer and hands on what comes of it.

import { ask, events, ServerError } from "./api.js";
import { settings } from "./settings.js";

/**
 * Stream the answer to a conversation into `message`.
 *
 * `began(id)` is called once with the request's id, `piece(text)` with each piece of the answer.
 */
export async function answer(conversation, model, message, signal, { began, piece }) {
  const { tokens, temperature } = settings();
  const body = {
    model,
    messages: conversation.messages.map(({ role, content }) => ({ role, content })),
    stream: true,
    prompt_cache_key: conversation.id, // the session in the list
    max_tokens: tokens,
    temperature,
  };
  const response = await ask("v1/chat/completions", { method: "POST", body, signal });
  for await (const { data } of events(response)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new ServerError("failed", part.error.message);
    if (!message.id) {
      message.id = part.id;
      began(part.id);
    }
    const choice = part.choices?.[0];
    if (choice?.delta?.content) piece(choice.delta.content);
    if (choice?.finish_reason === "length") message.stopped = "length";
  }
  throw new ServerError("cut", "The connection broke before the answer was complete.");
}
