"""What a saved program is made of: the counts that tell two layouts apart without a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from dualtoken_deploy.targets.coreml.mil.program import Operation, Program

# Operations that are reported to run elsewhere than on the Neural Engine. Apple publishes no list; these are from
# community measurements (hollance/neural-engine, "Which Core ML layers are not supported by the ANE?"), incomplete.
OFF_NEURAL_ENGINE: Mapping[str, str] = MappingProxyType(
    {
        "classify": "the label lookup, on the CPU, once behind the program",
        "gather": "indexing",
        "tile": "repeats data in memory",
        "non_zero": "its size depends on the data",
        "lstm": "recurrent",
        "gru": "recurrent",
        "rnn": "recurrent",
    }
)
_CONSTANT = ("const", "constexpr_")
MAX_RANK = 5  # Core ML's own limit, and the Neural Engine's


def structure(program: Program) -> dict[str, int]:
    """operations (constants apart), transposes, reshapes, linear, convolutions, operations reported to leave the Neural
    Engine, and the highest rank of any tensor."""
    steps = [op for op in program.operations if not op.kind.startswith(_CONSTANT)]
    counts = Counter(op.kind for op in steps)
    return {
        "operations": len(steps),
        "transposes": counts["transpose"],
        "reshapes": sum(counts[kind] for kind in ("reshape", "expand_dims", "squeeze")),
        "linear": counts["linear"],
        "convolutions": counts["conv"],
        "attention": counts["scaled_dot_product_attention"],
        "off_neural_engine": sum(counts[kind] for kind in OFF_NEURAL_ENGINE) + sum(map(_is_dilated, steps)),
        "max_rank": max((len(t.shape) for op in steps for _, t in op.outputs), default=0),
    }


def _is_dilated(operation: Operation) -> bool:
    dilations = operation.constants.get("dilations")
    return operation.kind == "conv" and dilations is not None and any(int(d) != 1 for d in dilations)
