// The page: wires the conversation, its restores, the sessions and the store to the server.

import { answer } from "./answering.js";
import { ask, key, setKey } from "./api.js";
import { saved } from "./card.js";
import { Chat } from "./chat.js";
import { conversations, drop, keep, load, newConversation } from "./conversations.js";
import { $, h } from "./dom.js";
import { Panel } from "./panel.js";
import { listed, sessionsNow, showSessions, showStore, storeNow } from "./sessions.js";
import { keepSettings, openSettings, settings } from "./settings.js";
import { Watch } from "./watch.js";
import { beginning, count } from "./words.js";

const OPEN = "cakekv.open";
const REFRESH_MS = 15_000;
const SAID_MS = 12_000;

let conversation = load(sessionStorage.getItem(OPEN)) ?? conversations()[0] ?? newConversation();
let running = null; // {conversation, message, view, stop} of the answer that is being streamed
let model = "";
let known = []; // the server's sessions

const panel = new Panel($("restores"));
const chat = new Chat($("log"), { open: openRestore, again });

// --- The conversation ---

function show(next) {
  conversation = next;
  sessionStorage.setItem(OPEN, next.id);
  chat.show(next);
  if (running?.conversation.id === next.id) {
    conversation = running.conversation;
    running.view = chat.add(running.message);
  }
  listRestores();
  listSessions();
  look("chat");
}

/** Ask once more, for another answer in place of one that broke off. */
function again() {
  if (running) return;
  while (conversation.messages.at(-1)?.role === "assistant") conversation.messages.pop();
  show(conversation);
  $("message").focus();
  respond();
}

/** Ask for an answer to what the conversation holds. */
async function respond() {
  if (running) return;
  const asked = conversation;
  const message = { role: "assistant", content: "", id: null, restore: null, stopped: null };
  const run = { conversation: asked, message, view: chat.add(message), stop: new AbortController() };
  running = run;
  store(asked);
  showRunning();
  chat.waiting(run.view, "Reading…");
  let trouble = null;
  try {
    await answer(asked, model, message, run.stop.signal, {
      began: (id) => moved(watch.restores.get(id)),
      piece: (text) => chat.grow(run.view, text),
    });
    say("The answer is complete.");
  } catch (error) {
    message.stopped = error.name === "AbortError" ? "user" : "cut";
    trouble = error.name === "AbortError" ? null : error;
  }
  running = null;
  showRunning();
  const empty = message.stopped && !message.content;
  if (!empty) asked.messages.push(message);
  if (!run.forgotten) store(asked);
  if (conversation === asked) {
    if (empty) run.view.element.remove();
    else chat.finish(run.view);
    if (trouble) chat.unanswered(trouble.message);
    else if (empty) chat.unanswered("You stopped this before the answer began.");
  }
  if (trouble?.kind === "key") askKey(trouble.message);
  refresh();
}

function send() {
  const field = $("message");
  const content = field.value.trim();
  if (!content || running) return;
  field.value = "";
  const { system } = settings();
  if (system && !conversation.messages.length) conversation.messages.push({ role: "system", content: system });
  const message = { role: "user", content };
  conversation.messages.push(message);
  chat.add(message);
  $("log").scrollTop = $("log").scrollHeight;
  respond();
}

function store(kept) {
  kept.usedAt = Date.now();
  if (!keep(kept)) say("This browser has no room left for conversations: this one is lost on reload. Forget some.", true);
  listSessions();
}

function showRunning() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("log").setAttribute("aria-busy", String(Boolean(running)));
  if (document.activeElement === document.body) $("message").focus(); // its button is gone
}

// --- Restores ---

const watch = new Watch({ changed: moved, connected: showConnection });

/** A restore has moved or ended. */
function moved(restore) {
  if (!restore) return;
  if (running?.message.id === restore.id) {
    running.message.restore = restore;
    restore.label = `Turn ${running.conversation.messages.filter((message) => message.role === "user").length}`;
    if (conversation === running.conversation) chat.restored(running.view, restore);
  }
  listRestores();
  panel.update(restore);
  if (restore.figures && !restore.told) tell(restore);
}

function tell(restore) {
  restore.told = true;
  const { computed, loaded } = restore.figures;
  const met = restore.metAt ? ` They met at position ${count(restore.metAt)}.` : "";
  const spared = saved(restore);
  say(
    `Restored: ${count(computed)} tokens computed, ${count(loaded)} loaded.${met}` +
      (spared ? ` Saved ${spared[0]} ${spared[1]}.` : ""),
  );
}

function listRestores() {
  const own = conversation.messages.map((message) => message.restore).filter(Boolean);
  if (running?.conversation === conversation && running.message.restore) own.push(running.message.restore);
  const others = [...watch.restores.values()].filter((restore) => !restore.label);
  panel.show([...own, ...others]);
}

