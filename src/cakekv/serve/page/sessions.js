// The list of sessions, and what the store holds.

import { ask } from "./api.js";
import { conversations, title } from "./conversations.js";
import { h } from "./dom.js";
import { ago, beginning, bytes, count, tokens } from "./words.js";

/** Conversations of this browser and sessions of the server as one list, the latest first. */
export function listed(known) {
  const rest = new Map(known.map((session) => [session.id, session]));
  const rows = conversations().map((conversation) => {
    const session = rest.get(conversation.id) ?? null;
    rest.delete(conversation.id);
    return { id: conversation.id, conversation, session, words: title(conversation), usedAt: conversation.usedAt };
  });
  for (const session of rest.values()) {
    rows.push({ id: session.id, conversation: null, session, words: session.first_words, usedAt: 1000 * session.last_used });
  }
  return rows.sort((one, other) => other.usedAt - one.usedAt);
}

/** Fill the list. Its buttons keep the focus, by the name of the session and what they do. */
export function showSessions(list, rows, current, { open, pin, forget }) {
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  const button = (row, does, attributes, ...children) =>
    h("button", { type: "button", class: does, "data-name": `${does} ${row.id}`, ...attributes }, ...children);
  const items = rows.map((row) => {
    const words = beginning(row.words, 80) || "New conversation";
    const held = row.session
      ? `${tokens(row.session.tokens)} · ${ago(row.usedAt)}`
      : `not in the store · ${ago(row.usedAt)}`;
    const text = [h("span", { class: "words" }, words), h("span", { class: "held" }, held)];
    const pinned = row.session?.pinned ?? false;
    return h(
      "li",
      { class: pinned ? "pinned" : null },
      row.conversation
        ? button(row, "open", { "aria-current": row.id === current ? "true" : null, onclick: () => open(row) }, ...text)
        : h("div", { class: "open elsewhere" }, ...text, h("span", { class: "held" }, "from another client")),
      h(
        "span",
        { class: "acts" },
        row.session &&
          button(
            row,
            "pin",
            { "aria-pressed": String(pinned), "aria-label": `Pin: ${words}`, onclick: () => pin(row, !pinned) },
            pinned ? "Pinned" : "Pin",
          ),
        button(row, "forget", { "aria-label": `Forget: ${words}`, onclick: () => forget(row) }, "Forget"),
      ),
    );
  });
  list.replaceChildren(...(items.length ? items : [h("li", { class: "none" }, "None yet.")]));
  if (focused) list.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
}

/** What each tier holds. */
export function showStore(place, tiers) {
  const rows = tiers.map((tier) => {
    const chunks = `${count(tier.chunks)} ${tier.chunks === 1 ? "chunk" : "chunks"}`;
    const size = bytes(tier.bytes) + (tier.capacity ? ` of ${bytes(tier.capacity)}` : "");
    const line = [h("b", {}, tier.name), h("span", {}, chunks), h("span", { class: "size" }, size)];
    if (tier.capacity) {
      line.push(
        h("meter", { min: 0, max: tier.capacity, value: tier.bytes, "aria-label": `${tier.name}: how full it is` }),
      );
    }
    return h("li", {}, ...line);
  });
  place.replaceChildren(h("ul", { class: "tiers" }, ...rows));
}

export const sessionsNow = async () => (await (await ask("cakekv/sessions")).json()).sessions;

export const storeNow = async () => (await (await ask("cakekv/store")).json()).tiers;
