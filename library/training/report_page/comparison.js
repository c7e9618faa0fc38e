// The comparison of several runs.
"use strict";

const {differences} = data;

function head() {
  document.title = runs.map((run) => run.label).join(" and ");
  page.replaceChildren(make("h1", {}, `${runs.length} runs`));
  const rows = runs.map((run) => [
    run.label, run.end ? run.end.reason : "running or killed", `${run.step} / ${run.plan.max_train_steps}`, short(run.loss),
    run.best ? `${short(run.best.loss)} at step ${run.best.step}` : "–",
  ]);
  page.append(table(["run", "", "steps", "loss, smoothed", "lowest validation loss"], rows));
}

function changes() {
  const shown = (value) => (value === null ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  const rows = differences.map(([name, ...values]) => [name, ...values.map(shown)]);
  const none = make("p", {}, "Nothing: options, data and versions are equal.");
  section("Differences", rows.length ? table(["", ...runs.map((run) => run.label)], rows) : none);
}

for (const part of [head, changes, losses, previews, others]) part();
