"use strict";
// All text from outside reaches the page through textContent; nothing is written as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const signals = data.signals, signalOf = Object.fromEntries(signals.map(signal => [signal.key, signal]));
const byId = id => document.getElementById(id);
const state = { response: 0, signal: signals[0].key, token: null, held: false };
const TOUCH = matchMedia("(pointer: coarse)");
const STEP_PX = [3.5, 72], LABEL_PX = 11, LETTER_PX = 6.7, ROW_PX = 58, NONE = 255;

function element(tag, options = {}, ...children) {
  const made = options.svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(options)) if (name !== "svg") made.setAttribute(name, value);
  made.append(...children.filter(child => child !== null));
  return made;
}
const svg = (tag, options = {}, ...children) => element(tag, { svg: true, ...options }, ...children);

function number(value) { // formats like format_number in rhythm.reports.format
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value), rounded = Number(size.toPrecision(3)), sign = value < 0 ? "−" : "";
  if (Number.isInteger(value) && size < 1e6) return sign + size.toLocaleString("en");
  if (rounded < 1e-3 || rounded >= 1e6) return sign + size.toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
  return sign + (rounded >= 1000 ? Math.round(size).toLocaleString("en") : size.toPrecision(3));
}
const INSIDE = "·"; // shown for a token that ends within a character
const visible = text => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || INSIDE;
const defined = values => values.filter(value => value !== null);
function quantile(values, q) { // always below the largest value, even for few values
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.max(0, Math.min(Math.ceil(q * sorted.length) - 1, sorted.length - 2))];
}
// A curve's axis is cut at `high`, because a few tokens, above all the first, have many times the FAI of the others.
function heights(signal, values) {
  const all = defined(values), top = all.reduce((a, b) => Math.max(a, b)), low = signal.low ?? 0, usual = quantile(all, .98);
  return { low, high: usual > low && top - low > 2.5 * (usual - low) ? usual : top > low ? top : low + 1, top };
}
// The color scale of the tokens, computed by token_scale in rhythm.reports.format.
function colorScale(response, key) {
  const scale = response.scales[key];
  return scale && { low: scale[0], high: scale[1], top: scale[2] };
}
const share = (value, { low, high }) => Math.min(1, Math.max(0, (value - low) / (high - low)));

// ---- tokens of a response, colored by a signal ----
let drawn = [];
function showResponse(index) {
  const response = data.responses[index];
  state.response = index; state.token = null; state.held = false;
  byId("which").value = index;
  byId("previous").disabled = index === 0;
  byId("next").disabled = index === data.responses.length - 1;
  byId("prompt").textContent = response.prompt;
  byId("prompt").classList.remove("all");
  foldPrompt();
  byId("outcome").textContent = response.facts.join(" · ");
  const tokens = byId("tokens");
  tokens.replaceChildren();
  drawn = response.tokens.map((text, i) => {
    const token = element("i", { "data-i": i });
    text.split("\n").forEach((line, part) => {
      if (part) token.append(element("b", {}, "⏎"), element("br"));
      token.append(line);
    });
    if (!text) token.append(element("b", {}, INSIDE));
    return token;
  });
  tokens.append(...drawn);
  byId("hidden-tokens").textContent = response.hidden ? `and ${number(response.hidden)} more tokens, which tokens.csv holds` : "";
  for (const button of document.querySelectorAll("#signal-picks button")) button.disabled = !defined(response.values[button.dataset.signal] ?? []).length;
  const open = [state.signal, ...signals.map(signal => signal.key)].find(key => !document.querySelector(`#signal-picks [data-signal=${key}]`).disabled);
  showSignal(open ?? state.signal);
  drawCurves();
  drawMaps();
  inspect(null);
}

// A long prompt fades out after six lines, above a button.
function foldPrompt() {
  const prompt = byId("prompt"), all = prompt.classList.contains("all");
  const cut = !all && prompt.scrollHeight > prompt.clientHeight + 1;
  prompt.classList.toggle("cut", cut);
  byId("show-prompt").hidden = !cut && !all;
  byId("show-prompt").textContent = all ? "show less" : "show all";
  byId("show-prompt").setAttribute("aria-expanded", all);
}

// On a phone the row of buttons scrolls sideways; it fades out where there are more.
function hintAtMore() {
  const picks = byId("signal-picks"), most = picks.scrollWidth - picks.clientWidth;
  picks.classList.toggle("more-left", picks.scrollLeft > 1);
  picks.classList.toggle("more-right", picks.scrollLeft < most - 1);
}

