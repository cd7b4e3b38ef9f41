// The page's behaviour: the table is there without it. All text goes in as text nodes, never as markup.
(() => {
  "use strict";
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const table = $("grid"), card = $("card"), panel = $("panel");
  const state = { lens: 0, row: 0, stat: D.stat, pin: null };
  const nLayers = D.layers.length;
  const row = () => D.rows[state.row];
  const cells = (lens = state.lens) => D.lenses[lens].rows[state.row];
  const value = (stat, l, p, lens) => (cells(lens).stats[stat] || [])[l * row().tokens.length + p] ?? null;

  // --- small makers
  const make = (tag, cls, ...children) => {
    const e = document.createElement(tag);
    if (cls) e.className = cls;
    e.append(...children);
    return e;
  };
  // A vocabulary entry is a string, or strings in turn plain and faint: ["", "·", "Paris"].
  const token = (into, i) => {
    [].concat(i < 0 ? "–" : D.vocab[i]).forEach((s, k) => s && into.append(k % 2 ? make("i", "", s) : s));
    return into;
  };
  const tok = (i, cls = "") => token(make("span", "tok " + cls), i);
  const percent = (p) => (p >= 0.0001 ? (100 * p).toFixed(p < 0.0995 ? 2 : 1) + "%" : "<0.01%");
  const show = (stat, v) => {
    if (v === null) return "–";
    if (D.stats[stat].curve === "log") return v.toLocaleString("en");
    return (v < 0 ? "−" : "") + Math.abs(v).toFixed(Math.abs(v) < 10 ? 3 : 2);
  };

  // --- colours: the same arithmetic as style.Scale.position
  const bend = { linear: (v) => v, sqrt: (v) => Math.sign(v) * Math.sqrt(Math.abs(v)), log: (v) => Math.log(Math.max(v, 1e-12)) };
  const colour = (stat, v) => {
    const s = D.stats[stat];
    if (v === null) return "n";
    const f = bend[s.curve], t = Math.min(1, Math.max(0, (f(v) - f(s.low)) / (f(s.high) - f(s.low))));
    return (s.diverging ? "d" : "c") + Math.round((s.flip ? 1 - t : t) * (D.levels - 1));
  };

  // --- the table; row 0 of the body is the last layer
  const at = (l, p) => table.tBodies[0].rows[nLayers - 1 - l]?.cells[p + 1];
  const where = (td) => ({ l: nLayers - 1 - td.parentNode.sectionRowIndex, p: td.cellIndex - 1 });
  const build = () => {
    const head = table.tHead.rows[0], body = table.tBodies[0], n = row().tokens.length, k = D.k;
    while (head.cells.length > 1) head.lastChild.remove();
    row().tokens.forEach((i, p) => {
      const th = token(make("th"), i);
      th.scope = "col";
      th.title = "position " + row().positions[p];
      head.append(th);
    });
    for (let l = 0; l < nLayers; l++) {
      const tr = body.rows[nLayers - 1 - l];
      while (tr.cells.length > 1) tr.lastChild.remove();
      for (let p = 0; p < n; p++) tr.append(token(make("td"), cells().top[(l * n + p) * k]));
    }
  };
  const paint = () => {
    const n = row().tokens.length;
    for (let l = 0; l < nLayers; l++)
      for (let p = 0; p < n; p++) {
        const td = at(l, p), hit = row().targets[p] >= 0 && cells().top[(l * n + p) * D.k] === row().targets[p];
        td.className = colour(state.stat, value(state.stat, l, p)) + (hit ? " t" : "");
        td.tabIndex = -1;
      }
    const s = D.stats[state.stat], bar = $("legend");
    bar.querySelector("b").textContent = s.title;
    bar.children[1].textContent = s.ends[0];
    bar.children[3].textContent = s.ends[1];
    bar.children[2].style.background = `linear-gradient(90deg, ${D.ramps[s.diverging ? 1 : 0]})`;
    bar.querySelectorAll("p span").forEach((e, i) => (e.textContent = s.ticks[i]));
    const pinned = state.pin && at(state.pin.l, state.pin.p);
    if (pinned) pinned.classList.add("pin");
    (pinned || at(nLayers - 1, 0) || table).tabIndex = 0;
  };

  // --- what is known of one cell
  const facts = (l, p) => {
    const n = row().tokens.length, c = cells(), first = (l * n + p) * D.k, target = row().targets[p];
    const box = make("div", "facts"), head = make("p", "where", `layer ${D.names[l]}, position ${row().positions[p]}: `);
    head.append(tok(row().tokens[p]));
    if (target >= 0) head.append(" → ", tok(target));
    const list = make("div", "top");
    for (let i = first; i < first + D.k; i++) {
      const bar = make("div"), prob = c.probs[i] / 1e4;
      bar.style.width = 100 * prob + "%";
      list.append(tok(c.top[i], c.top[i] === target ? "t" : ""), make("div", "meter", bar), make("span", "p", percent(prob)));
    }
    const stats = make("dl", "stats");
    for (const name of Object.keys(D.stats)) {
      const now = name === state.stat ? "now" : "", v = value(name, l, p);
      if (v !== null) stats.append(make("dt", now, D.stats[name].label), make("dd", now, show(name, v) + (D.stats[name].unit === "nats" ? " nats" : "")));
    }
    box.append(head, list, stats);
    return box;
  };
  const hint = (td) => {
    table.querySelectorAll("th.here").forEach((e) => e.classList.remove("here"));
    card.hidden = !td;
    if (!td) return;
    const { l, p } = where(td), r = td.getBoundingClientRect();
    td.parentNode.cells[0].classList.add("here");
    table.tHead.rows[0].cells[p + 1].classList.add("here");
    card.replaceChildren(facts(l, p));
    const w = card.offsetWidth, h = card.offsetHeight;
    const left = r.right + 8 + w <= innerWidth ? r.right + 8 : r.left - 8 - w;
    card.style.left = Math.max(8, Math.min(left, innerWidth - w - 8)) + "px";
    card.style.top = Math.max(8, Math.min(r.top - 8, innerHeight - h - 8)) + "px";
  };

  // --- the pinned cell: its facts, and the statistic by layer, one line per lens
  const svg = (tag, attributes, text) => {
    const e = document.createElementNS($("svg").namespaceURI, tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const steps = (low, high) => {
    const raw = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 2.5, 5, 10].find((m) => m * unit >= raw * 0.999), out = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9; v += step) out.push(+v.toPrecision(6));
    return out;
  };
  const chart = (p, pinned) => {
    const s = D.stats[state.stat], log = s.curve === "log", H = 250, L = 52, R = 12, T = 12, B = 40;
    const W = Math.max(320, Math.min(640, panel.clientWidth - 330)); // beside the facts, or below them if that is too narrow
    const lines = D.lenses.map((_, i) => D.layers.map((_, l) => value(state.stat, l, p, i)));
    const all = lines.flat().filter((v) => v !== null);
    let low = Math.min(...all, log ? 1 : 0), high = Math.max(...all, log ? 10 : low);
    if (high <= low) high = low + 1;
    const f = log ? Math.log10 : (v) => v;
    const x = (l) => L + ((W - L - R) * (nLayers > 1 ? l / (nLayers - 1) : 0.5));
    const y = (v) => H - B - ((H - B - T) * (f(v) - f(low))) / (f(high) - f(low));
    const out = svg("svg", { width: W, height: H, role: "img", "aria-label": s.title + " by layer" });
    const ticks = log ? [1, 10, 100, 1e3, 1e4, 1e5, 1e6].filter((v) => v <= high) : steps(low, high);
    for (const v of ticks) {
      out.append(svg("line", { class: "axis", x1: L, x2: W - R, y1: y(v), y2: y(v) }));
      out.append(svg("text", { x: L - 7, y: y(v) + 4, "text-anchor": "end" }, (v + "").replace("-", "−")));
    }
    const widest = Math.max(...D.layers.map((name) => name.length)), every = Math.ceil((nLayers * (widest + 2) * 6) / (W - L - R));
    D.layers.forEach((name, l) => {
      if ((nLayers - 1 - l) % every === 0) out.append(svg("text", { x: x(l), y: H - B + 17, "text-anchor": "middle" }, name));
    });
    out.append(svg("text", { x: (L + W - R) / 2, y: H - 5, "text-anchor": "middle" }, "layer"));
    out.append(svg("line", { x1: x(pinned), x2: x(pinned), y1: T, y2: H - B, stroke: "var(--mark)", "stroke-dasharray": "3 3" }));
    lines.forEach((line, i) => {
      const ink = D.inks[i % D.inks.length], now = i === state.lens;
      let d = "", pen = "M";
      line.forEach((v, l) => {
        if (v === null) return void (pen = "M");
        d += `${pen}${x(l).toFixed(1)} ${y(v).toFixed(1)}`;
        pen = "L";
      });
      out.append(svg("path", { d, fill: "none", stroke: ink, "stroke-width": now ? 2.2 : 1.4, opacity: now ? 1 : 0.75 }));
      line.forEach((v, l) => {
        if (v === null) return;
        const dot = svg("circle", { cx: x(l), cy: y(v), r: l === pinned && now ? 4.5 : 2.5, fill: ink });
        dot.append(svg("title", {}, `${D.lenses[i].name}, layer ${D.layers[l]}: ${show(state.stat, v)}`));
        out.append(dot);
      });
    });
    const caption = make("figcaption", "", s.label + " at ", tok(row().tokens[p]), " by layer" + (s.unit && ` (${s.unit})`));
    if (lines.length > 1)
      D.lenses.forEach((lens, i) => {
        const key = make("span", "key", "   ━ " + lens.name);
        key.style.color = D.inks[i % D.inks.length];
        key.style.whiteSpace = "pre";
        caption.append(key);
      });
    return make("figure", "", caption, out);
  };
  const pin = (cell) => {
    state.pin = cell;
    table.querySelectorAll("td.pin").forEach((e) => e.classList.remove("pin"));
    panel.replaceChildren();
    if (!cell) return void panel.append(make("p", "note", D.help));
    card.hidden = true; // its content stands in the panel now
    at(cell.l, cell.p).classList.add("pin");
    panel.append(facts(cell.l, cell.p), chart(cell.p, cell.l));
    // bring the panel into view, but never the cell out of it (and, in a notebook's frame, not the notebook)
    const over = panel.getBoundingClientRect().bottom + 12 - innerHeight, room = at(cell.l, cell.p).getBoundingClientRect().top - 48;
    if (Math.min(over, room) > 0) scrollBy({ top: Math.min(over, room), behavior: "smooth" });
  };

  // --- events
  const cellOf = (e) => (e.target.closest ? e.target.closest("td") : null);
  const toggle = (td) => {
    const { l, p } = where(td);
    pin(state.pin && state.pin.l === l && state.pin.p === p ? null : { l, p });
  };
  const focus = (td) => {
    table.querySelectorAll('td[tabindex="0"]').forEach((e) => (e.tabIndex = -1));
    td.tabIndex = 0;
    td.focus({ preventScroll: true });
    td.scrollIntoView({ block: "nearest", inline: "nearest" });
    hint(td);
  };
  table.addEventListener("mouseover", (e) => hint(cellOf(e)));
  table.addEventListener("mouseleave", () => hint(null));
  table.addEventListener("focusin", (e) => hint(cellOf(e)));
  table.addEventListener("focusout", () => hint(null));
  $("scroll").addEventListener("scroll", () => hint(null));
  table.addEventListener("click", (e) => {
    const td = cellOf(e);
    if (!td) return;
    focus(td);
    toggle(td);
  });
  table.addEventListener("keydown", (e) => {
    const td = cellOf(e), move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    if (!td) return;
    if (move) {
      const { l, p } = where(td), p2 = p + move[1], to = p2 >= 0 ? at(l + move[0], p2) : null;
      if (to) focus(to);
    } else if (e.key === "Enter" || e.key === " ") toggle(td);
    else return;
    e.preventDefault();
  });
  document.addEventListener("keydown", (e) => {
    if (e.key !== "Escape") return;
    pin(null);
    hint(null);
  });
  const choose = (id, key, names, rebuild) => {
    const select = $(id);
    names.forEach(([v, name]) => select.add(new Option(name, v, v === state[key], v === state[key])));
    select.parentNode.hidden = names.length < 2;
    select.addEventListener("change", () => {
      state[key] = typeof state[key] === "number" ? +select.value : select.value;
      if (rebuild) build();
      if (state.pin && state.pin.p >= row().tokens.length) state.pin = null;
      paint();
      pin(state.pin);
    });
  };
  choose("lens", "lens", D.lenses.map((x, i) => [i, x.name]), true);
  choose("stat", "stat", Object.entries(D.stats).map(([k, s]) => [k, s.label]), false);
  choose("row", "row", D.rows.map((r, i) => [i, r.name]), true);
  paint();
  pin(null);
})();
