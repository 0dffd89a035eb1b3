import { answerOf, bytes, element, find, post } from "./dom.js";

const STORE = "parscale";
const EMPTY = "Ask something.\nThe dial says how many streams answer; Compare asks all of them at once.";

export function openChat(lookAtStreams, offerAnswers) {
  const transcript = find("#transcript");
  const fields = { system: find("#system"), temperature: find("#temperature"), seed: find("#seed"), longest: find("#max-new-tokens") };
  let voices = [];
  let turns = [];
  let chosen = null;
  let running = null;
  let isLeaving = false; // a reload cuts the answer off, which is no problem of the server's
  transcript.dataset.empty = EMPTY;

  restore();
  fields.temperature.addEventListener("input", showTemperature);
  for (const field of Object.values(fields)) field.addEventListener("change", keep);
  window.addEventListener("beforeunload", () => { isLeaving = true; });
  window.addEventListener("pagehide", keep);
  find("#composer").addEventListener("submit", (event) => { event.preventDefault(); ask([chosen]); });
  find("#compare").addEventListener("click", () => ask(voices));
  find("#stop").addEventListener("click", () => running && running.abort());
  find("#reset").addEventListener("click", reset);
  find("#question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!find("#ask").disabled) ask([chosen]);
  });

  function reset() {
    if (running) running.abort();
    turns = [];
    transcript.replaceChildren();
    keep();
    offerAnswers(given());
    find("#question").focus();
  }

  function update(status) {
    find("#voice-line").textContent = status.state === "failed" ? "There is no model to ask." : status.state === "loading" ? "The model is being loaded." : "";
    if (status.state !== "ready") return;
    voices = status.voices;
    chosen = voices.find((voice) => chosen && voice.name === chosen.name) || voices.at(-1);
    find("#dial").disabled = false;
    find("#dial .choices").replaceChildren(...voices.map((voice) => choice(voice)));
    describe();
    setRunning(running);
  }

  function choice(voice) {
    const input = element("input", { type: "radio", name: "voice", value: voice.name, checked: voice === chosen, "aria-label": `${voice.num_streams} streams, ${voice.name}`,
      onchange: () => { chosen = voice; describe(); keep(); } });
    return element("label", { title: voice.name }, input, String(voice.num_streams));
  }

  function describe() {
    const streams = chosen.num_streams === 1 ? "one stream" : `${chosen.num_streams} streams`;
    find("#voice-line").textContent = `${chosen.name}: ${streams}`;
  }

  function setRunning(controller) {
    running = controller;
    find("#ask").disabled = find("#compare").disabled = running !== null || chosen === null || voices.length === 0;
    find("#compare").hidden = voices.length < 2;
    find("#stop").hidden = running === null;
  }

  function messagesBefore(question) {
    const system = fields.system.value.trim();
    const said = turns.flatMap((turn) => {
      const answer = turn.answers.find((one) => one.voice === turn.kept && one.text) || turn.answers.find((one) => one.text);
      return answer ? [{ role: "user", content: turn.question }, { role: "assistant", content: answer.text }] : [];
    });
    return [...(system ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: question }];
  }

  async function ask(asked) {
    const question = find("#question").value;
    if (!question.trim() || running) return;
    const messages = messagesBefore(question);
    const answers = asked.map((voice) => ({ voice: voice.name, num_streams: voice.num_streams, messages, text: "", tokens: [], figures: null }));
    const turn = { question, answers, kept: chosen.name, problem: null };
    turns.push(turn);
    const cards = addTurn(turn, true);
    find("#question").value = "";
    isLeaving = false;
    setRunning(new AbortController());
    const signal = running.signal;
    try {
      const body = { messages, voices: asked.map((voice) => voice.name), temperature: fields.temperature.valueAsNumber, seed: fields.seed.valueAsNumber, max_new_tokens: fields.longest.valueAsNumber };
      const response = await post("/api/answer", body, signal);
      if (!response.ok) await answerOf(response);
      for await (const event of lines(response)) take(event, turn, cards);
    } catch (error) {
      if (signal.aborted || isLeaving) answers.forEach((answer) => { answer.figures ??= { ended: "stopped" }; });
      else turn.problem = error instanceof TypeError ? "The server does not answer." : error.message;
    }
    cards.finish();
    if (!answers.some((answer) => answer.text) && turn.problem) find("#question").value = question;
    setRunning(null);
    keep();
    offerAnswers(given());
  }

  function take(event, turn, cards) {
    if (event.event === "problem") throw new Error(event.problem);
    if (event.event === "tokens") {
      const near = window.innerHeight + window.scrollY > document.body.scrollHeight - 120;
      event.tokens.forEach((token, index) => {
        if (token === null) return;
        turn.answers[index].tokens.push(token);
        turn.answers[index].text += event.texts[index];
        cards.say(index, turn.answers[index].text);
      });
      if (near) window.scrollTo(0, document.body.scrollHeight);
    }
    if (event.event === "end") {
      event.answers.forEach((figures, index) => {
        Object.assign(turn.answers[index], { text: figures.text, tokens: figures.tokens, figures: { ...figures, first_token_seconds: event.first_token_seconds } });
      });
    }
  }

  function addTurn(turn, isRunning = false) {
    const texts = turn.answers.map((answer) => element("div", { class: "text" }, answer.text));
    const cards = turn.answers.map((answer, index) => {
      const title = element("h3", {}, `P = ${answer.num_streams}`);
      return element("article", { class: isRunning ? "answer running" : "answer", "aria-label": `Answer of ${answer.voice}` }, element("header", {}, title, element("span", { class: "muted small" }, answer.voice)), texts[index]);
    });
    const box = element("div", { class: "answers", "aria-live": isRunning ? "polite" : null, "aria-busy": isRunning ? "true" : null }, ...cards);
    const note = cards.length > 1 ? element("p", { class: "muted small" }, "All answers grow together in one batch and share its speed; ask one P alone for its own.") : "";
    transcript.append(element("div", { class: "question" }, turn.question), element("div", { class: "turn" }, box, note));
    const finish = () => {
      box.removeAttribute("aria-busy");
      turn.answers.forEach((answer, index) => {
        cards[index].classList.remove("running");
        texts[index].textContent = answer.text;
        if (!answer.text && answer.figures) texts[index].append(element("span", { class: "muted" }, "(no text)"));
        cards[index].append(...details(answer));
      });
      if (!turn.problem) return;
      const notice = element("p", { class: "notice", role: "alert" }, turn.problem);
      if (turn.answers.some((answer) => answer.text)) box.after(notice);
      else box.replaceWith(notice);
    };
    if (!isRunning) finish();
    else box.scrollIntoView({ block: "end" });
    return { say: (index, text) => { texts[index].textContent = text; }, finish };
  }

  function details(answer) {
    const figures = answer.figures || {};
    const entries = [
      ["tokens/s", figures.tokens_per_second?.toPrecision(3)],
      ["ms per token", figures.ms_per_token?.toPrecision(3)],
      ["first token", Number.isFinite(figures.first_token_seconds) ? `${figures.first_token_seconds.toPrecision(2)} s` : undefined],
      ["cache", Number.isFinite(figures.cache_bytes) ? bytes(figures.cache_bytes) : undefined],
      ["tokens", answer.tokens.length || undefined],
    ].filter(([, value]) => value !== undefined);
    const list = element("dl", {}, ...entries.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
    const note = { stopped: "Stopped.", length: "Cut at the longest answer." }[figures.ended];
    const look = element("button", { type: "button", class: "plain", onclick: () => lookAtStreams(answer) }, "See the streams");
    return [note ? element("p", { class: "muted small" }, note) : null, entries.length ? list : null, answer.num_streams > 1 && answer.tokens.length ? look : null].filter(Boolean);
  }

  function given() {
    return turns.flatMap((turn) => turn.answers).filter((answer) => answer.num_streams > 1 && answer.tokens.length);
  }

  function showTemperature() {
    find("#temperature-value").textContent = fields.temperature.value;
  }

  function keep() {
    const values = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]));
    try {
      sessionStorage.setItem(STORE, JSON.stringify({ turns, chosen, values, draft: find("#question").value }));
    } catch {
      sessionStorage.removeItem(STORE); // it is full: the conversation goes on, and a reload forgets it
    }
  }

  function restore() {
    const kept = JSON.parse(sessionStorage.getItem(STORE) || "{}");
    for (const [name, value] of Object.entries(kept.values || {})) fields[name].value = value;
    turns = (kept.turns || []).map((turn) => ({ ...turn, answers: turn.answers.map((answer) => ({ ...answer, figures: answer.figures || { ended: "stopped" } })) }));
    chosen = kept.chosen || null;
    find("#question").value = kept.draft || "";
    showTemperature();
    turns.forEach((turn) => addTurn(turn));
    offerAnswers(given());
  }

  return { update, shown: () => {} };
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
