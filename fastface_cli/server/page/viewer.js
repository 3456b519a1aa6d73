// One image in full size, its facts, and a slider that compares it with another.

import { blob } from "/static/api.js";
import { $, download, make } from "/static/dom.js";

let entries = [], current = 0, reuse = () => {};

export function startViewer(onReuse) {
  reuse = onReuse;
  const dialog = $("viewer");
  $("viewer-close").addEventListener("click", () => dialog.close());
  $("viewer-previous").addEventListener("click", () => move(-1));
  $("viewer-next").addEventListener("click", () => move(1));
  $("viewer-compare").addEventListener("change", draw);
  $("viewer-copy").addEventListener("click", () => navigator.clipboard?.writeText(entries[current].image.prompt));
  $("viewer-reuse").addEventListener("click", () => {
    dialog.close();
    reuse(entries[current]);
  });
  $("viewer-save").addEventListener("click", async () => {
    const { image } = entries[current];
    download(await blob(image.url), `${image.recipe}-${image.seed}.png`);
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("select, input")) return;
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}

export function openViewer(list, index) {
  entries = list;
  current = index;
  fill();
  $("viewer").showModal();
}

function move(by) {
  current = (current + by + entries.length) % entries.length;
  fill();
}

function fill() {
  const { image, label } = entries[current];
  $("viewer-title").textContent = image.prompt;
  const facts = {
    Method: label, Recipe: image.recipe, Seed: image.seed, Strength: image.adapter_scale,
    Size: `${image.width} × ${image.height}`, Time: `${image.seconds} s`, Negative: image.negative_prompt,
  };
  $("viewer-facts").replaceChildren(...Object.entries(facts)
    .filter(([, value]) => value !== null && value !== "")
    .flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: String(value) })]));
  const select = $("viewer-compare");
  select.replaceChildren(make("option", { value: "", textContent: "nothing" }), ...entries
    .map((entry, index) => [entry, index])
    .filter(([, index]) => index !== current)
    .map(([entry, index]) => make("option", {
      value: String(index), textContent: `${entry.label || entry.image.recipe}, seed ${entry.image.seed}`,
    })));
  draw();
}

function draw() {
  const { image, url } = entries[current];
  const other = entries[Number($("viewer-compare").value || -1)];
  const picture = make("img", { src: url, alt: image.prompt, width: image.width, height: image.height });
  if (!other) {
    $("viewer-stage").replaceChildren(picture);
    return;
  }
  const over = make("img", { class: "over", src: other.url, alt: other.image.prompt });
  const bar = make("div", { class: "bar" });
  const slider = make("input", { type: "range", min: 0, max: 100, step: 0.5, value: 50, "aria-label": "Compare: share of the first image" });
  const cut = () => {
    over.style.clipPath = `inset(0 0 0 ${slider.value}%)`;
    bar.style.left = `${slider.value}%`;
  };
  slider.addEventListener("input", cut);
  cut();
  $("viewer-stage").replaceChildren(make("div", { class: "compare" }, picture, over, bar, slider));
}
