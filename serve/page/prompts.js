// Which prompt each chunk was made from, which interactions are still on their way, and where a resume goes on.

const RECENT = 64; // chunks of which some may not have been shown yet

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
    this.pending.clear();
    this.reconnected(0);
  }

  /** The next chunks come over another connection, from chunk `from` on or later. */
  reconnected(from) {
    Object.assign(this, { take: null, recent: [], from }); // a session joined again may be in a later take
  }

  /** The first chunk of this take that was not shown; all up to `time` were, in seconds of the media, if known. */
  nextChunk(fps, time) {
    const take = this.recent.filter((chunk) => chunk.take === this.take);
    const shown = time === null ? take : take.filter((chunk) => chunk.first_frame / fps <= time + 0.001);
    return shown.length ? shown.at(-1).generation_chunk_index + 1 : (take[0]?.generation_chunk_index ?? this.from);
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
  chunk(metadata) {
    const { generation_chunk_index: chunk, prompt, take, started_event_ids, completed_event_ids } = metadata;
    this.recent = [...this.recent.slice(1 - RECENT), metadata];
    const begun = (started_event_ids ?? []).filter((id) => this.pending.has(id));
    const started = begun.map((id) => ({ id, ...this.pending.get(id) }));
    this.take ??= take;
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
    for (const [id, { state, event }] of this.pending) {
      if (state !== "blending" || begun.includes(id)) continue;
      // Another prompt, or a new take, ends a blend before its end.
      if (restarted || (event.prompt !== undefined && started.some((one) => one.event.prompt !== undefined))) {
        this.pending.delete(id);
      }
    }
    for (const id of begun) this.pending.get(id).state = "blending";
    for (const id of completed_event_ids ?? []) this.pending.delete(id);
    return started;
  }

  /** What was asked for last and is not the only prompt at work yet: { prompt, state, transition }, or null. */
  get next() {
    const last = [...this.pending.values()].findLast(({ event }) => event.prompt !== undefined);
    return last ? { prompt: last.event.prompt, state: last.state, transition: last.transition } : null;
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
