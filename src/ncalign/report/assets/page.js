"use strict";
// Tables that sort and filter, and charts with values under the pointer and zoom. Every text goes into the page as text.

const SVG = "http://www.w3.org/2000/svg";
const COLOURS = 8;
const MISSING = "–";

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== "") made.textContent = text;
  return made;
}

function drawn(parent, tag, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== "") made.textContent = text;
  parent.append(made);
  return made;
}

// --- Tables

function cellValue(row, place) {
  const cell = row.cells[place];
  const text = (cell.dataset.value ?? cell.textContent).trim();
  if (text === "" || text === MISSING) return null;
  const number = Number(text);
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sortBy(table, head, place) {
  const falling = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [cellValue(row, place), row]);
  const known = rows.filter(([value]) => value !== null).sort((a, b) => (falling ? -1 : 1) * compare(a[0], b[0]));
  // What is missing stands last in either order.
  body.append(...[...known, ...rows.filter(([value]) => value === null)].map(([, row]) => row));
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    if (head.textContent.trim() === "") return;
    const button = element("button", { type: "button" }, head.textContent);
    button.addEventListener("click", () => sortBy(table, head, place));
    head.replaceChildren(button);
  });
}

function makeFilter(table) {
  const box = element("div", { class: "tools" });
  const input = element("input", { type: "search", placeholder: "filter rows", "aria-label": "filter rows" });
  const count = element("small", { role: "status" });
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const left = rows.filter((row) => !row.hidden).length;
    count.textContent = words.length ? `${left} of ${rows.length} rows` : "";
  });
  box.append(input, count);
  (table.closest(".wide") ?? table).before(box);
}

// --- Charts

function shownNumber(value) {
  if (value === null || value === undefined) return MISSING;
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  return String(Number(value.toPrecision(4)));
}

// Round numbers over a range, at most about so many; of steps and other whole numbers, whole ones.
function ticks(low, high, count, whole = false) {
  const rough = Math.max((high - low) / Math.max(1, count), whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); power <= Math.log10(high) + 1e-9; power++) found.push(10 ** power);
  return found.length > 1 ? found : [low, high];
}

function scale(domain, range, isLog) {
  const at = isLog ? Math.log : (value) => value;
  const [low, high] = domain.map(at);
  return {
    to: (value) => range[0] + ((at(value) - low) / (high - low)) * (range[1] - range[0]),
    from: (place) => {
      const value = low + ((place - range[0]) / (range[1] - range[0])) * (high - low);
      return isLog ? Math.exp(value) : value;
    },
  };
}

// The range of some numbers, with a little room; of equal ones, a range around them.
function extent(values, isLog, least) {
  const known = values.filter((value) => Number.isFinite(value) && (!isLog || value > 0));
  if (!known.length) return isLog ? [1, 10] : [0, 1];
  let low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  if (least !== undefined) { low = Math.min(low, least); high = Math.max(high, least); }
  if (isLog) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  const room = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  return [least !== undefined && low === least ? low : low - room, high + room];
}

