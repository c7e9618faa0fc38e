// The adapters of a sweep, best first.
"use strict";

const {title, verdict, num_pictures: numPictures, confidence, rows, chosen = {}, reports = {}} = data;

const interval = ({low, high}) => (low === null ? "" : ` (${short(low)} to ${short(high)})`);

const linked = (label) => (reports[label] ? make("a", {href: encodeURIComponent(reports[label])}, label) : label);

function ranked(row, place) {
  const {step, ended, file, compared} = row, label = linked(row.label);
  if (!compared) return ["–", label, String(step), "–", "–", "–", file ?? "–", ended];
  const {loss, to_best: gap, is_worse: isWorse, is_copy: isCopy} = compared;
  const isBest = place === 0 || isCopy;
  const significance = isBest ? "–" : isWorse ? "significantly worse" : "not significant";
  const above = isBest ? "–" : short(gap.mean) + interval(gap);
  return [String(place + 1), label, String(step), short(loss.mean) + interval(loss), above, significance, file ?? "–", ended];
}

document.title = title;
page.replaceChildren(make("h1", {}, title), make("p", {}, `${verdict}.`));
const heads = ["", "adapter", "steps", "validation loss", "difference from best", "", "file", ""];
page.append(table(heads, rows.map(ranked)));
if (numPictures) {
  const share = `${Math.round(confidence * 100)} %`;
  const how =
    `Measured on ${numPictures} images that no adapter was trained on, with the same noise for all. Brackets: ${share} ` +
    "confidence intervals, simultaneous for the differences, which are paired by image.";
  page.append(make("p", {}, how));
}

const swept = [...new Set(Object.values(chosen).flatMap((values) => Object.keys(values)))];
const valuesOf = (name) => [...new Set(Object.values(chosen).map((values) => values[name]))];

/** Add tables of the losses over the two options with the most values, one table per combination of the others. */
function grids() {
  const measured = rows.filter(({label, compared}) => compared && chosen[label]);
  if (swept.length < 2 || measured.length < 2) return;
  const [down, across] = [...swept].sort((a, b) => valuesOf(b).length - valuesOf(a).length);
  const others = swept.filter((name) => name !== down && name !== across);
  const groupOf = ({label}) => others.map((name) => `${name} ${chosen[label][name]}`).join(", ");
  const means = measured.map(({compared}) => compared.loss.mean).filter((mean) => mean !== null);
  const lowest = Math.min(...means), highest = Math.max(...means);
  const cell = (group, first, second) => {
    const isHere = ({label}) => chosen[label][down] === first && chosen[label][across] === second;
    const row = measured.find((candidate) => groupOf(candidate) === group && isHere(candidate));
    const mean = row?.compared.loss.mean;
    if (mean === undefined || mean === null) return "–";
    const share = highest > lowest ? (highest - mean) / (highest - lowest) : 1;  // lower losses get more colour
    const look = `background: color-mix(in srgb, var(--c2) ${Math.round(45 * share)}%, transparent)`;
    return make("span", {class: "cell", style: look}, short(mean));
  };
  section("Validation loss by option");
  for (const group of [...new Set(measured.map(groupOf))]) {
    const heads = [`${down} \\ ${across}`, ...valuesOf(across)];
    const body = valuesOf(down).map((first) => [first, ...valuesOf(across).map((second) => cell(group, first, second))]);
    page.append(...(group ? [make("h3", {}, group)] : []), table(heads, body));
  }
}

grids();
if (runs.length) for (const part of [losses, previews, others]) part();
