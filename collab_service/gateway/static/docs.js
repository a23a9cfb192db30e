/* The reference: every call of /openapi.json, which the types that validate have generated, with a form to try it. */

import { element } from "./dom.js";
import { get } from "./gateway.js";
import { anchor, example, kind, said, table } from "./schemas.js";
import { trying } from "./trying.js";

const reference = document.getElementById("reference");
const sessionInputs = []; // the fields that take a session's number, with what tells of a change

try {
  const answer = await get("openapi.json");
  show(await answer.json());
  await suggestSession();
} catch (error) {
  const problem = document.getElementById("problem");
  problem.textContent = `The description could not be read: ${error.message}`;
  problem.hidden = false;
}

function show(document_) {
  const { info, paths, components } = document_;
  document.getElementById("title").textContent = `${info.title} ${info.version}`;
  document.getElementById("description").textContent = info.description ?? "";
  for (const [path, operations] of Object.entries(paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      addCall(method.toUpperCase(), path, operation, components.schemas);
    }
  }
  for (const [name, schema] of Object.entries(components.schemas)) addShape(name, schema);
  const errors = document.querySelector(".answers + p a"); // which every call has, and all the same
  if (errors) document.getElementById("errors").href = errors.hash;
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

function addCall(method, path, operation, schemas) {
  const id = operation.operationId;
  const verb = () => element("span", { class: `method ${method.toLowerCase()}` }, method);
  const signature = () => [verb(), " ", element("code", {}, path)];
  document.getElementById("calls").append(element("li", {}, element("a", { href: `#${id}` }, ...signature())));
  const form = element("form", { "aria-label": `Try ${method} ${path}`, autocomplete: "off" });
  const inputs = operation.parameters.map((parameter) => parameterField(id, parameter));
  if (inputs.length) form.append(element("h4", {}, "Parameters"), ...inputs);
  const mediaTypes = Object.keys(successOf(operation)?.content ?? {});
  if (mediaTypes.length > 1) form.append(acceptField(id, mediaTypes));
  const body = operation.requestBody?.content["application/json"].schema;
  if (body) form.append(...bodyField(id, body, schemas));
  const tell = trying(method, path, form, (status, text) => {
    if (id === "create_session" && status < 300) suggest(String(JSON.parse(text).id), true);
  });
  if (method !== "DELETE") {
    for (const input of form.querySelectorAll("[name=id], [name=sessionId], [data-in=body]")) {
      sessionInputs.push({ input, tell, isReading: method === "GET" });
      input.addEventListener("input", () => (input.dataset.touched = "yes"));
    }
  }
  reference.append(
    element(
      "section",
      { class: "call", id, "aria-labelledby": `${id}-title` },
      element("h2", { id: `${id}-title` }, ...signature()),
      element("p", {}, operation.summary ?? ""),
      element("div", { class: "columns" }, form, answers(operation.responses)),
    ),
  );
}

function parameterField(id, { name, in: where, required, description, schema }) {
  const key = `${id}-${name}`;
  const input = element("input", {
    id: key,
    name,
    "data-in": where,
    required: where === "path",
    inputmode: schema.type === "integer" ? "numeric" : null,
    "aria-describedby": `${key}-said`,
    spellcheck: "false",
  });
  const place = `${where}${required ? ", required" : ""}, `;
  return element(
    "div",
    { class: "field" },
    element("label", { for: key }, element("code", {}, name)),
    input,
    element("p", { id: `${key}-said` }, place, kind(schema), ". ", description ?? ""),
  );
}

function acceptField(id, mediaTypes) {
  const key = `${id}-accept`;
  const [first, ...others] = mediaTypes;
  return element(
    "div",
    { class: "field" },
    element("label", { for: key }, "Answer as"),
    element(
      "select",
      { id: key, name: "Accept", "data-in": "accept" },
      element("option", { value: "" }, first),
      ...others.map((type) => element("option", { value: type }, type)),
    ),
    element("p", {}, "the header ", element("code", {}, "Accept")),
  );
}

function bodyField(id, schema, schemas) {
  const text = JSON.stringify(example(schema, schemas), null, 2);
  const key = `${id}-body`;
  const input = element("textarea", {
    id: key,
    name: "body",
    "data-in": "body",
    rows: text.split("\n").length + 1,
    spellcheck: "false",
  });
  input.value = text;
  return [element("h4", {}, element("label", { for: key }, "Body"), ": ", kind(schema)), input];
}

function answers(responses) {
  const list = element("dl", { class: "answers" });
  const byStatus = Object.entries(responses).sort(([one], [other]) => one - other);
  let shapeOfErrors = null;
  for (const [status, { description, content = {} }] of byStatus) {
    const isError = status >= 400;
    const shown = element("dd", {}, description);
    for (const [type, { schema }] of Object.entries(content)) {
      if (isError) shapeOfErrors = schema;
      else if (schema.description) shown.append(element("br"), element("code", {}, type), ` ${schema.description}`);
      else shown.append(element("br"), kind(schema));
    }
    list.append(element("div", { class: isError ? "bad" : "good" }, element("dt", {}, status), shown));
  }
  const shown = element("div", {}, element("h4", {}, "Answers"), list);
  if (shapeOfErrors) shown.append(element("p", { class: "hint" }, "Errors have the shape ", kind(shapeOfErrors), "."));
  return shown;
}

function addShape(name, schema) {
  const link = element("a", { href: `#${anchor(name)}` }, name);
  document.getElementById("shapes").append(element("li", {}, link));
  reference.append(
    element(
      "section",
      { class: "shape", id: anchor(name), "aria-labelledby": `${anchor(name)}-title` },
      element("h2", { id: `${anchor(name)}-title` }, name),
      element("p", {}, said(schema)),
      table(schema),
    ),
  );
}

/** Let the calls that only read begin with a session that is there. */
async function suggestSession() {
  const answer = await get("api/collab/sessions?pageSize=1");
  const [session] = await answer.json();
  if (session) suggest(String(session.id), false);
}

/** Fill in a session's number where nobody has written anything; where it would write, only one that was made here. */
function suggest(session, wasMadeHere) {
  for (const { input, tell, isReading } of sessionInputs) {
    if (input.dataset.touched || !(isReading || wasMadeHere)) continue;
    if (input.dataset.in === "body") input.value = input.value.replace(/("sessionId": )\d+/, `$1${session}`);
    else input.value = session;
    tell();
  }
}

function successOf({ responses }) {
  return Object.entries(responses).find(([status]) => status < 300)?.[1];
}
