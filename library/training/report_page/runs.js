// Charts and previews of several runs, which the comparison and the page of a sweep share.
"use strict";

const data = readData();
const runs = data.runs ?? [];

/** Lines over different steps, as a chart of all their steps: [{label, x, y, low, high}], without those of no run. */
function joined(title, lines, options) {
  const present = lines.filter((line) => line && line.y.some((value) => value !== null));
  if (!present.length) return [];
  const columns = (line) => [line.y, ...(line.low ? [line.low, line.high] : [])];
  const [x, ...values] = uPlot.join(present.map((line) => [line.x, ...columns(line)]));
  const aligned = present.map(({label, low, dots}) => {
    const line = {label, dots, y: values.shift()};
    return low ? {...line, low: values.shift(), high: values.shift()} : line;
  });
  return [chart(title, x, aligned, options)];
}

function curve(name, {shades = false} = {}) {
  return runs.map((run) => {
    const line = lineOf(run.curves, name, run.label);
    if (!line) return null;
    const {low, high, ...alone} = line;
    return {...(shades ? line : alone), x: stepsOf(run)};
  });
}

function measured(pick) {
  return runs.map((run) => {
    const items = run.validations.items.map((item) => ({step: item.step, ...pick(item)})).filter((one) => one.loss !== undefined);
    const edge = (sign) => items.map(({loss, error}) => (loss === null ? null : loss + sign * (error ?? 0)));
    return {label: run.label, dots: true, x: items.map((one) => one.step), y: items.map((one) => one.loss), low: edge(-1), high: edge(1)};
  });
}

function losses() {
  charts("Losses", [
    ...joined("Training loss, smoothed", curve("smoothed"), {wide: true}),
    ...joined("Training loss", curve("loss", {shades: true}), {wide: true}),
  ]);
  const levels = [...new Set(runs.flatMap((run) => run.validations.items.flatMap((item) => item.levels.map(({level}) => level))))];
  const at = (level) => (item) => item.levels.find((one) => one.level === level) ?? {};
  const warning = make("p", {class: "bad"}, "These runs set other pictures aside, or measure them in another way: their validation losses do not compare.");
  charts(
    "Validation",
    [
      ...joined("All noise levels", measured(({loss, error}) => ({loss, error})), {wide: true}),
      ...levels.sort((a, b) => a - b).flatMap((level) => joined(`Noise level ${level}`, measured(at(level)))),
    ],
    data.is_measured_alike === false ? warning : null
  );
}

function others() {
  const list = [["Learning rate of the first group", null], ["Gradient norm, before clipping", "gradient"], ["Seconds a step", "seconds"]];
  const first = (run) => Object.keys(run.curves.columns).find((name) => name.startsWith("lr "));
  const rates = runs.map((run) => {
    const line = first(run) && lineOf(run.curves, first(run), run.label);
    return line ? {label: line.label, y: line.y, x: stepsOf(run)} : null;
  });
  charts("Training", list.flatMap(([title, name]) => joined(title, name ? curve(name) : rates)));
}

/** At each step at which any run drew, the last pictures of all runs, a row for each prompt. */
function previews() {
  const steps = [...new Set(runs.flatMap((run) => run.previews.items.map((item) => item.step)))].sort((a, b) => a - b);
  if (!steps.length) return;
  const key = ({prompt, seed, width, height}) => JSON.stringify([prompt, seed, width, height]);
  const prompts = [...new Set(runs.flatMap((run) => Object.values(run.prompts).map(key)))];
  const picture = (run, wanted, step) => {
    const number = Object.keys(run.prompts).find((n) => key(run.prompts[n]) === wanted);
    const item = run.previews.items.findLast((one) => one.step <= step && one.pictures[number]);
    return item ? {picture: item.pictures[number], step: item.step} : {};
  };
  const figures = (step) => prompts.flatMap((wanted) => runs.map((run) => {
    const found = picture(run, wanted, step);
    const when = found.picture ? `step ${found.step}` : "none";
    return {picture: found.picture, caption: `${run.label}, ${when}: ${JSON.parse(wanted)[0]}`};
  }));
  const [control, shown] = slider(steps.map((step) => ({label: `step ${step}`, figures: figures(step)})), "step");
  shown.style.gridTemplateColumns = `repeat(${runs.length}, minmax(120px, 256px))`;
  section("Previews", control, make("div", {class: "scroll"}, shown));
}