const groups = new Map();

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.spec = JSON.parse(figure.querySelector("script").textContent);
    this.hidden = new Set();
    this.zoom = null;
    this.logX = this.spec.log.includes("x");
    this.logY = this.spec.log.includes("y");
    this.peers = this.spec.group ? groups.get(this.spec.group) ?? [] : [];
    this.peers.push(this);
    if (this.spec.group) groups.set(this.spec.group, this.peers);
    this.svg = drawn(figure, "svg", { role: "img", "aria-label": this.spec.title });
    this.tip = element("div", { class: "tip", hidden: "" });
    figure.append(this.tip);
    this.addLegend();
    this.back = element("button", { type: "button", class: "back", hidden: "" }, "show all");
    this.back.addEventListener("click", () => this.zoomTo(null));
    figure.querySelector("figcaption").append(this.back);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  addLegend() {
    if (this.spec.series.length < 2) return;
    const legend = element("div", { class: "legend" });
    this.spec.series.forEach((one, place) => {
      const button = element("button", { type: "button", "aria-pressed": "true", class: this.look(one, place) });
      button.append(element("span", {}, one.name));
      button.addEventListener("click", () => {
        this.hidden.has(place) ? this.hidden.delete(place) : this.hidden.add(place);
        button.setAttribute("aria-pressed", String(!this.hidden.has(place)));
        this.draw();
      });
      legend.append(button);
    });
    this.figure.append(legend);
  }

  look(one, place) {
    return `s${(one.colour ?? place) % COLOURS}${one.dashed ? " held" : ""}`;
  }

  zoomTo(range) {
    for (const peer of this.peers) {
      peer.zoom = range;
      peer.back.hidden = range === null;
      peer.draw();
    }
  }

  // The series that are shown, with their points in the range.
  shown() {
    const found = [];
    this.spec.series.forEach((one, place) => {
      if (this.hidden.has(place)) return;
      const points = this.zoom === null ? one.points : one.points.filter(([x]) => x >= this.zoom[0] && x <= this.zoom[1]);
      found.push({ ...one, points, look: this.look(one, place) });
    });
    return found;
  }

  listen() {
    let start = null;
    const place = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.spec.categories.length) return;
      start = place(event);
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (start !== null && Math.abs(place(event) - start) > 4) {
        if (!this.svg.hasPointerCapture(event.pointerId)) this.svg.setPointerCapture(event.pointerId);
        this.mark(start, place(event));
      } else this.point(event);
    });
    this.svg.addEventListener("pointerup", (event) => {
      const end = place(event);
      if (start !== null && Math.abs(end - start) > 8) this.zoomTo([start, end].map((one) => this.x.from(one)).sort((a, b) => a - b));
      start = null;
      this.mark(0, 0);
    });
    this.svg.addEventListener("pointercancel", () => { start = null; this.mark(0, 0); });
    this.svg.addEventListener("pointerleave", () => { this.tip.hidden = true; this.rule?.setAttribute("visibility", "hidden"); });
    this.svg.addEventListener("dblclick", () => this.zoomTo(null));
  }

  mark(from, to) {
    this.selection?.setAttribute("x", Math.min(from, to));
    this.selection?.setAttribute("width", Math.abs(to - from));
  }

  // What lies under the pointer: of lines each value at the nearest step, else the nearest point.
  point(event) {
    const box = this.svg.getBoundingClientRect(), [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const distance = ([x, y]) => Math.hypot(this.x.to(x) - px, this.spec.lines ? 0 : this.y.to(y) - py);
    const nearest = this.shown().flatMap((one) => {
      const known = one.points.filter(([x, y]) => y !== null && x !== null);
      return known.length ? [{ one, point: known.reduce((a, b) => (distance(b) < distance(a) ? b : a)) }] : [];
    });
    if (!nearest.length) return;
    const best = nearest.reduce((a, b) => (distance(b.point) < distance(a.point) ? b : a)).point;
    const near = this.spec.lines ? nearest.filter(({ point }) => Math.abs(this.x.to(point[0]) - this.x.to(best[0])) < 12)
      : nearest.filter(({ point }) => point === best);
    const labelled = this.spec.across ? this.spec.categories[best[1]] : this.spec.categories.length ? this.spec.categories[best[0]] : null;
    const head = labelled ?? `${this.spec.x || "x"}: ${shownNumber(best[0])}`;
    this.tip.replaceChildren(element("b", {}, head));
    for (const { one, point } of near) {
      const value = this.spec.across ? point[0] : point[1];
      const arms = point.length > 2 && point[2] !== null ? ` [${shownNumber(point[2])}, ${shownNumber(point[3])}]` : "";
      const name = this.spec.series.length > 1 ? `${one.name}: ` : this.spec.y && !this.spec.across ? `${this.spec.y}: ` : "";
      const line = element("div", { class: one.look });
      line.append(element("span", {}, `${name}${shownNumber(value)}${arms}`));
      this.tip.append(line);
    }
    this.tip.hidden = false;
    const left = this.x.to(best[0]), width = this.figure.clientWidth;
    this.tip.style.left = `${Math.max(0, Math.min(left + 12, width - this.tip.offsetWidth))}px`;
    this.tip.style.top = `${this.svg.offsetTop + 8}px`;
    if (left + 12 + this.tip.offsetWidth > width) this.tip.style.left = `${Math.max(0, left - 12 - this.tip.offsetWidth)}px`;
    for (const [name, value] of [["x1", left], ["x2", left], ["visibility", "visible"]]) this.rule.setAttribute(name, value);
  }

  domains(series) {
    const points = series.flatMap((one) => one.points);
    const names = this.spec.categories, bars = series.some((one) => one.kind === "bars");
    const ranged = (at) => points.flatMap((point) => [point[at], ...point.slice(2)]);
    if (this.spec.across) return [extent([...ranged(0), ...this.spec.even], this.logX), [names.length - 0.5, -0.5]];
    const y = extent([...ranged(1), ...this.spec.even], this.logY, bars ? 0 : undefined);
    if (names.length) return [[-0.5, names.length - 0.5], y];
    if (this.zoom) return [this.zoom, y];
    const x = extent(points.map(([one]) => one), this.logX);
    return [this.spec.width && !this.logX ? [x[0] - this.spec.width / 2, x[1] + this.spec.width / 2] : x, y];
  }

  draw() {
    const width = this.figure.clientWidth;
    if (!width) return;
    const series = this.shown(), names = this.spec.categories, [dx, dy] = this.domains(series);
    const height = this.spec.across ? 60 + 34 * names.length : 240;
    const yTicks = this.spec.across ? names.map((_, k) => k) : this.logY ? logTicks(...dy) : ticks(...dy, 5);
    const yNames = yTicks.map((one) => (this.spec.across ? names[one] : shownNumber(one)));
    const left = Math.min(width * 0.4, 14 + 7 * Math.max(1, ...yNames.map((one) => one.length)));
    const [right, top, bottom] = [12, 8, height - 38];
    this.x = scale(dx, [left, width - right], this.logX);
    this.y = scale(dy, [bottom, top], this.logY && !this.spec.across);
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.drawAxes(dx, yTicks, yNames, { left, right: width - right, top, bottom, height, width });
    this.rule = drawn(this.svg, "line", { class: "rule", y1: top, y2: bottom, visibility: "hidden" });
    for (const value of this.spec.even) {
      const at = this.spec.across ? { x1: this.x.to(value), x2: this.x.to(value), y1: top, y2: bottom }
        : { x1: left, x2: width - right, y1: this.y.to(value), y2: this.y.to(value) };
      drawn(this.svg, "line", { class: "even", ...at });
    }
    series.forEach((one, place) => this.drawSeries(one, place, series.length));
    this.selection = drawn(this.svg, "rect", { class: "zoom", y: top, height: bottom - top, width: 0 });
  }

  drawAxes(dx, yTicks, yNames, box) {
    yTicks.forEach((value, k) => {
      const y = this.y.to(value);
      drawn(this.svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y });
      drawn(this.svg, "text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, this.fitted(yNames[k], box.left - 8));
    });
    const names = this.spec.across ? [] : this.spec.categories;
    const whole = this.spec.series.every((one) => one.points.every(([x]) => Number.isInteger(x)));
    const xTicks = names.length ? names.map((_, k) => k) : this.logX ? logTicks(...dx) : ticks(...dx, Math.max(2, box.width / 90), whole);
    const room = (box.right - box.left) / Math.max(1, xTicks.length);
    xTicks.forEach((value) => {
      const x = this.x.to(value), name = names.length ? this.fitted(names[value], room) : shownNumber(value);
      if (!names.length) drawn(this.svg, "line", { class: "grid", x1: x, x2: x, y1: box.top, y2: box.bottom });
      drawn(this.svg, "text", { x, y: box.bottom + 15, "text-anchor": "middle" }, name);
    });
    const middle = (box.left + box.right) / 2;
    const label = this.spec.across || !this.spec.y ? this.spec.x : `${this.spec.x}${this.spec.x ? " · " : ""}up: ${this.spec.y}`;
    drawn(this.svg, "text", { x: middle, y: box.height - 5, "text-anchor": "middle" }, this.fitted(label, box.width));
  }

  fitted(text, room) {
    const most = Math.max(1, Math.floor(room / 6.6));
    return text.length > most ? `${text.slice(0, most - 1)}…` : text;
  }

  drawSeries(one, place, count) {
    const known = one.points.filter(([x, y]) => x !== null && y !== null && (!this.logX || x > 0) && (!this.logY || y > 0));
    const shift = this.spec.across ? (place - (count - 1) / 2) * (18 / Math.max(1, count)) : 0;
    if (one.kind === "bars") return this.drawBars(one, known, place, count);
    if (one.kind === "line") {
      let path = "", broken = true;
      for (const [x, y] of one.points) {
        if (y === null || (this.logX && x <= 0) || (this.logY && y <= 0)) { broken = true; continue; }
        path += `${broken ? "M" : "L"}${this.x.to(x).toFixed(1)},${this.y.to(y).toFixed(1)}`;
        broken = false;
      }
      drawn(this.svg, "path", { class: one.look, d: path });
    }
    for (const [x, y, low, high] of known) {
      if (low !== undefined && low !== null) {
        const at = this.spec.across ? { x1: this.x.to(low), x2: this.x.to(high), y1: this.y.to(y) + shift, y2: this.y.to(y) + shift }
          : { x1: this.x.to(x), x2: this.x.to(x), y1: this.y.to(low), y2: this.y.to(high) };
        drawn(this.svg, "line", { class: one.look, ...at, "stroke-width": 1.6 });
      }
      if (one.kind === "dots" || known.length <= 40) {
        drawn(this.svg, "circle", { class: one.look, cx: this.x.to(x), cy: this.y.to(y) + shift, r: known.length > 200 ? 1.6 : 3, opacity: known.length > 200 ? 0.5 : 1 });
      }
    }
  }

  drawBars(one, known, place, count) {
    const step = this.spec.width || 1, zero = this.y.to(0);
    for (const [x, y, low, high] of known) {
      const [from, to] = [this.x.to(x - step / 2), this.x.to(x + step / 2)], whole = (to - from) * (this.spec.width ? 1 : 0.8);
      const width = whole / count, at = (from + to - whole) / 2 + place * width, up = this.y.to(y);
      drawn(this.svg, "rect", { class: one.look, x: at, width: Math.max(0.5, width - 1), y: Math.min(up, zero), height: Math.abs(zero - up) });
      if (low !== undefined && low !== null) {
        drawn(this.svg, "line", { class: "rule", x1: at + width / 2, x2: at + width / 2, y1: this.y.to(low), y2: this.y.to(high) });
      }
    }
  }
}

for (const table of document.querySelectorAll("table.sorts")) {
  makeSortable(table);
  if (table.tBodies[0].rows.length > 5) makeFilter(table);
}
for (const figure of document.querySelectorAll("figure.chart")) new Chart(figure);
