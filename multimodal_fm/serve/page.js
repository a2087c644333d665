"use strict";
// The page over an index. What comes from the collection is only ever set as text; nothing is loaded from elsewhere.

const $ = id => document.getElementById(id);
const KINDS = { image: ["picture", "pictures"], audio: ["sound", "sounds"], text: ["text", "texts"] };
const RATE = 16000, LONGEST = 10; // samples a second of what is recorded, and its seconds
const SIDE = 1024; // pixels of a picture that is sent
const BUTTONS = 40; // pixels at the bottom of the map
const state = { q: "", parts: [], to: "", where: {}, top: 12, view: "search" };
let about = { limits: {}, counts: {} }, searches = 0;

// ---- talking to the service

class Refusal extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}

async function call(path, options = {}, attempt = 0) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refusal(0, "The service does not answer. Is it still running?");
  }
  if (answer.status === 401) { await askToken(); return call(path, options); }
  if (answer.status === 429 && attempt < 3) {
    await new Promise(done => setTimeout(done, 1000 * (Number(answer.headers.get("Retry-After")) || 1)));
    return call(path, options, attempt + 1);
  }
  const data = answer.status === 204 ? null : await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refusal(answer.status, data.detail || `The service answered ${answer.status}.`);
  return { status: answer.status, data };
}

let asking = null;
function askToken() {
  asking ??= new Promise(done => {
    const dialog = $("login");
    dialog.showModal();
    dialog.oncancel = event => event.preventDefault();
    $("login-form").onsubmit = async event => {
      event.preventDefault();
      const answer = await fetch("/login", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token: $("token").value }),
      }).catch(() => null);
      if (answer && answer.ok) { $("token").value = ""; dialog.close(); asking = null; done(); return; }
      $("login-error").textContent = answer && answer.status === 401 ? "That is not the token." : "Try again in a moment.";
      $("token").select();
    };
  });
  return asking;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// ---- small things

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon"); svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`); svg.append(use);
  return svg;
}

const count = (number, kind) => `${number.toLocaleString("en")} ${(KINDS[kind] || [kind, kind])[number === 1 ? 0 : 1]}`;
const shorten = (text, most) => text.length > most ? `${text.slice(0, most - 1)}…` : text;

function flatten(value, name = "", into = []) {
  if (value !== null && typeof value === "object") {
    for (const [key, own] of Object.entries(value)) if (into.length < 60) flatten(own, name ? `${name}.${key}` : key, into);
  } else if (value !== null && name) into.push([name, String(value)]);
  return into;
}

// ---- the query, and the link that reproduces it

function readLink() {
  const link = new URLSearchParams(location.search), top = Number(link.get("top"));
  state.q = link.get("q") || "";
  state.to = link.get("to") in KINDS ? link.get("to") : "";
  state.top = Number.isInteger(top) && top > 0 && top <= 100 ? top : 12;
  state.view = link.get("view") === "map" ? "map" : "search";
  state.parts = [...link.getAll("like").map(id => ({ id, weight: 1 })), ...link.getAll("unlike").map(id => ({ id, weight: -1 }))];
  state.where = Object.fromEntries(link.getAll("where").map(one => one.split("=")).filter(one => one.length > 1)
    .map(([field, ...value]) => [field, value.join("=")]));
}

function writeLink() {
  const link = new URLSearchParams();
  if (state.q.trim()) link.set("q", state.q.trim());
  for (const part of state.parts) if (part.id) link.append(part.weight > 0 ? "like" : "unlike", part.id);
  if (state.to) link.set("to", state.to);
  for (const [field, value] of Object.entries(state.where)) link.append("where", `${field}=${value}`);
  if (state.top !== 12) link.set("top", state.top);
  if (state.view === "map") link.set("view", "map");
  return link.size ? `/?${link}` : "/";
}

function parseWords(text) {
  const parts = [], minus = /(^|\s)-(?:"([^"]+)"|([^\s"]\S*))/g;
  const rest = text.replace(minus, (_, space, quoted, word) => {
    parts.push({ text: quoted || word, weight: -1 });
    return " ";
  }).trim();
  if (rest) parts.unshift({ text: rest, weight: 1 });
  return parts;
}

