// Small helpers for elements and dialogs.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function say(element, text, isError = false) {
  element.textContent = text;
  element.classList.toggle("error", isError);
}

// Ask for one line of text; `check` may throw to show a message and keep the dialog open.
export function ask(title, label, check) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-label").textContent = label;
  $("ask-value").value = "";
  say($("ask-message"), "");
  dialog.showModal();
  return new Promise((resolve) => {
    const submitted = async (event) => {
      if (event.submitter?.value === "cancel") return;
      event.preventDefault();
      try {
        await check($("ask-value").value.trim());
        dialog.close("ok");
      } catch (error) {
        say($("ask-message"), error.message, true);
      }
    };
    $("ask-form").addEventListener("submit", submitted);
    dialog.addEventListener("close", () => {
      $("ask-form").removeEventListener("submit", submitted);
      resolve(dialog.returnValue === "ok");
    }, { once: true });
  });
}

export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
