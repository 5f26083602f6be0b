// The session over WebRTC: one video track, and the "parameters" data channel with the socket's JSON messages.

import { request, ServerError } from "./api.js";

const OFFER = "api/v1/webrtc/offer";
const LOST = 4; // seconds that a disconnected peer may take to come back by itself

export class RtcLink {
  name = "webrtc";
  static supported = "RTCPeerConnection" in window;

  /**
   * on: message(object), stream(MediaStream), closed({ code }), failed(ServerError) if no connection came about.
   * track: of the camera that the video follows, or null.
   */
  constructor(on, track) {
    this.on = on;
    this.track = track;
  }

  /** Takes the socket's first message (session.start or session.watch) and offers a connection. */
  async open(first) {
    try {
      const { iceServers } = await request("api/v1/webrtc/ice-servers").catch((error) => {
        throw error.status === 404 ? new ServerError("This server does not offer WebRTC.", { status: 501 }) : error;
      });
      if (!this.on) return;
      this.peer = new RTCPeerConnection({ iceServers });
      this.#listen();
      await this.peer.setLocalDescription(await this.peer.createOffer());
      const { sdp, type } = this.peer.localDescription;
      const answer = await request(OFFER, { method: "POST", body: { sdp, type, ...asked(first) }, timeout: 30 });
      this.session = answer.sessionId;
      if (!this.on) return void this.#forget(); // closed while the server answered
      await this.peer.setRemoteDescription({ sdp: answer.sdp, type: answer.type });
      this.answered = true;
      this.#sendCandidates();
    } catch (error) {
      this.#failed(error instanceof ServerError ? error : new ServerError(`WebRTC failed: ${error.message}`));
    }
  }

  send(message) {
    if (this.channel?.readyState !== "open") return false;
    this.channel.send(JSON.stringify(message));
    return true;
  }

  stop() {
    this.send({ type: "session.stop" });
  }

  close() {
    if (!this.on) return;
    this.on = null;
    clearTimeout(this.lost);
    this.peer?.close();
    this.#forget();
  }

  #listen() {
    this.candidates = [];
    this.channel = this.peer.createDataChannel("parameters", { ordered: true });
    this.channel.onmessage = ({ data }) => this.on?.message(JSON.parse(data));
    this.channel.onclose = () => this.#closed();
    const direction = this.track ? "sendrecv" : "recvonly";
    const { receiver } = this.peer.addTransceiver(this.track ?? "video", { direction });
    if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0; // newest frame first: this is live
    this.peer.ontrack = ({ track, streams }) => this.on?.stream(streams[0] ?? new MediaStream([track]));
    this.peer.onicecandidate = ({ candidate }) => {
      if (candidate?.candidate) this.candidates.push(candidate);
      this.#sendCandidates();
    };
    this.peer.onconnectionstatechange = () => {
      clearTimeout(this.lost);
      const state = this.peer.connectionState;
      if (state === "failed") this.#closed();
      if (state === "disconnected") this.lost = setTimeout(() => this.#closed(), LOST * 1000);
    };
  }

  async #sendCandidates() {
    if (!this.answered || !this.candidates.length) return;
    const candidates = this.candidates.splice(0).map(({ candidate, sdpMid, sdpMLineIndex }) => {
      return { candidate, sdpMid, sdpMLineIndex };
    });
    try {
      await request(`${OFFER}/${this.session}`, { method: "PATCH", body: { candidates } });
    } catch (error) {
      // Candidates of the answer may still connect; if they do not, the connection's own state says so.
      if (this.peer.connectionState !== "connected") this.#failed(error);
    }
  }

  #failed(error) {
    const on = this.on;
    this.close();
    on?.failed(error);
  }

  #closed() {
    const on = this.on;
    this.close();
    on?.closed({ code: 1006 });
  }

  /** Lets the server end the session now and not when its connection times out. */
  #forget() {
    if (!this.session) return;
    request(`${OFFER}/${this.session}`, { method: "DELETE" }).catch(() => {
      // The server may have ended it already, or be gone: either way nothing is left to end.
    });
    this.session = null;
  }
}

/** The body of an offer that asks for what the socket's first message asks for. */
function asked({ type, session, prompt, adapters, ...rest }) {
  if (type === "session.watch") return { session, initialParameters: {} };
  const initialParameters = { prompts: [{ text: prompt, weight: 1 }] };
  for (const name of ["model", "seed", "speed", "image", "source"]) {
    if (rest[name] !== undefined) initialParameters[name] = rest[name];
  }
  if (adapters) {
    initialParameters.lora_scales = Object.entries(adapters).map(([name, scale]) => ({ name, scale }));
  }
  return { initialParameters };
}
