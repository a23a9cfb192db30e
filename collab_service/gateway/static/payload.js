/* A payload: a line of it to look over, and the whole of it to read. */

import { copyButton, element, grouped, visible } from "./dom.js";
import { compact, indented } from "./json.js";

const LINE = 200; // characters of a payload in its line
const PORTION = 20_000; // characters that are shown of it at first, and more with every press of the button
const PORTION_TOKENS = 3_000;
const NARROW = matchMedia("(max-width: 700px)");

/** Return the beginning of a JSON payload, in one line. */
export function jsonLine(payload) {
  const line = document.createDocumentFragment();
  let left = LINE;
  // The line needs only the beginning: a token that is cut off here is cut off there as well.
  for (const [kind, text] of compact(payload.slice(0, LINE * 4))) {
    const part = visible(text.slice(0, left));
    line.append(kind === "mark" ? part : element("span", { class: kind }, part)); // of marks there are too many
    left -= text.length;
    if (left <= 0) break;
  }
  return line;
}

/** Return the beginning of a binary payload, in one line. */
export function binaryLine(base64) {
  const size = (base64.length / 4) * 3 - (base64.match(/=*$/)[0].length);
  const start = hex(bytesOf(base64.slice(0, 32)));
  const more = size > 24 ? " …" : "";
  return element("span", {}, element("span", { class: "literal" }, `binary, ${bytes(size)}  `), start + more);
}

/** Return a JSON payload as a whole, readable. */
export function jsonPayload(payload) {
  const text = element("pre", { class: "json", tabindex: 0, role: "region", "aria-label": "Payload" });
  const size = new TextEncoder().encode(payload).length;
  return element(
    "div",
    { class: "payload" },
    bar(`JSON, ${bytes(size)}`, copyButton("Copy", () => payload)),
    text,
    portions(text, indented(payload)),
  );
}

/** Return a binary payload as a whole, in hexadecimal or base64. */
export function binaryPayload(base64) {
  const data = bytesOf(base64);
  const text = element("pre", { class: "hex", tabindex: 0, role: "region", "aria-label": "Payload" });
  const forms = [
    ["Hex", () => dump(data, NARROW.matches ? 8 : 16)],
    ["Base64", () => lines(base64, NARROW.matches ? 40 : 76)],
  ];
  const buttons = forms.map(([label, form]) =>
    element("button", { type: "button", class: "small", onclick: () => show(label, form) }, label),
  );
  const payload = element(
    "div",
    { class: "payload" },
    bar(`Binary, ${bytes(data.length)}`, ...buttons, copyButton("Copy base64", () => base64)),
    text,
  );
  function show(label, form) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.textContent === label));
    payload.querySelector(".more")?.remove();
    text.replaceChildren();
    text.classList.toggle("wrapped", label !== "Hex");
    payload.append(portions(text, form()));
  }
  show(...forms[0]);
  return payload;
}

/** Write tokens into an element, a portion at first; return the button that brings the next portions. */
export function portions(text, tokens) {
  const pieces = cut(tokens);
  const button = element("button", { type: "button", class: "small more", onclick: next }, "Show more");
  next();
  return button;
  function next() {
    const portion = document.createDocumentFragment();
    let characters = 0;
    for (let count = 0; characters < PORTION && count < PORTION_TOKENS; count++) {
      const { value, done } = pieces.next();
      if (done) {
        button.hidden = true;
        break;
      }
      const [kind, piece] = value;
      portion.append(kind === "mark" || kind === "space" ? piece : element("span", { class: kind }, visible(piece)));
      characters += piece.length;
    }
    text.append(portion);
  }
}

/** Yield tokens, those that are longer than a portion in pieces. */
function* cut(tokens) {
  for (const [kind, text] of tokens) {
    for (let start = 0, end; start < text.length; start = end) {
      end = start + PORTION;
      if (/[\ud800-\udbff]/.test(text.charAt(end - 1))) end++; // not between the halves of a character
      yield [kind, text.slice(start, end)];
    }
  }
}

function* dump(data, width) {
  const digits = Math.max(4, data.length.toString(16).length);
  for (let start = 0; start < data.length; start += width) {
    const row = data.subarray(start, start + width);
    const characters = Array.from(row, (byte) => (byte > 31 && byte < 127 ? String.fromCharCode(byte) : "·")).join("");
    yield ["mark", start.toString(16).padStart(digits, "0") + "  "];
    yield ["key", hex(row).padEnd(width * 3 + 1)];
    yield ["string", characters];
    yield ["space", "\n"];
  }
}

function* lines(text, width) {
  for (let start = 0; start < text.length; start += width) {
    yield ["key", text.slice(start, start + width)];
    yield ["space", "\n"];
  }
}

function bar(label, ...buttons) {
  return element("div", { class: "bar" }, element("span", { class: "label" }, label), ...buttons);
}

function bytes(count) {
  return `${grouped(count)} byte${count === 1 ? "" : "s"}`;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function hex(data) {
  return Array.from(data, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
}
