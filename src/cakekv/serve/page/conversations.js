// Conversations of this browser, each under a name of its own in localStorage, so that two tabs do not undo each other.

import { Restore } from "./restore.js";

const PREFIX = "cakekv.conversation.";

export function newConversation() {
  const random = crypto.getRandomValues(new Uint8Array(12));
  const id = Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, usedAt: Date.now(), messages: [] };
}

/** All of them, the latest first. */
export function conversations() {
  const all = [];
  for (let place = 0; place < localStorage.length; place++) {
    const name = localStorage.key(place);
    if (name.startsWith(PREFIX)) all.push(load(name.slice(PREFIX.length)));
  }
  return all.filter(Boolean).sort((one, other) => other.usedAt - one.usedAt);
}

export function load(id) {
  try {
    const found = JSON.parse(localStorage.getItem(PREFIX + id));
    for (const message of found.messages) if (message.restore) message.restore = new Restore(message.restore);
    return found;
  } catch {
    return null; // there is none, or something else wrote it
  }
}

/** Keep it; false if the browser has no room for it. */
export function keep(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export const drop = (id) => localStorage.removeItem(PREFIX + id);

/** The first words of what was asked. */
export const title = (conversation) => conversation.messages.find((message) => message.role === "user")?.content ?? "";
