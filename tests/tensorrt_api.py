"""The recorded API of real TensorRT bindings, and a checker that holds our own source against it by parsing.

`tests/data/tensorrt_api/*.json` were read from the bindings' own docstrings: {"version", "api": {name: entry}} with the
entries {"enum": [...]}, {"members": {name: [signatures] | "property" | "attribute"}}, {"function": [signatures]}.
"""

from __future__ import annotations

import ast
import io
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dualtoken_deploy.targets.nvidia import binding
from dualtoken_deploy.targets.nvidia.binding import load_library

DATA = Path(__file__).parent / "data" / "tensorrt_api"
VERSIONS = ("10.3.0", "10.16.1", "11.4.0")


@dataclass(frozen=True)
class Signature:
    """One overload. The `required` parameters have no default; self is not among them."""

    parameters: tuple[str, ...]
    required: tuple[str, ...]
    returns: str

    def accepts(self, positional: int, keywords: tuple[str, ...]) -> bool:
        if positional > len(self.parameters) or not set(keywords) <= set(self.parameters[positional:]):
            return False
        given = set(self.parameters[:positional]) | set(keywords)
        return set(self.required) <= given


@dataclass(frozen=True)
class Api:
    version: str
    names: dict[str, dict[str, Any]]

    def enum(self, name: str) -> list[str] | None:
        return self.names.get(name, {}).get("enum")

    def members(self, name: str) -> dict[str, Any]:
        members: dict[str, Any] = self.names.get(name, {}).get("members", {})
        return members

    def signatures(self, owner: str | None, name: str) -> list[Signature]:
        recorded = self.members(owner).get(name) if owner else self.names[name].get("function")
        return [parse_signature(text) for text in recorded] if isinstance(recorded, list) else []


RTX = "rtx"  # the version that is installed: its API is read from the library itself


@cache
def load_api(version: str) -> Api:
    if version == RTX:
        return record(load_library(binding.RTX))
    data = json.loads((DATA / f"{version}.json").read_text(encoding="utf-8"))
    return Api(data["version"], data["api"])


def record(module: Any) -> Api:
    """The API of an installed library, in the form of the records."""
    names = {name: entry for name in dir(module) if (entry := _entry(getattr(module, name))) and name[0] != "_"}
    return Api(str(module.__version__), names)


def _entry(value: Any) -> dict[str, Any]:
    if hasattr(value, "__members__"):
        return {"enum": sorted(value.__members__)}
    if isinstance(value, type):
        shown = [m for m in dir(value) if m == "__init__" or m[0] != "_"]
        return {"members": {m: _member(getattr(value, m)) for m in shown}}
    return {"function": _signatures(value)} if callable(value) else {}


def _member(value: Any) -> list[str] | str:
    if isinstance(value, property):
        return "property"
    return _signatures(value) or "attribute"


def _signatures(value: Any) -> list[str]:
    """The first lines of pybind11's docstring: one, or one for each overload."""
    lines = (getattr(value, "__doc__", None) or "").splitlines()
    found = [line.strip() for line in lines if re.match(r"(\d+\. )?\w+\(.*\) -> ", line)]
    plain = [re.sub(r"[\w.]*tensorrt(?:_rtx)?(?:_bindings)?\.(?:tensorrt(?:_rtx)?\.)?", "", line) for line in found]
    overloads = [line for line in plain if line[0].isdecimal()]
    return overloads or [line for line in plain if "*args" not in line][:1]


def parse_signature(text: str) -> Signature:
    """From "2. f(self: C, x: int = <E.A: 0>, y: list[int]) -> ns::Other", which is not quite Python's grammar."""
    inside, _, returns = text.partition("(")[2].rpartition(" -> ")
    bracketed = r"\[(?:[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])*\]"
    parts = re.findall(rf"(?:[^,\[\]]|{bracketed})+", inside.rstrip().removesuffix(")"))
    named = [(part.partition(":")[0].strip(), "=" in part) for part in parts if part.strip()]
    own = [(name, optional) for name, optional in named if name != "self"]
    return Signature(
        parameters=tuple(name for name, _ in own),
        required=tuple(name for name, optional in own if not optional),
        returns=re.split(r"::|\.", returns)[-1].strip(),
    )


