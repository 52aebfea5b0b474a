// The size of the next pictures: one of the model's sizes, shapes near its own area, or two numbers.

/** Width to height. */
const SHAPES = [[1, 1], [4, 3], [3, 4], [3, 2], [2, 3], [16, 9], [9, 16]];

/** [width, height] pairs to offer, the model's own first. */
function sizesOf(limits) {
  const own = [limits.width, limits.height];
  const multiple = limits.size_multiple;
  const near = (width, height, area) => {
    const scale = Math.sqrt(area / (width * height));
    return [width, height].map((side) => Math.max(1, Math.round((side * scale) / multiple)) * multiple);
  };
  const area = own[0] * own[1];
  const found = [...SHAPES.map(([width, height]) => near(width, height, area)), near(1, 1, 4 * area)];
  const fitting = found.filter(([width, height]) => width * height <= limits.max_pixels);
  const sizes = [own, ...(limits.sizes.length ? limits.sizes : fitting)];
  return [...new Map(sizes.map((size) => [size.join("x"), size])).values()];
}

class SizePicker {
  constructor() {
    this.select = byId("size");
    this.custom = byId("custom-size");
    this.width = byId("custom-width");
    this.height = byId("custom-height");
    this.select.addEventListener("change", () => {
      this.arrange();
      if (!this.custom.hidden) this.width.select();
    });
  }

  offer(limits) {
    const before = this.value;
    this.limits = limits;
    this.select.disabled = false;
    const options = sizesOf(limits).map(([width, height]) =>
      element("option", { value: `${width}x${height}` }, `${width} × ${height}`),
    );
    if (!limits.sizes.length) options.push(element("option", { value: "custom" }, "Other…"));
    this.select.replaceChildren(...options);
    for (const [input, side] of [[this.width, limits.width], [this.height, limits.height]]) {
      Object.assign(input, { min: limits.size_multiple, step: limits.size_multiple, value: side });
    }
    if (before) this.set(before);
    this.arrange();
  }

  /** "64x64". */
  get value() {
    if (!this.limits) return "";
    return this.select.value === "custom" ? `${this.width.value}x${this.height.value}` : this.select.value;
  }

  /** A size that is not offered becomes two numbers; where only some sizes exist, the model's own. */
  set(value) {
    this.select.value = value;
    if (this.select.selectedIndex < 0) {
      this.select.value = this.limits.sizes.length ? this.select.options[0].value : "custom";
      [this.width.value, this.height.value] = value.split("x");
    }
    this.arrange();
  }

  /** The two numbers, off while they do not count: a wrong one that is not seen must not hold the form. */
  arrange() {
    const isCustom = this.select.value === "custom";
    this.custom.hidden = !isCustom;
    this.width.disabled = this.height.disabled = !isCustom;
  }
}
