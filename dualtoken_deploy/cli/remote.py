"""`--on DEVICE`: a command of ours typed here, run there; and the command that lists the devices."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dualtoken_deploy.cli.common import Json, find_bundles, progress, remark, show, write_out
from dualtoken_deploy.errors import DualTokenError, UsageError

if TYPE_CHECKING:
    from dualtoken_deploy.remote.devices import Device

On = Annotated[
    str | None,
    typer.Option(help="Run it on this device: ssh://[USER@]HOST[:PORT], adb://SERIAL or a name of devices.toml."),
]
Wheelhouse = Annotated[
    Path | None,
    typer.Option(help="With --on: wheels of this machine that travel along, for a device without a network."),
]
BUNDLES = ("bundles", "bundle", "source")  # positional, and carried where they are folders here
CARRIED = ("data", "against")  # options whose value may be a folder or file here
WRITTEN = ("markdown", "confusion", "search", "picture")  # options that write here what the device cannot


def remotely(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with --on and --wheelhouse. Without them nothing changes."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*arguments: Any, on: str | None = None, wheelhouse: Path | None = None, **named: Any) -> Any:
        if on is None and wheelhouse is not None:
            raise UsageError("--wheelhouse is of wheels that travel to a device; give --on too")
        if on is None:
            return command(*arguments, **named)
        device = _device(on, wheelhouse)
        return _send(command.__name__, signature, device, signature.bind(*arguments, **named).arguments)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in (("on", On), ("wheelhouse", Wheelhouse))
    ]
    parameters = sorted([*signature.parameters.values(), *extra], key=lambda p: p.kind)
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run


def _device(on: str, wheelhouse: Path | None) -> Device:
    """Raises UsageError on an unknown one, and on wheels that nothing there would install."""
    from dualtoken_deploy.remote.devices import OWN, find_device

    device = find_device(on)
    if wheelhouse is None:
        return device
    if device.android or device.environment == OWN:
        why = "runs no Python" if device.android else "has an environment of its own (devices.toml)"
        raise UsageError(f"{device.name} {why}, so no wheels travel there; leave --wheelhouse out")
    return replace(device, wheelhouse=str(wheelhouse.resolve()))


def _send(name: str, signature: inspect.Signature, device: Device, given: Mapping[str, Any]) -> None:
    from dualtoken_deploy.remote.session import Session, extras_of
    from dualtoken_deploy.remote.timed import about

    values = {key: p.default for key, p in signature.parameters.items()} | dict(given)
    for key in WRITTEN:
        if values.get(key) is not None:
            raise UsageError(f"--{key} writes on the machine that measures; with --on take --json, and draw it here")
    if device.android:
        _send_to_phone(name, {key: p.default for key, p in signature.parameters.items()}, values, device)
        return
    bundles = _bundles(values)
    extras = extras_of([*bundles, *([Path(values["against"])] if _is_folder(values.get("against")) else [])])
    with progress() as tell:
        session = Session(device, tell)
        words, carried = _words(name, signature, values, bundles, session)
        outcome = session.run(words, extras, carried if name == "build" else None)
    if values.get("json_output"):
        data: Any = json.loads(outcome.out) if outcome.out.strip() else {}
        if isinstance(data, dict):
            data.pop("error", None)
            data["on"] = about(device, dict(outcome.machine))
        show(True, data, lambda _: None)
    elif outcome.out.strip():
        write_out(outcome.out.rstrip("\n"))
        remark(f"note: on {device.name}: {outcome.machine.get('cpu')}, {outcome.machine.get('os')}")
    outcome.gate(device.name)


# what the runtimes' own programs on Android can be asked
ON_ANDROID = {
    "bench": ("bundles", "against", "threads", "rounds", "seconds", "device", "allow_native", "json_output"),
    "validate": (
        *("bundles", "reference", "min_agreement", "min_top1", "min_sqnr", "min_ap", "min_miou", "allow_native"),
        "json_output",
    ),
}


def _send_to_phone(name: str, defaults: Mapping[str, Any], values: Mapping[str, Any], device: Any) -> None:
    """Raises UsageError on what no program there can be asked."""
    from dualtoken_deploy.remote.phone import bench_on, validate_on
    from dualtoken_deploy.remote.timed import about
    from dualtoken_deploy.use.validate import gate

    if name not in ON_ANDROID:
        raise UsageError(
            f"{name} does not run on Android, where there is no Python: {' and '.join(ON_ANDROID)} do, by the "
            "runtimes' own programs"
        )
    for key, value in values.items():
        if key not in ON_ANDROID[name] and value != defaults[key]:
            option = f"--{key.replace('_', '-')}"
            raise UsageError(f"{option} is not known to the programs on Android; leave it out with --on {device.name}")
    if values.get("reference") not in (None, "golden"):
        raise UsageError("--reference: on Android the one input stored in the bundle is fed, so it is golden")
    bundles = find_bundles(values["bundles"])
    as_json = values["json_output"]
    if name == "validate":
        with progress() as tell:
            results, machine = validate_on(device, bundles, tell)
        on = about(device, machine)
        show(as_json, {"results": [r.to_json() for r in results], "on": on}, lambda r: r.validation_table(results))
        figures = {key.removeprefix("min_"): value for key, value in values.items() if key.startswith("min_")}
        gate(results, **{{"sqnr": "sqnr_db"}.get(key, key): value for key, value in figures.items()})
        return
    with progress() as tell:
        report = bench_on(
            device, bundles, tell, values["against"], values["threads"], values["rounds"], values["seconds"],
            values["device"],
        )  # fmt: skip
    on = about(device, dict(report.machine))
    show(as_json, report.to_json() | {"on": on}, lambda r: r.phone_table(report.to_json()))
    for note in report.notes:
        remark(f"note: {note}")


def _bundles(values: Mapping[str, Any]) -> list[Path]:
    """The bundles of a command; `evaluate` takes weights too, which stay where they are."""
    if "bundles" in values:
        return find_bundles(values["bundles"])
    found = Path(values.get("bundle") or values.get("source") or "")
    if not _is_folder(found):
        raise UsageError(f"{found} is no folder here; --on takes bundles along, and nothing else")
    return [found]


def _is_folder(value: Any) -> bool:
    return value is not None and Path(value).is_dir()


def _words(
    name: str, signature: inspect.Signature, values: Mapping[str, Any], bundles: list[Path], session: Any
) -> tuple[list[str], str | None]:
    """The command line there, and the name of its first bundle; what is a path here travels."""
    words, first = [name], None
    for path in bundles:
        words.append(session.add(path))
        first = first or words[-1]
    for key, parameter in signature.parameters.items():
        value = values[key]
        if key in BUNDLES or value == parameter.default or value is None:
            continue
        option = _option(key, parameter)
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [word for each in value for word in (option, str(each))]
        else:
            carried = key in CARRIED and Path(str(value)).exists()
            words += [option, session.add(Path(str(value))) if carried else str(value)]
    return words, first


def _option(key: str, parameter: inspect.Parameter) -> str:
    """The option's own name, --json of json_output."""
    for info in get_args(parameter.annotation):
        # in an annotation typer takes the first name for the default, and moves it later
        for word in (getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())):
            if isinstance(word, str) and word.startswith("--"):
                return str(word)
    return f"--{key.replace('_', '-')}"


