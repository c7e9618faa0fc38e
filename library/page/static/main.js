// Shows the view that the address names, and passes the server's state on to it.

import {make, note, t} from "./dom.js";
import {showHistory} from "./history.js";
import {showHome} from "./home.js";
import {showBase, showPhotos} from "./photos.js";
import {showPlan} from "./plan.js";
import {showRun} from "./runs.js";

const views = {"": showHome, photos: showPhotos, base: showBase, plan: showPlan, run: showRun, history: showHistory};
const content = document.getElementById("content");
let state = null, update = null, source = null;

document.querySelector(".skip").textContent = t("skip");
document.getElementById("home").textContent = t("title");

/** Build the view of the address. A view returns a function that is called with every new state. */
async function show() {
  const [, name = "", id = ""] = location.hash.split("/");
  const view = views[name] ?? showHome;
  showSteps(name, id);
  const box = make("div", {class: "view"});
  update = null;
  try {
    const next = await view(box, id, state);
    content.replaceChildren(box);
    update = next;
    update?.(state);
  } catch (error) {
    note(error.message);
    if (name) location.hash = "#/";
  }
  const heading = content.querySelector("h1");
  document.title = heading && name ? `${heading.textContent} · ${t("title")}` : t("title");
  if (heading && name) { heading.tabIndex = -1; heading.focus(); }
}

function showSteps(name, id) {
  const steps = name in {photos: 1, base: 1, plan: 1} ? ["photos", "base", "plan"] : [];
  document.getElementById("steps").replaceChildren(
    ...steps.map((step) => make("a", {href: `#/${step}/${id}`, "aria-current": step === name ? "step" : null}, t(`steps.${step}`))),
  );
}

/** Follow the state; a hidden tab does not, since browsers keep few connections to a server. */
function follow() {
  if (document.hidden) { source?.close(); source = null; return; }
  if (source) return;
  source = new EventSource("/api/events");
  source.onmessage = ({data}) => {
    const isFirst = state === null;
    state = JSON.parse(data);
    document.body.classList.remove("cut");
    showNotices();
    if (isFirst) show(); else update?.(state);
  };
  source.onerror = () => {
    document.body.classList.add("cut");
    showNotices();
    if (source?.readyState === EventSource.CLOSED) { source = null; setTimeout(follow, 2000); }
  };
}

const notice = make("div", {id: "notice", role: "status"});
content.before(notice);
function showNotices() {
  const cut = document.body.classList.contains("cut");
  const text = cut ? t("connection") : state?.is_updated ? t("updated") : "";
  if (notice.textContent !== text) notice.textContent = text;
}

addEventListener("hashchange", () => { if (state) show(); });
document.addEventListener("visibilitychange", follow);
// A file that is dropped beside the box would replace the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
follow();
