/* The second half of the page's script: the theme button, and the list of what was found. */

const ROW = 80; // pixels, as .row in page.css
const SPARE = 6; // rows drawn beyond what is seen

function theme() {
  const button = byId("theme");
  const order = ["auto", "light", "dark"];
  const show = (which) => {
    document.documentElement.dataset.theme = which;
    button.textContent = "Theme: " + which;
  };
  let now = "auto";
  try {
    now = localStorage.getItem("aif-theme") || now;
  } catch { /* a browser may keep files from storing anything */ }
  show(order.includes(now) ? now : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(document.documentElement.dataset.theme) + 1) % 3];
    show(next);
    try {
      localStorage.setItem("aif-theme", next);
    } catch { /* then it holds for this visit */ }
  });
}

/* ---- the list, of which only what is seen is in the document ---- */

class Browser {
  constructor(data) {
    this.data = data;
    this.search = new Search(data);
    this.list = byId("list");
    this.detail = byId("detail");
    this.form = byId("filters");
    this.kind = Object.keys(data.counts)[0];
    this.items = [];
    this.at = 0;
    byId("unscripted").remove();
    byId("browser").hidden = false;
    this.faults();
    this.listen();
    if (!this.fromHash()) this.refresh();
  }

  faults() {
    const seen = new Set();
    for (const kind of Object.keys(this.data.counts)) {
      for (const item of this.data[kind]) KINDS[kind].faults(item).forEach((f) => f && seen.add(f));
    }
    for (const fault of [...seen].sort()) {
      const option = make("option", "", fault);
      option.value = "=" + fault; // so that no fault's name is taken for one of the other choices
      this.form.fault.append(option);
    }
  }

  get filters() {
    const { principle, disagreement, confidence, fault } = this.form;
    return {
      principle: principle.value === "" ? null : Number(principle.value),
      disagreement: disagreement.value, confidence: confidence.value, fault: fault.value,
    };
  }

  listen() {
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () => {
      this.kind = this.form.kind.value;
      this.at = 0;
      this.refresh();
    });
    this.form.addEventListener("reset", () => setTimeout(() => this.refresh()));
    this.list.addEventListener("scroll", () => this.draw());
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.select(Number(row.dataset.at));
    });
    byId("previous").addEventListener("click", () => this.select(this.at - 1));
    byId("next").addEventListener("click", () => this.select(this.at + 1));
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("hashchange", () => this.fromHash());
    addEventListener("resize", () => this.draw());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea, summary, button, a");
    const inside = event.target.closest("#browse");
    const { key } = event;
    if (key === "Escape" && inside) {
      this.list.focus();
    } else if (key === "/" && !typing && (inside || event.target === document.body)) {
      this.form.words.focus();
      this.form.words.select();
    } else if (key === "Enter" && event.target === this.list) {
      this.detail.focus();
    } else if (key === "Enter" && event.target === this.form.words) {
      this.list.focus();
    } else if (event.target === this.list || (event.target === this.detail && "jk".includes(key))) {
      const page = Math.max(1, Math.floor(this.list.clientHeight / ROW) - 1);
      const moves = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page,
        Home: -Infinity, End: Infinity };
      if (!(key in moves)) return;
      this.select(this.at + moves[key]);
    } else {
      return;
    }
    event.preventDefault();
  }

  /* Look for what the form asks for, and show it from the first on. */
  refresh() {
    this.kind = this.form.kind.value;
    byId("of-comparisons").disabled = this.kind !== "comparisons";
    this.items = this.search.found(this.kind, this.form.words.value, this.filters);
    this.at = Math.min(this.at, Math.max(0, this.items.length - 1));
    const all = this.data[this.kind].length;
    const found = this.items.length === all ? "" : number(this.items.length) + " of ";
    byId("hits").textContent = found + number(all) + " " + this.kind;
    this.list.scrollTop = 0;
    byId("room").style.height = this.items.length * ROW + "px";
    this.draw();
    this.show();
  }

  draw() {
    const { scrollTop, clientHeight } = this.list;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - SPARE);
    const last = Math.min(this.items.length, Math.ceil((scrollTop + clientHeight) / ROW) + SPARE);
    const rows = [];
    for (let n = first; n < last; n++) rows.push(this.row(n));
    byId("room").replaceChildren(...rows);
    if (this.items.length) this.list.setAttribute("aria-activedescendant", "row-" + this.at);
    else this.list.removeAttribute("aria-activedescendant");
  }

  row(n) {
    const item = this.items[n];
    const last = item.prompt.length ? this.data.texts[item.prompt.at(-1)[1]] : item.id;
    const line = (name, text) => make("span", name, make("bdi", "", text.slice(0, 200)));
    const title = line("start", last);
    const told = make("span", "told");
    let more = "";
    if (this.kind === "comparisons") {
      const { principle } = this.filters;
      more = this.data.texts[item.first];
      const why = item.labelled ? item.fault || "a call failed" : null;
      told.append(probability(worth(item, principle), why));
      for (const flag of flags(item, principle)) told.append(make("span", "chip", flag));
    } else {
      const held = this.kind === "revisions" ? item.rounds : item.rows;
      more = this.data.texts[KINDS[this.kind].texts(item).find((n) => n !== null)];
      const lost = held.filter((one) => one.fault).length;
      told.append(held.length + (this.kind === "revisions" ? " rounds" : " answers"));
      if (lost) told.append(make("span", "chip", lost + " with a fault"));
    }
    const row = make("div", "row", title, line("more", more ?? ""), told);
    row.id = "row-" + n;
    row.dataset.at = n;
    row.style.transform = "translateY(" + n * ROW + "px)";
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", n === this.at);
    row.setAttribute("aria-posinset", n + 1);
    row.setAttribute("aria-setsize", this.items.length);
    return row;
  }

  /* Go to the nth of what was found, and let the address remember it. */
  select(n) {
    if (!this.items.length) return;
    this.at = Math.max(0, Math.min(this.items.length - 1, n));
    const top = this.at * ROW;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    const under = top + ROW - this.list.clientHeight;
    if (under > this.list.scrollTop) this.list.scrollTop = under;
    this.draw();
    this.show();
    const { id } = this.items[this.at];
    history.replaceState(null, "", "#item=" + this.kind + ":" + id.slice(0, 16));
  }

  show() {
    const item = this.items[this.at];
    byId("previous").disabled = this.at === 0;
    byId("next").disabled = this.at >= this.items.length - 1;
    if (!item) {
      this.detail.replaceChildren(make("p", "quiet", "Nothing found."));
      return;
    }
    const place = " " + number(this.at + 1) + " of " + number(this.items.length) + " ";
    const id = make("code", "", item.id.slice(0, 16));
    const head = make("h3", "", KINDS[this.kind].one + place, id);
    this.detail.replaceChildren(head, ...SHOWN[this.kind](this.data, item));
    this.detail.scrollTop = 0;
  }

  /* Show the item that the address names; false if it names none of this page. */
  fromHash() {
    const named = /^#item=(\w+):(\w+)$/.exec(location.hash);
    if (!named || !(named[1] in this.data.counts)) return false;
    const at = this.data[named[1]].findIndex((item) => item.id.startsWith(named[2]));
    if (at < 0) return false;
    for (const key of ["words", "principle", "disagreement", "confidence", "fault"]) {
      this.form[key].value = "";
    }
    this.form.kind.value = named[1];
    this.refresh();
    this.select(at);
    byId("browse").scrollIntoView();
    return true;
  }
}

theme();
if (byId("data")) new Browser(JSON.parse(byId("data").textContent));
