// One message of the conversation: its data, and how it is shown. `chat` is told what its buttons ask for.

class UserTurn {
  constructor(text, chat) {
    this.role = "user";
    this.text = text;
    this.shown = element("div", { class: "text" }, text);
    this.actions = element(
      "div",
      { class: "actions" },
      iconButton("edit", "Edit message", () => this.edit(chat)),
      copyButton("Copy message", () => this.text),
    );
    this.node = element("article", { class: "turn turn-user", "aria-label": "You" }, this.shown, this.actions);
  }

  edit(chat) {
    if (chat.isRunning) return;
    const editor = element("textarea", { class: "editor", "aria-label": "Edit message", rows: 1 });
    editor.value = this.text;
    const close = () => {
      editor.replaceWith(this.shown);
      this.actions.hidden = false;
    };
    editor.addEventListener("input", () => fitHeight(editor));
    editor.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
        byId("prompt").focus();
      } else if (isSendKey(event) && editor.value.trim()) {
        event.preventDefault();
        close();
        chat.sendAgain(this, editor.value.trim());
      }
    });
    this.actions.hidden = true;
    this.shown.replaceWith(editor);
    fitHeight(editor);
    editor.focus();
  }
}

class AssistantTurn {
  constructor(chat) {
    this.role = "assistant";
    this.chat = chat;
    this.text = "";
    this.usage = null;
    this.numChunks = 0;
    this.startedAt = performance.now();
    this.firstAt = this.lastAt = null;
    const text = element("div", { class: "text" });
    this.markdown = new Markdown(text);
    this.stats = element("div", { class: "stats" });
    this.copyButton = copyButton("Copy answer", () => this.text);
    this.actions = element(
      "div",
      { class: "actions", hidden: true },
      this.copyButton,
      iconButton("again", "Generate again", () => chat.generateAgain(this)),
    );
    this.foot = element("div", { class: "foot" }, this.actions, this.stats);
    this.node = element("article", { class: "turn turn-assistant running", "aria-label": "Answer" }, text, this.foot);
  }

  /** A chunk of the stream. */
  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      this.text += choice.delta.content;
      this.numChunks += 1;
      this.lastAt = performance.now();
      this.firstAt ??= this.lastAt;
    }
    this.reason = choice?.finish_reason ?? this.reason;
  }

  show() {
    this.markdown.update(this.text);
    this.stats.replaceChildren(...this.figures().map((figure) => element("span", {}, figure)));
  }

  finish(reason = this.reason) {
    this.reason = reason;
    this.node.classList.remove("running");
    this.actions.hidden = false;
    this.copyButton.hidden = !this.text;
    this.show();
  }

  fail(error) {
    this.finish("error");
    this.actions.hidden = !this.text;
    this.foot.before(failure(error, () => this.chat.generateAgain(this)));
  }

  /** Tokens, tokens a second between the first and the last, time to the first token, and why it ended. */
  figures() {
    if (this.firstAt === null) return this.reason === "stopped" ? ["stopped"] : [];
    const numTokens = this.usage?.completion_tokens ?? this.numChunks;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const figures = [`${this.usage ? "" : "≈ "}${plural(numTokens, "token")}`];
    if (seconds > 0 && numTokens > 1) figures.push(`${rounded((numTokens - 1) / seconds)} tokens/s`);
    figures.push(`TTFT ${duration(this.firstAt - this.startedAt)}`);
    if (this.usage && this.reason) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens;
      figures.push(`prompt ${this.usage.prompt_tokens}${cached ? ` (${cached} cached)` : ""}`);
    }
    const ends = { length: "cut at max tokens", stopped: "stopped" };
    if (ends[this.reason]) figures.push(ends[this.reason]);
    return figures;
  }
}

/** Enter, but not while an input method is composing a character. */
function isSendKey(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}
