"""What coremltools is taught: passes that register themselves once, when a conversion first needs them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def pipeline() -> Any:
    """coremltools' default pipeline, and one pass behind it.

    The names and dtypes asked for of the outputs have been given by then. Left in place they would make its exporter
    fail on a classifier with a second output: it counts label and probabilities as one of them.
    """
    import coremltools as ct
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace="dualtoken")
    class forget_output_types(AbstractGraphPass):  # type: ignore[misc]  # noqa: N801 (the registry takes its name)
        def apply(self, prog: Any) -> None:
            prog.functions["main"].output_types = None

    passes = ct.PassPipeline()
    passes.append_pass("dualtoken::forget_output_types")
    return passes
