// One traced step as a picture: what attention and FFN workers did, layer by layer and ubatch by ubatch, on one time line.

import { ask, json } from "./api.js";
import { model } from "./chat.js";
import { latest } from "./pools.js";
import { draw, make } from "./text.js";

const at = (id) => document.getElementById(id);
const NUM_SAMPLES = 4;
const SAMPLE_LEAD_MS = 400; // until the sample's prompt is read and its tokens are under way
const BAR = 24;
const LABEL = 15;
const GAP = 22; // between lanes, for what crosses
const WORDS = { attend: "attention", send: "rows leave", receive: "waits for the FFN", combine: "adds the result", sample: "head and sampler", compute: "FFN", rows: "rows here" };

let traced = null;
let zoom = 1;
let from = 0; // share of the step at the window's left

const short = (worker) => worker.split("/").slice(1).join("/") || worker;
const span = (us) => (us >= 10000 ? `${(us / 1000).toFixed(1)} ms` : us >= 1000 ? `${(us / 1000).toFixed(2)} ms` : `${us.toFixed(0)} µs`);
// Who holds whole layers computes the FFN itself: between sending and receiving it waits for nobody.
const waitsForFfn = (lane) => lane.role === "attention";
const own = (lane) => ["attend", "combine", "sample", "send", ...(waitsForFfn(lane) ? [] : ["receive"])];
const isFfn = (lane) => lane.events.some((event) => event.mark === "compute");
const sum = (events, marks) => events.filter((event) => marks.includes(event.mark)).reduce((all, event) => all + event.end_us - event.start_us, 0);

// A batch has no ubatch of its own: it is that of the rows whose wait ended with it.
function batches(lane) {
  const rows = lane.events.filter((event) => event.mark === "rows");
  return lane.events
    .filter((event) => event.mark === "compute")
    .map((batch) => {
      const mine = rows.filter((each) => each.layer === batch.layer && each.end_us >= batch.start_us && each.end_us <= batch.end_us + 0.2);
      const ubatches = [...new Set(mine.map((each) => each.ubatch))];
      return { ...batch, ubatch: ubatches[0] ?? 0, mixed: ubatches.length > 1 || new Set(mine.map((each) => each.peer)).size > 1 };
    });
}

function blocks(lane) {
  const shown = isFfn(lane) ? batches(lane) : lane.events.filter((event) => event.mark !== "rows");
  const word = (event) => (event.mark === "receive" && !waitsForFfn(lane) ? "FFN, in this process" : WORDS[event.mark]);
  return shown.map((event) => ({ ...event, word: word(event), kind: event.mixed ? "compute both" : `${event.mark}${event.ubatch % 2 && ["attend", "compute"].includes(event.mark) ? " odd" : ""}` }));
}

function titled(event) {
  const place = event.mark === "sample" ? "" : `, layer ${event.layer}${event.mixed ? "" : `, ubatch ${event.ubatch}`}`;
  return `${event.word}${place}: ${span(event.end_us - event.start_us)}${event.rows ? `, ${event.rows} rows` : ""}`;
}