function showSignal(key) {
  state.signal = key;
  const signal = signalOf[key], response = data.responses[state.response], values = response.values[key] ?? [];
  const to = colorScale(response, key);
  byId("colored").style.setProperty("--hue", `var(--${signal.hue})`);
  drawn.forEach((token, i) => {
    const value = values[i] ?? null;
    token.classList.toggle("undefined", value === null);
    if (value === null) token.removeAttribute("style");
    else token.setAttribute("style", `--x:${share(value, to).toFixed(3)}`);
    if (token.style.getPropertyValue("--a")) token.style.removeProperty("--a");
  });
  for (const button of document.querySelectorAll("#signal-picks button")) button.setAttribute("aria-pressed", button.dataset.signal === key);
  const from = signal.low === null ? "the response's smallest value" : number(signal.low);
  byId("meaning").textContent = `${signal.name}: ${signal.meaning}.` + (to ? ` The color scale goes from ${from} to its ${to.top > to.high ? "95th percentile" : "largest"}.` : "");
  const ramp = byId("ramp");
  ramp.hidden = !to;
  if (to) { ramp.dataset.low = number(to.low); ramp.dataset.high = number(to.high) + (to.top > to.high ? " and above" : ""); }
  if (state.token !== null) inspect(state.token);
}

function inspect(i, scroll = false) {
  const response = data.responses[state.response];
  if (state.token !== null) drawn[state.token]?.classList.remove("here");
  for (const token of document.querySelectorAll(".tokens .attends")) { token.classList.remove("attends"); token.style.removeProperty("--a"); }
  state.token = i;
  const cross = byId("cross"), numbers = byId("numbers"), who = byId("who");
  cross.hidden = i === null;
  byId("inspector").classList.toggle("chosen", i !== null);
  if (i === null) {
    numbers.replaceChildren(element("span", { class: "marks" }, TOUCH.matches ? "Tap a token or the curves for the numbers; tap it again to put them away." : "Point at a token or at the curves for the numbers. Arrow keys step; a click holds."));
    who.replaceChildren();
    return;
  }
  drawn[i].classList.add("here");
  const marks = [`token ${i} of ${response.tokens.length + response.hidden}`];
  for (const signal of signals) if (response.peaks[signal.key]?.includes(i)) marks.push(`peak of ${signal.name}`);
  if (response.chunks.includes(i)) marks.push("begins a chunk");
  if (response.trials[i]) marks.push(response.trials[i]);
  if (state.held && !TOUCH.matches) marks.push("held");
  numbers.replaceChildren(
    element("span", { class: "token" }, visible(response.tokens[i])),
    ...signals.filter(signal => response.values[signal.key]).map(signal =>
      element("span", { style: `--hue:var(--${signal.hue})`, "data-of": signal.key }, element("b", {}, signal.name), " " + number(response.values[signal.key][i]))),
    element("span", { class: "marks" }, marks.join(" · ")));
  const attenders = response.attenders[i] ?? [];
  const most = attenders.reduce((a, [, weight]) => Math.max(a, weight), 0);
  who.replaceChildren(...(attenders.length ? ["An anchor. Attended most by ", ...attenders.flatMap(([t, weight], n) => [
    n ? ", " : "", element("code", {}, visible(response.tokens[t] ?? "…")), ` ${t} (${number(weight)})`])] : []));
  for (const [t, weight] of attenders) if (drawn[t]) { drawn[t].classList.add("attends"); drawn[t].style.setProperty("--a", (weight / most).toFixed(3)); }
  cross.style.left = `${(i + .5) * layout.step}px`;
  if (!scroll) return;
  // Scroll the boxes, never the page.
  const plots = byId("plots"), x = (i + .5) * layout.step, tokens = byId("tokens"), y = drawn[i].offsetTop;
  if (x < plots.scrollLeft + 20 || x > plots.scrollLeft + plots.clientWidth - 20) plots.scrollLeft = x - plots.clientWidth / 2;
  if (y < tokens.scrollTop || y > tokens.scrollTop + tokens.clientHeight - 30) tokens.scrollTop = y - tokens.clientHeight / 2;
}

