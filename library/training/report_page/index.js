// The list of all runs of a folder, latest first.
"use strict";

const {title, runs} = readData();

const link = ({name, file}) => make("a", {href: file.split("/").map(encodeURIComponent).join("/")}, name);
const preview = ({picture, prompt}) => (picture ? make("img", {class: "thumbnail", src: picture, alt: prompt}) : "–");
const best = ({best}) => (best ? `${short(best.loss)} at step ${best.step}` : "–");
const steps = ({step, max_train_steps: all}) => (all === null ? "–" : `${step} / ${all}`);

document.title = title;
page.replaceChildren(make("h1", {}, title));
const heads = ["run", "state", "steps", "loss, smoothed", "lowest validation loss", "last preview", "updated"];
const row = (run) => [link(run), run.state, steps(run), short(run.loss), best(run), preview(run), moment(run.updated)];
page.append(table(heads, runs.map(row)));
