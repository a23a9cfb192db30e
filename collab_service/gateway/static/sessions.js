/* The list of sessions, the most recently active first. It is kept in place: a line that is there is only changed. */

import { element, grouped, setText, visible } from "./dom.js";
import { everyNowAndThen, get, now } from "./gateway.js";
import { elements, members, scalar } from "./json.js";

const REFRESH_MILLISECONDS = 2000;
const PAGE = 50; // sessions that are listed at first, and more with every press of the button
const LARGEST_PAGE = 1000;
const ACTIVE_MILLISECONDS = 10_000;

export class SessionList {
  #list = document.getElementById("session-list");
  #filter = document.getElementById("filter");
  #more = document.getElementById("more-sessions");
  #told = document.getElementById("sessions-told");
  #rows = new Map();
  #sessions = [];
  #wanted = PAGE;
  #hasMore = false;
  #failed = false;
  #current = null;

  constructor() {
    this.refresh = everyNowAndThen(REFRESH_MILLISECONDS, () => this.#refresh());
    this.#filter.addEventListener("input", () => {
      this.#draw();
      this.refresh();
    });
    this.#filter.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.#list.querySelector("a")?.click();
    });
    this.#more.addEventListener("click", () => {
      this.#wanted = this.#wanted === PAGE ? 4 * PAGE : this.#wanted * 2;
      this.refresh();
    });
  }

  /** Mark the session that is open, or none. */
  select(id) {
    this.#current = id;
    for (const [key, row] of this.#rows) mark(row.firstElementChild, key === id);
    this.#reachable();
  }

  /** Move the focus to a session, if it is listed. */
  focus(id) {
    const link = this.#rows.get(id)?.firstElementChild;
    if (!link) return;
    this.#reachable(link);
    link.focus({ preventScroll: true });
    link.scrollIntoView({ block: "nearest" });
  }

  focusFilter() {
    this.#filter.focus();
    this.#filter.select();
  }

  /** Move the focus to a session: the next or the one before; at first, to the one that is open. */
  move(step) {
    const links = [...this.#list.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    const open = Math.max(0, links.findIndex((link) => link.tabIndex === 0));
    const next = links[at < 0 ? open : Math.min(Math.max(at + step, 0), links.length - 1)];
    if (next) this.focus(next.dataset.session);
  }

  async #refresh() {
    if (!this.#list.offsetParent) return; // on a phone a session stands in its place
    const text = this.#text();
    try {
      const [page, owned] = await Promise.all([listed(this.#wanted), text ? ownedBy(text) : []]);
      const known = new Set(page.sessions.map((session) => session.id));
      this.#sessions = page.sessions.concat(owned.filter((session) => !known.has(session.id)));
      this.#hasMore = page.hasMore;
      this.#failed = false;
    } catch {
      this.#failed = true;
    }
    this.#draw();
  }

  #text() {
    return this.#filter.value.trim();
  }

  #draw() {
    const text = this.#text().toLowerCase();
    const found = this.#sessions.filter(
      (session) =>
        session.id.startsWith(text) ||
        session.room?.toLowerCase().includes(text) ||
        session.ownerId?.toLowerCase().includes(text),
    );
    if (/^[1-9]\d{0,18}$/.test(text)) {
      // That very number comes first; whether there is such a session is found out by opening it.
      const at = found.findIndex((session) => session.id === text);
      found.unshift(at < 0 ? { id: text, isGuess: true } : found.splice(at, 1)[0]);
    }
    this.#place(found);
    this.#more.hidden = !this.#hasMore;
    this.#list.classList.toggle("stale", this.#failed);
    setText(this.#told, this.#summary(found.filter((session) => !session.isGuess).length, text));
  }

  #summary(count, text) {
    if (this.#failed) return "The gateway does not answer. Trying again …";
    const loaded = `${grouped(this.#sessions.length)}${this.#hasMore ? " most recently active" : ""}`;
    if (text) return `${grouped(count)} of the ${loaded}`;
    if (!this.#sessions.length) return "There is no session yet.";
    return this.#hasMore ? `The ${loaded}` : `${loaded} session${this.#sessions.length === 1 ? "" : "s"}`;
  }

  #place(sessions) {
    const wanted = new Set(sessions.map((session) => session.id));
    for (const [id, row] of this.#rows) {
      if (wanted.has(id)) continue;
      row.remove();
      this.#rows.delete(id);
    }
    const focused = this.#list.contains(document.activeElement) ? document.activeElement : null;
    let place = this.#list.firstElementChild;
    for (const session of sessions) {
      let row = this.#rows.get(session.id);
      if (!row) {
        row = sessionRow(session.id);
        mark(row.firstElementChild, session.id === this.#current);
        this.#rows.set(session.id, row);
      }
      fill(row, session);
      if (row === place) place = place.nextElementSibling;
      else this.#list.insertBefore(row, place);
    }
    // What is moved loses the focus.
    if (focused && focused !== document.activeElement) focused.focus({ preventScroll: true });
    this.#reachable();
  }

  /** Let the Tab key reach one of the sessions: the given, the focused, the open or the first one. */
  #reachable(chosen = null) {
    const open = this.#rows.get(this.#current)?.firstElementChild;
    const focused = this.#list.contains(document.activeElement) ? document.activeElement : null;
    chosen ??= focused ?? open ?? this.#list.querySelector("a");
    for (const row of this.#rows.values()) row.firstElementChild.tabIndex = row.firstElementChild === chosen ? 0 : -1;
  }
}

/** Return the sessions that were active most recently, as many as are wanted, and whether there are more. */
async function listed(wanted) {
  const sessions = [];
  let next = `?pageSize=${Math.min(wanted, LARGEST_PAGE)}`;
  while (next && sessions.length < wanted) {
    const answer = await get(`api/collab/sessions${next}`);
    sessions.push(...elements(await answer.text()).map(sessionOf));
    next = /<[^>?]*(\?[^>]*)>;\s*rel="next"/.exec(answer.headers.get("link") ?? "")?.[1];
  }
  return { sessions, hasMore: Boolean(next) };
}

async function ownedBy(owner) {
  const answer = await get(`api/collab/sessions?${new URLSearchParams({ ownerId: owner, pageSize: PAGE })}`);
  return elements(await answer.text()).map(sessionOf);
}

function sessionOf(text) {
  return Object.fromEntries([...members(text)].map(([name, value]) => [name, scalar(value)]));
}

function sessionRow(id) {
  const link = element(
    "a",
    { href: `#${id}`, "data-session": id, tabindex: -1 },
    element("span", { class: "id" }, id),
    element("span", { class: "room" }),
    element("time", { class: "age" }),
    element("span", { class: "owner" }),
    element("span", { class: "count" }),
  );
  return element("li", {}, link);
}

function fill(row, session) {
  const [, room, age, owner, count] = row.firstElementChild.children;
  if (session.isGuess) {
    for (const part of [age, owner, count]) setText(part, "");
    setText(room, "Open this number");
    room.said = owner.said = undefined;
    return;
  }
  name(room, session.room, "no room");
  name(owner, session.ownerId && `owner ${session.ownerId}`, "");
  const head = session.lastServerSeq;
  setText(count, head === "0" ? "empty" : `${grouped(head)} event${head === "1" ? "" : "s"}`);
  if (age.dateTime !== session.lastActive) {
    age.dateTime = session.lastActive;
    age.title = `last active ${session.lastActive}`;
  }
  const passed = now() - Date.parse(session.lastActive);
  setText(age, ago(passed));
  row.classList.toggle("active", passed < ACTIVE_MILLISECONDS);
}

function name(shown, text, absent) {
  if (shown.said === text) return;
  shown.said = text;
  shown.classList.toggle("none", text === null);
  shown.replaceChildren(text === null ? absent : element("bdi", {}, visible(text)));
}

function mark(link, isOpen) {
  if (isOpen) link.setAttribute("aria-current", "true");
  else link.removeAttribute("aria-current");
}

function ago(milliseconds) {
  const seconds = Math.max(0, milliseconds / 1000);
  if (seconds < 10) return "now";
  if (seconds < 60) return `${Math.floor(seconds / 10) * 10} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}
