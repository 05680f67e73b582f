// A restore in full: its bar, both ends over time, what each arm did, what was saved and what was missed.

import { bar, chart, inWords, tierPattern } from "./bar.js";
import { h, s } from "./dom.js";
import { bytes, count, seconds, tokens } from "./words.js";

const REASONS = {
  "behind the stored prefix": "new in this prompt",
  "not stored": "not in the store",
  late: "late: computing was sooner",
  linked: "computed to link a reused document",
};
const inReason = (said) =>
  REASONS[said] ?? said.replace(/^corrupt:/, "damaged in the store:").replace(/^store failed:/, "the store failed:");

/** What became of it, in a word or two, and the shape beside that. */
function outcome(restore) {
  if (restore.failure) return ["failed", "Ended early"];
  if (!restore.ended) return ["running", "Restoring"];
  if (!restore.figures.loaded) return ["computed", "Computed"];
  return restore.metAt ? ["met", "Met in the middle"] : ["loaded", "Loaded"];
}

/** What the restore saved, as [figure, remark], or null if the server cannot say. */
export function saved(restore) {
  const { all, ttft } = restore.figures;
  if (all === null || !restore.figures.loaded) return null;
  if (all <= ttft) return ["nothing", `computing all takes about ${seconds(all)}`];
  return [seconds(all - ttft), `of about ${seconds(all)} to compute all`];
}

export class Card {
  constructor(restore) {
    this.restore = restore;
    this.heading = h("h3");
    this.state = h("p", { class: "outcome" });
    this.body = h("div");
    this.curves = h("div");
    this.rest = h("div", { class: "missed" });
    this.more = h("details", { open: true }, h("summary", {}, "Both ends over time"), this.curves);
    this.more.addEventListener("toggle", () => this.update());
    this.element = h(
      "article",
      { class: "card", tabindex: "-1" },
      h("header", {}, this.heading, this.state),
      this.body,
      this.more,
      this.rest,
    );
    this.update();
  }

  update() {
    const { restore } = this;
    const [kind, words] = outcome(restore);
    this.heading.textContent = restore.label ?? "Another client";
    this.element.dataset.outcome = kind;
    this.state.replaceChildren(h("span", { class: "sign", "aria-hidden": "true" }), words);
    const parts = [bar(restore), restore.failure && h("p", { class: "why" }, restore.failure), arms(restore)];
    this.body.replaceChildren(...parts.filter(Boolean), ...(restore.figures ? [figures(restore)] : []));
    const curves = this.more.open && chart(restore);
    if (this.more.open) this.more.hidden = !curves;
    this.curves.replaceChildren(...(curves ? [curves] : []));
    this.rest.replaceChildren(...(restore.figures ? missed(restore) : []));
  }
}

/** A line per arm: compute, and each tier. */
function arms(restore) {
  const { computed, loaded } = restore.figures ?? restore.covered;
  const line = (pattern, name, amount) =>
    h("li", {}, swatch(pattern), h("span", { class: "name" }, name), h("span", { class: "amount" }, amount));
  const lines = [line("computed", "computed", tokens(computed))];
  if (restore.loads.length) {
    for (const tier of restore.tiers) {
      const sum = restore.loads.filter((load) => load.source === tier).reduce((total, load) => total + load.tokens, 0);
      const size = bytes(restore.figures.bytes[tier]);
      lines.push(line(tierPattern(restore, tier), `from ${tier}`, `${tokens(sum)} · ${size}`));
    }
  } else if (loaded || !restore.ended) lines.push(line("tier0", "loaded", tokens(loaded)));
  return h("ul", { class: "arms" }, ...lines);
}

/** A sample of a pattern. */
export const swatch = (pattern) =>
  s(
    "svg",
    { class: "swatch", width: "16", height: "12", "aria-hidden": "true" },
    s("rect", { width: "16", height: "12", fill: `url(#${pattern})` }),
  );

function figures(restore) {
  const { ttft, lossy } = restore.figures;
  const spared = saved(restore);
  const figure = (name, value, remark) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value, remark && h("small", {}, remark)));
  return h(
    "dl",
    { class: "figures" },
    figure("First token after", seconds(ttft), lossy ? `not exact: ${tokens(lossy)} rounded` : "exact, as if computed"),
    spared && figure("Saved", ...spared),
  );
}

/** What was not loaded, and remarks. */
function missed({ misses, notes }) {
  const lines = misses.map(([said, sum]) => h("li", {}, h("b", {}, count(sum)), ` ${inReason(said)}`));
  return [
    lines.length && h("h4", {}, "Tokens not loaded, and why"),
    lines.length && h("ul", {}, ...lines),
    ...notes.map((note) => h("p", { class: "note" }, note)),
  ].filter(Boolean);
}

/** A line below an answer: the same bar, small, and the essence. */
export function brief(restore, open) {
  const { figures: made } = restore;
  const words = restore.failure
    ? restore.failure
    : !made
      ? inWords(restore)
      : made.loaded
        ? `${count(made.loaded)} of ${count(restore.promptTokens)} tokens loaded` +
          (restore.metAt ? `, met at ${count(restore.metAt)}` : "") +
          ` · first token after ${seconds(made.ttft)}`
        : `${tokens(restore.promptTokens)} computed · first token after ${seconds(made.ttft)}`;
  return h("button", { type: "button", class: "brief", onclick: open }, bar(restore, true), h("span", {}, words));
}
