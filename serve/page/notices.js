// Sentences for what happens, shown over the page and read out by screen readers.

const LASTING = 7; // seconds that a passing notice stays

const region = document.querySelector("#notices");
const shown = new Map();

/** Shows a sentence. A later notice of the same key replaces it; `action` is [label, function]; errors stay. */
export function notice(key, text, { action, stays = false, tone = "plain" } = {}) {
  clearNotice(key);
  const item = document.createElement("div");
  item.className = "notice";
  item.dataset.tone = tone;
  item.dataset.testid = `notice-${key}`;
  const words = document.createElement("p");
  words.textContent = text;
  item.append(words);
  if (action) item.append(button(action[0], "", () => (clearNotice(key), action[1]())));
  item.append(button("Close", "close", () => clearNotice(key)));
  region.append(item);
  const timer = stays ? 0 : setTimeout(() => clearNotice(key), LASTING * 1000);
  shown.set(key, { item, timer });
}

export function clearNotice(key) {
  const { item, timer } = shown.get(key) ?? {};
  clearTimeout(timer);
  item?.remove();
  shown.delete(key);
}

export function clearNotices() {
  for (const key of [...shown.keys()]) clearNotice(key);
}

function button(label, name, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = name;
  if (name === "close") made.setAttribute("aria-label", label);
  else made.textContent = label;
  made.onclick = action;
  return made;
}

/** What the end of a session means; null where the user asked for it. */
export const ENDINGS = {
  stopped: null,
  left: null,
  failed: null, // an error says why
  finished: "The video is finished.",
  idle: "The server ended the session because nothing happened for a while.",
  lifetime: "The session reached the server's time limit.",
  lease: "The server gave the session up because nobody was connected.",
  no_frames: "The server ended the session because no picture came from your camera.",
  stalled: "The server ended the session because it got stuck.",
  unplayable: "The browser cannot play what the server sends.",
  unreachable: "The server could not be reached again.",
};

/** A sentence for an error of the server or of a request. */
export function errorWords({ code, message, retryAfter }) {
  const detail = message ? sentence(message) : "";
  switch (code) {
    case "busy":
      return `The server is busy. ${retryAfter ? `Try again in ${retryAfter} s.` : detail}`.trim();
    case "unauthorized":
      return "The server asks for a token.";
    case "out_of_memory":
      return `The server ran out of memory. ${detail}`.trim();
    case "stalled":
      return `The server is stuck. ${detail}`.trim();
    default:
      return detail || "The server reported an error without a reason.";
  }
}

/** With a capital letter and a full stop. */
export function sentence(text) {
  const start = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(start) ? start : `${start}.`;
}