function openRestore(id) {
  look("restores");
  panel.focus(id);
}

// --- Sessions and store ---

function listSessions() {
  showSessions($("sessions"), listed(known), conversation.id, {
    open: (row) => show(load(row.id) ?? newConversation()),
    pin: (row, pinned) => act(`cakekv/sessions/${row.id}/pin`, { pinned }, pinned ? "Pinned." : "No longer pinned."),
    forget: confirmForget,
  });
}

async function act(path, body, done) {
  try {
    await ask(path, { method: "POST", body });
    say(done);
  } catch (error) {
    say(error.message, true);
  }
  await refresh();
}

function confirmForget(row) {
  $("forget-what").textContent = `“${beginning(row.words, 120)}”`;
  $("forget-hint").textContent = [
    row.conversation && "Its text is deleted from this browser.",
    row.session && "What the store holds of it is deleted.",
  ].filter(Boolean).join(" ");
  openDialog("forget-dialog", async () => {
    if (running?.conversation.id === row.id) {
      running.forgotten = true;
      running.stop.abort();
    }
    if (row.conversation) drop(row.id);
    if (row.session) await act(`cakekv/sessions/${row.id}/forget`, {}, "Forgotten.");
    if (row.id === conversation.id) show(newConversation());
    listSessions();
    $("new").focus();
  });
}

/** Ask the server for what may have changed. */
async function refresh() {
  try {
    const [sessions, tiers] = await Promise.all([sessionsNow(), storeNow()]);
    known = sessions;
    showStore($("store"), tiers);
  } catch {
    return; // the connection's line says what is wrong
  }
  listSessions();
}

// --- Connection, key, dialogs ---

async function showConnection(wrong, again) {
  const line = $("connection");
  line.dataset.state = wrong ? "gone" : "there";
  line.textContent = !wrong
    ? "Connected"
    : wrong.kind === "key"
      ? wrong.message
      : `${wrong.message} Trying again in ${again} s.`;
  if (wrong?.kind === "key") askKey(key() ? wrong.message : "");
  if (wrong) return;
  try {
    model = (await (await ask("v1/models")).json()).data[0].id;
    $("model").textContent = model;
  } catch {
    return;
  }
  refresh();
}

function askKey(why) {
  $("key-error").textContent = why;
  $("key").value = "";
  if ($("key-dialog").open) return;
  openDialog("key-dialog", () => {
    setKey($("key").value.trim());
    watch.again();
    if (conversation.messages.at(-1)?.role === "user") again();
  });
}

/** Show a dialog, and do something if its main button is pressed. */
function openDialog(id, then) {
  const dialog = $(id);
  dialog.returnValue = "";
  dialog.addEventListener("close", () => !["", "cancel"].includes(dialog.returnValue) && then(), { once: true });
  dialog.showModal();
}

/** Tell it in the live region; what went wrong also where all can see it. */
function say(words, wrong = false) {
  const line = h("p", { class: wrong ? "wrong" : "unseen" }, words);
  $("status").append(line);
  setTimeout(() => line.remove(), SAID_MS);
}

function look(at) {
  document.body.dataset.view = at;
  for (const button of document.querySelectorAll("nav.views button")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === at));
  }
}

// --- Events ---

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
if (!CSS.supports("field-sizing", "content")) {
  $("message").addEventListener("input", ({ target }) => {
    target.style.height = "auto";
    target.style.height = `${target.scrollHeight + 2}px`;
  });
}
$("stop").addEventListener("click", () => {
  running?.stop.abort();
  $("message").focus();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.stop.abort();
});
$("file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (!file) return;
  const text = await file.text();
  if (text.includes("\0")) return say(`${file.name} is not a text.`, true);
  const field = $("message");
  field.value = `${text.trim()}\n\n${field.value}`;
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
});
$("new").addEventListener("click", () => {
  show(newConversation());
  $("message").focus();
});
$("open-settings").addEventListener("click", openSettings);
$("settings-dialog").addEventListener("close", ({ target }) => target.returnValue === "save" && keepSettings());
$("change-key").addEventListener("click", () => {
  $("settings-dialog").close("");
  askKey("");
});
for (const button of document.querySelectorAll("dialog .cancel")) {
  button.addEventListener("click", () => button.closest("dialog").close("cancel"));
}
for (const button of document.querySelectorAll("nav.views button")) {
  button.addEventListener("click", () => look(button.dataset.view));
}
addEventListener("storage", listSessions);
addEventListener("pagehide", () => {
  if (!running?.message.content) return;
  const { conversation: asked, message } = running;
  keep({ ...asked, messages: [...asked.messages, { ...message, stopped: "cut" }] });
});
setInterval(() => document.hidden || refresh(), REFRESH_MS);

show(conversation);
showRunning();
$("message").focus();
