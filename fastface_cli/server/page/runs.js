// Runs: submitted, followed through their events, and shown in groups; a group has one run for each method.

import { blob, call, events, json } from "/static/api.js";
import { $, make } from "/static/dom.js";
import { openViewer } from "/static/viewer.js";

const groups = new Map(); // name -> {element, runs}
const shown = []; // {run, image, url}, in the order of the page

// Event streams at a time. Browsers open six connections to a server, and cancelling and images need some of them.
// The server takes a client's runs in their order, so that the first two are the one that runs and the next one.
const STREAMS = 2;
let streams = 0;
const waiting = []; // resolve functions of runs that wait for a stream

async function withStream(work) {
  if (streams >= STREAMS) await new Promise((resolve) => waiting.push(resolve));
  else streams++;
  try {
    await work();
  } finally {
    const next = waiting.shift();
    if (next) next(); // it takes over this stream
    else streams--;
  }
}

export const ENDED = ["finished", "failed", "cancelled"];

export async function submit(request, files, pose, group, label) {
  const form = new FormData();
  form.append("request", JSON.stringify({ ...request, previews: true }));
  for (const file of files) form.append("photos", file);
  if (pose) form.append("pose", pose);
  const key = crypto.randomUUID?.() ?? String(Math.random());
  const run = await json("/api/runs", { method: "POST", body: form, headers: { "Idempotency-Key": key } });
  remember(run.id, group, label);
  follow(run, group, label);
  return run;
}

// After a reload: what the server still has, the oldest first.
export async function restore() {
  const known = JSON.parse(sessionStorage.getItem("groups") ?? "{}");
  const { runs } = await json("/api/runs");
  for (const run of runs.reverse()) follow(run, known[run.id]?.group ?? run.id, known[run.id]?.label ?? "");
}

function remember(id, group, label) {
  const known = JSON.parse(sessionStorage.getItem("groups") ?? "{}");
  sessionStorage.setItem("groups", JSON.stringify({ ...known, [id]: { group, label } }));
}

function groupOf(name) {
  if (!groups.has(name)) {
    const tiles = make("div", { class: "tiles" }), notes = make("div", {});
    const title = make("h2", {}), state = make("p", {}), actions = make("div", { class: "buttons small" });
    const head = make("div", { class: "run-head" }, make("div", {}, title, state), actions);
    const bar = make("progress", { max: 1, value: 0, "aria-label": "Progress" });
    const element = make("article", { class: "run" }, head, bar, tiles, notes);
    $("runs").prepend(element);
    groups.set(name, { name, element, tiles, notes, title, state, actions, bar, runs: [] });
  }
  $("empty").hidden = true;
  return groups.get(name);
}

async function follow(record, name, label) {
  const group = groupOf(name);
  const run = { record, label, group, tiles: [], done: 0, total: 0, text: "" };
  group.runs.push(run);
  group.element.classList.toggle("group", group.runs.length > 1);
  const { request } = record;
  group.title.textContent = request.prompts.join(" / ");
  const count = request.prompts.length * request.count * Math.max(1, request.adapter_scales.length);
  for (let index = 0; index < count; index++) run.tiles.push(tile(run, index));
  for (const image of record.images) show(run, image);
  update(group);
  try {
    await withStream(async () => {
      for await (const event of events(record.id)) handle(run, event);
    });
  } catch (error) {
    end(run, "failed", error.message);
  }
}

function handle(run, { name, data }) {
  if (name === "queued") run.text = data.position ? `waiting, ${data.position} ahead` : "waiting";
  else if (name === "started") {
    run.record.state = "running";
    run.text = "preparing";
  } else if (name === "download") run.text = `downloading ${data.file}, ${(data.done / 1e6).toFixed(0)} of ${(data.total / 1e6).toFixed(0)} MB`;
  else if (name === "models") run.text = "generating";
  else if (name === "step") step(run, data);
  else if (name === "image") show(run, data);
  else if (name === "notice") notice(run, data.message);
  else if (name === "finished") end(run, name, "");
  else if (name === "cancelled") end(run, name, "cancelled");
  else if (name === "failed") end(run, name, data.error.hint ? `${data.error.message} (${data.error.hint})` : data.error.message);
  update(run.group);
}

