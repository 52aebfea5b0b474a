// The conversation: composer, turns, and the one answer that may be streaming.

const SUGGESTIONS = [
  "What is 47 + 38?",
  "Tell me a story about a brave fox.",
  "Reverse these words: red, green, blue",
  "As JSON: Ada is 36 years old and lives in London.",
];

const SAMPLING = [
  { name: "system", label: "System prompt", type: "text", hint: "You are …" },
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, neutral: 1 },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, neutral: 1 },
  { name: "top_k", label: "Top-k", min: 0, step: 1, hint: "all" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, hint: "no limit" },
  { name: "seed", label: "Seed", step: 1, hint: "random" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, neutral: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, neutral: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, neutral: 1 },
];

class Chat {
  name = "chat";

  constructor({ kind, api, model, askForKey, onChange }) {
    Object.assign(this, { kind, api, model, askForKey, onChange });
    this.settings = new Settings(byId("settings-form"), { store: "settings", prefix: "setting" });
    this.settings.show(SAMPLING);
    this.turns = [];
    this.abort = null;
    this.list = byId("turns");
    this.scroller = byId("scroller");
    this.prompt = byId("prompt");
    this.follows = true;

    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(this.prompt.value.trim());
    });
    byId("stop").addEventListener("click", () => {
      this.stop();
      this.focus();
    });
    this.prompt.addEventListener("input", () => this.refresh());
    this.prompt.addEventListener("keydown", (event) => {
      if (!isSendKey(event)) return;
      event.preventDefault();
      this.send(this.prompt.value.trim());
    });
    this.scroller.addEventListener("scroll", () => {
      const { scrollTop, clientHeight, scrollHeight } = this.scroller;
      this.follows = scrollHeight - scrollTop - clientHeight < 48;
    });
    const suggestion = (text) => element("button", { type: "button", onclick: () => this.send(text) }, text);
    byId("suggestions").append(...SUGGESTIONS.map(suggestion));
    this.refresh();
  }

  get isRunning() {
    return this.abort !== null;
  }

  /** The model that answers next; without one, the reason. */
  describe(model, reason = "") {
    const length = model?.max_model_len ? ` · ${model.max_model_len.toLocaleString("en")} tokens of context` : "";
    byId("welcome-model").textContent = model ? `${model.id}${length}` : reason;
    this.refresh();
  }

  /** What the buttons may do now. */
  refresh() {
    fitHeight(this.prompt);
    const isReady = this.model() !== null;
    byId("send").disabled = !isReady || !this.prompt.value.trim();
    byId("send").hidden = this.isRunning;
    byId("stop").hidden = !this.isRunning;
    byId("welcome").hidden = this.turns.length > 0;
    for (const button of byId("suggestions").children) button.disabled = !isReady;
  }

  send(text) {
    if (!text || this.isRunning || this.model() === null) return;
    this.prompt.value = "";
    this.append(new UserTurn(text, this));
    this.focus();
    this.answer();
  }

  /** The conversation goes on from `turn`, which now says `text`. */
  sendAgain(turn, text) {
    if (this.isRunning) return;
    this.cut(turn);
    this.send(text);
  }

  generateAgain(turn) {
    if (this.isRunning) return;
    this.cut(turn);
    this.answer();
  }

  stop() {
    this.abort?.abort();
  }

  clear() {
    this.stop();
    this.cut(this.turns[0]);
    this.focus();
  }

  /** To the composer, unless that would bring up a phone's keyboard. */
  focus() {
    if (!matchMedia("(pointer: coarse)").matches) this.prompt.focus();
  }

  /** Remove `turn` and what follows it. */
  cut(turn) {
    const from = this.turns.indexOf(turn);
    if (from >= 0) for (const gone of this.turns.splice(from)) gone.node.remove();
    this.refresh();
  }

  append(turn) {
    this.turns.push(turn);
    this.list.append(turn.node);
    this.follows = true;
    this.refresh();
    this.scroll();
  }

  scroll() {
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** What the model is told was said. A question that got no answer, and that nothing, are left out. */
  history() {
    const isEmpty = (turn) => turn?.role === "assistant" && !turn.text;
    const said = this.turns.filter((turn, index) => !isEmpty(turn) && !isEmpty(this.turns[index + 1]));
    return said.map(({ role, text }) => ({ role, content: text }));
  }

  /** Ask the model to go on, and show its answer while it comes. */
  async answer() {
    const { system, ...sampling } = this.settings.values();
    const messages = this.history();
    if (system) messages.unshift({ role: "system", content: system });
    const abort = (this.abort = new AbortController());
    const turn = new AssistantTurn(this);
    this.append(turn);
    this.onChange();
    let isDrawing = false;
    const draw = () => {
      isDrawing = false;
      if (!turn.node.classList.contains("running")) return;
      turn.show();
      this.scroll();
    };
    try {
      for await (const chunk of this.api.chat({ model: this.model(), messages, ...sampling }, abort.signal)) {
        turn.add(chunk);
        if (!isDrawing) isDrawing = Boolean(requestAnimationFrame(draw)); // at most one drawing a frame
      }
      turn.finish();
      announce(`Answer complete: ${turn.text}`);
    } catch (error) {
      if (error.name === "AbortError") {
        turn.finish("stopped");
        announce("Stopped");
      } else {
        turn.fail(error);
        if (error.status === 401) this.askForKey(error.message, () => this.generateAgain(turn));
      }
    } finally {
      if (this.abort === abort) this.abort = null;
      this.refresh();
      this.scroll();
      this.onChange();
    }
  }
}
