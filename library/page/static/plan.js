// The plan of a training with its simple controls.

import {button, field, hasText, make, nameOf, note, pick, post, problem, progress, refresh, t} from "./dom.js";
import {follow} from "./photos.js";

export async function showPlan(box, id) {
  const path = `/api/drafts/${id}`, task = (name) => post(`${path}/tasks/${name}`);
  const save = (values) => post(path, values).catch((error) => note(error.message));
  const kind = pick(["character", "style"], (name) => t(`plan.kinds.${name}`), (value) => save({kind: value}));
  const length = pick(["recipe", "steps", "minutes"], (name) => t(`plan.lengths.${name}`), () => { number.parentElement.hidden = length.value === "recipe"; saveLength(); });
  const number = make("input", {type: "number", min: 1, step: 1, onchange: () => saveLength()});
  const strength = pick(["0.5", "1", "2"], (name) => t({0.5: "plan.gentle", 1: "plan.usual", 2: "plan.strong"}[name]), (value) => save({strength: Number(value)}));
  const prompts = make("textarea", {rows: 4, onchange: () => save({prompts: prompts.value.trim() || null})});
  const saveLength = () => {
    const count = Math.round(Number(number.value));
    if (length.value === "recipe") return save({steps: null, minutes: null});
    return count > 0 ? save({[length.value]: count}) : null;
  };
  const status = make("div"), shown = make("div"), written = make("div"), form = make("div");
  const summary = make("summary", {}, t("options.heading")), options = make("details", {}, summary, form);
  let showGiven = null, hasFailed = false, newest = null;
  options.addEventListener("toggle", async () => {
    if (!options.open || form.firstChild) return;
    try {
      showGiven = await (await import("./options.js")).showOptions(form, id);
      if (newest) showGiven(...newest);
    } catch (error) { form.replaceChildren(); note(error.message); }
  });
  const again = button(t("plan.make"), () => task("plan"), {class: "main"});
  const train = button(t("plan.train"), () => task("train"), {class: "main"});
  const write = button(t("plan.write"), () => task("write"));
  box.append(make("h1", {}, t("plan.heading")),
    make("div", {class: "tools"}, field(t("plan.kind"), kind), make("div", {class: "pair"}, field(t("plan.length"), length), field(t("plan.number"), number)), field(t("plan.strength"), strength)),
    status, shown, make("div", {class: "row"}, again, train, write), written, options);
  number.parentElement.hidden = true;
  let hasAsked = false, wasStarting = false;

  return follow(id, (data, state) => {
    const {draft, plan} = data, planning = state.tasks[`${id}/plan`], starting = state.tasks[`${id}/start`];
    const isRunning = planning?.state === "running", isStarting = starting?.state === "running";
    if (!plan && !hasAsked && !isRunning && planning?.state !== "failed" && draft.base && data.photos) { hasAsked = true; task("plan").catch((error) => note(error.message)); }
    kind.value = draft.kind;
    strength.value = String(draft.strength);
    const lengthNow = draft.steps ? "steps" : draft.minutes ? "minutes" : "recipe";
    if (document.activeElement !== length && document.activeElement !== number) {
      length.value = lengthNow;
      number.parentElement.hidden = lengthNow === "recipe";
      refresh(number, String(draft.steps ?? draft.minutes ?? ""));
    }
    const busy = progress(isRunning ? planning : null, "plan.planning");
    const parts = [
      busy, busy && button(t("plan.cancel"), () => task("cancel")), problem(isRunning ? null : planning),
      progress(isStarting ? starting : null, "plan.starting"), problem(starting),
      draft.origin ? make("p", {}, t("plan.origin", {name: nameOf(draft.origin).replace(/-state$/, "")}), " ", button(t("plan.anew"), () => save({origin: ""}))) : null,
      plan?.is_stale && !isRunning ? make("p", {class: "bad", role: "status"}, t("plan.stale")) : null,
    ];
    status.replaceChildren(...parts.filter(Boolean));
    again.textContent = t(plan ? "plan.again" : "plan.make");
    again.classList.toggle("main", !plan || plan.is_stale);
    again.hidden = isRunning;
    train.hidden = write.hidden = !plan || plan.is_stale || isRunning || isStarting;
    showLines(shown, plan, prompts);
    if (plan) refresh(prompts, draft.prompts ?? plan.prompts);
    const numGiven = Object.keys(draft.options).length;
    summary.textContent = numGiven ? t("options.given", {count: numGiven}) : t("options.heading");
    const isWrong = planning?.state === "failed" && planning.error.setting?.replace(/^--/, "") in draft.options;
    if (isWrong && !hasFailed) options.open = true;
    hasFailed = isWrong;
    newest = [data, state];
    showGiven?.(data, state);
    if (wasStarting && starting?.state === "done") showStarted(starting.result, written);
    wasStarting = isStarting;
  });
}

function showLines(box, plan, prompts) {
  const key = JSON.stringify(plan && [plan.lines, plan.remarks]);
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  if (!plan) return box.replaceChildren();
  const rows = plan.lines.flatMap(([label, text]) => {
    const head = hasText(`plan.labels.${label}`) ? t(`plan.labels.${label}`) : label;
    return label ? [make("dt", {}, head), make("dd", {}, text)] : [make("dd", {class: "more"}, text)];
  });
  box.replaceChildren(
    make("h2", {}, t("plan.decisions")), make("dl", {class: "plan"}, rows), ...plan.remarks.map((text) => make("p", {class: "bad"}, text)),
    field(t("plan.prompts"), prompts));
  return null;
}

function showStarted(result, box) {
  if (result.run) { location.hash = `#/run/${result.run}`; return; }
  box.replaceChildren(make("p", {}, t("plan.written", result)), make("pre", {tabindex: 0}, result.command));
}