function form() {
  const words = parseWords(state.q), files = state.parts.filter(part => part.file), places = { image: 0, audio: 0 };
  const request = { parts: words, top: state.top, where: state.where };
  if (state.to) request.to = state.to;
  for (const part of state.parts) {
    request.parts.push(part.id ? { id: part.id, weight: part.weight } : { [part.kind]: places[part.kind]++, weight: part.weight });
  }
  if (!files.length) return { request, options: { headers: { "Content-Type": "application/json" }, body: JSON.stringify(request) } };
  const body = new FormData();
  body.append("request", JSON.stringify(request));
  for (const part of files) body.append(part.kind, part.file, part.name);
  return { request, options: { body } };
}

async function search({ push = true, focus = false } = {}) {
  stopPlaying();
  const own = ++searches;
  state.view = "search";
  if (push && writeLink() !== location.pathname + location.search) history.pushState(null, "", writeLink());
  show();
  const { request, options } = form();
  if (!request.parts.length) { begin(); return; }
  if (!request.parts.some(part => part.weight > 0)) { say("Say what to look for, besides what to leave out.", true); return; }
  document.body.classList.add("busy", "searched");
  say("Searching…");
  try {
    const { data } = await call("/search", { method: "POST", ...options });
    if (own !== searches) return;
    showResults(data);
    if (focus) { scrollTo({ top: 0 }); $("results").focus({ preventScroll: true }); }
  } catch (error) {
    if (own === searches) say(error.message, true);
  } finally {
    if (own === searches) document.body.classList.remove("busy");
  }
}

// ---- results

function showResults(data) {
  $("begin").hidden = true;
  $("found").hidden = false;
  $("filters").hidden = false;
  let total = 0, most = 0;
  const counts = [];
  for (const kind of Object.keys(KINDS)) {
    const found = data.results[kind] || [], section = $(kind);
    section.hidden = !found.length;
    section.querySelector(".cards").replaceChildren(...found.map(one => card(one, scale(found, data.background[kind]))));
    total += found.length;
    most = Math.max(most, found.length);
    if (found.length) counts.push(count(found.length, kind));
  }
  const files = state.parts.some(part => part.file);
  say(total ? `${counts.join(", ")}, in ${Math.round(data.milliseconds)} ms.${files ? " A file of yours is not part of the link." : ""}`
    : "Nothing was found. Take a filter away, or try other words.");
  $("more").hidden = most < state.top || state.top >= 96;
  document.title = `${state.q.trim() || "Search"} – ${about.name || "search"}`;
  suggestFilters(Object.values(data.results).flat());
}

// A bar's length: 0 at the median of the collection's scores, 1 at the best that is known.
function scale(found, background) {
  if (!background) return () => 1;
  const best = Math.max(background.highest, ...found.map(one => one.score)), low = Math.min(background.median, best - 1e-6);
  return score => Math.min(1, Math.max(0.02, (score - low) / (best - low)));
}

function percent(standing) {
  if (standing >= 99.95) return "99.9 %";
  return `${standing >= 99 || standing <= 1 ? standing.toFixed(1) : Math.round(standing)} %`;
}

function card(item, length = null) {
  const element = $("card").content.firstElementChild.cloneNode(true), part = name => element.querySelector(name);
  const kind = item.modality, what = shorten(item.text || item.key || item.source, 80), media = part(".media");
  element.classList.add(`is-${kind}`);
  element.dataset.id = item.id;
  if (kind === "image") {
    const picture = make("img", { src: `${item.media}?thumbnail=true`, alt: item.text || "Picture without a caption", loading: "lazy", decoding: "async" });
    picture.onload = () => { // of a photo nothing is lost at the edges; a drawing is shown whole
      const ratio = picture.naturalWidth / picture.naturalHeight;
      picture.classList.toggle("photo", ratio > 1.2 && ratio < 1.55);
    };
    picture.onerror = () => media.replaceChildren(make("p", { className: "lost", textContent: "The picture cannot be read." }));
    media.append(make("a", { href: item.media, target: "_blank", rel: "noopener" }, picture));
    media.firstChild.setAttribute("aria-label", `Open the picture: ${what}`);
  } else if (kind === "audio") {
    const player = make("audio", { controls: true, preload: "metadata", src: item.media });
    player.setAttribute("aria-label", `Sound: ${what}`);
    player.onplay = () => stopPlaying(player);
    media.append(player);
  }
  part(".caption").textContent = kind === "text" ? item.text : item.text || label(item);
  if (length) {
    part(".standing").hidden = false;
    part(".meter span").style.width = `${100 * length(item.score)}%`;
    part(".percent").textContent = `nearer than ${percent(item.standing)}`;
    part(".percent").title = `cosine ${item.score.toFixed(3)}`;
    if (item.copies.length) {
      part(".copies").hidden = false;
      part(".copies").textContent = `and ${item.copies.length} near ${item.copies.length === 1 ? "copy" : "copies"}`;
    }
  }
  part(".like").setAttribute("aria-label", `More like this: ${what}`);
  part(".unlike").setAttribute("aria-label", `Less like this: ${what}`);
  part(".like").onclick = () => like(item);
  part(".unlike").onclick = () => unlike(item);
  part(".unlike").hidden = !length;
  part(".facts summary").setAttribute("aria-label", `Details of ${what}`);
  part(".facts").ontoggle = event => { if (event.target.open && !part("dl").children.length) part("dl").append(...facts(item)); };
  return element;
}

