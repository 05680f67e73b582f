// Requests to the server: the key, its streams, and what went wrong in words.

const KEY = "cakekv.key";

/** What went wrong: `kind` is "gone", "key", "busy", "refused", "failed" or "cut". */
export class ServerError extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** A response that is not an error. Paths are relative, so that the page works behind a proxy's prefix, too. */
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error.message.includes("ISO-8859-1")) {
      throw new ServerError("key", "An API key has only letters, digits and signs of a plain keyboard.");
    }
    throw new ServerError("gone", "The server cannot be reached. It may have been stopped, or the network is down.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = "";
  try {
    said = (await response.json()).error?.message ?? "";
  } catch {
    // not an error of this server's own: a proxy's, perhaps
  }
  if (response.status === 401 || response.status === 403) {
    return new ServerError("key", key() ? "The server does not accept this API key." : "The server wants an API key.");
  }
  if (response.status === 429) {
    const after = Number(response.headers.get("Retry-After")) || null;
    const when = after ? `Try again in ${after} s.` : "Try again in a moment.";
    return new ServerError("busy", `The server has as many requests waiting as it takes. ${when}`, after);
  }
  if (response.status >= 500) {
    return new ServerError("failed", `The server failed (${response.status}). ${said}`.trim());
  }
  return new ServerError("refused", said || `The server refused this (${response.status}).`);
}

/** The server-sent events of a response: objects with `event` and `data`. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/);
        const field = (name) =>
          lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).replace(/^ /, ""));
        const data = field("data");
        if (data.length) yield { event: field("event")[0] ?? "message", data: data.join("\n") };
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("cut", "The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
