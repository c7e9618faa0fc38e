// Shows two images to vote on. A form sends the vote, because the page's policy allows no requests by scripts.
"use strict";

const {pair, left, right, caption, token, number, count} = readData();
const KEYS = {ArrowLeft: "left", ArrowDown: "skip", ArrowRight: "right"};

const hidden = (name, value) => make("input", {type: "hidden", name, value});
const button = (value, ...content) => make("button", {name: "choice", value}, ...content);
const image = (value, src) => button(value, make("img", {src, alt: `the ${value} image`}));

function send(event) {
  const chosen = document.querySelector(`button[value="${KEYS[event.key]}"]`);
  if (!chosen || event.repeat) return;  // a key that is held must not vote on the next pair
  event.preventDefault();
  chosen.click();
}

if (pair === null) {
  page.replaceChildren(make("h1", {}, "All pairs are voted"), make("p", {}, "The command has ended; close this page."));
} else {
  page.replaceChildren(
    make("h1", {}, caption),
    make("p", {class: "dim"}, `Pair ${number} of ${count}. Click on the better image, or use the arrow keys: left, right, down to skip.`),
    make("form", {method: "post"}, hidden("token", token), hidden("pair", pair),
      make("div", {class: "votes"}, image("left", left), image("right", right)), button("skip", "skip this pair")),
  );
  addEventListener("keydown", send);
}
