"use strict";
/* The first half of the page's script: which items there are, how they are searched, how one looks.
   Every text enters the document by textContent or append, never as markup. */

const SURE = [0.3, 0.7]; // a label outside of these names its winner with some certainty
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
const sign = (p) => Math.sign(p - 0.5);
const number = (value) => value.toLocaleString("en");
const differ = (a, b) => a != null && b != null && sign(a) * sign(b) < 0;

/* An element of a class with children; a string among them becomes text. */
function make(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/* A text of a stranger: shown as it is, and unable to turn the direction of what is around it. */
function quoted(text, name = "text") {
  const node = make("div", name, text);
  node.dir = "auto";
  return node;
}

/* ---- what there is, and which of it is looked for ---- */

/* Of each kind: what one is called, which texts it has besides its prompt, and which faults. */
const KINDS = {
  comparisons: {
    one: "Comparison",
    texts: (item) => [item.first, item.second, ...item.verdicts.map((v) => v[3])],
    faults: (item) => [item.fault, ...item.verdicts.map((v) => v[4])],
  },
  revisions: {
    one: "Revision",
    texts: (item) => [item.response, ...item.rounds.flatMap((r) => [r.critique, r.revision])],
    faults: (item) => item.rounds.map((r) => r.fault),
  },
  answers: {
    one: "Prompt",
    texts: (item) => item.rows.map((r) => r.text),
    faults: (item) => item.rows.map((r) => r.fault),
  },
};

/* The winner of the two orders of each principle differs, or of the one principle. */
function ordersDiffer(item, principle) {
  const seen = new Map();
  return item.verdicts.some(([which, order, p]) => {
    if ((principle !== null && which !== principle) || order.length !== 2) return false;
    const before = seen.get(which);
    seen.set(which, p);
    return differ(before, p);
  });
}

function principlesDiffer(item, principle) {
  if (principle !== null) return differ(item.by[principle], item.p);
  return item.by.some((p) => p > 0.5) && item.by.some((p) => p !== null && p < 0.5);
}

/* The label's probability, or that of one principle. */
function worth(item, principle) {
  return principle === null ? item.p : (item.by[principle] ?? null);
}

class Search {
  constructor(data) {
    this.data = data;
    this.lower = data.texts.map((text) => text.toLowerCase());
    this.indices = {};
    for (const kind of Object.keys(data.counts)) {
      this.indices[kind] = data[kind].map((item) =>
        [...item.prompt.map((m) => m[1]), ...KINDS[kind].texts(item)].filter((n) => n !== null));
    }
  }

  /* The items of a kind that have the words and pass every filter. */
  found(kind, words, filters) {
    const wanted = words.toLowerCase();
    const hit = wanted && Uint8Array.from(this.lower, (text) => text.includes(wanted));
    return this.data[kind].filter((item, n) =>
      (!wanted || this.indices[kind][n].some((t) => hit[t]) || item.id.startsWith(wanted)) &&
      this.passes(kind, item, filters));
  }

  passes(kind, item, { principle, disagreement, confidence, fault }) {
    if (fault) {
      const faults = KINDS[kind].faults(item);
      if (fault === "-" ? faults.some(Boolean) : fault === "+" ? !faults.some(Boolean)
        : fault === "null" ? !item.fault : !faults.includes(fault.slice(1))) return false;
    }
    if (kind !== "comparisons") return true;
    const p = worth(item, principle);
    if (principle !== null && !item.verdicts.some((v) => v[0] === principle)) return false;
    if (disagreement === "principles" && !principlesDiffer(item, principle)) return false;
    if (disagreement === "orders" && !ordersDiffer(item, principle)) return false;
    if (disagreement === "people" && !differ(p, item.human)) return false;
    if (!confidence) return true;
    return p !== null && (confidence === "sure") === (p < SURE[0] || p > SURE[1]);
  }
}

/* What a call showed the judge. */
const CALLS = {
  ab: "first,\u00a0second", ba: "second,\u00a0first", a: "first\u00a0alone", b: "second\u00a0alone",
};

/* ---- how an item looks ---- */

/* From the middle towards the response that is preferred: the first is on the left. */
function bar(p) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 8");
  svg.setAttribute("class", "bar");
  svg.setAttribute("aria-hidden", "true");
  const parts = [["track", 0, 100], ["value", Math.min(1 - p, 0.5) * 100, Math.abs(p - 0.5) * 100],
    ["middle", 49.5, 1]];
  for (const [name, x, width] of parts) {
    const rect = document.createElementNS(SVG, "rect");
    for (const [key, value] of Object.entries({ class: name, x, y: 0, width, height: 8 })) {
      rect.setAttribute(key, value);
    }
    svg.append(rect);
  }
  return svg;
}

const side = (p) => ["second", "even", "first"][sign(p) + 1];

