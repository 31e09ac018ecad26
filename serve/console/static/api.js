// Requests to the server's routes, with the API key if there is one.

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

// Returns the response. Throws Refused with the server's error message, or if the server does not
// respond.
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
    throw new Refused("The server does not respond.", 0);
  }
  if (answer.ok) return answer;
  const words = await answer.json().then((said) => said.error, () => null);
  // Aborted if the user has left the view or entered another key in the meantime.
  signal?.throwIfAborted();
  if (answer.status === 401) {
    dispatchEvent(new CustomEvent("key-needed", { detail: words ?? "an API key is required." }));
  }
  throw new Refused(words ?? `The server responded with status ${answer.status}.`, answer.status);
}

export async function json(path, options) {
  return (await ask(path, options)).json();
}

// Returns the path of a model, or of one of its versions.
export function at(model, version = null) {
  const name = `/v2/models/${encodeURIComponent(model)}`;
  return version === null ? name : `${name}/versions/${encodeURIComponent(version)}`;
}

export function reportPath(model, version, name) {
  return `${at(model, version)}/report/${encodeURIComponent(name)}`;
}
