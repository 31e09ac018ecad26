// The view Live: rates, latencies and drift, computed from successive polls of /metrics.

import { ask } from "./api.js";
import { bars, Lines } from "./chart.js";
import { card, element, milliseconds, note, number, problem } from "./dom.js";
import { Counters, parse, quantile, sum, sumBy } from "./prometheus.js";

const POLL_MS = 2000;
const SPAN_S = 240;
// A multiple of four seconds, the interval of the replicas' reports; otherwise rates would vary
// with the number of reports in the window.
const WINDOW_S = 12;
const PROTOCOLS = ["v1", "v2", "grpc"];
const MAX_FEATURES = 40;

// Shows a model until the signal aborts.
export function show(place, model, signal) {
  const rate = (value) => (Number.isFinite(value) ? `${number(value, 3)}/s` : "–");
  const charts = {
    requests: new Lines("Requests", [""], rate, SPAN_S),
    latency: new Lines("Latency", ["p50", "p95", "p99"], milliseconds, SPAN_S),
    batch: new Lines("Mean rows per batch", [""], (value) => number(value, 3), SPAN_S),
    refused: new Lines("Refused", [""], rate, SPAN_S),
    errors: new Lines("Errors", [""], rate, SPAN_S),
    queue: new Lines("Rows waiting", [""], (value) => number(value, 3), SPAN_S),
  };
  const state = element("p", { class: "note", role: "status" }, "Waiting for the first metrics.");
  const reasons = note("");
  const drift = element("div", {});
  charts.refused.node.append(reasons);
  charts.errors.node.append(
    note("Responses with status 500 and above, except refusals (503, 504)."));
  place.append(state,
    element("div", { class: "grid charts" }, Object.values(charts).map(({ node }) => node)),
    card("Drift", drift));
  const watch = new Watch(model);

  async function poll() {
    try {
      const text = await (await ask("/metrics", { signal })).text();
      const { points, figures, replicas } = watch.take(parse(text), Date.now());
      for (const [name, chart] of Object.entries(charts)) {
        const own = points.map(({ time, values }) => ({ time, values: values[name] ?? [] }));
        chart.update(own, Date.now());
      }
      state.textContent = `${replicas} ${replicas === 1 ? "replica" : "replicas"}. The charts begin ` +
        `when this view is opened; rates and percentiles cover the last ${WINDOW_S} seconds.`;
      const refused = Object.entries(figures.reasons ?? {}).sort((one, other) => other[1] - one[1]);
      const words = refused.map(([reason, count]) => `${reason} ${number(count)}`).join(", ");
      reasons.textContent = words ? `Total: ${words}` : "";
      drift.replaceChildren(...driftBars(figures.drift));
    } catch (error) {
      if (error.name !== "AbortError") state.replaceChildren(problem(error));
    }
  }
  whileSeen(poll, POLL_MS, signal, () => watch.pause());
}

// Calls a function every `everyMs` milliseconds while the page is visible, and `hidden` when the
// page is hidden.
export function whileSeen(call, everyMs, signal, hidden = () => {}) {
  let timer = null;
  const again = async () => {
    clearTimeout(timer);
    await call();
    clearTimeout(timer);
    if (!signal.aborted && !document.hidden) timer = setTimeout(again, everyMs);
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
      hidden();
    } else again();
  }, { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  again();
}

// The metrics of one model over successive polls.
export class Watch {
  #counters = new Counters();
  #polls = [];
  #points = [];

  constructor(model) {
    this.model = model;
  }

  // The page is hidden: leaves a gap in the lines.
  pause() {
    this.#polls = [];
    this.#points.push({ time: Date.now(), values: {} });
    this.#counters = new Counters();
  }

  // Adds a poll; returns the points to draw, the latest figures and the number of replicas.
  take(samples, time) {
    const own = samples.filter(({ labels }) => labels.model === this.model);
    const risen = this.#counters.advance(own);
    this.#polls.push({ time, risen });
    // The first poll only marks the beginning of the window.
    while (this.#polls.length > 2 && time - this.#polls[1].time >= WINDOW_S * 1000 - POLL_MS / 2) {
      this.#polls.shift();
    }
    const figures = { ...this.#figures(own), drift: drifted(own) };
    this.#points.push({ time, values: figures.values });
    this.#points = this.#points.filter((point) => time - point.time <= SPAN_S * 1000);
    const replicas = new Set(own.map(({ labels }) => labels.replica).filter(Boolean)).size;
    return { points: this.#points, figures, replicas };
  }

  #figures(own) {
    const seconds = (this.#polls.at(-1).time - this.#polls[0].time) / 1000;
    const queue = [sum(own, "halyard_queue_rows")];
    if (seconds <= 0) return { values: { queue }, reasons: {} };
    const risen = this.#polls.slice(1).flatMap((poll) => poll.risen);
    const predictions = ({ protocol }) => PROTOCOLS.includes(protocol);
    const failed = ({ status }) => Number(status) >= 500 && !["503", "504"].includes(status);
    const total = ({ stage }) => stage === "total";
    const counts = sumBy(risen, "halyard_request_seconds_bucket", "le", total);
    const batches = sum(risen, "halyard_batch_rows_count");
    return {
      values: {
        requests: [sum(risen, "halyard_requests_total", predictions) / seconds],
        latency: [0.5, 0.95, 0.99].map((share) => {
          const found = quantile(share, counts);
          return found === null ? null : found * 1000;
        }),
        batch: [batches ? sum(risen, "halyard_batch_rows_sum") / batches : null],
        refused: [sum(risen, "halyard_refused_total") / seconds],
        errors: [sum(risen, "halyard_requests_total", failed) / seconds],
        queue,
      },
      reasons: sumBy(own, "halyard_refused_total", "reason"),
    };
  }
}

// Returns [{feature, version, score, threshold}], the largest ratio of the two first.
export function drifted(samples) {
  const found = new Map();
  for (const { name, labels, value } of samples) {
    const part = { halyard_drift_score: "score", halyard_drift_threshold: "threshold" }[name];
    if (!part) continue;
    const id = JSON.stringify([labels.version, labels.feature]);
    const entry = found.get(id) ?? { feature: labels.feature, version: labels.version };
    // If several replicas export the metric, the largest value counts.
    entry[part] = Math.max(entry[part] ?? -Infinity, value);
    found.set(id, entry);
  }
  return [...found.values()]
    .filter(({ score, threshold }) => Number.isFinite(score) && threshold > 0)
    .sort((one, other) => other.score / other.threshold - one.score / one.threshold);
}

function driftBars(features) {
  if (!features.length) {
    return [note("No drift data: monitoring is off or has not completed a window of requests yet.")];
  }
  const several = new Set(features.map(({ version }) => version)).size > 1;
  const rows = features.slice(0, MAX_FEATURES).map(({ feature, version, score, threshold }) => ({
    name: several ? `${feature} (${version})` : feature,
    value: score / threshold,
    mark: 1,
    mood: score > threshold ? "bad" : "good",
    words: `${number(score, 2)} of ${number(threshold, 2)}${score > threshold ? ", drift" : ""}`,
  }));
  const over = features.filter(({ score, threshold }) => score > threshold).length;
  return [
    note(`${over} of ${features.length} features drift. The line marks the threshold; a full bar ` +
      "is twice the threshold."),
    bars(rows, 2, "Drift by feature"),
  ];
}
