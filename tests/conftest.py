"""Fixtures that cost time are made once a session: each bundle below is exported once and only read afterwards.

What imports torch is imported inside of them: the process that only hands out tests reads this file as well.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from dualtoken_deploy.targets.litert import environment
from dualtoken_deploy.targets.table import TARGETS

# Begun first, the longest in front: what comes last is short, and no process waits long for another.
LONG = (
    *("export", "coreml", "bench", "efficientnet", "executorch_int8", "coreai", "lightvit", "dense_bundles"),
    *("foreign_models", "quantize", "tensorrt", "tokenizer", "aotinductor", "litert", "deploy", "vim2", "recipe"),
    "executorch",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For --no-loadscope-reorder, which hands files out in this order and not by their number of tests."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def tiny_variant() -> Iterator[None]:
    """Makes the small variants known to this process; tests that start another use a real variant."""
    from dualtoken_deploy.models import registry
    from tests.small import make_known

    real = registry.VARIANTS
    make_known()
    yield
    registry.VARIANTS = real


@pytest.fixture(scope="module", autouse=True)
def old_objects_stay() -> None:
    """What files of tests before this one and its own imports left is not looked at again by the garbage collector: a
    whole look at millions of objects takes a second and a half, a twelfth of the time of all tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionstart() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun in a shell's background; what tests start inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        for name in [name for name in os.environ if name.startswith("MALLOC_")]:
            del os.environ[name]  # of this process, see the Makefile, and not of those that tests start


def pytest_sessionfinish() -> None:
    gc.freeze()  # pytest looks five times more
    atexit.register(gc.unfreeze)  # or extension modules tell of what is left of them; behind pytest's last looks


@pytest.fixture(scope="session")
def for_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the test processes share: xdist's workers have folders of their own in one."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def shared_traces(for_all_workers: Path) -> Iterator[None]:
    """See tests/traces.py."""
    from tests.traces import replacements

    folder = for_all_workers / "traces"
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, shared in replacements(folder):
            patch.setattr(owner, name, shared)
        yield


@pytest.fixture(scope="session")
def litert_converter() -> Path:
    """The Python of LiteRT's converter; its environment is made here where `make test` has not made it."""
    return environment.make()


@pytest.fixture(scope="session")
def bundle_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def once(for_all_workers: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make) -> a folder that the first of all test processes that asks for it makes; read only."""
    store = for_all_workers / "made"
    store.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(store / f"{name}.lock"):
            if not (store / name).exists():
                make(store / name)
        return store / name

    return made


@pytest.fixture(scope="session")
def small_bundle(once: Callable[[str, Callable[[Path], object]], Path], tiny_variant: None) -> Callable[..., Path]:
    """small_bundle(target, precision, **export options) -> the folder of a bundle of the small model; read only."""
    from dualtoken_deploy import export
    from tests.small import SMALL

    def make(target: str = "onnxruntime", precision: str = "fp32", **options: object) -> Path:
        name = "-".join([target, precision, *(f"{k}_{v}" for k, v in sorted(options.items()))])
        arguments: dict[str, Any] = {"target": target, "precision": precision, **SMALL, **options}
        return once(name, lambda folder: export(output=folder, **arguments))

    return make


@pytest.fixture(scope="session")
def dense_bundle(once: Callable[[str, Callable[[Path], object]], Path], tiny_variant: None) -> Callable[..., Path]:
    """dense_bundle(head, target, precision, **options) -> a small dense bundle that knows the scenes' classes."""
    from dualtoken_deploy import export
    from dualtoken_deploy.data.scenes import CLASSES, CLUTTER
    from tests.small import TINY

    def make(head: str, target: str = "onnxruntime", precision: str = "fp32", **options: object) -> Path:
        name = "-".join([head, target, precision, *(f"{k}_{v}" for k, v in sorted(options.items()))])
        names = CLASSES if head in ("retinanet", "mask-rcnn") else (CLUTTER, *CLASSES)
        given: dict[str, Any] = {"variant": TINY.name, "image_size": (64, 96), "width": 16, "labels": names, **options}
        return once(name, lambda folder: export(None, target, precision, output=folder, head=head, **given))

    return make


@pytest.fixture
def own_bundle(small_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the small ONNX Runtime bundle that a test may damage."""
    copy = tmp_path / "bundle"
    shutil.copytree(small_bundle(), copy)
    return copy


@pytest.fixture(scope="session")
def photograph() -> Path:
    from dualtoken_deploy.data.folders import open_dataset

    return open_dataset("photographs").images[0]


@pytest.fixture(scope="session")
def s_bundle(once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """s_bundle(target) -> the real S at 224, fp32: where the size matters."""
    from dualtoken_deploy import export

    return lambda target: once(f"s-{target}", lambda folder: export("s", target, output=folder))


# those that run quickly here; the others have test files of their own
SLOW = ("litert", "executorch", "ncnn")  # whose converters take ten times as long as ONNX's
PORTABLE = [t.name for t in TARGETS.values() if t.portable and t.check_images is None and t.name not in SLOW]
ROWS = [
    (name, precision) for name in PORTABLE for precision in ("fp32", "fp16") if precision in TARGETS[name].precisions
]
