// The page around the panels: models, tabs, API key, settings drawer.

class App {
  constructor() {
    this.api = new Api();
    this.models = [];
    this.picker = byId("model");
    this.chosen = { text: new Store("localStorage", "model"), image: new Store("localStorage", "image-model") };
    this.panels = [new Chat(this.given("text")), new Images(this.given("image"))];
    this.tabs = new Tabs(this.panels, (panel) => this.shown(panel));

    byId("new-chat").addEventListener("click", () => this.panels[0].clear());
    byId("open-key").addEventListener("click", () => this.askForKey());
    byId("toggle-settings").addEventListener("click", () => this.showSettings(byId("settings").hidden));
    byId("close-settings").addEventListener("click", () => this.showSettings(false));
    byId("reset-settings").addEventListener("click", () => this.tabs.panel.settings.fill({}));
    this.picker.addEventListener("change", () => {
      const { panel } = this.tabs;
      this.chosen[panel.kind].set(this.picker.value);
      panel.describe(this.model(panel.kind));
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (this.tabs.panel.isRunning) this.tabs.panel.stop();
      else if (isNarrow()) this.showSettings(false);
    });
    if (matchMedia("(min-width: 75rem)").matches) this.showSettings(true);
    this.tabs.panel.focus();
    this.markKey();
    this.load();
  }

  /** What the panel of a kind is given. */
  given(kind) {
    return {
      kind,
      api: this.api,
      model: () => this.model(kind)?.id ?? null,
      askForKey: (reason, retry) => this.askForKey(reason, retry),
      onChange: () => this.tabs.mark(kind),
    };
  }

  async load() {
    let reason = "";
    try {
      this.models = await this.api.models();
    } catch (error) {
      this.models = [];
      reason = error.message;
      if (error.status === 401) this.askForKey(reason);
    }
    for (const panel of this.panels) panel.describe(this.model(panel.kind), reason);
    this.tabs.serve(this.models);
  }

  /** The model chosen among those of a kind; null when none is served. */
  model(kind) {
    const served = this.models.filter((model) => kindOf(model) === kind);
    return served.find(({ id }) => id === this.chosen[kind].value) ?? served[0] ?? null;
  }

  shown(panel) {
    const names = this.models.filter((model) => kindOf(model) === panel.kind).map(({ id }) => id);
    this.picker.replaceChildren(...(names.length ? names : ["No model"]).map((id) => element("option", {}, id)));
    this.picker.disabled = names.length < 2;
    if (names.length) this.picker.value = this.model(panel.kind).id;
    byId("new-chat").hidden = panel.kind !== "text";
    for (const each of this.panels) each.settings.form.hidden = each !== panel;
    panel.refresh();
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

const isNarrow = () => matchMedia("(max-width: 52rem)").matches;

new App();
