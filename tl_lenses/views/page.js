// The page's behaviour: the table is there without it. All text goes in as text nodes, never as markup.
(() => {
  "use strict";
  const D = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const card = $("card"), panel = $("panel"), nLayers = D.layers.length;
  // A view shows some lenses side by side; a difference is a lens with `minus`, the two it is made of.
  const real = D.lenses.map((_, i) => i).filter((i) => !D.lenses[i].minus);
  const views = D.lenses.map((lens, i) => ({ name: lens.name, lenses: [i] }));
  if (real.length > 1) views.push({ name: "side by side", lenses: real });
  const state = { view: D.start, row: 0, stat: D.stat, pin: null, words: [], prob: false, numbers: !!D.numbers, zoom: 3 };
  const ZOOM = [0, 0.5, 0.75, 1, 1.35, 1.8]; // at 0 colours alone
  const shown = () => views[state.view].lenses;
  const parts = (lens) => D.lenses[lens].minus || [lens];
  const row = () => D.rows[state.row], width = () => row().tokens.length;
  const cells = (lens) => D.lenses[parts(lens)[0]].rows[state.row];
  const top = (l, p, lens) => cells(lens).top[(l * width() + p) * D.k];
  const inside = (l, p, lens) => cells(lens).shown?.[l * width() + p] ?? top(l, p, lens);

  // --- small makers
  const make = (tag, cls, ...children) => {
    const e = document.createElement(tag);
    if (cls) e.className = cls;
    e.append(...children);
    return e;
  };
  const text = (i) => (i < 0 ? "–" : [].concat(D.vocab[i]).join(""));
  // A vocabulary entry is a string, or strings in turn plain and faint: ["", "·", "Paris"].
  const token = (into, i) => {
    [].concat(i < 0 ? "–" : D.vocab[i]).forEach((s, k) => s && into.append(k % 2 ? make("i", "", s) : s));
    return into;
  };
  const tok = (i, cls = "") => token(make("span", "tok " + cls), i);
  const percent = (p) => (p >= 0.0001 ? (100 * p).toFixed(p < 0.0995 ? 2 : 1) + "%" : "<0.01%");
  const show = (s, v) => {
    if (v === null) return "–";
    if (s.curve === "log") return v.toLocaleString("en");
    return (v < 0 ? "−" : "") + Math.abs(v).toFixed(Math.abs(v) < 10 ? 3 : 2);
  };

  // as style.number writes it
  const brief = (s, v) => {
    const size = Math.abs(v), whole = s.curve === "log" || size >= 99.5;
    const out = size >= 999.5 ? (size / 1000).toFixed(size < 9950 ? 1 : 0) + "k" : size.toFixed(whole ? 0 : size >= 9.995 ? 1 : 2);
    return (v < 0 && parseFloat(out) ? "−" : "") + out;
  };
  // texts in turn plain and marked: a prompt with the places of its vectors
  const prompt = (pieces) => make("code", "", ...pieces.filter((s) => s).map((s) => (pieces.indexOf(s) % 2 ? make("mark", "", s) : s)));

  // --- numbers: statistics, their differences, and ranks of tokens (the statistic "token 12" is the rank of entry 12)
  const code = Object.fromEntries([...D.codes].map((c, i) => [c, i]));
  const known = (word, l, p, lens) => {
    const c = cells(lens), first = (l * width() + p) * D.k;
    for (let i = first; i < first + D.k; i++) if (c.top[i] === word) return { rank: i - first + 1, prob: c.probs[i] / 1e4, exact: true };
    const t = row().tracked.indexOf(word), i = l * width() + p;
    if (t < 0) return null; // it was not tracked: only the top lists know it
    const rank = D.ranks[code[c.ranks[t][i]]];
    return { rank, prob: Math.exp(-code[c.falls[t][i]] / D.falls), exact: rank <= D.exact };
  };
  const value = (stat, l, p, lens) => {
    if (stat.startsWith("token ")) return known(+stat.slice(6), l, p, lens)?.rank ?? null;
    const own = D.lenses[lens].rows[state.row].stats[stat];
    if (own || !D.lenses[lens].minus) return (own || [])[l * width() + p] ?? null;
    const [a, b] = D.lenses[lens].minus.map((i) => value(stat, l, p, i));
    if (a === null || b === null) return null;
    return D.stats[stat].curve === "log" ? Math.log10(a) - Math.log10(b) : a - b;
  };
  const scaleOf = (stat, lens) =>
    stat.startsWith("token ") ? { ...D.rank, label: "rank of " + text(+stat.slice(6)), title: `rank of ${text(+stat.slice(6))}, 1 = top` } : (D.lenses[lens].scales || D.stats)[stat];

  // --- colours: the same arithmetic as style.Scale.position
  const bend = { linear: (v) => v, sqrt: (v) => Math.sign(v) * Math.sqrt(Math.abs(v)), log: (v) => Math.log(Math.max(v, 1e-12)) };
  const place = (s, v) => {
    const f = bend[s.curve], t = Math.min(1, Math.max(0, (f(v) - f(s.low)) / (f(s.high) - f(s.low))));
    return s.flip ? 1 - t : t;
  };
  const colour = (s, v) => (v === null ? "n" : (s.diverging ? "d" : "c") + Math.round(place(s, v) * (D.levels - 1)));

  // --- the tables, one per lens; row 0 of the body is the last layer
  const tables = () => [...document.querySelectorAll("#tables table")];
  const at = (l, p, table = tables()[0]) => table.tBodies[0].rows[nLayers - 1 - l]?.cells[p + 1];
  const where = (td) => ({ l: nLayers - 1 - td.parentNode.sectionRowIndex, p: td.cellIndex - 1, table: td.closest("table") });
  const lensOf = (table) => shown()[tables().indexOf(table)];
  const build = () => {
    const n = width(), boxes = $("tables");
    while (boxes.children.length > shown().length) boxes.lastChild.remove();
    while (boxes.children.length < shown().length) boxes.append(boxes.firstElementChild.cloneNode(true));
    tables().forEach((table) => {
      const head = table.tHead.rows[0], lens = lensOf(table);
      const name = shown().length > 1 ? D.lenses[lens].name : "";
      table.closest("section").firstElementChild.textContent = name;
      while (head.cells.length > 1) head.lastChild.remove();
      row().tokens.forEach((i, p) => {
        const th = token(make("th"), i);
        th.scope = "col";
        th.title = D.words[1] + " " + row().positions[p];
        head.append(th);
      });
      for (let l = 0; l < nLayers; l++) {
        const tr = table.tBodies[0].rows[nLayers - 1 - l];
        while (tr.cells.length > 1) tr.lastChild.remove();
        for (let p = 0; p < n; p++) tr.append(token(make("td"), inside(l, p, lens)));
      }
    });
  };
  const paint = () => {
    const n = width(), faded = new Set(row().faded);
    tables().forEach((table) => {
      const lens = lensOf(table), s = scaleOf(state.stat, lens);
      for (let l = 0; l < nLayers; l++)
        for (let p = 0; p < n; p++) {
          const td = at(l, p, table), v = value(state.stat, l, p, lens), hit = row().targets[p] >= 0 && top(l, p, lens) === row().targets[p];
          td.className = colour(s, v) + (hit ? " t" : "") + (faded.has(p) ? " o" : "") + (said(l, p).length ? " s" : "");
          if (state.numbers && v !== null) td.dataset.v = brief(s, v);
          else delete td.dataset.v;
          td.tabIndex = -1;
        }
      const pinned = state.pin && at(state.pin.l, state.pin.p, table);
      if (pinned) pinned.classList.add("pin");
      (pinned || at(nLayers - 1, 0, table) || table).tabIndex = 0;
    });
    const s = scaleOf(state.stat, shown()[0]), bar = $("legend");
    bar.querySelector("b").textContent = s.title;
    bar.children[1].textContent = s.ends[0];
    bar.children[3].textContent = s.ends[1];
    bar.children[2].style.background = `linear-gradient(90deg, ${D.ramps[s.diverging ? 1 : 0]})`;
    bar.querySelectorAll("p span").forEach((e, i) => (e.textContent = s.ticks[i]));
    strip();
  };

  // --- the strip: all tokens of a long prompt at once, and the part of them that the first table shows
  const strip = () => {
    const canvas = $("strip"), box = tables()[0].parentNode, n = width(), long = box.scrollWidth > box.clientWidth + 2;
    canvas.hidden = !long;
    if (!long) return;
    canvas.width = n;
    canvas.height = nLayers + 3;
    const g = canvas.getContext("2d"), lens = shown()[0], s = scaleOf(state.stat, lens);
    for (let l = 0; l < nLayers; l++)
      for (let p = 0; p < n; p++) {
        const v = value(state.stat, l, p, lens), stops = D.ramps[s.diverging ? 1 : 0].split(", ");
        if (v === null) continue;
        g.fillStyle = stops[Math.round(place(s, v) * (stops.length - 1))];
        g.fillRect(p, nLayers - 1 - l, 1, 1);
      }
    g.fillStyle = getComputedStyle(document.body).getPropertyValue("--mark");
    g.fillRect((n * box.scrollLeft) / box.scrollWidth, nLayers + 1, (n * box.clientWidth) / box.scrollWidth, 2);
  };

  // --- what is known of one cell
  const bars = (words, probs, target) => {
    const out = make("div", "top");
    words.forEach((i, k) => {
      if (i < 0) return;
      const bar = make("div"), prob = probs[k] / 1e4, word = tok(i, "word" + (i === target ? " t" : ""));
      bar.style.width = 100 * prob + "%";
      word.dataset.word = i;
      out.append(word, make("div", "meter", bar), make("span", "p", percent(prob)));
    });
    return out;
  };
  const list = (l, p, lens) => {
    const c = cells(lens), first = (l * width() + p) * D.k, part = (x) => x.slice(first, first + D.k);
    return bars(part(c.top), part(c.probs), row().targets[p]);
  };
  // what patchscopes say of the vector of a cell: by result, [l*, text, tokens, probabilities, scores] each
  const said = (l, p) => (D.readings || []).map((r) => [r, r.cells[state.row][l + "," + p]]).filter(([, found]) => found);
  const reading = ([r, found]) => {
    const box = make("div", "facts", make("p", "where", "patchscope into ", prompt(r.into)));
    for (const [into, words, tops, probs, scores] of found) {
      const line = make("p", "said", make("b", "", "l* " + into + " "), words < 0 ? tok(tops[0]) : tok(words));
      line.append(make("span", "p", [" " + percent(probs[0] / 1e4), scores].filter((s) => s).join(", ")));
      box.append(line);
      if (found.length === 1) box.append(bars(tops, probs, -1));
    }
    return box;
  };
  const facts = (l, p, lens) => {
    const target = row().targets[p], s = D.lenses[lens].scales || D.stats;
    const box = make("div", "facts"), head = make("p", "where", `${D.words[0]} ${D.names[l]}, ${D.words[1]} ` + (D.labelled ? "" : row().positions[p] + ": "));
    if (D.lenses.length > 1) head.prepend(make("b", "", D.lenses[lens].name), ", ");
    head.append(tok(row().tokens[p]));
    if (target >= 0) head.append(" → ", tok(target));
    const stats = make("dl", "stats"), line = (now, name, v) => stats.append(make("dt", now, name), make("dd", now, v));
    for (const name of Object.keys(s)) {
      const v = value(name, l, p, lens);
      if (v !== null) line(name === state.stat ? "now" : "", s[name].label, show(s[name], v) + (s[name].unit === "nats" ? " nats" : ""));
    }
    for (const word of state.words) {
      const k = known(word, l, p, lens), now = state.stat === "token " + word ? "now" : "";
      if (!D.lenses[lens].minus) line(now, "rank of " + text(word), k ? (k.exact ? "" : "≈ ") + k.rank.toLocaleString("en") + ", " + percent(k.prob) : `> ${D.k}`);
    }
    box.append(head);
    const from = cells(lens).from?.[l * width() + p] ?? -1;
    if (from >= 0) box.append(make("p", "where", "vector of ", prompt(D.from[from])));
    if (D.said) box.append(make("p", "said", tok(inside(l, p, lens))));
    if (D.k) parts(lens).forEach((i) => box.append(...(parts(lens).length > 1 ? [make("p", "where", D.lenses[i].name)] : []), list(l, p, i)));
    box.append(stats);
    return box;
  };
  const hint = (td) => {
    document.querySelectorAll("th.here").forEach((e) => e.classList.remove("here"));
    card.hidden = !td;
    if (!td) return;
    const { l, p, table } = where(td), r = td.getBoundingClientRect();
    td.parentNode.cells[0].classList.add("here");
    table.tHead.rows[0].cells[p + 1].classList.add("here");
    card.replaceChildren(facts(l, p, lensOf(table)));
    const w = card.offsetWidth, h = card.offsetHeight;
    const left = r.right + 8 + w <= innerWidth ? r.right + 8 : r.left - 8 - w;
    card.style.left = Math.max(8, Math.min(left, innerWidth - w - 8)) + "px";
    card.style.top = Math.max(8, Math.min(r.top - 8, innerHeight - h - 8)) + "px";
  };

  // --- line charts beside the pinned cell
  const svg = (tag, attributes, content) => {
    const e = document.createElementNS($("svg").namespaceURI, tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (content !== undefined) e.textContent = content;
    return e;
  };
  const steps = (low, high) => {
    const raw = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 2.5, 5, 10].find((m) => m * unit >= raw * 0.999), out = [];
    for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9; v += step) out.push(+v.toPrecision(6));
    return out;
  };
  const powers = [1, 10, 100, 1e3, 1e4, 1e5, 1e6], roots = [0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500];
  // lines: [{name, ink, points, now, dash}]; the vertical axis bends as the colours do, and rank 1 is at the top
  const chart = (caption, s, lines, labels, across, marked) => {
    const log = s.curve === "log", H = 250, L = 52, R = 12, T = 12, B = 40, n = labels.length;
    // beside the facts, or below them if that is too narrow; those of tokens in pairs
    const W = Math.max(320, Math.min(640, state.words.length ? panel.clientWidth / 2 - 18 : panel.clientWidth - 330));
    const all = lines.flatMap((line) => line.points).filter((v) => v !== null);
    let low = Math.min(...all, log ? 1 : 0), high = Math.max(...all, log ? 10 : low);
    if (high <= low) high = low + 1;
    const f = bend[s.curve], turn = (t) => (log ? 1 - t : t);
    const turned = D.turned && labels === D.layers; // the first row is on top, which here is the last layer
    const x = (i) => L + (W - L - R) * (n > 1 ? (turned ? n - 1 - i : i) / (n - 1) : 0.5);
    const y = (v) => H - B - (H - B - T) * turn((f(v) - f(low)) / (f(high) - f(low)));
    const out = svg("svg", { width: W, height: H, role: "img", "aria-label": `${s.title} by ${across}` });
    const wanted = log ? powers : s.curve === "sqrt" ? [0, ...roots, ...roots.map((v) => -v)] : steps(low, high);
    let used = [];
    for (const v of wanted.filter((v) => v >= low && v <= high).sort((a, b) => !b - !a || Math.abs(b) - Math.abs(a))) {
      if (used.some((at) => Math.abs(at - y(v)) < 15)) continue;
      used.push(y(v));
      out.append(svg("line", { class: "axis", x1: L, x2: W - R, y1: y(v), y2: y(v) }));
      out.append(svg("text", { x: L - 7, y: y(v) + 4, "text-anchor": "end" }, (v + "").replace("-", "−")));
    }
    const widest = Math.max(...labels.map((name) => Math.min(name.length, 8))), every = Math.ceil((n * (widest + 2) * 6) / (W - L - R));
    labels.forEach((name, i) => {
      if ((n - 1 - i) % every === 0) out.append(svg("text", { x: x(i), y: H - B + 17, "text-anchor": "middle" }, name.length > 8 ? name.slice(0, 7) + "…" : name));
    });
    out.append(svg("text", { x: (L + W - R) / 2, y: H - 5, "text-anchor": "middle" }, across));
    out.append(svg("line", { x1: x(marked), x2: x(marked), y1: T, y2: H - B, stroke: "var(--mark)", "stroke-dasharray": "3 3" }));
    for (const line of lines) {
      let d = "", pen = "M";
      line.points.forEach((v, i) => {
        if (v === null) return void (pen = "M");
        d += `${pen}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
        pen = "L";
      });
      out.append(svg("path", { d, fill: "none", stroke: line.ink, "stroke-width": line.now ? 2.2 : 1.4, opacity: line.now ? 1 : 0.75, "stroke-dasharray": line.dash || "none" }));
      line.points.forEach((v, i) => {
        if (v === null) return;
        const dot = svg("circle", { cx: x(i), cy: y(v), r: i === marked && line.now ? 4.5 : 2.5, fill: line.ink });
        dot.append(svg("title", {}, `${line.name}, ${across} ${labels[i]}: ${show(s, v)}`));
        out.append(dot);
      });
      if (lines.length > 1) {
        const key = make("span", "key", (line.dash ? "   ┅ " : "   ━ ") + line.name);
        key.style.color = line.ink;
        caption.append(key);
      }
    }
    return make("figure", "", caption, out);
  };
  const inks = (i) => D.inks[i % D.inks.length];
  const charts = ({ l, p }) => {
    const out = [], by = (layers, f) => Array.from({ length: layers ? nLayers : width() }, (_, i) => f(...(layers ? [i, p] : [l, i])));
    const caption = (label, layers) => make("figcaption", "", label, D.labelled && layers ? ` at ${D.words[1]} ` : " at ", layers ? tok(row().tokens[p]) : `${D.words[0]} ${D.names[l]}`, ` by ${D.words[layers ? 0 : 1]}`);
    const across = (layers) => [layers ? D.layers : row().tokens.map(text), D.words[layers ? 0 : 1], layers ? l : p];
    if (!state.stat.startsWith("token ")) {
      const of = D.lenses[shown()[0]].minus ? shown() : real, s = scaleOf(state.stat, of[0]);
      const lines = of.map((i) => ({ name: D.lenses[i].name, ink: inks(i), now: shown().includes(i), points: by(true, (a, b) => value(state.stat, a, b, i)) }));
      out.push(chart(caption(s.label + (s.unit && ` (${s.unit})`), true), s, lines, ...across(true)));
    }
    const of = shown().flatMap(parts), s = state.prob ? { ...D.rank, curve: "linear", title: "probability", label: "probability" } : { ...D.rank, label: "rank" };
    for (const layers of state.words.length ? [true, false] : []) {
      const lines = of.flatMap((lens, j) => state.words.map((word, i) => {
        const points = by(layers, (a, b) => known(word, a, b, lens)).map((k) => k && (state.prob ? k.prob : k.rank));
        return { name: text(word) + (of.length > 1 ? ", " + D.lenses[lens].name : ""), ink: inks(i), now: j === 0, dash: j ? "5 3" : "", points };
      }));
      const figure = chart(caption(s.label, layers), s, lines, ...across(layers));
      if (layers) {
        const other = make("button", "", state.prob ? "show ranks" : "show probabilities");
        other.addEventListener("click", () => ((state.prob = !state.prob), pin(state.pin)));
        figure.firstElementChild.append(other);
      }
      out.push(figure);
    }
    return out;
  };
  const pin = (cell) => {
    state.pin = cell;
    document.querySelectorAll("td.pin").forEach((e) => e.classList.remove("pin"));
    panel.replaceChildren();
    panel.classList.remove("sheet");
    if (!cell) return void panel.append(make("p", "note", D.help));
    card.hidden = true; // its content stands in the panel now
    tables().forEach((table) => at(cell.l, cell.p, table).classList.add("pin"));
    shown().forEach((lens) => panel.append(facts(cell.l, cell.p, lens)));
    panel.append(...said(cell.l, cell.p).map(reading));
    panel.append(...charts(cell));
    panel.querySelectorAll(".word").forEach((e) => {
      e.title = "follow this token";
      e.tabIndex = 0;
      e.role = "button";
    });
    // where there is no room beside the map, the panel is a sheet at the bottom of the window, and the cell stays above it
    if (panel.offsetTop < boxes.offsetTop + boxes.offsetHeight) return;
    panel.classList.add("sheet");
    const covered = at(cell.l, cell.p).getBoundingClientRect().bottom + 8 - panel.getBoundingClientRect().top;
    if (covered > 0) scrollBy({ top: covered, behavior: "smooth" });
  };

  // --- tokens that are followed: a chip each; the rank of one can colour the map
  const follow = (word, off) => {
    if (off || state.words.includes(word)) {
      state.words = state.words.filter((other) => other !== word);
      if (state.stat === "token " + word) state.stat = D.stat;
    } else state.words.push(word);
    redraw();
  };
  const chips = () => {
    const here = D.lenses[shown()[0]].minus ? [] : state.words;
    $("chips").replaceChildren(
      ...state.words.map((word, i) => {
        const name = make("button", "", tok(word)), off = make("button", "", "×"), chip = make("span", "chip", name, off);
        name.title = "colour the map by its rank";
        name.disabled = !here.includes(word);
        name.ariaPressed = state.stat === "token " + word;
        off.ariaLabel = "stop following";
        chip.style.background = inks(i);
        name.addEventListener("click", () => ((state.stat = state.stat === "token " + word ? D.stat : "token " + word), redraw()));
        off.addEventListener("click", () => follow(word, true));
        return chip;
      }),
    );
  };
  const options = () => {
    const lens = D.lenses[shown()[0]], names = Object.entries(lens.scales || D.stats).map(([k, s]) => [k, s.label]);
    if (!lens.minus) names.push(...state.words.map((word) => ["token " + word, "rank of " + text(word)]));
    if (!names.some(([k]) => k === state.stat)) state.stat = names.some(([k]) => k === D.stat) ? D.stat : names[0][0];
    $("stat").replaceChildren(...names.map(([k, label]) => new Option(label, k, false, k === state.stat)));
    $("stat").parentNode.hidden = names.length < 2;
    $("tracked").replaceChildren(...row().tracked.map((word) => new Option("", text(word))));
    $("word").parentNode.hidden = !row().tracked.length;
  };
  const redraw = (rebuild) => {
    if (rebuild) {
      state.words = state.words.filter((word) => row().tracked.includes(word) || D.rows.length === 1);
      build();
    }
    options();
    chips();
    if (state.pin && state.pin.p >= width()) state.pin = null;
    paint();
    pin(state.pin);
  };

  // --- events
  const boxes = $("tables"), cellOf = (e) => (e.target.closest ? e.target.closest("td") : null);
  const toggle = (td) => {
    const { l, p } = where(td);
    pin(state.pin && state.pin.l === l && state.pin.p === p ? null : { l, p });
  };
  const focus = (td) => {
    boxes.querySelectorAll('td[tabindex="0"]').forEach((e) => (e.tabIndex = -1));
    td.tabIndex = 0;
    td.focus({ preventScroll: true });
    td.scrollIntoView({ block: "nearest", inline: "nearest" });
    hint(td);
  };
  boxes.addEventListener("mouseover", (e) => hint(cellOf(e)));
  boxes.addEventListener("mouseleave", () => hint(null));
  boxes.addEventListener("focusin", (e) => hint(cellOf(e)));
  boxes.addEventListener("focusout", () => hint(null));
  boxes.addEventListener("scroll", (e) => {
    hint(null);
    tables().forEach((table) => table.parentNode !== e.target && ((table.parentNode.scrollLeft = e.target.scrollLeft), (table.parentNode.scrollTop = e.target.scrollTop)));
    strip();
  }, true);
  boxes.addEventListener("click", (e) => {
    const td = cellOf(e);
    if (!td) return;
    focus(td);
    toggle(td);
  });
  boxes.addEventListener("keydown", (e) => {
    const td = cellOf(e);
    if (!td) return;
    const { l, p, table } = where(td), page = Math.max(1, Math.floor(table.parentNode.clientWidth / td.offsetWidth) - 2), last = width() - 1;
    const move = {
      ArrowUp: [1, p], ArrowDown: [-1, p], ArrowLeft: [0, p - 1], ArrowRight: [0, p + 1], Home: [0, 0], End: [0, last],
      PageUp: [0, Math.max(0, p - page)], PageDown: [0, Math.min(last, p + page)],
    }[e.key];
    if (move) {
      const to = move[1] >= 0 ? at(l + move[0], move[1], table) : null;
      if (to) focus(to);
    } else if ("+-=".includes(e.key)) zoom(e.key === "-" ? -1 : 1), focus(td);
    else if (e.key === "Enter" || e.key === " ") toggle(td);
    else return;
    e.preventDefault();
  });
  const zoom = (by) => {
    state.zoom = Math.max(0, Math.min(ZOOM.length - 1, state.zoom + by));
    boxes.style.setProperty("--zoom", ZOOM[state.zoom] || 1);
    boxes.classList.toggle("tiny", !state.zoom);
    strip();
  };
  $("zoom").addEventListener("click", (e) => e.target.value && zoom(+e.target.value));
  $("numbers").checked = state.numbers;
  $("numbers").addEventListener("change", (e) => ((state.numbers = e.target.checked), paint()));
  document.addEventListener("keydown", (e) => {
    if (e.key !== "Escape") return;
    pin(null);
    hint(null);
  });
  const chosen = (e) => e.target.dataset.word && follow(+e.target.dataset.word);
  panel.addEventListener("click", (e) => chosen({ target: e.target.closest(".word") || e.target }));
  panel.addEventListener("keydown", (e) => e.key === "Enter" && chosen(e));
  $("word").addEventListener("change", (e) => {
    const typed = e.target.value.replace(/ /g, "·"), word = row().tracked.find((i) => [typed, "·" + typed].includes(text(i)));
    e.target.setCustomValidity(word === undefined ? "not tracked: pass track=[...] to trajectory" : "");
    if (word === undefined) return void e.target.reportValidity();
    e.target.value = "";
    if (!state.words.includes(word)) follow(word);
  });
  $("word").addEventListener("input", (e) => e.target.setCustomValidity(""));
  $("find").parentNode.hidden = Math.max(...D.rows.map((r) => r.tokens.length)) < 20;
  $("find").addEventListener("keydown", (e) => {
    if (e.key !== "Enter" || !e.target.value) return;
    const typed = e.target.value.toLowerCase().replace(/ /g, "·"), from = state.pin ? state.pin.p + 1 : 0, n = width();
    const p = row().tokens.map((_, i) => (i + from) % n).find((i) => text(row().tokens[i]).toLowerCase().includes(typed));
    if (p === undefined) return;
    at(nLayers - 1, p).scrollIntoView({ block: "nearest", inline: "center" });
    pin({ l: state.pin ? state.pin.l : nLayers - 1, p });
  });
  $("strip").addEventListener("click", (e) => {
    const box = tables()[0].parentNode;
    box.scrollLeft = (box.scrollWidth * e.offsetX) / e.target.clientWidth - box.clientWidth / 2;
  });
  addEventListener("resize", () => (strip(), pin(state.pin)));
  const choose = (id, key, names) => {
    const select = $(id);
    names.forEach((name, v) => select.add(new Option(name, v, v === state[key], v === state[key])));
    select.parentNode.hidden = names.length < 2;
    select.addEventListener("change", () => {
      state[key] = +select.value;
      redraw(true);
    });
  };
  choose("lens", "view", views.map((view) => view.name));
  choose("row", "row", D.rows.map((r) => r.name));
  $("stat").addEventListener("change", (e) => {
    state.stat = e.target.value;
    redraw();
  });
  redraw();
})();
