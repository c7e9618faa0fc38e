// The adapters of a sweep, the best first.
"use strict";

const {title, verdict, num_pictures: numPictures, confidence, rows} = readData();

const between = ({low, high}) => (low === null ? "" : ` (${short(low)} to ${short(high)})`);

function ranked(row, place) {
  const {label, step, ended, file, compared} = row;
  if (!compared) return ["–", label, String(step), "–", "–", "–", file ?? "–", ended];
  const {loss, to_best: gap, is_worse: isWorse, is_copy: isCopy} = compared;
  const isBest = place === 0 || isCopy;
  const chance = isBest ? "–" : isWorse ? "more than chance" : "may be chance";
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