function picture(step, width) {
  const window_us = step.duration_us / zoom;
  const start_us = from * step.duration_us;
  const x = (us) => ((us - start_us) / window_us) * width;
  const tops = new Map(step.lanes.map((lane, i) => [lane.worker, i * (LABEL + BAR + GAP)]));
  const height = step.lanes.length * (LABEL + BAR + GAP) + 4;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": summary(step) });
  const tick_us = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 1e5, 1e6].find((each) => window_us / each <= width / 80) ?? 1e6;
  for (let us = Math.ceil(start_us / tick_us) * tick_us; us <= start_us + window_us; us += tick_us) {
    svg.append(draw("line", { class: "grid", x1: x(us), x2: x(us), y1: LABEL, y2: height - 14 }));
    if (x(us) < width - 52) svg.append(Object.assign(draw("text", { class: "soft", x: x(us) + 2, y: height - 4 }), { textContent: span(us) }));
  }
  const sent = new Map();
  for (const lane of step.lanes) {
    const top = tops.get(lane.worker);
    svg.append(Object.assign(draw("text", { x: 0, y: top + 11 }), { textContent: `${short(lane.worker)} · ${lane.role}` }));
    svg.append(draw("rect", { class: "lane", x: 0, y: top + LABEL, width, height: BAR, rx: 4 }));
    for (const event of blocks(lane)) {
      if (event.end_us < start_us || event.start_us > start_us + window_us) continue;
      const left = Math.max(0, x(event.start_us));
      const wide = Math.max(0.6, Math.min(width, x(event.end_us)) - left);
      const thin = event.mark === "send" ? 8 : 0;
      const block = draw("rect", { class: event.kind, x: left, y: top + LABEL + thin, width: wide, height: BAR - 2 * thin, rx: Math.min(3, wide / 4) });
      block.append(Object.assign(draw("title"), { textContent: titled(event) }));
      svg.append(block);
      const name = event.mark === "sample" ? "head" : `L${event.layer}${event.mixed ? "" : `·${event.ubatch}`}`;
      if (wide > 7 * name.length && ["attend", "compute", "sample"].includes(event.mark)) {
        svg.append(Object.assign(draw("text", { class: "inside", x: left + wide / 2, y: top + LABEL + BAR / 2 + 4, "text-anchor": "middle" }), { textContent: name }));
      }
    }
    for (const event of lane.events) {
      const exchange = `${event.step}/${event.layer}/${event.ubatch}`;
      if (event.mark === "send") sent.set(`${lane.worker}/${exchange}/out`, event.start_us);
      if (event.mark === "receive") sent.set(`${lane.worker}/${exchange}/in`, event.end_us);
    }
  }
  for (const lane of step.lanes.filter(isFfn)) {
    const there = tops.get(lane.worker) + LABEL;
    for (const rows of lane.events.filter((event) => event.mark === "rows")) {
      const here = tops.get(rows.peer);
      const exchange = `${rows.peer}/${rows.step}/${rows.layer}/${rows.ubatch}`;
      if (here === undefined || rows.end_us < start_us || rows.start_us > start_us + window_us) continue;
      const out = sent.get(`${exchange}/out`);
      const back = sent.get(`${exchange}/in`);
      const below = here + LABEL + BAR;
      if (out !== undefined) svg.append(draw("line", { class: "away", x1: x(out), y1: below, x2: x(rows.start_us), y2: there }));
      if (back !== undefined) svg.append(draw("line", { class: "away back", x1: x(rows.end_us), y1: there, x2: x(back), y2: below }));
    }
  }
  return svg;
}

function overview(step, width) {
  const high = 7;
  const height = step.lanes.length * (high + 2) + 4;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  step.lanes.forEach((lane, i) => {
    for (const event of blocks(lane)) {
      const left = (event.start_us / step.duration_us) * width;
      svg.append(draw("rect", { class: event.kind, x: left, y: 2 + i * (high + 2), width: Math.max(0.4, ((event.end_us - event.start_us) / step.duration_us) * width), height: high }));
    }
  });
  svg.append(draw("rect", { class: "window", x: from * width, y: 0.5, width: width / zoom - 1, height: height - 1, rx: 3 }));
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    look((event.clientX - box.left) / box.width - 0.5 / zoom, zoom);
  };
  svg.addEventListener("pointerdown", (event) => move(event));
  svg.addEventListener("pointermove", (event) => event.buttons && move(event));
  return svg;
}

function summary(step) {
  const parts = step.lanes.map((lane) => {
    const share = (us) => `${Math.round((100 * us) / step.duration_us)} %`;
    const ffn = isFfn(lane);
    const works = share(ffn ? sum(lane.events, ["compute"]) : sum(lane.events, own(lane)));
    const waits = waitsForFfn(lane) ? sum(lane.events, ["receive"]) : 0;
    return `${short(lane.worker)} ${ffn ? "computes" : "works"} ${works}${!ffn && waits ? ` and waits ${share(waits)}` : ""} of it`;
  });
  const layers = new Set(step.lanes[0].events.filter((event) => event.mark === "attend").map((event) => event.layer)).size;
  const ubatches = `${step.num_ubatches} ubatch${step.num_ubatches === 1 ? "" : "es"}`;
  return `Step ${step.step}: ${span(step.duration_us)} for ${step.rows} row${step.rows === 1 ? "" : "s"} in ${ubatches} over ${layers} layers. ${parts.join("; ")}.`;
}

