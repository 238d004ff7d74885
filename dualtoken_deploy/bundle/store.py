"""A bundle: the folder that an app developer takes away. Reads, writes and verifies it; knows no target.

<bundle>/
  model.onnx | model.xml + model.bin | ...   the raw artifact, loadable by the vendor's own tools
  manifest.json                              what it is, how it was made and how well it does
  golden.npz                                 an input and the eager logits for it: a self-test for any device
  labels.txt                                 one class name a line
  README.md, bom.cdx.json                    the manifest as a model card and as a bill of materials
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.consistency import check, count_classes
from dualtoken_deploy.bundle.golden import MAX_FILE_BYTES, read_golden
from dualtoken_deploy.bundle.labels import format_labels, parse_labels
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.trust import remember
from dualtoken_deploy.errors import BundleError, InputError, OutputError, UsageError
from dualtoken_deploy.files import is_file, is_folder, read_bytes
from dualtoken_deploy.staging import clear_abandoned, staged_folder, swap

MANIFEST, GOLDEN, LABELS = "manifest.json", "golden.npz", "labels.txt"
CARD, BOM = "README.md", "bom.cdx.json"
DOCUMENTS = (CARD, BOM)  # made of the manifest: they ship with no app, and may be made again
ARTIFACT, SIGNATURE = "model.", "model.sig"  # what every artifact's name begins with, and what signs it from beside
MAX_MANIFEST, MAX_LABELS = 64 << 20, 16 << 20  # bytes; the longest search of this project makes 0.1 MiB
Describe = Callable[["Bundle"], Mapping[str, bytes]]  # the documents of a bundle whose other files are there
AGAIN = "copy the bundle anew or export it again"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Opens a bundle and, unless told not to, verifies the hash of every file.

        Raises BundleError on a missing file, a changed byte, a manifest that cannot be read or a newer schema.
        """
        folder = Path(path)
        if is_file(folder):
            inside = (folder.parent / MANIFEST).is_file()
            what = f"give its folder, {folder.parent}" if inside else f"give a folder with a {MANIFEST} in it"
            raise BundleError(f"{folder} is a file, and a bundle is a folder; {what}")
        if not is_folder(folder):
            raise BundleError(
                f"no bundle at {folder}; make one with: dualtoken export --variant t-mix --weights digits "
                f"--target onnxruntime --output {shlex.quote(str(folder))}"
            )
        file = folder / MANIFEST
        if not os.path.lexists(file):
            raise BundleError(f"{folder} has no {MANIFEST}, so it is not a bundle; export one first")
        manifest = Manifest.parse(read_bytes(file, MAX_MANIFEST, BundleError, "copy the bundle anew"), str(file))
        check(manifest, str(file))
        bundle = Bundle(folder, manifest)
        if verify:
            bundle.verify()
        return bundle

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def size_bytes(self) -> int:
        """Size of the artifact itself: what an app ships besides manifest, golden, labels and documents. Where a build
        came after the export, that is what `ships` of the build names."""
        build, beside = self.manifest.build, (GOLDEN, LABELS, *DOCUMENTS)
        names = (build and build.ships) or [name for name in self.manifest.files if name not in beside]
        return sum(_size(self.path / name) for name in names)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """One name a class. Raises BundleError where they are unreadable or not as many as the model's classes."""
        file = self.path / LABELS
        try:
            names = parse_labels(read_bytes(file, MAX_LABELS, BundleError, AGAIN))
        except UnicodeDecodeError as error:
            raise BundleError(f"{file} is no UTF-8 text ({error.reason}); {AGAIN}") from error
        classes = count_classes(self.manifest)
        if classes not in (None, len(names)):
            raise BundleError(f"{file} has {len(names)} names for {classes} classes; {AGAIN}")
        return names

    @cached_property
    def golden(self) -> dict[str, NDArray[Any]]:
        """`input`: what to feed, in the contract's own form. `logits`: eager float32 logits for it; of a dense bundle
        its outputs by name, the large ones thinned (`dense_outputs.thin`)."""
        file, manifest = self.path / GOLDEN, self.manifest
        data = read_bytes(file, MAX_FILE_BYTES, BundleError, AGAIN)
        return read_golden(data, str(file), manifest.input.tensor, manifest.outputs)

    def verify(self, but: tuple[str, ...] = ()) -> None:
        """Looks at every file, `but` for those. Raises BundleError on the first that is missing, is none of its own (a
        link out of the folder, a pipe) or whose sha256 is not the manifest's, on a model that the manifest does not
        name, and on labels of another count than the model's classes."""
        try:
            self._verify(but)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read ({error.strerror or error}); {AGAIN}") from error
        _ = self.labels

    def _verify(self, but: tuple[str, ...]) -> None:
        files = self.manifest.files
        lying = [p.name for p in sorted(self.path.iterdir()) if p.name.startswith(ARTIFACT) and p.name != SIGNATURE]
        if strange := [name for name in lying if name not in files]:
            raise BundleError(f"{self.path} has {strange[0]}, which {MANIFEST} does not name; {AGAIN}")
        named = {GOLDEN: GOLDEN in files, LABELS: LABELS in files}
        named["model file"] = any(name.startswith(ARTIFACT) for name in files)
        for part, is_named in named.items():
            if not is_named:
                raise BundleError(f"{self.path / MANIFEST} names no {part}; {AGAIN}")
        for name, expected in files.items():
            if name in but:
                continue
            file = self.path / name
            if not file.exists():
                raise BundleError(f"{self.path} lacks {name}; copy the whole folder or export it again")
            check_inside(file, self.path)
            if sha256(file) != expected:
                raise BundleError(
                    f"{file} is not the file that was exported (sha256 differs from manifest.json); "
                    "copy it anew or export it again"
                )


