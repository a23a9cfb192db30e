/* The inspector: which session is open stands in the address, and everything can be reached with the keyboard. */

import { SessionList } from "./sessions.js";
import { SessionPane } from "./session.js";

const help = document.getElementById("help");
const sessions = new SessionList();
const pane = new SessionPane();
let opened = null;

function route() {
  const [, id = null, at = null] = /^#(\d{1,19})(?:@(\d{1,19}))?$/.exec(location.hash) ?? [];
  document.body.dataset.view = id === null ? "list" : "session";
  pane.open(id, at);
  sessions.select(id);
  sessions.refresh();
  if (id !== null && id !== opened && !isFirst) pane.focus();
  if (id === null && opened !== null) sessions.focus(opened);
  opened = id;
}

const keys = {
  j: () => move(1),
  ArrowDown: () => move(1),
  k: () => move(-1),
  ArrowUp: () => move(-1),
  g: () => opened !== null && pane.focusJump(),
  "/": () => sessions.focusFilter(),
  "?": () => help.showModal(),
  " ": () => opened !== null && pane.togglePause(),
  Escape: () => opened !== null && !pane.leave() && close(),
};

function move(step) {
  const inList = opened === null || document.getElementById("sessions").contains(document.activeElement);
  if (inList) sessions.move(step);
  else pane.move(step);
}

function close() {
  location.hash = "";
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || help.open) return;
  const { target } = event;
  if (target.matches("input, textarea, select")) {
    if (event.key !== "Escape") return;
    event.preventDefault();
    if (target.value && target.id === "filter") {
      target.value = "";
      target.dispatchEvent(new Event("input"));
    } else if (opened !== null) pane.focus();
    else target.blur();
    return;
  }
  // A button is pressed with the space bar, but for the line of an event, which Enter opens.
  if (event.key === " " && target.matches("button, summary") && !target.matches(".line")) return;
  const action = keys[event.key];
  if (!action || (target.matches("pre") && event.key.startsWith("Arrow"))) return;
  event.preventDefault();
  action();
});

document.getElementById("keys").addEventListener("click", () => help.showModal());
help.addEventListener("click", (event) => {
  if (event.target === help) help.close();
});
document.getElementById("back").addEventListener("click", (event) => {
  event.preventDefault();
  close();
});

let isFirst = true;
window.addEventListener("hashchange", route);
route();
isFirst = false;
