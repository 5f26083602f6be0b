// The picture that a video starts from: chosen, dropped or pasted.

import { clearNotice, notice } from "./notices.js";

const LONGEST = 1280; // pixels; larger pictures are made smaller before they are sent

export class Picture {
  data = null; // data URL

  constructor(root, changed) {
    this.root = root;
    this.changed = changed;
    this.input = root.querySelector("input");
    this.preview = root.querySelector("img");
    this.input.onchange = () => this.#take(this.input.files);
    root.querySelector("#picture-remove").onclick = () => this.clear();
    for (const name of ["dragenter", "dragover"]) {
      document.addEventListener(name, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return;
        event.preventDefault();
        document.body.classList.add("dropping");
      });
    }
    for (const name of ["drop", "dragend", "dragleave"]) {
      document.addEventListener(name, (event) => {
        if (name === "dragleave" && event.relatedTarget) return;
        document.body.classList.remove("dropping");
      });
    }
    document.addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.#take(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) this.#take(event.clipboardData.files);
    });
  }

  clear() {
    this.data = null;
    this.input.value = "";
    this.preview.removeAttribute("src");
    delete this.root.dataset.has;
    this.changed();
  }

  async #take([file]) {
    if (!file || this.input.disabled) return;
    clearNotice("picture");
    try {
      this.data = await smaller(file);
    } catch {
      notice("picture", `${file.name || "The file"} is not a picture that this browser can read.`, { tone: "error" });
      return;
    }
    this.preview.src = this.data;
    this.root.dataset.has = "";
    this.changed();
  }
}

async function smaller(file) {
  const picture = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST / Math.max(picture.width, picture.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  picture.close();
  return file.type === "image/jpeg" ? canvas.toDataURL(file.type, 0.95) : canvas.toDataURL("image/png");
}
