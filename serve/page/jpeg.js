// Plays a chunk's JPEGs on a canvas: for browsers that cannot play H.264.

export class JpegPlayer {
  speed = 1;
  paused = false;

  /** on: frame(media time in seconds, display time in milliseconds), problem(sentence). */
  constructor(canvas, fps, on) {
    Object.assign(this, { canvas, fps, on, queue: [] });
    this.due = 0;
    this.timer = requestAnimationFrame((now) => this.#tick(now));
  }

  /** Takes one chunk: each JPEG follows its length, four bytes with the highest first. */
  push(bytes, metadata) {
    const view = new DataView(bytes);
    for (let at = 0, index = metadata.first_frame; at < bytes.byteLength; index++) {
      const length = view.getUint32(at);
      this.queue.push({ index, data: new Blob([bytes.slice(at + 4, at + 4 + length)], { type: "image/jpeg" }) });
      at += 4 + length;
    }
  }

  pause(paused) {
    this.paused = paused;
  }

  close() {
    this.on = null;
    cancelAnimationFrame(this.timer);
  }

  async #tick(now) {
    if (now >= this.due && !this.paused && this.queue.length) {
      const { index, data } = this.queue.shift();
      const behind = this.queue.length > this.fps; // over a second: hurry
      this.due = Math.max(this.due, now - 100) + 1000 / this.fps / this.speed / (behind ? 2 : 1);
      await this.#draw(data, index);
    }
    if (this.on) this.timer = requestAnimationFrame((next) => this.#tick(next));
  }

  async #draw(data, index) {
    try {
      const picture = await createImageBitmap(data);
      this.canvas.width = picture.width;
      this.canvas.height = picture.height;
      this.canvas.getContext("2d").drawImage(picture, 0, 0);
      picture.close();
      this.on?.frame(index / this.fps, performance.now());
    } catch (error) {
      this.on?.problem(`The browser could not read a picture: ${error.message}`);
    }
  }
}
