// The view Rollout: candidate against production, decisions, and monitoring of each version.

import { at, json } from "./api.js";
import { interval, shares } from "./chart.js";
import { card, element, facts, milliseconds, moment, note, number, percent, problem, table, tag }
  from "./dom.js";
import { whileSeen } from "./live.js";

const POLL_MS = 5000;
const MAX_WINDOWS = 20;

export function show(place, model, signal) {
  const body = element("div", { class: "stack" });
  place.append(body);
  let last = null;
  whileSeen(async () => {
    try {
      const said = await json(`${at(model)}/stats`, { signal });
      const parts = { rollout: said.rollout, decisions: said.decisions, monitor: said.monitor };
      const text = JSON.stringify(parts);
      // Unchanged content is not replaced, so that selections and open details stay.
      if (text !== last) body.replaceChildren(...all(parts));
      last = text;
    } catch (error) {
      if (error.name === "AbortError") return;
      body.replaceChildren(problem(error));
      last = null;
    }
  }, POLL_MS, signal);
}

function all({ rollout, decisions, monitor }) {
  const versions = Object.entries(monitor ?? {});
  return [
    card("Candidate against production", rollout ? comparison(rollout) : note(
      "No candidate is being compared with production.")),
    card("Decisions", decisions?.length ? history(decisions) : note("No decisions yet.")),
    ...(versions.length
      ? versions.map(([version, seen]) => card(`Monitor, version ${version}`, monitored(seen)))
      : [card("Monitor", note("There are no data yet, or monitoring is off."))]),
  ];
}

function comparison(rollout) {
  const [own, other] = [rollout.production ?? {}, rollout.candidate_figures ?? {}];
  const words = rollout.phase === "canary"
    ? `answers ${percent(rollout.share, 0)} of the clients`
    : "receives copies of requests; its responses are not returned";
  const scale = reach([own, other]);
  const row = (name, show) => [name, show(own, "production"), show(other, "candidate")];
  return [
    element("p", {}, tag(rollout.phase ?? "rollout", "accent"), " Version ",
      element("b", {}, String(rollout.candidate)), ` ${words}.`),
    facts([
      ["compared rows", number(rollout.compared)],
      ["agreement", percent(rollout.agreement, 2)],
      ["decision", rollout.decision ?? "none yet"],
    ]),
    table("Metrics of production and candidate",
      [["metric"], ["production", true], ["candidate", true]], [
        row("accuracy", (figures, of) => accuracy(figures, scale, of)),
        row("p50", ({ p50_ms }) => milliseconds(p50_ms)),
        row("p95", ({ p95_ms }) => milliseconds(p95_ms)),
        row("errors", ({ errors }) => number(errors)),
      ]),
  ];
}

function reach(all) {
  const ends = all.flatMap(({ low, high }) => [low, high]).filter(Number.isFinite);
  return [Math.min(...ends), Math.max(...ends)];
}

function accuracy({ accuracy: value, low, high }, scale, of) {
  if (!Number.isFinite(value)) return "–";
  if (!Number.isFinite(low) || !Number.isFinite(high)) return number(value);
  const words = `${number(value)} [${number(low)}, ${number(high)}]`;
  return [words, element("br"), interval({ value, low, high }, scale, `${of}: ${words}`)];
}

function history(decisions) {
  const moods = { promoted: "good", "rolled back": "bad", refused: "warn" };
  const rows = [...decisions].reverse().map(({ time, version, decision, reason, figures }) => [
    moment(time), String(version), tag(decision, moods[decision]),
    [element("span", { class: "reason" }, reason ?? ""), figures ? element("details", {},
      element("summary", {}, "Figures"), nested(figures)) : null],
  ]);
  return table("Decisions, latest first", [["time"], ["version"], ["decision"], ["reason"]], rows);
}

// A nested list of figures by name.
function nested(value) {
  return facts(Object.entries(value).map(([name, of]) => [
    name.replaceAll("_", " "),
    of !== null && typeof of === "object" ? nested(of) : typeof of === "number" ? number(of) : String(of ?? "–"),
  ]));
}

function monitored({ windows = [], current = null, features = {}, feedback = null }) {
  const past = windows.slice(-MAX_WINDOWS).reverse();
  const alarmed = windows.filter(({ alarms }) => alarms?.length).length;
  return [
    facts([
      ["current window", current && `${number(current.rows)} of ${number(current.of)} rows`],
      ["past windows", windows.length && `${windows.length}, ${alarmed} with alarms`],
      ["feedback", feedback && feedbackWords(feedback)],
    ]),
    Object.keys(features).length ? featureTable(features) : null,
    past.length ? table("Windows, latest first", [["time"], ["rows", true], ["alarms"]],
      past.map(({ time, rows, alarms }) => [
        moment(time), number(rows), alarms?.length ? alarms.map(alarm) : "none",
      ])) : note("No complete window yet."),
  ];
}

function alarm({ feature, statistic, score, threshold }) {
  return element("span", { class: "each" },
    tag(feature, "bad"), ` ${statistic} ${number(score, 3)}, threshold ${number(threshold, 3)}`);
}

function feedbackWords({ count, metric, value, low, high, expected }) {
  const range = Number.isFinite(low) ? ` [${number(low)}, ${number(high)}]` : "";
  return `${metric} ${number(value)}${range} on ${number(count)} labelled rows; ` +
    `${number(expected)} on the test split`;
}

function featureTable(features) {
  const rows = Object.entries(features).map(([name, seen]) => {
    const statistics = Object.entries(seen.statistics ?? {}).map(([statistic, { score, threshold }]) =>
      element("span", { class: "each" }, `${statistic} `,
        tag(number(score, 3), score > threshold ? "bad" : "good"), ` of ${number(threshold, 3)}`));
    const drawn = seen.reference?.length && seen.window?.length && !Array.isArray(seen.window[0])
      ? shares(seen.reference, seen.window, `${name}: training as a line, window as bars`) : "";
    return [name, statistics, drawn, percent(seen.missing), percent(seen.out_of_range)];
  });
  return table("Features in the last window", [
    ["feature"], ["statistics"], ["training (line), window (bars)"], ["missing", true], ["out of range", true],
  ], rows);
}