// ---- curves ----
const layout = { step: 1, width: 0 };
function drawCurves() {
  const response = data.responses[state.response], n = response.tokens.length, strip = byId("strip");
  layout.step = Math.min(STEP_PX[1], Math.max(STEP_PX[0], byId("plots").clientWidth / n));
  layout.width = layout.step * n;
  strip.style.width = `${layout.width}px`;
  strip.style.setProperty("--view", `${byId("plots").clientWidth}px`);
  const rows = [];
  for (const signal of signals) {
    if (!defined(response.values[signal.key] ?? []).length) continue;
    rows.push(...curve(signal, response.values[signal.key], response.peaks[signal.key] ?? []));
    if (signal.key === "waad" && response.band) rows.push(...band(response.band));
  }
  if (layout.step >= LABEL_PX) rows.push(axis(response.tokens));
  const boundaries = response.chunks.filter(t => t > 0).map(t => element("div", { class: "boundary", style: `left:${t * layout.step}px` }));
  strip.replaceChildren(...boundaries, ...rows, byId("cross"));
  if (state.token !== null) byId("cross").style.left = `${(state.token + .5) * layout.step}px`;
}

function caption(hue, name, note) {
  return element("div", {}, element("span", { class: "name", style: `--hue:var(--${hue})` }, name, element("small", {}, note)));
}

function curve(signal, values, peaks) {
  const to = heights(signal, values), height = ROW_PX, pad = 5;
  const x = i => ((i + .5) * layout.step).toFixed(1), y = value => (height - pad - share(value, to) * (height - 2 * pad)).toFixed(1);
  let line = "", area = "", start = null;
  values.forEach((value, i) => {
    if (value === null) return;
    const joins = i > 0 && values[i - 1] !== null, ends = values[i + 1] === undefined || values[i + 1] === null;
    if (!joins) start = i;
    // γ is a factor per token, so it is drawn as steps.
    const points = signal.low === null ? `${x(i)} ${y(value)}` : `${x(i - .5)} ${y(value)}L${x(i + .5)} ${y(value)}`;
    line += `${joins ? "L" : "M"}${points}` + (!joins && ends ? "h.01" : "");
    area += joins ? `L${points}` : `M${x(i)} ${height - pad}L${points}`;
    if (ends) area += `L${x(i)} ${height - pad}L${x(start)} ${height - pad}Z`;
  });
  const cut = to.top > to.high;
  const note = `${signal.unit ? signal.unit + ", " : ""}${number(to.low)} to ${number(to.high)}` + (cut ? `; cut there, largest ${number(to.top)}` : "");
  return [caption(signal.hue, signal.name, note), svg("svg", { class: "curve", "data-signal": signal.key, height, viewBox: `0 0 ${layout.width} ${height}`, preserveAspectRatio: "none", style: `--hue:var(--${signal.hue})`, role: "img", "aria-label": `${signal.name} over the response` },
    svg("line", { class: "base", x1: 0, x2: layout.width, y1: height - pad, y2: height - pad }),
    svg("path", { class: "area", d: area }), svg("path", { class: "line", d: line, "stroke-linecap": "round" }),
    ...peaks.filter(i => values[i] !== null && values[i] !== undefined).map(i => svg("circle", { class: "peak", "data-i": i, cx: x(i), cy: y(values[i]), r: Math.min(4, Math.max(2.6, layout.step / 2.2)) })))];
}

function band(pixels) {
  const canvas = element("canvas", { width: pixels.rows, height: pixels.columns, id: "band", role: "img", "aria-label": "Attention of the local heads to the nearest tokens" });
  paint(canvas, pixels, "waad", true);
  return [caption("waad", "Local heads, nearest tokens", `attention to the token itself (top) and the ${pixels.columns - 1} before it, 0 to ${number(pixels.peak)}` + (bytes(pixels).includes(NONE) ? "; grey: before the sequence" : "")), canvas];
}

