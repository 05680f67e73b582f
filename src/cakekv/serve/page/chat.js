// The messages of a conversation on the page.

import { brief } from "./card.js";
import { h } from "./dom.js";
import { count } from "./words.js";

const LONG = 900; // characters of a message that are shown at first, if there are many more
const STOPPED = {
  length: "Stopped at the longest answer that the settings allow.",
  user: "You stopped this answer.",
  cut: "The connection broke here.",
};

/** Text with its code and emphasis, as elements. */
function formatted(text) {
  const parts = text.split(/^```[^\n]*\n([\s\S]*?)(?:^```[^\n]*\n?|$(?![\s\S]))/m);
  return parts
    .map((part, place) => (place % 2 ? h("pre", { tabindex: "0" }, h("code", {}, part)) : paragraphs(part)))
    .flat();
}

const paragraphs = (text) =>
  text
    .split(/\n{2,}/)
    .filter((paragraph) => paragraph.trim())
    .map((paragraph) => h("p", {}, ...inline(paragraph.replace(/^\n+|\s+$/g, ""))));

const inline = (text) =>
  text
    .split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)
    .map((part, place) =>
      place % 2 === 0 ? part : part[0] === "`" ? h("code", {}, part.slice(1, -1)) : h("strong", {}, part.slice(2, -2)),
    );

export class Chat {
  /** `open(id)` shows a restore; `again()` asks once more. */
  constructor(log, { open, again }) {
    this.log = log;
    this.open = open;
    this.again = again;
  }

  /** Show all of a conversation. */
  show(conversation) {
    this.log.replaceChildren(...(conversation.messages.length ? [] : [welcome()]));
    for (const message of conversation.messages) this.add(message);
    if (conversation.messages.at(-1)?.role === "user") this.unanswered("This has not been answered.");
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** Add a message; the view of an answer can grow. */
  add(message) {
    this.log.querySelector(".welcome, .trouble")?.remove();
    const text = h("div", { class: "text" });
    const foot = h("div", { class: "foot" });
    const who = message.role === "user" ? "You" : "Answer";
    const element = h("article", { class: `message ${message.role}` }, h("h3", { class: "unseen" }, who), text, foot);
    this.log.append(element);
    const view = { message, element, text, foot };
    this.finish(view);
    return view;
  }

  /** More of an answer has come. */
  grow(view, piece) {
    this.keepInSight(() => {
      view.message.content += piece;
      if (view.text.firstChild?.nodeType !== Node.TEXT_NODE) view.text.replaceChildren(document.createTextNode(""));
      view.text.firstChild.data += piece;
    });
  }

  /** An answer is complete, or as complete as it gets. */
  finish(view) {
    const { message } = view;
    this.keepInSight(() => {
      view.text.replaceChildren(...(message.role === "user" ? shortened(message.content) : formatted(message.content)));
      const why = STOPPED[message.stopped];
      view.foot.replaceChildren(...(why ? [h("p", { class: "stopped" }, why)] : []));
      if (message.restore) this.restored(view, message.restore);
    });
  }

  /** The restore that this answer began with has moved, or ended. */
  restored(view, restore) {
    const line = brief(restore, () => this.open(restore.id));
    this.keepInSight(() => {
      const old = view.foot.querySelector(".brief");
      if (old) old.replaceChildren(...line.childNodes); // it stays focused
      else view.foot.prepend(line);
    });
  }

  waiting(view, words) {
    view.text.replaceChildren(h("p", { class: "waiting" }, words));
  }

  /** There is no answer, and why. */
  unanswered(why) {
    this.log.querySelector(".trouble")?.remove();
    const retry = h("button", { type: "button", onclick: () => this.again() }, "Try again");
    this.log.append(h("div", { class: "trouble", role: "alert" }, h("p", {}, why), retry));
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** Change something, and stay at the end if that is where the reader is. */
  keepInSight(change) {
    const { log } = this;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    change();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }
}

/** The beginning of a long text, with a button for the rest. */
function shortened(text) {
  const shown = h("p", {}, text);
  if (text.length < 1.5 * LONG) return [shown];
  const more = h("button", {
    type: "button",
    class: "more",
    onclick: () => set(more.getAttribute("aria-expanded") !== "true"),
  });
  const set = (open) => {
    more.setAttribute("aria-expanded", String(open));
    more.textContent = open ? "Show less" : `Show all ${count(text.length)} characters`;
    shown.textContent = open ? text : `${text.slice(0, LONG / 2).trimEnd()} […] ${text.slice(-LONG / 4).trimStart()}`;
  };
  set(false);
  return [shown, more];
}

function welcome() {
  return h(
    "div",
    { class: "welcome" },
    h("h2", {}, "Ask about something long. Then ask again."),
    h(
      "p",
      {},
      "What the model has read stays in the store, also when this server is restarted. The next time, the beginning is " +
        "computed while the rest is loaded from its end, until both meet. You can watch that beside the answer.",
    ),
  );
}