const label = item => String(item.fields.label ?? item.fields.caption ?? item.key);

function facts(item) {
  const rows = [["kind", KINDS[item.modality]?.[0] ?? item.modality], ["from", item.source], ["key", item.key]].filter(row => row[1])
    .flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]);
  return rows.concat(flatten(item.fields).flatMap(([name, value]) => {
    const button = make("button", { type: "button", textContent: shorten(value, 300), title: "Show only these" });
    button.onclick = () => filter(name, value);
    return [make("dt", { textContent: name }), make("dd", {}, value.length <= 200 ? button : shorten(value, 300))];
  }));
}

function stopPlaying(but = null) {
  for (const player of document.querySelectorAll("audio")) if (player !== but) player.pause();
}

function like(item) {
  state.q = ""; state.parts = [{ id: item.id, item, weight: 1 }]; state.top = 12;
  search({ focus: true });
}

function unlike(item) {
  state.parts = state.parts.filter(part => part.id !== item.id).concat({ id: item.id, item, weight: -1 });
  search({ focus: true });
}

// ---- filters

function filter(name, value) {
  state.where = { ...state.where, [name]: value };
  search({ focus: true });
}

const seen = new Map(); // field -> values, of what has been shown

function suggestFilters(items) {
  for (const item of items) {
    for (const [name, value] of flatten(item.fields)) {
      if (value.length > 60) continue;
      if (!seen.has(name)) { if (seen.size >= 60) continue; seen.set(name, new Set()); }
      if (seen.get(name).size < 100) seen.get(name).add(value);
    }
  }
  $("add-filter").hidden = !seen.size;
  const chosen = $("field").value;
  $("field").replaceChildren(...[...seen.keys()].sort().map(name => make("option", { textContent: name, value: name })));
  if (seen.has(chosen)) $("field").value = chosen;
  suggestValues();
}

function suggestValues() {
  $("values").replaceChildren(...[...(seen.get($("field").value) || [])].sort().map(value => make("option", { value })));
}

// ---- what is in the query besides words

function show() {
  $("search-view").hidden = state.view !== "search";
  $("map-view").hidden = state.view !== "map";
  $("go-search").toggleAttribute("aria-current", state.view === "search");
  $("go-map").toggleAttribute("aria-current", state.view === "map");
  for (const id of ["go-search", "go-map"]) if ($(id).hasAttribute("aria-current")) $(id).setAttribute("aria-current", "page");
  $("query").value = state.q;
  for (const radio of document.getElementsByName("to")) radio.checked = radio.value === state.to;
  $("parts").hidden = !state.parts.length;
  $("parts").replaceChildren(...state.parts.map(chip));
  const filters = Object.entries(state.where);
  $("where").hidden = !filters.length;
  $("where").replaceChildren(...filters.map(([name, value]) => make("li", {},
    make("span", { className: "what", textContent: `${name}: ${shorten(value, 60)}` }),
    remover(`Remove the filter ${name}`, () => { const { [name]: _, ...rest } = state.where; state.where = rest; search(); }))));
}

function remover(name, act) {
  const button = make("button", { type: "button", onclick: () => { act(); $("query").focus(); } }, icon("close"));
  button.setAttribute("aria-label", name);
  return button;
}

