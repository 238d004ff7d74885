"""DualToken-ViT from PyTorch to a verified bundle for every target.

    from dualtoken_deploy import create_model, export, Bundle, load_runner, validate, bench

Names load on first use, so that a device without torch can import what it has. Some of them are also names of the
modules they live in: `from dualtoken_deploy import bench` gives the function, `from dualtoken_deploy.bench import ...`
what else the module has.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualtoken_deploy.bench import bench
    from dualtoken_deploy.bundle import Bundle
    from dualtoken_deploy.inspection import inspect_bundle
    from dualtoken_deploy.models.heads.registry import create_dense_model
    from dualtoken_deploy.models.registry import create_model
    from dualtoken_deploy.pipeline import export
    from dualtoken_deploy.pipeline_dense import export_dense
    from dualtoken_deploy.predict import predict
    from dualtoken_deploy.predict_dense import predict_dense
    from dualtoken_deploy.runtimes import load_runner
    from dualtoken_deploy.validate import validate
    from dualtoken_deploy.validate_dense import validate_dense

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundle",
    "bench": "bench",
    "create_dense_model": "models.heads.registry",
    "create_model": "models.registry",
    "export": "pipeline",
    "export_dense": "pipeline_dense",
    "inspect_bundle": "inspection",
    "load_runner": "runtimes",
    "predict": "predict",
    "predict_dense": "predict_dense",
    "validate": "validate",
    "validate_dense": "validate_dense",
}

__all__ = [
    "Bundle",
    "__version__",
    "bench",
    "create_dense_model",
    "create_model",
    "export",
    "export_dense",
    "inspect_bundle",
    "load_runner",
    "predict",
    "predict_dense",
    "validate",
    "validate_dense",
]


class _Package(ModuleType):
    """The import system sets an imported submodule on its package; it must not take a public function's name there."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dualtoken_deploy.errors import missing_extra

    try:
        module = importlib.import_module(f"dualtoken_deploy.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dualtoken_deploy"):
            raise
        raise missing_extra("export", f"dualtoken_deploy.{name}") from error
    return getattr(module, name)
