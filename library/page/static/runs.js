// A training: its progress, what can be done with it, its report and its log.

import {button, field, get, make, note, post, problem, progress, reportKey, t} from "./dom.js";

export function stateOf(run) {
  return t(`run.states.${run.is_stopping ? "stopping" : run.state}`);
}

function factsOf(run) {
  if (run.state === "stopped") return run.step === null ? [] : [t("run.only_step", run)];
  if (run.state !== "running") return [];
  if (run.step === null) return [t("run.begins")];
  const left = run.seconds_left, minutes = left === null ? null : Math.round(left / 60);
  return [
    t("run.step", {step: run.step, max: run.max_steps ?? "?"}),
    run.loss === null ? null : t("run.loss", {loss: run.loss.toFixed(4)}),
    minutes === null ? null : minutes ? t("run.left", {minutes}) : t("run.soon"),
  ].filter(Boolean);
}

function bar(run) {
  if (run.state !== "running") return null;
  const value = run.step !== null && run.max_steps ? {value: run.step, max: run.max_steps} : {};
  return make("progress", {...value, "aria-label": t("run.progress", run)});
}

function actionsOf(run) {
  const act = (name, action) => button(t(`run.${name}`), async () => {
    await post(`/api/runs/${run.id}/${action}`);
    if (action === "remove" && location.hash.startsWith("#/run")) location.hash = "#/";
  }, {"aria-label": t("run.of", {action: t(`run.${name}`), name: run.name})});
  const now = (name) => (run.requests.includes(name) ? make("span", {class: "dim"}, t(`run.asked.${name}`)) : act(name, name));
  if (run.state === "running") return run.is_stopping ? [] : [act("stop", "stop"), ...(run.step === null ? [] : [now("draw_now"), now("save_now")])];
  if (run.state === "waiting") return [act("later", "continue"), act("stop", "stop")];
  const again = run.state === "done" ? [] : [act("continue", "continue")];
  const repeat = (name, longer) => button(t(`run.${name}`), async () => { location.hash = `#/plan/${(await post(`/api/runs/${run.id}/again`, {longer})).id}`; },
    {"aria-label": t("run.of", {action: t(`run.${name}`), name: run.name})});
  const repeats = !run.can_repeat ? [] : [...(run.state === "done" ? [repeat("longer", true)] : []), repeat("again", false)];
  return [...again, ...repeats, act("remove", "remove")];
}

export function runRow(run) {
  const facts = [stateOf(run), ...factsOf(run), run.remark].filter(Boolean);
  return make("li", {class: `run ${run.state}`}, make("div", {}, make("a", {href: `#/run/${run.id}`}, run.name), make("div", {class: "dim"}, facts.join(" · ")), bar(run)),
    make("div", {class: "row"}, actionsOf(run)));
}

/** Return what can be done with a finished adapter. */
function waysToUse(run, drawing, folders) {
  const draw = (values) => post(`/api/runs/${run.id}/draw`, values), isDrawing = drawing?.state === "running";
  const pick = (values) => make("select", {}, values.map((value) => make("option", {}, value)));
  const file = pick([...run.files].sort((one, other) => one.length - other.length)), folder = pick(folders);
  const copy = async () => {
    await post(`/api/runs/${run.id}/copy`, {name: file.value, folder: folder.value});
    note(t("run.copied", {name: file.value, folder: folder.value}));
  };
  return [
    drawing?.result ? make("p", {}, t("run.use", drawing.result)) : null, problem(drawing), progress(drawing, "run.drawing"),
    isDrawing ? button(t("run.cancel"), () => draw({cancel: true})) : button(t("run.draw"), () => draw({})),
    run.sheet ? make("p", {}, make("img", {class: "sheet", src: `/runs/${run.id}/sheet?${run.sheet}`, alt: t("run.sheet")})) : null,
    folders.length ? make("div", {class: "pair"}, field(t("run.copy_file"), file), field(t("run.copy_to"), folder), button(t("run.copy"), copy)) : null,
  ].filter(Boolean);
}

export async function showRun(box, id) {
  const folders = (await get("/api/programs")).folders;
  const head = make("div"), use = make("div"), log = make("pre", {tabindex: 0}), report = make("section"), logs = make("details", {}, make("summary", {}, t("run.log")), log);
  box.append(make("p", {}, make("a", {href: "#/"}, t("run.back"))), head, use, report, logs);
  let key = "", reported = "";
  logs.addEventListener("toggle", () => loadLog());
  async function loadLog() {
    if (!logs.open) return;
    try { log.textContent = (await get(`/api/runs/${id}/log`)).lines.join("\n"); } catch (error) { note(error.message); }
  }
  return (state) => {
    const run = state.runs.find((one) => one.id === id);
    const drawing = state.tasks[`${id}/draw`];
    const now = JSON.stringify([run ?? null, drawing]);
    if (now === key) return;
    key = now;
    if (!run) { head.replaceChildren(make("h1", {}, t("run.unknown"))); return; }
    head.replaceChildren(
      make("h1", {}, run.name), make("p", {class: "state"}, [stateOf(run), ...factsOf(run)].join(" · ")), ...[bar(run)].filter(Boolean),
      ...(run.remark ? [make("p", {class: "bad"}, run.remark)] : []),
      make("div", {class: "row"}, actionsOf(run)),
      ...(run.adapter ? [make("p", {}, t("run.finished")), make("p", {class: "path"}, run.adapter)] : []),
      ...(run.files.length ? [make("details", {}, make("summary", {}, t("run.files")), make("p", {class: "dim"}, t("run.folder", run)), make("ul", {}, run.files.map((name) => make("li", {}, name))))] : []),
    );
    use.replaceChildren(...(run.state === "done" ? waysToUse(run, drawing, folders) : []));
    // A report that is shown reloads itself until its training ends.
    const want = `${run.has_report} ${run.state}`;
    if (reported !== want) {
      reported = want;
      const address = `/runs/${id}/report?key=${reportKey}`;
      report.replaceChildren(make("h2", {}, t("run.report")), ...(run.has_report
        ? [make("p", {}, make("a", {href: address, target: "_blank", rel: "noopener"}, t("run.report_alone"))), make("iframe", {src: address, title: t("run.report"), sandbox: "allow-scripts"})]
        : [make("p", {class: "dim"}, t("run.no_report"))]));
    }
    loadLog();
  };
}
