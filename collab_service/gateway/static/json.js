/*
 * JSON as the text that it is. Nothing is read into JavaScript's values and written again: 9007199254740993 stays
 * exact, 1.0 stays 1.0, keys stay in their order, and a key that is given twice is seen twice.
 */

const STRUCTURE = /["{}[\]]/g;
const SCALAR = /[^\s,:"{}[\]]+/y;
const SPACE = /\s*/y;

function endOfSpace(text, at) {
  SPACE.lastIndex = at;
  SPACE.test(text);
  return SPACE.lastIndex;
}

function endOfString(text, start) {
  for (let end = text.indexOf('"', start + 1); end >= 0; end = text.indexOf('"', end + 1)) {
    let slash = end;
    while (text[slash - 1] === "\\") slash--;
    if ((end - slash) % 2 === 0) return end + 1;
  }
  return text.length;
}

function endOfScalar(text, start) {
  SCALAR.lastIndex = start;
  return SCALAR.test(text) ? SCALAR.lastIndex : start + 1;
}

function endOfValue(text, start) {
  if (text[start] === '"') return endOfString(text, start);
  if (text[start] !== "{" && text[start] !== "[") return endOfScalar(text, start);
  for (let at = start, depth = 0; ;) {
    STRUCTURE.lastIndex = at;
    const found = STRUCTURE.exec(text);
    if (!found) return text.length;
    at = found.index + 1;
    if (found[0] === '"') at = endOfString(text, found.index);
    else if (found[0] === "{" || found[0] === "[") depth++;
    else if (--depth === 0) return at;
  }
}

/** Return the members of a JSON object by name, each as its text. */
export function members(text) {
  const found = new Map();
  let at = text.indexOf("{") + 1;
  for (;;) {
    at = endOfSpace(text, at);
    if (text[at] === ",") at = endOfSpace(text, at + 1);
    if (text[at] !== '"') return found;
    const nameEnd = endOfString(text, at);
    const name = JSON.parse(text.slice(at, nameEnd));
    const start = endOfSpace(text, text.indexOf(":", nameEnd) + 1);
    at = endOfValue(text, start);
    found.set(name, text.slice(start, at));
  }
}

/** Return the elements of a JSON array, each as its text. */
export function elements(text) {
  const found = [];
  let at = endOfSpace(text, text.indexOf("[") + 1);
  while (at < text.length && text[at] !== "]") {
    const end = endOfValue(text, at);
    found.push(text.slice(at, end));
    at = endOfSpace(text, end);
    if (text[at] === ",") at = endOfSpace(text, at + 1);
  }
  return found;
}

/** Return what a JSON scalar says: text as text, a number as its digits, `null` as null. */
export function scalar(text) {
  if (text === undefined || text === "null") return null;
  return text[0] === '"' ? JSON.parse(text) : text;
}

/** Yield the tokens of a JSON text without the space between them, as `[kind, text]`. */
function* tokens(text) {
  for (let at = endOfSpace(text, 0); at < text.length; at = endOfSpace(text, at)) {
    const first = text[at];
    const start = at;
    if (first === '"') {
      at = endOfString(text, start);
      yield [text[endOfSpace(text, at)] === ":" ? "key" : "string", text.slice(start, at)];
    } else if ("{}[],:".includes(first)) {
      at++;
      yield ["mark", first];
    } else {
      at = endOfScalar(text, start);
      yield [/[-\d]/.test(first) ? "number" : "literal", text.slice(start, at)];
    }
  }
}

/** Yield a JSON text in one line. */
export function* compact(text) {
  for (const [kind, part] of tokens(text)) yield [kind, part === "," || part === ":" ? part + " " : part];
}

/** Yield a JSON text with a line for each member and element. */
export function* indented(text) {
  let depth = 0;
  let before = "";
  for (const [kind, part] of tokens(text)) {
    const opens = part === "{" || part === "[";
    const closes = part === "}" || part === "]";
    const empty = closes && (before === "{" || before === "[");
    if (closes) depth--;
    if (before && !empty && (closes || before === "{" || before === "[" || before === ",")) {
      yield ["space", "\n" + "  ".repeat(depth)];
    }
    yield [kind, part === ":" ? ": " : part];
    if (opens) depth++;
    before = kind === "mark" ? part : "value";
  }
}
