// A form for one record, built from a model's inputs, and the tensors of its values.

import { element } from "./dom.js";

const MAX_OFFERED = 1000;
const WHOLE_LIST = 12;

// Returns a description of each input: {name, datatype, shape, kind, …}; kind: image, number,
// boolean, date, category, text, or tensor for a custom encoder.
export function inputsOf(manifest) {
  const known = new Map();
  for (const encoder of manifest.task.features ?? []) {
    if (encoder.kind === "image") {
      known.set(encoder.column, { kind: "image", optional: encoder.optional });
    } else if (encoder.kind === "numbers") {
      numbers(encoder, known);
    } else if (encoder.kind === "categories") {
      encoder.columns.forEach((column, index) =>
        known.set(column, { kind: "category", names: encoder.names[index] ?? [] }));
    } else if (encoder.kind === "tokens") {
      encoder.columns.forEach((column) => known.set(column, { kind: "text" }));
    }
  }
  return manifest.inputs.map((tensor) => ({
    ...tensor, ...(known.get(tensor.name) ?? guess(tensor)),
  }));
}

// Finds the mean of each column of numbers. A number or boolean has one encoded value, a vector one per
// element and a set one per label; the first date has seven and each further date eight, of which the
// first is the time.
function numbers({ columns, mean }, known) {
  const placesOfDate = 7;
  let place = 0;
  let hadDate = false;
  for (const { kind, column, format, length, labels } of columns) {
    if (kind === "vector") {
      known.set(column, { kind: "tensor", typical: mean.slice(place, place + length) });
    } else if (kind === "set") {
      known.set(column, { kind: "text", typical: labels[0] });
    } else {
      known.set(column, { kind, format, mean: mean[place] });
    }
    if (kind === "date") {
      place += placesOfDate + (hadDate ? 1 : 0);
      hadDate = true;
    } else {
      place += length ?? labels?.length ?? 1;
    }
  }
}

function guess({ datatype, shape }) {
  if (datatype === "UINT8" && shape.length === 4) return { kind: "image" };
  if (shape.length > 1) return { kind: "tensor" };
  return { kind: datatype === "BYTES" ? "text" : datatype === "BOOL" ? "boolean" : "number" };
}

// Returns a field of the form: {input, control, node, fill, tensor}. fill: enters a typical value;
// tensor: returns the value as a tensor of one row.
export function field(input) {
  return { image: imageField, category, text, boolean, date, tensor }[input.kind]?.(input) ?? plain(input);
}

let fields = 0;

function labelled(input, control, help = "") {
  const id = `field-${++fields}`;
  control.id = id;
  control.classList.add("control");
  return element("div", { class: `field ${input.kind}` },
    element("label", { for: id }, input.name, help ? element("span", { class: "help" }, help) : null),
    control);
}

// Returns a tensor of the Open Inference Protocol; null is a missing value.
function bytesTensor(input, value) {
  return { name: input.name, shape: [1], datatype: "BYTES", data: [value] };
}

function plain(input) {
  const control = element("input", { type: "text", inputmode: "decimal", autocomplete: "off",
    placeholder: "missing" });
  return {
    input, control, node: labelled(input, control, "number"),
    fill: () => { control.value = Number((input.mean ?? 0).toPrecision(3)); },
    tensor: () => {
      const words = control.value.trim();
      const value = Number(words);
      // Text that is not a number is sent unchanged, so that the server returns its error message.
      if (words === "" || Number.isNaN(value)) return bytesTensor(input, words || null);
      return { ...bytesTensor(input, value), datatype: "FP64" };
    },
  };
}

function choice(options) {
  return element("select", {}, options.map(([value, words]) => element("option", { value }, words)));
}

function boolean(input) {
  const control = choice([["", "missing"], ["true", "true"], ["false", "false"]]);
  return {
    input, control, node: labelled(input, control, "true or false"),
    fill: () => { control.value = input.mean >= 0.5 ? "true" : "false"; },
    tensor: () => bytesTensor(input, control.value || null),
  };
}

