// Live figures: frames per second, latency, and the time that each chunk took against the time it plays.

const BARS = 96;
const RATE_WINDOW = 3000; // milliseconds

export class Strip {
  constructor(root) {
    this.root = root;
    this.canvas = root.querySelector("canvas");
    const names = ["fps", "latency", "chunk", "late", "viewers"];
    this.fields = Object.fromEntries(names.map((name) => [name, root.querySelector(`#${name}`)]));
    this.reset();
    new ResizeObserver(() => this.#draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    setInterval(() => this.#rate(), 500);
  }

  /** Forgets everything, at the begin of a session. */
  reset() {
    Object.assign(this, { frames: [], chunks: [], expected: [], late: 0, edge: 0 });
    for (const field of Object.values(this.fields)) field.textContent = "–";
    this.#draw();
  }

  /** A connection begins again: what was expected of the old one will not come. */
  restart() {
    Object.assign(this, { expected: [], edge: 0 });
  }

  /**
   * One chunk came. `sentAt` lists when the interactions that it begins were sent (milliseconds, performance.now()).
   * Over WebRTC a frame has no media time here: its chunk's frames come up when those before it have played.
   */
  chunk(metadata, { fps, speed }, sentAt) {
    const plays = speed > 0 ? (metadata.num_frames / fps / speed) * 1000 : Infinity;
    const due = Math.max(performance.now(), this.edge);
    this.edge = due + plays;
    for (const at of sentAt) this.expected.push({ at, due, media: (metadata.first_frame - 0.5) / fps });
    this.chunks = [...this.chunks.slice(1 - BARS), { took: metadata.chunk_ms, plays }];
    if (metadata.late_ms >= 1) this.late += 1;
    this.fields.late.textContent = this.late;
    const sorted = this.chunks.map(({ took }) => took).sort((a, b) => a - b);
    this.fields.chunk.textContent = `${Math.round(sorted[Math.floor(sorted.length / 2)])} ms`;
    this.#draw();
  }

  /** A frame is on show. `mediaTime` in seconds, null over WebRTC; `when` in milliseconds. */
  frame(mediaTime, when) {
    this.frames.push(when);
    const shown = this.expected.filter(({ due, media }) => (mediaTime === null ? when >= due : mediaTime >= media));
    if (!shown.length) return;
    this.expected = this.expected.filter((entry) => !shown.includes(entry));
    const latency = (when - shown.at(-1).at) / 1000;
    this.fields.latency.textContent = `${latency.toFixed(latency < 10 ? 2 : 1)} s`;
  }

  viewers(count) {
    this.fields.viewers.textContent = count ?? "–";
  }

  #rate() {
    const now = performance.now();
    this.frames = this.frames.filter((when) => when > now - RATE_WINDOW);
    if (this.frames.length < 2) {
      if (this.chunks.length) this.fields.fps.textContent = "0.0";
      return;
    }
    const seconds = (Math.max(now - 500, this.frames.at(-1)) - this.frames[0]) / 1000;
    this.fields.fps.textContent = ((this.frames.length - 1) / seconds).toFixed(1);
  }

  /** Bars of chunk times; the dashed line is the time in which the chunk plays. */
  #draw() {
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(this.root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const shares = this.chunks.map(({ took, plays }) => took / plays);
    const top = Math.max(1.2, ...shares);
    const y = (share) => height - (share / top) * (height - 2) - 1;
    const step = width / BARS;
    const from = BARS - shares.length;
    shares.forEach((share, index) => {
      pen.fillStyle = colour(share > 1 ? "--bad" : "--accent");
      const at = Math.min(y(share), height - 2);
      pen.fillRect((from + index) * step, at, Math.max(step - 1.5, 1), height - at);
    });
    pen.strokeStyle = colour("--muted");
    pen.setLineDash([3, 4]);
    pen.beginPath();
    pen.moveTo(0, Math.round(y(1)) + 0.5);
    pen.lineTo(width, Math.round(y(1)) + 0.5);
    pen.stroke();
  }
}
