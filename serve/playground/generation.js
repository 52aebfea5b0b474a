// One request for pictures while it runs: its events go to its pictures.

class Generation {
  constructor(api, request, actions) {
    Object.assign(this, { api, request });
    this.abort = new AbortController();
    this.pictures = Array.from({ length: request.n }, (_, index) => new Picture(request, index, actions));
  }

  stop() {
    this.abort.abort();
  }

  /** Until every picture is finished. Throws ApiError, or an AbortError after `stop`. */
  async run() {
    for await (const event of this.api.images(this.request, this.abort.signal)) {
      const picture = this.pictures[event.index ?? 0];
      if (event.type === "image_generation.progress") picture.progress(event.step, event.num_steps);
      else if (event.type === "image_generation.partial_image") picture.preview(event);
      else if (event.type === "image_generation.completed") {
        picture.complete(event);
        announce(`Picture finished: ${this.request.prompt}`);
      }
    }
    if (this.unfinished.length) throw new ApiError("The connection ended before the picture was complete.");
  }

  get unfinished() {
    return this.pictures.filter((picture) => !picture.isFinished);
  }
}
