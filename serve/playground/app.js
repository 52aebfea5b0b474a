// The page around the panels: models, tabs (one for each kind of model that is served), API key, settings drawer.

class App {
  constructor() {
    this.api = new Api();
    this.settings = new Settings();
    this.models = [];
    this.picker = byId("model");
    this.chosen = new Store("localStorage", "model");
    const chat = new Chat({
      api: this.api,
      settings: this.settings,
      model: () => (this.models.length ? this.picker.value : null),
      askForKey: (reason, retry) => this.askForKey(reason, retry),
    });
    this.tabs = [{ kind: "text", title: "Chat", node: byId("panel-text"), panel: chat }];
    this.tab = this.tabs[0];

    byId("new-chat").addEventListener("click", () => this.tab.panel.clear());
    byId("open-key").addEventListener("click", () => this.askForKey());
    byId("toggle-settings").addEventListener("click", () => this.showSettings(byId("settings").hidden));
    byId("close-settings").addEventListener("click", () => this.showSettings(false));
    this.picker.addEventListener("change", () => {
      this.chosen.set(this.picker.value);
      this.describe();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || byId("key-dialog").open) return;
      if (this.tab.panel.isRunning) this.tab.panel.stop();
      else if (isNarrow()) this.showSettings(false);
    });
    if (matchMedia("(min-width: 75rem)").matches) this.showSettings(true);
    this.markKey();
    this.load();
  }

  async load() {
    try {
      this.models = await this.api.models();
    } catch (error) {
      this.models = [];
      if (error.status === 401) this.askForKey(error.message);
      byId("welcome-model").textContent = error.message;
    }
    const kinds = this.tabs.filter(({ kind }) => this.models.some((model) => kindOf(model) === kind));
    byId("tabs").hidden = kinds.length < 2;
    byId("tabs").replaceChildren(...kinds.map((tab) => this.tabButton(tab)));
    this.select(kinds[0] ?? this.tabs[0]);
  }

  tabButton(tab) {
    const onclick = () => this.select(tab);
    return element("button", { type: "button", role: "tab", "aria-controls": tab.node.id, onclick }, tab.title);
  }

  select(tab) {
    this.tab = tab;
    for (const { node } of this.tabs) node.hidden = node !== tab.node;
    for (const button of byId("tabs").children) {
      button.setAttribute("aria-selected", String(button.getAttribute("aria-controls") === tab.node.id));
    }
    const names = this.models.filter((model) => kindOf(model) === tab.kind).map(({ id }) => id);
    this.picker.replaceChildren(...(names.length ? names : ["No model"]).map((id) => element("option", {}, id)));
    this.picker.disabled = names.length < 2;
    if (names.includes(this.chosen.value)) this.picker.value = this.chosen.value;
    this.describe();
  }

  describe() {
    const model = this.models.find(({ id }) => id === this.picker.value);
    if (model) {
      const length = model.max_model_len ? ` · ${model.max_model_len.toLocaleString("en")} tokens of context` : "";
      byId("welcome-model").textContent = `${model.id}${length}`;
    }
    this.tab.panel.refresh();
  }

  showSettings(isShown) {
    byId("settings").hidden = !isShown;
    byId("toggle-settings").setAttribute("aria-expanded", String(isShown));
    if (isNarrow()) (isShown ? byId("close-settings") : byId("toggle-settings")).focus();
  }

  /** Open the key dialog; `retry` runs once there is another key. */
  askForKey(reason = "", retry = () => {}) {
    const dialog = byId("key-dialog");
    if (reason) byId("key-reason").textContent = reason;
    byId("key").value = this.api.key.value ?? "";
    byId("key-cancel").onclick = () => dialog.close();
    byId("key-form").onsubmit = async () => {
      this.api.key.set(byId("key").value.trim() || null);
      this.markKey();
      await this.load();
      retry();
    };
    if (!dialog.open) dialog.showModal();
    byId("key").select();
  }

  markKey() {
    byId("open-key").classList.toggle("marked", this.api.key.value !== null);
  }
}

const kindOf = (model) => model.kind ?? "text";
const isNarrow = () => matchMedia("(max-width: 52rem)").matches;

new App();
