// The photos with their captions, and the base model.

import {browse} from "./browse.js";
import {button, field, get, make, nameOf, note, post, problem, progress, refresh, t} from "./dom.js";

/** Return a function that loads a draft again when it has changed, and passes it on with the newest state. */
export async function follow(id, show) {
  let data = await get(`/api/drafts/${id}`), revision, loading = false, newest;
  const revisionOf = (state) => state.drafts.find((draft) => draft.id === id)?.revision ?? null;
  return async (state) => {
    newest = state;
    if (loading) return;
    loading = true;
    try {
      while (revision !== revisionOf(newest)) {
        const now = revisionOf(newest);
        data = await get(`/api/drafts/${id}`);
        revision = now;
      }
    } catch (error) { note(error.message); } finally { loading = false; }
    await show(data, newest);
  };
}

/** Return a caption as it is trained: the trigger comes first unless it is in the caption. */
function asTrained(caption, trigger) {
  const [word] = trigger.split(",").map((part) => part.trim());
  if (!caption) return trigger;
  const hasWord = new RegExp(`(^|[^\\p{L}\\p{N}_])${word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}($|[^\\p{L}\\p{N}_])`, "iu").test(caption);
  return hasWord ? caption : `${word}, ${caption}`;
}

export async function showPhotos(box, id) {
  const path = `/api/drafts/${id}`, cards = new Map();
  const status = make("div"), grid = make("ul", {class: "grid"}), count = make("p", {role: "status"}), leftOut = make("div");
  const trigger = make("input", {type: "text", maxlength: 200, onchange: () => save({trigger: trigger.value.trim()})});
  const find = make("input", {type: "text"}), replacement = make("input", {type: "text"});
  const save = (values) => post(path, values).catch((error) => note(error.message));
  const replaceAll = async () => note(t("photos.replaced", await post(`${path}/replace`, {find: find.value, replace: replacement.value})));
  const next = make("a", {class: "button main", href: `#/base/${id}`}, t("photos.next"));
  box.append(
    make("h1", {}, t("photos.heading")), status,
    make("div", {class: "tools"},
      field(t("photos.trigger"), trigger, t("photos.trigger_help")),
      make("div", {class: "pair"}, field(t("photos.find"), find), field(t("photos.replace"), replacement), button(t("photos.replace_button"), replaceAll)),
      make("div", {}, button(t("photos.write"), () => post(`${path}/tasks/captions`)), make("small", {}, t("photos.write_help")))),
    make("div", {class: "row"}, count, button(t("photos.again"), () => post(`${path}/tasks/photos`)), next), leftOut, grid);

  function card(photo) {
    const change = (values) => post(`${path}/photos`, {names: [photo.name], ...values}).catch((error) => note(error.message));
    const image = make("img", {src: `${path}/thumbnails/${photo.name.split("/").map(encodeURIComponent).join("/")}`, alt: "", loading: "lazy", decoding: "async"});
    const mark = make("span", {class: "mark"});
    const toggle = make("button", {type: "button", class: "photo", onclick: () => change({is_out: toggle.ariaPressed === "true"})}, image, mark);
    const caption = make("textarea", {rows: 2, "aria-label": t("photos.caption", {name: photo.name}), onchange: () => change({caption: caption.value})});
    const trained = make("small", {class: "dim"});
    const problems = make("small", {class: "bad"});
    const item = make("li", {}, toggle, make("small", {class: "name"}, photo.name), problems, caption, trained);
    return {item, set(now, word) {
      toggle.setAttribute("aria-pressed", String(!now.is_out));
      mark.textContent = t(now.is_out ? "photos.out" : "photos.in");
      toggle.setAttribute("aria-label", `${photo.name}: ${mark.textContent}`);
      item.classList.toggle("out", now.is_out);
      refresh(caption, now.caption);
      trained.textContent = t("photos.as_trained", {text: asTrained(now.caption, word)});
      problems.textContent = now.problems.join("; ");
    }};
  }

  return follow(id, (data, state) => {
    const task = state.tasks[`${id}/photos`], captions = state.tasks[`${id}/captions`];
    status.replaceChildren(...[progress(task, "photos.reading", "photos.reading_first"), problem(task), progress(captions, "photos.writing"), problem(captions)].filter(Boolean));
    const photos = data.photos ?? [], word = data.draft.trigger || data.suggested_trigger;
    refresh(trigger, word);
    const names = new Set(photos.map((photo) => photo.name));
    for (const [name, {item}] of cards) if (!names.has(name)) { item.remove(); cards.delete(name); }
    const fresh = photos.filter((photo) => !cards.has(photo.name));
    for (const photo of fresh) cards.set(photo.name, card(photo));
    grid.append(...fresh.map((photo) => cards.get(photo.name).item));
    for (const photo of photos) cards.get(photo.name).set(photo, word);
    const used = photos.filter((photo) => !photo.is_out).length;
    count.textContent = photos.length ? t("photos.count", {used, all: photos.length}) : "";
    next.hidden = !used;
    const rows = data.left_out.map(([name, reason]) => make("li", {}, `${name}: ${reason}`));
    leftOut.replaceChildren(...(rows.length ? [make("details", {class: "bad"}, make("summary", {}, t("photos.left_out", {count: rows.length})), make("ul", {}, rows))] : []));
  });
}

