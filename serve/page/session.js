// One session from start to end over whichever link works: fallback, reconnect with resume, stalls.

import { request } from "./api.js";
import { RtcLink } from "./rtc.js";
import { SocketLink } from "./socket.js";
import { MIME, playsH264 } from "./stage.js";

const FIRST_FRAME = 4; // seconds that WebRTC gets for the first frame
const STALL = 5; // seconds without a chunk before the user is told
export const ATTEMPTS = 20; // reconnects, at most LONGEST seconds apart
const LONGEST = 4;
const [GOING_AWAY, POLICY, RESTART] = [1001, 1008, 1012]; // why a socket closed: RFC 6455 and its registry
const JPEGS = "This browser cannot play the video in H.264, so the page shows JPEG pictures.";
const BREAKS = 2; // failures of the browser's player before it gets JPEGs

export class Session {
  state = "idle"; // idle, connecting, waiting, resuming, live, reconnecting
  speed = 1;
  paused = false;

  /**
   * on: changed(), started(message), chunk(metadata, interactions begun), note(sentence), error({ code, message }),
   * ended(reason), stalled(sentence or null), fallback(sentence)
   */
  constructor(stage, prompts, on) {
    Object.assign(this, { stage, prompts, on });
    setInterval(() => this.#checkStall(), 1000);
    document.addEventListener("visibilitychange", () => this.#begun()); // hidden pages show no frames
  }

  get running() {
    return this.state !== "idle";
  }

  /**
   * settings: prompt, seed, speed, model, image?, source?, adapters?; transport: "auto", "webrtc" or "socket".
   * camera: what the video follows, if settings has a source.
   */
  start(settings, transport, camera = null) {
    this.#begin(transport);
    Object.assign(this, { settings, camera, watching: null, seed: settings.seed, speed: settings.speed });
    this.prompts.begin(settings.prompt);
    this.#connect();
  }

  watch(id, transport) {
    this.#begin(transport);
    Object.assign(this, { settings: null, watching: id, id, speed: 1 });
    this.prompts.begin(null);
    this.#connect();
  }

  /** Goes on where an ended session stopped. */
  resume() {
    Object.assign(this, { attempt: 0, wasLive: true, done: null });
    this.#connect();
  }

  /** Sends an event (prompt, seed, speed, paused, adapters); kept and sent later if the link is down. */
  interact(event, transition = 0) {
    const id = this.prompts.add(event, transition);
    this.#send(id, event, transition);
    return id;
  }

  setPaused(paused) {
    this.paused = paused;
    this.stage.pause(paused);
    this.#begun();
    this.interact({ paused });
    this.on.changed();
  }

  setSpeed(speed) {
    this.speed = speed;
    this.stage.speed = speed;
    this.interact({ speed });
  }

  /** Ends for good. A watcher only leaves. */
  stop() {
    if (!this.watching) this.link?.stop();
    this.#end(this.watching ? "left" : "stopped");
  }

  /** A frame is on show: the stage's news. */
  frame(mediaTime) {
    clearTimeout(this.deadline);
    this.shownAt = performance.now();
    if (mediaTime !== null) this.shownTime = mediaTime;
    this.#unstall();
  }

  /** The browser's player gave up: a new connection brings a new key frame. */
  broke() {
    if (this.state !== "live") return;
    this.broken += 1;
    if (this.broken > 2 * BREAKS) return this.#end("unplayable");
    if (this.broken === BREAKS) this.on.note(JPEGS);
    this.#lost();
  }

  #begin(transport) {
    if (this.running) this.stop();
    Object.assign(this, { transport, id: null, config: null, attempt: 0, wasLive: false, paused: false });
    Object.assign(this, { key: null, done: null, shownTime: null, refused: transport === "socket", broken: 0 });
  }

  #set(state) {
    this.state = state;
    this.on.changed();
  }

