// The tabs: one for each kind of model. The address remembers which is shown; a kind that nobody serves says so.

class Tabs {
  /** `panels` are shown one at a time; `onSelect(panel)` hears which. */
  constructor(panels, onSelect) {
    this.onSelect = onSelect;
    this.tabs = panels.map((panel) => {
      const button = byId(`tab-${panel.kind}`);
      const tab = { panel, button, node: byId(`panel-${panel.kind}`), why: button.querySelector(".why") };
      button.addEventListener("click", () => this.choose(tab));
      button.addEventListener("keydown", (event) => this.move(event, tab));
      return tab;
    });
    window.addEventListener("hashchange", () => this.show(this.named() ?? this.shown));
    this.show(this.named() ?? this.tabs[0]);
  }

  get panel() {
    return this.shown.panel;
  }

  /** The models that are served; without any, or before they are known, every tab can be looked at. */
  serve(models) {
    const isServed = ({ panel }) => models.some((model) => kindOf(model) === panel.kind);
    const hasAny = this.tabs.some(isServed);
    for (const tab of this.tabs) {
      const isOff = hasAny && !isServed(tab);
      tab.button.setAttribute("aria-disabled", String(isOff));
      tab.why.textContent = isOff ? `This server has no ${tab.panel.kind} model.` : "";
    }
    const wanted = this.named() ?? this.shown;
    this.show(this.isOff(wanted) ? this.tabs.find((tab) => !this.isOff(tab)) : wanted);
  }

  /** A dot on the tab of a panel that is at work; it stays until its results were looked at. */
  mark(kind) {
    const tab = this.tabs.find(({ panel }) => panel.kind === kind);
    const { classList } = tab.button;
    const { isRunning } = tab.panel;
    if (classList.contains("busy") && !isRunning && tab !== this.shown) classList.add("news");
    classList.toggle("busy", isRunning);
  }

  choose(tab) {
    if (this.isOff(tab)) return;
    history.replaceState(null, "", `#${tab.panel.name}`);
    this.show(tab);
  }

  show(tab) {
    if (this.isOff(tab)) return;
    this.shown = tab;
    for (const each of this.tabs) {
      each.node.hidden = each !== tab;
      each.button.setAttribute("aria-selected", String(each === tab));
      each.button.tabIndex = each === tab ? 0 : -1;
    }
    tab.button.classList.remove("news");
    this.onSelect(tab.panel);
  }

  /** Arrow keys, Home and End go from tab to tab; one that is off gets the focus, so that its reason can be read. */
  move(event, tab) {
    const at = this.tabs.indexOf(tab);
    const last = this.tabs.length - 1;
    const to = { ArrowLeft: at ? at - 1 : last, ArrowRight: at < last ? at + 1 : 0, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(this.tabs[to]);
    this.tabs[to].button.focus();
  }

  named() {
    return this.tabs.find(({ panel }) => `#${panel.name}` === location.hash);
  }

  isOff(tab) {
    return tab.button.getAttribute("aria-disabled") === "true";
  }
}

const kindOf = (model) => model.kind ?? "text";
