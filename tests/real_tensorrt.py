"""A small environment with the real TensorRT bindings and no TensorRT: `python tests/real_tensorrt.py 10.3.0 DIR`.

The bindings' wheel is 1 MB and links to nine C functions of three libraries that are not on PyPI. Libraries of that
name, whose functions return nothing, let the module import on a machine without a GPU; classes, enums and signatures
are then the real ones, and making a builder fails. Prints the report of `probe` as JSON. Exits with 3 and the reason on
stderr where the wheel or a C compiler cannot be had.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

WHEELS = {"10.3.0": "10.3.0", "10.16.1": "10.16.1.11", "11.4.0": "11.4.0.106"}
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


class UnavailableError(Exception):
    """The wheel or the compiler is not to be had."""


def make(version: str, folder: Path) -> dict[str, str]:
    """Installs the wheel and compiles the libraries into `folder`; the environment variables that a process needs."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UnavailableError("no C compiler (cc or gcc) for the stub libraries")
    site, libraries = folder / "site", folder / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    wheel = f"tensorrt-cu12-bindings=={WHEELS[version]}"
    done = subprocess.run([*command, "--target", str(site), wheel], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"pip cannot install {wheel}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    for library in LIBRARIES:
        target = libraries / f"lib{library}.so.{version.partition('.')[0]}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", target], input=source, text=True, check=True
        )
    path = os.pathsep.join([str(site), str(Path(__file__).parent.parent)])
    return {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": path}


def probe() -> dict[str, Any]:
    """Run inside that environment: what the module has, and our own classes on top of it at work."""
    import tensorrt_bindings as trt  # type: ignore[import-not-found]

    from dualtoken_deploy.targets.nvidia.binding import make_logger
    from dualtoken_deploy.targets.nvidia.network import make_monitor

    names: dict[str, Any] = {}
    for name in dir(trt):
        value = getattr(trt, name)
        if isinstance(value, type):
            members = {m: (getattr(value, m).__doc__ or "") for m in dir(value) if m == "__init__" or m[0] != "_"}
            names[name] = sorted(getattr(value, "__members__", [])) or members
    logger = make_logger(trt)
    logger.log(trt.ILogger.ERROR, "wrong")
    logger.log(trt.ILogger.WARNING, "odd")
    told: list[str] = []
    monitor = make_monitor(trt, told.append)
    monitor.phase_start("Building", None, 4)
    going = monitor.step_complete("Building", 1)
    monitor.phase_finish("Building")
    return {
        "version": trt.__version__,
        "names": names,
        "logged": logger.errors,
        "is_logger": isinstance(logger, trt.ILogger),
        "told": told,
        "going": going,
        "is_monitor": isinstance(monitor, trt.IProgressMonitor),
    }


def main() -> None:
    if sys.argv[1:] == ["--probe"]:
        print(json.dumps(probe()))
        return
    try:
        environment = make(sys.argv[1], Path(sys.argv[2]))
    except UnavailableError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    command = [sys.executable, __file__, "--probe"]
    sys.exit(subprocess.run(command, env={**os.environ, **environment}, check=False).returncode)


if __name__ == "__main__":
    main()
