// The view Try it: sends one record to the route that all clients use and shows the prediction.

import { at, json } from "./api.js";
import { bars } from "./chart.js";
import { card, element, milliseconds, note, number, percent, problem } from "./dom.js";
import { field, inputsOf } from "./form.js";

const MAX_BARS = 12;

export async function show(place, model, signal, { versions, version, address }) {
  let manifest;
  try {
    manifest = await json(`${at(model, version)}/manifest`, { signal });
  } catch (error) {
    if (error.name !== "AbortError") place.append(problem(error));
    return;
  }
  const fields = inputsOf(manifest).map(field);
  const answer = element("div", { "aria-live": "polite" }, note("The prediction appears here."));
  const send = element("button", { type: "submit" }, "Predict");
  const form = element("form", { class: "record", novalidate: true },
    versionPick(versions, version, address),
    fields.map(({ node }) => node),
    element("p", { class: "buttons" }, send, fillButton(fields)));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = true;
    await predict({ model, version, manifest, fields, answer, signal });
    send.disabled = false;
  });
  // A model whose only input is an image predicts as soon as one is chosen.
  if (fields.length === 1) form.addEventListener("image-taken", () => form.requestSubmit());
  place.append(element("div", { class: "grid try" },
    card("Record", form), card("Prediction", answer)));
}

function versionPick(versions, version, address) {
  const select = element("select", {
    id: "try-version", class: "control", change: () => { location.hash = address(select.value); },
  });
  for (const { version: number_, aliases = [] } of versions) {
    const words = aliases.length ? `${number_} (${aliases.join(", ")})` : number_;
    select.append(element("option", { value: number_, selected: number_ === version }, words));
  }
  return element("div", { class: "field" },
    element("label", { for: "try-version" }, "version"), select);
}

function fillButton(fields) {
  const isUseful = fields.some(({ input }) => !["image", "text"].includes(input.kind));
  return isUseful ? element("button", {
    type: "button", class: "quiet",
    click: () => fields.forEach((each) => each.fill()),
  }, "Fill in typical values") : null;
}

async function predict({ model, version, manifest, fields, answer, signal }) {
  for (const { control } of fields) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
  try {
    const inputs = await Promise.all(fields.map((each) => each.tensor()));
    const began = performance.now();
    const said = await json(`${at(model, version)}/infer`, { method: "POST", body: { inputs }, signal });
    const words = `Version ${said.model_version} responded in ` +
      `${milliseconds(performance.now() - began)}, including the network.`;
    answer.replaceChildren(...prediction(said.outputs, manifest), note(words));
  } catch (error) {
    if (error.name === "AbortError") return;
    const said = problem(error);
    said.id = "what-is-wrong";
    answer.replaceChildren(said);
    point(fields, error.message);
  }
}

// Marks and focuses the field that an error message names.
function point(fields, words) {
  const wrong = fields.find(({ input }) =>
    words.includes(`field '${input.name}'`) || words.includes(`input '${input.name}'`));
  if (!wrong) return;
  wrong.control.setAttribute("aria-invalid", "true");
  wrong.control.setAttribute("aria-describedby", "what-is-wrong");
  wrong.control.focus();
}

function prediction(outputs, manifest) {
  const byName = Object.fromEntries(outputs.map(({ name, data }) => [name, data]));
  const { column, classes } = manifest.task.target;
  const parts = [];
  for (const [name, data] of Object.entries(byName)) {
    if (name === "probabilities") continue;
    const words = typeof data[0] === "number" ? number(data[0], 5) : String(data[0]);
    const of = ["label", "value"].includes(name) ? column : name;
    parts.push(element("p", { class: "big" }, element("span", { class: "help" }, of), words));
  }
  if (byName.probabilities) {
    const names = classes ?? byName.probabilities.map((_, index) => String(index));
    parts.push(...probabilityBars(names, byName.probabilities));
  }
  return parts;
}

function probabilityBars(names, probabilities) {
  const ranked = names.map((name, index) => ({ name, value: probabilities[index] }))
    .sort((one, other) => other.value - one.value);
  const rows = ranked.slice(0, MAX_BARS)
    .map(({ name, value }, rank) => ({ name, value, words: percent(value), mood: rank ? "" : "accent" }));
  const left = ranked.slice(MAX_BARS);
  const most = left.length
    ? note(`${left.length} more classes, each at most ${percent(left[0].value)}.`) : null;
  return [bars(rows, 1, "Probabilities"), most].filter(Boolean);
}
