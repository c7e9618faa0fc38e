// Elements, texts and requests. Names and captions are untrusted, so they become text nodes, never markup.

const texts = JSON.parse(document.getElementById("texts").textContent);
const token = document.querySelector("meta[name=token]").content;
export const reportKey = document.querySelector("meta[name=report-key]").content;

/** Return a text of texts.json by its dotted name, with {words} replaced by values. */
export function t(name, values = {}) {
  const text = name.split(".").reduce((part, key) => part?.[key], texts);
  if (typeof text !== "string") throw new Error(`no text ${name}`);
  return text.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole));
}

export const hasText = (name) => typeof name.split(".").reduce((part, key) => part?.[key], texts) === "string";

/** Return an element. Attributes that begin with "on" are listeners; null children are skipped. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return a button that does nothing while `act` runs, keeps the focus, and shows what went wrong. */
export function button(text, act, attributes = {}) {
  const click = async () => {
    if (one.ariaDisabled === "true") return;
    one.ariaDisabled = "true";
    try { await act(); } catch (error) { note(error.message); } finally { one.ariaDisabled = "false"; }
  };
  const one = make("button", {type: "button", onclick: click, ...attributes}, text);
  return one;
}

let numFields = 0;
/** Return a labelled field: [element, input]. */
export function field(label, input, help = null) {
  input.id = `field${++numFields}`;
  const hint = help && make("small", {id: `${input.id}help`}, help);
  if (hint) input.setAttribute("aria-describedby", hint.id);
  return make("div", {class: "field"}, make("label", {for: input.id}, label), input, hint);
}

/** Return a list to choose from. `texts` gives the text of a value, `onchange` gets the chosen one. */
export function pick(values, texts, onchange) {
  const select = make("select", {onchange: () => onchange(select.value)}, values.map((value) => make("option", {value}, texts(value))));
  return select;
}

/** Set the value of an input that the user is not writing in. */
export function refresh(input, value) {
  if (document.activeElement !== input && input.value !== value) input.value = value;
}

export function note(text) {
  const box = document.getElementById("notes");
  const item = make("p", {}, text, make("button", {type: "button", "aria-label": "×", onclick: () => item.remove()}, "×"));
  box.append(item);
  while (box.children.length > 3) box.firstChild.remove();
}

async function answerOf(response) {
  const text = await response.text();
  let values = {};
  try { values = JSON.parse(text); } catch { values = {message: text || response.statusText}; }
  if (!response.ok) throw new Error(t("failed", {reason: values.message}));
  return values;
}

export const get = async (path) => answerOf(await fetch(path));
export const post = async (path, values = {}) =>
  answerOf(await fetch(path, {method: "POST", headers: {"x-page-token": token, "content-type": "application/json"}, body: JSON.stringify(values)}));
export const upload = async (path, file) => answerOf(await fetch(path, {method: "POST", headers: {"x-page-token": token}, body: file}));

export const nameOf = (path) => path.split(/[\\/]/).filter(Boolean).at(-1) ?? path;

/** Return the progress of a task as an element; null if it does not run. */
export function progress(task, text, first = text) {
  if (task?.state !== "running") return null;
  const label = task.total ? t(text, task) : t(first, {done: 0, total: "…"});
  const bar = make("progress", task.total ? {value: task.done, max: task.total} : {});
  bar.setAttribute("aria-label", label);
  return make("p", {class: "task"}, bar, label);
}

export function problem(task) {
  if (task?.state !== "failed") return null;
  const bug = task.error.is_bug ? " " + t("bug", {log: "output/page/tasks.log"}) : "";
  const [first, ...others] = task.error.message.split("\n"), all = others.length ? make("details", {}, make("summary", {}, t("tried")), make("pre", {tabindex: 0}, task.error.message)) : null;
  return make("div", {class: "bad", role: "alert"}, t("failed", {reason: [first, others.at(-1)].filter(Boolean).join(" ")}) + bug, all);
}
