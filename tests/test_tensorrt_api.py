"""Every TensorRT name, enum member and call in our source exists in the recorded API of 10.3, 10.16 and 11.4, and in
the library of TensorRT for RTX that is installed here."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dualtoken_deploy
from tests.tensorrt_api import RTX, VERSIONS, Checker, Signature, load_api, parse_signature

TARGETS = Path(dualtoken_deploy.__file__).parent / "targets"
# what both libraries run, then what is one library's alone
SHARED = sorted(p for p in (TARGETS / "nvidia").glob("*.py") if p.name != "builder.py")
OWN = {
    **{v: [TARGETS / "nvidia" / "builder.py", *sorted((TARGETS / "tensorrt").glob("*.py"))] for v in VERSIONS},
    RTX: sorted((TARGETS / "tensorrt_rtx").glob("*.py")),
}

# Taken through getattr with a default: these may be missing in some versions, but not in all.
OPTIONAL = {"HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"}


def sources(library: str = VERSIONS[-1]) -> list[Path]:
    """Modules that touch a library: they have the name `trt` or `tensorrt`. All such modules are in one of the rows."""
    found = []
    for path in (*SHARED, *OWN[library]):
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        if names & {"trt", "tensorrt"}:
            found.append(path)
    return found


def test_no_module_escapes_the_check() -> None:
    known = {p for library in OWN for p in (*SHARED, *OWN[library])}
    for path in set(TARGETS.parent.rglob("*.py")) - known:
        tree = list(ast.walk(ast.parse(path.read_text())))
        assert not any(isinstance(n, ast.Name) and n.id == "trt" for n in tree), path
        assert not any(isinstance(n, ast.Import) and n.names[0].name == "tensorrt" for n in tree), path


def test_the_recorded_versions_are_those_we_promise() -> None:
    assert all(load_api(v).version.startswith(v) for v in VERSIONS)
    assert len(sources()) >= 4


# What only a checker that really follows types can have seen, in each of the files.
SEEN_IN_BOTH = {
    "Builder.create_network",
    "OnnxParser.parse",
    "ParserError.desc",
    "IOptimizationProfile.set_shape",
    "IProgressMonitor.step_complete",
    "ILogger.log",
    "EngineInspector.get_engine_information",
    "ICudaEngine.get_tensor_profile_shape",
    "IExecutionContext.execute_async_v3",
}
SEEN = {
    **dict.fromkeys(
        VERSIONS,
        frozenset(
            {
                "IBuilderConfig.hardware_compatibility_level",
                "ITimingCache.serialize",
                "BuilderFlag.VERSION_COMPATIBLE",
            }
        ),
    ),
    RTX: {
        "IBuilderConfig.set_compute_capability",
        "BuilderFlag.REQUIRE_USER_ALLOCATION",
        "Runtime.get_engine_validity",
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.deserialize",
        "IExecutionContext.is_stream_capturable",
        "OnnxParserRefitter.refit_from_bytes",
        "Refitter.refit_cuda_engine",
        "ILayer.metadata",
    },
}


@pytest.mark.parametrize("version", OWN)
def test_every_use_exists(version: str) -> None:
    problems, uses = [], set()
    for path in sources(version):
        checker = Checker(load_api(version)).check(path.read_text())
        problems += [f"{path.name} {p}" for p in checker.problems]
        uses |= checker.uses
    assert problems == []
    assert SEEN_IN_BOTH | SEEN[version] <= uses


def test_what_11_removed_is_not_used() -> None:
    """Everything that 10.3 has and 11.4 lacks stays away, by construction of the test above; here by name."""
    text = "".join(p.read_text() for p in sources())
    for name in (
        "BuilderFlag.FP16",
        "BuilderFlag.INT8",
        "EXPLICIT_BATCH",
        "int8_calibrator",
        "execute_v2",
        "num_bindings",
    ):
        assert name not in text


def test_optional_members_exist_somewhere() -> None:
    for name in OPTIONAL:
        owner, _, member = name.partition(".")
        present = [v for v in VERSIONS if member in (load_api(v).enum(owner) or [])]
        assert present
        assert len(present) < len(VERSIONS), f"{name} is everywhere: use it without getattr"
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "getattr"
                and "trt." in ast.unparse(node.args[0])
            ):
                found.add(f"{ast.unparse(node.args[0]).removeprefix('trt.')}.{ast.literal_eval(node.args[1])}")
    assert found == OPTIONAL


WRONG = [
    ("trt.BuilderFlag.FP16", {"11.4.0"}),
    ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", {"11.4.0"}),
    ("trt.IInt8EntropyCalibrator2", {"11.4.0"}),
    ("trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", {"10.3.0"}),
    ("trt.Nonsense", set(VERSIONS)),
    ("config.set_flag()", set(VERSIONS)),
    ("config.set_flag(1, 2)", set(VERSIONS)),
    ("config.set_timing_cache(1, ignore=False)", set(VERSIONS)),
    ("config.max_workspace_size", set(VERSIONS)),
    ("config.int8_calibrator", {"11.4.0"}),
    ("builder.platform_has_fast_fp16", {"11.4.0"}),
    ("builder.build_cuda_engine(1)", set(VERSIONS)),
    ("builder.create_builder_config().max_workspace_size", set(VERSIONS)),
    ("anything.create_execution_context()", set(VERSIONS)),
    ("trt.Builder()", set(VERSIONS)),
    ("trt.Builder(1)", set()),
    ("config.set_flag(trt.BuilderFlag.TF32)", set()),
    ("config.set_timing_cache(1, ignore_mismatch=False)", set()),
]


@pytest.mark.parametrize(("use", "lacking"), WRONG, ids=[w[0] for w in WRONG])
def test_the_checker_sees_a_use_that_is_wrong(use: str, lacking: set[str]) -> None:
    source = (
        f"def f(trt, anything, builder: tensorrt.Builder):\n    config = builder.create_builder_config()\n    {use}\n"
    )
    assert {v for v in VERSIONS if Checker(load_api(v)).check(source).problems} == lacking


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("def log(self, severity, msg): pass", False),
        ("def log(self, severity): pass", True),
        ("def write(self): pass", True),
    ],
)
def test_the_checker_sees_an_override_that_is_wrong(body: str, problem: bool) -> None:
    source = f"class Mine(trt.ILogger):\n    {body}\n"
    assert bool(Checker(load_api("11.4.0")).check(source).problems) == problem


def test_signatures_are_read() -> None:
    text = "2. f(self: C, name: str, strategy: E = <E.STATIC: 0>) -> nvonnxparser::IParserError"
    signature = parse_signature(text)
    assert signature == Signature(("name", "strategy"), ("name",), "IParserError")
    assert signature.accepts(1, ())
    assert signature.accepts(0, ("name",))
    assert not signature.accepts(0, ("strategy",))
    assert not signature.accepts(3, ())
    for version in VERSIONS:  # all of them parse
        api = load_api(version)
        for owner, entry in api.names.items():
            for member in entry.get("members", {}):
                api.signatures(owner, member)


def test_cuda_calls_exist_and_take_what_we_give() -> None:
    """cuda-python's bindings are installed here, without a GPU: every call in our module against their signatures."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="the extra [tensorrt] is not installed")
    tree = ast.parse((TARGETS / "nvidia" / "cuda.py").read_text())
    calls = [
        n for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr.startswith("cuda")
    ]  # fmt: skip
    assert len(calls) >= 15
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        function = getattr(runtime, call.func.attr)
        documented = (function.__doc__ or "").splitlines()[0]  # "cudaMalloc(size_t size)"
        assert documented.startswith(call.func.attr)
        inside = documented[documented.index("(") + 1 : documented.rindex(")")]
        assert len(call.args) == len([p for p in inside.split(",") if p.strip()]), documented
    enums = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Attribute)]
    named = [e for e in enums if isinstance(e.value, ast.Attribute) and e.value.attr.startswith("cuda")]
    assert len(named) >= 3
    for e in named:
        assert isinstance(e.value, ast.Attribute)
        assert hasattr(getattr(runtime, e.value.attr), e.attr)
    properties = inspect.getattr_static(runtime, "cudaDeviceProp")
    assert {"name", "major", "minor", "multiProcessorCount", "totalGlobalMem"} <= set(dir(properties))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_real_bindings_are_what_was_recorded(version: str, tmp_path: Path) -> None:
    """The wheel itself, on stub libraries: the record is true, and our logger and monitor are classes of its kind."""
    command = [sys.executable, str(Path(__file__).parent / "real_tensorrt.py"), version, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(f"the bindings of TensorRT {version} cannot be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    real = json.loads(done.stdout)
    api = load_api(version)
    assert real["version"] == api.version
    for name, entry in api.names.items():
        if "enum" in entry:
            assert real["names"][name] == entry["enum"], name
        for member, recorded in entry.get("members", {}).items():
            assert member in real["names"][name], f"{name}.{member}"
            documented = re.sub(r"tensorrt_bindings\.tensorrt\.", "", real["names"][name][member])
            # newer Pythons than the record's 3.11 have these themselves
            newer = r"(?:collections\.abc|types)\.(Buffer|CapsuleType)\b"
            documented = re.sub(newer, r"typing_extensions.\1", documented)
            for signature in recorded if isinstance(recorded, list) else ():
                assert signature in documented, f"{name}.{member}"
    assert (real["is_logger"], real["logged"]) == (True, ["wrong"])
    assert (real["is_monitor"], real["going"]) == (True, True)
    assert real["told"] == ["TensorRT: Building", "TensorRT: Building 2/4"]
