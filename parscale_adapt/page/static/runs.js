import { element, find, get, show, table } from "./dom.js";
import { drawChart } from "./chart.js";
import { line } from "./colors.js";

const SECONDS = 2;

export function openRuns() {
  let chosen = null;
  let isShown = false;
  let timer = null;

  async function refresh() {
    clearTimeout(timer);
    if (!isShown) return;
    try {
      const overview = await get("/api/runs");
      draw(overview);
      if (chosen !== null) drawDetails(await get(`/api/run?${new URLSearchParams({ run: chosen })}`));
    } catch (error) {
      show(find("#runs-empty"), error.message);
    }
    timer = setTimeout(refresh, 1000 * SECONDS);
  }

  function draw({ folder, is_there: isThere, runs, num_older: numOlder }) {
    show(find("#runs-empty"), runs.length ? "" : isThere ? `No run of a recipe in ${folder} yet. Start one, with an --output_dir below it, and it appears here.` : `There is no folder ${folder}: start the page with --runs FOLDER, or train there.`);
    show(find("#runs-older"), numOlder ? `${numOlder} older runs in ${folder} are not shown: start the page with --runs on a folder of them.` : "");
    find("#runs-view").hidden = runs.length === 0;
    if (!runs.some((run) => run.name === chosen)) chosen = runs.length ? runs[0].name : null;
    const focused = document.activeElement?.dataset?.run;
    const rows = runs.map((run) => [name(run), element("span", { class: `state ${run.state}` }, run.state), number(run.num_streams, 0), number(run.step, 0), number(run.loss), number(run.heldout_loss), tokens(run.num_tokens)]);
    find("#runs-table").replaceChildren(...table("", ["run", "", "P", "steps", "loss", "held-out loss", "tokens"], rows));
    [...find("#runs-table").tBodies[0].rows].forEach((row, index) => row.setAttribute("aria-selected", runs[index].name === chosen));
    if (focused !== undefined) [...find("#runs-table").querySelectorAll("button")].find((button) => button.dataset.run === focused)?.focus();
  }

  function name(run) {
    return element("button", { type: "button", "data-run": run.name, onclick: () => { chosen = run.name; refresh(); } }, run.name === "." ? run.label : run.name);
  }

  function drawDetails(run) {
    if (run.name !== chosen) return;
    find("#run-details").hidden = false;
    find("#run-title").textContent = run.name === "." ? run.label : run.name;
    const step = { label: "step" };
    const training = { name: "training", color: line(4), points: run.training };
    const heldout = { name: "held-out", color: line(5), points: run.heldout_curve, dash: "6 4" };
    const losses = [training, heldout].filter((one) => one.points.length);
    place("#run-loss", { title: `Loss${run.loss_label.startsWith("loss") ? run.loss_label.slice(4) : `: ${run.loss_label}`}`, lines: losses, dots: [{ name: "held-out, step", color: line(5), points: run.heldout_curve, radius: 3 }], x: step, y: {} });
    const streams = run.weights.map((points, stream) => ({ name: `stream ${stream}`, color: line(stream), points }));
    place("#run-weights", { title: "Mean weight of each stream", lines: streams, x: step, y: { zero: true } });
    place("#run-speed", { title: "Tokens per second", lines: [{ color: line(4), points: run.speed }], x: step, y: { zero: true } });
    place("#run-entropy", { title: "Entropy of the weights (nats)", lines: [{ color: line(2), points: run.entropy }], x: step, y: { zero: true } });
    show(find("#run-warning"), run.troubles.join(" "));
    const rows = [["held-out loss", run.heldout_loss], ...Object.entries(run.heldout)].filter(([, value]) => value !== null).map(([what, value]) => [what, number(value)]);
    find("#run-heldout").hidden = rows.length === 0;
    find("#run-heldout").replaceChildren(...table("Held out, once training had ended", ["", ""], rows));
  }

  function place(selector, chart) {
    const figure = find(selector);
    figure.hidden = !chart.lines.some((one) => one.points.length);
    if (figure.hidden) return;
    const signature = JSON.stringify([chosen, chart.lines]);
    if (figure.dataset.drawn === signature) return;
    figure.dataset.drawn = signature;
    drawChart(figure, { height: 220, ...chart });
  }

  return { shown: (now) => { isShown = now; refresh(); } };
}

const number = (value, digits = 4) => (value === null || value === undefined ? "" : Number.isInteger(value) ? value.toLocaleString("en-US") : value.toFixed(digits));
const tokens = (value) => (value === null ? "" : value >= 1e6 ? `${(value / 1e6).toFixed(2)}M` : value.toLocaleString("en-US"));
