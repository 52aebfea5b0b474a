// A form of generation controls in the drawer. An empty one is not sent, so the model's own default holds.

class Settings {
  /** `store` names where the values are kept; the controls' ids begin with `prefix`. */
  constructor(form, { store, prefix }) {
    Object.assign(this, { form, prefix });
    this.store = new Store("localStorage", store);
    this.inputs = new Map();
    this.form.addEventListener("input", () => this.keep());
    this.form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Show these controls, with the values kept for them. */
  show(controls) {
    this.inputs.clear();
    this.form.replaceChildren(...controls.map((control) => this.control(control)));
    let kept = {};
    try {
      kept = JSON.parse(this.store.value) ?? {};
    } catch {
      // not ours, or from another version: start empty
    }
    this.fill(kept);
  }

  /** What is filled in, numbers as numbers. What a model cannot do is sent too: the server says why. */
  values() {
    const values = {};
    for (const [name, input] of this.inputs) {
      const text = input.value.trim();
      if (!text || input.disabled) continue;
      values[name] = input.type === "number" ? Number(text) : text;
    }
    return values;
  }

  fill(values) {
    for (const [name, input] of this.inputs) this.set(name, values[name] ?? "");
  }

  set(name, value) {
    const input = this.inputs.get(name);
    if (!input) return;
    input.value = value;
    if (input.selectedIndex === -1) input.selectedIndex = 0; // a choice that this model does not have
    input.dispatchEvent(new Event("input", { bubbles: true }));
  }

  keep() {
    const raw = [...this.inputs].map(([name, input]) => [name, input.value]);
    this.store.set(JSON.stringify(Object.fromEntries(raw)));
  }

  control({ name, label, type = "number", why, ...rest }) {
    const id = `${this.prefix}-${name}`;
    const title = element("label", { for: id }, label);
    const row = element("div", { class: "setting" }, title);
    const input = this[type](row, { id, label, ...rest });
    this.inputs.set(name, input);
    input.disabled = Boolean(why);
    if (why) {
      row.classList.add("off");
      row.append(element("p", { class: "note", id: `${id}-why` }, why));
      input.setAttribute("aria-describedby", `${id}-why`);
    }
    return row;
  }

  text(row, { id, hint }) {
    const area = element("textarea", { id, rows: 2, placeholder: hint });
    row.classList.add("wide");
    row.append(area);
    return area;
  }

  /** One of `options`, [value, shown] each. */
  choice(row, { id, options }) {
    const select = element("select", { id }, ...options.map(([value, shown]) => element("option", { value }, shown)));
    row.append(select);
    return select;
  }

  /** With `max` a slider beside it, with `draw` a button that fills in what `draw()` gives. */
  number(row, { id, label, min, max, step, neutral, hint, draw }) {
    const placeholder = hint ?? neutral ?? "default";
    const input = element("input", { id, type: "number", inputmode: "decimal", min, max, step, placeholder });
    row.append(input);
    if (max !== undefined && neutral !== undefined) {
      const slider = element("input", { type: "range", min, max, step, "aria-label": label });
      slider.addEventListener("input", () => (input.value = slider.value));
      row.append(slider);
      row.addEventListener("input", () => {
        slider.value = input.value === "" ? neutral : input.value;
        slider.disabled = input.disabled;
        slider.style.setProperty("--filled", `${(100 * (slider.value - min)) / (max - min)}%`);
        row.classList.toggle("unset", input.value === "");
      });
    }
    if (draw) {
      const dice = iconButton("dice", `Draw a ${label.toLowerCase()}`, () => {
        input.value = draw();
        input.dispatchEvent(new Event("input", { bubbles: true }));
      });
      row.classList.add("drawn");
      row.append(dice);
    }
    return input;
  }
}
