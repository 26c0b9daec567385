// A conversation: sends it, shows the answer as it comes (thoughts, text, calls of tools), stops it.

import { ask, ApiError, events, json } from "./api.js";
import { make, render } from "./text.js";

const at = (id) => document.getElementById(id);
const DRAW_EVERY_MS = 60;

const SAMPLE_TOOL = [
  {
    type: "function",
    function: {
      name: "weather",
      description: "The weather in a city, today.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

let messages = []; // as the API has them, the system prompt left out
let running = null; // an AbortController while an answer comes
let onBusy = () => {};
let onKeyNeeded = () => {};

export const model = () => at("model").value;

export async function loadModels() {
  const { data } = await json("v1/models");
  const chosen = at("model").value;
  const names = data.map((each) => each.id);
  if (names.join("\n") === [...at("model").options].map((each) => each.value).join("\n")) return;
  at("model").replaceChildren(...names.map((name) => make("option", { value: name, selected: name === chosen }, name)));
}

function body() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const system = at("system").value.trim();
  const tools = at("tools").value.trim();
  let offered;
  if (tools) {
    try {
      offered = JSON.parse(tools);
    } catch (error) {
      throw new ApiError(0, "tools", `The tools are not JSON: ${error.message}`);
    }
  }
  return {
    model: model(),
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    reasoning_effort: at("effort").value || undefined,
    tools: offered,
  };
}

function show(element) {
  at("empty").hidden = true;
  at("messages").append(element);
  return element;
}

const isAtEnd = () => at("messages").scrollHeight - at("messages").scrollTop - at("messages").clientHeight < 80;
const toEnd = () => (at("messages").scrollTop = at("messages").scrollHeight);

function say(text) {
  const message = { role: "user", content: text };
  messages.push(message);
  show(make("article", { class: "message user", "aria-label": "You" }, text));
}

class Answer {
  constructor() {
    this.started = performance.now();
    this.first = null;
    this.thoughts = "";
    this.text = "";
    this.calls = [];
    this.usage = null;
    this.reason = null;
    this.waiting = make("span", { class: "waiting" }, "");
    this.thoughtsBox = make("details", { class: "thoughts", hidden: true, open: true }, make("summary", {}, "Thinking…"), make("div"));
    this.textBox = make("div", { class: "text", hidden: true });
    this.callBox = make("div", { class: "calls", hidden: true });
    this.facts = make("div", { class: "facts", hidden: true });
    this.element = show(
      make(
        "article",
        { class: "message assistant busy", "aria-label": `Answer of ${model()}`, "aria-busy": "true" },
        this.waiting, this.thoughtsBox, this.textBox, this.callBox, this.facts,
      ),
    );
    this.drawn = 0;
    this.timer = null;
  }

  add(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) this.reason = choice.finish_reason;
    const delta = choice.delta ?? {};
    this.thoughts += delta.reasoning_content ?? delta.reasoning ?? "";
    this.text += delta.content ?? "";
    for (const call of delta.tool_calls ?? []) {
      const mine = (this.calls[call.index ?? 0] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
      if (call.id) mine.id = call.id;
      mine.function.name += call.function?.name ?? "";
      mine.function.arguments += call.function?.arguments ?? "";
    }
    if (this.first === null && (this.thoughts || this.text || this.calls.length)) this.first = performance.now();
    if (this.timer === null) this.timer = setTimeout(() => this.draw(), Math.max(0, this.drawn + DRAW_EVERY_MS - performance.now()));
  }

  draw() {
    clearTimeout(this.timer);
    this.timer = null;
    this.drawn = performance.now();
    const follow = isAtEnd();
    this.waiting.hidden = this.first !== null;
    if (this.thoughts) {
      this.thoughtsBox.hidden = false;
      this.thoughtsBox.lastChild.textContent = this.thoughts.trim();
      if (this.text || this.reason) this.thoughtsBox.firstChild.textContent = "Thoughts";
    }
    this.textBox.hidden = !this.text.trim();
    if (this.text) this.textBox.replaceChildren(...render(this.text));
    this.callBox.hidden = !this.calls.length;
    this.callBox.replaceChildren(...this.calls.map(callCard));
    if (follow) toEnd();
  }

  end(error) {
    this.draw();
    this.waiting.hidden = true;
    this.element.classList.remove("busy");
    this.element.setAttribute("aria-busy", "false");
    if (this.thoughts && this.text) this.thoughtsBox.open = false;
    const seconds = (performance.now() - this.started) / 1000;
    const facts = [];
    if (this.usage) {
      const { prompt_tokens: read, completion_tokens: written } = this.usage;
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      facts.push(`${read} tokens read${cached ? ` (${cached} cached)` : ""}`, `${written} written`);
      if (this.first !== null && written > 1) facts.push(`${(((written - 1) * 1000) / (performance.now() - this.first)).toFixed(1)} tokens/s`);
    }
    if (this.first !== null) facts.push(`first after ${((this.first - this.started) / 1000).toFixed(2)} s`);
    facts.push(`${seconds.toFixed(1)} s`);
    if (this.reason === "length") facts.push("cut off by the limit of tokens");
    if (error?.name === "AbortError") facts.push("stopped");
    this.facts.hidden = false;
    this.facts.replaceChildren(...facts.map((fact) => make("span", {}, fact)));
    if (this.text) {
      const copy = make("button", { type: "button", class: "quiet" }, "Copy");
      copy.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(this.text);
          copy.textContent = "Copied";
        } catch {
          copy.textContent = "The browser does not allow it";
        }
      });
      this.facts.append(copy);
    }
    this.facts.append(make("button", { type: "button", class: "quiet again", on: { click: () => again(this) } }, "Again"));
    for (const other of document.querySelectorAll(".again")) other.hidden = !this.element.contains(other);
    if (error && error.name !== "AbortError") {
      this.element.insertBefore(make("p", { class: "alert", role: "alert" }, error.message), this.facts);
      if (error.status === 401) onKeyNeeded();
    }
    at("said").textContent = error && error.name !== "AbortError" ? "" : `The answer is finished: ${facts.join(", ")}.`;
    toEnd();
  }

  message() {
    const message = { role: "assistant", content: this.text };
    if (this.calls.length) message.tool_calls = this.calls;
    return message;
  }
}

