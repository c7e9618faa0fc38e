// A dialog that chooses a folder of the server's computer.

import {button, field, get, make, note, t} from "./dom.js";

/** Return the path that the user chooses; null after Cancel. */
export function browse() {
  return new Promise((resolve) => {
    const path = make("input", {type: "text", spellcheck: "false"}), list = make("ul", {class: "folders"}), count = make("p", {class: "dim", role: "status"});
    let current = "", above = null, opened = 0;
    const open = async (folder) => {
      const number = ++opened, before = path.value;
      try {
        const found = await get(`/api/folders?path=${encodeURIComponent(folder)}`);
        if (number !== opened) return;  // another folder was asked for meanwhile
        ({path: current, above} = found);
        if (path.value === before) path.value = current;  // else the user types
        count.textContent = t("browse.photos", {count: found.num_photos});
        const separator = current.includes("\\") ? "\\" : "/";
        const join = (name) => (current.endsWith(separator) ? current : current + separator) + name;
        list.replaceChildren(...found.folders.map((name) => make("li", {}, button(name, () => open(join(name)), {class: "folder"}))));
      } catch (error) { note(error.message); }
    };
    const close = (answer) => { dialog.close(); dialog.remove(); resolve(answer); };
    const form = make("form", {onsubmit: (event) => { event.preventDefault(); open(path.value); }},
      field(t("browse.path"), path), make("button", {}, t("browse.go")));
    const dialog = make("dialog", {"aria-labelledby": "browseHeading", oncancel: (event) => { event.preventDefault(); close(null); }},
      make("h2", {id: "browseHeading"}, t("browse.heading")), form,
      button(t("browse.above"), () => (above ? open(above) : null)), list, count,
      make("div", {class: "row"},
        button(t("browse.use"), async () => { if (path.value !== current) await open(path.value); if (path.value === current) close(current); }, {class: "main"}),
        button(t("browse.cancel"), () => close(null))));
    document.body.append(dialog);
    dialog.showModal();
    open("");
  });
}
