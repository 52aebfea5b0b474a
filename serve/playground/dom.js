// Elements without innerHTML: what users and models write only ever becomes text nodes.

const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `onclick`, any attribute) and children (elements or strings). */
function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

function iconButton(name, label, onclick) {
  return element("button", { class: "icon", type: "button", title: label, "aria-label": label, onclick }, icon(name));
}

/** A button that copies what `text()` gives and shows that it did. */
function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { class: "unseen" }); // plain http on another machine has no clipboard API
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** What went wrong, in the server's own words, with a button that tries again. */
function failure(error, again) {
  const about = [error.status, error.code || error.type].filter(Boolean).join(" · ");
  const button = element("button", { class: "quiet", type: "button", onclick: again }, "Try again");
  const said = [error.message, about].map((text) => element("p", {}, text));
  return element("div", { class: "error", role: "alert" }, ...said, button);
}

function announce(message) {
  byId("status").textContent = message;
}

function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

const rounded = (value) => (value < 10 ? value.toFixed(1) : String(Math.round(value)));

const duration = (ms) => (ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(1)} s`);

/** localStorage or sessionStorage that may be switched off: then values live as long as the page. */
class Store {
  constructor(storage, name) {
    this.name = `tandem.${name}`;
    this.value = null;
    try {
      this.storage = window[storage];
      this.value = this.storage.getItem(this.name);
    } catch {
      this.storage = null;
    }
  }

  set(value) {
    this.value = value;
    try {
      if (value === null) this.storage?.removeItem(this.name);
      else this.storage?.setItem(this.name, value);
    } catch {
      // full or forbidden: the value lives as long as the page
    }
  }
}
