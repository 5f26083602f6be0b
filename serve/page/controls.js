// The settings beside the picture: seed, speed, transport, model, adapters.

const $ = (selector) => document.querySelector(selector);
const SEEDS = 2 ** 31;

/** A group of buttons of which one is chosen. */
class Choice {
  constructor(root, changed) {
    this.buttons = [...root.querySelectorAll("button")];
    for (const button of this.buttons) {
      button.onclick = () => {
        if (this.value === button.value) return;
        this.value = button.value;
        changed(this.value);
      };
    }
  }

  get value() {
    return this.buttons.find((button) => button.getAttribute("aria-pressed") === "true").value;
  }

  set value(value) {
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.value === value));
  }
}

export class Controls {
  /** on: seed(number), speed(number), transport(name), adapters({ name: strength }) */
  constructor(on) {
    this.on = on;
    this.seedField = $("#seed");
    $("#dice").onclick = () => {
      this.seedField.value = Math.floor(Math.random() * SEEDS);
    };
    this.speedChoice = new Choice($("#speed"), (value) => on.speed(Number(value)));
    this.transportChoice = new Choice($("#transport"), on.transport);
    $("#model").onchange = () => this.#choose();
    $("#blend").oninput = () => this.#blend();
    this.seedField.value = 1;
  }

  /** The whole number in the seed field; null if there is none. */
  get seed() {
    const text = this.seedField.value.trim();
    return /^\d+$/.test(text) && Number.isSafeInteger(Number(text)) ? Number(text) : null;
  }

  set seed(seed) {
    this.seedField.value = seed;
  }

  get speed() {
    return Number(this.speedChoice.value);
  }

  set speed(speed) {
    this.speedChoice.value = String(speed);
  }

  get transport() {
    return this.transportChoice.value;
  }

  /** The id to ask for; undefined where there is no choice. */
  get chosenModel() {
    return this.models?.length > 1 ? this.model.id : undefined;
  }

  get blend() {
    return Number($("#blend").value);
  }

  /** { name: strength } of the sliders that were moved, undefined if none was: the others are as the server has them. */
  get adapters() {
    const sliders = [...document.querySelectorAll("#adapters input[data-moved]")];
    return sliders.length ? Object.fromEntries(sliders.map(({ name, value }) => [name, Number(value)])) : undefined;
  }

  /** Shows what the server offers. `chosen` is called with the model now chosen. */
  offer(models, chosen) {
    this.models = models;
    this.chosen = chosen;
    $("#model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
    $("#model").hidden = models.length < 2;
    this.#choose();
  }

  /** Viewers read and change nothing. */
  disable(disabled) {
    for (const field of document.querySelectorAll(".own input, .own textarea, .own button, .own select")) {
      field.disabled = disabled;
    }
  }

  #choose() {
    const model = this.models.find(({ id }) => id === $("#model").value) ?? this.models[0];
    this.model = model;
    $("#model-name").textContent = model.id;
    $("#model-name").hidden = this.models.length > 1;
    $("#model-facts").textContent = `${model.width} × ${model.height}, ${model.fps} fps, preset ${model.preset}`;
    this.#blend();
    $("#adapters-row").hidden = !model.adapters?.length;
    $("#adapters").replaceChildren(...(model.adapters ?? []).map((name) => this.#slider(name, model.strengths?.[name] ?? 1)));
    this.chosen(model);
  }

  #slider(name, strength) {
    const row = document.createElement("label");
    const [title, input, value] = ["span", "input", "output"].map((tag) => document.createElement(tag));
    Object.assign(input, { type: "range", name, min: 0, max: 2, step: 0.05, value: strength });
    title.textContent = name;
    value.textContent = strength.toFixed(2);
    input.oninput = () => {
      value.textContent = Number(input.value).toFixed(2);
    };
    input.onchange = () => {
      input.dataset.moved = "";
      this.on.adapters({ [name]: Number(input.value) });
    };
    row.append(title, input, value);
    return row;
  }

  #blend() {
    const { blend } = this;
    $("#blend-value").textContent = blend ? `over ${blend} ${blend === 1 ? "chunk" : "chunks"}` : "at once";
  }
}
