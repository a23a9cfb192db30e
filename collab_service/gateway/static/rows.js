/* A line for an event, and all there is to know of it when it is opened. */

import { copyButton, element, grouped, visible } from "./dom.js";
import { members, scalar } from "./json.js";
import { binaryLine, binaryPayload, jsonLine, jsonPayload } from "./payload.js";

const FIELDS = [
  ["Actor", "actorId"],
  ["Type", "type"],
  ["Created", "createdAt"],
  ["Client seq", "clientSeq"],
  ["Hash", "hash"],
  ["Signature", "signature"],
  ["Idempotency key", "idempotencyKey"],
  ["Event id", "id"],
  ["Chain hash", "chainHash"],
];

/** Return the line of an event, which is given as its JSON text. */
export function eventRow(text, today) {
  const event = members(text);
  const seq = event.get("serverSeq");
  const created = scalar(event.get("createdAt"));
  const line = element(
    "button",
    { type: "button", class: "line", tabindex: -1, "aria-expanded": "false" },
    element("span", { class: "seq" }, seq),
    element("time", { class: "at", datetime: created, title: created }, shortTime(created, today)),
    name("actor", scalar(event.get("actorId"))),
    name("type", scalar(event.get("type"))),
    element("span", { class: "preview" }, previewOf(event)),
  );
  const row = element("li", { class: "event", "data-seq": seq }, line);
  row.source = text;
  return row;
}

/** Return a line that tells of events which are not shown. */
export function gapRow(session, first, last) {
  const count = last - first + 1;
  return element(
    "li",
    { class: "gap" },
    element("a", { href: `#${session}@${first}` }, `${grouped(count)} event${count === 1 ? "" : "s"} not shown`),
  );
}

/** Open or close the line of an event; return whether it is open now. */
export function toggle(row) {
  const line = row.firstElementChild;
  const opens = !row.classList.contains("open");
  row.classList.toggle("open", opens);
  line.setAttribute("aria-expanded", String(opens));
  if (opens) row.append(details(row.source));
  else row.lastElementChild.remove();
  return opens;
}

function details(text) {
  const event = members(text);
  const fields = element("dl", { class: "fields" });
  for (const [label, key] of FIELDS) {
    const value = scalar(event.get(key));
    if (value === null) continue;
    fields.append(element("div", {}, element("dt", {}, label), element("dd", {}, element("bdi", {}, visible(value)))));
  }
  const payload = event.has("payloadBase64")
    ? binaryPayload(scalar(event.get("payloadBase64")))
    : jsonPayload(event.get("payload"));
  payload.querySelector(".bar").append(
    copyButton("Copy event", () => text),
    element("a", { class: "small", href: `#${event.get("sessionId")}@${event.get("serverSeq")}` }, "Link"),
  );
  return element("div", { class: "detail" }, payload, fields);
}

function previewOf(event) {
  return event.has("payloadBase64") ? binaryLine(scalar(event.get("payloadBase64"))) : jsonLine(event.get("payload"));
}

function name(kind, text) {
  if (text === null) return element("span", { class: `${kind} none` }, "–");
  return element("span", { class: kind, title: text }, element("bdi", {}, visible(text)));
}

/** Return the time of day in UTC, with the day in front when it is not today. */
function shortTime(created, today) {
  const day = created.slice(0, 10);
  return day === today ? created.slice(11, 23) : `${created.slice(5, 10)} ${created.slice(11, 19)}`;
}
