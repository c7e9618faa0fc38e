// The report of one run.
"use strict";

const record = readData();
const {plan, audit, curves} = record;
const last = record.sessions.at(-1);
const steps = stepsOf(record);
const FIRST_WARNINGS = 5;  // the others are folded
const present = (...lines) => lines.filter((line) => line);
/** Return a line for each curve whose name starts with `prefix` and a space; the rest of the name is its label. */
const linesOf = (prefix) =>
  Object.keys(curves.columns).filter((name) => name.startsWith(`${prefix} `)).map((name) => lineOf(curves, name, name.slice(prefix.length + 1)));

function chartIf(title, lines, options) {
  return lines.length ? [chart(title, steps, lines, options)] : [];
}

function secondsPerStep() {
  const {total, count} = curves.columns.seconds ?? {total: []};
  const from = total.length - Math.ceil(total.length / 5);  // the speed of today's machine, without compilation at the start
  let sum = 0, number = 0;
  total.forEach((value, i) => {
    if (i >= from && value !== null) { sum += value; number += count ? count[i] : 1; }
  });
  return number ? sum / number : null;
}

function head() {
  const end = last?.end, pace = secondsPerStep();
  const state = !end ? "running or killed" : end.reason;
  document.title = `${record.name}: ${state}`;
  page.replaceChildren(make("h1", {}, record.name));
  page.append(make("p", {class: "dim"}, `${state} · updated ${moment(record.updated)}`));
  if (end?.error) page.append(make("p", {class: "bad"}, end.error));
  const facts = [];
  const fact = (value, label) => facts.push(make("div", {}, make("b", {}, value), make("span", {}, label)));
  if (plan) {
    fact(`${record.step} / ${plan.max_train_steps}`, `steps, epoch ${record.epoch} of ${plan.num_epochs}`);
    if (pace) fact(`${short(pace, 3)} s`, "per step");
    if (pace && !end) fact(duration(pace * (plan.max_train_steps - record.step)), "remaining");
    if (record.loss !== null) fact(short(record.loss), "loss, smoothed");
    if (record.best) fact(short(record.best.loss), `lowest validation loss, step ${record.best.step}`);
    if (plan.planned) {
      const {card_bytes: bytes, seconds} = plan.planned;
      fact(`${short(bytes / 2 ** 30, 3)} GiB, ${short(seconds, 2)} s`, "planned by --fit: memory, time of forward and backward");
    }
    fact(plan.base_model, `${plan.network}, ${short(plan.num_trained / 1e6, 3)} million parameters`);
    fact(plan.device, plan.num_processes > 1 ? `${plan.num_processes} processes` : "device");
  }
  page.append(make("div", {class: "facts"}, facts));
}

function losses() {
  const over = record.smoothed.over;
  const lines = present(lineOf(curves, "loss", "loss"), lineOf(curves, "smoothed", `smoothed over ${over} steps`));
  for (const line of lines.slice(1)) delete line.low;  // two shaded areas would hide each other
  charts("Loss", chartIf("Training", lines, {wide: true}), thinned());
}

function thinned() {
  const width = curves.width;
  const text = `Each point covers ${width} steps: the line is their mean, the shaded area their range.`;
  return width > 1 ? make("p", {class: "dim"}, text) : null;
}

function validations() {
  const items = record.validations.items, probe = record.forgetting.items;
  if (!items.length && !probe.length) return;
  const x = items.map((item) => item.step);
  const line = (label, values) => ({
    label,
    dots: true,
    y: values.map(({loss}) => loss),
    low: values.map(({loss, error}) => (error === null ? loss : loss - error)),
    high: values.map(({loss, error}) => (error === null ? loss : loss + error)),
  });
  const changes = (values) => values.map(({compared}) => (compared ? {loss: compared.mean, error: compared.error} : {loss: 0, error: 0}));
  const probes = probe.length ? [chart("Forgetting probe, never trained", probe.map(({step}) => step), [line("loss", probe)])] : [];
  if (probe.length > 1) probes.push(chart(`Forgetting: difference from step ${probe[0].step}, paired by image`, probe.map(({step}) => step), [line("difference", changes(probe))]));
  const shades = make("p", {class: "dim"}, "Shaded: one standard error over images.");
  if (!items.length) return charts("Validation", probes, shades);
  const levels = items[0].levels.map(({level}, i) => line(`level ${level}`, items.map((item) => item.levels[i] ?? {loss: null, error: null})));
    const list = [chart("All noise levels", x, [line("loss", items)]), chart("By noise level", x, levels)];
  if (items.length > 1) list.push(chart(`Difference from step ${x[0]}, paired by image`, x, [line("difference", changes(items))]));
  const preferences = items.map((item) => item.preference).filter(Boolean);
  const preferred = (label, name) => chart(label, x, [{label: name, dots: true, y: preferences.map((preference) => preference[name])}]);
  if (preferences.length === items.length) list.push(preferred("Held-out pairs: share with the preferred image ahead", "accuracy"), preferred("Held-out pairs: mean margin of implicit rewards", "margin"));
  charts("Validation", [...list, ...probes], shades);
}