function table(step) {
  const rows = step.lanes.map((lane) => {
    const works = isFfn(lane) ? sum(lane.events, ["compute"]) : sum(lane.events, own(lane));
    const cells = [works, waitsForFfn(lane) ? sum(lane.events, ["receive"]) : 0, lane.uncertainty_us].map((us) => make("td", { class: "n" }, span(us)));
    return make("tr", {}, make("th", { scope: "row" }, short(lane.worker)), make("td", {}, lane.role), ...cells);
  });
  const head = ["Worker", "Role"].map((name) => make("th", { scope: "col" }, name));
  const numbers = ["Works", "Waits", "Clock, ±"].map((name) => make("th", { scope: "col", class: "n" }, name));
  return make("details", {}, make("summary", {}, "In numbers"), make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head, ...numbers)), make("tbody", {}, ...rows))));
}

function legend(step) {
  const marks = [["attend", "attention, ubatch 0"], ["attend odd", "ubatch 1"], ["receive", step.lanes.some(waitsForFfn) ? "waits" : "FFN"], ["combine", "adds the result"], ["sample", "head and sampler"]];
  if (step.lanes.some(isFfn)) marks.push(["compute", "FFN, ubatch 0"], ["compute odd", "ubatch 1"], ["compute both", "of several"]);
  return make("ul", { class: "legend" }, ...marks.map(([kind, name]) => make("li", {}, draw("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" }, draw("rect", { class: kind, width: 12, height: 12, rx: 3 })), name)));
}

function range(name, id, most, value, then) {
  const input = make("input", { type: "range", id, min: "0", max: "1000", step: "1", value: String(Math.round((1000 * value) / most)) });
  input.addEventListener("input", () => then((Number(input.value) * most) / 1000));
  return make("label", { for: id }, name, input);
}

function look(where, closer) {
  zoom = Math.min(64, Math.max(1, closer));
  from = Math.min(1 - 1 / zoom, Math.max(0, where));
  paint();
}

function paint() {
  if (!traced) return;
  const held = document.activeElement?.id;
  const box = at("step-picture");
  const width = Math.max(280, box.clientWidth);
  const layers = new Set(traced.lanes[0].events.map((event) => event.layer)).size;
  box.replaceChildren(
    overview(traced, width),
    make(
      "div",
      { class: "zoom" },
      range("Where", "step-where", 1 - 1 / zoom || 1, from, (value) => look(value, zoom)),
      range("Closer", "step-zoom", Math.log2(64), Math.log2(zoom), (value) => look(from + 0.5 / zoom - 0.5 / 2 ** value, 2 ** value)),
      make("button", { type: "button", class: "quiet", id: "step-whole", on: { click: () => look(0, 1) } }, "Whole step"),
      make("button", { type: "button", class: "quiet", id: "step-layers", on: { click: () => look(1 / 3, Math.max(1, layers / 3)) } }, "Three layers"),
    ),
    picture(traced, width),
    legend(traced),
    table(traced),
  );
  if (held?.startsWith("step-")) at(held)?.focus();
}

// Four short sequences, so that there are ubatches to look at; they end with the trace.
function samples(signal) {
  const body = { model: model(), prompt: "Once upon a time", n: NUM_SAMPLES, max_tokens: 256, temperature: 1, stream: true };
  return ask("v1/completions", { body, signal }).then((response) => response.text()).catch(() => "");
}

async function trace() {
  const button = at("trace");
  const note = at("step-note");
  const picked = at("step-deployment").value;
  const idle = !(latest?.workers ?? []).some((worker) => worker.load.num_running > 1);
  const sampling = new AbortController();
  button.disabled = true;
  note.textContent = "Recording…";
  try {
    if (idle) {
      samples(sampling.signal);
      await new Promise((done) => setTimeout(done, SAMPLE_LEAD_MS));
    }
    const found = await json(`trace?deployment=${encodeURIComponent(picked)}`, { method: "POST" });
    if (!found.step) {
      note.textContent = "No step was computed in that time: send a message, then trace while it is answered.";
      return;
    }
    traced = found.step;
    const layers = new Set(traced.lanes[0].events.map((event) => event.layer)).size;
    note.textContent = summary(traced) + (found.silent.length ? ` ${found.silent.map(short).join(", ")} did not record.` : "");
    look(1 / 3, Math.max(1, layers / 3));
  } catch (error) {
    note.textContent = error.message;
  } finally {
    sampling.abort();
    button.disabled = false;
  }
}

export function know(status) {
  const names = [...new Set(status.workers.map((worker) => worker.deployment))].sort();
  if (names.join("\n") === [...at("step-deployment").options].map((each) => each.value).join("\n")) return;
  at("step-deployment").replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  at("step-of").hidden = names.length < 2;
}

export function start() {
  at("trace").addEventListener("click", trace);
  new ResizeObserver(() => paint()).observe(at("live"));
}
