"""An ONNX file as the reference that bundles made from it are held against: itself, in ONNX Runtime, in float32."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualtoken_deploy.errors import InputError, UsageError, first_line, missing_extra

DOMAINS = ("", "ai.onnx")


class OnnxReference(nn.Module):
    """Runs the file as it is: float32 NCHW in, its outputs by name out. It cannot be traced; exporters that take ONNX
    take `proto`. Its initializers are its parameters and buffers, so that they can be counted and hashed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._open(path)

    def _open(self, path: Path) -> None:
        self.path = path
        self.proto = read_onnx(path)
        self.input, self.shape = _picture_input(self.proto, path)
        self.outputs = tuple(output.name for output in self.proto.graph.output)
        self._session: Any = None
        for tensor in self.proto.graph.initializer:
            self._hold(tensor)

    def _hold(self, tensor: Any) -> None:
        import onnx

        if tensor.data_type == onnx.TensorProto.STRING:
            return
        name = "tensor:" + tensor.name.replace(".", "/")  # a dot would be a module's
        value = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        if value.is_floating_point():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(name, value)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        if image.device.type != "cpu":
            raise UsageError(f"{self.path} is run by ONNX Runtime on the CPU here, not on {image.device.type}; use cpu")
        session = self._opened()
        try:
            values = session.run(None, {self.input: image.numpy()})
        except Exception as error:  # ONNX Runtime's exceptions share no base but this
            size = "x".join(map(str, image.shape))
            raise InputError(f"{self.path} does not run on a picture of {size}: {_reason(error)}") from error
        for name, value in zip(self.outputs, values, strict=True):
            if getattr(value, "dtype", None) is None or value.dtype.kind not in "fiub":
                raise InputError(f"output {name} of {self.path} is no tensor of numbers; a bundle's are")
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}

    def _opened(self) -> Any:
        import onnxruntime as ort

        if self._session is None:
            settings = ort.SessionOptions()
            settings.log_severity_level = 4  # what is wrong is raised
            settings.intra_op_num_threads = torch.get_num_threads()  # a bench gives eager as many as the others
            try:  # by path, since weights may lie in files beside it
                self._session = ort.InferenceSession(str(self.path), settings, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's exceptions share no base but this
                raise InputError(f"ONNX Runtime {ort.__version__} takes no {self.path}: {_reason(error)}") from error
        return self._session

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxReference:
        return OnnxReference(self.path)  # a session cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle is made of: the file, and what it held."""
        content = hashlib.sha256(self.proto.SerializeToString(deterministic=True)).hexdigest()
        return {"path": self.path, "sha256": content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        self._open(state["path"])


def _reason(error: Exception) -> str:
    """What ONNX Runtime says, without codes and places in its own source; the node first, where it names one."""
    text = first_line(error).rpartition("[ONNXRuntimeError] : ")[2]
    node = re.search(r"while running (\w+) node\. Name:'([^']*)'", text)
    said = re.split(r"Status Message: (?:/\S+:\d+ )?|Load model from .* failed:", text)[-1]
    said = re.sub(r"^\d+ : \w+ : |^onnxruntime::[^ ]*\(.*?\) ", "", said)
    return f"{node[1]} {node[2]}: {said}" if node else said


def reference_inside(model: nn.Module) -> OnnxReference | None:
    """The ONNX file that a module runs, if it does."""
    return next((part for part in model.modules() if isinstance(part, OnnxReference)), None)


def read_onnx(path: Path) -> Any:
    """The checked model of a file, its weights included. Raises InputError, MissingError without onnx."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise missing_extra("export", "reading ONNX") from error
    assert onnxruntime  # noqa: S101  # runs it later
    if not path.is_file():
        raise UsageError(f"no file {path}; give an .onnx file")
    try:
        model = onnx.load(path)
        if all(output.type.tensor_type.HasField("shape") for output in model.graph.output):
            onnx.checker.check_model(str(path), full_check=True)
        else:  # not every exporter notes the shapes of outputs, which the checker asks for
            onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))
    except _unreadable() as error:
        raise InputError(f"{path} is no whole ONNX model ({first_line(error)}); export or copy it again") from error
    return model


def _unreadable() -> tuple[type[Exception], ...]:
    import onnx
    from google.protobuf.message import DecodeError

    return DecodeError, OSError, ValueError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError


def _picture_input(model: Any, path: Path) -> tuple[str, tuple[int | None, ...]]:
    """Name and shape (None: dynamic) of the one input. Raises InputError where it is no float32 picture NCHW."""
    import onnx

    weights = {t.name for t in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise InputError(f"{path} has {len(inputs)} inputs ({names}), and a bundle takes one picture")
    tensor = inputs[0].type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    if tensor.elem_type != onnx.TensorProto.FLOAT or len(dims) != 4 or dims[1] not in (3, None):
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        said = "x".join("?" if d is None else str(d) for d in dims)
        raise InputError(
            f"input {inputs[0].name} of {path} is {dtype} {said}, and a picture is float32 (batch, 3, H, W)"
        )
    if dims[0] not in (None, 1):
        raise InputError(f"{path} takes {dims[0]} pictures at once; export it for one, or for any number")
    return inputs[0].name, dims
