"""Class labels behind a finished program: the classify operation and what the description says of it.

coremltools has this as an option of conversion, which fails where the classifier has a second output (the logits), and
its weight compression cannot read back what it wrote. The messages made here are those that it makes for one output, to
which a test holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LABEL, LABEL_PROBABILITIES = "classLabel", "classLabel_probs"


def add_classifier(spec: Any, labels: Sequence[str], probabilities: str) -> None:
    """Turns the output `probabilities` of an ML program into a label and a dictionary of label -> probability."""
    from coremltools.proto import MIL_pb2

    function = spec.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    operation = block.operations.add(type="classify")
    operation.inputs["probabilities"].arguments.add().name = probabilities
    value = operation.inputs["classes"].arguments.add().value
    value.type.listType.type.tensorType.dataType = MIL_pb2.STRING
    value.type.listType.length.constant.size = len(labels)
    for label in labels:
        _text(value.immediateValue.list.values.add(), label)
    label_output = operation.outputs.add(name=LABEL)
    label_output.type.tensorType.dataType = MIL_pb2.STRING
    dictionary = operation.outputs.add(name=LABEL_PROBABILITIES)
    dictionary.type.dictionaryType.keyType.tensorType.dataType = MIL_pb2.STRING
    dictionary.type.dictionaryType.valueType.tensorType.dataType = MIL_pb2.FLOAT64
    _text(operation.attributes["name"], "classify_0")
    kept = [name for name in block.outputs if name != probabilities]
    del block.outputs[:]
    block.outputs.extend([LABEL, LABEL_PROBABILITIES, *kept])
    _describe(spec.description, probabilities)


def _text(value: Any, text: str) -> None:
    from coremltools.proto import MIL_pb2

    value.type.tensorType.dataType = MIL_pb2.STRING
    value.immediateValue.tensor.strings.values.append(text)


def _describe(description: Any, probabilities: str) -> None:
    kept = [type(o).FromString(o.SerializeToString()) for o in description.output if o.name != probabilities]
    del description.output[:]
    description.output.add(name=LABEL).type.stringType.SetInParent()
    description.output.add(name=LABEL_PROBABILITIES).type.dictionaryType.stringKeyType.SetInParent()
    description.output.extend(kept)
    description.predictedFeatureName = LABEL
    description.predictedProbabilitiesName = LABEL_PROBABILITIES