function sayFit({bytes, gpu_bytes, ways}) {
  const names = ways?.length ? ways : ["plain"];
  const sizes = {needed: (bytes / 2 ** 30).toFixed(1), all: (gpu_bytes / 2 ** 30).toFixed(1)};
  return t(ways ? "base.fits" : "base.unfit", {...sizes, ways: names.map((name) => t(`base.ways.${name}`)).join(", ")});
}

export async function showBase(box, id) {
  const path = `/api/drafts/${id}`, list = make("ul", {class: "list bases"}), status = make("div");
  const typed = make("input", {type: "text", spellcheck: "false"}), models = make("input", {type: "text", spellcheck: "false", onchange: () => choose({models: models.value.trim()})});
  const choose = (values) => post(path, values).catch((error) => note(error.message));
  const next = make("a", {class: "button main", href: `#/plan/${id}`}, t("base.next"));
  let found = await get("/api/bases"), wasRunning = false;
  const offered = make("ul", {class: "list"}), hub = make("details", {}, make("summary", {}, t("base.published")), make("p", {class: "dim"}, t("base.cut")), offered);
  hub.addEventListener("toggle", () => { if (hub.open) post("/api/logins").catch((error) => note(error.message)); });
  const download = (repository, file) => post(`${path}/download`, {repository, file});
  const isHubName = (name) => /^[\w.-]+\/[\w.-]+$/.test(name) && !/\.(safetensors|ckpt)$/.test(name);
  const take = (name) => (isHubName(name) ? download(name, "").catch((error) => note(error.message)) : choose({base: name}));
  if (found === null) await post("/api/bases");
  box.append(make("h1", {}, t("base.heading")), make("p", {class: "dim"}, t("base.intro")), status, list, hub,
    make("form", {class: "pair", onsubmit: (event) => { event.preventDefault(); if (typed.value.trim()) take(typed.value.trim()); }}, field(t("base.typed"), typed), make("button", {}, t("base.use"))),
    field(t("base.models"), models),
    make("div", {class: "row"}, button(t("base.search"), () => post("/api/bases")),
      button(t("base.search_in"), async () => { const folder = await browse(); if (folder) await post("/api/bases", {folder}); }), next));

  function row(base, chosen) {
    const size = t("base.size", {gb: (base.bytes / 1e9).toFixed(base.bytes < 1e9 ? 2 : 1)});
    const facts = [base.family, size, base.prediction && t(`base.predicts_${base.prediction}`), base.is_distilled && t("base.distilled"), base.fit && sayFit(base.fit)];
    return make("li", {class: base.path === chosen ? "chosen" : null},
      make("div", {}, make("b", {}, base.name), make("div", {class: "dim"}, facts.filter(Boolean).join(" · ")), make("small", {class: "dim"}, base.path)),
      base.path === chosen ? make("span", {class: "mark"}, t("base.chosen")) : button(t("base.use"), () => choose({base: base.path}), {"aria-label": t("base.choose", {name: base.name})}));
  }

  function offer(file, logins) {
    const login = logins?.[file.repository], asks = login === undefined ? null : t(login ? "base.login" : "base.no_login");
    const facts = [file.file, file.gigabytes && t("base.size", {gb: file.gigabytes}), file.licence, asks];
    return make("li", {}, make("div", {}, make("a", {href: `https://huggingface.co/${file.repository}`, target: "_blank", rel: "noopener noreferrer"}, file.repository), make("div", {class: "dim"}, facts.filter(Boolean).join(" · "))),
      button(t("base.download"), () => download(file.repository, file.file), {"aria-label": t("base.download_of", {name: file.file || file.repository})}));
  }

  function showOffers(logins) {
    const key = JSON.stringify([found?.published, logins]);
    if (offered.dataset.key === key) return;
    offered.dataset.key = key;
    offered.replaceChildren(...(found?.published ?? []).map((file) => offer(file, logins)));
  }

  return follow(id, async (data, state) => {
    const task = state.tasks.bases, loading = state.tasks[`${id}/download`];
    showOffers(state.tasks.logins?.result?.logins);
    if (wasRunning && task?.state !== "running") found = await get("/api/bases");
    wasRunning = task?.state === "running";
    status.replaceChildren(...[progress(task, "base.searching"), problem(task), progress(loading && {...loading, percent: Math.floor((100 * loading.done) / (loading.total || 1))}, "base.downloading", "base.downloading_first"),
      loading?.state === "running" && button(t("base.cancel"), () => post(`${path}/tasks/cancel`)), problem(loading)].filter(Boolean));
    const bases = found?.bases ?? [], chosen = data.draft.base;
    const key = JSON.stringify([bases, chosen, wasRunning]);
    if (list.dataset.key !== key) {
      list.dataset.key = key;
      list.replaceChildren(...bases.map((base) => row(base, chosen)));
      if (!bases.length && !wasRunning) list.append(make("li", {class: "dim"}, t("base.none")));
    }
    refresh(typed, bases.some((base) => base.path === chosen) ? "" : chosen);
    refresh(models, data.draft.models);
    next.hidden = !chosen;
    next.setAttribute("aria-description", nameOf(chosen));
  });
}
