"""What both libraries build alike: a strongly typed network from ONNX, its profile, a progress monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.errors import ConversionError, UsageError
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.nvidia.binding import Library

if TYPE_CHECKING:
    import tensorrt

Tell = Callable[[str], None]
Batches = tuple[int, int, int]  # smallest, best and largest of a dynamic batch


def check_batches(batches: Batches) -> None:
    """Raises UsageError on values that TensorRT would not take."""
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise UsageError(f"batches {batches} are not MIN,BEST,MAX with 1 <= MIN <= BEST <= MAX")


def parse_batches(text: str) -> Batches:
    """MIN,BEST,MAX. Raises UsageError."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"batches {text!r} are not MIN,BEST,MAX, e.g. 1,8,32")
    least, best, most = (int(part) for part in parts)
    return least, best, most


def read_network(trt: Any, library: Library, builder: tensorrt.Builder, onnx: bytes, logger: Any) -> Any:
    """The network of an ONNX model, with the types of the ONNX. Raises ConversionError with the parser's reasons."""
    network: tensorrt.INetworkDefinition = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    if parser.parse(onnx):
        return network
    reasons = []
    for index in range(parser.num_errors):
        error: tensorrt.ParserError = parser.get_error(index)
        reasons.append(f"{error.node_operator()} {error.node_name()}: {error.desc()}".strip())
    said = " ".join("; ".join(reasons[:3]).split()) or "it gave no reason"
    raise ConversionError(f"{library.title} {trt.__version__} does not take the ONNX: {said}")


def add_profile(
    builder: tensorrt.Builder, config: tensorrt.IBuilderConfig, inputs: tuple[TensorSpec, ...], batches: Batches
) -> None:
    """A dynamic batch needs a range; a network of fixed shapes takes no profile."""
    dynamic = [spec for spec in inputs if any(not isinstance(size, int) for size in spec.shape)]
    if not dynamic:
        return
    profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
    for spec in dynamic:
        least, best, most = (
            tuple(size if isinstance(size, int) else batch for size in spec.shape) for batch in batches
        )
        profile.set_shape(spec.name, least, best, most)
    config.add_optimization_profile(profile)


def make_monitor(trt: Any, tell: Tell, who: str = "TensorRT") -> Any:
    """Tells each top phase with its steps. Ctrl-C ends the build at its next step and sets `interrupted`: an exception
    must not pass through the builder's C++ frames."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # made when the module is there
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # the binding's own __init__ must run, and super() does not reach it
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if not parent_phase:
                self.say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.steps.get(phase_name, 0)
            if total > 1:
                self.say(f"{phase_name} {step + 1}/{total}")
            return not self.interrupted  # False asks the builder to stop

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def say(self, text: str) -> None:
            try:
                tell(f"{who}: {text}")
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
