"""Commands for CI and for whoever takes a bundle over: is it still what it was?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dualtoken_deploy.cli.common import (
    YARDSTICK_ROUNDS,
    YARDSTICK_SECONDS,
    AllowNative,
    Bundles,
    Device,
    Json,
    Licenses,
    Limit,
    OneBundle,
    Threads,
    answer,
    command_line,
    find_bundles,
    progress,
    remark,
    say,
    show,
    write_out,
    write_text,
)
from dualtoken_deploy.errors import InputError, UsageError


def verify(
    bundle: OneBundle,
    baseline: Annotated[Path | None, typer.Option(help="Report of an earlier run (JSON).")] = None,
    signature: Annotated[
        list[Path] | None, typer.Option(help="Public key (PEM) that must have signed it; may be repeated.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Measure, and write the baseline anew.")] = False,
    tolerances: Annotated[
        Path | None, typer.Option(help="TOML: how much worse each row may be; see docs/ci.md.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Pictures, as of validate; those of the baseline.")] = None,
    limit: Limit = None,
    reference: Annotated[str | None, typer.Option(help="eager or golden; as the baseline.")] = None,
    rounds: Annotated[int | None, YARDSTICK_ROUNDS] = None,
    seconds: Annotated[float | None, YARDSTICK_SECONDS] = None,
    device: Device = None,
    threads: Threads = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Checks who signed a bundle, and measures it against its baseline; rows that fell exit with 5.

    It is measured as the baseline was, where nothing else is said.
    """
    if baseline is None and not signature:
        raise UsageError(
            "nothing to hold the bundle against; give --baseline REPORT.json, --signature KEY.pub, or both"
        )
    if signature:
        _check_signature(bundle, signature)
    if baseline is None:
        if json_output:
            show(True, {"bundle": str(bundle), "signed": True}, lambda _: None)
        return
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    given = {
        "data": data, "limit": limit, "reference": reference, "rounds": rounds, "seconds": seconds, "device": device,
        "threads": threads,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    _verify_figures(bundle, baseline, update, tolerances, given, json_output)


def _check_signature(bundle: Path, keys: list[Path]) -> None:
    from dualtoken_deploy.bundle.signature import check_signature
    from dualtoken_deploy.bundle.store import Bundle

    say(f"{bundle} is as it was signed, by {check_signature(Bundle.open(bundle), keys)}")


def _verify_figures(
    bundle: Path, baseline: Path, update: bool, tolerances: Path | None, given: Mapping[str, Any], json_output: bool
) -> None:
    """Measures the bundle, and holds it against the baseline or writes that. Raises ToleranceError on what fell."""
    from dualtoken_deploy.bundle.store import Bundle
    from dualtoken_deploy.prove.measure import Report, Setting, measure, subject_of
    from dualtoken_deploy.prove.tolerances import Tolerances
    from dualtoken_deploy.prove.verify import check_same, check_setting, compare

    limits = Tolerances() if tolerances is None else Tolerances.read(tolerances)
    if not update and not baseline.exists():
        raise InputError(
            f"there is no {baseline}; make it with: dualtoken verify {bundle} --baseline {baseline} --update"
        )
    before = Report.read(baseline) if not update else None
    opened = Bundle.open(bundle)
    base = Setting() if before is None else before.setting
    setting = replace(base, **given)
    if before is not None:
        check_same(before, subject_of(opened), str(baseline))
        check_setting(before.setting, setting, str(baseline))
    with progress() as tell:
        now = measure(opened, setting, command_line(), tell)
    found = compare(str(bundle), str(baseline), before or now, now, limits)
    if before is None:
        now.write(baseline)
        show(json_output, now.to_json(), lambda r: r.verification_table(found))
        remark(f"wrote {baseline}")
        return
    show(json_output, found.to_json(), lambda r: r.verification_table(found))
    for note in found.notes:
        remark(f"note: {note}")
    found.gate()
    if not json_output:
        answer("held")


def report(
    bundles: Bundles = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown here; on stdout without either.")] = None,
    data: Annotated[str | None, typer.Option(help="Pictures, best labelled, as of validate; else golden.")] = None,
    limit: Limit = None,
    reference: Annotated[str, typer.Option(help="eager or golden.")] = "golden",
    rounds: Annotated[int, YARDSTICK_ROUNDS] = 5,
    seconds: Annotated[float, YARDSTICK_SECONDS] = 0.5,
    drift: Annotated[
        bool, typer.Option("--drift", help="Layer by layer too, which needs PyTorch and takes long.")
    ] = False,
    device: Device = None,
    threads: Threads = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Measures bundles and says all that there is to know of them on one page."""
    from datetime import UTC, datetime

    from dualtoken_deploy.bundle.store import Bundle
    from dualtoken_deploy.bundle.trust import permit_native
    from dualtoken_deploy.prove.contents import document
    from dualtoken_deploy.prove.measure import Setting
    from dualtoken_deploy.prove.render import html as as_html
    from dualtoken_deploy.prove.render import markdown as as_markdown
    from dualtoken_deploy.prove.subjects import look

    permit_native(allow_native)
    setting = Setting(data, limit, reference, rounds, seconds, threads, device)
    with progress() as tell:
        opened = [Bundle.open(path) for path in (bundles or find_bundles(None))]
        subjects = [look(bundle, setting, drift, command_line(), tell) for bundle in opened]
    made = document(subjects, datetime.now(UTC).strftime("%Y-%m-%d"))
    for subject in subjects:
        if subject.missing is not None:
            remark(f"note: {subject.bundle.path} was not measured: {subject.missing}")
    if json_output:
        found = [None if subject.report is None else subject.report.to_json() for subject in subjects]
        show(True, {"reports": found}, lambda _: None)
    elif html is None and markdown is None:
        write_out(as_markdown(made).rstrip("\n"))
    for path, render in ((html, as_html), (markdown, as_markdown)):
        if path is not None:
            write_text(path, render(made))
            remark(f"wrote {path}")


def card(
    bundle: OneBundle,
    licenses: Licenses = None,
    data: Annotated[str | None, typer.Option(help="Labelled pictures: their accuracy goes into it.")] = None,
    limit: Limit = None,
    device: Device = None,
    threads: Threads = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Writes a bundle's model card (README.md) and bill of materials (bom.cdx.json) anew; the model stays."""
    from dualtoken_deploy.bundle.trust import permit_native
    from dualtoken_deploy.prove.describe import describe

    permit_native(allow_native)
    with progress() as tell:
        found = describe(bundle, licenses or (), data, limit, device, threads, tell)
    for name in found.edited:
        remark(f"warning: {bundle / name} had been changed, and is of the manifest again")
    if found.signed:
        remark(f"warning: the signature in {bundle} is of what was before; sign the bundle anew")
    if json_output:
        show(True, found.to_json(), lambda _: None)
    else:
        answer(f"wrote {' and '.join(str(bundle / name) for name in found.documents)}")


def sign(
    bundle: OneBundle,
    key: Annotated[Path, typer.Option(help="Private key of an elliptic curve (PEM).")],
    password_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key's password; never the command line.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Signs every file of a bundle (OpenSSF model-signing); the signature is model.sig beside them."""
    import os

    from dualtoken_deploy.bundle.signature import sign as write
    from dualtoken_deploy.bundle.store import Bundle

    password = None
    if password_env is not None:
        password = os.environ.get(password_env)
        if password is None:
            raise UsageError(f"the environment has no {password_env}; set it to the key's password")
    signature = write(Bundle.open(bundle), key, password)
    if json_output:
        show(True, {"bundle": str(bundle), "signature": str(signature)}, lambda _: None)
    else:
        answer(f"signed: {signature}")