/* Which response a probability speaks for and how strongly, or why there is none. */
function probability(p, fault) {
  if (p === null) return make("span", "fault", fault ? "null: " + fault : "no label");
  return make("span", "p", bar(p), " ", side(p), " ", Math.max(p, 1 - p).toFixed(2));
}

function messages(data, prompt) {
  const box = make("div", "prompt");
  for (const [role, text] of prompt) {
    box.append(make("p", "role", role), quoted(data.texts[text]));
  }
  if (!prompt.length) box.append(make("p", "quiet", "The prompt is not in prompts.jsonl."));
  return box;
}

function words(text) {
  return number(text.split(/\s+/).filter(Boolean).length) + " words";
}

function table(heads, rows) {
  const head = make("tr", "", ...heads.map((text) => {
    const cell = make("th", "", text);
    cell.scope = "col";
    return cell;
  }));
  const body = rows.map((cells) => make("tr", "", ...cells.map((held, n) => {
    const cell = make(n ? "td" : "th", "", held);
    if (!n) cell.scope = "row";
    return cell;
  })));
  const parts = [make("thead", "", head), make("tbody", "", ...body)];
  const scroller = make("div", "scroll", make("table", "", ...parts));
  scroller.tabIndex = 0;
  scroller.setAttribute("role", "region");
  scroller.setAttribute("aria-label", heads[0] + ", table");
  return scroller;
}

function response(data, name, text, told) {
  const box = make("section", "response", make("h4", "", name));
  box.append(text === null ? make("p", "fault", "no text") : quoted(data.texts[text]));
  const facts = [text === null ? null : words(data.texts[text]), ...told].filter(Boolean);
  box.append(make("p", "quiet", facts.join(" \u00b7 ")));
  return box;
}

function comparison(data, item) {
  const wins = item.p === null ? 0 : sign(item.p);
  const facts = make("p", "facts", probability(item.p, item.labelled ? item.fault : null));
  if (item.human !== null) facts.append(make("span", "chip", "people: " + side(item.human)));
  for (const flag of flags(item, null)) facts.append(make("span", "chip", flag));
  const pair = make("div", "pair",
    response(data, "First response", item.first, [wins > 0 ? "preferred" : null]),
    response(data, "Second response", item.second, [wins < 0 ? "preferred" : null]));
  const rows = item.by.flatMap((p, n) => {
    const own = item.verdicts.filter((v) => v[0] === n);
    return own.map(([, order, each, text, fault], place) => [
      make("span", place ? "again" : "", data.principles[n]),
      place ? "" : probability(p, "a call failed"),
      CALLS[order] ?? order,
      each === null ? make("span", "fault", fault || "null") : each.toFixed(3),
      text === null ? "" : quoted(data.texts[text], "raw"),
    ]);
  });
  const parts = [facts, make("h4", "", "Prompt"), messages(data, item.prompt), pair];
  if (rows.length) {
    parts.push(make("h4", "", "Verdicts"),
      table(["Principle", "Comes to", "Shown", "p_first", "The judge said"], rows));
  }
  return parts;
}

/* What is odd about a comparison, in a few words each. */
function flags(item, principle) {
  return [
    principlesDiffer(item, principle) && (principle === null ? "principles differ" : "not as all"),
    ordersDiffer(item, principle) && "orders differ",
    differ(worth(item, principle), item.human) && "against people",
  ].filter(Boolean);
}

function revision(data, item) {
  const parts = [make("h4", "", "Prompt"), messages(data, item.prompt),
    response(data, "Response", item.response, [])];
  item.rounds.forEach((round, n) => {
    const told = [round.fault ? "fault: " + round.fault : null,
      round.p === null ? null : "better than the response: " + round.p.toFixed(2),
      round.kept === null ? null : round.kept ? "kept" : "not kept"];
    const box = make("section", "round");
    box.append(make("h4", "", "Round " + (n + 1) + ": " + round.principle));
    for (const part of ["critique", "revision"]) {
      const text = round[part];
      box.append(make("p", "role", part),
        text === null ? make("p", "fault", round.fault || "no text") : quoted(data.texts[text]));
    }
    box.append(make("p", "quiet", told.filter(Boolean).join(" \u00b7 ")));
    parts.push(box);
  });
  return parts;
}

function answers(data, item) {
  const shown = item.rows.map((row) => {
    const told = ["score", "gold", "kl"].filter((key) => key in row)
      .map((key) => key + " " + row[key].toFixed(key === "kl" ? 2 : 3));
    return response(data, row.policy, row.text,
      [row.fault ? "fault: " + row.fault : null, ...told, row.refusal ? "declines" : null]);
  });
  return [make("h4", "", "Prompt"), messages(data, item.prompt), make("div", "pair", ...shown)];
}

const SHOWN = { comparisons: comparison, revisions: revision, answers: answers };