function optimization() {
  charts("Optimization", [
    ...chartIf("Learning rates", linesOf("lr")),
    ...chartIf("Gradient norm, before clipping", present(lineOf(curves, "gradient", "all"), ...linesOf("gradient"))),
    ...chartIf("Weight norm", linesOf("weight")),
  ]);
}

function speed() {
  const gpu = present(
    lineOf(curves, "card", "in use", 1e-9), lineOf(curves, "card_peak", "peak so far", 1e-9),
    lineOf(curves, "card_reserved_peak", "peak with torch's cache", 1e-9),
  );
  charts("Speed and memory", [
    ...chartIf("Seconds per step", present(lineOf(curves, "seconds", "all"), ...linesOf("part"))),
    ...chartIf("MFU, percent of the GPU's peak", present(lineOf(curves, "mfu", "MFU", 100))),
    ...chartIf("TFLOP/s", curves.columns.mfu ? [] : present(lineOf(curves, "tflops", "TFLOP/s"))),
    ...chartIf("Images per second", present(lineOf(curves, "pictures_per_second", "images/s"))),
    ...chartIf("GPU memory, GB", gpu),
    ...chartIf("Main memory, GB", present(lineOf(curves, "main_peak", "peak so far", 1e-9))),
  ]);
}

function previews() {
  const times = record.previews.items, numbers = Object.keys(record.prompts);
  if (!times.length) return;
  const label = (time) => (time.step ? `step ${time.step}` : "before training");
  const strength = (n) => (record.prompts[n].strength === undefined || record.prompts[n].strength === 1 ? "" : `, strength ${record.prompts[n].strength}`);
  const figures = (time) => numbers.map((n) => ({picture: time.pictures[n], caption: record.prompts[n].prompt + strength(n)}));
  const cell = (time, n) => make("td", {}, time.pictures[n] ? make("img", {src: time.pictures[n], alt: label(time), loading: "lazy"}) : null);
  const rows = numbers.map((n) => make("tr", {}, make("th", {}, record.prompts[n].prompt + strength(n)), times.map((time) => cell(time, n))));
  const grid = make("table", {class: "times"}, make("tr", {}, make("th"), times.map((time) => make("th", {}, label(time)))), rows);
  const all = make("details", times.length === 2 ? {open: ""} : {}, make("summary", {}, "All prompts and steps"), make("div", {class: "scroll"}, grid));
  section("Previews", ...slider(times.map((time) => ({label: label(time), figures: figures(time)})), "time"), all);
}

function strengths() {
  const items = record.strengths.items;
  if (!items.length) return;
  const rows = items.flatMap(({step, prompts}) => prompts.map(({prompt, seed, strengths, correlation}) => [prompt, seed, strengths.join(", "), step, short(correlation)]));
  const how = "Spearman's rank correlation of strength and change: 1 if every higher strength moves the image further from the first towards the last.";
  section("Strength", table(["prompt", "seed", "strengths", "step", "rank correlation"], rows, [1, 3, 4]), make("p", {class: "dim"}, how));
}

function scores() {
  const items = record.scores.items;
  if (!items.length) return;
  const names = [...new Set(items.flatMap(({scores}) => Object.keys(scores)))];
  const list = names.map((name) => {
    const points = items.map(({scores}) => scores[name] ?? {mean: null, error: null});
    const edge = (sign) => points.map(({mean, error}) => (mean === null ? null : mean + sign * (error ?? 0)));
    const line = {label: name, dots: true, y: points.map(({mean}) => mean), low: edge(-1), high: edge(1)};
    return chart(name, items.map(({step}) => step), [line]);
  });
  charts("Scores of the previews", list, make("p", {class: "dim"}, "Means over the prompts; shaded: one standard error. A higher score is not always better: noise is sharp, and near-copies are the share of images that repeat a training image."));
}

