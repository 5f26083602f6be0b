// The camera as the source of a video: its track goes over WebRTC, JPEG pictures of it over the socket.

import { clearNotice, notice } from "./notices.js";

const QUALITY = 0.85; // of the pictures

export class Camera {
  stream = null;

  constructor(root, changed) {
    this.root = root;
    this.changed = changed;
    this.preview = root.querySelector("video");
    this.button = root.querySelector("button");
    this.strength = root.querySelector("input");
    this.button.onclick = () => (this.stream ? this.close() : this.#open());
    this.strength.oninput = () => this.#show();
    this.#show();
  }

  /** source: { least, strength } of the model; null where it follows no frames. */
  offer(source) {
    this.root.parentElement.hidden = !source;
    if (!source) return void this.close();
    Object.assign(this.strength, { min: source.least, max: 1, step: 0.01, value: source.strength });
    this.#show();
  }

  /** The source that a session asks for; undefined without a camera. */
  get settings() {
    return this.stream ? { strength: Number(this.strength.value) } : undefined;
  }

  get track() {
    return this.stream?.getVideoTracks()[0] ?? null;
  }

  close() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    const was = this.stream;
    this.stream = this.preview.srcObject = null;
    this.#show();
    if (was) this.changed();
  }

  /** Gives `send` a picture of this size at this rate, as long as it takes them; returns how to stop it. */
  pictures(width, height, fps, send) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const pen = canvas.getContext("2d");
    let busy = false;
    const timer = setInterval(() => {
      const { videoWidth: wide, videoHeight: high } = this.preview;
      if (busy || !wide) return;
      const scale = Math.max(width / wide, height / high); // cover, and crop in the middle
      const size = [wide * scale, high * scale];
      pen.drawImage(this.preview, (width - size[0]) / 2, (height - size[1]) / 2, ...size);
      busy = true;
      canvas.toBlob((blob) => {
        busy = false;
        if (blob) send(blob);
      }, "image/jpeg", QUALITY);
    }, 1000 / fps);
    return () => clearInterval(timer);
  }

  async #open() {
    clearNotice("camera");
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: true });
    } catch (error) {
      const why = navigator.mediaDevices ? error.message : "browsers give it to pages over HTTPS alone.";
      return void notice("camera", `The camera did not open: ${why}`, { tone: "error" });
    }
    this.track.onended = () => this.close();
    this.preview.srcObject = this.stream;
    this.preview.play();
    this.#show();
    this.changed();
  }

  #show() {
    const on = Boolean(this.stream);
    this.root.toggleAttribute("data-on", on);
    this.button.setAttribute("aria-pressed", String(on));
    this.button.textContent = on ? "Stop following" : "Follow my camera";
    this.root.querySelector("output").textContent = Number(this.strength.value).toFixed(2);
  }
}
