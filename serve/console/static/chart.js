// Small charts: lines over time, bars, intervals and distributions.

import { element, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [300, 90];

// A line chart of the last `spanS` seconds.
// series: names of the lines; format: returns a value as text. update(points): [{time, values}],
// with null for a gap.
export class Lines {
  constructor(title, series, format, spanS) {
    Object.assign(this, { title, series, format, spanS });
    this.values = series.map(() => element("b", {}, "–"));
    this.top = element("span", { class: "axis most" });
    this.paths = series.map((_, index) =>
      svg("path", { class: `line tone${index}`, "vector-effect": "non-scaling-stroke" }));
    const rules = [0, 0.5, 1].map((share) =>
      svg("path", {
        class: "rule",
        d: `M0 ${1 + share * (HEIGHT - 2)}H${WIDTH}`,
        "vector-effect": "non-scaling-stroke",
      }));
    this.picture = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    }, rules, this.paths);
    const legend = series.map((name, index) =>
      element("span", { class: "key" },
        series.length > 1 ? element("i", { class: `swatch tone${index}` }) : null,
        name, " ", this.values[index]));
    this.node = element("section", { class: "card chart" },
      element("h2", {}, title),
      element("p", { class: series.length > 1 ? "legend several" : "legend" }, legend),
      element("div", { class: "plot" }, this.picture, this.top),
      element("p", { class: "axis ends" },
        element("span", {}, `${Math.round(spanS / 60)} min ago`), element("span", {}, "now")));
  }

  update(points, now) {
    const known = points.flatMap((point) => point.values).filter(Number.isFinite);
    const most = ceiling(Math.max(0, ...known));
    const last = points.at(-1)?.values ?? [];
    const place = (time, value) => {
      const x = WIDTH * (1 - (now - time) / (this.spanS * 1000));
      return `${x.toFixed(1)} ${(1 + (HEIGHT - 2) * (1 - value / most)).toFixed(1)}`;
    };
    this.paths.forEach((path, index) => {
      let isDown = false;
      const steps = points.map(({ time, values }) => {
        const value = values[index];
        const step = Number.isFinite(value) ? `${isDown ? "L" : "M"}${place(time, value)}` : "";
        isDown = step !== "";
        return step;
      });
      path.setAttribute("d", steps.join(""));
      this.values[index].textContent = this.format(last[index]);
    });
    this.top.textContent = known.length ? this.format(most) : "";
    const words = this.series.map((name, index) => `${name} ${this.format(last[index])}`.trim());
    this.picture.setAttribute("aria-label", `${this.title}: ${words.join(", ")}`);
  }
}

// Returns the smallest round number that is not below a value.
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

// A bar chart; each row has a name, a bar on a scale from 0 to `most`, and a text.
// bars: [{name, value, words, mood, mark}]; mark: value at which a line is drawn across the bar.
export function bars(bars, most, label) {
  return element("ul", { class: "bars", "aria-label": label },
    bars.map(({ name, value, words, mood = "", mark = null }) => {
      const filled = element("span", { class: `filled ${mood}` });
      filled.style.width = `${Math.min(100, Math.max(0, (100 * value) / most))}%`;
      const track = element("span", { class: "track" }, filled);
      if (mark !== null) {
        const line = element("span", { class: "mark" });
        line.style.left = `${Math.min(100, (100 * mark) / most)}%`;
        track.append(line);
      }
      return element("li", {},
        element("span", { class: "name" }, name), track, element("span", { class: "words" }, words));
    }));
}

// A value with its interval, on a scale [from, to] that several charts share.
export function interval({ value, low, high }, [from, to], label) {
  const x = (at) => ((at - from) / (to - from || 1)) * 196 + 2;
  return svg("svg", { class: "interval", viewBox: "0 0 200 16", role: "img", "aria-label": label },
    svg("path", { class: "rule", d: "M0 8H200" }),
    svg("path", { class: "reach", d: `M${x(low)} 8H${x(high)}M${x(low)} 3V13M${x(high)} 3V13` }),
    svg("circle", { class: "point", cx: x(value), cy: 8, r: 4 }));
}

// Two distributions over the same bins: the training data as steps, the current window as bars.
export function shares(reference, current, label) {
  const count = Math.max(reference.length, current.length, 1);
  const most = Math.max(...reference, ...current, 1e-9);
  const [wide, high] = [200 / count, 40];
  const y = (share) => high * (1 - share / most);
  const outline = reference.map((share, bin) => `L${bin * wide} ${y(share)}H${(bin + 1) * wide}`);
  return svg("svg", {
    class: "shares", viewBox: `0 0 200 ${high}`, preserveAspectRatio: "none",
    role: "img", "aria-label": label,
  },
  current.map((share, bin) => svg("rect", {
    class: "now", x: bin * wide + 0.5, width: Math.max(wide - 1, 0.5), y: y(share),
    height: high - y(share),
  })),
  svg("path", { class: "then", d: `M0 ${high}${outline.join("")}V${high}`, "vector-effect": "non-scaling-stroke" }));
}
