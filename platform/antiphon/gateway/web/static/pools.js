// The live picture: what the gateway's status says of pools and workers, once a second.

import { json } from "./api.js";
import { draw, make } from "./text.js";

const at = (id) => document.getElementById(id);
const EVERY_MS = 1000;
const NUM_POINTS = 90;
const ORDER = ["prefill", "monolith", "decode", "attention", "ffn"];
const WORDS = {
  prefill: "reads prompts", monolith: "whole model", decode: "writes tokens", attention: "KV cache, attention, sampling", ffn: "FFN and experts",
};

let before = null; // counters of the last look, by worker and epoch
let series = { out: [], in: [] };
let paused = false;
let timer = null;
let onStatus = () => {};
let isWanted = () => true;
export let latest = null;

const size = (bytes) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; bytes >= 1000 && i < units.length - 1; i++) bytes /= 1000;
  return `${bytes < 10 && i ? bytes.toFixed(1) : Math.round(bytes)} ${units[i]}`;
};
const count = (number) => (number >= 100 ? Math.round(number).toLocaleString("en") : number >= 10 ? number.toFixed(0) : number.toFixed(1).replace(/\.0$/, ""));
const percent = (share) => (share > 0 && share < 0.01 ? "<1 %" : `${Math.round(100 * share)} %`);
const usage = (load) => (load.num_total_blocks ? 1 - Math.min(load.num_free_blocks, load.num_total_blocks) / load.num_total_blocks : 0);

// Counters per second since the last look; workers report when they renew their lease, so the time is that of the change.
function rates(workers, now) {
  const found = new Map();
  const kept = new Map();
  for (const worker of workers) {
    const id = `${worker.worker_id}@${worker.epoch}`;
    const sums = { in: worker.load.num_prompt_tokens, out: worker.load.num_generation_tokens, rows: worker.load.num_ffn_rows };
    const last = before?.get(id);
    let rate = { in: 0, out: 0, rows: 0 };
    let since = { sums, at: now, rate };
    if (last) {
      const changed = Object.keys(sums).some((name) => sums[name] !== last.sums[name]);
      const seconds = (now - last.at) / 1000;
      if (changed && seconds > 0.2) {
        for (const name of Object.keys(sums)) rate[name] = Math.max(0, sums[name] - last.sums[name]) / seconds;
        since = { sums, at: now, rate };
      } else {
        rate = seconds > 3 ? rate : last.rate; // a report is due every second or two
        since = seconds > 3 ? { sums, at: now, rate } : last;
      }
    }
    found.set(worker.worker_id, rate);
    kept.set(id, since);
  }
  before = kept;
  return found;
}

function tile(name, value, points) {
  const box = make("div", { class: "tile" }, make("dt", {}, name), make("dd", {}, value));
  if (points && points.some((point) => point > 0)) {
    const most = Math.max(...points);
    const line = points.map((point, i) => `${i + NUM_POINTS - points.length},${(30 - (28 * point) / most).toFixed(1)}`).join(" ");
    box.append(draw("svg", { viewBox: `0 0 ${NUM_POINTS} 32`, preserveAspectRatio: "none", "aria-hidden": "true" }, draw("polyline", { points: line })));
  }
  return box;
}

function meter(name, share, words, kind = "") {
  const fill = make("i", { class: kind });
  fill.style.width = `${Math.min(100, Math.max(share > 0 ? 1 : 0, 100 * share))}%`;
  return make("div", { class: "meter" }, make("span", {}, name), make("span", { class: "track", "aria-hidden": "true" }, fill), make("b", {}, words));
}