def write_bundle(
    folder: Path,
    manifest: Manifest,
    golden: Mapping[str, NDArray[Any]],
    labels: tuple[str, ...],
    describe: Describe | None = None,
) -> Manifest:
    """Adds golden, labels, documents and manifest to the artifact files that lie in `folder`; returns the manifest with
    hashes.

    Raises InputError on a label that would not come back as it is.
    """
    with (folder / GOLDEN).open("wb") as out:
        np.savez_compressed(out, **golden)  # type: ignore[arg-type]  # numpy's stub mixes the arrays with allow_pickle
    (folder / LABELS).write_bytes(format_labels(labels))
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name not in (MANIFEST, *DOCUMENTS)}
    complete = write_manifest(folder, replace(manifest, files=files), describe)
    if complete.build is not None or (complete.origin is not None and complete.origin.kind == "reference"):
        remember(Manifest.parse((folder / MANIFEST).read_bytes()))
    return complete


def write_manifest(folder: Path, manifest: Manifest, describe: Describe | None) -> Manifest:
    """Adds the documents, which are made of the manifest, and it itself; returns it with their hashes."""
    try:
        documents = {} if describe is None else describe(Bundle(folder, manifest))
        for name, data in documents.items():
            (folder / name).write_bytes(data)
        complete = replace(manifest, files={**manifest.files, **{name: sha256(folder / name) for name in documents}})
        text = json.dumps(complete.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_bytes(f"{text}\n".encode())
    except UnicodeEncodeError as error:  # of a path in bytes that are no text
        raise InputError(
            f"a manifest is UTF-8 and cannot say {error.object[error.start - 20 : error.end]!r}"
        ) from error
    return complete


@contextmanager
def new_folder(output: Path, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `output` that takes its name when the block ends well, and goes otherwise.

    Raises UsageError when `output` exists and `force` is not given, OutputError when it cannot be written (read-only,
    no space). An `output` that is replaced stays whole until the new folder is; only a bundle is ever replaced.
    """
    output = Path(os.path.abspath(output))
    made: list[Path] = []
    clear_abandoned(output)  # first: it may give back what a killed process had put aside
    try:
        _check_free(output, force)
        made = [parent for parent in output.parents if not parent.exists()]  # the innermost first
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = staged_folder(output)
        temporary = staging.__enter__()
    except OSError as error:
        _remove_empty(made)
        raise OutputError(f"cannot write {output}: {error.strerror or error}; choose another --output") from error
    try:
        with ExitStack() as stack:
            stack.push(staging)
            yield temporary
            _check_free(output, force)  # again: an export takes long enough for another to have made it
            swap(temporary, output)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}; nothing was left there") from error
    finally:
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that were made on the way to one that did not come to be; those with something in them stay."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _check_free(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise UsageError(f"{output} exists; give --force to replace it, or another --output")
    if not output.is_dir() or (any(output.iterdir()) and not _looks_like_a_bundle(output)):
        raise UsageError(
            f"{output} exists and is not a bundle, so --force does not replace it; choose another --output"
        )


def _looks_like_a_bundle(folder: Path) -> bool:
    """A manifest.json of ours, whole or not of this version; a web application's has the same name."""
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema_version", "target", "files"} <= data.keys()


def sha256(path: Path) -> str:
    """Hex digest of a file, or of a folder's relative names and contents in sorted order."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as data:
            while chunk := data.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def check_inside(file: Path, folder: Path) -> None:
    """Raises BundleError where a part of a bundle, or anything in it, is a link out of the folder or neither a regular
    file nor a folder: a pipe would be waited for, and a link reads what was never copied."""
    root = folder.resolve()
    inner = file.rglob("*") if file.is_dir() else ()
    for place in (file, *inner):
        if not place.resolve().is_relative_to(root):
            raise BundleError(f"{place} is a link out of the bundle; {AGAIN}")
        if not (place.is_file() or place.is_dir()):
            raise BundleError(f"{place} is no regular file; {AGAIN}")
