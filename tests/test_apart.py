"""Steps in a process of their own: what comes back from them, and that their end is not ours."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dualtoken_deploy.errors import ConversionError, MissingError
from dualtoken_deploy.targets.apart import run_apart

Tell = Callable[[str], None]


@pytest.fixture(autouse=True)
def tests_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, where the functions below are looked up by their names."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]), prepend=os.pathsep)


def doubles(number: int, tell: Tell) -> int:
    print("a library that prints to stdout")
    tell("half\nway")
    return 2 * number


def misses(tell: Tell) -> None:
    raise MissingError("no library here")


def stumbles(tell: Tell) -> None:
    raise ValueError("of the vendor's")


def falls(number: int, tell: Tell) -> None:
    os.write(2, b"the builder's last words\n")
    os.kill(os.getpid(), number)


def lasts(tell: Tell) -> None:
    tell(str(os.getpid()))
    signal.pause()


def apart(function: Callable[..., object], *arguments: object, tell: Tell = lambda _: None) -> object:
    return run_apart(function, *arguments, tell=tell, what="The builder", mend="take another")


def test_the_result_and_the_progress_come_back() -> None:
    said: list[str] = []
    assert apart(doubles, 21, tell=said.append) == 42
    assert said == ["half way"]


def test_its_own_error_stays_what_it_is() -> None:
    with pytest.raises(MissingError, match=r"^no library here$"):
        apart(misses)


def test_any_other_error_is_a_failed_conversion() -> None:
    with pytest.raises(ConversionError) as error:
        apart(stumbles)
    assert str(error.value) == (
        "The builder ended with code 1 (its last line: ValueError: of the vendor's); take another"
    )


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL; is there enough memory?")]
)
def test_a_process_that_falls_is_an_error_with_a_reason(number: signal.Signals, said: str) -> None:
    with pytest.raises(ConversionError) as error:
        apart(falls, int(number))
    assert str(error.value) == (
        f"The builder was killed by {said} (its last line: the builder's last words); take another"
    )


def test_an_interrupt_here_ends_it_there() -> None:
    begun: list[int] = []

    def interrupt(text: str) -> None:
        begun.append(int(text))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(lasts, tell=interrupt)
    assert begun
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)


def test_a_builder_that_falls_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder of TensorRT for RTX 1.7 does, on some networks in INT4."""
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    from dualtoken_deploy import export
    from tests.small import SMALL

    monkeypatch.setattr("dualtoken_deploy.targets.tensorrt_rtx.compile.compile_engine", falls_as_builder)
    with pytest.raises(ConversionError, match=r"its builder was killed by SIGSEGV.*take another --precision"):
        export(target="tensorrt-rtx", precision="fp16", output=tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def falls_as_builder(onnx: bytes, inputs: object, options: object, tell: Tell) -> None:
    falls(int(signal.SIGSEGV), tell)
