// The page of `dualtoken serve`: one photo in, the five likeliest classes out. No library, nothing from elsewhere.
const find = (id) => document.getElementById(id);
const [model, key, drop, file, photo] = ["model", "key", "drop", "file", "photo"].map(find);
let last = null; // the photo shown, so that another model can be asked about it
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
    const names = models.flatMap((one) => one.versions.map((version) => `${one.name}:${version}`));
    model.replaceChildren(...[...new Set(names)].map((name) => new Option(name, name)));
    if (names.includes(chosen)) model.value = chosen;
    find("state").textContent = `${model.options.length} model${model.options.length === 1 ? "" : "s"} ready`;
    say("");
  } catch (error) {
    find("state").textContent = "The models could not be listed";
    say(error.message);
  }
}

function row(prediction) {
  const item = document.createElement("li");
  const share = `${(prediction.probability * 100).toFixed(1)} %`;
  const line = document.createElement("div");
  line.className = "name";
  line.append(document.createElement("span"), document.createElement("span"));
  line.firstChild.textContent = prediction.label;
  line.lastChild.textContent = share;
  const bar = document.createElement("progress");
  bar.max = 1;
  bar.value = prediction.probability;
  bar.setAttribute("aria-label", `${prediction.label}: ${share}`);
  item.append(line, bar);
  return item;
}

function show(result, elapsed) {
  find("classes").replaceChildren(...result.predictions.map(row));
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
  find("drop-text").textContent = "Another one? Drop, paste or choose it";
  result.setAttribute("aria-busy", "true");
  try {
    const started = performance.now();
    const name = model.value.split(":").map(encodeURIComponent);
    const path = `/v2/models/${name[0]}/versions/${name[1]}/classify?top=5`;
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
}

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
model.addEventListener("change", () => classify(last));
key.addEventListener("change", listModels);
listModels();
