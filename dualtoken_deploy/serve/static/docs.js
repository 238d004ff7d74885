// Lists what /openapi.json says, without a library.
const find = (id) => document.getElementById(id);
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

const api = await (await fetch("/openapi.json")).json();
find("title").textContent = `${api.info.title} ${api.info.version}`;
find("about").textContent = api.info.description;
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const head = make("h3", "");
    head.append(make("code", `${method.toUpperCase()} ${path}`));
    const codes = Object.entries(operation.responses).map(([code, one]) => `${code}: ${one.description}`);
    const parts = [head, make("p", operation.summary), make("p", codes.join("; "))];
    const example = operation.requestBody?.content?.["application/json"]?.example;
    if (example) parts.push(make("pre", JSON.stringify(example, null, 2)));
    find("paths").append(...parts);
  }
}
