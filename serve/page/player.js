// Plays fMP4 fragments through MediaSource, close to the newest frame.

const RESERVE = 0.15; // seconds of media that should be left when the next chunk arrives
const [SLOWEST, FASTEST] = [0.95, 1.08]; // how far the player's rate goes from the session's speed to keep it
const GAIN = 0.4; // change of the rate per second that the reserve is off
const JUMP = 2; // seconds behind from which the player jumps and does not catch up
const KEEP = 20; // seconds of past media that stay in the buffer
const RECENT = 6; // arrivals over which the reserve is measured

const Source = window.MediaSource ?? window.ManagedMediaSource;

export function canPlay(mime) {
  return Boolean(Source?.isTypeSupported(mime));
}

export class Player {
  speed = 1;
  paused = false;

  /** on: problem(sentence) when the browser gives up on the media. */
  constructor(video, mime, on) {
    this.video = video;
    this.on = on;
    this.mime = mime;
    this.waiting = [];
    this.spare = [];
    this.source = new Source();
    this.source.onsourceopen = () => this.#opened();
    video.disableRemotePlayback = true; // iPhones ask for it
    this.url = URL.createObjectURL(this.source);
    video.srcObject = null;
    video.src = this.url;
    video.onerror = () => {
      this.on?.problem(`The browser could not play the video: ${video.error?.message || "no reason given"}.`);
    };
  }

  /** Appends one fragment, which may begin with a new init segment of the type `mime`. */
  push(bytes, mime = this.mime) {
    this.waiting.push({ bytes, mime });
    this.#append();
  }

  pause(paused) {
    this.paused = paused;
    if (paused) this.video.pause();
    else this.#play();
  }

  close() {
    this.on = null;
    this.video.onerror = null;
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load();
    URL.revokeObjectURL(this.url);
  }

  #opened() {
    if (!this.on) return;
    this.buffer = this.source.addSourceBuffer(this.mime);
    this.buffer.onupdateend = () => this.#updated();
    this.#append();
  }

  #append() {
    if (!this.buffer || this.buffer.updating || !this.waiting.length || this.source.readyState !== "open") return;
    const { bytes, mime } = this.waiting[0];
    if (mime !== this.mime) this.buffer.changeType(mime);
    this.mime = mime;
    this.#measure();
    try {
      this.buffer.appendBuffer(bytes);
      this.waiting.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError") {
        this.on?.problem(`The browser refused the video: ${error.message}`);
        return;
      }
      this.buffer.remove(0, Math.max(this.video.currentTime - 1, 0.1)); // its end appends again
    }
  }

  #updated() {
    if (!this.on) return;
    this.#steer();
    this.#trim();
    this.#append();
  }

  /** How much media is left when a chunk arrives, in seconds of waiting time. */
  #measure() {
    if (!this.playing || this.paused) return;
    this.spare.push(Math.max(this.#end() - this.video.currentTime, 0) / this.speed);
    if (this.spare.length > RECENT) this.spare.shift();
  }

  #end() {
    const { buffered } = this.buffer;
    return buffered.length ? buffered.end(buffered.length - 1) : 0;
  }

  #steer() {
    const { buffered } = this.buffer;
    if (!buffered.length) return;
    const newest = buffered.start(buffered.length - 1);
    const inside = [...Array(buffered.length).keys()].some(
      (i) => buffered.start(i) <= this.video.currentTime && this.video.currentTime < buffered.end(i) - 0.01,
    );
    // The first frame, and the frame after those that the server skipped, are not where playing got to.
    if (!inside && this.video.currentTime < newest) this.#seek(newest);
    const low = Math.min(...this.spare);
    if (this.spare.length && low * this.speed > JUMP) this.#seek(this.#end() - RESERVE * this.speed);
    const rate = this.spare.length ? 1 + GAIN * (low - RESERVE) : 1;
    this.video.playbackRate = this.speed * Math.min(Math.max(rate, SLOWEST), FASTEST);
    this.#play();
  }

  #seek(time) {
    this.spare = [];
    this.video.currentTime = time;
  }

  /** The first frame alone is shown but not played: playing it at once would run dry before the next chunk. */
  #play() {
    const ready = this.buffer && this.#end() - this.video.currentTime > 0.3 * this.speed;
    if (this.paused || !(this.playing || ready)) return;
    this.playing = true;
    if (this.video.paused) this.video.play().catch((error) => this.#refused(error));
  }

  #refused(error) {
    if (error.name === "NotAllowedError") this.on?.problem("The browser blocks playing: press Play again.");
  }

  #trim() {
    const { buffered } = this.buffer;
    const old = this.video.currentTime - KEEP;
    if (!this.buffer.updating && buffered.length && old - buffered.start(0) > KEEP) this.buffer.remove(0, old);
  }
}