function chip(part) {
  const row = make("li", { className: part.weight < 0 ? "minus" : "" });
  if (part.preview) row.append(part.preview);
  else if (part.item?.modality === "image") row.append(make("img", { src: `${part.item.media}?thumbnail=true`, alt: "" }));
  else row.append(icon(part.kind || part.item?.modality || "search"));
  const kind = part.kind || part.item?.modality, name = part.name || part.item?.text || part.item?.key || part.id;
  const text = make("span", { className: "what" }, make("small", { textContent: part.weight < 0 ? "unlike " : "like " }), shorten(name, 60));
  text.title = part.file ? "A file of yours is not part of the link" : "";
  const turn = make("button", { type: "button", textContent: part.weight < 0 ? "+" : "−", title: part.weight < 0 ? "More like it" : "Less like it" });
  turn.setAttribute("aria-label", `${part.weight < 0 ? "More" : "Less"} like ${shorten(name, 60)}`);
  turn.onclick = () => { part.weight = -part.weight; search(); };
  row.append(text, turn, remover(`Remove ${kind ? `the ${KINDS[kind][0]} ` : ""}${shorten(name, 60)}`, () => {
    state.parts = state.parts.filter(one => one !== part);
    search();
  }));
  return row;
}

async function nameParts() {
  await Promise.all(state.parts.filter(part => part.id && !part.item).map(async part => {
    try { part.item = (await call(`/item/${encodeURIComponent(part.id)}`)).data; } catch { /* the search says so */ }
  }));
  show();
}

// ---- files: dropped, chosen, pasted, recorded

async function addFile(file) {
  const kind = file.type.startsWith("image/") ? "image" : file.type.startsWith("audio/") || file.type.startsWith("video/") ? "audio" : "";
  if (!kind) { say(`${file.name}: neither a picture nor a sound.`, true); return; }
  say("Reading the file…");
  const part = { kind, file, name: file.name || `a ${KINDS[kind][0]}`, weight: 1 };
  try {
    if (kind === "image") await preparePicture(part);
    else await prepareSound(part);
  } catch { /* the service says what is wrong with it */ }
  if (part.file.size > about.limits.max_upload) {
    say(`${part.name} is larger than ${Math.round(about.limits.max_upload / 1e6)} MB, the most that can be sent.`, true);
    return;
  }
  state.parts = state.parts.filter(one => !(one.file && one.kind === kind)).concat(part);
  search();
}

async function preparePicture(part) {
  const picture = await createImageBitmap(part.file), canvas = make("canvas", { width: 80, height: 80 });
  const side = Math.min(picture.width, picture.height);
  canvas.getContext("2d").drawImage(picture, (picture.width - side) / 2, (picture.height - side) / 2, side, side, 0, 0, 80, 80);
  part.preview = canvas;
  const scale = SIDE / Math.max(picture.width, picture.height);
  if (scale >= 1 && ["image/jpeg", "image/png", "image/webp", "image/gif"].includes(part.file.type)) return;
  const small = make("canvas", { width: Math.max(1, Math.round(picture.width * Math.min(1, scale))), height: Math.max(1, Math.round(picture.height * Math.min(1, scale))) });
  const context = small.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, small.width, small.height);
  context.drawImage(picture, 0, 0, small.width, small.height);
  part.file = await new Promise(done => small.toBlob(blob => done(blob || part.file), "image/jpeg", 0.92));
}

async function prepareSound(part) {
  if (part.file.size <= 2e6 && /^audio\/(x-)?(wav|wave|flac|ogg|mpeg|mp3)$/.test(part.file.type)) return;
  part.file = await toWav(part.file);
}

async function toWav(file) {
  const context = new AudioContext();
  try {
    const sound = await context.decodeAudioData(await file.arrayBuffer());
    const seconds = Math.min(sound.duration, about.limits.max_seconds || 120);
    const offline = new OfflineAudioContext(1, Math.max(1, Math.floor(seconds * RATE)), RATE), source = offline.createBufferSource();
    source.buffer = sound;
    source.connect(offline.destination);
    source.start();
    return writeWav((await offline.startRendering()).getChannelData(0));
  } finally {
    context.close();
  }
}

// 16-bit PCM, mono (Microsoft and IBM, 1991).
function writeWav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const put = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  put(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); put(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  put(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, 32767 * Math.max(-1, Math.min(1, value)), true));
  return new Blob([view], { type: "audio/wav" });
}

