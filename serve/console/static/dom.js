// Builds elements from data. Data become text or attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";

// element("td", {class: "number"}, "12"). Children are nodes, strings, lists of them, or null.
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

export function card(title, ...children) {
  return element("section", { class: "card" }, element("h2", {}, title), children);
}

// A table that can be scrolled, also by keyboard, if the page is narrower.
// columns: [heading, true for numbers]; rows: lists of cells, or "tr" elements.
export function table(caption, columns, rows) {
  const head = columns.map(([heading, isNumber]) =>
    element("th", { scope: "col", class: isNumber ? "number" : null }, heading),
  );
  const body = rows.map((cells) => {
    if (cells instanceof Node) return cells;
    return element("tr", {}, cells.map((cell, index) =>
      element(index ? "td" : "th", {
        scope: index ? null : "row",
        class: columns[index][1] ? "number" : null,
      }, cell),
    ));
  });
  return element(
    "div",
    { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    element("table", {},
      element("caption", { class: "unseen" }, caption),
      element("thead", {}, element("tr", {}, head)),
      element("tbody", {}, body)),
  );
}

export function tag(words, mood = "") {
  return element("span", { class: `tag ${mood}` }, words);
}

export function note(...words) {
  return element("p", { class: "note" }, words);
}

// A list of [term, value] pairs, without those that have no value.
export function facts(pairs) {
  return element("dl", { class: "facts" },
    pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([word, value]) => element("div", {}, element("dt", {}, word), element("dd", {}, value))));
}

export function problem(error) {
  return element("p", { class: "problem", role: "alert" }, error.message ?? String(error));
}

// Formats of numbers; a missing value is a dash.

export function number(value, digits = 4) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

export function percent(share, digits = 1) {
  return Number.isFinite(share) ? `${(share * 100).toFixed(digits)} %` : "–";
}

export function bytes(size) {
  if (!Number.isFinite(size)) return "–";
  for (const [unit, worth] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (size >= worth) return `${(size / worth).toPrecision(3)} ${unit}`;
  }
  return `${size} B`;
}

export function milliseconds(ms) {
  if (!Number.isFinite(ms)) return "–";
  if (ms >= 1000) return `${(ms / 1000).toPrecision(3)} s`;
  return `${ms >= 100 ? Math.round(ms) : Number(ms.toPrecision(ms < 0.1 ? 2 : 3))} ms`;
}

export function moment(iso) {
  const time = new Date(iso);
  return Number.isNaN(time.getTime()) ? String(iso ?? "–") : time.toLocaleString("sv").slice(0, 16);
}