def compare_on(
    on: Sequence[str],
    bundles: Sequence[Path],
    data: str,
    limit: int | None,
    threads: int | None,
    words: Sequence[str],
    picture: Path | None,
    json_output: bool,
) -> None:
    """One table over devices; ends with the worst of their exit codes."""
    from dualtoken_deploy.remote.devices import find_device
    from dualtoken_deploy.remote.several import compare_across

    if picture is not None:
        raise UsageError("--picture draws the bundles of one machine; with --on take --json, and draw it here")
    found = [find_device(each) for each in dict.fromkeys(on)]
    with progress() as tell:
        across = compare_across(found, bundles, data, tell, words, limit, threads)
    show(json_output, across.to_json(), lambda r: r.across_table(across.to_json()))
    for each in across.devices:
        if each.found is not None and each.found["other_pixels"]:
            remark(
                f"note: {each.device.name} decodes {each.found['other_pixels']} pictures to other pixels than this "
                "machine, whose eager outputs it is held against"
            )
    across.gate()


def devices(
    check: Annotated[bool, typer.Option("--check/--no-check", help="Connect to each and ask what it is.")] = True,
    json_output: Json = False,
) -> None:
    """Lists the devices of devices.toml, and whether they answer."""
    from dualtoken_deploy.remote.adb import Adb
    from dualtoken_deploy.remote.devices import devices_file, read_devices
    from dualtoken_deploy.remote.link import Link

    def asked(found: Mapping[str, Any]) -> dict[str, Any]:
        return {"answers": True, **{k: found[k] for k in ("python", "system", "architecture")},
                "free_mib": found["free"] >> 20, "environments": len(found["environments"])}  # fmt: skip

    def asked_phone(found: Mapping[str, Any]) -> dict[str, Any]:
        free = {} if found["free"] is None else {"free_mib": found["free"] >> 20}
        return {"answers": True, "system": found["os"], "architecture": found["architecture"], **free}

    rows: list[dict[str, Any]] = []
    with progress() as tell:
        for device in read_devices().values():
            row: dict[str, Any] = {"device": device.name, "url": device.url, "answers": None, "why": None}
            if check:
                tell(f"asking {device.name}")
                try:
                    row |= asked_phone(Adb(device).hello()) if device.android else asked(Link(device).ask("hello"))
                except DualTokenError as error:
                    row |= {"answers": False, "why": str(error)}
            rows.append(row)
    if not rows:
        remark(f"note: there is no device in {devices_file()}; docs/ci.md shows one")
    show(json_output, {"file": str(devices_file()), "devices": rows}, lambda r: r.devices_table(rows))
