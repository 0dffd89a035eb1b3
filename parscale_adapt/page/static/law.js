import { element, find, get, show, size, table } from "./dom.js";
import { drawChart } from "./chart.js";
import { line } from "./colors.js";

const SMALLEST = 1e8;
const LARGEST = 1e11;
const POWERS = new Set(["input_len", "output_len"]);

export function openLaw() {
  const form = find("#law-form");
  const slider = form.elements.num_params;
  let choices = null;
  let exact = null; // the size of the chosen backbone, until the slider is moved
  let asked = null;
  let isStarted = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target === slider) exact = null;
    if (event.target === form.elements.model) settle();
    describe();
    ask();
  });

  async function start() {
    isStarted = true;
    try {
      choices = await get("/api/law/choices");
    } catch (error) {
      isStarted = false;
      show(find("#law-problem"), error.message);
      return;
    }
    const { law, model, device } = form.elements;
    law.replaceChildren(...choices.laws.map((name) => element("option", { value: name }, lawName(name))));
    model.replaceChildren(...choices.models.map((one) => element("option", { value: one.name }, one.label)));
    device.replaceChildren(...choices.devices.map((name) => element("option", { value: name }, name)));
    if (choices.models.some((one) => one.name === "1.6B")) model.value = "1.6B";
    if (choices.devices.includes("a100-80gb")) device.value = "a100-80gb";
    settle();
    describe();
    ask();
  }

  function settle() {
    exact = choices.models.find((one) => one.name === form.elements.model.value).num_params;
    slider.value = 1000 * Math.log(exact / SMALLEST) / Math.log(LARGEST / SMALLEST);
  }

  function values() {
    const numbers = Object.fromEntries(["num_streams", "batch_size", "input_len", "output_len"].map((name) => [name, POWERS.has(name) ? 2 ** form.elements[name].valueAsNumber : form.elements[name].valueAsNumber]));
    const params = exact ?? SMALLEST * (LARGEST / SMALLEST) ** (slider.valueAsNumber / 1000);
    return { law: form.elements.law.value, model: form.elements.model.value, device: form.elements.device.value, num_params: Math.round(params), ...numbers };
  }

  function describe() {
    for (const [name, value] of Object.entries(values())) {
      const output = form.elements[name].parentElement.querySelector("output");
      const shown = name === "num_params" ? size(value) : String(value);
      if (output) output.textContent = shown;
      if (output) form.elements[name].setAttribute("aria-valuetext", shown);
    }
  }

  async function ask() {
    if (asked) asked.abort();
    const mine = new AbortController();
    asked = mine;
    try {
      const found = await get(`/api/law?${new URLSearchParams(values())}`, mine.signal);
      if (asked !== mine) return;
      show(find("#law-problem"), "");
      draw(found);
    } catch (error) {
      if (!mine.signal.aborted) show(find("#law-problem"), error.message);
    }
  }

  function draw(found) {
    const { comparison, predictions } = found;
    const chosen = predictions.find((row) => row.num_streams === comparison.rows[1].num_streams);
    show(find("#law-headline"), `${size(comparison.rows[0].backbone_params)} parameters in ${chosen.num_streams} streams are predicted to act like ${size(comparison.larger_params)}: loss ${comparison.equal_loss.toFixed(4)} instead of ${comparison.loss.toFixed(4)} nats per token.`);
    const most = ["memory_gib", "latency_seconds"].map((name) => Math.max(...comparison.rows.map((row) => row[name])));
    const losses = [comparison.loss, comparison.equal_loss, comparison.equal_loss];
    const names = ["the backbone", `its ${chosen.num_streams} streams`, "a larger model of equal loss"];
    find("#law-table").replaceChildren(...table("", ["", "parameters", "loss", "memory", "latency"], comparison.rows.map((row, index) => [
      names[index], size(row.backbone_params), losses[index].toFixed(4),
      bar(row.memory_gib / most[0], `${row.memory_gib.toPrecision(3)} GiB`), bar(row.latency_seconds / most[1], seconds(row.latency_seconds)),
    ])));
    const tooLarge = comparison.rows.flatMap((row, index) => (row.fits ? [] : [names[index]]));
    const ratio = (value) => (Number.isFinite(value) ? `${value.toFixed(1)}x` : "far more of");
    show(find("#law-notes"), `Estimate in bfloat16. The larger model adds ${ratio(comparison.memory_ratio)} the memory and ${ratio(comparison.latency_ratio)} the latency that the streams add.${tooLarge.length ? ` Too large for ${comparison.device}: ${tooLarge.join(", ")}.` : ""}`);
    drawChart(find("#law-chart"), picture(found, chosen));
    find("#law-predictions").replaceChildren(...table("What the law says of this backbone", ["streams P", "parameters with adapter", "loss", "equivalent parameters", "gain"], predictions.map((row) => [String(row.num_streams), size(row.num_params), row.loss.toFixed(4), size(row.equivalent_params), `${row.gain.toFixed(2)}x`])));
  }

  function picture(found, chosen) {
    const { comparison, curves, points } = found;
    const here = comparison.rows[0].backbone_params;
    const color = (count) => (count === 1 ? "var(--muted)" : line([0, 4, 2, 5, 6][Math.min(4, Math.round(Math.log2(count)))]));
    const dots = curves.map((curve) => ({ name: `run with P = ${curve.num_streams}, N =`, color: color(curve.num_streams), hollow: true, points: points.filter((point) => point.num_streams === curve.num_streams).map((point) => [point.num_params, point.loss]) }));
    return {
      title: "Loss (nats per token) against parameters; open circles are the runs that the law was fitted to",
      summary: `With ${chosen.num_streams} streams ${size(here)} parameters reach the loss of ${size(comparison.larger_params)}.`,
      lines: [
        ...curves.map((curve) => ({ name: `P = ${curve.num_streams}`, color: color(curve.num_streams), points: curve.num_params.map((params, index) => [params, curve.loss[index]]) })),
        { points: [[here, comparison.equal_loss], [comparison.larger_params, comparison.equal_loss]], color: "var(--ink)", dash: "3 4", width: 1.5 },
      ],
      dots: [...dots, { name: "chosen", shape: "diamond", color: "var(--ink)", points: [[here, comparison.equal_loss]] }, { name: "larger model", shape: "circle", radius: 5, color: "var(--ink)", points: [[comparison.larger_params, comparison.equal_loss]] }],
      x: { label: "non-embedding parameters", log: true, format: size },
      y: { format: (value) => String(Number(value.toFixed(4))) },
      height: 320,
    };
  }

  return { shown: (now) => { if (now && !isStarted) start(); } };
}

function bar(share, text) {
  const inner = element("i");
  inner.style.width = `${100 * share}%`;
  return element("span", { class: "measure" }, element("span", { class: "meter wide", "aria-hidden": "true" }, inner), element("span", { class: "amount" }, text));
}

const seconds = (value) => (value < 1 ? `${(1000 * value).toPrecision(3)} ms` : `${value.toPrecision(3)} s`);
const lawName = (name) => ({ "stack-v2-python": "paper: Stack-V2 Python", pile: "paper: Pile" })[name] || `yours: ${name.split("/").at(-1)}`;
