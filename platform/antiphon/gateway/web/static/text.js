// An answer's text as elements: paragraphs, lists, headings, code. Only ever text nodes: nothing a model says becomes markup.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)|(https?:\/\/[^\s<>()"']+[^\s<>()"'.,;:!?])/g;

function inline(text) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (match[1]) parts.push(make("code", {}, match[1].slice(1, -1)));
    else if (match[2]) parts.push(make("strong", {}, match[2].slice(2, -2)));
    else if (match[3]) parts.push(make("em", {}, match[3].slice(1, -1)));
    else parts.push(make("a", { href: match[4], rel: "noopener noreferrer nofollow", target: "_blank" }, match[4]));
  }
  parts.push(text.slice(at));
  return parts.filter((part) => part !== "");
}

export function render(text) {
  const blocks = [];
  let paragraph = [];
  let list = null;
  const flush = () => {
    if (paragraph.length) blocks.push(make("p", {}, ...inline(paragraph.join("\n"))));
    paragraph = [];
    list = null;
  };
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(/^\s*(```+|~~~+)\s*(\S*)/);
    if (fence) {
      flush();
      const code = [];
      while (++i < lines.length && !lines[i].trim().startsWith(fence[1])) code.push(lines[i]);
      blocks.push(make("pre", { tabindex: "0", "aria-label": fence[2] ? `Code, ${fence[2]}` : "Code" }, make("code", {}, code.join("\n"))));
      continue;
    }
    const heading = line.match(/^#{1,6}\s+(.*)/);
    const item = line.match(/^\s*([-*+]|\d+[.)])\s+(.*)/);
    if (heading) {
      flush();
      blocks.push(make("h4", {}, ...inline(heading[1])));
    } else if (item) {
      const tag = /\d/.test(item[1]) ? "ol" : "ul";
      if (!list || list.localName !== tag) {
        flush();
        list = make(tag, tag === "ol" ? { start: parseInt(item[1], 10) } : {});
        blocks.push(list);
      }
      list.append(make("li", {}, ...inline(item[2])));
    } else if (!line.trim()) {
      if (paragraph.length) flush();
    } else if (list && /^\s{2,}/.test(line)) {
      list.lastChild.append("\n", ...inline(line.trim()));
    } else {
      if (list) flush();
      paragraph.push(line);
    }
  }
  flush();
  return blocks;
}