function sheet() {
  const sheets = {...record.sheets, ...(record.sheet ? {"Contact sheet": record.sheet} : {})};
  for (const [title, src] of Object.entries(sheets)) {
    section(title, make("div", {class: "scroll"}, make("img", {src, alt: title, class: "sheet"})));
  }
}

function notes() {
  for (const [title, lines] of Object.entries(record.notes ?? {})) section(title, make("pre", {class: "scroll"}, lines.join("\n")));
}

function photos() {
  if (!(record.photos ?? []).length) return;
  section("Photos", make("div", {class: "shown"}, record.photos.map((src) => make("img", {src, alt: "", loading: "lazy"}))));
}

function files() {
  if (!record.files.length) return;
  const measured = new Map(record.validations.items.map((item) => [item.step, item]));
  const rows = record.files.map((file) => {
    const loss = measured.get(file.step);
    const error = loss?.error ? ` ± ${short(loss.error, 2)}` : "";
    const isReliable = record.choice?.suggested !== null;  // with too few images the lowest loss is chance
    const isBest = isReliable && file.kind === "weights" && record.best?.step === file.step;
    const isSuggested = file.file === record.choice?.suggested;
    const mark = (text) => make("span", {class: "mark"}, text);
    const marks = make("div", {}, isSuggested ? mark("suggested") : "", " ", isBest ? mark("lowest validation loss") : "");
    return [file.name, file.kind, file.step, file.epoch, loss ? short(loss.loss) + error : "–", megabytes(file.num_bytes), marks];
  });
  const removed = record.num_removed ? make("p", {class: "dim"}, `${record.num_removed} older files were deleted.`) : null;
  section("Saved files", table(["file", "kind", "step", "epoch", "validation loss", "size", ""], rows, [2, 3, 5]), removed);
}

function choice() {
  if (!record.choice) return;
  const {suggested, step, reason, num_pictures, confidence, candidates} = record.choice;
  const name = (file) => file.split(/[\\/]/).at(-1);
  const range = (low, high) => (low === null ? "" : ` (${short(low, 3)} to ${short(high, 3)})`);
  const increase = (change) => (change ? short(change.more, 3) + range(change.low, change.high) : "");
  const names = [...new Set(candidates.flatMap((candidate) => Object.keys(candidate.scores ?? {})))];
  const score = (value) => (!value ? "" : short(value.mean, 3) + (value.difference ? `, ${value.difference > 0 ? "+" : ""}${short(value.difference, 3)}${range(value.low, value.high)}` : ""));
  const rows = candidates.map((candidate) => [
    candidate.file === null ? "before training" : name(candidate.file),
    candidate.step,
    short(candidate.loss) + range(candidate.low, candidate.high),
    candidate.difference ? short(candidate.difference, 3) + range(candidate.difference_low, candidate.difference_high) : "–",
    candidate.is_worse ? "significantly worse" : "",
    increase(candidate.forgotten),
    increase(candidate.memorised),
    ...names.map((key) => score(candidate.scores?.[key])),
    suggested !== null && candidate.file === suggested ? make("span", {class: "mark"}, "suggested") : "",
  ]);
  const text = suggested === null ? `No file is suggested: ${reason}.` : `${name(suggested)}, step ${step}: ${reason}.`;
  const how = `${num_pictures} images; brackets: ${100 * confidence} % confidence intervals, simultaneous for the differences.`;
  const heads = ["file", "step", "validation loss", "difference from best", "", candidates.some(({forgotten}) => forgotten) ? "forgetting" : "", candidates.some(({memorised}) => memorised) ? "memorization gap" : "", ...names, ""];
  section("Which file to keep", make("p", {}, text), table(heads, rows, [1]), make("p", {class: "dim"}, how));
}

function warnings() {
  if (!record.warnings.length) return;
  const rows = record.warnings.map(({level, text, count}) => [level, text, count > 1 ? `${count} times` : ""]);
  const more = record.num_warnings_left_out, rest = rows.slice(FIRST_WARNINGS);
  const hidden = rest.length ? make("details", {}, make("summary", {}, `${rest.length} more`), table(["", "", ""], rest)) : null;
  const inLog = more ? make("p", {class: "dim"}, `${more} more are in the log.`) : null;
  section("Warnings", table(["", "", ""], rows.slice(0, FIRST_WARNINGS)), hidden, inLog);
}

