import { answerOf, element, find, post, show } from "./dom.js";
import { fill, tint } from "./colors.js";

export function openStreams() {
  const box = find("#tokens");
  const choice = find("#answer-choice");
  const inspector = find("#inspector");
  let answers = [];
  let current = null;
  let found = null;
  let spans = [];
  let isShown = false;
  choice.addEventListener("change", () => look(answers[choice.selectedIndex]));
  box.addEventListener("keydown", move);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => found && draw());

  function offer(given) {
    answers = given;
    find("#streams-empty").hidden = answers.length > 0;
    find("#streams-view").hidden = answers.length === 0;
    choice.replaceChildren(...answers.map((answer) => element("option", {}, `P = ${answer.num_streams}: ${brief(answer.messages.at(-1).content)}`)));
    if (!answers.includes(current)) current = answers.at(-1) || null;
    choice.selectedIndex = answers.indexOf(current);
    found = null;
    if (isShown) load();
  }

  function look(answer) {
    current = answer;
    choice.selectedIndex = answers.indexOf(answer);
    found = null;
    if (isShown) load();
  }

  async function load() {
    if (found || !current) return;
    const asked = current;
    box.setAttribute("aria-busy", "true");
    show(inspector, "Reading the answer once more.");
    try {
      const body = await answerOf(await post("/api/streams", { voice: asked.voice, messages: asked.messages, tokens: asked.tokens }));
      if (asked !== current) return;
      found = body;
      draw();
    } catch (error) {
      if (asked !== current) return;
      box.replaceChildren();
      find("#legend").replaceChildren();
      show(find("#streams-summary"), "");
      inspector.replaceChildren(element("p", { role: "alert" }, error.message));
    }
    box.removeAttribute("aria-busy");
  }

  function draw() {
    const { tokens, num_streams: count, statistics } = found;
    spans = tokens.map((token, index) => draft(token, index, count));
    // A line ends behind the token that ends it, so that the token's number stays with it.
    box.replaceChildren(...spans.flatMap((span, index) => [span, "\n".repeat(tokens[index].text.match(/\n*$/)[0].length)]));
    const numbers = Array.from({ length: count }, (_, stream) => stream);
    find("#legend").replaceChildren(...numbers.map((stream) => element("li", {}, swatch(stream), `mean weight ${statistics[`stream_weight/${stream}`].toFixed(3)}, largest at ${percent(statistics[`stream_largest/${stream}`])}`)));
    show(find("#streams-summary"), `${tokens.length} tokens, mean entropy ${statistics.stream_entropy.toFixed(3)} of at most ${Math.log(count).toFixed(3)} nats`);
    spans[0].tabIndex = 0;
    inspect(0);
  }

  function draft(token, index, count) {
    const stream = token.weights.indexOf(Math.max(...token.weights));
    const text = token.text === "" ? token.token : token.text.replace(/\n+$/, (ends) => "↵".repeat(ends.length)).replaceAll("\n", "↵\n");
    const span = element("span", {
      class: token.text === "" ? "token special" : "token", role: "button", tabindex: "-1", "data-stream": stream, "data-index": index, "aria-describedby": "inspector",
      "aria-label": `${JSON.stringify(token.text || token.token)}, stream ${stream} weighs ${percent(token.weights[stream])}`,
      onfocus: () => inspect(index), onmouseenter: () => inspect(index), onclick: () => span.focus(),
    }, text);
    span.style.backgroundColor = tint(stream, token.weights[stream], count);
    return span;
  }

  function inspect(index) {
    const token = found.tokens[index];
    spans.forEach((span, other) => span.classList.toggle("chosen", other === index));
    const rows = token.weights.map((weight, stream) => element("tr", {}, element("th", { scope: "row" }, swatch(stream)), element("td", { title: String(weight) }, meter(weight, stream), weight.toFixed(3)), word(token.tops[stream]), element("td", {}, percent(token.top_probs[stream]))));
    const last = token.weights.length;
    const together = element("tr", { class: "strong" }, element("th", { scope: "row" }, "all"), element("td", {}, ""), word(token.tops[last]), element("td", {}, percent(token.top_probs[last])));
    const head = element("thead", {}, element("tr", {}, ...["", "weight", "would say", "with"].map((name) => element("th", { scope: "col" }, name))));
    inspector.replaceChildren(
      element("p", { class: "what" }, visible(token.text || token.token)),
      element("p", { class: "muted small" }, `Entropy ${token.entropy.toFixed(3)} of at most ${Math.log(last).toFixed(3)} nats; all together give this token ${percent(token.token_probs[last])}.`),
      element("table", { class: "figures" }, head, element("tbody", {}, ...rows, together)),
    );
    inspector.hidden = false;
  }

  function move(event) {
    const index = Number(event.target.dataset.index);
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, ArrowDown: index + 10, ArrowUp: index - 10, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined || Number.isNaN(index)) return;
    event.preventDefault();
    const place = Math.max(0, Math.min(spans.length - 1, next));
    spans[index].tabIndex = -1;
    spans[place].tabIndex = 0;
    spans[place].focus();
  }

  function shown(now) {
    isShown = now;
    if (now) load();
  }

  return { offer, look, shown };
}

function swatch(stream) {
  const made = element("span", { class: "swatch", title: `stream ${stream}` }, String(stream));
  made.style.backgroundColor = fill(stream);
  if (stream % 8 === 4 || stream % 8 === 5) made.style.color = "#ffffff";
  if (stream % 8 === 5) made.style.backgroundColor = "#B34F00";
  return made;
}

function meter(weight, stream) {
  const inner = element("i");
  inner.style.width = `${100 * weight}%`;
  inner.style.backgroundColor = fill(stream);
  return element("span", { class: "meter", "aria-hidden": "true" }, inner);
}

const word = (text) => element("td", { class: "word", title: text }, visible(text));
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const brief = (text) => (text.length > 60 ? `${text.slice(0, 57)}...` : text);
