// The API reference, made of openapi.json: what each path takes and answers, and a form to try it.

import { ask, json } from "./api.js";
import * as head from "./head.js";
import { make } from "./text.js";

const at = (id) => document.getElementById(id);
const MAX_SHOWN_CHARS = 20000;

let document_ = null;
let model = "MODEL";

const resolve = (schema) => (schema?.$ref ? document_.components.schemas[schema.$ref.split("/").pop()] : schema);
const nameOf = (schema) => schema?.$ref?.split("/").pop();

function typeOf(schema) {
  if (!schema) return "anything";
  if (schema.$ref) return nameOf(schema);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" | ");
  if (schema.type === "array") return `${schema.items ? typeOf(schema.items) : "anything"}[]`;
  if (schema.type === "object" && schema.additionalProperties && schema.additionalProperties !== true) return `object of ${typeOf(schema.additionalProperties)}`;
  return schema.type ?? "anything";
}

function boundsOf(schema) {
  const parts = [];
  for (const each of schema.anyOf ?? [schema]) {
    const least = each.minimum ?? (each.exclusiveMinimum === undefined ? undefined : `above ${each.exclusiveMinimum}`);
    const most = each.maximum ?? (each.exclusiveMaximum === undefined ? undefined : `below ${each.exclusiveMaximum}`);
    if (least !== undefined && most !== undefined) parts.push(`${least} to ${most}`);
    else if (least !== undefined) parts.push(each.minimum === undefined ? least : `at least ${least}`);
    else if (most !== undefined) parts.push(each.maximum === undefined ? most : `at most ${most}`);
    if (each.maxLength !== undefined) parts.push(`at most ${each.maxLength} characters`);
    if (each.maxItems !== undefined) parts.push(`at most ${each.maxItems}`);
  }
  if (schema.default !== undefined && schema.default !== null) parts.push(`default ${JSON.stringify(schema.default)}`);
  return parts.join(", ");
}

function linked(schema) {
  const names = Object.keys(document_.components.schemas);
  return typeOf(schema).split(/(\w+)/).map((word) => (names.includes(word) ? make("a", { href: `#${word}` }, word) : word));
}

function fields(schema) {
  const whole = resolve(schema);
  const required = new Set(whole.required ?? []);
  const named = Object.entries(whole.properties ?? {}).sort(([a], [b]) => required.has(b) - required.has(a)); // what is needed first
  const rows = named.map(([name, each]) =>
    make(
      "tr", {},
      make("th", { scope: "row" }, make("code", {}, name), required.has(name) ? make("span", { class: "must", title: "needed" }, " *") : ""),
      make("td", {}, make("code", {}, ...linked(each))),
      make("td", {}, [each.description, boundsOf(each)].filter(Boolean).join("; ")),
    ),
  );
  if (!rows.length) return make("p", { class: "note" }, typeOf(whole));
  const columns = ["Field", "Type", "Bounds"].map((name) => make("th", { scope: "col" }, name));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...columns)), make("tbody", {}, ...rows)));
}

function titled(words, schema) {
  const name = nameOf(schema);
  return make("h4", {}, `${words} `, name ? make("a", { href: `#${name}` }, make("code", {}, name)) : make("code", {}, typeOf(schema)));
}

