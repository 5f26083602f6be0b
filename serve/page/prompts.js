// Which prompt each chunk was made from, and which interactions are still on their way.

export class Prompts {
  history = []; // { chunk, prompt, transition_chunks? } of this take: what a resume needs
  active = null;
  take = null;
  pending = new Map(); // event_id -> { event, transition, state: "held" | "sent" | "queued" | "blending", at }

  begin(prompt) {
    this.history = prompt === null ? [] : [{ chunk: 0, prompt }];
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
    const changed = started.findLast(({ event }) => event.prompt !== undefined);
    this.take ??= take; // a resumed or watched session may be in a later take
    if (take !== this.take) {
      this.take = take;
      this.history = [{ chunk: 0, prompt }];
    } else if (changed || this.history.at(-1)?.prompt !== prompt) {
      const entry = { chunk, prompt };
      if (changed?.transition) entry.transition_chunks = changed.transition;
      this.history.push(entry);
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
