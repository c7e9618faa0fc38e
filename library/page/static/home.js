// The first view: new photos, trainings in preparation, and the queue.

import {browse} from "./browse.js";
import {button, make, nameOf, note, post, t, upload} from "./dom.js";
import {runRow} from "./runs.js";

const IMAGE = /\.(jpe?g|png|webp|bmp|heic|heif|avif|jxl)$/i, CAPTION = /\.(txt|caption)$/i;

/** Return the files below the entries of a drop. Each has a name of its own: those of folders below begin with theirs. */
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files];
  const files = [], isOne = entries.length === 1;
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      const parts = entry.fullPath.split("/").filter(Boolean);
      return files.push(new File([file], parts.slice(isOne && parts.length > 1 ? 1 : 0).join("_")));
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return null;
      for (const one of some) await walk(one);
    }
  };
  for (const entry of entries) await walk(entry);
  return files;
}

/** Return a function that gives files names that every system takes; files of one stem keep one. */
function cleaner() {
  const stems = new Map();
  return (name) => {
    const at = name.lastIndexOf("."), stem = name.slice(0, at);
    if (!stems.has(stem)) {
      let clean = stem.replace(/\p{Z}/gu, " ").replace(/[\\/:*?"<>|\p{C}]/gu, "_");
      if (new TextEncoder().encode(clean).length > 200) clean = [...clean].slice(0, 50).join("");
      while ([...stems.values()].includes(clean)) clean += "_";
      stems.set(stem, clean);
    }
    return stems.get(stem) + name.slice(at).toLowerCase();
  };
}

/** Copy photos and captions to the server, and go to their view. */
async function take(files, name, status) {
  const taken = files.filter(({name}) => !name.startsWith(".") && (IMAGE.test(name) || CAPTION.test(name)));
  if (!taken.some((file) => IMAGE.test(file.name))) return note(t("home.nothing"));
  const others = files.filter((file) => !taken.includes(file) && !file.name.startsWith(".")).map((file) => file.name);
  if (others.length) note(t("home.others", {names: others.slice(0, 5).join(", ") + (others.length > 5 ? " …" : ""), count: others.length}));
  const {id} = await post("/api/drafts", {is_upload: true, name}), clean = cleaner();
  for (const [done, file] of taken.entries()) {
    status.textContent = t("home.uploading", {done, total: taken.length});
    try {
      await upload(`/api/upload/${id}/${encodeURIComponent(clean(file.name))}`, file);
    } catch (error) {
      note(t("home.upload_failed", {name: file.name, reason: error.message}));
    }
  }
  await post(`/api/drafts/${id}/tasks/photos`);
  location.hash = `#/photos/${id}`;
  return null;
}

export async function showHome(box) {
  const status = make("p", {role: "status"});
  const input = make("input", {type: "file", multiple: true, hidden: true, id: "files", onchange: () => start([...input.files], "")});
  const start = (files, name) => take(files, name, status).catch((error) => note(error.message)).finally(() => { status.textContent = ""; });
  const drop = make("div", {
    class: "drop",
    ondragover: () => drop.classList.add("over"),
    ondragleave: () => drop.classList.remove("over"),
    ondrop: async (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      const folder = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).find((entry) => entry?.isDirectory);
      await start(await filesOf(event.dataTransfer), folder?.name ?? "");
    },
  }, make("p", {}, t("home.drop")), make("div", {class: "row"},
    button(t("home.choose"), () => input.click(), {class: "main"}),
    button(t("home.folder"), async () => {
      const folder = await browse();
      if (folder) location.hash = `#/photos/${(await post("/api/drafts", {folder})).id}`;
    })), input, status);
  const drafts = make("section"), runs = make("section");
  box.append(make("h1", {}, t("home.heading")), make("p", {class: "dim"}, t("home.intro")), drop, drafts, runs);
  return (state) => { showDrafts(drafts, state); showRuns(runs, state); };
}

function keep(box, key, build) {
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.replaceChildren(...build().filter(Boolean));
}

function showDrafts(box, {drafts}) {
  keep(box, JSON.stringify(drafts), () => !drafts.length ? [] : [
    make("h2", {}, t("home.drafts")),
    make("ul", {class: "list"}, drafts.map((draft) => make("li", {},
      make("div", {}, make("a", {href: `#/${draft.base ? "plan" : "photos"}/${draft.id}`}, nameOf(draft.root)),
        make("div", {class: "dim"}, draft.base ? nameOf(draft.base) : t("home.no_base"))),
      button(t("home.discard"), () => post(`/api/drafts/${draft.id}/remove`), {"aria-label": t("home.discard_of", {name: nameOf(draft.root)})}),
    ))),
  ]);
}

function showRuns(box, {runs, is_training: isTraining, gpu_programs: programs}) {
  keep(box, JSON.stringify([runs, isTraining, programs]), () => [
    make("h2", {}, t("home.trainings")),
    programs.length ? make("p", {class: "bad"}, t("home.gpu_busy", {programs: programs.join(", ")})) : null,
    runs.length ? make("ul", {class: "list"}, runs.map((run) => runRow(run))) : make("p", {class: "dim"}, t("home.no_trainings")),
    make("p", {}, make("a", {href: "#/history"}, t("history.heading"))),
    !isTraining && runs.some((run) => run.state === "waiting")
      ? make("p", {}, t("home.idle"), " ", button(t("home.run_queue"), () => post("/api/queue/run"))) : null,
  ]);
}
