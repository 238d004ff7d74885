"""INT8 for TensorRT for RTX: the Q/DQ graph that TensorRT takes."""

from __future__ import annotations

from dualtoken_deploy.targets.tensorrt.quantize import prepare

__all__ = ["prepare"]
