// The browser of groups. All text of data and models is set as text: nothing of it is ever parsed as HTML.
"use strict";
(() => {
  const told = JSON.parse(document.getElementById("told").textContent);
  const LIMIT = 20, MOST = 32, MOST_WORDS = 32, BETWEEN = "\ue000";
  const at = (id) => document.getElementById(id);
  const state = { filters: new Set(), search: "", order: "file", reverse: false, offset: 0 };
  let current = -1, asked = 0, total = 0;

  function make(tag, text, name) {
    const element = document.createElement(tag);
    if (text !== undefined && text !== "") element.textContent = text;
    if (name) element.className = name;
    return element;
  }

  const count = (number) => number.toLocaleString("en-US");
  const shown = (value, digits) => (value === null ? "–" : String(Number(value.toPrecision(digits))));

  // --- What is asked for: in this page, as the server's index does it ------------------------------------------------

  const CJK = "\\u3040-\\u30ff\\u3400-\\u9fff\\uac00-\\ud7af";
  const WORD = new RegExp(`[${CJK}]|(?:(?![${CJK}])[\\p{L}\\p{N}])+`, "gu");
  const plain = (text) => ` ${(text.toLowerCase().match(WORD) || []).join(" ")} `;

  function terms(search) {
    const found = [...search.matchAll(/"([^"]*)"?|(\S+)/g)].map((one) => plain(one[1] || one[2] || ""));
    return found.filter((term) => term.trim()).slice(0, MOST_WORDS);
  }

  function textOf(group) {
    if (group.plain === undefined) {
      const sources = group.candidates.map((one) => one.source);
      const texts = [...group.prompt.map((turn) => turn.text), group.id, ...group.candidates.map((one) => one.text), ...sources];
      group.plain = texts.map(plain).join(BETWEEN);
    }
    return group.plain;
  }

  function searchHere() {
    const conditions = told.filters.filter((one) => state.filters.has(one.name));
    const wanted = terms(state.search);
    if (!wanted.length && state.search.trim()) return { total: 0, groups: [] };
    const kept = told.all.filter(
      (group) =>
        conditions.every((one) => group.facts[one.column] !== null && group.facts[one.column] >= one.least) &&
        wanted.every((term) => textOf(group).includes(term)),
    );
    const column = told.orders.find((one) => one.name === state.order).column;
    const sign = state.reverse ? 1 : -1;
    kept.sort((a, b) => {
      if (column === "place") return -sign * (a.place - b.place);
      const first = a.facts[column], second = b.facts[column];
      if (first === second) return a.place - b.place;
      if (first === null || second === null) return first === null ? 1 : -1;
      return sign * (first - second);
    });
    return { total: kept.length, groups: kept.slice(state.offset, state.offset + LIMIT) };
  }

  function parameters() {
    const given = new URLSearchParams();
    if (state.filters.size) given.set("filters", [...state.filters].join(","));
    if (state.search.trim()) given.set("search", state.search);
    if (state.order !== "file") given.set("order", state.order);
    if (state.reverse) given.set("reverse", "true");
    if (state.offset) given.set("offset", String(state.offset));
    return given;
  }

  async function searchThere() {
    const response = await fetch(`groups?${parameters()}`);
    if (!response.ok) throw new Error(await response.text());
    return response.json();
  }

  // --- What is shown -------------------------------------------------------------------------------------------------

  function numberRow(list, name, value, meter) {
    if (value === null) return;
    list.append(make("dt", name));
    const cell = make("dd", shown(value, 4));
    if (meter) {
      const bar = make("meter");
      bar.value = value;
      bar.setAttribute("aria-hidden", "true");
      cell.append(bar);
    }
    list.append(cell);
  }

  function candidateBox(one, number) {
    const box = make("section", "", one.best ? "candidate best" : "candidate");
    const head = make("header");
    head.append(make("span", `#${number + 1}`), make("b", one.reward === null ? "no reward" : shown(one.reward, 4)));
    if (one.best) head.append(make("span", "best", "mark good"));
    if (!one.text.trim()) head.append(make("span", "empty", "mark"));
    if (!one.finished) head.append(make("span", "cut", "mark"));
    if (one.copies.length) head.append(make("span", `near-copy of ${one.copies.map((k) => `#${k + 1}`).join(", ")}`, "mark"));
    if (one.source) head.append(make("span", one.source));
    head.append(make("span", one.words === 1 ? "1 word" : `${count(one.words)} words`));
    box.append(head, make("pre", one.text));
    const list = make("dl", "", "numbers");
    numberRow(list, "log-prob, policy", one.policy);
    numberRow(list, "log-prob, reference", one.reference);
    if (one.policy !== null && one.reference !== null) numberRow(list, "log-ratio", one.policy - one.reference);
    numberRow(list, "kernel weight", one.weight, true);
    numberRow(list, "likeness to the best", one.likeness, true);
    if (list.children.length) box.append(list);
    return box;
  }

  function groupBox(group) {
    const box = make("article", "", "group");
    box.tabIndex = -1;
    const head = make("h2", `${count(group.place + 1)}. ${group.id}`);
    const facts = group.facts, notes = [];
    notes.push(`${group.candidates.length} candidates`);
    if (facts.spread !== null) notes.push(`spread ${shown(facts.spread, 4)}`);
    if (facts.tied > 1) notes.push(`${facts.tied} share the best reward`);
    if (facts.unscored) notes.push(`${facts.unscored} without reward`);
    if (facts.inverted !== null) notes.push(`${Math.round(100 * facts.inverted)} % of pairs against the model`);
    head.append(make("span", notes.join(" · ")));
    const prompt = make("div", "", "prompt");
    for (const turn of group.prompt) {
      if (turn.role) prompt.append(make("div", turn.role, "role"));
      prompt.append(make("pre", turn.text));
    }
    const list = make("div", "", "candidates");
    const low = Number.NEGATIVE_INFINITY;
    const order = group.candidates.map((_, k) => k);
    const reward = (k) => (group.candidates[k].reward === null ? low : group.candidates[k].reward);
    order.sort((a, b) => (reward(a) === reward(b) ? a - b : reward(b) - reward(a)));
    const add = (some) => list.append(...some.map((k) => candidateBox(group.candidates[k], k)));
    add(order.slice(0, MOST));
    box.append(head, prompt, list);
    if (order.length > MOST) {
      const more = make("button", `show ${count(order.length - MOST)} more candidates`);
      more.type = "button";
      more.addEventListener("click", () => { add(order.slice(MOST)); more.remove(); });
      box.append(more);
    }
    box.addEventListener("mousedown", () => select([...at("groups").children].indexOf(box), false));
    return box;
  }

  function say(text, bad) {
    at("status").textContent = text;
    at("status").classList.toggle("bad", Boolean(bad));
  }

  async function show(then) {
    const number = ++asked;
    const started = performance.now();
    history.replaceState(null, "", `#${parameters()}`);
    let found;
    try {
      found = told.all === null ? await searchThere() : searchHere();
    } catch (error) {
      if (number === asked) say(`No answer: ${error.message} (has ncalign view ended?)`, true);
      return;
    }
    if (number !== asked) return;
    total = found.total;
    at("groups").replaceChildren(...found.groups.map(groupBox));
    current = -1;
    const last = state.offset + found.groups.length;
    const range = found.groups.length ? `${count(state.offset + 1)}–${count(last)} of ${count(total)}` : `0 of ${count(total)}`;
    say(`${total === 1 ? "1 group" : `${count(total)} groups`} of ${count(told.groups)}, in ${((performance.now() - started) / 1000).toFixed(2)} s`);
    at("where").textContent = range;
    at("before").disabled = state.offset === 0;
    at("next").disabled = last >= total;
    if (then === "first") select(0, true);
    if (then === "last") select(found.groups.length - 1, true);
  }

  function ask(changes, then) {
    Object.assign(state, { offset: 0 }, changes);
    return show(then);
  }

  // --- Moving about --------------------------------------------------------------------------------------------------

  function select(place, scroll) {
    const boxes = [...at("groups").children];
    if (place < 0 || place >= boxes.length) return;
    if (boxes[current]) boxes[current].classList.remove("current");
    current = place;
    boxes[place].classList.add("current");
    if (scroll) {
      boxes[place].focus({ preventScroll: true });
      boxes[place].scrollIntoView({ block: "start" });
    }
  }

  function turn(pages, then) {
    const offset = state.offset + pages * LIMIT;
    if (offset < 0 || offset >= total) return;
    ask({ offset }, then);
    if (!then) at("status").scrollIntoView({ block: "start" });
  }

  function step(by) {
    const boxes = at("groups").children.length;
    const place = current < 0 ? (by > 0 ? 0 : boxes - 1) : current + by;
    if (place >= 0 && place < boxes) select(place, true);
    else turn(by, by > 0 ? "first" : "last");
  }

  const keys = {
    j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1),
    n: () => turn(1, "first"), p: () => turn(-1, "first"),
    "/": () => { at("search").focus(); at("search").select(); },
    Enter: () => { const box = at("groups").children[current]; if (box) box.classList.toggle("whole"); },
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape" && typing) { typing.blur(); step(1); return; }
    if (typing || !keys[event.key]) return;
    if (event.key === "Enter" && event.target.closest("button, summary")) return;
    event.preventDefault();
    keys[event.key]();
  });

  // --- Controls ------------------------------------------------------------------------------------------------------

  function press(name, on) {
    if (on) state.filters.add(name);
    else state.filters.delete(name);
  }

  function fill() {
    at("about").append(`${count(told.groups)} groups, ${count(told.candidates)} candidates. `, told.notes.join(" "), ` Kernel: beta ${told.beta}.`);
    const reasons = [];
    for (const one of told.filters) {
      const button = make("button", `${one.label} ${count(one.count)}`);
      button.type = "button";
      button.dataset.name = one.name;
      button.title = one.reason ? `not available: ${one.reason}` : one.meaning;
      button.disabled = Boolean(one.reason);
      button.addEventListener("click", () => { press(one.name, !state.filters.has(one.name)); pressed(); ask({}); });
      at("filters").append(button);
      if (one.reason) reasons.push(`${one.label} (${one.meaning}): ${one.reason}`);
    }
    for (const one of told.orders) {
      const option = make("option", one.label);
      option.value = one.name;
      option.disabled = Boolean(one.reason);
      at("order").append(option);
      if (one.reason) reasons.push(`${one.label}: ${one.reason}`);
    }
    at("untold").hidden = !reasons.length;
    at("untold").querySelector("ul").append(...reasons.map((reason) => make("li", reason)));
  }

  function pressed() {
    for (const button of at("filters").children) button.setAttribute("aria-pressed", String(state.filters.has(button.dataset.name)));
  }

  function restore() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of (given.get("filters") || "").split(",")) if (told.filters.some((one) => one.name === name && !one.reason)) press(name, true);
    state.search = (given.get("search") || "").slice(0, 500);
    if (told.orders.some((one) => one.name === given.get("order") && !one.reason)) state.order = given.get("order");
    state.reverse = given.get("reverse") === "true";
    const offset = Number(given.get("offset"));
    state.offset = Number.isSafeInteger(offset) && offset > 0 ? offset : 0;
    at("search").value = state.search;
    at("order").value = state.order;
    at("reverse").checked = state.reverse;
  }

  let waiting = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => ask({ search: at("search").value }), 200);
  });
  at("tools").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(waiting); ask({ search: at("search").value }, "first"); });
  at("order").addEventListener("change", () => ask({ order: at("order").value }));
  at("reverse").addEventListener("change", () => ask({ reverse: at("reverse").checked }));
  at("before").addEventListener("click", () => turn(-1));
  at("next").addEventListener("click", () => turn(1));

  fill();
  restore();
  pressed();
  show();
})();
