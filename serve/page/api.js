// Requests to the server: the token, addresses, and errors in words.

const TOKEN = "greedy-stream.token";

/** A refusal of the server, or none at all (status 0). `message` is a sentence for the user. */
export class ServerError extends Error {
  constructor(message, { status = 0, code = "unreachable", retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export function hasToken() {
  return Boolean(sessionStorage.getItem(TOKEN));
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** Moves `?token=` from the address bar to this tab's storage, so that copied addresses do not carry it. */
export function takeToken() {
  const here = new URL(location.href);
  if (!here.searchParams.has("token")) return;
  setToken(here.searchParams.get("token"));
  here.searchParams.delete("token");
  history.replaceState(null, "", here);
}

/** An absolute address under the page's own folder, with the token: links and sockets cannot send headers. */
export function address(path, scheme = "http") {
  const url = new URL(path, document.baseURI);
  url.protocol = url.protocol.replace("http", scheme);
  const token = sessionStorage.getItem(TOKEN);
  if (token) url.searchParams.set("token", token);
  return url.href;
}

/** Sends JSON and returns JSON (null for 204). Throws ServerError. */
export async function request(path, { method = "GET", body, timeout = 10 } = {}) {
  const keepalive = method === "DELETE"; // also while the page is closed
  const options = { method, keepalive, headers: {}, signal: AbortSignal.timeout(timeout * 1000) };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const token = sessionStorage.getItem(TOKEN);
  if (token) options.headers.Authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(new URL(path, document.baseURI), options);
  } catch {
    throw new ServerError("The server does not answer.");
  }
  if (!answer.ok) throw await refusal(answer);
  return answer.status === 204 ? null : answer.json();
}

async function refusal(answer) {
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // A proxy's HTML page has no sentence for the user; the status has to do.
  }
  const code = error.code ?? error.type ?? { 401: "unauthorized", 404: "not_found", 429: "busy" }[answer.status];
  return new ServerError(error.message ?? `The server answered ${answer.status} ${answer.statusText}.`, {
    status: answer.status,
    code: code ?? "server_error",
    retryAfter: Number(answer.headers.get("Retry-After") ?? 0),
  });
}
