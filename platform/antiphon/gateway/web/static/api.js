// Asks the gateway: the key, errors in words, streams of events.

const KEY = "antiphon.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export async function ask(path, { body, method, signal, headers: more = {} } = {}) {
  const headers = { ...more };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The gateway can't be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

export const json = async (path, options) => (await ask(path, options)).json();

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a proxy's answer, not ours
  }
  const where = error.param ? ` (${error.param})` : "";
  const message = error.message ? `${error.message}${where}` : `HTTP ${response.status} ${response.statusText}`;
  return new ApiError(response.status, error.code ?? "", message);
}

const RESUMES = 5; // in a row without an event between them
const RESUME_AFTER_MS = 500;

// The objects of a stream of server-sent events, until [DONE]. An error in the stream is thrown. A connection that breaks off
// is followed by another one, which goes on behind the last event that came.
export async function* events(path, { body, signal }) {
  let last = "";
  let requestId = "";
  let lost = 0;
  for (;;) {
    try {
      const headers = last ? { "x-request-id": requestId, "last-event-id": last } : {};
      const response = await ask(path, { body, signal, headers });
      requestId = response.headers.get("x-request-id") ?? "";
      for await (const [id, data] of pieces(response)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(200, event.error.code ?? "", event.error.message ?? "the answer failed");
        lost = 0;
        last = id;
        yield event;
      }
      throw new ApiError(0, "cut", "The answer was cut off: the connection was closed.");
    } catch (error) {
      const isLost = !(error instanceof ApiError) || error.status === 0 || error.status === 503;
      if (error.name === "AbortError" || !isLost || !last || !requestId || ++lost > RESUMES) throw error;
      await new Promise((resolve) => setTimeout(resolve, RESUME_AFTER_MS * lost));
      signal?.throwIfAborted();
    }
  }
}

async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let id = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("id:")) id = line.slice(3).trim();
      else if (line.startsWith("data:")) yield [id, line.slice(5).trim()];
    }
  }
}
