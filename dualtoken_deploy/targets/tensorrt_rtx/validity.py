"""Whether an engine of TensorRT for RTX will load here: the library is asked, and reads the header alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.targets.nvidia.binding import RTX, complaint, make_logger

if TYPE_CHECKING:
    import tensorrt

# EngineInvalidityDiagnostics, one bit each.
REASONS = {
    "VERSION_MISMATCH": "it was compiled by another version of TensorRT for RTX than the {version} here",
    "UNSUPPORTED_CC": "it has no code for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "its header is not that of an engine",
    "CUDA_ERROR": "CUDA does not work here",
}
MALFORMED = "MALFORMED_ENGINE"


def diagnose(trt: Any, header: bytes) -> tuple[tuple[str, ...], str]:
    """Names of EngineInvalidityDiagnostics that keep an engine from loading, and "valid", "suboptimal" or "invalid".

    Without a driver the library answers "invalid" with no bit set and logs why: that reason is then the only name.
    """
    logger = make_logger(trt)
    runtime: tensorrt.Runtime = trt.Runtime(logger)
    verdict, bits = runtime.get_engine_validity(header)
    names = tuple(name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(bits) & int(bit))
    if verdict == trt.EngineValidity.INVALID and not names:
        names = (complaint(logger),)
    return names, verdict.name.lower()


def read_header(trt: Any, path: Path) -> bytes:
    """As much of an engine's file as the library wants to see."""
    runtime: tensorrt.Runtime = trt.Runtime(make_logger(trt))
    with path.open("rb") as file:
        return file.read(int(runtime.engine_header_size))


def malformed(trt: Any, plan: bytes) -> bool:
    """Whether these bytes do not begin as an engine does. Needs no driver."""
    return MALFORMED in diagnose(trt, plan)[0]


def in_words(trt: Any, names: tuple[str, ...]) -> str:
    """The reasons as one phrase."""
    return "; ".join(REASONS.get(name, name).format(version=trt.__version__) for name in names) or RTX.title
