// Charts and previews of several runs, for the comparison and the page of a sweep.
"use strict";

const data = readData();
const runs = data.runs ?? [];

/** Return a list with one chart of lines over different steps, {label, x, y, low, high}; empty if no line has values. */
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
    const items = run.validations.items.map((item) => ({step: item.step, ...pick(item)})).filter(({loss}) => loss !== undefined);
    const edge = (sign) => items.map(({loss, error}) => (loss === null ? null : loss + sign * (error ?? 0)));
    return {label: run.label, dots: true, x: items.map(({step}) => step), y: items.map(({loss}) => loss), low: edge(-1), high: edge(1)};
  });
}

function losses() {
  charts("Losses", [
    ...joined("Training loss, smoothed", curve("smoothed"), {wide: true}),
    ...joined("Training loss", curve("loss", {shades: true}), {wide: true}),
  ]);
  const levels = [...new Set(runs.flatMap((run) => run.validations.items.flatMap((item) => item.levels.map(({level}) => level))))];
  const at = (level) => (item) => item.levels.find((measured) => measured.level === level) ?? {};
  const warning = make("p", {class: "bad"}, "The runs validate on different images or in different ways, so their validation losses cannot be compared.");
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
  const list = [["Learning rate of the first group", null], ["Gradient norm, before clipping", "gradient"], ["Seconds per step", "seconds"]];
  const first = (run) => Object.keys(run.curves.columns).find((name) => name.startsWith("lr "));
  const rates = runs.map((run) => {
    const line = first(run) && lineOf(run.curves, first(run), run.label);
    return line ? {label: line.label, y: line.y, x: stepsOf(run)} : null;
  });
  charts("Training", list.flatMap(([title, name]) => joined(title, name ? curve(name) : rates)));
}

/** Add the previews: for each step at which any run drew, the latest image of every run, one row per prompt. */
function previews() {
  const steps = [...new Set(runs.flatMap((run) => run.previews.items.map((item) => item.step)))].sort((a, b) => a - b);
  if (!steps.length) return;
  const key = ({prompt, seed, width, height}) => JSON.stringify([prompt, seed, width, height]);
  const prompts = [...new Set(runs.flatMap((run) => Object.values(run.prompts).map(key)))];
  const picture = (run, wanted, step) => {
    const number = Object.keys(run.prompts).find((n) => key(run.prompts[n]) === wanted);
    const item = run.previews.items.findLast(({step: drawn, pictures}) => drawn <= step && pictures[number]);
    return item ? {picture: item.pictures[number], step: item.step} : {};
  };
  const figures = (step) => prompts.flatMap((wanted) => runs.map((run) => {
    const latest = picture(run, wanted, step);
    const when = latest.picture ? `step ${latest.step}` : "none";
    return {picture: latest.picture, caption: `${run.label}, ${when}: ${JSON.parse(wanted)[0]}`};
  }));
  const [control, shown] = slider(steps.map((step) => ({label: `step ${step}`, figures: figures(step)})), "step");
  shown.style.gridTemplateColumns = `repeat(${runs.length}, minmax(120px, 256px))`;
  section("Previews", control, make("div", {class: "scroll"}, shown));
}
