// Elements are made of text alone: nothing that a model or a file says is ever read as HTML.

export const find = (selector) => document.querySelector(selector);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function table(caption, columns, rows) {
  const head = element("tr", {}, ...columns.map((column) => element("th", { scope: "col" }, column)));
  const body = rows.map((cells) => element("tr", {}, ...cells.map((cell, index) => index ? element("td", {}, cell) : element("th", { scope: "row" }, cell))));
  return [caption ? element("caption", {}, caption) : null, element("thead", {}, head), element("tbody", {}, ...body)].filter(Boolean);
}

export function show(target, text) {
  target.textContent = text || "";
  target.hidden = !text;
}

export async function get(path, signal) {
  return answerOf(await fetch(path, { signal }));
}

export async function post(path, body, signal) {
  return fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

export async function answerOf(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    throw new Error(`The server gave no answer that can be read (${response.status}).`);
  }
  if (!response.ok) throw new Error(body.problem || `The server refused (${response.status}).`);
  return body;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit += 1) count /= 1024;
  return `${count >= 100 || unit === 0 ? count.toFixed(0) : count.toPrecision(3)} ${units[unit]}`;
}

export function size(count) {
  for (const [scale, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (count >= scale) return `${Number((count / scale).toPrecision(3))}${unit}`;
  }
  return count.toFixed(0);
}
