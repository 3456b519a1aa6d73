// The page of `fastface serve`: the form, and what it submits.

import { ApiError, json, setToken } from "/static/api.js";
import { $, ask, make, say } from "/static/dom.js";
import { person, startPerson } from "/static/person.js";
import { restore, submit } from "/static/runs.js";
import { startViewer } from "/static/viewer.js";

const METHODS = ["baseline", "dcg", "am1", "am2", "fastface", "fastface-am2"];
const NAMES = { baseline: "Baseline", dcg: "DCG", am1: "AM1", am2: "AM2", fastface: "FastFace", "fastface-am2": "FastFace AM2" };
let families = new Map(), strengthChanged = false;

async function start() {
  let status;
  try {
    status = await json("/api/status");
  } catch (error) {
    if (error.status !== 401) {
      say($("status"), error.message, true);
      return;
    }
    const entered = await ask("This server needs a token", "The token that fastface serve printed", async (value) => {
      setToken(value);
      await json("/api/status");
    });
    if (entered) await start();
    return;
  }
  report(status);
  startPerson(status.limits, () => chosenRecipe().name);
  startViewer(useSettings);
  await startRecipes(status.recipe);
  $("form").addEventListener("submit", generate);
  $("pose").addEventListener("change", showPose);
  $("pose-clear").addEventListener("click", () => {
    $("pose").value = "";
    showPose();
    $("pose").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
      $("form").requestSubmit();
    }
  });
  await restore();
  document.addEventListener("run-ended", async () => report(await json("/api/status")));
}

function showPose() {
  $("pose-clear").hidden = $("pose").files.length === 0;
}

function report(status) {
  const { waiting, running } = status.queue;
  const queue = running ? `running${waiting ? `, ${waiting} waiting` : ""}` : "ready";
  $("status").textContent = `${status.loaded ?? "no model loaded"} on ${status.device}, ${queue}`;
  $("findings").hidden = status.findings.length === 0;
  $("findings").replaceChildren(...status.findings.map((finding) =>
    make("p", {}, `${finding.check}: ${finding.message} `, finding.command ? make("code", { textContent: finding.command }) : null)));
}

async function startRecipes(initial) {
  const { recipes } = await json("/api/recipes");
  window.recipes = recipes;
  families = new Map();
  for (const recipe of recipes) {
    if (!recipe.method) continue;
    if (!families.has(recipe.model)) families.set(recipe.model, []);
    families.get(recipe.model).push(recipe);
  }
  const first = recipes.find((recipe) => recipe.default) ?? recipes.find((recipe) => recipe.name === initial) ?? recipes[0];
  const order = [...families.keys()].sort((a, b) => (b === first.model) - (a === first.model) || a.localeCompare(b));
  $("family").replaceChildren(...order.map((name) => make("option", { value: name, textContent: name })));
  $("family").addEventListener("change", () => drawMethods(null));
  $("methods").addEventListener("change", describe);
  $("compare").addEventListener("change", describe);
  $("strength").addEventListener("input", () => {
    strengthChanged = true;
    describe();
  });
  $("licenses-open").addEventListener("click", showLicenses);
  $("licenses-close").addEventListener("click", () => $("licenses").close());
  drawMethods(first.method);
}

function drawMethods(method) {
  const members = families.get($("family").value);
  const methods = METHODS.filter((name) => members.some((recipe) => recipe.method === name));
  const chosen = methods.includes(method) ? method : methods.includes("fastface") ? "fastface" : methods[0];
  $("methods").replaceChildren(...methods.map((name) => make("label", {},
    make("input", { type: "radio", name: "method", value: name, checked: name === chosen }),
    make("span", { textContent: NAMES[name] }))));
  $("compare").parentElement.hidden = methods.length < 2;
  strengthChanged = false;
  describe();
}

function chosenRecipe() {
  const method = document.querySelector("input[name=method]:checked")?.value;
  return families.get($("family").value).find((recipe) => recipe.method === method);
}

