// The session over one WebSocket: JSON messages, and a binary message after each chunk's metadata.

import { address } from "./api.js";

const SILENCE = 5; // seconds without a message before a ping, and again before the connection counts as lost

export class SocketLink {
  name = "socket";

  /** on: message(object), media(metadata, ArrayBuffer), closed({ code }), once, and only if not closed from here. */
  constructor(on) {
    this.on = on;
  }

  /** Connects and sends the first message. */
  open(first) {
    this.socket = new WebSocket(address("v1/realtime/video", "ws"));
    this.socket.binaryType = "arraybuffer";
    this.heard = performance.now();
    this.socket.onopen = () => {
      this.heard = performance.now();
      this.socket.send(JSON.stringify(first));
    };
    this.socket.onmessage = ({ data }) => this.#receive(data);
    this.socket.onclose = ({ code }) => this.#closed(code);
    this.watchdog = setInterval(() => this.#check(), 1000);
  }

  send(message) {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  /** Sends a picture, unless earlier ones have not gone out yet. */
  sendPicture(blob) {
    const { readyState, bufferedAmount } = this.socket;
    if (readyState === WebSocket.OPEN && !bufferedAmount) this.socket.send(blob);
  }

  stop() {
    this.send({ type: "session.stop" });
  }

  close() {
    clearInterval(this.watchdog);
    this.on = null;
    this.socket.close();
  }

  #receive(data) {
    if (!this.on) return;
    this.heard = performance.now();
    if (typeof data !== "string") {
      if (this.metadata) this.on.media(this.metadata, data);
      this.metadata = null;
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "video.chunk_metadata") this.metadata = message;
    if (message.type !== "session.pong") this.on.message(message);
  }

  /** A connection can die without a close; a ping that stays unanswered shows it. */
  #check() {
    const silent = (performance.now() - this.heard) / 1000;
    if (silent > 2 * SILENCE) this.#closed(1006);
    else if (silent > SILENCE) this.send({ type: "session.ping" });
  }

  #closed(code) {
    const on = this.on;
    if (!on) return;
    this.close();
    on.closed({ code });
  }
}
