// Shared by all pages. Captions and file names are untrusted, so they are inserted as text nodes, never as HTML.
"use strict";

/** Return an element with attributes and children; strings become text nodes, null and undefined are skipped. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  for (const child of children.flat()) if (child !== null && child !== undefined) element.append(child);
  return element;
}

const page = document.getElementById("page");
const readData = () => JSON.parse(document.getElementById("data").textContent);

function section(title, ...children) {
  page.append(make("h2", {}, title), ...children.filter((child) => child));
}

function table(headings, rows, numbers = []) {
  const cells = (tag, row) =>
    row.map((cell, i) => make(tag, numbers.includes(i) ? {class: "number"} : {}, cell === null ? "" : cell));
  const body = rows.map((row) => make("tr", {}, cells("td", row)));
  return make("div", {class: "scroll"}, make("table", {}, make("tr", {}, cells("th", headings)), body));
}

/** Format a number with few digits: 0.1234, 2.5e-6, 12350. */
function short(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const rounded = Number(value.toPrecision(digits));
  return rounded !== 0 && Math.abs(rounded) < 1e-3 ? rounded.toExponential() : String(rounded);
}
const megabytes = (bytes) => (bytes === null ? "–" : `${short(bytes / 1e6, 3)} MB`);
const moment = (seconds) => new Date(seconds * 1000).toLocaleString();

function duration(seconds) {
  if (seconds >= 5400) return `${short(seconds / 3600, 2)} h`;
  return seconds >= 90 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds)} s`;
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shade = (number, alpha = "") => color(`--c${number % 8}`) + alpha;
const plots = [];

const WIDEST_BAR = 60;  // pixels
const WHOLE_NUMBERS = [1, 2, 5].flatMap((digit) => [digit, 10 * digit, 100 * digit, 1000 * digit]).sort((a, b) => a - b);

/** Return the range of an axis with a bar at each of `x`: a bar of room at each end, and at least six whole numbers. */
function barRange(x) {
  const first = x[0], end = x.at(-1), width = x.length > 1 ? x[1] - first : 1;
  const room = Math.max(width, Math.ceil((5 - (end - first)) / 2));
  return [first - room, end + room];
}

/**
 * Return [element, draw] for a chart of lines over `x`. A line is {label, y, low, high, dots}; the area between `low` and
 * `high` is shaded. Call `draw` once the element is in the page, because uPlot needs its width.
 */
function chart(title, x, lines, {wide = false, unit = "step", bars = false} = {}) {
  const box = make("div", {class: wide ? "chart wide" : "chart"}, make("h3", {}, title));
  const series = [{label: unit}], values = [x], bands = [];
  lines.forEach((line, number) => {
    const look = {label: line.label, stroke: () => shade(number), width: 1.5, spanGaps: true, value: (_, v) => short(v)};
    if (bars) Object.assign(look, {fill: () => shade(number, "99"), paths: uPlot.paths.bars({size: [0.8, WIDEST_BAR]})});
    look.points = {show: !bars && (Boolean(line.dots) || x.length < 3)};
    series.push(look);
    values.push(line.y);
    if (line.low) {
      const edge = {stroke: () => shade(number, "55"), width: 0.5, spanGaps: true, points: {show: false}, class: "edge"};
      bands.push({series: [series.length + 1, series.length], fill: () => shade(number, "33")});
      series.push({...edge, label: `${line.label}, low`}, {...edge, label: `${line.label}, high`});
      values.push(line.low, line.high);
    }
  });
  const axis = {stroke: () => color("--dim"), grid: {stroke: () => color("--line"), width: 1}, ticks: {show: false}};
  const sides = () => ({width: Math.max(200, box.clientWidth - 24), height: wide ? 300 : 220});
  const options = {
    ...sides(),
    series,
    bands,
    scales: bars ? {x: {time: false, range: () => barRange(x)}, y: {range: (_, low, high) => [0, 1.1 * high]}} : {x: {time: false}},
    axes: [{...axis, size: 30, ...(bars ? {incrs: WHOLE_NUMBERS} : {})}, {...axis, size: 70, values: (_, ticks) => ticks.map((tick) => short(tick))}],
    cursor: {sync: {key: unit}},
    legend: {show: lines.length > 1 || !bars},
  };
  const draw = () => {
    const plot = new uPlot(options, values, box);
    // The legend would list the edges of the shaded areas too.
    for (const [i, row] of [...plot.root.querySelectorAll(".u-series")].entries())
      if (series[i].class === "edge") row.remove();
    plots.push(plot);
    const fit = () => { if (plot.width !== sides().width) plot.setSize(sides()); };
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(box);
  };
  return [box, draw];
}

/** Add a section with the results of `chart` to the page, and draw them. */
function charts(title, list, ...notes) {
  if (!list.length) return;
  section(title, make("div", {class: "charts"}, list.map(([box]) => box)), ...notes);
  for (const [, draw] of list) draw();
}

/** Return a recorded curve as a line for `chart`: the mean, and the range if a point covers several steps. */
function lineOf(curves, name, label, scale = 1) {
  const column = curves.columns[name];
  if (!column) return null;
  const scaled = (values) => values.map((value) => (value === null ? null : value * scale));
  const y = column.count ? column.total.map((v, i) => (v === null ? null : v / column.count[i])) : column.total;
  return {label, y: scaled(y), ...(column.low ? {low: scaled(column.low), high: scaled(column.high)} : {})};
}

/** Return the step of each point of a record's curves: the last of the steps that it covers, up to the current one. */
function stepsOf(record) {
  const length = Math.max(0, ...Object.values(record.curves.columns).map((column) => column.total.length));
  return Array.from({length}, (_, i) => Math.min((i + 1) * record.curves.width, Math.max(record.step, i * record.curves.width + 1)));
}

/** Return a slider over `times`, {label, figures: [{picture, caption}]}, and the element with the images it selects. */
function slider(times, label) {
  const shown = make("div", {class: "shown"}), output = make("output");
  const range = make("input", {type: "range", min: 0, max: times.length - 1, value: times.length - 1, "aria-label": label});
  const show = () => {
    const time = times[range.value];
    output.textContent = time.label;
    shown.replaceChildren(
      ...time.figures.map(({picture, caption}) =>
        make("figure", {}, picture ? make("img", {src: picture, alt: caption}) : null, make("figcaption", {}, caption))
      )
    );
  };
  range.addEventListener("input", show);
  show();
  return [make("div", {class: "slider"}, range, output), shown];
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.redraw(false)));
