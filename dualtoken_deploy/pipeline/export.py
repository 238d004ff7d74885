"""`export`: one call from a model, by name or alive, to a verified bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from dualtoken_deploy.bundle.labels import check_labels, read_labels
from dualtoken_deploy.bundle.licenses import parse_licenses
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.own_sources import (
    ImageSize,
    Weights,
    head_source,
    known_licenses,
    other_source,
    variant_source,
)
from dualtoken_deploy.models.registry import DEFAULT_SEED, VARIANTS
from dualtoken_deploy.models.source import Preprocessing, Source, is_onnx_file
from dualtoken_deploy.models.systems import is_system
from dualtoken_deploy.pipeline.check import ExportResult
from dualtoken_deploy.pipeline.make import make
from dualtoken_deploy.pipeline.plan import DYNAMIC, plan
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.tasks.table import get_task


@dataclass(frozen=True)
class Model:
    """What is to be exported, in a user's words; None: not said.

    `model`: a variant's name, a live module, "package.module:callable" or "file.py:callable"; None with a `head`.
    `task`, `arguments`, `output_names` and `preprocess` are for models that are not this package's.
    """

    model: str | Path | nn.Module | None
    weights: Weights = None
    labels: str | Path | Sequence[str] | None = None
    image_size: ImageSize = None
    seed: int = DEFAULT_SEED
    head: str | None = None
    classes: int | None = None
    width: int | None = None
    suppress: bool = False
    argmax: bool = False
    task: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    output_names: Sequence[str] = ()
    preprocess: str | Preprocessing | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    licenses: Sequence[str] = ()


def open_source(said: Model) -> Source:
    """The source that is meant. Raises UsageError, InputError, WeightsError, MissingError."""
    return licensed(_open_source(said), said.licenses)


def licensed(source: Source, given: Sequence[str]) -> Source:
    """The source with its licences: what was said of them, else those that are known. Raises UsageError."""
    return replace(source, licenses=parse_licenses(given, source.licenses or known_licenses(source)))


def _open_source(said: Model) -> Source:
    labels = _labels(said.labels)
    size = None if said.image_size == DYNAMIC else said.image_size
    if said.head is not None or _is_variant(said.model):
        _check_own(said)
        if said.head is None and is_system(said.model):
            classes = {} if said.classes is None else {"num_classes": said.classes}
            return other_source(str(said.model), said.weights, size, labels, said.seed, **{**said.options, **classes})
        if said.head is None:
            classes = {} if said.classes is None else {"num_classes": said.classes}
            return variant_source(str(said.model), said.weights, size, labels, said.seed, **{**said.options, **classes})
        variant = None if said.model is None else str(said.model)
        return head_source(
            said.head, variant, said.weights, size, labels, said.classes, said.width, said.suppress, said.argmax,
            said.seed, **said.options,
        )  # fmt: skip
    return _foreign_source(said, labels)


def _is_variant(model: str | Path | nn.Module | None) -> bool:
    """A text that can be nothing else is a variant's name, known or not."""
    return isinstance(model, str) and (model in VARIANTS or not (":" in model or is_onnx_file(model)))


def _check_own(said: Model) -> None:
    foreign = {
        "--task": said.task is not None, "--model-arg": bool(said.arguments), "--output-names": bool(said.output_names),
        "--preprocess, --mean, --std, --crop-ratio and --resize": said.preprocess is not None,
    }  # fmt: skip
    for name, given in foreign.items():
        if given:
            raise UsageError(f"{name} belongs to a model of your own (--model); {said.head or said.model} has its own")
    if said.head is None and (said.width is not None or said.suppress or said.argmax):
        raise UsageError("--width, --suppress and --argmax belong to dense models; give --head as well")


def _foreign_source(said: Model, labels: tuple[str, ...]) -> Source:
    own = {"--option": bool(said.options), "--classes": said.classes is not None, "--width": said.width is not None,
           "--suppress": said.suppress, "--argmax": said.argmax}  # fmt: skip
    for name, given in own.items():
        if given:
            raise UsageError(f"{name} is for the variants of this package; a model of your own takes --model-arg")
    if said.model is None:
        raise UsageError("give --variant (`dualtoken models` lists them), --head or --model")
    task = get_task(said.task or "classify").name
    size = said.image_size if said.image_size not in (None, DYNAMIC) else None
    names, preprocess = tuple(said.output_names), said.preprocess
    if isinstance(said.model, nn.Module):
        if said.weights is not None:
            raise UsageError("a live module has its weights already; leave weights out, or load them into it before")
        return Source.module(said.model, task, size or 224, labels, names, preprocess)
    text = str(said.model)
    if is_onnx_file(text):
        return _file_source(said, labels, size, task)
    return Source.reference(
        text, said.arguments, said.weights, task, size or 224, labels, names, preprocess, seed=said.seed
    )