function data() {
  if (!audit || !audit.datasets.length) return;
  const subsets = audit.datasets.flatMap(({subsets}) => subsets);
  const sources = subsets.map((s) => [s.source, s.num_pictures, s.num_repeats, s.num_without_caption, s.is_reg ? "regularisation" : ""]);
  section("Data", table(["images of", "number", "repeats", "without caption", ""], sources, [1, 2, 3]));
  const buckets = audit.datasets.flatMap(({buckets}) => buckets);
  const longest = Math.max(...buckets.flatMap((b) => [b.width, b.height]), 1);
  const shape = (b) => make("div", {class: "shape", style: `width:${(110 * b.width) / longest}px;height:${(110 * b.height) / longest}px`});
  const shapes = buckets.map((b) => make("figure", {}, shape(b), make("figcaption", {}, `${b.width} × ${b.height}: ${b.num_draws} in ${b.num_batches} batches`)));
  page.append(make("h3", {}, "Buckets"), make("div", {class: "buckets"}, shapes));
  const {unit, most, counts} = audit.caption_lengths;
  if (counts.length) {
    const bins = binned(counts);
    const limit = most === null ? "" : `; the model reads ${most}`;
    const [box, draw] = chart(`Lengths of captions in ${unit}${limit}`, bins.map(([x]) => x), [{label: "captions", y: bins.map(([, n]) => n)}], {unit, bars: true});
    page.append(box);
    draw();
  }
  if (audit.tags.length) {
    const tags = audit.tags.map(([tag, count]) => make("span", {}, `${tag} ${count}`));
    page.append(make("h3", {}, "Most common tags"), make("div", {class: "tags"}, tags));
  }
  if (audit.pairs && audit.pairs.length) page.append(make("h3", {}, "Pairs: reference or partner, then image"), figures(audit.pairs));
  if (audit.num_dropped) {
    const rows = audit.dropped.map(({file, reason}) => [file, reason]);
    page.append(make("h3", {}, `${audit.num_dropped} images are skipped`), table(["file", "reason"], rows));
  }
}

function figures(pictures) {
  return make("div", {class: "shown"}, pictures.map(({file, note, thumbnail}) => {
    const picture = thumbnail ? make("img", {src: thumbnail, alt: "", loading: "lazy"}) : null;
    return make("figure", {}, picture, make("figcaption", {}, note ? `${file}: ${note}` : file));
  }));
}

function findings() {
  if (!record.findings.length) return;
  section("Problems found in the images");
  for (const {text, pictures, num_pictures} of record.findings) {
    const more = num_pictures - pictures.length;
    page.append(make("h3", {}, text), figures(pictures));
    if (more) page.append(make("p", {class: "dim"}, `${more} more are in the log.`));
  }
}

/** Return [first length, count] of at most 60 equal bins of [length, count] pairs; empty bins count zero. */
function binned(counts) {
  const first = counts[0][0], width = Math.ceil((counts.at(-1)[0] - first + 1) / 60);
  const bins = Array.from({length: Math.floor((counts.at(-1)[0] - first) / width) + 1}, (_, i) => [first + i * width, 0]);
  for (const [length, count] of counts) bins[Math.floor((length - first) / width)][1] += count;
  return bins;
}

function run() {
  if (!last) return;
  const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const options = Object.entries(last.options).map(([name, value]) => [`--${name}`, shown(value)]);
  const sessions = record.sessions.map(({time, first_step: first, end}) => {
    const result = end ? `${end.reason}${end.step === null ? "" : ` after step ${end.step}`}` : "";
    return [moment(time), first === null ? "" : `from step ${first}`, result, end ? duration(end.seconds) : ""];
  });
  section("Run", table(["started", "", "", ""], sessions));
  if (last.end?.summary) page.append(make("p", {}, last.end.summary));
  const quoted = (text) => (/^[\w./=:,+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  if (last.command) page.append(make("details", {}, make("summary", {}, "Command line"), make("pre", {}, last.command.map(quoted).join(" "))));
  page.append(make("details", {}, make("summary", {}, "Options that differ from their defaults"), table(["option", "value"], options)));
  page.append(make("details", {}, make("summary", {}, "Versions"), table(["", ""], Object.entries(last.versions))));
  const stages = Object.entries(record.stages).map(([name, [seconds, count]]) => [name, duration(seconds), count > 1 ? `${count} times` : ""]);
  page.append(make("details", {}, make("summary", {}, "Stages"), table(["stage", "time", ""], stages)));
}

for (const part of [head, notes, photos, warnings, losses, validations, previews, strengths, scores, sheet, choice, files, optimization, speed, findings, data, run]) {
  part();
}
