/* What is to be known of the open session at a glance: its state, its head, how fast it grows, and who follows it. */

import { element, grouped, setText, visible } from "./dom.js";
import { everyNowAndThen, get } from "./gateway.js";
import { scalar } from "./json.js";

const FOLLOWERS_MILLISECONDS = 2000;
const RATE_MILLISECONDS = 500;
const TITLE = document.title;

const STATES = {
  connecting: "connecting …",
  "catching up": "catching up",
  live: "live",
  paused: "paused",
  reconnecting: "reconnecting …",
  ended: "ended: the session was deleted",
  missing: "there is no such session",
};

export class Status {
  #number = document.getElementById("number");
  #state = document.getElementById("state");
  #about = document.getElementById("about");
  #head = document.getElementById("head");
  #rate = document.getElementById("rate");
  #followers = document.getElementById("followers");
  #id = null;
  #follow = null;
  #described = null; // the session whose room and owner are shown
  #counted = null; // the state of the connection when the followers were counted
  #refreshFollowers;

  constructor() {
    setInterval(() => this.#tellRate(), RATE_MILLISECONDS);
    this.#refreshFollowers = everyNowAndThen(FOLLOWERS_MILLISECONDS, () => this.#tellFollowers());
  }

  /** Begin with another session, or with none. */
  begin(id, follow) {
    this.#id = id;
    this.#follow = follow;
    this.#described = this.#counted = null;
    document.title = id === null ? TITLE : `Session ${id} · ${TITLE}`;
    setText(this.#number, id ?? "");
    for (const part of [this.#state, this.#about, this.#head, this.#rate, this.#followers]) setText(part, "");
  }

  /** Tell what has changed. */
  tell(isPaused) {
    const { state, session, head } = this.#follow;
    const isConnected = state === "live" || state === "catching up";
    const shown = isPaused && isConnected ? "paused" : state;
    setText(this.#state, STATES[shown]);
    this.#state.dataset.state = shown;
    setText(this.#head, session ? grouped(head) : "–");
    if (session !== this.#described) this.#describe(session);
    if (state === this.#counted) return;
    this.#counted = state;
    this.#refreshFollowers();
  }

  #describe(session) {
    this.#described = session;
    this.#about.replaceChildren();
    for (const [label, key] of [["room", "room"], ["owner", "ownerId"], ["language", "languageId"]]) {
      const value = scalar(session.get(key));
      if (value !== null) this.#add(label, element("bdi", {}, visible(value)));
    }
    const created = scalar(session.get("createdAt"));
    this.#add("created", element("time", { datetime: created }, `${created.slice(0, 19).replace("T", " ")} UTC`));
  }

  #add(label, value) {
    this.#about.append(element("div", {}, element("dt", {}, label), element("dd", {}, value)));
  }

  #tellRate() {
    if (!this.#follow) return;
    const rate = this.#follow.rate();
    if (rate === null) setText(this.#rate, "–");
    else setText(this.#rate, `${rate === 0 || rate >= 10 ? grouped(Math.round(rate)) : rate.toFixed(1)}/s`);
  }

  async #tellFollowers() {
    const id = this.#id;
    if (id === null) return;
    let text = "–";
    try {
      const answer = this.#follow.isOver ? null : await get(`inspector/followers/${id}`);
      if (answer) text = grouped((await answer.json()).followers);
    } catch {
      // which the state tells
    }
    if (id === this.#id) setText(this.#followers, text);
  }
}