// Where a step's time goes, of the worker's last window of a second or more.
function stages(gauges, role) {
  const share = (name) => Math.min(1, Math.max(0, gauges[name] ?? 0));
  if (role === "ffn") return gauges.bubble_share === undefined ? null : meter("computes", 1 - share("bubble_share"), percent(1 - share("bubble_share")));
  if (gauges.bubble_share === undefined) return null;
  // Who holds whole layers computes the FFN itself, over the same in-process link: it waits for nobody.
  const away = role === "attention" ? "waits for the FFN" : "FFN";
  const parts = [
    ["attention", Math.max(0, 1 - share("bubble_share") - share("head_share") - share("sample_share")), ""],
    ["head and sampler", share("head_share") + share("sample_share"), "head"],
    [away, share("bubble_share"), role === "attention" ? "wait" : ""],
  ];
  const track = make("span", { class: "track", "aria-hidden": "true" });
  for (const [, part, kind] of parts) {
    const piece = make("i", { class: kind });
    piece.style.width = `${100 * part}%`;
    track.append(piece);
  }
  const words = parts.map(([name, part]) => `${name} ${percent(part)}`).join(", ");
  return make("div", { class: "meter", title: `Of its steps: ${words}` }, make("span", {}, "step"), track, make("b", {}, `${percent(share("bubble_share"))} ${role === "attention" ? "waits" : "FFN"}`), make("span", { class: "sr" }, words));
}

function stateOf(worker) {
  if (worker.draining) return ["is-warn", "draining"];
  if (!worker.ready) return ["is-warn", "starting"];
  if (worker.connected === false) return ["is-bad", "no session"];
  return ["is-good", "ready"];
}

function workerBox(worker, rate) {
  const load = worker.load;
  const [kind, state] = stateOf(worker);
  const box = make(
    "li",
    { class: "worker" },
    make("header", {}, make("span", { class: `dot ${kind}`, "aria-hidden": "true" }), make("span", {}, worker.worker_id.split("/").slice(1).join("/") || worker.worker_id), make("span", {}, state)),
  );
  if (worker.message) box.append(make("p", { class: "why" }, worker.message));
  if (worker.role === "ffn") {
    const shard = worker.shard ?? {};
    const parts = (shard.num_expert ?? 1) * (shard.num_tensor ?? 1);
    box.append(make("div", { class: "meter" }, make("span", {}, "rows"), make("span", {}, parts > 1 ? `part ${(shard.expert_index ?? 0) * (shard.num_tensor ?? 1) + (shard.tensor_index ?? 0) + 1} of ${parts}` : ""), make("b", {}, `${count(rate.rows)}/s`)));
    if (load.gauges.rows_per_batch !== undefined && rate.rows > 0) box.append(make("div", { class: "meter" }, make("span", {}, "batch"), make("span"), make("b", {}, `${count(load.gauges.rows_per_batch)} ${load.gauges.rows_per_batch === 1 ? "row" : "rows"}`)));
  } else {
    box.append(
      meter("running", load.num_running / (worker.max_num_seqs || 1), `${load.num_running} of ${worker.max_num_seqs}`),
      meter("queue", load.num_waiting / (worker.max_queued_requests || 1), String(load.num_waiting), "soft"),
    );
    if (load.num_total_blocks) box.append(meter("KV blocks", usage(load), `${count(load.num_total_blocks - Math.min(load.num_free_blocks, load.num_total_blocks))} of ${count(load.num_total_blocks)}`));
    box.append(make("div", { class: "meter" }, make("span", {}, "tokens"), make("span"), make("b", {}, worker.role === "prefill" ? `${count(rate.in)} in/s` : `${count(rate.in)} in, ${count(rate.out)} out/s`)));
  }
  const stage = rate.in + rate.out + rate.rows > 0 ? stages(load.gauges, worker.role) : null;
  if (stage) box.append(stage);
  box.append(make("div", { class: "meter" }, make("span", {}, "weights"), make("span"), make("b", {}, size(load.resident_weight_bytes))));
  return box;
}

function poolBox(pool, workers, rate) {
  const words = pool.role === "ffn" ? `${pool.num_ready}/${pool.num_workers} ready` : `${pool.num_ready}/${pool.num_workers} ready, ${pool.num_running} running`;
  return make(
    "section",
    { class: `pool ${pool.role}`, "aria-label": `Pool ${pool.name}` },
    make("header", {}, make("h3", { title: WORDS[pool.role] ?? "" }, pool.name), make("span", {}, words)),
    make("ul", { class: "bare" }, ...workers.map((worker) => workerBox(worker, rate.get(worker.worker_id)))),
  );
}

function link(words, both, runs) {
  const box = make("div", { class: runs ? "link runs" : "link", "aria-hidden": "true" }, make("span", { class: "wire" }), make("span", {}, words));
  if (both) box.append(make("span", { class: "wire back" }));
  return box;
}

