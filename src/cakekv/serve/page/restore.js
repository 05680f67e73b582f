// One restore: what the server told of it while it went on, and of its end.

const POINTS = 80; // of the curve of both ends
const RUNS = 300; // of spans, loads and bands that are kept

export class Restore {
  /** Made from nothing but its request's id, or from what `toJSON` kept. */
  constructor(fields) {
    Object.assign(
      this,
      { began: Date.now(), mode: "", promptTokens: 1, prefixTokens: 0, front: 0, back: 1, elapsed: 0, bands: [] },
      { tiers: [], loads: [], points: [], ended: false, failure: "", metAt: null, figures: null, misses: [], notes: [] },
      fields,
    );
  }

  /** Tokens by how they are covered. */
  get covered() {
    const sums = { computed: 0, loaded: 0 };
    for (const [start, end, state] of this.bands) if (state in sums) sums[state] += end - start;
    return sums;
  }

  /** An event of `cakekv.results.Progress`. */
  progress(said) {
    this.mode = said.mode;
    this.promptTokens = said.prompt_tokens;
    this.prefixTokens = said.prefix_tokens;
    this.front = said.front;
    this.back = said.back;
    this.bands = said.bands;
    this.elapsed = said.elapsed_s;
    this.points = thinned([...this.points, [said.elapsed_s, said.front, Math.max(said.front, said.back)]]);
  }

  /** The restore's report. */
  finish(report) {
    this.ended = true;
    this.mode = report.mode;
    this.promptTokens = report.prompt_tokens;
    this.prefixTokens = report.prefix_tokens;
    this.metAt = report.met_at;
    this.elapsed = report.ttft_s;
    this.misses = merged(report.misses);
    this.notes = report.notes;
    const placed = report.loads.filter((load) => load.outcome === "placed");
    this.loads = joined(placed.map(({ start, tokens, source }) => ({ start, tokens, source })));
    this.tiers = Object.keys(report.bytes_by_tier).filter((tier) => report.bytes_by_tier[tier] > 0);
    this.bands = bandsOf(report, this.loads);
    const points = report.frontiers.map(({ time_s, front, back }) => [time_s, front, Math.max(front, back)]);
    if (points.length) this.points = thinned(points);
    this.figures = {
      computed: report.computed_tokens,
      loaded: report.loaded_tokens,
      bytes: report.bytes_by_tier,
      ttft: report.ttft_s,
      all: report.compute_all_s ?? null,
      lossy: report.lossy_tokens,
      recomputed: report.recomputed_tokens,
      wasted: report.wasted_bytes,
    };
  }

  fail(why) {
    this.ended = true;
    this.failure = why;
  }

  toJSON() {
    return { ...this, bands: this.bands.slice(0, RUNS), loads: this.loads.slice(0, RUNS) };
  }
}

/** Every other point of too many, and the last. */
const thinned = (points) =>
  points.length <= POINTS ? points : thinned(points.filter((_, place) => place % 2 === 0 || place === points.length - 1));

/** Loads by position, those side by side from the same tier as one. */
function joined(loads) {
  const runs = [];
  for (const load of loads.sort((one, other) => one.start - other.start)) {
    const last = runs.at(-1);
    if (last?.source === load.source && last.start + last.tokens >= load.start) {
      last.tokens = Math.max(last.tokens, load.start + load.tokens - last.start);
    } else runs.push({ ...load });
  }
  return runs;
}

/** What was computed although it might have been loaded: tokens by reason. */
function merged(misses) {
  const sums = new Map();
  for (const miss of misses) sums.set(miss.reason, (sums.get(miss.reason) ?? 0) + miss.tokens);
  return [...sums];
}

/** Everything that was not loaded was computed. */
function bandsOf(report, loads) {
  const bands = [];
  let at = 0;
  const computed = (end) => end > at && bands.push([at, end, "computed"]);
  for (const { start, tokens } of loads) {
    computed(start);
    bands.push([start, start + tokens, "loaded"]);
    at = start + tokens;
  }
  computed(report.prompt_tokens);
  return bands;
}
