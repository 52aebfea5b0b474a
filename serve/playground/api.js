// The server's OpenAI API: models, and chat completions and pictures as streams of events.

class ApiError extends Error {
  constructor(message, { status = 0, type = "", code = "" } = {}) {
    super(message);
    this.status = status;
    this.type = type;
    this.code = code;
  }

  /** From what the server sent: `{"error": {message, type, param, code}}`, or anything a proxy may put there. */
  static async from(response) {
    const body = await response.text().catch(() => "");
    let error = {};
    try {
      error = JSON.parse(body).error ?? {};
    } catch {
      // no JSON: the status has to do
    }
    const message = error.message || `${response.status} ${response.statusText || "error"}`;
    return new ApiError(message, { ...error, status: response.status });
  }
}

class Api {
  constructor() {
    this.key = new Store("sessionStorage", "key");
  }

  async models() {
    const response = await this.request("/v1/models");
    return (await response.json()).data;
  }

  /** The chunks of an answer, as they arrive. Throws ApiError, also for an error inside the stream. */
  async *chat(body, signal) {
    const asked = { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    for await (const data of this.stream("/v1/chat/completions", asked, signal)) {
      if (data === "[DONE]") return;
      yield parsed(data);
    }
    throw new ApiError("The connection ended before the answer was complete.");
  }

  /** Steps done, previews and finished pictures, as they arrive. Throws as `chat` does. */
  async *images(body, signal) {
    const asked = { ...body, stream: true, stream_progress: true };
    for await (const data of this.stream("/v1/images/generations", asked, signal)) {
      if (data !== "[DONE]") yield parsed(data);
    }
  }

  async *stream(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    const response = await this.request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
    yield* events(response.body);
  }

  async request(path, { headers = {}, ...options } = {}) {
    if (this.key.value) headers = { ...headers, Authorization: `Bearer ${this.key.value}` };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.");
    }
    if (!response.ok) throw await ApiError.from(response);
    return response;
  }
}

function parsed(data) {
  const event = JSON.parse(data);
  if (event.error) throw new ApiError(event.error.message, event.error);
  return event;
}

/** The data of server-sent events; comments and other fields are dropped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      if (!value.includes("\n")) continue; // the middle of a picture
      const parts = rest.split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
