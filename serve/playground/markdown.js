// The little Markdown that answers need while they stream: paragraphs, headings, lists, fenced code, `code`, **bold**.
// Everything else stays as it was written.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const BULLET = /^\s{0,3}[-*+]\s+(.*)$/;
const NUMBER = /^\s{0,3}(\d{1,9})[.)]\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*?)\s*#*$/;

/** Text to blocks: {type, text, …}. A block that is complete never changes when more text comes. */
function blocks(text) {
  const found = [];
  let fence = null;
  let open = null;
  const start = (block) => {
    open = block;
    found.push(block);
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && mark[1][0] === fence[0] && mark[1].length >= fence.length && !mark[2]) fence = open = null;
      else open.text += (open.text || open.hasLine ? "\n" : "") + line, (open.hasLine = true);
    } else if (mark) {
      fence = mark[1];
      start({ type: "code", language: mark[2], text: "" });
    } else if (!line.trim()) {
      open = null;
    } else if (HEADING.test(line)) {
      start({ type: "heading", text: HEADING.exec(line)[1] });
      open = null;
    } else if (BULLET.test(line) || NUMBER.test(line)) {
      const number = NUMBER.exec(line);
      const type = number ? "ol" : "ul";
      if (open?.type !== type) start({ type, start: number ? Number(number[1]) : 1, items: [] });
      open.items.push(number ? number[2] : BULLET.exec(line)[1]);
    } else if (open?.items) {
      open.items.push(`${open.items.pop()}\n${line.trim()}`);
    } else if (open) {
      open.text += `\n${line}`;
    } else {
      start({ type: "paragraph", text: line });
    }
  }
  return found;
}

/** Shows a growing text in `container`; only the blocks that changed are made anew. */
class Markdown {
  constructor(container) {
    this.container = container;
    this.shown = [];
  }

  update(text) {
    const next = blocks(text).map((block) => ({ block, key: JSON.stringify(block) }));
    next.forEach(({ block, key }, index) => {
      if (this.shown[index] === key) return;
      const old = this.container.children[index];
      if (old && block.type === "code" && old.matches(".code") && old.dataset.language === block.language) {
        old.querySelector("code").textContent = block.text; // keeps the scroll position and the button
      } else if (old) {
        old.replaceWith(render(block));
      } else {
        this.container.append(render(block));
      }
    });
    while (this.container.children.length > next.length) this.container.lastChild.remove();
    this.shown = next.map(({ key }) => key);
  }
}

function render(block) {
  if (block.type === "heading") return element("h3", {}, ...inline(block.text));
  if (block.items) {
    const items = block.items.map((item) => element("li", {}, ...inline(item)));
    return element(block.type, block.type === "ol" ? { start: block.start } : {}, ...items);
  }
  if (block.type === "code") {
    const code = element("code", {}, block.text);
    return element(
      "div",
      { class: "code", "data-language": block.language },
      element("div", { class: "code-head" }, block.language || "code", copyButton("Copy code", () => code.textContent)),
      element("pre", { tabindex: "0" }, code),
    );
  }
  return element("p", {}, ...inline(block.text));
}

/** `code` and **bold** as elements, everything between them as text. */
function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(/(`+)([^`]+?)\1(?!`)|\*\*(?=\S)([^*]+?)\*\*/g)) {
    parts.push(text.slice(end, match.index));
    parts.push(match[1] ? element("code", {}, match[2]) : element("strong", {}, match[3]));
    end = match.index + match[0].length;
  }
  parts.push(text.slice(end));
  return parts;
}
