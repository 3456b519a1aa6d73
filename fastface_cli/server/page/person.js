// The person: photos with their faces, the camera, and saved identities.

import { blob, call, json } from "/static/api.js";
import { $, ask, download, make, say } from "/static/dom.js";

const photos = []; // {file, url, faces, width, height, chosen}
let limit = 16;

export function person() {
  const chosen = photos.length === 1 ? photos[0].faces[photos[0].chosen] : undefined;
  const several = photos.length === 1 && photos[0].faces.length > 1;
  return {
    photos: photos.map((photo) => photo.file),
    box: several && chosen ? chosen.box : null,
    identity: photos.length ? null : $("identity").value || null,
  };
}

// `recipe` returns the name of the chosen recipe: an identity holds what its adapter reads.
export function startPerson(limits, recipe) {
  limit = limits.photos;
  $("file").addEventListener("change", () => {
    add([...$("file").files]);
    $("file").value = "";
  });
  const drop = $("drop");
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.remove("over");
    });
  }
  document.addEventListener("drop", (event) => add([...event.dataTransfer.files]));
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) add(files);
  });
  startCamera();
  startIdentities(recipe);
}

async function add(files) {
  const message = $("photo-message");
  for (const file of files) {
    if (photos.length >= limit) {
      say(message, `At most ${limit} photos are used.`, true);
      return;
    }
    say(message, `Looking for faces in ${file.name}`);
    const form = new FormData();
    form.append("photo", file);
    try {
      const found = await json("/api/faces", { method: "POST", body: form });
      if (!found.faces.length) throw new Error(`No face was found in ${file.name}. Use a photo where the face is upright and well lit.`);
      photos.push({ file, url: URL.createObjectURL(file), chosen: 0, ...found });
      say(message, "");
    } catch (error) {
      say(message, error.message, true);
    }
    draw();
  }
}

function draw() {
  $("photos").replaceChildren(...photos.map(drawn));
  $("drop-hint").querySelector("p").hidden = photos.length > 0;
  $("file-label").textContent = photos.length ? "Add photos" : "Choose photos";
  $("file-label").classList.toggle("primary", photos.length === 0);
  $("identity").disabled = photos.length > 0;
  $("identity-save").disabled = photos.length === 0;
  $("camera-open").hidden = !navigator.mediaDevices?.getUserMedia;
  const several = photos.length === 1 && photos[0].faces.length > 1;
  if (several) say($("photo-message"), `${photos[0].faces.length} faces: choose one.`);
  else if (photos.length > 1) say($("photo-message"), "The largest face of each photo is used.");
}

function drawn(photo, index) {
  const image = make("img", { src: photo.url, alt: `Photo ${index + 1}: ${photo.file.name}` });
  const remove = make("button", {
    type: "button", class: "remove", "aria-label": `Remove photo ${index + 1}`, textContent: "×",
    onclick: () => {
      URL.revokeObjectURL(photo.url);
      photos.splice(photos.indexOf(photo), 1);
      say($("photo-message"), "");
      draw();
    },
  });
  const holder = make("div", { class: "photo" }, image, remove);
  // Browsers that cannot show the format (HEIC) show the name; the server reads it all the same.
  image.addEventListener("error", () => {
    image.replaceWith(make("p", { class: "hint", textContent: photo.file.name }));
  });
  image.addEventListener("load", () => place(photo, image, holder));
  new ResizeObserver(() => place(photo, image, holder)).observe(holder);
  return holder;
}

function place(photo, image, holder) {
  for (const old of holder.querySelectorAll(".face")) old.remove();
  const scale = Math.min(image.clientWidth / photo.width, image.clientHeight / photo.height);
  if (!Number.isFinite(scale) || scale <= 0) return;
  const dx = (image.clientWidth - photo.width * scale) / 2;
  const dy = (image.clientHeight - photo.height * scale) / 2;
  photo.faces.forEach((face, index) => {
    const [left, top, right, bottom] = face.box.map((side) => side * scale);
    const button = make("button", {
      type: "button", class: "face", "aria-label": `Face ${index + 1} of ${photo.faces.length}`,
      "aria-pressed": String(index === photo.chosen),
      onclick: () => {
        photo.chosen = index;
        place(photo, image, holder);
        holder.querySelectorAll(".face")[index]?.focus();
      },
    });
    Object.assign(button.style, {
      left: `${dx + left}px`, top: `${dy + top}px`, width: `${right - left}px`, height: `${bottom - top}px`,
    });
    holder.append(button);
  });
}

function startCamera() {
  const dialog = $("camera"), video = $("camera-video");
  let stream = null;
  $("camera-open").hidden = !navigator.mediaDevices?.getUserMedia;
  $("camera-open").addEventListener("click", async () => {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user", width: { ideal: 1280 } } });
      video.srcObject = stream;
      dialog.showModal();
      await video.play();
    } catch (error) {
      say($("photo-message"), `The camera cannot be used: ${error.message}`, true);
    }
  });
  $("camera-take").addEventListener("click", () => {
    const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((taken) => add([new File([taken], "camera.png", { type: "image/png" })]), "image/png");
    dialog.close();
  });
  $("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of stream?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}

function startIdentities(recipe) {
  const select = $("identity");
  const chosen = () => {
    $("identity-download").disabled = $("identity-delete").disabled = !select.value;
  };
  select.addEventListener("change", chosen);
  $("identity-save").addEventListener("click", () => ask("Save this identity", "Name", async (name) => {
    const { box } = person();
    const form = new FormData();
    form.append("name", name);
    form.append("recipe", recipe());
    for (const photo of photos) form.append("photos", photo.file);
    if (box) form.append("face_box", box.join(","));
    await json("/api/identities", { method: "POST", body: form });
    await refresh(name);
    say($("photo-message"), `Saved as ${name}. Later runs need no photo.`);
  }));
  $("identity-file").addEventListener("change", () => {
    const [file] = $("identity-file").files;
    $("identity-file").value = "";
    if (!file) return;
    ask("Load this identity", "Name", async (name) => {
      const form = new FormData();
      form.append("name", name);
      form.append("file", file);
      await json("/api/identities", { method: "POST", body: form });
      await refresh(name);
    });
  });
  $("identity-download").addEventListener("click", async () => {
    const name = select.value;
    download(await blob(`/api/identities/${encodeURIComponent(name)}`), `${name}.safetensors`);
  });
  $("identity-delete").addEventListener("click", async () => {
    await call(`/api/identities/${encodeURIComponent(select.value)}`, { method: "DELETE" });
    await refresh("");
  });
  async function refresh(name) {
    const { identities } = await json("/api/identities");
    select.replaceChildren(
      make("option", { value: "", textContent: "none" }),
      ...identities.map((each) => make("option", { value: each.name, textContent: each.name })),
    );
    select.value = name;
    chosen();
  }
  refresh("");
}