function deploymentBox(name, status, rate) {
  const workers = status.workers.filter((worker) => worker.deployment === name);
  const pools = status.pools.filter((pool) => pool.deployment === name).sort((a, b) => ORDER.indexOf(a.role) - ORDER.indexOf(b.role));
  const running = workers.some((worker) => worker.load.num_running > 0);
  const inflight = workers.reduce((sum, worker) => sum + worker.num_requests, 0);
  const flow = make("div", { class: "flow" }, make("div", { class: "gate" }, make("strong", {}, String(inflight)), "in flight"));
  let last = "gateway";
  for (const pool of pools) {
    const both = pool.role === "ffn";
    const words = both ? "rows" : last === "prefill" ? "KV" : "tokens";
    flow.append(link(words, both, running || inflight > 0), poolBox(pool, workers.filter((worker) => worker.pool === pool.name && worker.role === pool.role), rate));
    last = pool.role;
  }
  const models = [...new Set(workers.map((worker) => worker.model))].join(", ");
  const revisions = [...new Set(workers.map((worker) => worker.revision))];
  const note = revisions.length > 1 ? `${revisions.length} revisions: a rollout is under way` : `${workers.length} worker${workers.length === 1 ? "" : "s"}`;
  return make("article", { class: "deployment", "aria-label": `Deployment ${name}` }, make("header", {}, make("h3", {}, name), make("span", { class: "note" }, models === name ? note : `model ${models}, ${note}`)), flow);
}

function compositionBox(composition) {
  const chips = (composition.experts ?? []).map((expert) =>
    make("li", {}, make("span", { class: `dot ${expert.healthy ? "is-good" : "is-bad"}`, "aria-hidden": "true" }), expert.name, expert.healthy ? "" : make("span", { class: "sr" }, " (down)")),
  );
  return make("article", { class: "deployment" }, make("header", {}, make("h3", {}, composition.name), make("span", { class: "note" }, `composition of experts, ${composition.state}`)), make("ul", { class: "chips" }, ...chips));
}

function show(status) {
  const rate = rates(status.workers, performance.now());
  const sum = (name) => [...rate.values()].reduce((total, each) => total + each[name], 0);
  for (const name of ["in", "out"]) series[name] = [...series[name], sum(name)].slice(-NUM_POINTS);
  const generating = status.workers.filter((worker) => worker.role !== "ffn" && worker.role !== "prefill");
  const total = (name) => generating.reduce((all, worker) => all + worker.load[name], 0);
  const blocks = total("num_total_blocks");
  at("tiles").replaceChildren(
    tile("tokens written", `${count(sum("out"))}/s`, series.out),
    tile("tokens read", `${count(sum("in"))}/s`, series.in),
    tile("running", count(total("num_running"))),
    tile("waiting", count(total("num_waiting"))),
    tile("KV in use", blocks ? percent(1 - total("num_free_blocks") / blocks) : "-"),
  );
  const names = [...new Set(status.workers.map((worker) => worker.deployment))].sort();
  const boxes = names.map((name) => deploymentBox(name, status, rate));
  if (!boxes.length) boxes.push(make("p", { class: "deployment" }, "No workers are registered yet: they show here once they start."));
  at("deployments").replaceChildren(...boxes, ...(status.compositions ?? []).map(compositionBox));
}

async function look() {
  clearTimeout(timer);
  if (!paused && !document.hidden) {
    try {
      latest = await json("status");
      at("live-error").hidden = true;
      if (isWanted()) show(latest);
      onStatus(latest, null);
    } catch (error) {
      const refused = error.status === 401 || error.status === 403;
      at("live-error").textContent = refused ? `The pools are not shown: ${error.message}` : error.message;
      at("live-error").hidden = false;
      onStatus(null, error);
    }
  }
  timer = setTimeout(look, EVERY_MS);
}

export function start({ status, wanted }) {
  onStatus = status;
  isWanted = wanted;
  at("pause").addEventListener("click", () => {
    paused = !paused;
    at("pause").setAttribute("aria-pressed", String(paused));
    at("pause").textContent = paused ? "Go on" : "Pause";
    at("live-note").textContent = paused ? "paused" : "";
    if (!paused) look();
  });
  document.addEventListener("visibilitychange", () => document.hidden || look());
  look();
}

export const lookNow = look;