let recorder = null;
async function record() {
  if (recorder) { recorder.stop(); return; }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch {
    say("The microphone is not to be had: allow it in the browser. It needs https or localhost.", true);
    return;
  }
  const chunks = [], button = $("record"), began = Date.now();
  recorder = new MediaRecorder(stream);
  const tick = () => {
    const seconds = (Date.now() - began) / 1000;
    $("clock").textContent = `${Math.floor(seconds)} s`;
    if (seconds >= LONGEST && recorder?.state === "recording") recorder.stop();
  };
  const timer = setInterval(tick, 250);
  recorder.ondataavailable = event => chunks.push(event.data);
  recorder.onstop = async () => {
    clearInterval(timer);
    stream.getTracks().forEach(track => track.stop());
    recorder = null;
    button.setAttribute("aria-pressed", "false");
    button.querySelector("use").setAttribute("href", "#i-mic");
    $("clock").hidden = true;
    await addFile(new File(chunks, "your recording", { type: chunks[0]?.type.split(";")[0] || "audio/webm" }));
  };
  recorder.start();
  button.setAttribute("aria-pressed", "true");
  button.querySelector("use").setAttribute("href", "#i-stop");
  $("clock").hidden = false;
  tick();
  say(`Recording, ${LONGEST} seconds at most. Press again to search with it.`);
}

// ---- where a search begins

async function begin() {
  document.body.classList.remove("searched");
  $("found").hidden = true;
  $("filters").hidden = true;
  document.title = about.name || "Search";
  say("");
  try {
    const { data } = await call(`/sample?count=36&seed=${Math.floor(Math.random() * 1e6)}`);
    const pictures = data.items.filter(item => item.modality === "image"), rest = data.items.filter(item => item.modality !== "image");
    const shown = (pictures.length ? pictures : rest).slice(0, 10);
    $("begin").hidden = !shown.length;
    $("begin-cards").replaceChildren(...shown.map(item => card(item)));
    const texts = [...new Set(data.items.map(item => item.text.trim()).filter(text => text && text.length < 60))].slice(0, 4);
    $("ideas").replaceChildren(...texts.map(text => {
      const button = make("button", { type: "button", className: "idea", textContent: text });
      button.onclick = () => { state.q = text; search(); };
      return make("li", {}, button);
    }));
  } catch (error) {
    say(error.message, true);
  }
}

async function learn() {
  about = (await call("/about")).data;
  $("name").textContent = about.name || "Search";
  const kinds = Object.keys(KINDS).filter(kind => about.counts[kind]);
  $("counts").textContent = kinds.map(kind => count(about.counts[kind], kind)).join(" · ") || "There is nothing in it yet";
  $("add-image").hidden = !about.reads.includes("image");
  $("add-audio").hidden = $("record").hidden = !about.reads.includes("audio");
}

// ---- the map

const map = { data: null, x: 0, y: 0, zoom: 1, at: -1, hidden: new Set() };

async function showMap(push = true) {
  state.view = "map";
  if (push && writeLink() !== location.pathname + location.search) history.pushState(null, "", writeLink());
  show();
  stopPlaying();
  document.title = `Map – ${about.name || "search"}`;
  try {
    while (!map.data && state.view === "map") {
      const { status, data } = await call("/map");
      if (status === 200) { map.data = data; break; }
      $("map-note").textContent = "The map is being made, once…";
      await new Promise(done => setTimeout(done, 1000));
    }
  } catch (error) {
    $("map-note").textContent = error.message;
    return;
  }
  if (!map.data || state.view !== "map") return;
  const shown = map.data.ids.length;
  $("map-note").textContent = `${shown < map.data.items ? `${shown.toLocaleString("en")} of ` : ""}${map.data.items.toLocaleString("en")} items, laid out by ${map.data.method}: what lies close together is alike for the model. The offset between pictures, sounds and texts is taken off, so that they can be compared.`;
  $("legend").replaceChildren(...[$("legend").firstElementChild, ...Object.keys(KINDS).filter(kind => map.data.modalities.includes(kind)).map(kind => {
    const box = make("input", { type: "checkbox", checked: !map.hidden.has(kind) });
    box.onchange = () => { map.hidden[box.checked ? "delete" : "add"](kind); draw(); };
    return make("label", {}, box, make("span", { className: `dot ${kind}` }), KINDS[kind][1]);
  })]);
  draw();
}