function axis(tokens) {
  const labels = tokens.map(text => visible(text).replace(/^␣(?=.)/, "")).map(label => label.length > 9 ? label.slice(0, 8) + "…" : label);
  const fits = label => label.length * LETTER_PX < layout.step, longest = labels.filter(label => !fits(label)).reduce((a, label) => Math.max(a, label.length), 0);
  const height = Math.max(16, 12 + LETTER_PX * longest);
  return svg("svg", { class: "axis", height, viewBox: `0 0 ${layout.width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...labels.map((label, i) => {
    const x = (i + .5) * layout.step;
    return svg("text", { class: "token", ...(fits(label) ? { x, y: 12, "text-anchor": "middle" } : { "text-anchor": "end", transform: `translate(${x + 3.5} 6) rotate(-90)` }) }, label);
  }));
}

// ---- maps: bytes of √(weight / peak), drawn in the page's colors ----
const bytes = pixels => pixels.bytes ??= Uint8Array.from(atob(pixels.data), character => character.charCodeAt(0));
const color = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim().split(/\s+/).map(Number);
function paint(canvas, pixels, hue, transposed) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height), rgb = color(hue), source = bytes(pixels);
  for (let r = 0; r < pixels.rows; r++) for (let c = 0; c < pixels.columns; c++) {
    const level = source[r * pixels.columns + c], at = 4 * (transposed ? c * canvas.width + r : r * canvas.width + c);
    image.data.set(level === NONE ? [128, 128, 128, 90] : [...rgb, level], at);
  }
  context.putImageData(image, 0, 0);
}
const weight = (pixels, r, c) => { const level = bytes(pixels)[r * pixels.columns + c]; return level === NONE ? null : pixels.peak * (level / (NONE - 1)) ** 2; };

function drawMaps() {
  const response = data.responses[state.response];
  byId("maps").hidden = !response.maps;
  if (!response.maps) return;
  for (const [kind, hue] of [["local", "waad"], ["global", "fai"]]) {
    const pixels = response.maps[kind], box = byId(`map-${kind}`), edge = element("div", { class: "edge", style: `left:${100 * pixels.prompt / pixels.columns}%` });
    const canvas = element("canvas", { width: pixels.columns, height: pixels.rows, role: "img", "aria-label": `Mean attention map of the ${kind} heads` });
    paint(canvas, pixels, hue, false);
    box.style.aspectRatio = `${pixels.columns} / ${pixels.rows}`;
    box.replaceChildren(canvas, ...(pixels.prompt ? [edge] : []));
    byId(`caption-${kind}`).textContent = mapNote(pixels);
  }
}
const mapNote = pixels => (pixels.cell === 1 ? "Rows: response tokens; columns: all tokens" : `A cell pools ${pixels.cell} × ${pixels.cell} tokens`) + (pixels.prompt ? ", the prompt's left of the dashed line" : "") + `. Strongest ${number(pixels.peak)}; the scale is its square root.`;
function pointAtMap(event, kind) {
  const pixels = data.responses[state.response].maps[kind], box = event.currentTarget.getBoundingClientRect(), tokens = data.responses[state.response].tokens;
  const r = Math.min(pixels.rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * pixels.rows)));
  const c = Math.min(pixels.columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * pixels.columns)));
  const span = from => pixels.cell === 1 ? `${from}` : `${from}–${from + pixels.cell - 1}`;
  const code = i => pixels.cell === 1 && tokens[i] !== undefined ? element("code", {}, visible(tokens[i]) + " ") : "";
  const row = r * pixels.cell, column = (c - pixels.prompt) * pixels.cell;
  byId(`caption-${kind}`).replaceChildren("token ", code(row), span(row), c < pixels.prompt ? " → prompt" : " → ", ...(c < pixels.prompt ? [] : [code(column), span(column)]), `: ${number(weight(pixels, r, c))}`);
}

// ---- heads ----
const SQUARE = 26, GAP = 3, LEFT = 38;
function drawHeads() {
  const { layers, quantities } = data.heads, rows = layers.length, columns = layers[0].heads.length, many = Math.max(rows, columns) > 20;
  const height = rows * SQUARE + 26, width = LEFT + columns * SQUARE, picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "every head of the model", style: `max-width:${width / 13}rem` });
  const label = (x, y, anchor, text, bold) => svg("text", { x, y, "text-anchor": anchor, "font-size": many ? 20 : 11, "font-weight": bold ? 700 : 400 }, text);
  layers.forEach((layer, row) => {
    const y = (rows - 1 - row) * SQUARE;
    if (!many || layer.index % 4 === 0) picture.append(label(LEFT - 8, y + SQUARE / 2 + 3, "end", layer.index, layer.pool));
    layer.heads.forEach((head, h) => picture.append(square(picture, layer, head, h, LEFT + h * SQUARE, y)));
  });
  for (let h = 0; h < columns; h += many ? 4 : 1) picture.append(label(LEFT + h * SQUARE + (SQUARE - GAP) / 2, rows * SQUARE + (many ? 22 : 13), "middle", h, false));
  byId("heads-map").replaceChildren(picture);
  byId("head-picks").replaceChildren(...quantities.map(({ key, name, hue }) => element("button", { "data-quantity": key, style: `--hue:var(--${hue})` }, name)));
  for (const button of document.querySelectorAll("#head-picks button")) button.addEventListener("click", () => colorHeads(button.dataset.quantity));
  if (quantities.length) colorHeads(quantities[0].key);
}

function square(picture, layer, head, h, x, y) {
  const group = svg("g", { class: "head", "data-layer": layer.index, "data-head": h }), size = SQUARE - GAP, middle = { cx: x + size / 2, cy: y + size / 2 };
  group.append(svg("rect", { class: "cell", x, y, width: size, height: size, rx: 3 }));
  for (const set of head.sets) group.append(
    set === "local" || set === "global" ? svg("rect", { class: `set ${set}`, x: x + 1, y: y + 1, width: size - 2, height: size - 2, rx: 2 })
      : svg("circle", { class: `set ${set}`, ...middle, r: set === "receiver" ? 3.5 : 6.5 }));
  const tell = () => {
    picture.querySelector(".here")?.classList.remove("here");
    group.firstChild.classList.add("here");
    byId("caption-heads").textContent = `Layer ${layer.index}, head ${h}: ${head.notes.join(" · ")}`;
  };
  group.addEventListener("pointerenter", tell);
  group.addEventListener("click", tell);
  return group;
}

function colorHeads(key) {
  const { hue, log, values } = data.heads.quantities.find(quantity => quantity.key === key);
  const scale = value => log ? Math.sign(value) * Math.log1p(Math.abs(value)) : value, all = defined(values.flat());
  const low = log ? Math.min(...all.map(scale)) : 0, high = log ? Math.max(...all.map(scale)) : 1;
  for (const group of document.querySelectorAll("#heads-map .head")) {
    const value = values[group.dataset.layer][group.dataset.head];
    group.firstChild.setAttribute("fill", value === null ? "var(--sunk)" : `rgb(var(--${hue}) / ${(.06 + .64 * (high > low ? (scale(value) - low) / (high - low) : 0)).toFixed(3)})`);
  }
  for (const button of document.querySelectorAll("#head-picks button")) button.setAttribute("aria-pressed", button.dataset.quantity === key);
  const ramp = byId("head-ramp");
  ramp.style.setProperty("--hue", `var(--${hue})`);
  ramp.dataset.low = log ? number(Math.min(...all)) : "0%";
  ramp.dataset.high = log ? number(Math.max(...all)) : "100%";
}

// ---- event handlers ----
function start() {
  drawHeads();
  if (!data.responses.length) return;
  byId("which").append(...data.responses.map((response, i) => element("option", { value: i }, response.name)));
  byId("which").addEventListener("change", event => showResponse(Number(event.target.value)));
  byId("previous").addEventListener("click", () => showResponse(state.response - 1));
  byId("next").addEventListener("click", () => showResponse(state.response + 1));
  for (const button of document.querySelectorAll("#signal-picks button")) button.addEventListener("click", () => showSignal(button.dataset.signal));
  const tokens = byId("tokens"), strip = byId("strip");
  const tokenAt = event => { const token = event.target.closest("i[data-i]"); return token ? Number(token.dataset.i) : null; };
  const positionAt = event => Math.min(drawn.length - 1, Math.max(0, Math.floor((event.clientX - strip.getBoundingClientRect().left) / layout.step)));
  const click = i => {
    if (i === null) return;
    state.held = !(state.held && state.token === i);
    inspect(state.held || !TOUCH.matches ? i : null, true);
  };
  tokens.addEventListener("pointerover", event => { const i = tokenAt(event); if (i !== null && !state.held) inspect(i, true); });
  tokens.addEventListener("click", event => {
    click(tokenAt(event));
    if (state.token === null) return;
    const hidden = drawn[state.token].getBoundingClientRect().bottom + 8 - byId("inspector").getBoundingClientRect().top;
    if (hidden > 0) scrollBy(0, hidden); // keep the token visible above its numbers
  });
  strip.addEventListener("pointermove", event => { if (!state.held && event.pointerType === "mouse") inspect(positionAt(event), true); });
  strip.addEventListener("click", event => click(positionAt(event)));
  for (const box of [tokens, byId("plots")]) box.addEventListener("keydown", event => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    inspect(Math.min(drawn.length - 1, Math.max(0, (state.token ?? (by > 0 ? -1 : drawn.length)) + by)), true);
  });
  byId("show-prompt").addEventListener("click", () => { byId("prompt").classList.toggle("all"); foldPrompt(); });
  byId("signal-picks").addEventListener("scroll", hintAtMore, { passive: true });
  for (const kind of ["local", "global"]) {
    byId(`map-${kind}`).addEventListener("pointermove", event => pointAtMap(event, kind));
    byId(`map-${kind}`).addEventListener("pointerleave", () => { byId(`caption-${kind}`).textContent = mapNote(data.responses[state.response].maps[kind]); });
  }
  showResponse(0);
  hintAtMore();
  let width = byId("plots").clientWidth;
  new ResizeObserver(() => { if (byId("plots").clientWidth !== width) { width = byId("plots").clientWidth; drawCurves(); foldPrompt(); hintAtMore(); } }).observe(byId("plots"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawCurves(); drawMaps(); });
}
start();
