// One picture: growing while the model denoises, then finished. `actions` is told what its buttons ask for.

class Picture {
  /** `request` is the body that asked for it, `index` its number among the pictures of that request. */
  constructor(request, index, actions) {
    Object.assign(this, { request, index, actions });
    this.startedAt = performance.now();
    [this.width, this.height] = request.size.split("x").map(Number);
    this.seed = request.seed + index;
    this.source = null;
    this.isFinished = false;

    this.image = element("img", { alt: "", hidden: true, draggable: "false" });
    this.frame = element(
      "button",
      { class: "frame", type: "button", disabled: true, onclick: () => actions.enlarge(this) },
      this.image,
    );
    this.frame.style.aspectRatio = `${this.width} / ${this.height}`;
    this.bar = element("div", { class: "progress", role: "progressbar", "aria-label": `Steps of ${request.prompt}` });
    this.count = element("span", { class: "count" }, "waiting");
    this.facts = element("p", { class: "facts" }, this.count);
    this.buttons = element("div", { class: "actions" });
    const prompt = element("p", { class: "prompt", title: request.prompt }, request.prompt);
    this.node = element(
      "figure",
      { class: "picture running" },
      element("div", { class: "mount" }, this.frame, this.bar),
      element("figcaption", {}, prompt, this.facts, this.buttons),
    );
  }

  /** `step` of `numSteps` are done. */
  progress(step, numSteps) {
    this.bar.setAttribute("aria-valuemin", 0);
    this.bar.setAttribute("aria-valuemax", numSteps);
    this.bar.setAttribute("aria-valuenow", step);
    this.bar.style.setProperty("--done", step / numSteps);
    this.steps = step;
    this.count.textContent = step < numSteps ? `step ${step} of ${numSteps}` : "decoding";
  }

  /** An estimate of the finished picture. */
  preview(event) {
    this.show(event, `Preview of ${this.request.prompt}`);
  }

  /** The picture, with the values that were used. */
  complete(event) {
    this.isFinished = true;
    this.seconds = (performance.now() - this.startedAt) / 1000;
    this.seed = event.seed ?? this.seed;
    this.steps = event.num_inference_steps ?? this.steps;
    this.guidance = event.guidance_scale ?? this.request.guidance_scale;
    this.solver = event.scheduler ?? this.request.scheduler;
    this.show(event, this.request.prompt);
    this.node.classList.remove("running");
    this.bar.remove();
    this.frame.disabled = false;
    this.frame.setAttribute("aria-label", `Enlarge ${this.request.prompt}`);
    this.facts.replaceChildren(`${plural(this.steps, "step")} · ${duration(1000 * this.seconds)}`);
    this.buttons.replaceChildren(
      this.seedButton(),
      iconButton("download", "Download", () => this.download()),
      iconButton("delete", "Delete", () => this.actions.remove(this)),
    );
  }

  /** Stopped on the way: what can be seen of it stays. */
  stop() {
    this.node.classList.remove("running");
    this.node.classList.add("stopped");
    this.bar.remove();
    this.facts.replaceChildren(this.steps ? `stopped at step ${this.steps}` : "stopped");
    this.buttons.replaceChildren(
      this.seedButton(),
      iconButton("again", "Generate again", () => this.actions.again(this)),
      iconButton("delete", "Delete", () => this.actions.remove(this)),
    );
  }

  show({ b64_json: base64, output_format: format = "png", size }, alt) {
    if (size) [this.width, this.height] = size.split("x").map(Number);
    this.format = format;
    this.source = `data:image/${format};base64,${base64}`;
    this.image.src = this.source;
    this.image.alt = alt;
    this.image.hidden = false;
    this.image.classList.toggle("small", isSmall(this));
  }

  seedButton() {
    const title = `Use seed ${this.seed} again`;
    const onclick = () => this.actions.useSeed(this.seed);
    const properties = { class: "chip", type: "button", title, "aria-label": title, onclick };
    return element("button", properties, icon("seed"), String(this.seed));
  }

  /** Named after what it shows, and after the seed that tells it from its siblings. */
  get fileName() {
    const words = this.request.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
    const ending = this.format === "jpeg" ? "jpg" : this.format;
    return `${words.join("-").slice(0, 60)}-${this.seed}.${ending}`;
  }

  /** Through a blob: browsers cut data addresses of some megabytes. */
  download() {
    const encoded = this.source.slice(this.source.indexOf(",") + 1);
    const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type: `image/${this.format}` }));
    const link = element("a", { href: url, download: this.fileName });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}

/** Drawn on so few pixels that a screen shows them one by one. */
const isSmall = ({ width, height }) => width * height <= 128 * 128;
