"""The steps of a recipe: planned before the first file is touched, skipped where their hash says that they are done."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from dualtoken_deploy.bundle.manifest import COMPLETE
from dualtoken_deploy.bundle.signature import sign
from dualtoken_deploy.bundle.store import MANIFEST, Bundle, sha256
from dualtoken_deploy.errors import DualTokenError, InputError, MissingError
from dualtoken_deploy.files import read_bytes, write_atomically
from dualtoken_deploy.machine import library_versions
from dualtoken_deploy.models.count import count_params
from dualtoken_deploy.models.user_code import split_reference
from dualtoken_deploy.pipeline.export import Model, open_source
from dualtoken_deploy.pipeline.make import make
from dualtoken_deploy.pipeline.plan import DYNAMIC, Plan, default_name, plan
from dualtoken_deploy.prove.contents import document
from dualtoken_deploy.prove.measure import Report, Setting, measure, subject_of
from dualtoken_deploy.prove.render import html, markdown
from dualtoken_deploy.prove.subjects import look
from dualtoken_deploy.prove.tolerances import Tolerances
from dualtoken_deploy.prove.verify import check_same, compare
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.recipe.file import Recipe
from dualtoken_deploy.remote.devices import Device, find_device
from dualtoken_deploy.remote.timed import bench_there
from dualtoken_deploy.targets.precision import NO_CALIBRATION
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.use.validate import gate, validate

Tell = Callable[[str], None]
RECORD = ".dualtoken-run.json"  # in the folder of the bundles: what was done, by the hash of what it was done from
MAX_RECORD = 16 << 20
DONE, SKIPPED, TO_DO, FAILED, LEFT_OUT = "done", "skipped", "to do", "failed", "left out"
LIBRARIES = ("dualtoken-deploy", "torch", "numpy", "onnx", "onnxscript", "onnxsim", "onnx-ir")


@dataclass(frozen=True)
class Step:
    """One thing to do with one bundle ("all": with all of them; "on DEVICE": with all of them there). `key` hashes what
    it is done from; `run` does it."""

    name: str
    bundle: str
    key: str
    run: Callable[[Tell], None]
    output: Path | None = None  # a bundle's folder, or a file, that must be there for the step to be done
    needs: tuple[str, ...] = ()  # bundles whose export must not have failed
    mib: float | None = None


@dataclass
class Result:
    """What became of a step. `seconds` of an earlier run where it was skipped."""

    step: str
    bundle: str
    state: str
    seconds: float | None = None
    error: DualTokenError | None = None

    def to_json(self) -> dict[str, Any]:
        error = None if self.error is None else {"code": self.error.exit_code, "message": str(self.error)}
        return {**vars(self), "error": error}


class Kitchen:
    """A recipe with its folder, planned: everything that can be wrong with names and values is said by this."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.output = folder / recipe.output
        self.model = self._model()
        self.source = open_source(self.model)
        self.devices = [find_device(name) for name in dict.fromkeys(recipe.devices.names if recipe.devices else ())]
        self.plans = list(self._plans())
        names = [p.output.name for p in self.plans]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"the recipe makes {doubled} twice; leave one of its exports out")
        self.record = _read_record(self.output / RECORD)

    def _path(self, text: str | None) -> str | None:
        """A path from the recipe's folder, or a word that names no file there."""
        return str(self.folder / text) if text is not None and (self.folder / text).exists() else text

    def _model(self) -> Model:
        said = self.recipe.model
        code = said.model
        if code is not None and code.partition(":")[0].endswith(".py"):
            code = str(self.folder / code)
        return Model(
            said.variant or code, self._path(said.weights), self._path(said.labels), said.image_size, said.seed,
            said.head, said.classes, said.width, said.suppress, said.argmax, said.task, said.arguments,
            said.output_names, said.preprocess, said.options, said.licenses,
        )  # fmt: skip

    def _plans(self) -> Iterator[Plan]:
        for table in self.recipe.export:
            for target in table.targets:
                for precision in table.precisions:
                    row = get_target(target)
                    calibrated = row.precision(precision).calibration != NO_CALIBRATION
                    int8 = None
                    if calibrated and table.int8 is not None:
                        said = msgspec.structs.asdict(table.int8)
                        said["calibration"] = self._path(table.int8.calibration)
                        int8 = Int8Options(**said)
                    yield plan(
                        self.source, row.name, precision,
                        self.output / default_name(self.source, row.name, precision, table.settings),
                        table.batch, self.recipe.model.image_size == DYNAMIC, table.input, table.opset, table.device,
                        True, int8, dict(table.settings), "dualtoken run",
                    )  # fmt: skip

    def steps(self) -> list[Step]:
        """In the order in which they are done."""
        found: list[Step] = []
        size = self._asks_for()
        for one in self.plans:
            name, key = one.output.name, self._export_key(one)
            found.append(
                Step("export", name, key, lambda tell, one=one: _export(one, tell), one.output, mib=size)  # type: ignore[misc]
            )
        for step_name, table, run in (
            ("gates", self.recipe.gates, self._gate),
            ("verify", self.recipe.verify, self._verify),
        ):
            if table is not None:
                for export in found[: len(self.plans)]:
                    key = _digest(export.key, table, self._files(step_name, export.bundle))
                    found.append(
                        Step(step_name, export.bundle, key, lambda tell, run=run, at=export.output: run(at, tell),  # type: ignore[misc]
                             needs=(export.bundle,))
                    )  # fmt: skip
        found += self._closing(found[: len(self.plans)])
        return found

    def _closing(self, exports: list[Step]) -> Iterator[Step]:
        keys = tuple(e.key for e in exports)
        for device in self.devices:
            assert self.recipe.devices is not None  # noqa: S101 (it names them)
            file = self.folder / self.recipe.devices.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', device.name)}.json"
            digest = _digest(keys, self.recipe.devices, device.url)
            yield Step("bench", f"on {device.name}", digest, partial(self._bench, device, file), file)
        if self.recipe.sign is not None:
            key = self.folder / self.recipe.sign.key
            for e in exports:
                digest = _digest(e.key, self.recipe.sign, _hash(key))
                folder = self.output / e.bundle
                yield Step(
                    "sign", e.bundle, digest, lambda _, at=folder: _sign(at, key),  # type: ignore[misc]
                    folder / "model.sig", (e.bundle,),
                )  # fmt: skip
        if self.recipe.report is not None:
            page = self.recipe.report.html or self.recipe.report.markdown
            where = None if page is None else self.folder / page
            yield Step("report", "all", _digest(keys, self.recipe.report), self._report, where)

    def _asks_for(self) -> float:
        """What export asks of the disk for itself before it begins, in MiB, for one bundle."""
        return (4 * count_params(self.source.make()) * 5 / 4 + (8 << 20)) / 2**20

    def _export_key(self, one: Plan) -> str:
        said, code = self.recipe.model, self.recipe.model.model
        files = [_hash(Path(p)) for p in (self._path(said.weights), self._path(said.labels)) if p and Path(p).exists()]
        if code is not None:
            file, _ = split_reference(str(self.folder / code) if ".py:" in code else code)
            files.append(_hash(Path(file)) if Path(file).is_file() else file)
        data = None if one.int8 is None else Path(one.int8.calibration)
        if data is not None and data.is_dir():
            files.append(_hash_folder(data))
        libraries = library_versions((*LIBRARIES, *one.target.libraries))
        own = (one.target.name, one.precision.name, one.contract, one.opset, dict(one.settings), one.device, one.int8)
        return _digest(said, own, files, libraries)

    def _files(self, step: str, bundle: str) -> list[str]:
        """Hashes of what a check is held against, so that another baseline or set is another check."""
        paths: list[Path] = []
        if step == "verify" and self.recipe.verify is not None:
            paths = [self.folder / self.recipe.verify.baselines / f"{bundle}.json"]
            if self.recipe.verify.tolerances is not None:
                paths.append(self.folder / self.recipe.verify.tolerances)
        return [_hash(p) for p in paths if p.is_file()]

    def _gate(self, folder: Path, tell: Tell) -> None:
        table = self.recipe.gates
        assert table is not None  # noqa: S101 (the step is there only with its table)
        results = validate([folder], self._path(table.data), table.limit, table.reference, progress=tell)
        names = ("sqnr_db", "agreement", "top1", "ap", "miou")
        gate(results, **{name: getattr(table, name) for name in names})

    def _verify(self, folder: Path, tell: Tell) -> None:
        table = self.recipe.verify
        assert table is not None  # noqa: S101 (as above)
        baseline, bundle = self.folder / table.baselines / f"{folder.name}.json", Bundle.open(folder)
        limits = Tolerances() if table.tolerances is None else Tolerances.read(self.folder / table.tolerances)
        setting = Setting(self._path(table.data), table.limit, rounds=table.rounds, seconds=table.seconds)
        before = Report.read(baseline) if baseline.is_file() else None
        if before is not None:
            check_same(before, subject_of(bundle), str(baseline))
        now = measure(bundle, setting, "dualtoken run", tell)
        if before is None:
            now.write(baseline)
            tell(f"{baseline} is new")
            return
        compare(str(folder), str(baseline), before, now, limits).gate()

    def _bench(self, device: Device, file: Path, tell: Tell) -> None:
        table = self.recipe.devices
        assert table is not None  # noqa: S101 (as above)
        there = [bundle.path for bundle in self._here() if bundle.manifest.state == COMPLETE]
        if not there:
            raise MissingError(f"no bundle of the recipe can run on {device.name}; look at what its export said")
        found = bench_there(device, there, table.rounds, table.seconds, table.threads, tell)
        text = json.dumps(found, indent=1) + "\n"
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))

    def _here(self) -> list[Bundle]:
        return [Bundle.open(p.output) for p in self.plans if (p.output / MANIFEST).is_file()]

    def _report(self, tell: Tell) -> None:
        table = self.recipe.report
        assert table is not None  # noqa: S101 (as above)
        setting = Setting(self._path(table.data), table.limit, rounds=table.rounds, seconds=table.seconds)
        made = document(
            [look(bundle, setting, False, "dualtoken run", tell) for bundle in self._here()],
            datetime.now(UTC).strftime("%Y-%m-%d"),
        )
        for name, render in ((table.html, html), (table.markdown, markdown)):
            if name is not None:
                text = render(made)
                write_atomically(self.folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]

    # --- doing them ---

    def is_done(self, step: Step) -> bool:
        """Whether the record has it from the same things, and what it made is there, whole."""
        noted = self.record.get(f"{step.name} {step.bundle}", {})
        if noted.get("key") != step.key:
            return False
        if step.output is None:
            return True
        if step.name != "export":
            return step.output.is_file()
        try:
            bundle = Bundle.open(step.output)
        except DualTokenError:
            return False
        return bool(noted.get("manifest") == sha256(bundle.path / MANIFEST))

    def cook(
        self, tell: Tell, force: bool = False, already: Mapping[tuple[str, str], Result] = MappingProxyType({})
    ) -> Iterator[Result]:
        """Does what is to be done, one after the other; a bundle that fails takes its own later steps along. `already`:
        by step and bundle what was done elsewhere."""
        failed = {bundle for (_, bundle), result in already.items() if result.error is not None}
        for step in self.steps():
            if (step.name, step.bundle) in already:
                continue
            if failed & set(step.needs):
                yield Result(step.name, step.bundle, LEFT_OUT)
                continue
            if not force and self.is_done(step):
                yield Result(step.name, step.bundle, SKIPPED, self.seconds(step))
                continue
            start = time.perf_counter()
            try:
                step.run(lambda text, step=step: tell(f"{step.name} {step.bundle}: {text}"))  # type: ignore[misc]
            except DualTokenError as error:
                failed.add(step.bundle)
                yield Result(step.name, step.bundle, FAILED, round(time.perf_counter() - start, 1), error)
                continue
            seconds = round(time.perf_counter() - start, 1)
            self.note(step, seconds)
            yield Result(step.name, step.bundle, DONE, seconds)

    def expect(self) -> Iterator[tuple[Step, str, float | None]]:
        """Each step, whether it is done, and the seconds that it took before; nothing is touched."""
        for step in self.steps():
            yield step, DONE if self.is_done(step) else TO_DO, self.seconds(step)

    def step(self, name: str, bundle: str) -> Step:
        """One that there is."""
        return next(step for step in self.steps() if (step.name, step.bundle) == (name, bundle))

    def seconds(self, step: Step) -> float | None:
        """That it took in an earlier run."""
        found: float | None = self.record.get(f"{step.name} {step.bundle}", {}).get("seconds")
        return found

    def note(self, step: Step, seconds: float) -> None:
        """Keeps in the record that a step is done."""
        key = step.key
        if step.name == "verify":  # a baseline that it made is what the next run is held against
            export = self.step("export", step.bundle)
            key = _digest(export.key, self.recipe.verify, self._files("verify", step.bundle))
        noted: dict[str, Any] = {"key": key, "seconds": seconds}
        if step.name == "export" and step.output is not None:
            noted["manifest"] = sha256(step.output / MANIFEST)
        self.record[f"{step.name} {step.bundle}"] = noted
        text = json.dumps(self.record, indent=1) + "\n"
        write_atomically(self.output / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def _export(one: Plan, tell: Tell) -> None:
    result = make(one, tell)
    if result.next_step and result.state != COMPLETE:
        tell(f"{result.state}: {result.next_step}")


def _sign(folder: Path, key: Path) -> None:
    sign(Bundle.open(folder), key)


def _read_record(path: Path) -> dict[str, Any]:
    """Raises InputError on a record that is none: deleting it makes all steps anew."""
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(read_bytes(path, MAX_RECORD, InputError, "delete it"), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InputError(f"{path} is no record of a run ({error}); delete it, and every step is done anew") from error


def _digest(*parts: Any) -> str:
    """Of plain values, structs and dataclasses, in their order."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def _hash(path: Path) -> str:
    return sha256(path)


def _hash_folder(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return _digest([(str(p.relative_to(folder)), sha256(p)) for p in files])
