"""Reports of `verify`: a baseline that a person kept, against itself."""

from __future__ import annotations

import json
from contextlib import suppress

from hypothesis import strategies as st

from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.prove.measure import Report
from dualtoken_deploy.prove.tolerances import Tolerances
from dualtoken_deploy.prove.verify import check_same, check_setting, compare
from tests.fuzz.inputs import edited, other_values
from tests.fuzz.place import filed

TOKENS = [b"null", b"-1", b"1e999", b"NaN", b"{}", b"[]", b'"\\ud800"', b"[" * 2000, b"9" * 400, b"true", b'"x":1,']
REPORT = {
    "subject": {
        "model": "t-mix", "task": "classify", "target": "onnxruntime", "precision": "fp32",
        "input": "image uint8 1x224x224x3", "outputs": ["logits float32 1x10"],
    },
    "setting": {"data": "digits", "limit": 40},
    "images": 40,
    "figures": {"sqnr_db": 121.5, "top1": 0.975, "size_mib": 21.4},
    "executed": {"Conv": "float32", "MatMul": "float32"},
    "latency": {"yardstick": "gemm limit", "ratio": 0.4, "low": 0.38, "high": 0.43, "p50_ms": 9.9},
    "machine": {"cpu": "a CPU", "cores": 2},
    "schema_version": 1,
}  # fmt: skip


def seeds() -> list[bytes]:
    return [json.dumps(REPORT, indent=1).encode(), json.dumps(REPORT | {"latency": None}).encode()]


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError; what is the same has not fallen, and what is worse has."""
    found = Report.read(filed(data, ".json"))
    check_same(found, found.subject, "the file")
    check_setting(found.setting, found.setting, "the file")
    same = compare("a bundle", "the file", found, found, Tolerances())
    same.gate()
    json.dumps(same.to_json(), allow_nan=False)


CASES = other_values(seeds(), ["top5", "foo"]) | edited(seeds(), TOKENS) | st.binary(max_size=100)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
