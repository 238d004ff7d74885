"""DualToken-ViT from PyTorch to a verified bundle for every target.

    from dualtoken_deploy import Classifier, Detector, Segmenter
    from dualtoken_deploy import create_model, export, Bundle, load_runner, validate
    from dualtoken_deploy.bench import bench

Names load on first use, so that a device without torch can import what it has.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.store import Bundle
    from dualtoken_deploy.models.heads.table import create_dense_model
    from dualtoken_deploy.models.registry import create_model
    from dualtoken_deploy.pipeline.export import export
    from dualtoken_deploy.targets.load import load_runner
    from dualtoken_deploy.use.inspect import inspect_bundle
    from dualtoken_deploy.use.model import Classifier, Detector, Segmenter
    from dualtoken_deploy.use.predict import predict
    from dualtoken_deploy.use.validate import validate

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "bundle",
    "Classifier": "use.model",
    "Detector": "use.model",
    "Segmenter": "use.model",
    "create_dense_model": "models.heads.table",
    "create_model": "models.registry",
    "export": "pipeline.export",
    "inspect_bundle": "use.inspect",
    "load_runner": "targets.load",
    "predict": "use.predict",
    "validate": "use.validate",
}

__all__ = [
    "Bundle",
    "Classifier",
    "Detector",
    "Segmenter",
    "__version__",
    "create_dense_model",
    "create_model",
    "export",
    "inspect_bundle",
    "load_runner",
    "predict",
    "validate",
]


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
