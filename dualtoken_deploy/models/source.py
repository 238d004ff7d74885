"""Where a model comes from: a variant, a head, a module of the user's, a callable that makes one, or an ONNX file.

A Source says what a bundle has to know before the model is made (name, task, labels, size, preprocessing) and makes the
eager module that everything is held against. Its origin stands in the manifest.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dualtoken_deploy.bundle.blocks import RANDOM, Licenses, Origin
from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.errors import InputError, UsageError
from dualtoken_deploy.models.named_outputs import NamedOutputs, choose, describe, look_at
from dualtoken_deploy.models.onnx_reference import OnnxReference
from dualtoken_deploy.models.registry import DEFAULT_SEED, MAX_IMAGE_SIZE
from dualtoken_deploy.models.user_code import blamed, build_model, source_sha256, split_reference
from dualtoken_deploy.models.user_weights import load_user_weights
from dualtoken_deploy.spec import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD, STRETCH, Dim, InputContract, TensorSpec
from dualtoken_deploy.tasks.table import get_task

Size = tuple[int, int]  # (H, W)
Outputs = Callable[[Size, Dim], tuple[TensorSpec, ...]]
BATCH = "batch"

OWN = "the model's own"  # weights that no file was named for
# kinds of an origin, beside "variant" and "head"
MODULE: Literal["module"] = "module"
REFERENCE: Literal["reference"] = "reference"
ONNX: Literal["onnx"] = "onnx"
ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input: (x / 255 - mean) / std of RGB, cut out or stretched as an InputContract
    says."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_ratio: float = CROP_RATIO
    resize: str = "bicubic"

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in values):
                raise UsageError(f"{name} {values} is not three numbers, those of red, green and blue in 0..1")
        if not all(v > 0 for v in self.std):
            raise UsageError(f"std {self.std} must be above 0: the picture is divided by it")
        if not 0 < self.crop_ratio <= 1:
            raise UsageError(f"crop ratio {self.crop_ratio} is not in (0, 1]; ImageNet's is {CROP_RATIO}")
        if self.resize not in ("bicubic", STRETCH):
            raise UsageError(f"unknown resize {self.resize!r}; valid: bicubic, {STRETCH}")


PREPROCESSINGS: Mapping[str, Preprocessing] = MappingProxyType(
    {
        "imagenet": Preprocessing(),
        # OpenAI's CLIP, clip/clip.py: the whole short side, then a crop of the centre
        "clip": Preprocessing(
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), crop_ratio=1.0
        ),
        "unit": Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # x / 255 alone
    }
)


@dataclass(frozen=True)
class Source:
    """What a bundle is made from.

    `make()` gives the eager module in evaluation mode, float32, on the CPU: (B, 3, H, W) -> a tensor, or a tuple of
    tensors in the order of `outputs`. `outputs((H, W), batch)` describes them; batch is a number or "batch".
    `labels`: one a class, or none where none were given. `margin(image)`: how near an image (B, 3, H, W) comes to a
    point where the model jumps, (B,); None where it never does.

    `weights`: "source" (RANDOM with its "seed", a word or a file, or OWN: those that the model came with). `described`:
    fields of the manifest that only some sources have. `any_size`: one graph can serve pictures of every size, else
    `why_one_size` begins the sentence that says not; `one_picture`: it takes a batch of one alone.
    `licenses`: None where nobody said them.
    """

    name: str
    task: str
    size: Size
    origin: Origin
    make: Callable[[], nn.Module]
    outputs: Outputs
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    margin: Callable[[Tensor], Tensor | None] | None = None
    weights: Mapping[str, Any] = field(default_factory=lambda: {"source": OWN})
    described: Mapping[str, Any] = field(default_factory=dict)
    any_size: bool = False
    why_one_size: str = "a model of yours"
    one_picture: bool = False
    licenses: Licenses | None = None

    @property
    def random_weights(self) -> bool:
        return bool(self.weights["source"] == RANDOM)

    def contract(self, kind: str | None, batch: Dim, any_size: bool = False) -> InputContract:
        """What is fed: kind "image" (uint8 NHWC RGB, normalised in the graph), "tensor" (normalised float32 NCHW) or
        "series" (float32, L steps of M variates); None: the first of the task's.

        `batch`: a number, or a name where it is open; with `any_size` the sides are. Raises UsageError on another kind.
        """
        valid = get_task(self.task).kinds
        kind = kind or valid[0]
        sides: tuple[Dim, Dim] = ("height", "width") if any_size else self.size
        tensors = {
            "image": TensorSpec("image", "uint8", "NHWC", (batch, *sides, 3)),
            "tensor": TensorSpec("input", "float32", "NCHW", (batch, 3, *sides)),
            "series": TensorSpec("series", "float32", "NLC", (batch, *sides)),
        }
        if kind not in valid:
            raise UsageError(f"unknown input {kind!r}; valid inputs: {', '.join(valid)} (task {self.task})")
        how = self.preprocessing
        return InputContract(tensors[kind], kind, self.size, how.mean, how.std, how.crop_ratio, how.resize)

    def class_names(self, outputs: Sequence[TensorSpec]) -> tuple[str, ...]:
        """A name for each class of these outputs: the labels, or numbers where there are none; of a task without
        classes the labels as they are. Raises InputError where labels and classes differ in number."""
        count = class_count(self.task, outputs)
        if count is None or not self.labels:
            return self.labels if count is None else tuple(f"class {i}" for i in range(count))
        if len(self.labels) != count:
            raise InputError(f"{len(self.labels)} labels for the {count} classes of {self.name}; give one a class")
        return self.labels

    @staticmethod
    def module(
        model: nn.Module,
        task: str = CLASSIFY,
        image_size: int | Size | str = 224,
        labels: Sequence[str] = (),
        output_names: Sequence[str] = (),
        preprocess: str | Preprocessing | None = None,
        name: str | None = None,
    ) -> Source:
        """A live module. Its bundle cannot make it again: it is validated against its golden outputs alone.

        `output_names`: names of the model's outputs to take, or one for each of them. `preprocess`: a name of
        PREPROCESSINGS or one's own; None: ImageNet's, stretched for detect and segment. Raises UsageError.
        """
        if not isinstance(model, nn.Module):
            raise UsageError(f"a {type(model).__name__} is no torch.nn.Module; give the model itself")
        own = _name(name or type(unwrapped(model)).__name__)
        origin = Origin(kind=MODULE, name=own, outputs=tuple(output_names))
        return _foreign(lambda: model, origin, task, image_size, labels, preprocess)

    @staticmethod
    def reference(
        reference: str,
        arguments: Mapping[str, Any] | None = None,
        weights: str | Path | None = None,
        task: str = CLASSIFY,
        image_size: int | Size | str = 224,
        labels: Sequence[str] = (),
        output_names: Sequence[str] = (),
        preprocess: str | Preprocessing | None = None,
        name: str | None = None,
        seed: int = DEFAULT_SEED,
    ) -> Source:
        """What "package.module:callable" or "path/to/file.py:callable" returns, which runs the user's code, but not
        before `make` or `outputs` is called.

        `weights`: a safetensors file or a torch checkpoint; None: those that the callable gives, torch's random numbers
        starting at `seed`. The other arguments are those of `module`. Raises UsageError.
        """
        split_reference(reference)
        given = dict(arguments or {})
        own = _name(name or reference.rpartition(":")[2])
        origin = Origin(
            kind=REFERENCE,
            name=own,
            reference=reference,
            arguments=given,
            outputs=tuple(output_names),
            sha256=source_sha256(reference),
        )

        def build() -> nn.Module:
            model = build_model(reference, given, seed)
            if weights is not None:
                load_user_weights(model, Path(weights))
            return model

        found = _foreign(build, origin, task, image_size, labels, preprocess)
        return found if weights is None else replace(found, weights={"source": str(Path(weights).resolve())})

    @staticmethod
    def onnx(
        path: str | Path,
        task: str = CLASSIFY,
        image_size: int | Size | str | None = None,
        labels: Sequence[str] = (),
        output_names: Sequence[str] = (),
        preprocess: str | Preprocessing | None = None,
        name: str | None = None,
    ) -> Source:
        """An ONNX file from anywhere that takes a float32 picture (batch, 3, H, W), for the targets that take ONNX.

        Its reference is the file itself in ONNX Runtime. `image_size` None: the file's own, or 224 where that is open.
        Raises UsageError, InputError, MissingError.
        """
        file = Path(path)
        model = OnnxReference(file)
        size = _onnx_size(model, image_size)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        origin = Origin(
            kind=ONNX, name=_name(name or file.stem), reference=str(file.resolve()), outputs=tuple(output_names),
            sha256=sha256,
        )  # fmt: skip
        found = _foreign(lambda: model, origin, task, size, labels, preprocess)
        return replace(found, one_picture=model.shape[0] == 1)


def is_onnx_file(model: object) -> bool:
    """Whether a text or path names an ONNX file."""
    return isinstance(model, (str, Path)) and str(model).endswith(ONNX_SUFFIX)


def class_count(task: str, outputs: Sequence[TensorSpec]) -> int | None:
    """Classes that the outputs tell apart; None where they do not say."""
    logits = {spec.name: spec for spec in outputs}.get("logits")
    if logits is None or "logits" not in {kind.name for kinds in get_task(task).outputs for kind in kinds}:
        return None
    count = logits.shape[1]
    return count if isinstance(count, int) else None


def _foreign(
    build: Callable[[], nn.Module],
    origin: Origin,
    task: str,
    image_size: int | Size | str,
    labels: Sequence[str],
    preprocess: str | Preprocessing | None,
) -> Source:
    get_task(task)
    size = parse_size(image_size)
    made: list[NamedOutputs] = []  # the user's code runs once, whatever is asked first

    def make() -> NamedOutputs:
        if not made:
            model = prepared(build())
            series = get_task(task).kinds[0] == "series"
            seen = look_at(model, example((1, *size) if series else (1, 3, *size)))
            made.append(NamedOutputs(model, choose(seen, task, origin.outputs), series).eval())
        return made[0]

    return Source(
        name=origin.name,
        task=task,
        size=size,
        origin=origin,
        make=make,
        outputs=lambda at, batch: describe(make(), task, at, batch),
        labels=tuple(labels),
        preprocessing=preprocessing_of(preprocess, task),
    )


def preprocessing_of(given: str | Preprocessing | None, task: str) -> Preprocessing:
    """That of a name; None: ImageNet's, and the whole picture where places in it matter. Raises UsageError."""
    if isinstance(given, Preprocessing):
        return given
    if given is None:
        resize = get_task(task).resize
        return Preprocessing(crop_ratio=1.0, resize=resize) if resize == STRETCH else Preprocessing()
    if given not in PREPROCESSINGS:
        raise UsageError(f"unknown preprocessing {given!r}; valid: {', '.join(PREPROCESSINGS)}")
    return PREPROCESSINGS[given]


