"""What is left to do on an RTX GPU: the engine that export compiled is run there; or it is compiled anew first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dualtoken_deploy.bundle.blocks import Build
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.targets.nvidia.binding import RTX
from dualtoken_deploy.targets.nvidia.builder import BuildOptions
from dualtoken_deploy.targets.nvidia.engine import ENGINE, Host, this_host
from dualtoken_deploy.targets.nvidia.network import Tell
from dualtoken_deploy.targets.tensorrt_rtx.compile import CompileOptions, EngineBuild, compile_apart, describe

FILES: tuple[str, ...] = ()  # the engine is there already
# The network is strongly typed, so its types are the ONNX's. The inspector's words for them in this library are not
# known here: no GPU has run it. What it says is shown, and nothing is held against it.
CONFIRMS = False


def host() -> Host:
    """This machine. Raises MissingError where the library or a GPU is not here."""
    return this_host(library=RTX)


def make(folder: Path, manifest: Manifest, options: BuildOptions, host: Host, rebuild: bool, tell: Tell) -> Build:
    """What the manifest says of the engine in `folder`, which with `rebuild` is compiled anew, as it was by export.

    Raises UsageError on options that are TensorRT's alone, ConversionError where it does not compile.
    """
    if replace(options, batches=BuildOptions.batches) != BuildOptions():
        raise UsageError(
            f"{RTX.title} takes --batches alone; --workspace, --optimization, --version-compatible and "
            "--hardware-compatibility are for target tensorrt"
        )
    if manifest.build is None:
        raise UsageError("the manifest does not say how the engine was compiled; export the bundle again")
    host_said = {"host": host.to_json()}
    if not rebuild:
        tell(f"running the compiled engine on {host.gpu}")
        return replace(manifest.build, details={**manifest.build.details, **host_said})
    before = manifest.build.typed(EngineBuild)
    batches = options.batches if options.batches != BuildOptions.batches else before.batches
    chosen = CompileOptions(before.compute_capabilities, before.weightless, batches)
    compiled = compile_apart((folder / "model.onnx").read_bytes(), (manifest.input.tensor,), chosen, tell)
    (folder / ENGINE).write_bytes(compiled.plan)
    made = describe(compiled, chosen)
    return replace(made, details={**manifest.build.details, **made.details, **host_said})
