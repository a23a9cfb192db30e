/* Trying a call: what is in the form as a request, as a line for curl, and the answer to it. */

import { copyButton, element, grouped, setText, visible } from "./dom.js";
import { indented } from "./json.js";
import { portions } from "./payload.js";

const MOST_CHARACTERS = 1_000_000; // of an answer that are read
const MOST_CHARACTERS_AS_THEY_COME = 100_000;
const STREAM = "text/event-stream";

/**
 * Return what tries a call.
 *
 * `form` holds the inputs, whose `name` is the parameter's and whose `data-in` says where it belongs: path, query,
 * header, accept or body. `answered(status, body)` is called with each answer.
 */
export function trying(method, path, form, answered) {
  const line = element("pre", { class: "curl", tabindex: 0, role: "region", "aria-label": "The call for curl" });
  const [look, label] = method === "DELETE" ? ["danger", "Delete"] : ["primary", "Send"];
  const send = element("button", { type: "submit", class: look }, label);
  const stop = element("button", { type: "button", hidden: true }, "Stop");
  const status = element("p", { class: "status", role: "status" });
  const answer = element("div", { class: "answer" });
  let running = null;

  form.append(
    element("div", { class: "bar" }, element("h4", {}, "curl"), copyButton("Copy", () => line.textContent)),
    line,
    element("div", { class: "send" }, send, stop, status),
    answer,
  );
  form.addEventListener("input", tell);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void call();
  });
  stop.addEventListener("click", () => running?.abort());
  tell();
  return tell;

  function tell() {
    setText(line, curl(requestOf(method, path, form)));
  }

  async function call() {
    running?.abort();
    const mine = (running = new AbortController());
    const request = requestOf(method, path, form);
    const began = performance.now();
    answer.replaceChildren();
    status.className = "status";
    setText(status, "waiting …");
    stop.hidden = false;
    try {
      const response = await fetch(request.url, {
        method,
        headers: request.headers.map(([name, value]) => [name, inBytes(value)]),
        body: request.body,
        signal: mine.signal,
      });
      const told = `${response.status} ${response.statusText}`.trim();
      const tellStatus = (rest) => {
        status.className = `status ${response.ok ? "good" : "bad"}`;
        setText(status, told + rest);
      };
      tellStatus(" …");
      const text = await show(response, answer, mine.signal);
      const took = Math.round(performance.now() - began);
      tellStatus(`, ${grouped(took)} ms${mine.signal.aborted ? ", stopped" : ""}`);
      answered(response.status, text);
    } catch (error) {
      if (running !== mine) return;
      status.className = "status bad";
      setText(status, mine.signal.aborted ? "stopped" : `no answer: ${error.message}`);
    } finally {
      if (running === mine) stop.hidden = true;
    }
  }
}

/** Show an answer as it comes; return its text. */
async function show(response, answer, signal) {
  const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
  answer.append(
    element("h4", {}, "Headers"),
    element("pre", { tabindex: 0, role: "region", "aria-label": "Headers of the answer" }, headers),
  );
  const body = element("pre", { class: "json", tabindex: 0, role: "region", "aria-label": "Body of the answer" });
  let text = "";
  const heading = element("h4", {}, "Body");
  const bar = element("div", { class: "bar" }, heading, copyButton("Copy", () => text));
  answer.append(bar, body);
  const isJson = response.headers.get("content-type")?.startsWith("application/json");
  const most = isJson ? MOST_CHARACTERS : MOST_CHARACTERS_AS_THEY_COME;
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  let end = reader ? "" : "none";
  while (!end) {
    const { value, done } = await reader.read().catch((error) => {
      end = signal.aborted ? "stopped" : `cut off: ${error.message}`;
      return { value: "", done: true };
    });
    if (done) break;
    text += value;
    if (!isJson) body.append(...value.split(/(\n)/).map((part) => (part === "\n" ? part : visible(part))));
    if (text.length > most) {
      end = `only the first ${grouped(text.length)} characters were read`;
      void reader.cancel();
    }
  }
  if (!text && !end) end = "none";
  if (end) setText(heading, `Body (${end})`);
  if (end === "none") {
    body.remove();
    bar.lastElementChild.remove();
  } else if (isJson) {
    answer.append(portions(body, indented(text)));
  }
  return text;
}

/** Return what is in the form as a request; `url` is relative to the page. */
function requestOf(method, path, form) {
  const headers = [];
  const query = new URLSearchParams();
  let body;
  for (const input of form.elements) {
    const { value } = input;
    if (!input.name || !value) continue;
    if (input.dataset.in === "path") path = path.replace(`{${input.name}}`, encodeURIComponent(value));
    else if (input.dataset.in === "query") query.append(input.name, value);
    else if (input.dataset.in === "header") headers.push([input.name, value]);
    else if (input.dataset.in === "accept") headers.push(["Accept", value]);
    else if (input.dataset.in === "body") {
      body = value;
      headers.push(["Content-Type", "application/json"]);
    }
  }
  const search = query.size ? `?${query}` : "";
  return { method, url: path.slice(1) + search, headers, body };
}

function curl({ method, url, headers, body }) {
  const address = new URL(url, document.baseURI).href.replaceAll("%7B", "{").replaceAll("%7D", "}");
  const streams = headers.some(([, value]) => value === STREAM);
  const parts = [`curl ${streams ? "-iN" : "-i"} ${method === "GET" ? "" : `-X ${method} `}${quoted(address)}`];
  for (const [name, value] of headers) parts.push(`-H ${quoted(`${name}: ${value}`)}`);
  if (body !== undefined) parts.push(`--data-raw ${quoted(body)}`);
  return parts.join(" \\\n  ");
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** Return text for a header: its bytes of UTF-8, which is what curl sends. */
function inBytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}
