// What both pages have at the top: colours and the key.

import { key } from "./api.js";

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

export function showKey(shown) {
  at("key-form").hidden = !shown;
  at("key-button").setAttribute("aria-expanded", String(shown));
  if (shown) at("key").focus();
}

export function start(onKey) {
  at("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(at("theme").dataset.theme) + 1) % THEMES.length]));
  const kept = localStorage.getItem("antiphon.theme");
  setTheme(THEMES.includes(kept) ? kept : "system");
  at("key-button").addEventListener("click", () => showKey(at("key-form").hidden));
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set(at("key").value.trim());
    showKey(false);
    onKey();
  });
  at("key-forget").addEventListener("click", () => {
    key.set("");
    at("key").value = "";
  });
}
