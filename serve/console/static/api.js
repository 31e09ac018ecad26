// The server's routes, with the key where one is needed.

const KEPT = "halyard key";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEPT),
  set: (value) => sessionStorage.setItem(KEPT, value),
  forget: () => sessionStorage.removeItem(KEPT),
};

// Returns the answer. Throws Refused with the server's own words, and for a server that is away.
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method, headers, signal, cache: "no-store", credentials: "omit",
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer.", 0);
  }
  if (answer.ok) return answer;
  const words = await answer.json().then((said) => said.error, () => null);
  // Nobody waits for it any more: a view that was left, or a key that was given since.
  signal?.throwIfAborted();
  if (answer.status === 401) {
    dispatchEvent(new CustomEvent("key-needed", { detail: words ?? "a key is needed." }));
  }
  throw new Refused(words ?? `The server answered ${answer.status}.`, answer.status);
}

export async function json(path, options) {
  return (await ask(path, options)).json();
}

// Where a model is, or one of its versions.
export function at(model, version = null) {
  const name = `/v2/models/${encodeURIComponent(model)}`;
  return version === null ? name : `${name}/versions/${encodeURIComponent(version)}`;
}

export function reportPath(model, version, name) {
  return `${at(model, version)}/report/${encodeURIComponent(name)}`;
}
