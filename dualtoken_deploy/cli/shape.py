"""What every command has beside its own options: -q and -v, an example, and its options in panels by subject."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, get_args

import typer

from dualtoken_deploy.cli.progress import MANNERS

GENERAL = "General"
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Results and errors alone: no progress, no notes.", rich_help_panel=GENERAL),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Let libraries speak, and show where an error is from.",
        rich_help_panel=GENERAL,
    ),
]

# The panel of an option by the name of its parameter; the others stay under "Options".
PANELS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("variant", "head", "weights", "labels", "image_size", "classes", "option", "seed", "licenses"), "Model"
        ),
        **dict.fromkeys(("width", "suppress", "argmax"), "Detectors and segmenters"),
        **dict.fromkeys(
            ("model", "model_arg", "output_names", "preprocess", "mean", "std", "crop_ratio", "resize"),
            "A model of your own",
        ),
        **dict.fromkeys(
            (
                *("calibration", "calibration_size", "calibrator", "max_drop", "metric", "quantizer"),
                *("search_seconds", "max_slowdown", "no_race"),
            ),
            "INT8",
        ),
        **dict.fromkeys(
            ("min_agreement", "min_top1", "min_sqnr", "min_ap", "min_miou", "minimum"), "Minima, exit 5 below"
        ),
        **dict.fromkeys(
            ("deployment_target", "layout", "backend", "compute_capability", "weightless", "batches", "opset"),
            "One target's own",
        ),
        **dict.fromkeys(("device", "threads", "allow_native", "on"), "Running"),
        **dict.fromkeys(("json_output",), GENERAL),
    }
)
OWN_PANELS = (
    *(
        "export",
        "train",
        "validate",
        "evaluate",
        "inspect",
        "bench",
        "compare",
        "diagnose",
        "predict",
        "build",
        "verify",
    ),
    "report",
)

# One that works for each command, the first of them after `make demo`.
EXAMPLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "models": ("dualtoken models", "dualtoken models --heads"),
        "targets": ("dualtoken targets",),
        "train": ("dualtoken train --variant t-mix --data shapes --epochs 30 --batch-size 32 --output runs/first",),
        "export": (
            "dualtoken export --variant t-mix --weights digits --target onnxruntime",
            "dualtoken export --model net.py:make --labels names.txt --target onnxruntime --target openvino",
            "dualtoken export --lock bundles/t-mix-digits-onnxruntime-fp32/manifest.json --output again",
        ),
        "build": ("dualtoken build bundles/s-tensorrt-fp16",),
        "validate": ("dualtoken validate bundles/t-mix-digits-onnxruntime-int8 --data digits --min-agreement 0.95",),
        "evaluate": ("dualtoken evaluate bundles/t-mix-digits-onnxruntime-int8 --data digits",),
        "inspect": ("dualtoken inspect bundles/t-mix-digits-onnxruntime-int8",),
        "bench": ("dualtoken bench bundles/t-mix-digits-onnxruntime-int8 --against eager",),
        "compare": (
            "dualtoken compare bundles/t-mix-digits-onnxruntime-* --data digits",
            "dualtoken compare bundles/t-mix-digits-onnxruntime-* --data digits --on jetson --on pi",
        ),
        "diagnose": ("dualtoken diagnose bundles/t-mix-digits-onnxruntime-int8",),
        "predict": ("dualtoken predict bundles/efficientnet-lite0-onnxruntime-fp32 photo.jpg",),
        "label": ("dualtoken label bundles/t-mix-digits-onnxruntime-int8 names.txt",),
        "visualize": ("dualtoken visualize shapes photo.jpg --output tokens.png",),
        "serve": ("dualtoken serve bundles/efficientnet-lite0-onnxruntime-fp32",),
        "verify": (
            "dualtoken verify bundles/t-mix-digits-onnxruntime-int8 --baseline ci/digits.json --data digits --update",
            "dualtoken verify bundles/t-mix-digits-onnxruntime-int8 --baseline ci/digits.json",
        ),
        "report": ("dualtoken report bundles/t-mix-digits-onnxruntime-int8 --data digits --html report.html",),
        "card": (
            "dualtoken card bundles/t-mix-digits-onnxruntime-int8 --data digits",
            "dualtoken card bundles/make-onnxruntime-fp32 --license weights=CC-BY-4.0 --license code=MIT",
        ),
        "sign": ("dualtoken sign bundles/t-mix-digits-onnxruntime-int8 --key key.pem",),
        "push": ("dualtoken push bundles/t-mix-digits-onnxruntime-int8 hf://ORG/digits",),
        "pull": ("dualtoken pull hf://ORG/digits --output bundles/digits",),
        "run": ("dualtoken run recipe.toml --dry-run", "dualtoken run recipe.toml"),
        "reproduce": ("dualtoken reproduce bundles/t-mix-digits-onnxruntime-int8",),
        "doctor": ("dualtoken doctor",),
        "devices": ("dualtoken devices",),
        "cache": ("dualtoken cache", "dualtoken cache --clear"),
    }
)


def shaped(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with -q and -v, and its options in their panels."""
    signature = inspect.signature(command, eval_str=True)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    if command.__name__ in OWN_PANELS:
        for name, parameter in signature.parameters.items():
            for info in get_args(parameter.annotation):
                if isinstance(info, typer.models.OptionInfo) and name in PANELS:
                    info.rich_help_panel = PANELS[name]

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool = False, verbose: bool = False, **named: Any) -> Any:
        MANNERS.quiet, MANNERS.verbose = MANNERS.quiet or quiet, MANNERS.verbose or verbose
        return command(*arguments, **named)

    parameters = [*signature.parameters.values(), *extra]
    order = sorted(parameters, key=lambda p: p.kind)
    run.__signature__ = signature.replace(parameters=order)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in order} | {"return": None}
    return run


def epilog(name: str) -> str:
    """The examples of a command, a paragraph each."""
    lines = EXAMPLES[name]
    return "\n\n".join([f"{'Example' if len(lines) == 1 else 'Examples'}: {lines[0]}", *lines[1:]])
