"""Who made a bundle: its files signed by a private key (OpenSSF's model-signing), the signature beside them."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.bundle.store import SIGNATURE, Bundle
from dualtoken_deploy.errors import BundleError, InputError, first_line, missing_extra
from dualtoken_deploy.files import read_bytes, write_atomically

if TYPE_CHECKING:
    from model_signing import hashing

MAX_KEY = 1 << 20
CHANGED = "since then "
MAX_SIGNATURE = 8 << 20
KEYS = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub"


def sign(bundle: Bundle, key: Path, password: str | None = None) -> Path:
    """Writes model.sig over every file of a bundle that is whole, in the place of an earlier one.

    `key`: an elliptic curve's private key in PEM. Raises BundleError on a changed file, InputError on what is no key,
    MissingError without the extra, OutputError.
    """
    signing = _module("signing")
    bundle.verify()
    _check_key(key, "PRIVATE KEY", "private")
    # model-signing 1.1 hands the password to cryptography as it is, which wants bytes
    secret = None if password is None else password.encode()
    with _quiet():
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        except (ValueError, TypeError) as error:  # cryptography's words for a wrong password, curve or format
            raise InputError(f"{key} cannot be used to sign ({first_line(error)}); make one with: {KEYS}") from error
        signer = signer.set_hashing_config(_everything_but(bundle.path / SIGNATURE))
        write_atomically(bundle.path / SIGNATURE, lambda temporary: _sign(signer, bundle.path, temporary))
    return bundle.path / SIGNATURE


def _sign(signer: Any, folder: Path, temporary: Path) -> None:
    # the file that is written lies beside the others for a moment, and is none of them
    signer.set_hashing_config(_everything_but(folder / SIGNATURE, temporary)).sign(folder, temporary)


def check_signature(bundle: Bundle, keys: Sequence[Path]) -> Path:
    """The key of `keys` (public, PEM) that a bundle was signed with.

    Raises BundleError where there is no signature, where it is of none of the keys, or a file is not as it was signed;
    InputError on what is no key, MissingError without the extra.
    """
    verifying = _module("verifying")
    for key in keys:
        _check_key(key, "PUBLIC KEY", "public")
    file = bundle.path / SIGNATURE
    if not file.is_file():
        raise BundleError(f"{bundle.path} is not signed; sign it with: dualtoken sign {bundle.path} --key key.pem")
    read_bytes(file, MAX_SIGNATURE, BundleError, "sign the bundle anew")
    reasons = []
    with _quiet():
        for key in keys:
            try:
                verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{key} is no key that verifies ({first_line(error)}); make one with: {KEYS}"
                ) from error
            try:
                verifier.set_hashing_config(_everything_but(file)).verify(bundle.path, file)
            except _refusals() as error:
                reasons.append(_why(error))
                continue
            return key
    changed = next((reason for reason in reasons if reason.startswith(CHANGED)), None)
    if changed is not None:
        raise BundleError(f"{bundle.path} is not what was signed: {changed}; copy it anew")
    names = ", ".join(str(key) for key in keys)
    raise BundleError(f"{file} is no signature by {names}; ask who made the bundle for the key, or sign it anew")


def _refusals() -> tuple[type[Exception], ...]:
    """What the library lets through of those below it: a file that is no signature ends in any of these."""
    from cryptography.exceptions import InvalidSignature

    return (InvalidSignature, ValueError, KeyError, TypeError, AttributeError, IndexError)


def _why(error: Exception) -> str:
    """The library says at length what is not as it was signed."""
    text = re.sub(r"\\(['\"])", r"\1", str(error))  # a list's repr, whose quotes depend on the bytes of a hash
    found = [f"{name} was changed" for name in re.findall(r"Hash mismatch for '([^']+)'", text)]
    for word, what in (("Extra", "was added"), ("Missing", "is missing")):
        found += [f"{names} {what}" for names in re.findall(rf"{word} files[^:]*: ([^\"'\]]+)", text)]
    return f"{CHANGED}{', '.join(found)}" if found else first_line(error)


def _everything_but(*files: Path) -> hashing.Config:
    hashing: Any = _module("hashing")
    # names in the bundle's folder: a path from elsewhere would be looked for below it, and not be left out
    return hashing.Config().set_ignored_paths(paths=[file.name for file in files], ignore_git_paths=False)


def _check_key(path: Path, kind: str, word: str) -> None:
    data = read_bytes(path, MAX_KEY, InputError, f"give a {word} key in PEM; make one with: {KEYS}")
    if f"{kind}-----".encode() not in data:
        raise InputError(f"{path} is no {word} key in PEM; make one with: {KEYS}")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise missing_extra("sign", "signing and checking signatures") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries log what they do; what is wrong comes as an exception."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(before)