  #connect() {
    this.#disconnect();
    this.#set(this.wasLive ? "reconnecting" : "connecting");
    const rtc = !this.refused && !this.wasLive && RtcLink.supported;
    const on = {
      message: (message) => this.#receive(message),
      media: (metadata, bytes) => this.#media(metadata, bytes),
      stream: (media) => this.stage.stream(media),
      closed: ({ code }) => this.#closed(code),
      failed: (error) => this.#rtcFailed(error),
    };
    this.link = rtc ? new RtcLink(on, this.#follows ? this.camera.track : null) : new SocketLink(on);
    if (rtc) this.#expectFrame();
    else if (!playsH264 && !this.wasLive) this.on.note(JPEGS);
    this.link.open(this.#first());
  }

  #disconnect() {
    clearTimeout(this.deadline);
    clearTimeout(this.retry);
    this.stopPictures?.();
    this.stopPictures = null;
    this.link?.close();
    this.link = null;
  }

  /** Whether the video follows the camera. What the camera showed is gone: such a video is not made again. */
  get #follows() {
    return Boolean(this.settings?.source && this.camera?.stream);
  }

  #first() {
    const format = playsH264 && this.broken < BREAKS ? "m4s" : "jpeg";
    if (this.watching) return { type: "session.watch", session: this.watching, format };
    // Within its lease the session waits for who has its key; later it has to be made again up to here.
    if (this.key) return { type: "session.watch", session: this.id, key: this.key, format };
    const { seed } = this;
    const first = { type: "session.start", ...this.settings, format, speed: this.#follows ? 1 : this.speed, seed };
    if (!this.#follows) delete first.source; // the camera was closed meanwhile
    if (!this.wasLive) return first;
    const chunk = this.prompts.nextChunk(this.config.fps, this.shownTime);
    this.prompts.from = chunk;
    if (chunk > 0 && !this.#follows) first.resume = { chunk, history: this.prompts.until(chunk) };
    first.prompt = this.prompts.first;
    return first;
  }

  #expectFrame() {
    clearTimeout(this.deadline);
    this.deadline = setTimeout(
      () => this.#rtcFailed(new Error(`No picture came over WebRTC within ${FIRST_FRAME} s.`)),
      FIRST_FRAME * 1000,
    );
  }

  #rtcFailed(error) {
    // What is wrong with the request itself is wrong over the socket, too.
    if ([400, 401, 404].includes(error.status) || this.transport === "webrtc") {
      this.#end("failed");
      return this.on.error(error);
    }
    this.refused = true;
    const busy = error.code === "busy"; // the socket has a line to wait in
    this.on.fallback(busy ? null : error.message);
    this.#connect();
  }

  #receive(message) {
    switch (message.type) {
      case "session.waiting":
        this.place = message.place;
        clearTimeout(this.deadline);
        return this.#set("waiting");
      case "session.progress":
        this.progress = message;
        this.heard = performance.now();
        return this.#set("resuming");
      case "video.start":
        return this.#started(message);
      case "video.chunk_metadata":
        return this.link.name === "webrtc" ? this.#chunk(message) : undefined; // the socket's come with their media
      case "session.interaction.queued":
        this.prompts.mark(message.event_id, "queued");
        return this.on.changed();
      case "session.note":
        if (message.event_id) this.prompts.forget(message.event_id); // a newer one took its place
        return this.on.note(message.message);
      case "session.done":
        return this.#done(message.reason);
      case "stream_stopped":
        return this.#done("failed", message.error_message);
      case "error":
        return this.#error(message);
    }
  }

  #started(message) {
    this.prompts.reconnected(this.wasLive ? this.prompts.nextChunk(message.config.fps, this.shownTime) : 0);
    Object.assign(this, { id: message.session, key: message.key ?? null, config: message.config, shownTime: null });
    this.seed = message.config.seed;
    if (this.link.name === "socket" && this.#follows) {
      const { width, height, fps, scale } = message.config;
      const send = (blob) => this.link?.sendPicture(blob);
      this.stopPictures = this.camera.pictures(width / scale, height / scale, fps, send);
    }
    if (this.link.name === "socket") this.stage.play({ ...message, mime: message.mime ?? MIME });
    else clearTimeout(this.deadline); // its first chunk may take long; #chunk sets the time for the frame
    this.stage.speed = this.speed;
    this.#begun();
    Object.assign(this, { wasLive: true, done: null });
    this.#set("live");
    this.on.started(message);
    for (const [id, { event, transition }] of this.prompts.unanswered) this.#send(id, event, transition);
    if (this.paused) this.setPaused(true);
  }

  #media(metadata, bytes) {
    if (this.state !== "live" && this.state !== "resuming") return;
    this.#chunk(metadata);
    this.stage.push(bytes, metadata);
  }

  #chunk(metadata) {
    if (!this.prompts.recent.length && this.link.name === "webrtc") this.#expectFrame();
    this.attempt = 0;
    this.heard = performance.now();
    const begun = this.prompts.chunk(metadata);
    if (this.watching) this.stage.speed = this.speed = metadata.speed; // who owns the session set it here
    for (const { event } of begun) if (event.seed !== undefined) this.seed = event.seed;
    if (this.state === "resuming") this.state = "live";
    this.on.chunk(metadata, begun);
    this.on.changed();
  }

  #send(id, event, transition) {
    if (this.state !== "live") return;
    const interaction = { event_id: id, event };
    if (transition) interaction.transition_chunks = transition;
    if (this.link.send({ type: "session.interaction", interaction })) this.prompts.mark(id, "sent");
    this.on.changed();
  }

  #error(message) {
    if (message.event_id) this.prompts.forget(message.event_id);
    if (message.code === "shutdown") return this.#done("shutdown");
    const before = this.state !== "live";
    if (before && this.wasLive && message.code === "busy") return this.#lost();
    if (before && this.wasLive && this.key) {
      this.key = null; // its session is gone: make it again
      return this.#connect();
    }
    if (before) this.#end("failed");
    this.on.error(message);
    this.on.changed();
  }

  #done(reason, text) {
    if (this.done) return;
    this.done = reason;
    if (reason === "shutdown") return this.#lost();
    this.#end(reason);
    if (text) this.on.error({ code: "failed", message: text });
  }

  async #closed(code) {
    if (code === GOING_AWAY || code === RESTART) this.done = "shutdown";
    if (code === POLICY) {
      this.#end("failed");
      return this.on.error({ code: "unauthorized" });
    }
    if (this.wasLive || this.state === "waiting") return this.#lost();
    if (this.link.name === "webrtc") return this.#rtcFailed(new Error("The WebRTC connection was closed."));
    const link = this.link;
    let error = { code: "closed", message: "The server closed the connection." };
    await request("v1/models").catch((reason) => {
      error = reason;
    });
    if (this.link !== link) return; // started again meanwhile
    this.#end("failed");
    this.on.error(error);
  }

  /** Tries again, ever less often. */
  #lost() {
    this.#disconnect();
    this.#unstall();
    if (this.attempt >= ATTEMPTS) return this.#end("unreachable");
    this.delay = Math.min(0.5 * 2 ** this.attempt, LONGEST);
    this.attempt += 1;
    this.#set("reconnecting");
    this.retry = setTimeout(() => this.#connect(), this.delay * 1000);
  }

  #end(reason) {
    this.#disconnect();
    this.stage.hold();
    this.#unstall();
    this.#set("idle");
    this.on.ended(reason);
  }

  /** From now on chunks and frames are waited for. */
  #begun() {
    this.heard = this.shownAt = performance.now();
  }

  #unstall() {
    if (this.stalled) this.on.stalled(null);
    this.stalled = false;
  }

  async #checkStall() {
    const last = document.hidden ? this.heard : Math.min(this.heard, this.shownAt);
    const silent = (performance.now() - last) / 1000;
    if (this.state !== "live" || this.paused || this.stalled || silent < STALL) return;
    this.stalled = true;
    let doing = "does not answer";
    try {
      const { state } = await request(`v1/sessions/${this.id}`, { timeout: 3 });
      doing = `says that the session is ${state}`;
    } catch (error) {
      if (error.status) doing = `answers: ${error.message}`;
    }
    if (this.stalled) this.on.stalled(`No frame for ${Math.round(silent)} s. The server ${doing}.`);
  }
}
