// Which prompt each chunk was made from, and which interactions are still on their way.

export class Prompts {
  first = null; // the prompt that this take began with
  history = []; // its changes: { chunk, prompt?, adapters?, transition_chunks? }, what a resume needs
  active = null;
  take = null;
  pending = new Map(); // event_id -> { event, transition, state: "held" | "sent" | "queued" | "blending", at }

  begin(prompt) {
    this.first = prompt;
    this.history = [];
    this.active = null;
    this.take = null;
    this.pending.clear();
  }

  /** Keeps an interaction until a chunk says that it took effect. Returns its event_id. */
  add(event, transition) {
    const id = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random().toString(36).slice(2)}`;
    this.pending.set(id, { event, transition, state: "held", at: performance.now() });
    return id;
  }

  mark(id, state) {
    const entry = this.pending.get(id);
    if (entry && entry.state !== "blending") entry.state = state;
  }

  forget(id) {
    this.pending.delete(id);
  }

  /** Reads one chunk's metadata. Returns the interactions that it begins: [{ id, event, at }]. */
  chunk({ generation_chunk_index: chunk, prompt, take = 0, started_event_ids, completed_event_ids }) {
    const begun = (started_event_ids ?? []).filter((id) => this.pending.has(id));
    const started = begun.map((id) => ({ id, ...this.pending.get(id) }));
    this.take ??= take; // a resumed or watched session may be in a later take
    const restarted = take !== this.take;
    if (restarted) Object.assign(this, { take, first: prompt, history: [] });
    for (const { event, transition } of started) {
      const entry = { chunk };
      if (event.prompt !== undefined && !restarted) entry.prompt = event.prompt;
      if (event.adapters !== undefined) entry.adapters = event.adapters;
      if (transition && entry.prompt) entry.transition_chunks = transition;
      if (entry.prompt ?? entry.adapters) this.history.push(entry);
    }
    this.active = prompt;
    for (const id of begun) this.pending.get(id).state = "blending";
    for (const id of completed_event_ids ?? []) this.pending.delete(id);
    return started;
  }

  /** What was asked for last and is not the only prompt at work yet: { prompt, state }, or null. */
  get next() {
    const prompts = [...this.pending.values()].filter(({ event }) => event.prompt !== undefined);
    return prompts.length ? { prompt: prompts.at(-1).event.prompt, state: prompts.at(-1).state } : null;
  }

  /** History up to `chunk`, the next one to be made; what began later in chunks that are lost begins there. */
  until(chunk) {
    return this.history.map((entry) => ({ ...entry, chunk: Math.min(entry.chunk, chunk) }));
  }

  /** What has to be asked again after a reconnect: [[id, entry]]. */
  get unanswered() {
    return [...this.pending].filter(([, { state }]) => state !== "blending");
  }
}
