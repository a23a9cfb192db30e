/* The shapes of an OpenAPI document: what they are called, what they are made of, and an example of each. */

import { element } from "./dom.js";

const EXAMPLES = {
  actorId: "ada",
  idempotencyKey: undefined,
  languageId: 1,
  ownerId: "ada",
  payload: { text: "hello" },
  room: "my first",
  sessionId: 1,
  type: "insert",
};

/** Return where a shape is described on the page. */
export function anchor(name) {
  return `shape-${name}`;
}

/** Return the shape's name, when the schema is a reference to one. */
export function nameOf(schema) {
  return schema.$ref?.split("/").at(-1) ?? null;
}

/** Return what a value has to be, in a few words, with links to shapes. */
export function kind(schema) {
  const name = nameOf(schema);
  if (name) return element("a", { href: `#${anchor(name)}` }, name);
  if (schema.anyOf) return either(schema.anyOf.map(kind));
  if (Array.isArray(schema.type)) return either(schema.type);
  if (schema.type === "array") return group("array of ", kind(schema.items ?? {}));
  if (schema.type === "integer") return group("integer", range(schema));
  if (schema.type === "string" && schema.minLength) return "string (not empty)";
  return schema.type ?? "anything";
}

/** Return what is said about a schema, or about the one that it allows besides null. */
export function said(schema) {
  return schema.description ?? schema.anyOf?.map(said).find(Boolean) ?? "";
}

/** Return an example of a value. */
export function example(schema, schemas, name = "") {
  if (name in EXAMPLES) return EXAMPLES[name];
  const reference = nameOf(schema);
  if (reference) return example(schemas[reference], schemas);
  if (schema.type === "array") return [example(schema.items, schemas)];
  if (schema.type === "object") {
    const { properties = {}, required = [] } = schema;
    const told = Object.keys(properties).filter((key) => required.includes(key) || EXAMPLES[key] !== undefined);
    told.sort((one, other) => required.includes(other) - required.includes(one));
    return Object.fromEntries(told.map((key) => [key, example(properties[key], schemas, key)]));
  }
  if (schema.anyOf) return example(schema.anyOf[0], schemas);
  return schema.type === "integer" ? schema.minimum ?? 0 : schema.type === "string" ? "text" : {};
}

/** Return a table of what a shape is made of. */
export function table(schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([name, property]) => {
    const isOptional = !schema.required?.includes(name);
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, element("code", {}, name), isOptional ? hint(" optional") : ""),
      element("td", {}, kind(property), said(property) ? hint(`. ${said(property)}`) : ""),
    );
  });
  const head = ["Field", "Is"].map((label) => element("th", { scope: "col" }, label));
  return element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}

function hint(text) {
  return element("span", { class: "hint" }, text);
}

function either(choices) {
  return group(...choices.flatMap((choice, index) => (index ? [" or ", choice] : [choice])));
}

function group(...parts) {
  return element("span", {}, ...parts);
}

function range({ minimum, maximum }) {
  if (minimum === undefined) return "";
  if (maximum === undefined) return ` from ${minimum}`;
  return ` from ${minimum} to ${maximum >= 2 ** 63 ? "2^63 − 1" : maximum}`;
}
