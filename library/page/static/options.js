// The form of all options, made from what the suite declares of them.

import {field, get, make, note, pick, post, problem, progress, refresh, t} from "./dom.js";

const SHOWN = ["usual", "all", "yours", "planned"];
const isSet = (value) => value !== undefined && value !== null && value !== "" && value !== false;
const quote = (value) => (Array.isArray(value) ? value.map((word) => (/\s/.test(word) ? `"${word}"` : word)).join(" ") : String(value));
const format = (value) => (isSet(value) || value === 0 ? quote(value) : t("options.unset"));

/** Return the input of an option, which calls `save` with a text, a list of texts, true, or null for nothing. */
function inputOf(option, save) {
  if (option.type === "flag") return make("input", {type: "checkbox", onchange: (event) => save(event.target.checked || null)});
  const onchange = (event) => {
    const text = event.target.value.trim(), words = text.match(/(?:"[^"]*"|[^\s"])+/g) ?? [];
    save(!text ? null : option.is_list ? words.map((word) => word.replaceAll('"', "")) : text);
  };
  if (option.is_list) return make("textarea", {rows: 2, spellcheck: "false", onchange});
  if (option.takes_other_values || !option.choices) return make("input", {type: "text", spellcheck: "false", autocomplete: "off", onchange});
  return make("select", {onchange}, ["", ...option.choices.filter(isSet)].map((value) => make("option", {value}, String(value))));
}

/** Return an option as an element, with a function that shows its value, where it comes from, and what is wrong. */
function fieldOf(option, save) {
  const input = inputOf(option, save), facts = Object.entries(option.facts).map(([name, text]) => t(`options.facts.${name}`, {text}));
  const help = [option.help, ...facts, option.is_list && t("options.list")].filter(Boolean).join(" · ");
  const box = field(option.name, input, help), usual = make("small", {id: `${input.id}usual`}), wrong = make("small", {id: `${input.id}wrong`, class: "bad"});
  input.setAttribute("aria-describedby", `${input.id}wrong ${input.id}usual ${input.id}help`);
  input.after(wrong, usual);
  if (option.takes_other_values) {
    input.setAttribute("list", `${input.id}known`);
    box.append(make("datalist", {id: `${input.id}known`}, option.choices.map((value) => make("option", {value}))));
  }
  const set = (given, recipe, planned, error) => {
    const mine = given !== undefined, source = !mine && isSet(planned) ? "planned" : isSet(recipe) ? "recipe" : "default";
    const other = {planned, recipe, default: option.default}[source];
    if (option.type === "flag") {
      input.checked = mine || other === true;
      input.disabled = isSet(recipe);  // no option takes it back
    } else refresh(input, mine ? quote(given) : "");
    usual.textContent = t(`options.${mine ? "yours" : "by"}.${source}`, {value: format(other)});
    box.classList.toggle("mine", mine);
    wrong.textContent = error ?? "";
    input.setAttribute("aria-invalid", String(Boolean(error)));
  };
  const words = [option.name, option.help, option.group, ...Object.values(option.facts)].join(" ").toLowerCase();
  return {...option, box, words, set};
}

/** Build the form, and return a function that is called with every new draft and state. */
export async function showOptions(box, id) {
  const path = `/api/drafts/${id}`, status = make("div"), list = make("div"), count = make("p", {class: "dim", role: "status"});
  const search = make("input", {type: "search", oninput: () => filter()}), shown = pick(SHOWN, (name) => t(`options.shown.${name}`), () => filter());
  let fields = [], found = null, planned = {}, given = {}, wrong = {}, last = null, planError = "", outdated = "", key = "", basis = "";
  const check = () => post(`${path}/tasks/options`);
  const save = async (name, value) => {
    outdated = planError;
    try { await post(path, {options: {[name]: value}}); await check(); } catch (error) { note(error.message); }
  };
  box.append(make("div", {class: "tools"}, field(t("options.search"), search), field(t("options.show"), shown)), status, count, list);

  function build() {
    const known = new Set(found.options.map((option) => option.name));
    const others = Object.keys(given).filter((name) => !known.has(name)).map((name) => (
      {name, type: given[name] === true ? "flag" : "text", is_list: Array.isArray(given[name]), help: t("options.unknown"), group: t("options.others"), facts: {}}));
    const now = JSON.stringify([others, found.options]);
    if (now === key) return;
    key = now;
    fields = [...others, ...found.options].map((option) => fieldOf(option, (value) => save(option.name, value)));
    const groups = new Map();
    for (const one of fields) groups.set(one.group, [...(groups.get(one.group) ?? []), one.box]);
    list.replaceChildren(...[...groups].map(([title, boxes]) => make("section", {}, make("h3", {}, title), make("div", {class: "options"}, boxes))));
  }

  function filter() {
    const text = search.value.trim().toLowerCase().replace(/^--/, "");
    const has = {usual: (one) => one.is_usual, all: () => true, yours: () => false, planned: ({name}) => isSet(planned[name] ?? found.recipe[name])}[shown.value];
    for (const one of fields) one.box.hidden = !(one.name in wrong || (text ? one.words.includes(text) : has(one) || one.name in given));
    for (const section of list.children) section.hidden = [...section.lastChild.children].every((one) => one.hidden);
    count.textContent = t("options.count", {shown: fields.filter((one) => !one.box.hidden).length, all: fields.length});
  }

  async function update(data, state) {
    const task = state.tasks[`${id}/options`], plan = state.tasks[`${id}/plan`];
    status.replaceChildren(...[found ? null : progress(task, "options.reading"), problem(task)].filter(Boolean));
    const {base, kind, options} = data.draft, now = `${kind} ${base}`;
    if (basis !== now) { basis = now; await check(); }
    if (plan?.state === "running") outdated = "";
    planError = plan?.state === "failed" ? JSON.stringify(plan.error) : "";
    if (data !== last) ({found, planned} = await get(`${path}/options`));
    [last, given] = [data, options];
    if (!found) return;
    build();
    const errors = [found.error, planError !== outdated ? plan.error : null].filter((error) => error?.setting);
    wrong = {...found.unused, ...Object.fromEntries(errors.map((error) => [error.setting.replace(/^--/, ""), error.message]))};
    for (const {name, set} of fields) set(given[name], found.recipe[name], planned[name], wrong[name]);
    filter();
  }

  let before = Promise.resolve();  // an update that waits for the server must not end after the next one
  return (data, state) => { before = before.then(() => update(data, state)).catch((error) => note(error.message)); };
}
