// Calls of the native API. The token stays in this tab: it comes from the address and is removed from it.

let token = sessionStorage.getItem("token") ?? "";
const fragment = new URLSearchParams(location.hash.slice(1));
if (fragment.has("token")) {
  setToken(fragment.get("token"));
  history.replaceState(null, "", location.pathname);
}

export function setToken(value) {
  token = value;
  sessionStorage.setItem("token", value);
}

export class ApiError extends Error {
  constructor(status, record) {
    super(record.hint ? `${record.message} (${record.hint})` : record.message);
    this.status = status;
  }
}

export async function call(path, options = {}) {
  const headers = { "X-Fastface-Client": clientName(), ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new ApiError(0, { message: "The server does not answer", hint: "is fastface serve still running?" });
  }
  if (response.ok) return response;
  let record = { message: `The server answered ${response.status}`, hint: null };
  try {
    record = (await response.json()).error ?? record;
  } catch { /* the answer is not JSON; the status is reported */ }
  throw new ApiError(response.status, record);
}

export const json = async (path, options) => (await call(path, options)).json();
export const blob = async (path, options) => (await call(path, options)).blob();

function clientName() {
  let name = sessionStorage.getItem("client");
  if (!name) {
    name = Math.random().toString(36).slice(2);
    sessionStorage.setItem("client", name);
  }
  return name;
}

// Events of a run, also after the connection broke. fetch() sends the token, which EventSource cannot.
export async function* events(run) {
  let last = 0;
  for (let attempt = 0; attempt < 20; attempt++) {
    try {
      const response = await call(`/api/runs/${run}/events`, { headers: { "Last-Event-ID": String(last) } });
      for await (const event of parsed(response.body)) {
        attempt = 0;
        last = event.id;
        yield event;
        if (["finished", "failed", "cancelled"].includes(event.name)) return;
      }
    } catch (error) {
      if (error.status && error.status < 500) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(8000, 500 * 2 ** attempt)));
  }
  throw new ApiError(0, { message: "The server does not answer", hint: "reload the page when it runs again" });
}

async function* parsed(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value.replaceAll("\r\n", "\n");
      let end;
      while ((end = buffer.indexOf("\n\n")) >= 0) {
        const fields = {};
        for (const line of buffer.slice(0, end).split("\n")) {
          const colon = line.indexOf(": ");
          if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
        }
        buffer = buffer.slice(end + 2);
        if (fields.event) yield { id: Number(fields.id), name: fields.event, data: JSON.parse(fields.data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
