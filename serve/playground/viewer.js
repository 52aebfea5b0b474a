// A picture enlarged, with everything it was made from. Escape closes it, the arrow keys go through the gallery.

class Viewer {
  constructor(gallery, actions) {
    Object.assign(this, { gallery, actions });
    this.dialog = byId("viewer");
    this.image = byId("viewer-image");
    const buttons = {
      "viewer-close": () => this.dialog.close(),
      "viewer-previous": () => this.go(-1),
      "viewer-next": () => this.go(1),
      "viewer-download": () => this.picture.download(),
      "viewer-reuse": () => {
        this.dialog.close();
        this.actions.reuse(this.picture);
      },
      "viewer-delete": () => this.remove(),
    };
    for (const [id, onclick] of Object.entries(buttons)) byId(id).addEventListener("click", onclick);
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.go(-1);
      if (event.key === "ArrowRight") this.go(1);
    });
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // the backdrop
    });
    this.dialog.addEventListener("close", () => this.picture.frame.focus());
  }

  show(picture) {
    this.picture = picture;
    const { width, height, request, image } = picture;
    Object.assign(this.image, { src: picture.source, alt: request.prompt, className: image.className });
    this.image.style.setProperty("--ratio", width / height);
    byId("viewer-prompt").textContent = request.prompt;
    const facts = {
      Avoided: request.negative_prompt,
      Model: request.model,
      Size: `${width} × ${height}`,
      Seed: picture.seed,
      Steps: picture.steps,
      Guidance: picture.guidance,
      Solver: picture.solver,
      Time: duration(1000 * picture.seconds),
    };
    const shown = Object.entries(facts).filter(([, value]) => value !== undefined && value !== "");
    byId("viewer-facts").replaceChildren(...shown.map(([name, value]) => fact(name, String(value))));
    const all = this.gallery.finished;
    byId("viewer-previous").disabled = all[0] === picture;
    byId("viewer-next").disabled = all.at(-1) === picture;
    if (!this.dialog.open) this.dialog.showModal();
  }

  go(by) {
    const all = this.gallery.finished;
    const next = all[all.indexOf(this.picture) + by];
    if (next) this.show(next);
  }

  /** Delete this one and show its neighbour, the last one closes. */
  remove() {
    const all = this.gallery.finished;
    const at = all.indexOf(this.picture);
    const next = all[at + 1] ?? all[at - 1];
    this.actions.remove(this.picture);
    if (next) this.show(next);
    else this.dialog.close();
  }
}

/** A row; half as wide on a phone when its value is short. */
function fact(name, value) {
  const row = element("div", {}, element("dt", {}, name), element("dd", {}, value));
  row.classList.toggle("wide", value.length > 9);
  return row;
}
