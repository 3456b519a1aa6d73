"use strict";
// Breakdowns, gallery and viewer of the report page. Text comes from data sets, so it is never parsed as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLORS = 10; // number of --series-N colors of the page
  const CHUNK = 40; // gallery rows drawn at a time

  // ---------------------------------------------------------------------------------------- helpers

  const at = (id) => document.getElementById(id);

  /** An element with properties ("data-x", "aria-x" and "style" as attributes) and children. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.includes("-") || name === "style" || name === "for" || name === "role") element.setAttribute(name, value);
      else element[name] = value;
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const option = (value, text) => make("option", { value, textContent: text });
  const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
  const dot = (recipe) => make("i", { className: "dot", style: `--of:var(--series-${recipe % COLORS})` });

  const scaled = (column, number) => number * (column.unit === "share" ? 100 : 1);
  const bare = (column, number) => scaled(column, number).toFixed(column.digits);

  function written(column, number) {
    if (number === null || number === undefined) return "–";
    return signs(bare(column, number)) + (column.unit === "share" ? "%" : column.unit ? ` ${column.unit}` : "");
  }

  /** A number of a single image: a verdict is yes or no instead of a percentage. */
  function single(column, number) {
    if (number === null || number === undefined || column.kind === "any") return written(column, number);
    return column.kind === "verdict" ? (number ? "yes" : "no") : number.toFixed(0);
  }

  function signed(column, number) {
    const value = scaled(column, number);
    const text = (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(column.digits);
    return column.unit === "share" ? `${text} points` : text + (column.unit ? ` ${column.unit}` : "");
  }

  const signs = (text) => text.replace("-", "−");
  const between = (column, of) =>
    of.low === null ? "" : `[${signs(bare(column, of.low))}, ${signs(bare(column, of.high))}]`;

  function verdict(column, difference) {
    if (difference.low === null || (difference.low <= 0 && difference.high >= 0)) return "unclear";
    if (column.higher === null) return "differs";
    return difference.low > 0 === column.higher ? "better" : "worse";
  }

  const MARKS = { better: "▲", worse: "▼", differs: "◆", unclear: "" };

  // ------------------------------------------------------------------------------------- breakdowns

  const columnOf = (name) => data.columns.find((column) => column.name === name);
  const references = new Map(data.groups.filter((group) => !group.stress).map((group) => [group.identity, group.reference]));

  function numbersCell(column, mean, difference) {
    if (!mean) return make("td", { className: "none", textContent: "–" });
    const cell = make("td", {}, make("span", { className: "mean", textContent: written(column, mean.mean) }), " ");
    cell.append(make("span", { className: "interval", textContent: between(column, mean) }));
    if (difference) {
      const result = verdict(column, difference);
      const text = make("span", { className: `difference ${result}` }, signed(column, difference.difference));
      if (MARKS[result]) text.append(" ", make("span", { role: "img", "aria-label": result, textContent: MARKS[result] }));
      const interval = make("span", { className: "interval", textContent: between(column, difference) });
      cell.append(make("div", {}, text, " ", interval));
    } else {
      cell.append(make("span", { className: "n", textContent: plural(mean.n, "image", "images") }));
    }
    return cell;
  }

  /**
   * One table: a line a value, a column a recipe; heads sort it.
   * lines: [{head: Node, name, means: {RECIPE: {COLUMN: ...}}, differences}]
   */
  function breakdown(title, what, lines, column, fold) {
    const recipes = data.recipes.filter((recipe) => lines.some((line) => line.means[recipe]?.[column.name]));
    if (!recipes.length) return null;
    const body = make("tbody");
    const heads = make("tr");
    const id = `table-${Math.abs(hash(title))}`;

    function draw(by, descending) {
      const value = (line) => (by === null ? null : line.means[by]?.[column.name]?.mean ?? -Infinity);
      const sorted = [...lines];
      if (by !== null) sorted.sort((a, b) => value(a) - value(b));
      if (descending) sorted.reverse();
      body.replaceChildren(
        ...sorted.map((line) =>
          make(
            "tr",
            {},
            make("th", { scope: "row" }, line.head),
            ...recipes.map((recipe) =>
              numbersCell(column, line.means[recipe]?.[column.name], line.differences?.[recipe]?.[column.name]),
            ),
          ),
        ),
      );
      [...heads.children].forEach((head, index) => {
        const own = index === 0 ? null : recipes[index - 1];
        const sort = own === by && (own !== null || descending) ? (descending ? "descending" : "ascending") : "none";
        head.setAttribute("aria-sort", sort);
      });
    }

    let state = [null, false];
    for (const recipe of [null, ...recipes]) {
      const button = make("button", { type: "button", className: "sort", title: "Sort" });
      if (recipe === null) button.append(what);
      else button.append(dot(data.recipes.indexOf(recipe)), recipe);
      button.addEventListener("click", () => {
        state = [recipe, state[0] === recipe ? !state[1] : recipe !== null && column.higher !== false];
        draw(...state);
      });
      heads.append(make("th", { scope: "col" }, button));
    }
    draw(...state);
    const table = make("table", { className: "numbers breakdown", style: `--count:${recipes.length}` }, make("thead", {}, heads), body);
    const region = { className: `scroll${fold ? " fold" : ""}`, tabIndex: 0, role: "region", "aria-labelledby": id };
    return make("div", { className: "block" }, make("h3", { id, textContent: title }), make("div", region, table));
  }

  const hash = (text) => [...text].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) | 0, 7);

  /** A name that filters the gallery to its images. */
  function toGallery(text, filter, picture) {
    const button = make("button", { type: "button", className: "link", title: "Show in the gallery" });
    if (picture) button.append(thumbnail(picture));
    button.append(text);
    button.addEventListener("click", () => {
      for (const control of controls.values()) control.value = "";
      for (const [name, value] of Object.entries(filter)) controls.get(name).value = value;
      apply();
      at("gallery").scrollIntoView();
      at("gallery-title").focus({ preventScroll: true });
    });
    return button;
  }

  const thumbnail = (address) =>
    make("img", { loading: "lazy", decoding: "async", alt: "", width: 40, height: 40, className: "thumbnail", src: address });

  function drawBreakdowns() {
    const column = columnOf(at("measure").value);
    if (!column) return;
    const tables = [];
    const stresses = Object.entries(data.stress);
    if (stresses.length) {
      const clean = { head: document.createTextNode("clean"), means: data.clean };
      const lines = stresses.map(([name, part]) => ({
        head: toGallery(name, { stress: name }),
        means: part.recipes,
        differences: part.against_clean,
      }));
      tables.push(breakdown("Degraded references and their difference from clean ones", "Reference", [clean, ...lines], column));
    }
    for (const [name, values] of Object.entries(data.attributes)) {
      const lines = Object.entries(values).map(([value, means]) => ({
        head: toGallery(value, { [`attribute ${name}`]: value }),
        means,
      }));
      tables.push(breakdown(`By ${name}`, name, lines, column));
    }
    const lines = Object.entries(data.identities).map(([name, means]) => ({
      head: toGallery(name, { identity: name }, references.get(name)),
      means,
    }));
    tables.push(breakdown(`By identity (${lines.length})`, "Identity", lines, column, lines.length > 16));
    at("tables").replaceChildren(...tables.filter(Boolean));
  }

  // ---------------------------------------------------------------------------------------- filters

  const controls = new Map(); // name -> control; "" is its neutral value
  const visible = new Set(data.recipes.keys());
  let shown = []; // filtered groups, in order
  let drawn = 0; // how many of them are on the page

  function control(name, title, element) {
    const id = `filter-${at("filters").childElementCount}`;
    element.id = id;
    element.addEventListener("input", apply);
    controls.set(name, element);
    at("filters").append(make("p", {}, make("label", { for: id, textContent: title }), element));
    return element;
  }

  function choice(name, title, entries) {
    return control(name, title, make("select", {}, ...entries.map(([value, text]) => option(value, text))));
  }

  const values = (of) => [...new Set(data.groups.map(of))];
  const same = (value) => [value, value];

  function drawFilters() {
    choice("identity", "Identity", [["", "everyone"], ...values((group) => group.identity).sort().map(same)]);
    const prompts = [...new Map(data.groups.map((group) => [group.prompt, group.index[0]]))].sort((a, b) => a[1] - b[1]);
    choice("prompt", "Prompt", [["", "all prompts"], ...prompts.map(([prompt, index]) => [prompt, `${index}: ${prompt}`])]);
    control("words", "Words in the prompt", make("input", { type: "search", autocomplete: "off" }));
    const attributes = [...new Set(data.groups.flatMap((group) => Object.keys(group.attributes)))].sort();
    for (const name of attributes) {
      const choices = values((group) => group.attributes[name]).filter((value) => value !== undefined);
      choice(`attribute ${name}`, name, [["", "any"], ...choices.sort().map(same)]);
    }
    const stresses = values((group) => group.stress).filter(Boolean);
    if (stresses.length) {
      choice("stress", "Reference", [["", "any"], ["clean", "clean"], ...stresses.map(same)]);
    }
    const problems = [["", "all images"], ["failed", "an image failed"], ["missing", "the metric has no value"]];
    choice("problem", "Show", problems);
    choice("measure", "Metric", data.columns.map((column, index) => [index || "", column.heading]));
    choice("order", "Order", [["", "data set order"], ["worst", "worst first"], ["best", "best first"]]);
    const first = data.recipes[0];
    choice("whose", "Sort by", [
      ["", "worst of the row"],
      ...data.recipes.map((recipe, index) => [`of ${index}`, recipe]),
      ...data.recipes.slice(1).map((recipe, index) => [`less ${index + 1}`, `${recipe} minus ${first}`]),
    ]);
    const boxes = data.recipes.map((recipe, index) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("input", () => {
        if (box.checked) visible.add(index);
        else visible.delete(index);
        apply();
      });
      return make("label", {}, box, dot(index), recipe);
    });
    at("filters").append(make("fieldset", {}, make("legend", { textContent: "Recipes" }), ...boxes));
    const reset = make("button", { type: "button", textContent: "Reset" });
    reset.addEventListener("click", () => {
      for (const each of controls.values()) each.value = "";
      data.recipes.forEach((_, index) => visible.add(index));
      for (const box of at("filters").querySelectorAll("input[type=checkbox]")) box.checked = true;
      apply();
    });
    const paper = make("button", { type: "button", textContent: "Print with images" });
    paper.addEventListener("click", printAll);
    at("filters").append(make("div", { className: "row" }, reset, paper));
    at("filters").addEventListener("submit", (event) => event.preventDefault());
  }

  const set = (name) => controls.get(name)?.value ?? "";
  let measured = 0; // index of the metric shown in the gallery
  const score = (group, recipe) => group.pictures[recipe]?.scores[measured] ?? null;
  const seen = (group) => [...visible].filter((recipe) => group.pictures[recipe]);

  function passes(group) {
    const words = set("words").trim().toLowerCase();
    if (set("identity") && group.identity !== set("identity")) return false;
    if (set("prompt") && group.prompt !== set("prompt")) return false;
    if (words && !words.split(/\s+/).every((word) => group.prompt.toLowerCase().includes(word))) return false;
    if (set("stress") && (group.stress ?? "clean") !== set("stress")) return false;
    for (const [name, each] of controls) {
      if (name.startsWith("attribute ") && each.value && group.attributes[name.slice(10)] !== each.value) return false;
    }
    if (set("problem") === "failed") return seen(group).some((recipe) => group.pictures[recipe].file === null);
    if (set("problem") === "missing") return seen(group).some((recipe) => score(group, recipe) === null);
    return seen(group).length > 0;
  }

  /** Sort key of a group: lower is worse, and a group without a score is worst. */
  function rank(group) {
    const sign = data.columns[measured]?.higher === false ? -1 : 1;
    const [kind, which] = set("whose").split(" ");
    const known = (recipe) => (score(group, recipe) === null ? -Infinity : sign * score(group, recipe));
    if (kind === "of") return known(Number(which));
    if (kind === "less") {
      const [own, first] = [known(Number(which)), known(0)];
      return Number.isFinite(own) && Number.isFinite(first) ? own - first : -Infinity;
    }
    return Math.min(...seen(group).map(known));
  }

  function apply() {
    measured = Number(set("measure"));
    shown = data.groups.filter(passes);
    const order = set("order");
    if (order) {
      const ranks = new Map(shown.map((group) => [group, rank(group)]));
      const compare = (a, b) => (ranks.get(a) < ranks.get(b) ? -1 : ranks.get(a) > ranks.get(b) ? 1 : 0);
      shown.sort(order === "worst" ? compare : (a, b) => compare(b, a));
    }
    drawn = 0;
    at("lines").replaceChildren();
    const count = shown.reduce((sum, group) => sum + seen(group).filter((recipe) => group.pictures[recipe].file).length, 0);
    at("shown").textContent = shown.length
      ? `${plural(shown.length, "row", "rows")} with ${plural(count, "image", "images")}, of ${plural(data.groups.length, "row", "rows")}`
      : "No rows match the filters.";
    drawMore();
  }

  // ---------------------------------------------------------------------------------------- gallery

  function drawMore() {
    const next = shown.slice(drawn, drawn + CHUNK);
    at("lines").append(...next.map((group, index) => line(group, drawn + index)));
    drawn += next.length;
    const left = shown.length - drawn;
    at("more").hidden = left === 0;
    at("more").textContent = `Show ${Math.min(CHUNK, left)} more of ${plural(left, "row", "rows")}`;
  }

  function line(group, index) {
    const facts = Object.entries(group.attributes).map(([name, value]) => `${name}: ${value}`);
    facts.push(`prompt ${group.index[0]}`, `seed ${group.seed}`);
    const places = steps(group);
    return make(
      "article",
      { className: "line" },
      make(
        "header",
        {},
        make("h3", { textContent: group.identity }),
        group.stress ? make("span", { className: "stress", textContent: group.stress }) : null,
        make("p", { className: "prompt", textContent: group.prompt }),
        make("p", { className: "interval", textContent: facts.join(" · ") }),
      ),
      make("div", { className: "cells", style: `--count:${places.length}` }, ...places.map((place) => figure(group, index, place))),
    );
  }

  /** The columns of a row from left to right: photos by name, recipes by number. */
  function steps(group) {
    const others = ["degraded", "held_out"].filter((name) => group[name]);
    return ["reference", ...others, ...[...visible].sort((a, b) => a - b)];
  }

  const PHOTOS = { reference: "reference", degraded: "degraded photo", held_out: "held-out photo" };

  function figure(group, index, place) {
    const photo = place in PHOTOS;
    const picture = photo ? { file: group[place] } : group.pictures[place];
    const name = photo ? PHOTOS[place] : data.recipes[place];
    const caption = make("figcaption", {}, photo ? null : dot(place), name);
    if (!photo && data.columns.length) {
      caption.append(make("span", { className: "score", textContent: single(data.columns[measured], score(group, place)) }));
    }
    const button = make("button", { type: "button", "data-line": index, "data-place": place });
    if (picture?.file) {
      button.setAttribute("aria-label", `${name}, ${group.identity}: full size`);
      button.append(make("img", { loading: "lazy", decoding: "async", alt: "", src: picture.file }));
    } else {
      button.append(make("span", { className: "failed", textContent: photo ? "cannot be read" : picture?.error ?? "not generated" }));
    }
    return make("figure", { className: photo ? "photo" : "" }, button, caption);
  }

  // ----------------------------------------------------------------------------------------- viewer

  let open = null; // {line, place}

  const full = (address, name) =>
    make(
      "figure",
      {},
      make("a", { href: address, target: "_blank", rel: "noopener", title: "Open the file" }, make("img", { src: address, alt: name })),
      make("figcaption", { textContent: name }),
    );

  function view(index, place) {
    const group = shown[index];
    open = { line: index, place };
    const photo = place in PHOTOS;
    const picture = photo ? null : group.pictures[place];
    at("viewer-title").textContent = `${group.identity} · ${photo ? PHOTOS[place] : data.recipes[place]}`;
    const pair = [];
    for (const name of photo ? [place] : ["reference", "degraded"]) {
      if (group[name]) pair.push(full(group[name], PHOTOS[name]));
    }
    if (picture?.file) pair.push(full(picture.file, data.recipes[place]));
    else if (!photo) pair.push(make("p", { className: "failed", textContent: picture?.error ?? "not generated" }));
    const words = [make("p", { className: "prompt", textContent: group.prompt })];
    if (picture) words.push(scoresOf(group, picture));
    if (picture?.file && group.reference) words.push(replay(group, picture));
    at("viewer").querySelector(".pair").replaceChildren(...pair);
    at("viewer").querySelector(".words").replaceChildren(...words);
    if (!at("viewer").open) at("viewer").showModal();
  }

  /** The command that generates an image again; typed in the folder of the run. */
  function replay(group, picture) {
    const path = (address) => {
      const name = decodeURIComponent(address.replace(/^\.\//, ""));
      return /^[\w./-]+$/.test(name) ? name : `'${name.replaceAll("'", "'\\''")}'`;
    };
    const command = `fastface generate --from ${path(picture.file)} --face ${path(group.degraded ?? group.reference)}`;
    const button = make("button", { type: "button", textContent: "Copy" });
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(command);
      button.textContent = "Copied";
    });
    return make("p", { className: "replay" }, make("code", { textContent: command }), button);
  }

  function scoresOf(group, picture) {
    const list = make("dl");
    const add = (name, value) => list.append(make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
    data.columns.forEach((column, index) => {
      if (picture.scores[index] !== null) add(column.title, single(column, picture.scores[index]));
    });
    if (picture.seconds !== null && !columnOf("seconds")) add("generation time", `${picture.seconds.toFixed(2)} s`);
    if (picture.samples !== null && !columnOf("unet_samples")) add("UNet samples", picture.samples);
    add("prompt and seed index", group.index.join(", "));
    add("seed", group.seed);
    if (group.stress) add("reference", group.stress);
    for (const [name, value] of Object.entries(group.attributes)) add(name, value);
    return list;
  }

  function step(way) {
    const places = steps(shown[open.line]);
    if (way === "left" || way === "right") {
      const next = places.indexOf(open.place) + (way === "left" ? -1 : 1);
      if (next >= 0 && next < places.length) view(open.line, places[next]);
      return;
    }
    const next = open.line + (way === "up" ? -1 : 1);
    if (next < 0 || next >= shown.length) return;
    while (next >= drawn) drawMore();
    view(next, steps(shown[next]).includes(open.place) ? open.place : "reference");
  }

  at("lines").addEventListener("click", (event) => {
    const button = event.target.closest("button[data-line]");
    if (!button) return;
    const place = button.dataset.place;
    view(Number(button.dataset.line), place in PHOTOS ? place : Number(place));
  });
  at("viewer").addEventListener("click", (event) => {
    if (event.target === at("viewer")) at("viewer").close(); // the backdrop
    const way = event.target.closest("button[data-step]")?.dataset.step;
    if (way) step(way);
  });
  at("viewer").addEventListener("keydown", (event) => {
    const way = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" }[event.key];
    if (!way || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    step(way);
  });
  at("viewer").addEventListener("close", () => {
    at("lines").querySelector(`button[data-line="${open.line}"][data-place="${open.place}"]`)?.focus();
  });
  at("close").addEventListener("click", () => at("viewer").close());

  // ------------------------------------------------------------------------------------------ start

  at("more").addEventListener("click", () => {
    const next = drawn;
    drawMore();
    at("lines").querySelector(`button[data-line="${next}"]`)?.focus();
  });
  new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && !at("more").hidden && drawMore(), {
    rootMargin: "1200px",
  }).observe(at("more"));
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("#failures details")) details.open = true;
  });

  /** Browsers print only loaded images, and images below the visible area load lazily. */
  async function printAll() {
    // Rows may be drawn while images load, so repeat until none is left.
    let waiting;
    while ((waiting = [...document.images].filter((image) => image.loading === "lazy")).length > 0) {
      for (const image of waiting) image.loading = "eager";
      await Promise.allSettled(waiting.map((image) => image.decode()));
    }
    window.print();
  }

  at("measure").append(...data.columns.map((column) => option(column.name, column.heading)));
  at("measure").addEventListener("input", drawBreakdowns);
  at("gallery-title").tabIndex = -1;
  drawFilters();
  drawBreakdowns();
  apply();
})();
