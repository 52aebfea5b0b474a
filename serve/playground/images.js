// The image panel: what to draw, and the requests that are running.

const IMAGE_SUGGESTIONS = [
  "a red circle on a white background",
  "a small yellow star at the top left on a black background",
  "a large blue triangle on a gray background",
  "a purple ring on a white background",
];
const MAX_RUNNING = 4; // a browser opens six connections to one server; two are left for the chat and the models

const MAX_SEED = Number.MAX_SAFE_INTEGER - 3; // of the first of four pictures; beyond it JavaScript counts in twos

/** Below a million: short enough to be read out, and enough to find something new every time. */
const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;

class Images {
  name = "images";

  constructor({ kind, api, model, askForKey, onChange }) {
    Object.assign(this, { kind, api, model, askForKey, onChange });
    this.running = new Set();
    this.form = byId("image-composer");
    this.prompt = byId("image-prompt");
    this.size = new SizePicker();
    this.settings = new Settings(byId("image-settings-form"), { store: "image-settings", prefix: "image-setting" });
    this.gallery = new Gallery();
    this.actions = {
      enlarge: (picture) => this.viewer.show(picture),
      remove: (picture) => this.remove(picture),
      again: (picture) => this.again(picture),
      useSeed: (seed) => this.useSeed(seed),
      reuse: (picture) => this.reuse(picture),
    };
    this.viewer = new Viewer(this.gallery, this.actions);

    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.generate();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (!isSendKey(event)) return;
      event.preventDefault();
      this.generate();
    });
    for (const source of [this.form, this.settings.form]) source.addEventListener("input", () => this.refresh());
    byId("image-stop").addEventListener("click", () => {
      this.stop();
      this.focus();
    });
    byId("fixed-seed").addEventListener("click", () => {
      this.settings.set("seed", "");
      this.focus();
    });
    const suggestion = (text) => element("button", { type: "button", onclick: () => this.suggest(text) }, text);
    byId("image-suggestions").append(...IMAGE_SUGGESTIONS.map(suggestion));
    this.describe(null);
  }

  get isRunning() {
    return this.running.size > 0;
  }

  /** The model whose pictures come next; without one, the reason. */
  describe(model, reason = "") {
    if (model) {
      const { width, height, num_inference_steps: steps } = model.image;
      byId("image-welcome-model").textContent = `${model.id} · ${width} × ${height} · ${plural(steps, "step")}`;
      this.size.offer(model.image);
    } else {
      byId("image-welcome-model").textContent = reason;
    }
    this.settings.show(imageControls(model?.image ?? {}));
    this.refresh();
  }

  /** What the buttons may do now. */
  refresh() {
    fitHeight(this.prompt);
    const isReady = this.model() !== null;
    byId("generate").disabled = !isReady || !this.prompt.value.trim() || this.running.size >= MAX_RUNNING;
    byId("image-stop").hidden = !this.isRunning;
    byId("image-welcome").hidden = !this.gallery.isEmpty;
    const { seed } = this.settings.values();
    byId("fixed-seed").hidden = seed === undefined;
    byId("fixed-seed-value").textContent = seed;
    for (const button of byId("image-suggestions").children) button.disabled = !isReady;
  }

  /** To the prompt, unless that would bring up a phone's keyboard. */
  focus() {
    if (!matchMedia("(pointer: coarse)").matches) this.prompt.focus();
  }

  stop() {
    for (const generation of this.running) generation.stop();
  }

  suggest(text) {
    this.prompt.value = text;
    this.generate();
  }

  /** Ask for what the composer and the settings say. Without a seed one is drawn here: it can be used again. */
  generate() {
    this.refresh();
    if (byId("generate").disabled || !this.form.reportValidity()) return;
    const { previews, ...settings } = this.settings.values();
    this.request({
      model: this.model(),
      prompt: this.prompt.value.trim(),
      n: Number(new FormData(this.form).get("count")),
      size: this.size.value,
      seed: drawSeed(),
      ...settings,
      partial_images: Number(previews ?? 3),
    });
  }

  /** Run a request, its pictures first in the gallery. */
  async request(body) {
    const generation = new Generation(this.api, body, this.actions);
    this.gallery.add(generation.pictures);
    byId("gallery-scroller").scrollTop = 0;
    this.running.add(generation);
    this.changed();
    try {
      await generation.run();
    } catch (error) {
      if (error.name === "AbortError") {
        for (const picture of generation.unfinished) picture.stop();
        announce("Stopped");
      } else {
        this.fail(generation, error);
      }
    } finally {
      this.running.delete(generation);
      this.changed();
    }
  }

  /** The error stands where the missing pictures were. */
  fail(generation, error) {
    const missing = generation.unfinished;
    const again = () => {
      note.remove();
      this.request(generation.request);
    };
    const note = failure(error, again);
    const dismiss = () => {
      note.remove();
      this.refresh();
    };
    note.append(element("button", { class: "quiet", type: "button", onclick: dismiss }, "Dismiss"));
    this.gallery.replace(missing, note);
    if (error.status === 401) this.askForKey(error.message, again);
  }

  changed() {
    this.refresh();
    this.onChange();
  }

  remove(picture) {
    this.gallery.remove(picture);
    this.refresh();
  }

  /** One picture that was stopped, from its own seed. */
  again(picture) {
    this.gallery.remove(picture);
    this.request({ ...picture.request, n: 1, seed: picture.seed });
  }

  useSeed(seed) {
    this.settings.set("seed", seed);
    announce(`Seed ${seed} is used from now on`);
  }

  /** Everything a picture was made from goes back into the composer and the settings. */
  reuse(picture) {
    const { prompt, negative_prompt, output_format, scheduler } = picture.request;
    this.prompt.value = prompt;
    this.size.set(`${picture.width}x${picture.height}`);
    this.settings.fill({
      negative_prompt,
      output_format,
      scheduler,
      num_inference_steps: picture.steps,
      guidance_scale: picture.guidance,
      seed: picture.seed,
    });
    this.refresh();
    this.focus();
  }
}

/** The settings of a model with these limits. */
function imageControls({ num_inference_steps, guidance_scale, max_steps, solvers = [], has_guidance = true }) {
  const why = has_guidance ? undefined : "This model computes no guidance.";
  const count = { type: "number", step: 1 };
  const choice = (...options) => ({ type: "choice", options });
  const [own = "model’s own", ...others] = solvers;
  const solver = choice(["", `${own} (default)`], ...others.map((name) => [name, name]));
  return [
    { name: "negative_prompt", label: "Negative prompt", type: "text", hint: "What to avoid", why },
    { name: "num_inference_steps", label: "Steps", ...count, min: 1, max: max_steps, neutral: num_inference_steps },
    { name: "guidance_scale", label: "Guidance", min: 0, max: 20, step: 0.1, neutral: guidance_scale, why },
    { name: "seed", label: "Seed", ...count, min: 0, max: MAX_SEED, hint: "random", draw: drawSeed },
    { name: "scheduler", label: "Solver", ...solver },
    { name: "previews", label: "Previews", ...choice(["", "3"], ["2", "2"], ["1", "1"], ["0", "none"]) },
    { name: "output_format", label: "Format", ...choice(["", "PNG"], ["jpeg", "JPEG"], ["webp", "WebP"]) },
  ];
}