function describe() {
  const recipe = chosenRecipe();
  for (const input of document.querySelectorAll("input[name=method]")) input.disabled = $("compare").checked;
  const size = `${recipe.width} × ${recipe.height}, ${recipe.steps} steps`;
  const missing = recipe.missing_bytes ? `, downloads ${(recipe.missing_bytes / 1e9).toFixed(1)} GB first` : "";
  const use = recipe.commercial === "yes" ? "" : recipe.commercial === "no" ? "; no commercial use" : "; commercial use unclear";
  const summary = recipe.summary.charAt(0).toUpperCase() + recipe.summary.slice(1);
  $("family-summary").textContent = `${summary}. ${size}${missing}${use}.`;
  $("pose-row").hidden = recipe.adapter !== "instantid"; // the other adapters do not read key points
  const scale = Array.isArray(recipe.adapter_scale) ? recipe.adapter_scale[0] : recipe.adapter_scale;
  if (!strengthChanged) $("strength").value = scale;
  $("strength-value").textContent = strengthChanged ? Number($("strength").value).toFixed(2) : `${scale} (recipe)`;
}

async function showLicenses() {
  const { parts } = await json(`/api/recipes/${chosenRecipe().name}/licenses`);
  $("licenses-rows").replaceChildren(...parts.map((part) => make("tr", {},
    make("td", { textContent: part.name }),
    make("td", {}, part.page.startsWith("http")
      ? make("a", { href: part.page, textContent: part.license, rel: "noreferrer", target: "_blank" }) : part.license),
    make("td", { textContent: part.note ? `${part.commercial}: ${part.note}` : part.commercial }))));
  $("licenses").showModal();
}

async function generate(event) {
  event.preventDefault();
  const message = $("form-message");
  const { photos, box, identity } = person();
  const prompt = $("prompt").value.trim();
  if (!photos.length && !identity) {
    say(message, "Add a photo or choose a saved identity first.", true);
    $("drop").scrollIntoView({ block: "nearest" });
    return;
  }
  if (!prompt) {
    say(message, "Describe the image first.", true);
    $("prompt").focus();
    return;
  }
  say(message, "");
  const comparing = $("compare").checked && !$("compare").parentElement.hidden;
  const recipes = comparing
    ? METHODS.map((name) => families.get($("family").value).find((recipe) => recipe.method === name)).filter(Boolean)
    : [chosenRecipe()];
  const seed = $("seed").value.trim() ? Number($("seed").value) : Math.floor(Math.random() * 2 ** 32);
  const request = {
    prompts: [prompt], negative_prompt: $("negative").value.trim() || null, seed, identity, face_box: box,
    count: Number($("count").value) || 1, best_of: Number($("best-of").value) || 1,
    adapter_scales: strengthChanged ? [Number($("strength").value)] : [],
    aspect: $("aspect").value ? $("aspect").value.split(":").map(Number) : null,
  };
  const pose = $("pose-row").hidden ? undefined : $("pose").files[0];
  const group = `${Date.now()}-${Math.random()}`;
  $("generate").disabled = true;
  try {
    for (const recipe of recipes) {
      const run = { ...request, recipe: recipe.name };
      await submit(run, photos, pose, group, comparing ? NAMES[recipe.method] : "");
    }
    if ($("lock").checked) $("seed").value = seed;
    if (matchMedia("(max-width: 900px)").matches) $("results").scrollIntoView();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    say(message, error.message, true);
  } finally {
    $("generate").disabled = false;
  }
}

function useSettings({ run, image }) {
  const recipe = window.recipes.find((each) => each.name === image.recipe);
  if (recipe?.method) {
    $("family").value = recipe.model;
    drawMethods(recipe.method);
  }
  $("prompt").value = image.prompt;
  $("negative").value = run.request.negative_prompt ?? "";
  $("seed").value = image.seed;
  $("count").value = 1;
  $("best-of").value = run.request.best_of;
  $("aspect").value = run.request.aspect?.join(":") ?? "";
  $("compare").checked = false;
  strengthChanged = !Array.isArray(image.adapter_scale);
  if (strengthChanged) $("strength").value = image.adapter_scale;
  describe();
  $("prompt").focus();
}

start();
