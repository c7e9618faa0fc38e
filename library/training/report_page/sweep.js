// The adapters of a sweep, the best first.
"use strict";

const {title, verdict, num_pictures: numPictures, confidence, rows, chosen = {}, reports = {}} = data;

const between = ({low, high}) => (low === null ? "" : ` (${short(low)} to ${short(high)})`);

const named = (label) => (reports[label] ? make("a", {href: encodeURIComponent(reports[label])}, label) : label);

function ranked(row, place) {
  const {step, ended, file, compared} = row, label = named(row.label);
  if (!compared) return ["–", label, String(step), "–", "–", "–", file ?? "–", ended];
  const {loss, to_best: gap, is_worse: isWorse, is_copy: isCopy} = compared;
  const isBest = place === 0 || isCopy;
  const chance = isBest ? "–" : isWorse ? "significantly worse" : "not significant";
  const above = isBest ? "–" : short(gap.mean) + between(gap);
  return [String(place + 1), label, String(step), short(loss.mean) + between(loss), above, chance, file ?? "–", ended];
}

document.title = title;
page.replaceChildren(make("h1", {}, title), make("p", {}, `${verdict}.`));
const heads = ["", "adapter", "steps", "validation loss", "difference from best", "", "file", ""];
page.append(table(heads, rows.map(ranked)));
if (numPictures) {
  const share = `${Math.round(confidence * 100)} %`;
  const how =
    `Measured on ${numPictures} pictures that no adapter was trained on, all with the same noise. Intervals are at ${share}; ` +
    "those of the differences, which are taken picture by picture, hold for all adapters together.";
  page.append(make("p", {}, how));
}

const swept = [...new Set(Object.values(chosen).flatMap((values) => Object.keys(values)))];
const valuesOf = (name) => [...new Set(Object.values(chosen).map((values) => values[name]))];

/** The losses of the adapters over two swept options, a table for each combination of the others. */
function grids() {
  const measured = rows.filter(({label, compared}) => compared && chosen[label]);
  if (swept.length < 2 || measured.length < 2) return;
  const [down, across] = [...swept].sort((a, b) => valuesOf(b).length - valuesOf(a).length);
  const others = swept.filter((name) => name !== down && name !== across);
  const groupOf = ({label}) => others.map((name) => `${name} ${chosen[label][name]}`).join(", ");
  const means = measured.map(({compared}) => compared.loss.mean).filter((mean) => mean !== null);
  const least = Math.min(...means), most = Math.max(...means);
  const cell = (group, first, second) => {
    const row = measured.find((one) => groupOf(one) === group && chosen[one.label][down] === first && chosen[one.label][across] === second);
    const mean = row?.compared.loss.mean;
    if (mean === undefined || mean === null) return "–";
    const share = most > least ? (most - mean) / (most - least) : 1;  // the better, the more colour
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
