// The console: choice of model and view, and entry of the API key.
//
// The URL's fragment names what is shown: #/MODEL/VIEW, and for a version #/MODEL/VIEW/VERSION.

import { json, key } from "./api.js";
import { element, problem } from "./dom.js";
import * as live from "./live.js";
import * as overview from "./overview.js";
import * as rollout from "./rollout.js";
import * as tryit from "./tryit.js";

const VIEWS = {
  overview: ["Overview", overview],
  try: ["Try it", tryit],
  live: ["Live", live],
  rollout: ["Rollout", rollout],
};
const main = document.getElementById("main");
const picker = document.getElementById("model");
const login = document.getElementById("login");
let leaving = new AbortController();

function address(model, view, version = null) {
  return "#/" + [model, view, version].filter(Boolean).map(encodeURIComponent).join("/");
}

function wanted() {
  try {
    return location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  } catch {
    // The fragment has an incomplete escape sequence.
    return [];
  }
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  try {
    const [{ models }, index] = await Promise.all([
      json("/v2/models", { signal }), json("/v2/repository/index", { method: "POST", signal })]);
    signal.throwIfAborted();
    const [given, part, version] = wanted();
    const model = models.includes(given) ? given : models[0];
    const view = part in VIEWS ? part : "overview";
    const versions = index.filter(({ name }) => name === model);
    header(models, model, view);
    const place = element("div", { class: "stack" });
    main.replaceChildren(element("h1", { class: "unseen" }, `${model}: ${VIEWS[view][0]}`), place);
    await VIEWS[view][1].show(place, model, signal, {
      versions,
      version: chosen(versions, version),
      address: (other) => address(model, view, other),
    });
  } catch (error) {
    if (error.name !== "AbortError" && error.status !== 401) main.replaceChildren(problem(error));
  }
}

// Returns the requested version, by number or alias, or otherwise the default version.
function chosen(versions, asked) {
  const found =
    versions.find(({ version, aliases }) => version === asked || aliases?.includes(asked)) ??
    versions.find((entry) => entry.default) ?? versions[0];
  return found?.version || null;
}

function header(models, model, view) {
  picker.replaceChildren(...models.map((name) =>
    element("option", { value: name, selected: name === model }, name)));
  const links = Object.entries(VIEWS).map(([name, [words]]) =>
    element("a", {
      href: address(model, name), "aria-current": name === view ? "page" : null,
    }, words));
  const views = document.getElementById("views");
  const focused = [...views.children].indexOf(document.activeElement);
  views.replaceChildren(...links);
  links[focused]?.focus();
  document.title = `${VIEWS[view][0]} · ${model} · Halyard`;
  login.hidden = true;
  main.hidden = document.getElementById("pick").hidden = false;
  document.getElementById("forget").hidden = !key.get();
}

picker.addEventListener("change", () => {
  location.hash = address(picker.value, wanted()[1] in VIEWS ? wanted()[1] : "overview");
});
addEventListener("hashchange", () => {
  // Other fragments are links within the page.
  if (location.hash === "" || location.hash.startsWith("#/")) show();
});
addEventListener("key-needed", ({ detail }) => {
  leaving.abort();
  document.getElementById("login-why").textContent = key.get() ? detail : "";
  main.hidden = true;
  login.hidden = false;
  document.getElementById("key").focus();
});
login.addEventListener("submit", (event) => {
  event.preventDefault();
  const given = document.getElementById("key");
  key.set(given.value.trim());
  given.value = "";
  show();
});
document.getElementById("forget").addEventListener("click", () => {
  key.forget();
  show();
});
show();