def parse_size(size: int | Size | str) -> Size:
    """(H, W) of a number, a pair, or a text like 224 or 224x320. A foreign model may be smaller than those of this
    package. Raises UsageError."""
    sides = size.lower().split("x") if isinstance(size, str) else [size] * 2 if isinstance(size, int) else list(size)
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or not all(str(s).isdecimal() and 1 <= int(s) <= MAX_IMAGE_SIZE for s in sides):
        raise UsageError(f"image size {size!r} is not one or two sides of 1 to {MAX_IMAGE_SIZE}, e.g. 224 or 224x320")
    return int(sides[0]), int(sides[1])


def example(shape: tuple[int, ...]) -> Tensor:
    """Noise about as bright as a normalised picture, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile's and the data-parallel wrappers, which add nothing to what is computed."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def prepared(model: nn.Module) -> nn.Module:
    """The module in evaluation mode, float32, on the CPU: itself where it is so already, else a copy.

    Raises InputError where it cannot be.
    """
    model = unwrapped(model)
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        raise InputError(f"{type(model).__name__} has lazy layers without weights; run it once on a picture before")
    if any(t.is_meta for t in tensors):
        raise InputError(f"{type(model).__name__} has weights on the meta device, which are shapes alone; load them")
    ready = all(t.device.type == "cpu" and (not t.is_floating_point() or t.dtype == torch.float32) for t in tensors)
    if ready and not any(m.training for m in model.modules()):
        return model
    with blamed(f"copying {type(model).__name__}"):
        return copy.deepcopy(model).cpu().float().eval()


def _onnx_size(model: OnnxReference, given: int | Size | str | None) -> Size:
    height, width = model.shape[2:]
    size = parse_size((height or 224, width or 224) if given is None else given)
    if any(side not in (None, wanted) for side, wanted in zip((height, width), size, strict=True)):
        raise UsageError(
            f"{model.path} takes pictures of {height}x{width}, not {size[0]}x{size[1]}; leave the size out"
        )
    return size


def _name(text: str) -> str:
    """A name for folders and metadata: lower case letters, digits, dots, dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"
