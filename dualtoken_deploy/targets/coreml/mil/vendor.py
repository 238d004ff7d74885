"""coremltools without its chatter: it warns of every module that only macOS has, each time it is imported."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from dualtoken_deploy.errors import missing_extra


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps coremltools' warnings and progress bars off the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def coremltools(why: str) -> Any:
    """The module. Raises MissingError that names the extra where it is not installed."""
    try:
        with quiet():
            import coremltools
    except ImportError as error:
        raise missing_extra("coreml", why) from error
    return coremltools


def model_proto(why: str) -> Any:
    """The generated protobuf module of Core ML's model format."""
    coremltools(why)
    from coremltools.proto import Model_pb2

    return Model_pb2
