// Puts the page together: what the user does goes to the session, what the session says is shown.

import { address, hasToken, request, setToken, takeToken } from "./api.js";
import { Camera } from "./camera.js";
import { Controls } from "./controls.js";
import { clearNotice, clearNotices, ENDINGS, errorWords, notice, sentence } from "./notices.js";
import { Picture } from "./picture.js";
import { Prompts } from "./prompts.js";
import { ATTEMPTS, Session } from "./session.js";
import { Stage } from "./stage.js";
import { Strip } from "./strip.js";

const VIEWERS_EVERY = 4000; // milliseconds between questions about the session
const $ = (selector) => document.querySelector(selector);

takeToken();
const watching = new URL(location.href).searchParams.get("watch");
const prompts = new Prompts();
const strip = new Strip($("#strip"));
const stage = new Stage($("#stage"), {
  frame(mediaTime, when) {
    session.frame(mediaTime);
    strip.frame(mediaTime, when);
  },
  problem(text) {
    notice("player", text, { tone: "error" });
    session.broke();
  },
});

const session = new Session(stage, prompts, {
  changed: show,
  started({ config, session: id }) {
    clearNotice("connection");
    strip.restart();
    stage.shape(config.width, config.height, config.height / (config.scale || 1));
    controls.seed = config.seed;
    $("#download").href = address(`v1/sessions/${id}/video`);
    $("#download").download = `video-${config.seed}.mp4`;
    askViewers();
  },
  chunk(metadata, begun) {
    const sent = begun.filter(({ event }) => event.prompt ?? event.seed ?? event.reset).map(({ at }) => at);
    if (startedAt) sent.push(startedAt);
    startedAt = 0;
    strip.chunk(metadata, { fps: session.config.fps, speed: session.speed }, sent);
  },
  note: (text) => notice("note", sentence(text)),
  error: showError,
  ended(reason) {
    clearNotice("connection");
    const goOn = watching ? ["Try again", watch] : ["Continue", () => session.resume()];
    const words = watching && reason === "stopped" ? "The video was stopped." : ENDINGS[reason];
    const text = words === undefined ? `The session ended: ${reason}.` : words;
    if (text) notice("ended", text, { stays: true, action: reason === "finished" ? undefined : goOn });
  },
  stalled(text) {
    if (text) notice("stall", text, { stays: true, tone: "error" });
    else clearNotice("stall");
  },
  fallback(text) {
    if (text) notice("transport", `${sentence(text)} The page uses the socket.`);
  },
});

const again = { action: ["Start again", start] };
let startedAt = 0; // when the user asked for the video of which no chunk came yet
let connectedOver = "";

const controls = new Controls({
  speed(speed) {
    if (session.running && !watching) session.setSpeed(speed);
  },
  transport() {
    if (session.running && watching) watch();
    else if (session.running) notice("transport", "The next start uses this connection.", again);
  },
  adapters(adapters) {
    if (session.running && !watching) session.interact({ adapters });
  },
});
const picture = new Picture($("#picture"), () => {
  if (session.running) notice("picture", "The next start begins from this choice.", again);
});
const camera = new Camera($("#camera"), () => {
  if (session.running) notice("camera", "The next start follows this choice.", again);
});

function start() {
  const prompt = promptText();
  if (!prompt) return;
  const { seed, speed, adapters } = controls;
  if (seed === null) return void notice("seed", "The seed must be a whole number.", { tone: "error" });
  clearNotices();
  strip.reset();
  startedAt = performance.now();
  const settings = { prompt, seed, speed, adapters, model: controls.chosenModel, image: picture.data ?? undefined };
  if (camera.stream) Object.assign(settings, { source: camera.settings, image: undefined, speed: 1 });
  session.start(settings, controls.transport, camera);
}

function watch() {
  clearNotices();
  strip.reset();
  startedAt = performance.now();
  session.watch(watching, controls.transport);
}

/** Enter: starts the video, or changes the prompt of the one that plays. */
function go() {
  if (!session.running) return start();
  const prompt = promptText();
  if (prompt) session.interact({ prompt }, controls.blend);
}

function promptText() {
  const prompt = $("#prompt").value.trim();
  if (!prompt) notice("prompt", "Write a prompt first.");
  return prompt;
}

function restart() {
  const { seed, adapters } = controls;
  if (seed === null) return void notice("seed", "The seed must be a whole number.", { tone: "error" });
  const { image, source } = session.settings ?? {};
  const same = source ? source.strength === camera.settings?.strength : (image ?? null) === picture.data && !camera.stream;
  if (session.state === "live" && same) session.interact({ seed, adapters });
  else start();
}

const STATES = {
  idle: () => (watching ? "Not connected" : "Ready"),
  connecting: () => "Connecting",
  waiting: () => `In line, place ${session.place}`,
  resuming: () => `Catching up, chunk ${session.progress.chunk} of ${session.progress.of}`,
  live: () => (session.paused ? "Paused" : session.stalled ? "Stalled" : "Live"),
  reconnecting: () => "Reconnecting",
};
const NEXT = { held: "Not sent yet", sent: "Sent", queued: "Next", blending: "Blending in" };

