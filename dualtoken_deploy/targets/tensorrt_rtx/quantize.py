"""INT8 for TensorRT for RTX: TensorRT's own. FP8 and INT4 have files of their own: fp8.py, int4.py."""

from dualtoken_deploy.targets.tensorrt.quantize import prepare

__all__ = ["prepare"]
