/*
 * The session that is open: its events as they come, or those around a number.
 *
 * At most MOST_ROWS events are shown, and they are drawn at most once a frame, so that the page is as quick after a day
 * as at first. What is being read never moves: while an event is open or has the focus, or somebody has scrolled up, or
 * has asked for it, nothing is drawn, and what comes is counted.
 */

import { element, grouped, setText } from "./dom.js";
import { Follow } from "./follow.js";
import { get, now } from "./gateway.js";
import { eventRow, gapRow, toggle } from "./rows.js";
import { Status } from "./status.js";

const MOST_ROWS = 500;
const AROUND = 100; // events before and after a number that is jumped to

export class SessionPane {
  #pane = document.getElementById("opened");
  #scroller = document.getElementById("scroller");
  #list = document.getElementById("events");
  #pause = document.getElementById("pause");
  #jump = document.getElementById("jump");
  #controls = document.querySelectorAll("#opened .controls :is(button, input)");
  #earlier = document.getElementById("earlier");
  #later = document.getElementById("later");
  #id = null;
  #follow = null;
  #isDue = false; // to be drawn
  #isWaiting = false; // for the time to draw
  #shown = null; // the number of the last event in the list
  #asked = false; // to pause
  #scrolledUp = false;
  #scrollTop = 0;
  #around = null; // stands for the events that are shown instead of the newest
  #status = new Status();

  constructor() {
    this.#list.addEventListener("click", (event) => this.#clicked(event));
    this.#list.addEventListener("focusin", () => this.#draw());
    this.#list.addEventListener("focusout", () => this.#soon());
    this.#scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new ResizeObserver(() => this.#soon()).observe(this.#scroller);
    this.#pause.addEventListener("click", () => this.togglePause());
    document.getElementById("jump-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const number = this.#jump.value.trim();
      if (!/^\d{1,19}$/.test(number)) return;
      this.focus();
      const address = `#${this.#id}@${number}`;
      if (location.hash === address) this.open(this.#id, number);
      else location.hash = address;
    });
  }