@dataclass(frozen=True)
class Kind:
    """What an expression is: "module", "class" (or enum), "instance", "method" (of either), "function"."""

    what: str
    name: str = ""
    member: str = ""


@dataclass
class Checker:
    """Walks one module. `problems` has a line for each use that the API lacks, `uses` each name that was looked up."""

    api: Api
    problems: list[str] = field(default_factory=list)
    uses: set[str] = field(default_factory=set)

    def check(self, source: str) -> Checker:
        self._walk(ast.parse(source).body, {})
        return self

    def _walk(self, body: list[ast.stmt], env: dict[str, Kind]) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                self._class(statement, dict(env))
            elif isinstance(statement, ast.FunctionDef):
                self._function(statement, dict(env))
            else:
                self._statement(statement, env)

    def _class(self, node: ast.ClassDef, env: dict[str, Kind]) -> None:
        for inner in ast.walk(node):  # annotated attributes are known in every method
            if isinstance(inner, ast.AnnAssign) and (kind := self._annotation(inner.annotation)):
                env[ast.unparse(inner.target)] = kind
        for base in node.bases:
            kind = self._infer(base, env)
            if kind and kind.what == "class":
                self._overrides(node, kind.name)
        self._walk(node.body, env)

    def _overrides(self, node: ast.ClassDef, base: str) -> None:
        """A subclass must take what the library calls it with."""
        own = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}
        for name, recorded in self.api.members(base).items():
            if not isinstance(recorded, list) or name == "__init__":
                continue
            self.uses.add(f"{base}.{name}")
            if name not in own:
                self.problems.append(f"line {node.lineno}: {node.name} lacks {base}.{name}")
            elif [a.arg for a in own[name].args.args[1:]] != list(parse_signature(recorded[0]).parameters):
                self.problems.append(f"line {node.lineno}: {node.name}.{name} has other parameters than {recorded[0]}")

    def _function(self, node: ast.FunctionDef, env: dict[str, Kind]) -> None:
        for argument in (*node.args.args, *node.args.kwonlyargs):
            env.pop(argument.arg, None)
            if argument.annotation and (kind := self._annotation(argument.annotation)):
                env[argument.arg] = kind
        self._walk(node.body, env)

    def _statement(self, node: ast.stmt, env: dict[str, Kind]) -> None:
        """Assignments give names a kind; every expression below is looked at; blocks are walked in their order."""
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        handlers = [h.body for h in getattr(node, "handlers", [])]
        inside = {id(s) for block in (*blocks, *handlers) for s in block}
        for child in ast.iter_child_nodes(node):
            if id(child) not in inside and not isinstance(child, ast.ExceptHandler):
                self._expressions(child, env)
        if isinstance(node, ast.AnnAssign):
            kind = self._annotation(node.annotation) or (node.value and self._infer(node.value, env))
            self._bind(node.target, kind or None, env)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, self._infer(node.value, env), env)
        for block in (*blocks, *handlers):
            self._walk(block, env)

    def _bind(self, target: ast.expr, kind: Kind | None, env: dict[str, Kind]) -> None:
        if isinstance(target, ast.Name) and kind:
            env[target.id] = kind

    def _expressions(self, node: ast.AST, env: dict[str, Kind]) -> None:
        if isinstance(node, ast.Call | ast.Attribute):
            self._infer(node, env)
            return
        for child in ast.iter_child_nodes(node):
            self._expressions(child, env)

    def _annotation(self, node: ast.expr) -> Kind | None:
        """`tensorrt.Name` in an annotation; a nested name (tensorrt.ILogger.Severity) is the class's attribute."""
        text = ast.unparse(node)
        if not text.startswith("tensorrt."):
            return None
        name, _, member = text.removeprefix("tensorrt.").partition(".")
        self._lookup(name, node)
        if member:
            self._lookup_member(name, member, node)
            return None
        return Kind("instance", name)

    def _infer(self, node: ast.expr, env: dict[str, Kind]) -> Kind | None:
        if isinstance(node, ast.Name):
            return Kind("module") if node.id == "trt" else env.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, env)
        if isinstance(node, ast.Call):
            return self._call(node, env)
        self._expressions(node, env)
        return None

    def _attribute(self, node: ast.Attribute, env: dict[str, Kind]) -> Kind | None:
        text = ast.unparse(node)
        if text == "self._trt":
            return Kind("module")
        if text in env:
            return env[text]
        base = self._infer(node.value, env)
        if base is None:
            return None
        if base.what == "module":
            return None if node.attr == "__version__" else self._lookup(node.attr, node)
        if base.what in ("class", "instance"):
            return self._lookup_member(base.name, node.attr, node)
        return None

    def _lookup(self, name: str, node: ast.AST) -> Kind | None:
        self.uses.add(name)
        entry = self.api.names.get(name)
        if entry is None:
            self.problems.append(f"line {getattr(node, 'lineno', 0)}: tensorrt {self.api.version} has no {name}")
            return None
        return Kind("function" if "function" in entry else "class", name)

    def _lookup_member(self, owner: str, name: str, node: ast.AST) -> Kind | None:
        self.uses.add(f"{owner}.{name}")
        enum = self.api.enum(owner)
        if enum is not None and name == "__members__":  # every enum of the bindings has them
            return None
        known = name in enum if enum is not None else name in self.api.members(owner)
        if not known:
            line = getattr(node, "lineno", 0)
            self.problems.append(f"line {line}: tensorrt {self.api.version} has no {owner}.{name}")
            return None
        return Kind("method", owner, name) if isinstance(self.api.members(owner).get(name), list) else None

    def _call(self, node: ast.Call, env: dict[str, Kind]) -> Kind | None:
        for argument in (*node.args, *(k.value for k in node.keywords)):
            self._expressions(argument, env)
        kind = self._infer(node.func, env)
        if kind is None:
            self._unknown(node)
            return None
        if kind.what == "class":
            self._bind_call(node, self.api.signatures(kind.name, "__init__"), f"{kind.name}()")
            return Kind("instance", kind.name)
        owner, name = (kind.name, kind.member) if kind.what == "method" else (None, kind.name)
        signatures = self.api.signatures(owner, name)
        of_class = kind.what == "method" and name == "__init__"  # Base.__init__(self): self is written out
        fitting = self._bind_call(node, signatures, f"{owner}.{name}", skip=int(of_class))
        result = fitting.returns if fitting else None
        return Kind("instance", result) if result in self.api.names else None

    def _bind_call(self, node: ast.Call, signatures: list[Signature], what: str, skip: int = 0) -> Signature | None:
        keywords = tuple(k.arg or "**" for k in node.keywords)
        for signature in signatures:
            if signature.accepts(len(node.args) - skip, keywords):
                return signature
        given = f"{len(node.args) - skip} positional, {', '.join(keywords) or 'no'} keywords"
        self.problems.append(f"line {node.lineno}: {what} of tensorrt {self.api.version} does not take {given}")
        return None

    def _unknown(self, node: ast.Call) -> None:
        """A call of a TensorRT method on something of unknown class escapes the check: it must be annotated."""
        if isinstance(node.func, ast.Attribute) and node.func.attr in method_names():
            self.problems.append(f"line {node.lineno}: annotate the object of .{node.func.attr}() with its class")


@cache
def method_names() -> frozenset[str]:
    """Names of all recorded methods, of all versions and libraries, but those that Python's own objects have too."""
    names = {
        name
        for version in (*VERSIONS, RTX)
        for entry in load_api(version).names.values()
        for name, recorded in entry.get("members", {}).items()
        if isinstance(recorded, list) and not name.startswith("__")
    }
    builtin = {name for kind in (list, dict, str, bytes, set, tuple, io.BufferedReader) for name in dir(kind)}
    return frozenset(names - builtin)
