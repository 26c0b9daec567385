// Puts the page's parts together: colours, key, views, health.

import { key } from "./api.js";
import * as chat from "./chat.js";
import * as pools from "./pools.js";
import * as step from "./step.js";

const at = (id) => document.getElementById(id);
const root = document.documentElement;
const THEMES = ["system", "light", "dark"];
const SIGNS = { system: "◐", light: "☀", dark: "☾" };
const WORDS = { system: "as the system has them", light: "light", dark: "dark" };

function setTheme(theme) {
  if (theme === "system") {
    delete root.dataset.theme;
    localStorage.removeItem("antiphon.theme");
  } else {
    root.dataset.theme = theme;
    localStorage.setItem("antiphon.theme", theme);
  }
  at("theme").textContent = SIGNS[theme];
  at("theme").setAttribute("aria-label", `Colours: ${WORDS[theme]}`);
  at("theme").title = `Colours: ${WORDS[theme]}`;
  at("theme").dataset.theme = theme;
}

function showKey(shown) {
  at("key-form").hidden = !shown;
  at("key-button").setAttribute("aria-expanded", String(shown));
  if (shown) at("key").focus();
}

let keyShown = false; // once by itself; after that it is the reader's

function keyNeeded() {
  if (keyShown) return;
  keyShown = true;
  showKey(true);
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
  if (error) [kind, words] = ["is-bad", error.status === 401 ? "an API key is needed" : error.message];
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

at("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(at("theme").dataset.theme) + 1) % THEMES.length]));
setTheme(THEMES.includes(localStorage.getItem("antiphon.theme")) ? localStorage.getItem("antiphon.theme") : "system");

at("key-button").addEventListener("click", () => showKey(at("key-form").hidden));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  showKey(false);
  modelsAt = -Infinity;
  pools.lookNow();
  at("prompt").focus();
});
at("key-forget").addEventListener("click", () => {
  key.set("");
  at("key").value = "";
});

for (const tab of ["tab-chat", "tab-live"]) {
  at(tab).addEventListener("click", () => setView(tab === "tab-live"));
  at(tab).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    setView(tab === "tab-chat");
    at(tab === "tab-chat" ? "tab-live" : "tab-chat").focus();
  });
}

chat.start({ busy: () => pools.lookNow(), keyNeeded: () => showKey(true) });
step.start();
pools.start({ status: onStatus, wanted: () => at("live").offsetParent !== null });
at("prompt").focus({ preventScroll: true });