  /** Show a session, at its end or around a number; null shows none. */
  open(id, at) {
    if (id !== this.#id) {
      this.#follow?.stop();
      this.#id = id;
      this.#follow = id === null ? null : new Follow(id, () => this.#soon());
      this.#pane.hidden = id === null;
      document.getElementById("nothing").hidden = id !== null;
      this.#status.begin(id, this.#follow);
    }
    this.#jump.value = at ?? "";
    if (this.#selected()) this.focus();
    this.#list.replaceChildren();
    this.#shown = this.#around = null;
    this.#asked = this.#scrolledUp = false;
    if (id !== null && at !== null) void this.#showAround(Number(at));
    this.#soon();
  }

  focus() {
    this.#scroller.focus({ preventScroll: true });
  }

  focusJump() {
    this.#jump.focus();
    this.#jump.select();
  }

  togglePause() {
    if (this.#follow?.isOver) return;
    if (this.#around) location.hash = `#${this.#id}`;
    else if (this.#isHeld()) this.#resume();
    else this.#asked = true;
    this.#draw();
  }

  /** Leave what is being read; return whether anything was. */
  leave() {
    if (this.#list.querySelector(".open")) this.#close();
    else if (this.#around) location.hash = `#${this.#id}`;
    else if (this.#selected() || this.#scrolledUp) this.#letGo();
    else return false;
    this.#draw();
    return true;
  }

  /** Move the focus to the next event or the one before; at first, to the newest that is seen. */
  move(step) {
    const rows = [...this.#list.querySelectorAll(".event")];
    const selected = this.#selected();
    let next = selected ? rows[rows.indexOf(selected) + step] : rows.findLast((row) => this.#isSeen(row));
    next ??= selected ?? rows.at(-1);
    if (!next) return;
    this.#focusRow(next);
    next.firstElementChild.scrollIntoView({ block: "nearest" });
  }

  #selected() {
    return document.activeElement?.closest("#events .event") ?? null;
  }

  #isSeen(row) {
    const seen = this.#scroller.getBoundingClientRect();
    const { top, bottom } = row.getBoundingClientRect();
    return top >= seen.top - 1 && bottom <= seen.bottom + 1;
  }

  #focusRow(row) {
    for (const line of this.#list.querySelectorAll(".line[tabindex='0']")) line.tabIndex = -1;
    row.firstElementChild.tabIndex = 0;
    row.firstElementChild.focus({ preventScroll: true });
  }

  #clicked(event) {
    const line = event.target.closest(".line");
    if (!line) return;
    const row = line.parentElement;
    const opened = toggle(row);
    // Closed by a pointer, it is done with; closed by a key, the keys go on from here.
    if (opened || event.detail === 0) this.#focusRow(row);
    else this.focus();
    if (opened) this.#reveal(row);
    this.#draw();
  }

  /** Scroll down to what was opened, as far as its line stays to be seen. */
  #reveal(row) {
    const seen = this.#scroller.getBoundingClientRect();
    const { top, bottom } = row.getBoundingClientRect();
    if (bottom > seen.bottom) this.#scroller.scrollTop += Math.min(bottom - seen.bottom, top - seen.top);
  }

  #isHeld() {
    return this.#asked || this.#scrolledUp || Boolean(this.#selected() ?? this.#list.querySelector(".open"));
  }

  #close() {
    const row = this.#selected();
    for (const open of this.#list.querySelectorAll(".open")) toggle(open);
    if (row) this.#focusRow(row);
  }

  #letGo() {
    if (this.#selected()) this.focus();
    this.#scrolledUp = false;
  }

  #resume() {
    this.#close();
    this.#letGo();
    this.#asked = false;
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    if (scrollTop < this.#scrollTop - 1) this.#scrolledUp = true;
    if (scrollTop + clientHeight >= scrollHeight - 2) this.#scrolledUp = false;
    this.#scrollTop = scrollTop;
    this.#soon();
  }

  #toNewest() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#scrollTop = this.#scroller.scrollTop;
  }

  /** Draw in the next frame; but leave as much time between drawings as they take, so that keys need not wait. */
  #soon() {
    this.#isDue = true;
    if (this.#isWaiting) return;
    this.#isWaiting = true;
    requestAnimationFrame(() => {
      const began = performance.now();
      this.#draw();
      setTimeout(() => setTimeout(() => this.#rested(), performance.now() - began)); // when it is laid out and painted
    });
  }

  #rested() {
    this.#isWaiting = false;
    if (this.#isDue) this.#soon();
  }

  #draw() {
    this.#isDue = false;
    if (!this.#follow) return;
    const isLive = !this.#around && !this.#isHeld();
    if (isLive) this.#append(this.#follow.after(this.#shown));
    this.#tell();
    if (isLive) this.#toNewest();
  }

  #append(events) {
    if (!events.length) return;
    const first = events[0].seq;
    if (this.#shown !== null && this.#shown > first) {
      this.#list.replaceChildren(); // the session has begun anew, from a backup say
    } else if (this.#shown !== null && this.#shown + 1 < first) {
      this.#list.append(gapRow(this.#id, this.#shown + 1, first - 1));
    }
    const today = new Date(now()).toISOString().slice(0, 10);
    const rows = events.slice(-MOST_ROWS).map((event) => eventRow(event.text, today));
    const excess = this.#list.childElementCount + rows.length - MOST_ROWS;
    if (excess >= this.#list.childElementCount) this.#list.replaceChildren();
    else for (let count = 0; count < excess; count++) this.#list.firstElementChild.remove();
    this.#list.append(...rows);
    this.#shown = events.at(-1).seq;
  }

  async #showAround(at) {
    const around = (this.#around = {});
    const follow = this.#follow;
    this.#list.classList.add("stale");
    let problem = null;
    try {
      const session = await get(`api/collab/sessions/${this.#id}`);
      const head = (await session.json()).lastServerSeq;
      at = Math.min(Math.max(1, at), head);
      const since = Math.max(0, at - 1 - AROUND);
      const query = new URLSearchParams({ sessionId: this.#id, sinceServerSeq: since, limit: at + AROUND - since });
      const answer = await get(`api/collab/events?${query}`, { Accept: "application/x-ndjson" });
      const events = (await answer.text()).split("\n").filter(Boolean);
      if (this.#around !== around || this.#follow !== follow) return; // somebody is somewhere else by now
      const today = new Date(now()).toISOString().slice(0, 10);
      this.#list.replaceChildren(...events.map((text) => eventRow(text, today)));
    } catch {
      if (this.#around !== around || this.#follow !== follow) return;
      problem = "The events could not be read.";
    }
    this.#list.classList.remove("stale");
    if (problem) this.#list.replaceChildren(element("li", { class: "gap" }, problem));
    const row = this.#list.querySelector(`[data-seq="${at}"]`);
    if (row) {
      row.classList.add("found");
      if (!document.activeElement.matches("input")) this.#focusRow(row);
      row.scrollIntoView({ block: "center" });
      // Once more, when the browser knows how high the lines around it are.
      requestAnimationFrame(() => row.scrollIntoView({ block: "center" }));
    }
    this.#draw();
  }

  #tell() {
    const follow = this.#follow;
    const isPaused = this.#around !== null || this.#isHeld();
    const news = this.#around ? 0 : Math.max(0, follow.head - (this.#shown ?? follow.head));
    setText(this.#pause.firstElementChild, this.#around ? "Back to live" : isPaused ? "Resume" : "Pause");
    setText(this.#pause.lastElementChild, isPaused && news ? `${grouped(news)} new` : "");
    for (const control of this.#controls) control.disabled = follow.isOver;
    this.#status.tell(isPaused);
    this.#tellEnds();
  }

  /** Link to what lies before and after the list. */
  #tellEnds() {
    const { head } = this.#follow;
    const rows = this.#list.querySelectorAll(".event");
    const first = rows.length ? Number(rows[0].dataset.seq) : 1;
    const last = rows.length ? Number(rows[rows.length - 1].dataset.seq) : head;
    this.#earlier.hidden = first <= 1;
    this.#earlier.href = `#${this.#id}@${first - 1}`;
    setText(this.#earlier, `${grouped(first - 1)} earlier`);
    this.#later.hidden = !this.#around || last >= head;
    this.#later.href = `#${this.#id}@${last + 1}`;
    setText(this.#later, `${grouped(head - last)} later`);
    const isEmpty = !rows.length && this.#follow.session && head === 0;
    document.getElementById("empty").hidden = !isEmpty || this.#follow.isOver;
  }
}
