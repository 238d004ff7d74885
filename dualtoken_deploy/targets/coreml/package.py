"""The .mlpackage as it ships: what Xcode shows about it, and the same bytes for the same model."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.spec import STRETCH, InputContract
from dualtoken_deploy.targets.apple.torch_program import PROBABILITIES
from dualtoken_deploy.targets.coreml.classifier import LABEL, LABEL_PROBABILITIES, add_classifier
from dualtoken_deploy.targets.coreml.mil.program import find_specification
from dualtoken_deploy.targets.coreml.mil.vendor import model_proto

AUTHOR = "dualtoken-deploy"
LICENSE = "Code: Apache-2.0. The weights have the licence of whoever trained them."
_CLUTTER = ("executorch_debug_handle_mapping.json",)  # written for torch.export sources, with names of the tracer
OUTPUTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        CLASSIFY: {
            "logits": "Raw class scores before softmax, (batch, classes), in the order of the labels",
            LABEL: "Label of the most likely class",
            LABEL_PROBABILITIES: "Probability of each label",
        },
        "detect": {
            "logits": "Raw class scores of each anchor before the sigmoid, (1, anchors, classes)",
            "deltas": "Offsets of each anchor's box: shift of its centre over its sides, log of the ratio of sides",
        },
        "segment": {
            "logits": "Raw class scores of each pixel before softmax, (1, classes, height, width)",
            "labels": "Index of the most likely class of each pixel, (1, height, width)",
        },
    }
)
_DATE = "com.github.apple.coremltools.conversion_date"  # would make every day's bytes differ


def describe(model: Any, contract: InputContract, metadata: Mapping[str, str]) -> None:
    """Fills in what Xcode's preview shows: author, licence, version, inputs, outputs and the preprocessing."""
    from dualtoken_deploy import __version__

    model.author, model.license, model.version = AUTHOR, LICENSE, __version__
    own = metadata.get("origin", "variant") in ("variant", "head")
    name = f"DualToken-ViT {metadata['variant']}" if own else metadata["variant"]
    model.short_description = (
        f"{name}, {metadata.get('head') or metadata.get('task') or 'image classification'}; "
        f"{metadata['precision']}; "
        f"weights: {metadata['weights']}"
    )
    model.input_description[contract.tensor.name] = input_text(contract)
    for key, value in metadata.items():
        model.user_defined_metadata[f"dualtoken.{key}"] = value
    model.user_defined_metadata["dualtoken.preprocessing"] = input_text(contract)


def input_text(contract: InputContract) -> str:
    """One sentence on what to feed."""
    height, width = contract.size
    if contract.kind == "series":
        return f"float32 (batch, {height}, {width}): the last {height} steps of {width} variates, as they are"
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (contract.mean, contract.std))
    if contract.resize == STRETCH:
        how = "stretched (bilinear) to that size"
    else:
        how = f"resized (bicubic) until it covers the size / {contract.crop_ratio:g}, then cropped at its centre"
    if contract.kind == "image":
        return f"RGB picture of {width} x {height} pixels: {how}; mean ({mean}) and std ({std}) are applied inside"
    return f"float32 (batch, 3, {height}, {width}): RGB in 0..1, {how}, then (x - ({mean})) / ({std})"


def save(model: Any, package: Path, labels: Sequence[str] | None, texts: Mapping[str, str]) -> None:
    """Saves a coremltools model, with class labels unless `labels` is None; `texts` say what its outputs are. What
    differs from run to run goes: the date, random identifiers, the order of maps."""
    model.save(str(package))
    for name in _CLUTTER:
        (package / name).unlink(missing_ok=True)
    spec = model_proto("writing a Core ML package").Model()
    spec.ParseFromString(find_specification(package).read_bytes())
    shorten_parameters(spec)
    if labels is not None:
        add_classifier(spec, labels, PROBABILITIES)
    for output in spec.description.output:
        output.shortDescription = texts.get(output.name, f"Output {output.name} of the model")
    _write(spec, package)
    allowed = package.parent.stat().st_mode & 0o777  # what the umask left of the bundle's own folder
    for made in (package, *package.rglob("*")):  # coremltools leaves some of them private
        made.chmod(allowed if made.is_dir() else allowed & 0o666)


def settle(package: Path) -> None:
    """Takes out of a saved package what differs from run to run."""
    spec = model_proto("writing a Core ML package").Model()
    spec.ParseFromString(find_specification(package).read_bytes())
    _write(spec, package)


def _write(spec: Any, package: Path) -> None:
    spec.description.metadata.userDefined.pop(_DATE, None)
    find_specification(package).write_bytes(spec.SerializeToString(deterministic=True))
    _name_items(package / "Manifest.json")


def shorten_parameters(spec: Any) -> None:
    """Gives the small constants, `stage2_block3_token_broadcast_q_pad_type_0` and the like, the names c0, c1, ...

    Each operation has six of them, and long names made a package of T (mix) 0.1 MB larger. Weights keep theirs.
    """
    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    constants = [op for op in block.operations if op.type == "const"]
    small = [op for op in constants if op.attributes["val"].WhichOneof("value") != "blobFileValue"]
    short = {op.outputs[0].name: f"c{number}" for number, op in enumerate(small)}
    for op in small:
        op.outputs[0].name = short[op.outputs[0].name]
        op.attributes["name"].immediateValue.tensor.strings.values[0] = op.outputs[0].name
    for op in block.operations:
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = short.get(binding.name, binding.name)


def _name_items(manifest: Path) -> None:
    """Identifiers made from the items' paths instead of random ones."""
    data = json.loads(manifest.read_text(encoding="utf-8"))
    new = {old: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for old, item in data["itemInfoEntries"].items()}
    data["itemInfoEntries"] = {
        new[old]: item for old, item in sorted(data["itemInfoEntries"].items(), key=lambda e: e[1]["path"])
    }
    data["rootModelIdentifier"] = new[data["rootModelIdentifier"]]
    manifest.write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")
