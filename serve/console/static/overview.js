// The view Overview: served versions, how they were trained, metrics, variants and report.

import { ask, at, json, key, reportPath } from "./api.js";
import { bytes, card, element, facts, milliseconds, moment, note, number, percent, problem, table,
  tag } from "./dom.js";

const MOODS = { accepted: "good", refused: "bad", undecided: "warn", READY: "good" };
const CARD = "report/card.html";
// Order of the report's pictures, most informative first; others follow.
const ORDER = ["variants", "confusion", "values", "calibration", "curves", "mistakes", "data"];
// Classes that are named where they are few.
const FEW = 10;
const SECOND_MS = 1000;
// Pictures of this aspect ratio and above get the full width.
const WIDE = 1.8;

// versions: the model's entries in the repository's index; version: the one to show.
export async function show(place, model, signal, { versions, version, address }) {
  place.append(versionTable(versions, version, address));
  const body = element("div", { class: "stack" });
  place.append(body);
  try {
    const [manifest, metadata] = await Promise.all(
      ["/manifest", ""].map((part) => json(at(model, version) + part, { signal })));
    const served = metadata.parameters.variant;
    body.append(
      element("div", { class: "grid" },
        summary(model, version, manifest, served), metrics(manifest, served)),
      variants(manifest, served), pictures(model, version, manifest, signal));
  } catch (error) {
    if (error.name !== "AbortError") body.append(problem(error));
  }
}

function versionTable(versions, version, address) {
  const rows = versions.map((entry) => {
    const isShown = entry.version === version;
    const link = element("a", {
      href: address(entry.version), "aria-current": isShown ? "true" : null,
    }, entry.version || "–");
    const aliases = (entry.aliases ?? []).map((alias) =>
      [tag(alias, alias === "production" ? "accent" : ""), " "]);
    return [
      link,
      [aliases, entry.default ? tag("default") : null],
      [tag(entry.state, MOODS[entry.state] ?? "bad"), entry.reason ? ` ${entry.reason}` : ""],
    ];
  });
  return card("Versions",
    table("Served versions", [["version"], ["aliases"], ["state"]], rows));
}

function summary(model, version, manifest, served) {
  const { task, data } = manifest;
  const counts = ["train", "valid", "test"]
    .filter((split) => data[split]?.num_records !== undefined)
    .map((split) => `${number(data[split].num_records)} ${split}`);
  const { column, classes } = task.target;
  const links = element("p", { class: "links" });
  if (CARD in manifest.files) links.append(cardLink(model, version));
  links.append(element("a", { href: `${at(model)}/docs` }, "HTTP interface"));
  return card(`${manifest.name}, version ${version}`,
    facts([
      ["predicts", named(column, classes)],
      ["inputs", manifest.inputs.map(({ name }) => name).join(", ")],
      ["records", counts.join(", ")],
      ["source", data.train?.source],
      ["created", moment(manifest.created)],
      ["training time", milliseconds(manifest.training_seconds * SECOND_MS)],
      ["variant", `${served} (${manifest.variants[served].engine})`],
      ["optimized for", manifest.optimize_for],
      ["seed", String(manifest.seed)],
    ]), links);
}

// Returns what a column is predicted to be: a few names, or their number.
function named(column, classes) {
  if (!classes) return column;
  return classes.length > FEW ? `${column}, one of ${classes.length}` : `${column}: ${classes.join(", ")}`;
}

// With an API key the card is fetched and downloaded here, because a new tab would send no key.
function cardLink(model, version) {
  const path = reportPath(model, version, "card.html");
  return element("a", {
    href: path, target: "_blank", rel: "noopener",
    click: async (event) => {
      if (!key.get()) return;
      event.preventDefault();
      try {
        const address = URL.createObjectURL(await (await ask(path)).blob());
        element("a", { href: address, download: `${model}-${version}-card.html` }).click();
        setTimeout(() => URL.revokeObjectURL(address), SECOND_MS);
      } catch (error) {
        event.target.after(problem(error));
      }
    },
  }, "Model card");
}

function metrics(manifest, served) {
  const own = manifest.variants[served].metrics;
  const names = Object.keys(own)
    .filter((name) => name.startsWith("test_"))
    .map((name) => name.slice("test_".length));
  return card("Metrics",
    table("Metrics of the served variant",
      [["metric"], ["validation", true], ["test", true]],
      names.map((name) => [name, figure(own[`valid_${name}`]), figure(own[`test_${name}`])])),
    note("Metrics of the served variant. Training made no choice by the test split."));
}

// Returns the name of the main metric: the first one on the test split that is not the loss.
export function mainMetric(manifest) {
  const names = Object.keys(manifest.metrics).filter((name) => name.startsWith("test_"));
  return names.find((name) => name !== "test_loss") ?? names[0];
}

// Formats a metric with the same decimal places as the others in its column.
function figure(value) {
  return Math.abs(value) < 10 ? value.toFixed(4) : number(value);
}

function p50(variant) {
  return variant.profile.find(({ engine, threads, batch_size: size }) =>
    engine === variant.engine && threads === 1 && size === 1)?.p50_ms;
}

function variants(manifest, served) {
  const metric = mainMetric(manifest);
  const rows = Object.entries(manifest.variants).map(([name, variant]) => [
    [name, name === served ? [" ", tag("served", "accent")] : null],
    tag(variant.verdict, MOODS[variant.verdict]),
    figure(variant.metrics[metric]),
    milliseconds(p50(variant)),
    bytes(variant.size_bytes),
    percent(variant.agreement, 2),
    element("span", { class: "reason" }, variant.reason),
  ]);
  const skipped = Object.entries(manifest.skipped).map(([name, reason]) => [
    name, tag("not built"), "–", "–", "–", "–", element("span", { class: "reason" }, reason),
  ]);
  return card("Variants",
    table("Variants of this version", [
      ["variant"], ["gate"], [metric.replaceAll("_", " "), true], ["p50, one record", true],
      ["size", true], ["agreement with fp32", true], ["reason"],
    ], [...rows, ...skipped]));
}

function pictures(model, version, manifest, signal) {
  const names = Object.keys(manifest.files)
    .filter((file) => /^report\/[^/]+\.png$/.test(file))
    .map((file) => file.slice("report/".length, -".png".length));
  if (!names.length) return card("Report", note("This version's bundle has no pictures."));
  const rank = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);
  names.sort((one, other) => rank(one) - rank(other));
  return card("Report", element("div", { class: "pictures" },
    names.map((name) => picture(reportPath(model, version, `${name}.png`), name, signal))));
}

// Fetches the picture, because an img element would send no API key.
function picture(path, name, signal) {
  const image = element("img", { alt: `Report picture: ${name}` });
  const link = element("a", { target: "_blank" }, image);
  const framed = element("figure", {}, link, element("figcaption", {}, name));
  image.addEventListener("load", () => {
    framed.classList.toggle("wide", image.naturalWidth > WIDE * image.naturalHeight);
  });
  ask(path, { signal })
    .then((answer) => answer.blob())
    .then((blob) => {
      link.href = image.src = URL.createObjectURL(blob);
      signal.addEventListener("abort", () => URL.revokeObjectURL(image.src));
    })
    .catch((error) => {
      if (error.name !== "AbortError") link.replaceWith(problem(error));
    });
  return framed;
}
