// Line charts as SVG: direct labels at the ends of lines, a mark for each kind of point, no more ticks than are read.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 10, bottom: 38, left: 54 };
const observers = new WeakMap();

function svg(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// chart: { title, summary, lines: [{ name, points: [[x, y]], color, dash, width }], dots: [{ points, color, shape, name }], x: { label, log, format }, y: { label, format, zero } }
export function drawChart(figure, chart) {
  const caption = document.createElement("figcaption");
  caption.textContent = chart.title;
  const draw = () => {
    const width = Math.max(260, figure.clientWidth);
    figure.replaceChildren(caption, picture(chart, width, chart.height || 260));
  };
  if (observers.has(figure)) observers.get(figure).disconnect();
  let last = figure.clientWidth;
  const observer = new ResizeObserver(() => {
    if (figure.clientWidth === last) return;
    last = figure.clientWidth;
    draw();
  });
  observer.observe(figure);
  observers.set(figure, observer);
  draw();
}

function picture(chart, width, height) {
  const right = 12 + 7 * Math.max(0, ...chart.lines.map((line) => (line.name || "").length));
  const all = [...chart.lines.flatMap((line) => line.points), ...(chart.dots || []).flatMap((dot) => dot.points)];
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${chart.title}. ${chart.summary || ""}` });
  if (!all.length) return drawn;
  const area = { left: MARGIN.left, right: width - right, top: MARGIN.top, bottom: height - MARGIN.bottom };
  const x = scale(all.map((point) => point[0]), area.left, area.right, chart.x.log);
  const ys = all.map((point) => point[1]);
  const y = scale(chart.y.zero ? [...ys, 0] : ys, area.bottom, area.top, false);
  drawAxes(drawn, chart, area, x, y);
  for (const line of chart.lines) {
    const points = line.points.map((point) => `${x.place(point[0]).toFixed(1)},${y.place(point[1]).toFixed(1)}`);
    drawn.append(svg("polyline", { points: points.join(" "), fill: "none", stroke: line.color, "stroke-width": line.width || 2, "stroke-dasharray": line.dash || "none", "stroke-linejoin": "round" }));
  }
  for (const dot of chart.dots || []) for (const point of dot.points) drawn.append(mark(dot, x.place(point[0]), y.place(point[1]), point, chart));
  drawEnds(drawn, chart, area, x, y);
  return drawn;
}

function mark(dot, left, top, point, chart) {
  const made = dot.shape === "diamond"
    ? svg("path", { d: `M${left} ${top - 7}l7 7l-7 7l-7-7z`, fill: dot.color, stroke: "var(--ground)", "stroke-width": 1.5 })
    : svg("circle", { cx: left, cy: top, r: dot.radius || 4, fill: dot.hollow ? "var(--ground)" : dot.color, stroke: dot.color, "stroke-width": 1.5 });
  const format = (axis, value) => (axis.format ? axis.format(value) : String(value));
  made.append(svg("title", {}, `${dot.name || ""} ${format(chart.x, point[0])}: ${format(chart.y, point[1])}`));
  return made;
}

function drawAxes(drawn, chart, area, x, y) {
  for (const tick of y.ticks(5)) {
    const top = y.place(tick);
    drawn.append(svg("line", { class: "grid", x1: area.left, x2: area.right, y1: top, y2: top }));
    drawn.append(svg("text", { class: "tick", x: area.left - 8, y: top + 4, "text-anchor": "end" }, chart.y.format ? chart.y.format(tick) : shorten(tick)));
  }
  for (const tick of x.ticks(Math.max(3, Math.floor((area.right - area.left) / 90)))) {
    drawn.append(svg("text", { class: "tick", x: x.place(tick), y: area.bottom + 16, "text-anchor": "middle" }, chart.x.format ? chart.x.format(tick) : shorten(tick)));
  }
  drawn.append(svg("text", { class: "tick", x: (area.left + area.right) / 2, y: area.bottom + 34, "text-anchor": "middle" }, chart.x.label));
}

function drawEnds(drawn, chart, area, x, y) {
  const ends = chart.lines.filter((line) => line.name && line.points.length).map((line) => ({ line, top: y.place(line.points.at(-1)[1]) }));
  ends.sort((one, other) => one.top - other.top);
  let previous = -Infinity;
  for (const end of ends) { end.text = Math.max(end.top, previous + 14); previous = end.text; }
  const over = previous - area.bottom;
  if (over > 0) for (let index = ends.length - 1, limit = area.bottom; index >= 0; index -= 1, limit -= 14) ends[index].text = Math.min(ends[index].text, limit);
  for (const { line, text, top } of ends) {
    const left = x.place(line.points.at(-1)[0]);
    drawn.append(svg("line", { x1: left, y1: top, x2: area.right + 6, y2: text, stroke: line.color, "stroke-width": 1 }));
    drawn.append(svg("text", { x: area.right + 9, y: text + 4 }, line.name));
  }
}

function scale(values, start, end, isLog) {
  const real = isLog ? values.map(Math.log10) : values;
  let low = Math.min(...real);
  let high = Math.max(...real);
  if (low === high) { low -= 0.5; high += 0.5; }
  const pad = isLog ? 0 : (high - low) * 0.05;
  if (!isLog && end < start) { low -= low === 0 ? 0 : pad; high += pad; }
  const place = (value) => start + (((isLog ? Math.log10(value) : value) - low) / (high - low)) * (end - start);
  return { place, ticks: (count) => (isLog ? logTicks(low, high, count) : evenTicks(low, high, count)) };
}

function evenTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) ticks.push(Number((index * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, count) {
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(low); power <= high; power += 1) for (const factor of factors) ticks.push(factor * 10 ** power);
    const inside = ticks.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
    if (inside.length <= count + 1 || factors.length === 1) return inside;
  }
  return [];
}

function shorten(value) {
  return Math.abs(value) >= 10000 ? `${Number((value / 1000).toPrecision(3))}k` : String(value);
}
