/*
 * Following a session: its newest events, each once and in order, however often the connection is lost.
 *
 * The browser's EventSource would come again by itself, but from the number seen last, through everything that was
 * missed, and it gives up for good when the answer is an error. So each connection is used once; before the next, the
 * session is asked for: it may be gone, or so far ahead that only its end is worth showing.
 */

import { members } from "./json.js";

const FIRST = 200; // events to begin with
const KEPT = 500; // events that are kept
const KEPT_CHARACTERS = 24_000_000; // and at most so much of their text
const RETRY_MILLISECONDS = [250, 500, 1000, 2000];
const ANSWER_MILLISECONDS = 10_000;
const ASLEEP_MILLISECONDS = 30_000; // for which a page nobody sees goes on
const RATE_MILLISECONDS = 5000;

export class Follow {
  /** connecting, catching up, live, reconnecting; ended and missing are for good. */
  state = "connecting";
  /** The session as it was asked for last, as `members`. */
  session = null;
  /** The number of the newest event that is known of. */
  head = 0;
  /** The newest events, as `{seq, text}`, without a gap between them. */
  events = [];

  #id;
  #changed;
  #last = null;
  #characters = 0;
  #source = null;
  #asking = null;
  #timer = 0;
  #attempts = 0;
  #samples = [];

  constructor(id, changed) {
    this.#id = id;
    this.#changed = changed;
    document.addEventListener("visibilitychange", this.#seen);
    this.#connect();
  }

  stop() {
    document.removeEventListener("visibilitychange", this.#seen);
    this.#disconnect();
  }

  get isOver() {
    return this.state === "ended" || this.state === "missing";
  }

  /** Return the events that are kept with numbers above `seq`; all of them, when it is null or lies ahead. */
  after(seq) {
    const { events } = this;
    if (!events.length || seq === null || seq > events.at(-1).seq) return events.slice();
    return events.slice(Math.max(0, seq - events[0].seq + 1));
  }

  /** Return the events per second of the last seconds, or null when that is not known; to be called now and then. */
  rate() {
    if (this.state !== "live") {
      this.#samples = [];
      return null;
    }
    const now = performance.now();
    this.#samples.push([now, this.head]);
    while (now - this.#samples[0][0] > RATE_MILLISECONDS) this.#samples.shift();
    const [since, head] = this.#samples[0];
    return now > since ? ((this.head - head) * 1000) / (now - since) : null;
  }

  #seen = () => {
    if (document.hidden) {
      // Nobody looks: leave the connection, of which a browser has only six for each server, to others.
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.#disconnect(), ASLEEP_MILLISECONDS);
    } else {
      clearTimeout(this.#timer);
      if (!this.#source && !this.#asking && !this.isOver) this.#connect();
    }
  };

  #disconnect() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    this.#source?.close();
    this.#asking = this.#source = null;
  }

  async #connect() {
    this.#disconnect();
    const asking = (this.#asking = new AbortController());
    const late = setTimeout(() => asking.abort(), ANSWER_MILLISECONDS);
    let status = 0;
    let text = "";
    try {
      const answer = await fetch(`api/collab/sessions/${this.#id}`, { signal: asking.signal });
      text = await answer.text();
      status = answer.status;
    } catch {
      // no answer, which is status 0
    } finally {
      clearTimeout(late);
    }
    if (this.#asking !== asking) return; // stopped meanwhile
    this.#asking = null;
    if (status === 404 || status === 400) this.#become(this.session ? "ended" : "missing");
    else if (status !== 200) this.#again();
    else this.#follow(members(text));
  }

  #follow(session) {
    this.session = session;
    this.head = Number(session.get("lastServerSeq"));
    if (this.#last === null || this.#last > this.head || this.head - this.#last > KEPT) {
      this.#last = Math.max(0, this.head - FIRST);
      this.#drop(this.events.length);
    }
    const source = new EventSource(`api/collab/events?sessionId=${this.#id}&sinceServerSeq=${this.#last}`);
    this.#source = source;
    source.addEventListener("open", () => this.#become("catching up"));
    source.addEventListener("message", (message) => this.#take(Number(message.lastEventId), message.data));
    source.addEventListener("caught-up", () => {
      this.#attempts = 0;
      this.#become("live");
    });
    source.addEventListener("error", () => {
      source.close();
      this.#source = null;
      this.#again();
    });
    this.#changed();
  }

  #take(seq, text) {
    if (seq <= this.#last) return;
    if (this.events.length && seq !== this.events.at(-1).seq + 1) this.#drop(this.events.length);
    this.#last = seq;
    this.events.push({ seq, text });
    this.#characters += text.length;
    if (this.events.length > 2 * KEPT) this.#drop(KEPT);
    while (this.#characters > KEPT_CHARACTERS && this.events.length > 1) this.#drop(1);
    if (seq > this.head) this.head = seq;
    this.#changed();
  }

  #drop(count) {
    for (const event of this.events.splice(0, count)) this.#characters -= event.text.length;
  }

  #again() {
    const wait = RETRY_MILLISECONDS[Math.min(this.#attempts++, RETRY_MILLISECONDS.length - 1)];
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#connect(), wait);
    this.#become("reconnecting");
  }

  #become(state) {
    if (this.state === state) return;
    this.state = state;
    this.#changed();
  }
}