def _file_source(said: Model, labels: tuple[str, ...], size: Any, task: str) -> Source:
    for name, given in (("--weights", said.weights is not None), ("--model-arg", bool(said.arguments))):
        if given:
            raise UsageError(f"{name} is for a model that is code; {said.model} holds its weights; leave {name} out")
    return Source.onnx(str(said.model), task, size, labels, tuple(said.output_names), said.preprocess)


def _labels(given: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    if isinstance(given, (str, Path)):
        return read_labels(Path(given))
    check_labels(given, "labels")
    return tuple(given)


def export(
    model: str | Path | nn.Module | Source | None = None,
    target: str = "onnxruntime",
    precision: str = "fp32",
    weights: Weights = None,
    output: str | Path | None = None,
    labels: str | Path | Sequence[str] | None = None,
    image_size: ImageSize = None,
    batch: int | str = 1,
    input_kind: str | None = None,
    opset: int | None = None,
    seed: int = DEFAULT_SEED,
    device: str | None = None,
    force: bool = False,
    int8: Int8Options | None = None,
    head: str | None = None,
    classes: int | None = None,
    width: int | None = None,
    suppress: bool = False,
    argmax: bool = False,
    task: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    output_names: Sequence[str] = (),
    preprocess: str | Preprocessing | None = None,
    settings: Mapping[str, str | None] | None = None,
    command: str = "dualtoken_deploy.export(...)",
    progress: Callable[[str], None] | None = None,
    variant: str | None = None,
    licenses: str | Sequence[str] = (),
    **options: Any,
) -> ExportResult:
    """Exports one model to one target, checks the saved files against eager, and only then names the bundle.

    `model` (or `variant`): a variant's name, a live module (B, 3, H, W) -> tensors, "package.module:callable" or
    "file.py:callable" that makes one, "file.onnx" for targets that take ONNX, or a Source; with `head` (retinanet,
    mask-rcnn, deeplabv3, pspnet) the variant below it. `batch`: a number or "dynamic"; `image_size` too, for the
    targets that offer it; None: that of the weights, where they say it, or 224. `input_kind`: "image" (uint8 NHWC RGB,
    normalised in the graph), "tensor" (normalised float32 NCHW), or of a forecaster "series" (float32, L steps of M
    variates). `weights`: a file, of a variant also a word of BUILT_IN_WEIGHTS; None: random ones from `seed`, of a
    model of your own those that it has. `task`, `arguments` (of the callable), `output_names` and `preprocess`
    (imagenet, clip, unit, or a Preprocessing) are for models of your own. `device`: for a target that compiles
    natively, what to compile for. `int8`: how a precision with ranges is calibrated and gated. `settings`: the target's
    own, such as Core ML's deployment_target and layout; they are taken by name too. `suppress`, `argmax`, `width`: of a
    head. `licenses`: SPDX expressions, as --license takes them. `options`: of a variant as create_model takes them.
    Raises UsageError, MissingError, InputError, WeightsError, OutputError, ConversionError, and ToleranceError where
    the files do not reach the target's tolerance; no bundle is left then. A target that is built on its device is built
    where that is here; elsewhere the result's `state` is "prepared".
    """
    own: dict[str, str | None] = {
        name: options.pop(name) for row in TARGETS.values() for name in row.settings if name in options
    }
    said_licenses = (licenses,) if isinstance(licenses, str) else tuple(licenses)
    if isinstance(model, Source):
        source = licensed(model, said_licenses)
    else:
        said = Model(
            model if model is not None else variant, weights, labels, image_size, seed, head, classes, width, suppress,
            argmax, task, arguments or {}, output_names, preprocess, options,
            said_licenses,
        )  # fmt: skip
        source = open_source(said)
    made = plan(
        source, target, precision, output, batch, image_size == DYNAMIC, input_kind, opset, device, force, int8,
        {**own, **(settings or {})}, command,
    )  # fmt: skip
    return make(made, progress)