function show() {
  const { state, running, paused } = session;
  document.body.dataset.state = state === "live" && paused ? "paused" : state;
  setText("#status-text", STATES[state]());
  connectedOver = session.link?.name ?? connectedOver;
  setText("#status-link", state === "live" ? (connectedOver === "webrtc" ? "WebRTC" : "Socket") : "");
  setText("#go", running ? "Switch" : "Play");
  setText("#pause-text", paused ? "Resume" : "Pause");
  $("#pause").disabled = state !== "live" || Boolean(watching);
  $("#stop").disabled = !running;
  for (const id of ["#download", "#share"]) $(id).toggleAttribute("inert", !session.id);
  setText("#active", prompts.active ?? (running ? "" : "Nothing yet"));
  const next = prompts.next;
  setText("#next", next?.state === "blending" ? `over ${plural(next.transition, "chunk")}` : (next?.prompt ?? ""));
  setText("#next-state", next ? NEXT[next.state] : "");
  if (state === "reconnecting") {
    const tries = session.attempt > 1 ? ` Try ${session.attempt} of ${ATTEMPTS}.` : "";
    const why = session.done === "shutdown" ? "The server is restarting." : "The connection was lost.";
    const how = watching ? "" : " The video goes on where it stopped.";
    notice("connection", `${why} The page connects again.${how}${tries}`, { stays: true });
  }
  if (state === "waiting") {
    notice("connection", `The server is busy. Your place in line is ${session.place}.`, { stays: true });
  }
}

function plural(count, thing) {
  return `${count} ${thing}${count === 1 ? "" : "s"}`;
}

/** Writes only changes, so that screen readers do not repeat what they said. */
function setText(selector, text) {
  const node = $(selector);
  if (node.textContent === text) return;
  node.textContent = text;
  if (selector === "#active" || selector === "#next") node.title = text; // long prompts are cut off
}

function showError(error) {
  if (error.code === "unauthorized") return askToken();
  const action = session.running ? undefined : ["Try again", watching ? watch : start];
  notice("error", errorWords(error), { stays: true, tone: "error", action });
}

function askToken() {
  setText("#token-title", hasToken() ? "The server does not accept this token" : "This server asks for a token");
  $("#token-dialog").showModal();
}

async function loadModels() {
  try {
    const { data } = await request("v1/models");
    controls.offer(data, offer);
    if (watching) watch();
  } catch (error) {
    if (error.code === "unauthorized") return askToken();
    notice("models", error.message, { stays: true, tone: "error", action: ["Try again", loadModels] });
  }
}

function offer(model) {
  stage.shape(model.width, model.height, model.height);
  camera.offer(model.source);
  const chips = (model.examples ?? []).map((text) => {
    const chip = document.createElement("button");
    Object.assign(chip, { type: "button", className: "chip", textContent: text });
    chip.dataset.example = text;
    chip.onclick = () => {
      $("#prompt").value = text;
      go();
    };
    return chip;
  });
  $("#examples").replaceChildren(...chips);
}

async function askViewers() {
  if (session.state !== "live") return;
  try {
    strip.viewers((await request(`v1/sessions/${session.id}`)).viewers);
    clearNotice("viewers");
  } catch (error) {
    strip.viewers(null);
    // While the page reconnects it says so already.
    if (session.state === "live") notice("viewers", `The number of viewers is not known: ${error.message}`);
  }
}

async function share() {
  const link = new URL("./", document.baseURI);
  link.searchParams.set("watch", session.id);
  try {
    await navigator.clipboard.writeText(link.href);
    notice("share", "Link copied. Who opens it sees this video.");
  } catch {
    // Pages without HTTPS may not write to the clipboard.
    $("#link").value = link.href;
    $("#link-dialog").showModal();
    $("#link").select();
  }
}

/** A link cannot say why a download failed, so the page asks first. */
async function download(event) {
  event.preventDefault();
  try {
    await request(`v1/sessions/${session.id}`);
    const link = $("#download").cloneNode();
    link.removeAttribute("id");
    link.click();
  } catch (error) {
    notice("download", `The video cannot be downloaded: ${error.message}`, { tone: "error" });
  }
}

$("#prompt-form").onsubmit = (event) => {
  event.preventDefault();
  go();
};
$("#prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  go();
};
$("#stop").onclick = () => session.stop();
$("#pause").onclick = () => session.setPaused(!session.paused);
$("#restart").onclick = restart;
$("#share").onclick = share;
$("#download").onclick = download;
$("#token-form").onsubmit = () => {
  setToken($("#token").value.trim());
  $("#token").value = "";
  if (controls.models && !watching && startedAt) start();
  else loadModels();
};
addEventListener("pagehide", () => session.running && session.stop());
setInterval(askViewers, VIEWERS_EVERY);
if (watching) {
  document.body.classList.add("watching");
  controls.disable(true);
}
show();
loadModels();