function place(i) {
  const { clientWidth: width, clientHeight: height } = $("canvas"), side = 28;
  return [side + ((map.data.x[i] - 0.5 - map.x) * map.zoom + 0.5) * (width - 2 * side), side + ((map.data.y[i] - 0.5 - map.y) * map.zoom + 0.5) * (height - 2 * side - BUTTONS)];
}

function draw() {
  const canvas = $("canvas"), ratio = devicePixelRatio || 1, style = getComputedStyle(document.documentElement);
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const context = canvas.getContext("2d"), radius = Math.min(9, (map.data.ids.length > 1500 ? 2.5 : 4) * Math.sqrt(map.zoom));
  context.scale(ratio, ratio);
  const dot = (i, r) => { const [x, y] = place(i); context.beginPath(); context.arc(x, y, r, 0, 7); };
  for (const kind of Object.keys(KINDS)) {
    if (map.hidden.has(kind)) continue;
    context.fillStyle = style.getPropertyValue(`--${kind}`);
    context.globalAlpha = 0.72;
    map.data.modalities.forEach((own, i) => { if (own === kind) { dot(i, radius); context.fill(); } });
  }
  context.globalAlpha = 1;
  if (map.at < 0) return;
  context.lineWidth = 3;
  context.strokeStyle = style.getPropertyValue("--ink");
  context.fillStyle = style.getPropertyValue(`--${map.data.modalities[map.at]}`);
  dot(map.at, radius + 4);
  context.fill();
  context.stroke();
}

function nearest(x, y, most, fits = () => true) {
  let found = -1, least = most * most;
  map.data.ids.forEach((_, i) => {
    if (map.hidden.has(map.data.modalities[i])) return;
    const [px, py] = place(i), distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least && fits(px - x, py - y, i)) { found = i; least = distance; }
  });
  return found;
}

let picking = 0;
async function pick(i) {
  if (i < 0 || i === map.at) return;
  map.at = i;
  draw();
  const own = ++picking;
  await new Promise(done => setTimeout(done, 120)); // so that a pointer that passes asks for nothing
  if (own !== picking) return;
  try {
    const { data } = await call(`/item/${encodeURIComponent(map.data.ids[i])}`);
    if (own === picking) $("picked").replaceChildren(card(data));
  } catch (error) {
    $("picked").replaceChildren(make("p", { className: "note", textContent: error.message }));
  }
}

function zoom(factor, x = 0.5, y = 0.5) {
  const next = Math.min(40, Math.max(1, map.zoom * factor)), shift = 1 / map.zoom - 1 / next;
  map.x += (x - 0.5) * shift; map.y += (y - 0.5) * shift; map.zoom = next;
  const most = 0.5 - 0.5 / next;
  map.x = Math.min(most, Math.max(-most, map.x)); map.y = Math.min(most, Math.max(-most, map.y));
  draw();
}

function steer(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (step) {
    const { clientWidth: width, clientHeight: height } = $("canvas");
    const [x, y] = map.at < 0 ? [width / 2, height / 2] : place(map.at);
    pick(map.at < 0 ? nearest(x, y, 1e6) : nearest(x, y, 1e6, (dx, dy, i) => i !== map.at && dx * step[0] + dy * step[1] > Math.abs(dx * step[1] + dy * step[0])));
  } else if (event.key === "Enter" && map.at >= 0) like({ id: map.data.ids[map.at] });
  else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else return;
  event.preventDefault();
}