function date(input) {
  const control = element("input", { type: "text", autocomplete: "off",
    placeholder: input.format ?? "2026-11-22T18:30:00" });
  return {
    input, control, node: labelled(input, control, "date"),
    fill: () => {
      if (!input.format) control.value = new Date((input.mean ?? 0) * 1000).toISOString().slice(0, 19);
    },
    tensor: () => bytesTensor(input, control.value.trim() || null),
  };
}

function category(input) {
  const offered = input.names.slice(0, MAX_OFFERED);
  if (offered.length <= WHOLE_LIST) {
    const control = choice([["", "missing"], ...offered.map((name) => [name, name])]);
    return {
      input, control, node: labelled(input, control, "category"),
      fill: () => { control.value = offered[0] ?? ""; },
      tensor: () => bytesTensor(input, control.value || null),
    };
  }
  const list = element("datalist", { id: `names-${++fields}` },
    offered.map((name) => element("option", { value: name })));
  const control = element("input", { type: "text", list: list.id, autocomplete: "off",
    placeholder: "missing" });
  const node = labelled(input, control, `category, ${input.names.length} known`);
  node.append(list);
  return {
    input, control, node,
    fill: () => { control.value = offered[0]; },
    tensor: () => bytesTensor(input, control.value || null),
  };
}

function text(input) {
  const control = element("textarea", { rows: 4, placeholder: "missing" });
  return {
    input, control, node: labelled(input, control, "text"),
    fill: () => { control.value = input.typical ?? control.value; },
    tensor: () => bytesTensor(input, control.value || null),
  };
}

function tensor(input) {
  const control = element("textarea", { rows: 3, spellcheck: "false", placeholder: "missing" });
  const inner = input.shape.slice(1);
  // A free length, -1, follows from how many numbers are given.
  const sizes = (length) => inner.map((size) => (size < 0 ? length : size));
  const count = (length) => sizes(length).reduce((one, other) => one * other, 1);
  return {
    input, control, node: labelled(input, control, `numbers, ${sizes("any number").join(" × ")}`),
    fill: () => {
      const zeros = () => Array(count(2)).fill(0);
      const typical = input.typical?.map((value) => Number(value.toPrecision(3)));
      control.value = (typical ?? zeros()).join(" ");
    },
    tensor: () => {
      if (control.value.trim() === "") return bytesTensor(input, null);
      const data = control.value.split(/[\s,;[\]]+/).filter(Boolean).map(Number);
      const shape = [1, ...sizes(Math.floor(data.length / count(1)))];
      return { name: input.name, shape, datatype: input.datatype, data };
    },
  };
}

function imageField(input) {
  const [, height, width, channels] = input.shape;
  const control = element("input", { type: "file", accept: "image/png,image/jpeg,image/webp,image/bmp,image/tiff" });
  const preview = element("img", { alt: "", hidden: true });
  const help = channels ? `An image of any size; it is resized to ${height < 0 ? `a width of ${width}` : `${width} × ${height}`}, ` +
    (channels === 1 ? "grey" : "colour") : "An image file";
  const node = labelled(input, control, help);
  node.append(element("p", { class: "note" }, "Choose a file, or drop one here."), preview);
  let file = null;
  const take = (given) => {
    file = given ?? null;
    URL.revokeObjectURL(preview.src);
    preview.hidden = file === null;
    if (file) preview.src = URL.createObjectURL(file);
    preview.alt = file ? `Chosen image: ${file.name}` : "";
    node.dispatchEvent(new Event("image-taken", { bubbles: true }));
  };
  control.addEventListener("change", () => take(control.files[0]));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    node.addEventListener(kind, (event) => {
      event.preventDefault();
      node.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind !== "drop") return;
      control.files = event.dataTransfer.files;
      take(control.files[0]);
    });
  }
  return {
    input, control, node, fill: () => {},
    tensor: async () => ({
      ...bytesTensor(input, file ? await base64(file) : null),
      parameters: { content_type: "base64" },
    }),
  };
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
