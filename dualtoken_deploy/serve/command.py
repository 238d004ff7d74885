"""The command `dualtoken serve`: parse, one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualtoken_deploy.errors import UsageError, missing_extra

Seconds = typer.Option(min=0.05)


def serve(
    bundles: Annotated[list[str], typer.Argument(help="Bundle folders: [NAME[:VERSION]=]PATH.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0: any that is free.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: any that is free.")] = 8001,
    no_grpc: Annotated[bool, typer.Option("--no-grpc", help="Serve HTTP alone.")] = False,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows run at once, where the bundle leaves them open; on a CPU 1.")
    ] = None,
    max_delay_ms: Annotated[float, typer.Option(min=0, max=10_000, help="Wait for a batch to fill.")] = 0.0,
    queue: Annotated[int, typer.Option(min=1, help="Requests of a model that may wait; 503 beyond.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each worker.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes of each bundle.")] = 1,
    device: Annotated[str | None, typer.Option(help="Device in the runtime's own words; its CPU unless given.")] = None,
    allow_native: Annotated[
        bool, typer.Option("--allow-native", help="Load bundles with native code that were not made here; trust them.")
    ] = False,
    admin: Annotated[bool, typer.Option("--admin", help="Allow load and unload of the bundles named here.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name by which clients may call the server, repeatable; on loopback localhost unless given."),
    ] = None,
    require_signature: Annotated[
        list[Path] | None, typer.Option(help="Public key (PEM): serve what it has signed alone; may be repeated.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File whose first line clients must send.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None,
    drain_seconds: Annotated[float, Seconds] = 30.0,
    header_seconds: Annotated[float, Seconds] = 10.0,
    body_seconds: Annotated[float, Seconds] = 15.0,
    idle_seconds: Annotated[float, typer.Option(min=0.05, help="A connection that asks nothing is closed.")] = 75.0,
    connections: Annotated[int, typer.Option(min=1, help="HTTP connections open at once.")] = 512,
    run_seconds: Annotated[float, typer.Option(min=0.05, help="A run that takes longer hangs.")] = 30.0,
    reload_seconds: Annotated[float, typer.Option(min=0, help="Look for changed bundles this often; 0: never.")] = 2.0,
    max_image_mib: Annotated[float, typer.Option(min=0.01, help="Largest body with a picture.")] = 16.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Largest picture.")] = 24.0,
    decoders: Annotated[
        int | None, typer.Option(min=1, help="Processes that read pictures; as many as cores, 2 to 8, unless given.")
    ] = None,
    decode_seconds: Annotated[float, typer.Option(min=0.05, help="A picture that takes longer is refused.")] = 10.0,
    picture_format: Annotated[
        list[str] | None, typer.Option(help="Formats that are read: jpeg, png, webp unless given; gif, bmp, tiff.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: replicas on Ray Serve, HTTP only.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, e.g. auto; one of this machine unless given.")
    ] = None,
    replicas: Annotated[str, typer.Option(help="Ray replicas of each bundle: a number, or auto.")] = "1",
) -> None:
    """Serves bundles: Open Inference Protocol over HTTP and gRPC, and a page to drop a photo on."""
    try:
        from dualtoken_deploy.serve import server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dualtoken_deploy"):
            raise
        raise missing_extra("serve", "serving a bundle") from error
    from dualtoken_deploy.serve.settings import Settings, parse_formats, parse_sources, read_api_key

    settings = Settings(
        host=host, port=port, grpc_port=None if no_grpc else grpc_port, max_batch=max_batch, max_delay_ms=max_delay_ms,
        queue=queue, threads=threads, workers=workers, device=device, admin=admin, api_key=read_api_key(api_key_file),
        signers=tuple(require_signature or ()),
        allowed_hosts=tuple(allowed_host or ()), tls_cert=tls_cert, tls_key=tls_key,
        drain_seconds=drain_seconds, header_seconds=header_seconds,
        body_seconds=body_seconds, idle_seconds=idle_seconds, connections=connections, run_seconds=run_seconds,
        reload_seconds=reload_seconds, max_image_mib=max_image_mib, max_megapixels=max_megapixels,
        decode_seconds=decode_seconds, picture_formats=parse_formats(picture_format or ()),
        **({} if decoders is None else {"decoders": decoders}),
    )  # fmt: skip
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    sources = parse_sources(bundles)
    if engine == "ray":
        from dualtoken_deploy.serve import ray

        ray.run(sources, settings, address, _replicas(replicas), _tell)
    elif engine == "local":
        if address is not None or replicas != "1":
            raise UsageError("--address and --replicas are for --engine ray; on one machine give --workers")
        server.run(sources, settings, _tell)
    else:
        raise UsageError(f"unknown engine {engine!r}; valid engines: local, ray")


def _tell(line: str) -> None:
    print(line, flush=True)


def _replicas(text: str) -> int | None:
    """A number of at least 1, or None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"replicas {text!r} is neither a number of at least 1 nor 'auto'")
    return int(text)
