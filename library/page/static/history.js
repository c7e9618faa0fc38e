// All runs of the output folder: searched, filtered, sorted, and two of them compared.

import {field, get, make, pick, reportKey, t} from "./dom.js";

const ORDERS = {
  date: (one, other) => other.updated - one.updated,
  loss: (one, other) => (one.loss ?? Infinity) - (other.loss ?? Infinity),
  time: (one, other) => one.seconds - other.seconds,
  name: (one, other) => one.name.localeCompare(other.name),
};

const addressOf = (files) => `/history/report?key=${reportKey}${files.map((file) => `&run=${encodeURIComponent(file)}`).join("")}`;
const outside = {target: "_blank", rel: "noopener"};

export async function showHistory(box) {
  const runs = await get("/api/history"), chosen = [];
  const list = make("ul", {class: "list"}), count = make("p", {class: "dim", role: "status"});
  const compare = make("a", {class: "button main", ...outside}, t("history.compare"));
  const search = make("input", {type: "search", oninput: () => show()});
  const all = (name) => ["", ...new Set(runs.map((run) => run[name]).filter(Boolean))];
  const choice = (name) => pick(all(name), (value) => value || t("history.all"), () => show());
  const base = choice("base"), trigger = choice("trigger");
  const order = pick(Object.keys(ORDERS), (name) => t(`history.orders.${name}`), () => show());
  box.append(make("h1", {}, t("history.heading")),
    make("div", {class: "tools"}, field(t("history.search"), search), field(t("history.base"), base), field(t("history.trigger"), trigger), field(t("history.order"), order)),
    make("div", {class: "row"}, count, compare), list);

  function choose(file, isChosen) {
    if (chosen.includes(file)) chosen.splice(chosen.indexOf(file), 1);
    if (isChosen) chosen.push(file);
    if (chosen.length > 2) chosen.shift();
    show();
  }

  function row(run) {
    const tick = make("input", {type: "checkbox", "aria-label": t("history.choose", run), onchange: () => choose(run.file, tick.checked)});
    tick.checked = chosen.includes(run.file);
    const facts = [
      run.state, run.base, run.trigger, run.max_train_steps && t("run.step", {step: run.step, max: run.max_train_steps}),
      run.loss !== null && t("run.loss", {loss: run.loss.toFixed(4)}), t("history.minutes", {minutes: Math.round(run.seconds / 60)}), new Date(1000 * run.updated).toLocaleString(),
    ];
    return make("li", {}, tick, run.picture && make("img", {class: "small", src: run.picture, alt: run.prompt}),
      make("div", {}, make("a", {href: addressOf([run.file]), ...outside}, run.name), make("div", {class: "dim"}, facts.filter(Boolean).join(" · "))));
  }

  function show() {
    const text = search.value.trim().toLowerCase();
    const has = (run) => [run.name, run.file, run.state, run.base, run.trigger, run.prompt].some((value) => value.toLowerCase().includes(text));
    const shown = runs.filter((run) => has(run) && (!base.value || run.base === base.value) && (!trigger.value || run.trigger === trigger.value));
    const focused = document.activeElement?.getAttribute("aria-label");
    list.replaceChildren(...shown.sort(ORDERS[order.value]).map(row));
    list.querySelector(`[aria-label="${CSS.escape(focused ?? "")}"]`)?.focus();
    count.textContent = t(runs.length ? "history.count" : "history.none", {shown: shown.length, all: runs.length});
    compare.hidden = chosen.length !== 2;
    compare.href = addressOf(chosen);
  }

  show();
  return null;
}
