// A restore drawn: a bar of positions, and how both ends moved over time. Told apart by pattern and shape, not by colour
// alone; in words for those who do not see it.

import { h, s } from "./dom.js";
import { count, seconds } from "./words.js";

const TIER_PATTERNS = 4;

/** The tiers a restore has loaded from, in the order of their patterns. */
export const tierPattern = (restore, tier) => `tier${Math.max(0, restore.tiers.indexOf(tier)) % TIER_PATTERNS}`;

/** Runs of positions (start, end, state, tier), with loaded ones split by the tier they came from. */
function runs(restore) {
  const loads = restore.loads;
  const found = [];
  for (const [start, end, state] of restore.bands) {
    if (state !== "loaded" || !loads.length) {
      found.push([start, end, state, restore.tiers[0]]);
      continue;
    }
    let at = start;
    for (const load of loads) {
      const stop = Math.min(end, load.start + load.tokens);
      if (stop <= at || load.start >= end) continue;
      const last = found.at(-1);
      if (last && last[1] === at && last[2] === state && last[3] === load.source) last[1] = stop;
      else found.push([at, stop, state, load.source]);
      at = stop;
    }
    if (at < end) found.push([at, end, state, restore.tiers[0]]);
  }
  return found;
}

const PAINT = {
  computed: () => "url(#computed)",
  computing: () => "url(#computing)",
  loaded: (restore, tier) => `url(#${tierPattern(restore, tier)})`,
  placing: () => "url(#loading)",
  loading: () => "url(#loading)",
  stored: () => "url(#stored)",
};

/** The bar. `compact` leaves out its scale. */
export function bar(restore, compact = false) {
  const share = (position) => `${(100 * position) / restore.promptTokens}%`;
  const drawing = s("svg", { "aria-hidden": "true", width: "100%", height: "100%" });
  for (const [start, end, state, tier] of runs(restore)) {
    const paint = PAINT[state]?.(restore, tier);
    if (!paint) continue;
    drawing.append(
      s("rect", { x: share(start), width: share(end - start), y: "0", height: "100%", fill: paint, class: state }),
    );
  }
  const track = h("div", { class: "track", role: "img", "aria-label": inWords(restore) }, drawing);
  const mark = (name, position) => {
    const element = h("span", { class: `mark ${name}`, "aria-hidden": "true" });
    element.style.left = share(position);
    track.append(element);
  };
  if (!restore.ended) {
    if (restore.front > 0) mark("front", restore.front);
    if (restore.back < restore.promptTokens) mark("back", restore.back);
  } else if (restore.metAt !== null) mark("met", restore.metAt);
  if (compact) return h("div", { class: "bar compact" }, track);
  const scale = h("div", { class: "scale", "aria-hidden": "true" }, h("span", {}, "0"));
  if (restore.ended && restore.metAt) {
    const label = h("span", { class: "at" }, `met at ${count(restore.metAt)}`);
    const place = restore.metAt / restore.promptTokens;
    label.style.left = share(restore.metAt);
    label.classList.add(place < 0.25 ? "right" : place > 0.72 ? "left" : "middle");
    scale.append(label);
  }
  scale.append(h("span", {}, count(restore.promptTokens)));
  return h("div", { class: "bar" }, track, scale);
}

/** What the bar shows, in a sentence. */
export function inWords(restore) {
  const { computed, loaded } = restore.covered;
  const parts = [`${count(computed)} computed from the start`, `${count(loaded)} loaded from the end`];
  const of = `of ${count(restore.promptTokens)} tokens`;
  if (!restore.ended) return `${parts.join(", ")}, ${of}, after ${seconds(restore.elapsed)}`;
  if (!loaded) return `All ${of.slice(3)} computed`;
  const met = restore.metAt === null ? "" : restore.metAt ? `; met at position ${count(restore.metAt)}` : "";
  return `${parts.join(", ")}, ${of}${met}`;
}

const [WIDE, HIGH] = [400, 130];

/** Position over time: the front rises, the back falls. Null if there is too little to draw. */
export function chart(restore) {
  const points = restore.points;
  const end = Math.max(restore.elapsed, points.at(-1)?.[0] ?? 0);
  if (points.length < 3 || !(end > 0)) return null;
  const x = (time) => ((WIDE * time) / end).toFixed(1);
  const y = (position) => (HIGH - (HIGH * position) / restore.promptTokens).toFixed(1);
  const line = (at) => points.map((point) => `${x(point[0])},${y(point[at])}`).join(" ");
  const last = points.at(-1);
  const drawing = s("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  drawing.append(
    s("polygon", { class: "front-area", points: `${x(points[0][0])},${HIGH} ${line(1)} ${x(last[0])},${HIGH}` }),
    s("polygon", { class: "back-area", points: `${x(points[0][0])},0 ${line(2)} ${x(last[0])},0` }),
    s("polyline", { class: "front-line", points: line(1) }),
    s("polyline", { class: "back-line", points: line(2) }),
  );
  const plot = h("div", { class: "plot" }, drawing);
  if (restore.ended && restore.metAt) {
    const meeting = points.find((point) => point[1] >= point[2] || point[1] >= restore.metAt) ?? last;
    const mark = h("span", { class: "mark met", "aria-hidden": "true" });
    mark.style.left = `${(100 * meeting[0]) / end}%`;
    mark.style.top = `${100 - (100 * restore.metAt) / restore.promptTokens}%`;
    plot.append(mark);
  }
  return h(
    "figure",
    { class: "chart" },
    h("div", { class: "axis", "aria-hidden": "true" }, h("span", {}, count(restore.promptTokens)), h("span", {}, "0")),
    plot,
    h("div", { class: "times", "aria-hidden": "true" }, h("span", {}, "0 s"), h("span", {}, seconds(end))),
    h("figcaption", {}, "Position in the prompt: computed up to the solid line, loaded from the dashed line on."),
  );
}
