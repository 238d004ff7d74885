// The page of `dualtoken serve`: one photo in, what the model sees in it out. No library, nothing from elsewhere.
const find = (id) => document.getElementById(id);
const [model, key, drop, file, photo] = ["model", "key", "drop", "file", "photo"].map(find);
let last = null; // the photo shown, so that another model can be asked about it
let listed = {}; // task and weights of each model, by name and version
let asked = 0; // counts questions: an answer that is overtaken by a newer question is dropped

function headers() {
  return key.value ? { "X-API-Key": key.value } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  const data = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (answer.status === 401) find("key-field").hidden = false;
  if (!answer.ok) throw new Error(data.error ?? `the server answered ${answer.status}`);
  return data;
}

function say(text) {
  find("error").textContent = text;
  find("error").hidden = !text;
}

async function listModels() {
  try {
    const { models } = await ask("/v2/models");
    const chosen = model.value;
    listed = Object.fromEntries(models.map((one) => [`${one.name}:${one.version}`, one]));
    model.replaceChildren(...Object.keys(listed).map((name) => new Option(name, name)));
    if (chosen in listed) model.value = chosen;
    warn(listed[model.value]);
    find("state").textContent = `${model.options.length} model${model.options.length === 1 ? "" : "s"} ready`;
    say("");
  } catch (error) {
    find("state").textContent = "The models could not be listed";
    say(error.message);
  }
}

function warn(of) {
  find("random").hidden = of?.weights !== "random";
}

const percent = (share) => `${(share * 100).toFixed(1)} %`;
const short = (value) => (value === null ? "not finite" : Number(value.toPrecision(4)).toString());

// Of each task: the heading, and what an answer is in words: its name, its value, and its share of the bar.
const WORDS = {
  classify: ["Most likely", (one) => [one.label, percent(one.probability), one.probability]],
  detect: [
    "Objects",
    (one) => [
      one.label,
      `${percent(one.score)} at ${one.box.map(Math.round).join(", ")}${one.mask_pixels === null ? "" : `, ${one.mask_pixels} pixels`}`,
      one.score,
    ],
  ],
  segment: ["Areas", (one) => [one.label, `${percent(one.share)} of the picture`, one.share]],
  embed: [
    "Embedding",
    (one) => [`${one.values.length} values, norm ${short(one.norm)}`, `${one.values.slice(0, 6).map(short).join(", ")}${one.values.length > 6 ? ", \u2026" : ""}`],
  ],
  tensors: [
    "Outputs",
    (one) => [`${one.name}, ${one.dtype} ${one.shape.join("x")}`, `${short(one.minimum)} to ${short(one.maximum)}, mean ${short(one.mean)}`],
  ],
};

