/*
 * Building what is shown. What anybody wrote is only ever set as text, so none of it becomes markup; and characters
 * that would show as nothing, or turn the text around them, are shown as what they are.
 */

const UNSEEN =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/;
const UNSEEN_OR_NOT = new RegExp(`(${UNSEEN.source})`);

/** Return an element with properties (`onclick` and the like are listeners), and with nodes or text in it. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Return text as a node in which every character can be seen. */
export function visible(text) {
  if (!UNSEEN.test(text)) return document.createTextNode(text);
  const shown = document.createDocumentFragment();
  text.split(UNSEEN_OR_NOT).forEach((part, index) => {
    if (index % 2) shown.append(element("span", { class: "unseen" }, escaped(part)));
    else if (part) shown.append(part);
  });
  return shown;
}

function escaped(character) {
  const code = character.charCodeAt(0).toString(16);
  return code.length > 2 ? `\\u${code.padStart(4, "0")}` : `\\x${code.padStart(2, "0")}`;
}

/** Set an element's text, unless it is that already: what does not change is not drawn again. */
export function setText(shown, text) {
  if (shown.textContent !== text) shown.textContent = text;
}

/** Return a button that copies the text that `text()` returns, and says so. */
export function copyButton(label, text) {
  const button = element("button", { type: "button", class: "small" }, label);
  button.addEventListener("click", async () => {
    setText(button, (await copied(text())) ? "Copied" : "Not copied");
    setTimeout(() => setText(button, label), 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers have no clipboard for pages that come over plain HTTP from another machine.
    const field = element("textarea", { class: "offscreen" });
    field.value = text;
    const focused = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus({ preventScroll: true });
    return done;
  }
}

/** Return a number with a comma between its thousands; its digits may be more than a JavaScript number has. */
export function grouped(number) {
  return String(number).replace(/\B(?=(\d{3})+$)/g, ",");
}
