"""What `dualtoken serve` can be told, in one frozen value."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualtoken_deploy.data.images import FORMATS
from dualtoken_deploy.errors import InputError, UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
ROWS_UNLESS_TOLD = 8  # rows of a request, or of a batch on an accelerator, where the bundle leaves them open


@dataclass(frozen=True)
class Source:
    """One bundle to serve, under which name and version."""

    name: str
    version: str
    path: Path

    @staticmethod
    def parse(text: str) -> Source:
        """[NAME[:VERSION]=]PATH; the name is the folder's and the version 1 unless given. Raises UsageError."""
        label, separator, path = text.partition("=")
        if not separator:
            label, path = Path(text).resolve().name, text
        name, _, version = label.partition(":")
        version = version or "1"
        if not NAME.fullmatch(name) or not VERSION.fullmatch(version):
            raise UsageError(
                f"{label!r} is no model name (letters, digits, . _ -, then an optional :VERSION); "
                f"name the bundle: NAME={path}"
            )
        return Source(name, version, Path(path))


@dataclass(frozen=True)
class Settings:
    """Times are in seconds unless the name says otherwise; None: decided by the bundle or the runtime."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001  # None: no gRPC
    max_batch: int | None = None
    max_delay_ms: float = 0.0
    queue: int = 32  # requests of one model that may wait
    threads: int | None = None
    workers: int = 1
    device: str | None = None
    admin: bool = False
    allowed_hosts: tuple[str, ...] = ()  # by which the server may be called; on loopback its own names unless given
    api_key: str | None = field(default=None, repr=False)
    signers: tuple[Path, ...] = ()  # public keys, of which one must have signed every bundle
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain_seconds: float = 30.0
    header_seconds: float = 10.0
    body_seconds: float = 15.0
    idle_seconds: float = 75.0  # a connection on which nothing is asked
    connections: int = 512  # of HTTP, open at once
    run_seconds: float = 30.0  # a runner that takes longer hangs
    start_seconds: float = 300.0  # loading may compile
    reload_seconds: float = 2.0  # 0: changed bundles are not looked for
    max_image_mib: float = 16.0
    max_megapixels: float = 24.0
    decoders: int = field(default_factory=lambda: min(8, max(2, os.cpu_count() or 1)))  # processes, started when needed
    decode_seconds: float = 10.0  # a picture that takes longer is none
    picture_formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP")  # what photo apps send; the others when asked for

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("TLS needs both --tls-cert and --tls-key")
        if self.port == self.grpc_port != 0:
            raise UsageError(f"HTTP and gRPC cannot share port {self.port}; give another --grpc-port")

        if self.admin and self.api_key is None and self.known_hosts is None:
            raise UsageError(f"--admin on {self.host} needs --api-key-file, or the server's names: --allowed-host NAME")

    @property
    def loopback(self) -> bool:
        """Whether nothing outside of this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def known_hosts(self) -> frozenset[str] | None:
        """The names that a request's Host may have, lower case and without brackets; None: any."""
        if not self.loopback and not self.allowed_hosts:
            return None
        own = {self.host, *(LOOPBACK_NAMES if self.loopback else ())}
        return frozenset(name.lower().strip("[]").rstrip(".") for name in (*own, *self.allowed_hosts))

    def warnings(self) -> list[str]:
        """What is risky about these settings, one sentence each."""
        if self.loopback:
            return []
        found = []
        if self.api_key is None:
            found.append(f"anyone who reaches {self.host} may use this server; give --api-key-file")
        if self.tls_cert is None:
            found.append(f"traffic to {self.host} is not encrypted; give --tls-cert and --tls-key")
        return found

    def merge_rows(self, fixed: int | None) -> int:
        """Rows up to which requests are merged. 1, no merging, on a CPU: measured, batches gain nothing there."""
        if fixed is not None:
            return fixed
        if self.max_batch is not None:
            return self.max_batch
        return 1 if self.device is None or self.device.lower() == "cpu" else ROWS_UNLESS_TOLD

    def request_rows(self, fixed: int | None) -> int:
        """The most rows that one request may have."""
        return fixed or self.max_batch or ROWS_UNLESS_TOLD


def parse_sources(texts: Sequence[str]) -> tuple[Source, ...]:
    """Every bundle to serve. Raises UsageError where two have one name and version."""
    sources = tuple(Source.parse(text) for text in texts)
    seen: dict[tuple[str, str], Path] = {}
    for source in sources:
        other = seen.setdefault((source.name, source.version), source.path)
        if other is not source.path:
            raise UsageError(
                f"{other} and {source.path} would both be {source.name}:{source.version}; "
                f"give one another version: {source.name}:2={source.path}"
            )
    return sources


def parse_formats(names: Sequence[str]) -> tuple[str, ...]:
    """Pillow's names of the formats that may be decoded; those of photo apps where none is named. Raises UsageError."""
    found = tuple(dict.fromkeys(name.upper() for name in names)) or Settings.picture_formats
    for name in found:
        if name not in FORMATS:
            raise UsageError(f"unknown picture format {name.lower()!r}; valid: {', '.join(FORMATS).lower()}")
    return found


def read_api_key(path: Path | None) -> str | None:
    """The key in the first line of a file. Raises InputError where it cannot be read or is too short to be a secret."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"API key file {path} cannot be read ({error})") from error
    key = text.partition("\n")[0].strip()  # splitlines() ends a line at a form feed too, and the key with it
    if len(key) < 16 or not key.isascii() or not key.isprintable():
        raise InputError(f"API key file {path} must hold one line of at least 16 printable ASCII characters")
    return key