function tryForm(method, path, operation) {
  const places = (operation.parameters ?? []).filter((each) => each.in !== "header");
  const inputs = places.map((each) => [each, make("input", { placeholder: each.description ?? each.name, autocomplete: "off" })]);
  const example = operation.requestBody?.content["application/json"].example;
  const body = operation.requestBody ? make("textarea", { rows: "6", spellcheck: "false" }) : null;
  if (body) body.value = JSON.stringify(example ?? {}, null, 2).replaceAll('"MODEL"', JSON.stringify(model));
  const answer = make("pre", { hidden: true, tabindex: "0", "aria-label": "Answer", role: "status" });
  const button = make("button", { type: "submit" }, "Send");
  const form = make(
    "form", { class: "try" },
    ...inputs.map(([each, input]) => make("label", {}, `${each.name}${each.required ? " *" : ""} `, input)),
    body ? make("label", {}, "Body ", body) : null,
    button, answer,
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    answer.hidden = false;
    answer.textContent = "…";
    try {
      let url = path.slice(1);
      const query = new URLSearchParams();
      for (const [each, input] of inputs) {
        if (each.in === "path") url = url.replace(`{${each.name}}`, encodeURIComponent(input.value));
        else if (input.value) query.set(each.name, input.value);
      }
      if (query.size) url += `?${query}`;
      const response = await ask(url, { method: method.toUpperCase(), body: body ? JSON.parse(body.value) : undefined });
      const text = await response.text();
      const isJson = (response.headers.get("content-type") ?? "").startsWith("application/json");
      answer.textContent = (isJson ? JSON.stringify(JSON.parse(text), null, 2) : text).slice(0, MAX_SHOWN_CHARS);
    } catch (error) {
      answer.textContent = `${error.status ? `${error.status} ` : ""}${error.message}`;
      if (error.status === 401) head.showKey(true);
    } finally {
      button.disabled = false;
    }
  });
  return form;
}

function operationBox(method, path, operation) {
  const content = operation.responses["200"].content;
  const answer = content["application/json"]?.schema ?? content["text/plain"]?.schema;
  const event = content["text/event-stream"]?.schema;
  const body = operation.requestBody?.content["application/json"].schema;
  const box = make(
    "details", { class: "operation", id: operation.operationId },
    make("summary", {}, make("span", { class: `method ${method}` }, method.toUpperCase()), make("code", {}, path), make("span", { class: "note" }, operation.summary)),
  );
  box.addEventListener("toggle", () => {
    if (!box.open || box.childElementCount > 1) return;
    if (operation.description) box.append(make("p", { class: "note" }, operation.description));
    if (body) box.append(titled("Takes", body), fields(body));
    if (answer) box.append(titled("Answers", answer), ...(resolve(answer).properties ? [fields(answer)] : []));
    if (event) box.append(titled("With stream: true, events of", event), ...(event.$ref === answer?.$ref ? [] : [fields(event)]));
    box.append(make("h4", {}, "Try it"), tryForm(method, path, operation));
  });
  return box;
}

function show() {
  const groups = new Map();
  for (const [path, methods] of Object.entries(document_.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags?.[0] ?? "Other";
      groups.set(tag, [...(groups.get(tag) ?? []), operationBox(method, path, operation)]);
    }
  }
  const schemas = Object.entries(document_.components.schemas).map(([name, schema]) => {
    const box = make("details", { class: "operation", id: name }, make("summary", {}, make("code", {}, name), make("span", { class: "note" }, schema.description ?? "")));
    box.addEventListener("toggle", () => box.open && box.childElementCount === 1 && box.append(fields(schema)));
    return box;
  });
  at("docs").replaceChildren(
    make("p", { class: "lead" }, document_.info.description),
    make("p", { class: "note" }, `Version ${document_.info.version}. Clients of OpenAI take `, make("code", {}, `${new URL("v1", document.baseURI)}`), " as their base; Anthropic's take ", make("code", {}, new URL(".", document.baseURI).href.replace(/\/$/, "")), "."),
    ...[...groups].map(([tag, boxes]) => make("section", {}, make("h2", {}, tag), ...boxes)),
    make("section", {}, make("h2", {}, "Types"), ...schemas),
  );
  openTarget();
}

function openTarget() {
  const target = location.hash && at(decodeURIComponent(location.hash.slice(1)));
  if (target?.localName === "details") {
    target.open = true;
    target.scrollIntoView();
  }
}

async function load() {
  try {
    document_ = await json("openapi.json");
    model = await json("v1/models").then((list) => list.data[0]?.id ?? "MODEL", () => "MODEL");
    show();
  } catch (error) {
    at("docs").replaceChildren(make("p", { class: "alert", role: "alert" }, error.message));
  }
}

head.start(load);
addEventListener("hashchange", openTarget);
load();
