// Puts the page's parts together: key, views, health.

import * as chat from "./chat.js";
import * as head from "./head.js";
import * as pools from "./pools.js";
import * as step from "./step.js";

const at = (id) => document.getElementById(id);
let keyShown = false; // once by itself; after that it is the reader's

function keyNeeded() {
  if (keyShown) return;
  keyShown = true;
  head.showKey(true);
}

function setView(live) {
  document.body.classList.toggle("shows-live", live);
  for (const [tab, on] of [["tab-chat", !live], ["tab-live", live]]) {
    at(tab).setAttribute("aria-selected", String(on));
    at(tab).tabIndex = on ? 0 : -1;
  }
}

function health(status, error) {
  const line = at("health");
  const ready = status?.workers.filter((worker) => worker.ready && !worker.draining).length ?? 0;
  let [kind, words] = ["is-good", `${ready} worker${ready === 1 ? "" : "s"} ready, Antiphon ${status?.version}`];
  if (error?.status === 403) [kind, words] = ["is-good", "connected; the pools are for keys of scope admin"];
  else if (error) [kind, words] = ["is-bad", error.status === 401 ? "an API key is needed" : error.message];
  else if (status.draining) [kind, words] = ["is-warn", "shutting down"];
  else if (ready < status.workers.length || !ready) [kind, words] = ["is-warn", `${ready} of ${status.workers.length} workers ready`];
  line.className = `health ${kind}`;
  if (at("health-text").textContent !== words) at("health-text").textContent = words;
}

let modelsAt = -Infinity;

async function onStatus(status, error) {
  health(status, error);
  if (error?.status === 401) keyNeeded();
  if (status) step.know(status);
  if (performance.now() - modelsAt < 15000 && chat.model()) return;
  modelsAt = performance.now();
  try {
    await chat.loadModels();
  } catch (failed) {
    if (failed.status === 401) keyNeeded();
  }
}

head.start(() => {
  modelsAt = -Infinity;
  pools.lookNow();
  at("prompt").focus();
});

for (const tab of ["tab-chat", "tab-live"]) {
  at(tab).addEventListener("click", () => setView(tab === "tab-live"));
  at(tab).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    setView(tab === "tab-chat");
    at(tab === "tab-chat" ? "tab-live" : "tab-chat").focus();
  });
}

chat.start({ busy: () => pools.lookNow(), keyNeeded: () => head.showKey(true) });
step.start();
pools.start({ status: onStatus, wanted: () => at("live").offsetParent !== null });
at("prompt").focus({ preventScroll: true });