// The colour of a class as `dualtoken predict --output` paints it: HSV with the golden ratio's part of the circle.
function colour(index) {
  const [hue, saturation, value] = [((index * 0.618034) % 1) * 6, 0.85, 0.95];
  const channel = (n) => {
    const k = (n + hue) % 6;
    return Math.round(255 * (value - value * saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return `rgb(${channel(5)} ${channel(3)} ${channel(1)})`;
}

function row([name, value, share], painted) {
  const item = document.createElement("li");
  const line = document.createElement("div");
  line.className = "name";
  line.append(document.createElement("span"), document.createElement("span"));
  if (painted !== undefined) {
    line.firstChild.className = "painted";
    line.firstChild.style.setProperty("--class", colour(painted));
  }
  line.firstChild.textContent = name;
  line.lastChild.textContent = value;
  item.append(line);
  if (share !== undefined) {
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = share;
    bar.setAttribute("aria-label", `${name}: ${value}`);
    item.append(bar);
  }
  return item;
}

// Boxes (x1, y1, x2, y2) in the picture's pixels, over the photo, which the browser scales; the best one on top.
function draw(objects, [height, width]) {
  const over = find("boxes");
  over.setAttribute("viewBox", `0 0 ${width} ${height}`);
  over.setAttribute("preserveAspectRatio", "none");
  over.replaceChildren(
    ...[...objects].reverse().map(({ box: [left, top, right, bottom], index }) => {
      const rect = document.createElementNS(over.namespaceURI, "rect");
      const sides = { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) };
      for (const [key, value] of Object.entries(sides)) rect.setAttribute(key, value);
      rect.style.stroke = colour(index);
      return rect;
    }),
  );
  over.toggleAttribute("hidden", !objects.length);
}

// Masks and areas: a picture of the server's, which the browser scales over the photo.
function lay(source) {
  find("areas").hidden = !source;
  if (source) find("areas").src = source;
  else find("areas").removeAttribute("src");
}

function show(result, elapsed) {
  const [heading, words] = WORDS[result.task] ?? [result.task, (one) => [JSON.stringify(one), ""]];
  find("what").textContent = heading;
  const painted = result.overlay || result.predictions.some((one) => one.box);
  find("classes").replaceChildren(...result.predictions.map((one) => row(words(one), painted ? one.index : undefined)));
  find("nothing").hidden = result.predictions.length > 0;
  draw(result.predictions.filter((one) => one.box), result.size);
  lay(result.overlay);
  warn(result);
  const { bundle, timing_ms: time } = result;
  const facts = [
    ["Answered by", `${result.model_name}:${result.model_version}`],
    ["Bundle", `${bundle.variant}, ${bundle.target}, ${bundle.precision}, weights: ${bundle.weights}`],
    ["Latency", `${elapsed.toFixed(1)} ms here; at the server ${time.total.toFixed(1)} ms`],
    ["Of which", `decoding ${time.decode.toFixed(1)} ms, waiting ${time.queue.toFixed(1)} ms, inference ${time.inference.toFixed(1)} ms`],
  ];
  find("facts").replaceChildren(
    ...facts.flatMap(([name, value]) => {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, text.textContent] = [name, value];
      return [term, text];
    }),
  );
}

async function classify(picture) {
  if (!picture) return;
  last = picture;
  const mine = ++asked;
  const result = find("result");
  say("");
  URL.revokeObjectURL(photo.src);
  photo.src = URL.createObjectURL(picture);
  photo.alt = `The photo: ${picture.name ?? "pasted"}`;
  photo.hidden = false;
  draw([], [1, 1]);
  lay(null);
  find("drop-text").textContent = "Another one? Drop, paste or choose it";
  result.setAttribute("aria-busy", "true");
  find("busy").hidden = false;
  try {
    const started = performance.now();
    const name = model.value.split(":").map(encodeURIComponent);
    const path = `/v2/models/${name[0]}/versions/${name[1]}/classify?top=5&overlay=true`;
    const data = await ask(path, { method: "POST", body: picture, headers: { "Content-Type": "application/octet-stream" } });
    if (mine !== asked) return;
    show(data, performance.now() - started);
    result.hidden = false;
  } catch (error) {
    if (mine !== asked) return;
    result.hidden = true;
    say(error.message);
  }
  result.setAttribute("aria-busy", "false");
  find("busy").hidden = true;
}

// A small photo is shown larger, so that what is drawn over it can be seen.
photo.addEventListener("load", () => {
  const grown = Math.min(240 / photo.naturalWidth, 280 / photo.naturalHeight);
  if (grown > 1) photo.width = Math.round(photo.naturalWidth * grown);
  else photo.removeAttribute("width");
});
drop.addEventListener("click", (event) => event.target !== file && file.click());
drop.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  file.click();
});
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); classify(event.dataTransfer.files[0]); });
document.addEventListener("paste", (event) => classify(event.clipboardData.files[0]));
file.addEventListener("change", () => { classify(file.files[0]); file.value = ""; });
model.addEventListener("change", () => {
  warn(listed[model.value]);
  classify(last);
});
key.addEventListener("change", listModels);
listModels();
