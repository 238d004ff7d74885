"""A bundle's model card: README.md with the front matter that the Hugging Face Hub reads, of the manifest alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from dualtoken_deploy.bundle.blocks import Licenses
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import BOM, GOLDEN, LABELS, Bundle
from dualtoken_deploy.errors import PACKAGE
from dualtoken_deploy.prove.contents import contract, int8, origin, what
from dualtoken_deploy.prove.document import Block, Document, Section, Table
from dualtoken_deploy.prove.facts import SHARES, Metric, limits, metrics, title
from dualtoken_deploy.prove.render import markdown
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task

# The identifiers that the Hub takes as they are, of those that are SPDX's in lower case; every other licence is "other"
# with its name (huggingface.co/docs/hub/repositories-licenses, November 2026).
HUB_LICENSES = frozenset(
    {
        "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
        "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
        "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
        "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gpl-2.0",
        "gpl-3.0", "isc", "lgpl-2.1", "lgpl-3.0", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl-1.0",
        "ofl-1.1", "osl-3.0", "pddl-1.0", "postgresql", "unlicense", "wtfpl", "zlib",
    }
)  # fmt: skip
VERSIONED = ("-only", "-or-later")  # which SPDX says, and the Hub does not
HUB_METRICS = {"top1": "accuracy"}  # as the Hub's `evaluate` library calls them
UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
# Points, not fractions: what the manifest has in other units than shares
SCALES = {
    "sqnr_db": "SQNR (dB)",
    "max_abs_error": "largest error",
    "drop": "points lost",
    "speed_ratio": "times the speed",
}


USE = (
    f"{LABELS} names the classes, one a line; {GOLDEN} has an input and the outputs for it, so that any device can "
    "test itself. dualtoken validate, predict and serve take the folder as it is."
)


def card(bundle: Bundle) -> bytes:
    """README.md of a bundle whose other files are there."""
    front = "\n".join(_yaml(front_matter(bundle.manifest)))
    return f"---\n{front}\n---\n\n{markdown(_document(bundle))}".encode()


def front_matter(manifest: Manifest) -> dict[str, Any]:
    """The Hub's metadata; what is not known is left out."""
    task, licenses = get_task(manifest.task), manifest.licenses
    found: dict[str, Any] = {
        **hub_license(licenses),
        "library_name": PACKAGE,
        "pipeline_tag": task.pipeline_tag,
        "tags": _tags(manifest),
        "model-index": [{"name": title(manifest), "results": _results(manifest)}],
    }
    return {name: value for name, value in found.items() if value}


def hub_license(licenses: Licenses | None) -> dict[str, str]:
    """Of the weights, which are what the Hub shares."""
    expression = None if licenses is None else licenses.weights
    if expression is None:
        return {}
    known = expression.lower()
    for ending in VERSIONED:
        known = known.removesuffix(ending)
    if known in HUB_LICENSES:
        return {"license": known}
    return {"license": "other", "license_name": expression}


def _tags(manifest: Manifest) -> list[str]:
    held = ["onnx"] if any(name.endswith(".onnx") for name in manifest.files) else []
    return list(dict.fromkeys([PACKAGE, manifest.target, *held, manifest.precision, manifest.task]))


def _results(manifest: Manifest) -> list[dict[str, Any]]:
    """One a set of pictures."""
    task = get_task(manifest.task)
    by_slice: dict[str, list[Metric]] = {}
    for one in metrics(manifest):
        by_slice.setdefault(one.slice, []).append(one)
    return [
        {
            "task": {"type": task.pipeline_tag or manifest.task},
            "dataset": {"type": found[0].data, "name": where},
            "metrics": [{"type": HUB_METRICS.get(m.name, m.name), "name": m.name, "value": m.value} for m in found],
        }
        for where, found in by_slice.items()
    ]


def _yaml(value: Any, indent: int = 0) -> Iterator[str]:
    """Plain data as YAML in blocks, which readers of YAML 1.1 and 1.2 take alike."""
    room = " " * indent
    items = value.items() if isinstance(value, dict) else ((None, one) for one in value)
    for key, one in items:
        head = f"{room}-" if key is None else f"{room}{key}:"
        if not isinstance(one, dict | list):
            yield f"{head} {_scalar(one)}"
            continue
        lines = list(_yaml(one, indent + 2))
        if key is None:  # the first of its lines stands behind the dash
            yield f"{head} {lines[0].lstrip()}"
            yield from lines[1:]
        else:
            yield head
            yield from lines


def _scalar(value: Any) -> str:
    """A text is quoted as JSON quotes it, with what ends a line in YAML 1.1 or may not stand there escaped as well; a
    number has a point before its exponent, or it would be a text."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _document(bundle: Bundle) -> Document:
    manifest = bundle.manifest
    said = list(limits(manifest))
    sections = [
        Section("What it is", (what(bundle),)),
        *([Section("What it is not", tuple(said))] if said else []),
        Section("How good it is", tuple(_figures(manifest))),
        Section("What an app feeds and gets", (contract(bundle), USE)),
        *([] if manifest.calibration is None else [Section("INT8", tuple(int8(manifest.calibration)))]),
        Section("Where it came from", (origin(bundle), f"{BOM} (CycloneDX 1.7) says the same to programs.")),
    ]
    lead = (
        f"A bundle of {PACKAGE}: the raw {get_target(manifest.target).title} files, with everything that was measured "
        "on them. This page is made of manifest.json."
    )
    return Document(title(manifest), lead, tuple(sections))


def _figures(manifest: Manifest) -> Iterator[Block]:
    rows = []
    for one in metrics(manifest):
        rows.append((SCALES.get(one.name, one.name), _value(manifest, one), one.slice))
    yield Table(("figure", "value", "on"), tuple(rows))
    if any(one.low is not None and one.name in SHARES for one in metrics(manifest)):
        yield "In brackets the 95 % interval (Wilson's) of a share of so many pictures."
    if manifest.evaluated:
        when = (f"{one.data} on {one.date}, {one.cpu or 'an unnamed CPU'}" for one in manifest.evaluated)
        yield f"Accuracies: {'; '.join(when)}."


def _value(manifest: Manifest, one: Metric) -> str:
    if one.name in SCALES or one.name in get_task(manifest.task).plain:
        return f"{one.value:.4g}" + ("" if one.low is None else f" ({one.low:.3g} to {one.high:.3g})")
    return f"{100 * one.value:.2f} %" + (
        "" if one.low is None or one.high is None else f" ({100 * one.low:.2f} to {100 * one.high:.2f})"
    )