function listenToMap() {
  const canvas = $("canvas"), held = new Map();
  let moved = false;
  canvas.onkeydown = event => { if (map.data) steer(event); };
  canvas.onpointerdown = event => { canvas.setPointerCapture(event.pointerId); held.set(event.pointerId, event); moved = false; };
  canvas.onpointerup = canvas.onpointercancel = event => {
    held.delete(event.pointerId);
    if (!moved && map.data && event.type === "pointerup") pick(nearest(event.offsetX, event.offsetY, 30));
  };
  canvas.onpointermove = event => {
    if (!map.data) return;
    const before = held.get(event.pointerId);
    if (!before) { if (event.pointerType === "mouse") pick(nearest(event.offsetX, event.offsetY, 18)); return; }
    const [dx, dy] = [event.offsetX - before.offsetX, event.offsetY - before.offsetY];
    if (Math.abs(dx) + Math.abs(dy) < 3 && !moved) return;
    moved = true;
    if (held.size === 2) {
      const other = [...held.entries()].find(([id]) => id !== event.pointerId)[1];
      const span = one => Math.hypot(one.offsetX - other.offsetX, one.offsetY - other.offsetY) || 1;
      zoom(span(event) / span(before), event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight);
    } else {
      map.x -= dx / (canvas.clientWidth - 56) / map.zoom;
      map.y -= dy / (canvas.clientHeight - 56 - BUTTONS) / map.zoom;
      zoom(1);
    }
    held.set(event.pointerId, event);
  };
  canvas.addEventListener("wheel", event => {
    if (!map.data) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight);
  }, { passive: false });
  $("zoom-in").onclick = () => zoom(1.5);
  $("zoom-out").onclick = () => zoom(1 / 1.5);
  $("zoom-all").onclick = () => zoom(0);
  addEventListener("resize", () => { if (map.data && state.view === "map") draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (map.data && state.view === "map") draw(); });
}

// ---- what listens

function listen() {
  $("form").onsubmit = event => {
    event.preventDefault();
    state.q = $("query").value;
    state.top = 12;
    search();
  };
  for (const radio of document.getElementsByName("to")) {
    radio.onchange = () => { state.q = $("query").value; state.to = radio.value; state.top = state.to ? 24 : 12; search(); };
  }
  $("more").onclick = () => { state.top = Math.min(96, state.top * 2); search(); };
  $("field").onchange = suggestValues;
  $("apply").onclick = () => {
    if (!$("field").value || !$("value").value) { $("value").focus(); return; }
    $("add-filter").open = false;
    filter($("field").value, $("value").value);
    $("value").value = "";
  };
  $("value").onkeydown = event => { if (event.key === "Enter") { event.preventDefault(); $("apply").click(); } };
  $("copy").onclick = async () => {
    const files = state.parts.some(part => part.file) ? " The file of yours is not part of it." : "";
    try {
      await navigator.clipboard.writeText(location.origin + writeLink());
      say(`The link is copied.${files}`);
    } catch {
      say(`The link stands in the address bar.${files}`);
    }
  };
  for (const kind of ["image", "audio"]) {
    $(`add-${kind}`).onclick = () => $(`file-${kind}`).click();
    $(`file-${kind}`).onchange = event => { const [file] = event.target.files; event.target.value = ""; if (file) addFile(file); };
  }
  $("record").onclick = record;
  $("home").onclick = $("go-search").onclick = event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    if (event.currentTarget.id === "home") Object.assign(state, { q: "", parts: [], to: "", where: {}, top: 12 });
    search();
    $("query").focus();
  };
  $("go-map").onclick = event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    showMap();
  };
  const carries = event => [...event.dataTransfer?.types || []].includes("Files");
  let inside = 0;
  addEventListener("dragenter", event => { if (carries(event)) { inside++; $("drop").hidden = false; } });
  addEventListener("dragleave", event => { if (carries(event) && --inside <= 0) { inside = 0; $("drop").hidden = true; } });
  addEventListener("dragover", event => { if (carries(event)) event.preventDefault(); });
  addEventListener("drop", event => {
    if (!carries(event)) return;
    event.preventDefault();
    inside = 0;
    $("drop").hidden = true;
    state.q = $("query").value;
    for (const file of [...event.dataTransfer.files].slice(0, 2)) addFile(file);
  });
  addEventListener("paste", event => {
    const [file] = event.clipboardData?.files || [];
    if (file) { event.preventDefault(); state.q = $("query").value; addFile(file); }
  });
  addEventListener("keydown", event => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName) || $("login").open;
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && state.view === "search") { event.preventDefault(); $("query").focus(); $("query").select(); }
  });
  addEventListener("popstate", open);
  listenToMap();
}

async function open() {
  readLink();
  show();
  if (state.view === "map") { await showMap(false); return; }
  await nameParts();
  await search({ push: false });
}

listen();
learn().then(open, error => say(error.message, true));
if (!new URLSearchParams(location.search).size) $("query").focus();
