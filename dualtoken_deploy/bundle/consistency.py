"""A manifest against itself: values that a program may rely on without looking again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from dualtoken_deploy.bundle.blocks import RANDOM
from dualtoken_deploy.bundle.manifest import CLASSIFY, COMPILED, COMPLETE, PREPARED, Manifest
from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.spec import InputContract, TensorSpec

DTYPES = frozenset({"float32", "float16", "float64", "uint8", "int8", "int16", "int32", "int64", "bool"})
KINDS = ("image", "tensor", "series")
MAX_ELEMENTS = 1 << 28  # of one tensor at batch 1: 1 GiB of float32
MAX_SIDE = 1 << 15
RESERVED = frozenset({"variant", "weights", "seed", "replace_head", "head"})  # no option of a variant, but who calls it


def check(manifest: Manifest, what: str) -> None:
    """Raises BundleError, which names `what` and the field, on a value that contradicts another or cannot be."""
    for reason in _reasons(manifest):
        raise BundleError(f"{what} contradicts itself: {reason}; export the bundle again")


def _reasons(manifest: Manifest) -> Iterator[str]:
    yield from _tensors(manifest)
    yield from _contract(manifest.input)
    yield from _model(manifest)
    for row in manifest.products:
        if min(row) < 1 or max(row[0] * row[1] * row[2], row[0] * row[2] * row[3]) > MAX_ELEMENTS:
            yield f"products has {list(row)}"
    if not manifest.files:
        yield "files is empty"
    for name, digest in manifest.files.items():
        if not _plain_name(name):
            yield f"files has the name {name!r}, which is none of a file in the bundle's folder"
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            yield f"files has no sha256 for {name}"
    for name in () if manifest.build is None else manifest.build.ships:
        if not _plain_name(name):
            yield f"build.ships has the name {name!r}, which is none of a file in the bundle's folder"


def _tensors(manifest: Manifest) -> Iterator[str]:
    names = [spec.name for spec in manifest.outputs]
    if not names or len(set(names)) != len(names) or "input" in names:
        yield f"outputs are called {', '.join(names) or 'nothing'}; they need names of their own, and none is input"
    for spec in (manifest.input.tensor, *manifest.outputs):
        sides = [side for side in spec.shape if isinstance(side, int)]
        if spec.dtype not in DTYPES:
            yield f"{spec.name} has the dtype {spec.dtype!r}; known are {', '.join(sorted(DTYPES))}"
        if any(side < 1 for side in sides) or math.prod(sides) > MAX_ELEMENTS or len(spec.shape) > 8:
            yield f"{spec.name} has the shape {list(spec.shape)}"


def _contract(contract: InputContract) -> Iterator[str]:
    tensor, size = contract.tensor, contract.size
    if contract.kind not in KINDS:
        yield f"input.kind is {contract.kind!r}; known are {', '.join(KINDS)}"
    if min(size) < 1 or max(size) > MAX_SIDE or math.prod(size) > MAX_ELEMENTS // 3:
        yield f"input.size is {list(size)}"
    for axis, side in zip("HW", size, strict=True):
        found = _side(tensor, axis)
        if found is not None and found != side:
            yield f"input.size is {list(size)}, the tensor {tensor.name} has {axis} {found}"
    if contract.kind == "image" and (tensor.layout != "NHWC" or len(tensor.shape) != 4 or tensor.shape[3] != 3):
        yield f"an image input has layout NHWC and 3 channels, not {tensor.layout} {list(tensor.shape)}"
    if not 0 < contract.crop_ratio <= 1 or not all(value > 0 for value in contract.std):
        yield f"input.crop_ratio is {contract.crop_ratio} and input.std {list(contract.std)}"


def _side(tensor: TensorSpec, axis: str) -> int | None:
    """The size of the axis with this letter, None where it is open or the layout does not name it."""
    if len(tensor.layout) != len(tensor.shape) or tensor.layout.count(axis) != 1:
        return None
    side = tensor.shape[tensor.layout.index(axis)]
    return side if isinstance(side, int) else None


def _model(manifest: Manifest) -> Iterator[str]:
    if manifest.state not in (COMPLETE, COMPILED, PREPARED):
        yield f"state is {manifest.state!r}; known are {COMPLETE}, {COMPILED}, {PREPARED}"
    if manifest.weights.source == RANDOM and manifest.weights.seed is None and manifest.origin is None:
        yield "weights are random and have no seed"
    if (bad := strange_option(manifest.options)) is not None:
        yield f"options has {bad!r}, which is no option of a model"
    classes, width = manifest.options.get("num_classes"), _logits(manifest)
    if isinstance(classes, int) and width is not None and classes != width:
        yield f"options say {classes} classes, the output {manifest.outputs[0].name} has {width}"


def strange_option(options: Iterable[str]) -> str | None:
    """The first name that can be no option of a variant; None where all can."""
    return next((name for name in options if not name.isidentifier() or name in RESERVED), None)


def _plain_name(name: str) -> bool:
    """Whether a name is that of an entry of a folder, on any system."""
    return bool(name) and not name.startswith(".") and not set(name) & set('/\\:*?"<>|') and name.isprintable()


def count_classes(manifest: Manifest) -> int | None:
    """How many names labels.txt has to have; None where the manifest does not say."""
    classes = (manifest.dense or {}).get("classes")
    return classes if isinstance(classes, int) and not isinstance(classes, bool) else _logits(manifest)


def _logits(manifest: Manifest) -> int | None:
    """How many a classifier has, by its output's shape; None where that does not say, and of other tasks."""
    shape = manifest.outputs[0].shape if manifest.task == CLASSIFY and manifest.outputs else ()
    return shape[-1] if shape and isinstance(shape[-1], int) else None
