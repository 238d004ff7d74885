"""The sources of this package: a variant, a head on a variant, and either from weights that say what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dualtoken_deploy.bundle.blocks import RANDOM, Licenses, Origin
from dualtoken_deploy.bundle.licenses import OURS
from dualtoken_deploy.bundle.manifest import CLASSIFY, Manifest
from dualtoken_deploy.bundle.trust import check_trusted
from dualtoken_deploy.errors import InputError, MissingError, UsageError, WeightsError
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.heads.neck import Backbone
from dualtoken_deploy.models.heads.output_forms import DETECTED, FORMS, LABELS, choose_form, outputs_of
from dualtoken_deploy.models.heads.rebuild import random_dense_model
from dualtoken_deploy.models.heads.table import check_same, create_dense_model, describe_head, get_head
from dualtoken_deploy.models.published import join_token_norms
from dualtoken_deploy.models.registry import (
    DEFAULT_SEED,
    create_model,
    make_config,
    options_of,
    parse_image_size,
    random_model,
    takes_any_size,
    weights_sha256,
)
from dualtoken_deploy.models.source import ONNX, OWN, REFERENCE, Preprocessing, Size, Source
from dualtoken_deploy.models.system_source import system_source
from dualtoken_deploy.models.systems import is_system
from dualtoken_deploy.models.weights import BUILT_IN_WEIGHTS, describe_weights, weights_path
from dualtoken_deploy.spec import STRETCH, Dim, TensorSpec
from dualtoken_deploy.tasks.table import get_task

DEFAULT_SIZE = 224
Weights = str | Path | None
ImageSize = int | Size | str | None


def variant_source(
    variant: str,
    weights: Weights = None,
    image_size: ImageSize = None,
    labels: Sequence[str] = (),
    seed: int = DEFAULT_SEED,
    **options: Any,
) -> Source:
    """A classifier by its variant. `weights` None: random ones from `seed`; what a weights file says of classes, size
    and options is taken unless told otherwise. `options`: as create_model takes them.

    Raises UsageError, WeightsError, InputError.
    """
    info = None if weights is None else describe_weights(weights, CLASSIFY)
    if info is not None and info.variant != variant:
        raise WeightsError(
            f"{weights} are weights of variant {info.variant}, not of {variant}; give --variant {info.variant}"
        )
    if labels and "num_classes" not in options:
        options["num_classes"] = len(labels)
    if info is not None:  # what the file says of itself, unless told otherwise
        options = {"num_classes": len(info.labels), **info.options, **options}
    size = parse_image_size(image_size or (DEFAULT_SIZE if info is None else info.image_size))
    check_seed(seed)
    try:
        config = make_config(variant, image_size=size, **options)
    except TypeError as error:  # text where a number belongs
        raise UsageError(f"an option has a value of the wrong kind ({error}): {options}") from error
    if not labels and info is not None and len(info.labels) == config.num_classes:
        labels = info.labels
    _check_count(labels, config.num_classes)

    def make() -> ImageModel:
        if weights is None:
            return random_model(variant, seed, image_size=size, **options)
        return create_model(variant, image_size=size, weights=weights, **options)

    def outputs(_size: Size, batch: Dim) -> tuple[TensorSpec, ...]:
        return (TensorSpec("logits", "float32", "NC", (batch, config.num_classes)),)

    return Source(
        name=variant,
        task=CLASSIFY,
        size=size,
        origin=Origin(kind="variant", name=variant),
        make=make,
        outputs=outputs,
        labels=tuple(labels) or tuple(f"class {i}" for i in range(config.num_classes)),
        weights=weights_origin(weights, seed),
        described={"variant": variant, "options": options_of(config)},
        any_size=takes_any_size(config),
        why_one_size=f"{variant} with {'its scans' if variant.startswith('vim2') else 'window attention'}",
    )


def head_source(
    head: str,
    variant: str | None = None,
    weights: Weights = None,
    image_size: ImageSize = None,
    labels: Sequence[str] = (),
    classes: int | None = None,
    width: int | None = None,
    suppress: bool = False,
    argmax: bool = False,
    seed: int = DEFAULT_SEED,
    **options: Any,
) -> Source:
    """A detector or segmenter (retinanet, mask-rcnn, deeplabv3, pspnet) on a variant, for one image of one size.

    `weights`: of a run with a head, which say variant, classes, width and size; None: random ones from `seed`, and
    what is not given is the paper's. `suppress`: a detector's boxes, scores and classes instead of its raw outputs;
    `argmax`: a segmenter's label map instead of its logits. Raises UsageError, WeightsError, InputError.
    """
    row = get_head(head)
    form = choose_form(head, suppress, argmax)
    check_seed(seed)
    for name, value in (("classes", classes), ("width", width)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if weights is not None:
        said = describe_head(weights)
        if options:
            raise UsageError(f"{weights} say their model options themselves; leave {', '.join(options)} out")
        check_same(said, weights, head=head, variant=variant, classes=classes, width=width)
        names, variant, width, options = said.labels, said.variant, said.width, dict(said.options)
        size = parse_image_size(image_size or said.image_size)
    else:
        count = classes or len(labels) or row.classes
        names = tuple(labels) if len(labels) == count else tuple(f"class {i}" for i in range(count))
        variant, width = variant or row.variant, width or row.width
        size = parse_image_size(image_size or row.image_size)
    _check_count(labels, len(names))
    most = get_task(row.task).most_classes
    if most is not None and len(names) > most:
        raise UsageError(f"a label map holds at most {most} classes, not {len(names)}")
    names = tuple(labels) or names
    config = make_config(variant, image_size=size, **options)

    def make() -> nn.Module:
        if weights is not None:
            model = create_dense_model(head, weights=weights, image_size=size)
        else:
            model = random_dense_model(
                head, seed, variant=variant, classes=len(names), width=width, image_size=size, **options
            )
        return FORMS[head][form](model, size)

    return Source(
        name=f"{head}-{variant}",
        task=row.task,
        size=size,
        origin=Origin(kind="head", name=head),
        make=make,
        outputs=lambda at, _batch: outputs_of(head, form, len(names), at),
        labels=names,
        preprocessing=Preprocessing(crop_ratio=1.0, resize=STRETCH),
        weights=weights_origin(weights, seed),
        described={
            "variant": variant,
            "options": {k: v for k, v in options_of(config).items() if k != "num_classes"},
            "head": head,
            "dense": {"form": form, "classes": len(names), "width": width},
        },
        one_picture=True,
        why_one_size=f"{head}, which has anchors and maps of one size,",
    )


def trained_source(weights: str | Path) -> Source:
    """The model that a weights file says it is of. Raises WeightsError where it says nothing."""
    info = describe_weights(weights)
    if info is None:
        raise WeightsError(f"{weights} does not say its variant and classes; export it, and evaluate the bundle")
    if info.head is not None:
        return head_source(info.head, weights=weights)
    if is_system(info.variant):
        return other_source(info.variant, weights)
    return variant_source(info.variant, weights)


def other_source(
    name: str,
    weights: Weights = None,
    image_size: ImageSize = None,
    labels: Sequence[str] = (),
    seed: int = DEFAULT_SEED,
    **options: Any,
) -> Source:
    """A model that is no classifier, by its name. Raises UsageError, WeightsError, InputError."""
    check_seed(seed)
    return system_source(name, weights, image_size, labels, seed, weights_origin(weights, seed), **options)


def known_licenses(source: Source) -> Licenses:
    """Those of what comes with this package: its networks, and the weights that it ships."""
    ours = "variant" in source.described
    shipped = ours and source.weights["source"] in BUILT_IN_WEIGHTS
    return Licenses(weights=OURS if shipped else None, code=OURS if ours else None)


def rebuild(manifest: Manifest) -> nn.Module:
    """The eager module that a bundle was made from: (B, 3, H, W) -> its outputs, in the form that the bundle has.

    Of a "reference" the user's code runs. Raises MissingError where the model lived in memory alone, WeightsError where
    the file is gone or the tensors are not those of the export (sha256), and what a Source raises.
    """
    source = source_of(manifest)
    module = source.make()
    inner = inner_model(module)
    if manifest.weights.sha256 not in (weights_sha256(inner), weights_sha256(inner, join_token_norms)):
        raise WeightsError(
            f"the eager weights of {source.name} from {manifest.weights.source!r} are not those that the bundle was "
            "made from (sha256 differs); export it again, or validate with --reference golden"
        )
    return module


def source_of(manifest: Manifest) -> Source:
    """The source that a manifest names. Raises MissingError where nothing makes the model again."""
    origin, where = manifest.origin, manifest.weights.source
    if origin is not None and origin.kind not in ("variant", "head"):
        return _foreign_source(manifest, origin)
    weights, seed = (None, manifest.weights.random_seed) if where == RANDOM else (where, DEFAULT_SEED)
    options = {k: v for k, v in manifest.options.items() if k != "image_size"}
    if is_system(manifest.variant):
        return other_source(manifest.variant, weights, manifest.options.get("image_size"), seed=seed, **options)
    if manifest.variant.startswith("lightvit"):
        options.setdefault("form", "appendix")  # what there was when manifests did not say it
    if manifest.head is None:
        return variant_source(manifest.variant, weights, manifest.options.get("image_size"), seed=seed, **options)
    dense, size = manifest.dense or {}, manifest.input.size
    suppress, argmax = (dense.get("form") == form for form in (DETECTED, LABELS))
    if weights is not None:
        return head_source(manifest.head, manifest.variant, weights, size, suppress=suppress, argmax=argmax)
    return head_source(
        manifest.head, manifest.variant, None, size, (), dense.get("classes"), dense.get("width"), suppress, argmax,
        seed, **{k: v for k, v in options.items() if k not in ("classes", "width")},
    )  # fmt: skip


def _foreign_source(manifest: Manifest, origin: Origin) -> Source:
    contract, where = manifest.input, manifest.weights.source
    shared = {
        "task": manifest.task,
        "image_size": contract.size,
        "output_names": origin.outputs,
        "preprocess": Preprocessing(contract.mean, contract.std, contract.crop_ratio, contract.resize),
        "name": origin.name,
    }
    if origin.kind == REFERENCE and origin.reference:
        check_trusted(
            manifest, f"eager of {manifest.variant} is made by running {origin.reference}; --reference golden runs none"
        )
        weights = None if where == OWN else where
        return Source.reference(origin.reference, origin.arguments, weights, **shared)  # type: ignore[arg-type]
    if origin.kind == ONNX and origin.reference:
        return Source.onnx(origin.reference, **shared)  # type: ignore[arg-type]
    raise MissingError(
        f"the model of {manifest.variant} was exported from memory, so nothing makes it again here; validate with "
        "--reference golden, or export it by a reference (--model FILE.py:CALLABLE)"
    )


def inner_model(module: nn.Module) -> nn.Module:
    """The model whose tensors are the weights: without what a form of its outputs wraps around it."""
    wrapped = getattr(module, "model", None)
    return wrapped if isinstance(wrapped, nn.Module) and not isinstance(module, ImageModel) else module


def classifier_of(module: nn.Module) -> ImageModel | None:
    """The variant inside a module: itself, or the backbone of its head; None of a foreign one."""
    if isinstance(module, ImageModel):
        return module
    backbone = next((m for m in module.modules() if isinstance(m, Backbone)), None)
    return None if backbone is None else backbone.model


def weights_origin(weights: Weights, seed: int) -> dict[str, Any]:
    """Where weights come from: the seed of random ones, a word of BUILT_IN_WEIGHTS, or a file."""
    if weights is None:
        return {"source": RANDOM, "seed": seed}
    return {"source": weights if weights in BUILT_IN_WEIGHTS else str(weights_path(weights).resolve())}


def check_seed(seed: int) -> None:
    """Raises UsageError on one that PyTorch does not take."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range; give one from 0 to 2**63 - 1")


def _check_count(labels: Sequence[str], classes: int) -> None:
    if labels and len(labels) != classes:
        raise InputError(f"the labels have {len(labels)} names for {classes} classes; give one name a class")