function step(run, data) {
  run.done = data.done;
  run.total = data.total;
  run.text = `step ${data.step} of ${data.steps}`;
  const first = run.tiles.findIndex((each) => !each.image);
  data.previews.forEach((url, offset) => {
    const target = run.tiles[Math.min(run.tiles.length - 1, first + offset)];
    if (target && !target.image) picture(target, url, "preview", "Preview");
  });
}

function notice(run, message) {
  const texts = [...run.group.notes.children].map((each) => each.textContent);
  if (!texts.includes(message)) run.group.notes.append(make("p", { class: "note", textContent: message }));
}

function tile(run, index) {
  const frame = make("button", { type: "button", class: "frame", disabled: true, "aria-label": "Image in preparation" });
  const caption = make("figcaption", {}, make("strong", { textContent: run.label }), make("span", {}));
  const element = make("figure", { class: "tile" }, frame, caption);
  frame.style.aspectRatio = `${run.record.width} / ${run.record.height}`;
  run.group.tiles.append(element);
  return { element, frame, caption, index, image: null };
}

function picture(target, url, kind, alt) {
  const old = target.frame.querySelector("img");
  if (old) {
    old.src = url;
    old.className = kind;
    old.alt = alt;
  } else target.frame.append(make("img", { src: url, class: kind, alt }));
}

async function show(run, image) {
  const target = run.tiles[image.index];
  if (!target || target.image) return;
  target.image = image;
  const url = URL.createObjectURL(await blob(image.url));
  target.frame.style.aspectRatio = `${image.width} / ${image.height}`;
  picture(target, url, "", image.prompt);
  const entry = { run: run.record, image, url, label: run.label };
  target.frame.disabled = false;
  target.frame.setAttribute("aria-label", `Open the image: ${run.label || image.prompt}, seed ${image.seed}`);
  target.frame.onclick = () => openViewer(shown, shown.indexOf(entry));
  target.caption.querySelector("span").textContent = `seed ${image.seed}`;
  shown.push(entry);
}

function end(run, state, text) {
  run.record.state = state;
  run.text = text;
  run.done = run.total = 1;
  for (const each of run.tiles) if (!each.image && state !== "finished") each.element.remove();
  if (text) notice(run, run.label ? `${run.label}: ${text}` : text);
  document.dispatchEvent(new Event("run-ended"));
}

function update(group) {
  const open = group.runs.filter((run) => !ENDED.includes(run.record.state));
  const share = group.runs.reduce((sum, run) => sum + (ENDED.includes(run.record.state) ? 1 : run.done / (run.total || 1)), 0);
  group.bar.value = share / group.runs.length;
  group.bar.hidden = open.length === 0;
  const names = [...new Set(group.runs.map((run) => run.record.recipe))].join(", ");
  group.state.textContent = open.length ? open[0].text || "waiting" : names;
  const label = open.length ? "Cancel" : "Remove";
  if (group.actions.firstChild?.textContent === label) return;
  group.actions.replaceChildren(make("button", {
    type: "button", class: "button", textContent: label,
    onclick: open.length ? () => cancel(group) : () => remove(group),
  }));
}

async function cancel(group) {
  const open = group.runs.filter((run) => !ENDED.includes(run.record.state));
  await Promise.allSettled(open.map((run) => call(`/api/runs/${run.record.id}`, { method: "DELETE" })));
}

async function remove(group) {
  for (const run of group.runs) {
    for (let index = shown.length - 1; index >= 0; index--) {
      if (shown[index].run.id !== run.record.id) continue;
      URL.revokeObjectURL(shown[index].url);
      shown.splice(index, 1);
    }
  }
  await cancelled(group);
  group.element.remove();
  groups.delete(group.name);
  $("empty").hidden = groups.size > 0;
}

const cancelled = (group) =>
  Promise.allSettled(group.runs.map((run) => call(`/api/runs/${run.record.id}`, { method: "DELETE" })));
