"""What takes a program apart for each backend, by ExecuTorch's own partitioners: contexts to lower a program in."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dualtoken_deploy.targets.coreml.mil.vendor import coremltools
from dualtoken_deploy.targets.coreml.package import settle
from dualtoken_deploy.targets.coreml.passes import teach
from dualtoken_deploy.targets.executorch.backends import XNNPACK
from dualtoken_deploy.targets.executorch.brief import brief, trace_patterns_once
from dualtoken_deploy.targets.table import DEPLOYMENT_TARGETS
from dualtoken_deploy.targets.tracing import replaced

_DEBUG = ("debug_info.json", "model.mlpackage/executorch_debug_handle_mapping.json")  # with names of the tracer


@contextlib.contextmanager
def _xnnpack(_precision: str) -> Iterator[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    with brief():
        yield XnnpackPartitioner()


@contextlib.contextmanager
def _vulkan(precision: str) -> Iterator[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    trace_patterns_once()
    with brief():
        yield VulkanPartitioner({"force_fp16": precision == "fp16"})


@contextlib.contextmanager
def _coreml(precision: str) -> Iterator[Any]:
    """Inside, packages are settled before they go into the file. Not in brief: reshapes would be kept, which fail."""
    ct = coremltools("lowering to Core ML")
    teach()  # as --target coreml does, which may have been first in this process
    from executorch.backends.apple.coreml.compiler import CoreMLBackend, coreml_preprocess
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner, coreml_partitioner

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=getattr(ct.target, DEPLOYMENT_TARGETS[0]),
        compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
    )
    with (
        replaced(coreml_preprocess.executorchcoreml, "flatten_directory_contents", _settled),
        replaced(coreml_partitioner._OperatorsSupportedForCoreMLBackend, "is_node_supported", _but_pixels),
    ):
        yield CoreMLPartitioner(compile_specs=specs)


def _but_pixels(supported: Callable[..., bool]) -> Callable[..., bool]:
    """What Core ML takes, but what reads bytes, as the first cast of a picture does: its arrays have no uint8."""

    def takes(own: Any, modules: Any, node: Any) -> bool:
        bytes_read = any(
            str(getattr(read.meta.get("val"), "dtype", "")) == "torch.uint8" for read in node.all_input_nodes
        )
        return not bytes_read and supported(own, modules, node)

    return takes


def _settled(flatten: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """The same bytes for the same model: without dates and random names. Core ML keeps what it compiled under the
    identifier, so that is made of the content."""

    def flattened(folder: str) -> bytes:
        settle(Path(folder) / "model.mlpackage")
        for name in _DEBUG:
            (Path(folder) / name).unlink(missing_ok=True)
        said = Path(folder) / "metadata.json"
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path != said)
        content = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)
        found = json.loads(said.read_text(encoding="utf-8")) | {
            "identifier": f"executorch_{hashlib.sha256(content).hexdigest()[:32]}"
        }
        said.write_text(json.dumps(found), encoding="utf-8")
        return flatten(folder)

    return flattened


PARTITIONERS: Mapping[str, Callable[[str], AbstractContextManager[Any]]] = MappingProxyType(
    {XNNPACK: _xnnpack, "coreml": _coreml, "vulkan": _vulkan}
)
