// The server's OpenAI API: models, and chat completions as a stream of chunks.

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
    const response = await this.request("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
      signal,
    });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, chunk.error);
      yield chunk;
    }
    throw new ApiError("The connection ended before the answer was complete.");
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

/** The data of server-sent events; comments and other fields are dropped. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
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