function callCard(call) {
  let pretty = call.function.arguments;
  try {
    pretty = JSON.stringify(JSON.parse(pretty), null, 2);
  } catch {
    // not whole yet
  }
  return make("div", { class: "call" }, make("h3", {}, "Calls ", make("code", {}, call.function.name || "…")), make("pre", {}, pretty));
}

// The model waits for what its calls give: a field for each, and on with the answer once all are there.
function askResults(answer) {
  const fields = answer.calls.map((call) =>
    make("label", {}, `What ${call.function.name} gives `, make("textarea", { rows: "2", spellcheck: "false" })),
  );
  const form = make(
    "form",
    { class: "result" },
    ...fields,
    make("div", { class: "actions" }, make("button", { type: "submit" }, fields.length > 1 ? "Send the results" : "Send the result")),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    answer.calls.forEach((call, index) => {
      const content = fields[index].querySelector("textarea").value;
      messages.push({ role: "tool", tool_call_id: call.id, content });
      show(make("div", { class: "message tool result" }, make("h3", {}, `${call.function.name} gave`), make("pre", {}, content || "(nothing)")));
    });
    form.remove();
    answerNow();
  });
  answer.element.insertBefore(form, answer.facts);
  fields[0].querySelector("textarea").focus();
}

async function answerNow() {
  const controller = (running = new AbortController());
  setBusy(true);
  const answer = new Answer();
  answer.before = [...messages];
  toEnd();
  try {
    if (!model()) await loadModels(); // sent before the page has asked which there are
    if (!model()) throw new ApiError(0, "model", "No model is served here yet.");
    const asked = { body: body(), signal: controller.signal };
    for await (const chunk of events("v1/chat/completions", asked)) answer.add(chunk);
    answer.end(null);
    messages.push(answer.message());
    if (answer.calls.length) askResults(answer);
  } catch (error) {
    answer.end(error);
    if (answer.text && error.name === "AbortError") messages.push({ role: "assistant", content: answer.text });
  } finally {
    running = null;
    setBusy(false);
  }
}

function again(answer) {
  if (running) return;
  messages = answer.before;
  answer.element.remove();
  answerNow();
}

function setBusy(busy) {
  at("stop").hidden = !busy;
  at("send").hidden = busy;
  onBusy(busy);
}

function send(text) {
  if (running || !text.trim()) return;
  say(text.trim());
  at("prompt").value = "";
  answerNow();
}

export function start({ busy, keyNeeded }) {
  onBusy = busy;
  onKeyNeeded = keyNeeded;
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(at("prompt").value);
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(at("prompt").value);
    }
  });
  at("stop").addEventListener("click", () => {
    running?.abort();
    at("prompt").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
  at("starters").addEventListener("click", (event) => {
    if (event.target.localName === "button") send(event.target.textContent);
  });
  at("new-chat").addEventListener("click", () => {
    running?.abort();
    messages = [];
    for (const each of [...at("messages").children]) if (each !== at("empty")) each.remove();
    at("empty").hidden = false;
    at("prompt").focus();
  });
  at("sample-tool").addEventListener("click", () => (at("tools").value = JSON.stringify(SAMPLE_TOOL, null, 1)));
}
