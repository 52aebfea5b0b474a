// The sampling controls. An empty one is not sent, so the model's own default holds.

const SETTINGS = [
  { name: "system", label: "System prompt", type: "text" },
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, neutral: 1 },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01, neutral: 1 },
  { name: "top_k", label: "Top-k", min: 0, step: 1, hint: "all" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, hint: "no limit" },
  { name: "seed", label: "Seed", step: 1, hint: "random" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, neutral: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, neutral: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, neutral: 1 },
];

class Settings {
  constructor() {
    this.store = new Store("localStorage", "settings");
    this.inputs = new Map();
    this.form = byId("settings-form");
    this.form.append(...SETTINGS.map((setting) => this.control(setting)));
    this.form.addEventListener("input", () => this.store.set(JSON.stringify(this.raw())));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    byId("reset-settings").addEventListener("click", () => this.fill({}));
    let saved = {};
    try {
      saved = JSON.parse(this.store.value) ?? {};
    } catch {
      // not ours, or from another version: start empty
    }
    this.fill(saved);
  }

  /** The system prompt and the fields of the request. */
  values() {
    const { system, ...raw } = this.raw();
    const sampling = {};
    for (const [name, text] of Object.entries(raw)) {
      if (text !== "" && this.inputs.get(name).validity.valid) sampling[name] = Number(text);
    }
    return { system: system.trim(), sampling };
  }

  raw() {
    return Object.fromEntries([...this.inputs].map(([name, input]) => [name, input.value]));
  }

  fill(values) {
    for (const [name, input] of this.inputs) {
      input.value = values[name] ?? "";
      input.dispatchEvent(new Event("input", { bubbles: true }));
    }
  }

  control({ name, label, type, min, max, step, neutral, hint }) {
    const id = `setting-${name}`;
    const title = element("label", { for: id }, label);
    if (type === "text") {
      const area = element("textarea", { id, rows: 3, placeholder: "You are …" });
      this.inputs.set(name, area);
      return element("div", { class: "setting wide" }, title, area);
    }
    const placeholder = hint ?? String(neutral);
    const input = element("input", { id, type: "number", inputmode: "decimal", min, max, step, placeholder });
    this.inputs.set(name, input);
    const row = element("div", { class: "setting" }, title, input);
    if (max !== undefined) {
      const slider = element("input", { type: "range", min, max, step, "aria-label": label });
      slider.addEventListener("input", () => (input.value = slider.value));
      input.addEventListener("input", () => (slider.value = input.value === "" ? neutral : input.value));
      row.append(slider);
      row.addEventListener("input", () => row.classList.toggle("unset", input.value === ""));
    }
    return row;
  }
}
