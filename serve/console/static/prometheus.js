// Parses the response of /metrics and computes increases, sums and quantiles.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

// Returns [{name, labels, value, id}]; id: name and labels as they are written.
export function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.startsWith("#") ? null : SAMPLE.exec(line);
    if (found === null) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[\\"n]/g, (pair) => ESCAPED[pair]);
    }
    const value = found[3] === "+Inf" ? Infinity : Number(found[3]);
    samples.push({ name: found[1], labels, value, id: `${found[1]}{${found[2] ?? ""}}` });
  }
  return samples;
}

// Increases of counters between polls, also if processes restart or are added.
export class Counters {
  #last = null;

  // Returns the samples that rose since the last poll, with their increase as value; none for the
  // first poll.
  advance(samples) {
    const first = this.#last === null;
    this.#last ??= new Map();
    const risen = [];
    for (const sample of samples) {
      const before = this.#last.get(sample.id) ?? 0;
      this.#last.set(sample.id, sample.value);
      // A counter that fell has restarted from 0, with its replica.
      const rise = sample.value >= before ? sample.value - before : sample.value;
      if (!first && rise > 0) risen.push({ ...sample, value: rise });
    }
    return risen;
  }
}

export function sum(samples, name, matches = () => true) {
  return samples.reduce(
    (total, { name: its, labels, value }) =>
      its === name && matches(labels) ? total + value : total, 0);
}

// Returns the sum of a metric for each value of a label.
export function sumBy(samples, name, label, matches = () => true) {
  const sums = {};
  for (const sample of samples) {
    if (sample.name !== name || !matches(sample.labels)) continue;
    const of = sample.labels[label];
    sums[of] = (sums[of] ?? 0) + sample.value;
  }
  return sums;
}

// Returns a quantile like Prometheus' histogram_quantile, interpolated linearly within a bucket.
// counts: {upper bound: number of values up to it}. Returns null without values.
export function quantile(share, counts) {
  const buckets = Object.entries(counts)
    .map(([le, count]) => [le === "+Inf" ? Infinity : Number(le), count])
    .sort((one, other) => one[0] - other[0]);
  const total = buckets.at(-1)?.[1] ?? 0;
  if (!total) return null;
  const rank = share * total;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= rank && count > below) {
      return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (count - below);
    }
    [low, below] = [bound, Math.max(below, count)];
  }
  return low;
}
