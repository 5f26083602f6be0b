// The picture: chooses what plays it, and keeps the last frame while nothing does.

import { canPlay, Player } from "./player.js";
import { JpegPlayer } from "./jpeg.js";

export const MIME = 'video/mp4; codecs="avc1.42C01E"';

export const playsH264 = canPlay(MIME);

export class Stage {
  /** on: frame(media time in seconds or null, display time in milliseconds), problem(sentence). */
  constructor(root, on) {
    this.root = root;
    this.on = on;
    this.video = root.querySelector("video");
    this.canvas = root.querySelector("canvas");
    watchFrames(this.video, (mediaTime, when) => this.#shown(this.live ? null : mediaTime, when));
  }

  /** Plays chunks of the socket. */
  play({ format, mime, config }) {
    this.hold();
    const on = { frame: (...frame) => this.#shown(...frame), problem: (text) => this.on.problem(text) };
    this.player = format === "jpeg" ? new JpegPlayer(this.canvas, config.fps, on) : new Player(this.video, mime, on);
    this.jpeg = format === "jpeg";
  }

  push(bytes, metadata) {
    this.player?.push(bytes, this.jpeg ? metadata : undefined);
  }

  /** Plays a WebRTC stream. */
  stream(media) {
    this.hold();
    this.live = true;
    this.video.srcObject = media;
    this.video.play().catch((error) => {
      if (error.name === "NotAllowedError") this.on.problem("The browser blocks playing: press Play again.");
    });
  }

  /** Media seconds per second; WebRTC needs none, its frames are shown as they arrive. */
  set speed(speed) {
    if (this.player) this.player.speed = speed;
  }

  pause(paused) {
    this.player?.pause(paused);
  }

  /** Stops playing and leaves the last frame in view. */
  hold() {
    if (this.video.readyState >= 2 && !this.jpeg) {
      this.canvas.width = this.video.videoWidth;
      this.canvas.height = this.video.videoHeight;
      this.canvas.getContext("2d").drawImage(this.video, 0, 0);
      this.root.dataset.still = "";
    }
    this.player?.close();
    this.video.srcObject = null;
    Object.assign(this, { player: null, live: false, jpeg: false });
  }

  /** The shape of the pictures that come, and whether their pixels are worth showing as such. */
  shape(width, height, modelHeight) {
    this.root.style.setProperty("--ratio", width / height);
    document.documentElement.style.setProperty("--ratio", width / height);
    this.root.classList.toggle("pixels", modelHeight < 128);
  }

  #shown(mediaTime, when) {
    if (!this.player && !this.live) return; // a late call about what is over
    if (!this.jpeg) delete this.root.dataset.still;
    else this.root.dataset.still = "";
    this.root.dataset.shown = "";
    this.on.frame(mediaTime, when);
  }
}

/**
 * Calls back for every frame that `video` shows, with its media time in seconds and the time of its display on
 * performance.now()'s clock in milliseconds.
 */
function watchFrames(video, callback) {
  if ("requestVideoFrameCallback" in video) {
    const shown = (now, { mediaTime, expectedDisplayTime }) => {
      callback(mediaTime, Math.max(now, expectedDisplayTime));
      video.requestVideoFrameCallback(shown);
    };
    return void video.requestVideoFrameCallback(shown);
  }
  let last = 0;
  const poll = (now) => {
    const count = video.getVideoPlaybackQuality().totalVideoFrames;
    if (count !== last && video.readyState >= 2) callback(video.currentTime, now);
    last = count;
    requestAnimationFrame(poll);
  };
  requestAnimationFrame(poll);
}
