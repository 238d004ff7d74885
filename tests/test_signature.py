"""Signatures by OpenSSF's model-signing: every file is covered, another key or another byte is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.bundle.signature import check_signature, sign
from dualtoken_deploy.bundle.store import SIGNATURE
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import BundleError
from tests.commands import fails

pytest.importorskip("model_signing", reason="the extra [sign] is not installed")


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """As docs/ci.md makes them."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private)
    openssl("ec", "-in", private, "-pubout", "-out", public)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: make_keys(folder, name) for name in ("ours", "theirs")}


@pytest.fixture
def signed(own_bundle: Path, keys: dict[str, tuple[Path, Path]]) -> Path:
    main(["sign", str(own_bundle), "--key", str(keys["ours"][0])])
    return own_bundle


def test_a_signed_bundle_is_a_bundle_and_its_key_is_named(
    signed: Path, keys: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = keys["ours"][1], keys["theirs"][1]
    assert Bundle.open(signed)
    main(["verify", str(signed), "--signature", str(theirs), "--signature", str(ours)])
    assert f"{signed} is as it was signed, by {ours}" in capsys.readouterr().err
    before = (signed / SIGNATURE).read_bytes()
    sign(Bundle.open(signed), keys["theirs"][0])  # again, by another: in its place
    assert (signed / SIGNATURE).read_bytes() != before
    assert check_signature(Bundle.open(signed), [theirs]) == theirs
    assert [p.name for p in signed.iterdir() if p.name.startswith(".")] == []


def test_a_relative_path_signs_the_same(
    own_bundle: Path,
    keys: dict[str, tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the pages' commands have it: what is signed from the folder above is whole from anywhere, and again."""
    private, public = keys["ours"]
    monkeypatch.chdir(own_bundle.parent)
    for _ in range(2):
        main(["sign", own_bundle.name, "--key", str(private)])
        for path in (own_bundle.name, str(own_bundle)):
            main(["verify", path, "--signature", str(public)])
            assert "is as it was signed" in capsys.readouterr().err


def test_the_vendors_own_program_takes_the_signature(signed: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    """An independent reader: the library's command line, told no more than where things are."""
    import sys

    command = [
        sys.executable, "-m", "model_signing", "verify", "key", signed, "--signature", signed / SIGNATURE,
        "--public_key", keys["ours"][1],
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "what"),
    [("model.onnx", "changed"), ("labels.txt", "changed"), ("manifest.json", "changed"), ("golden.npz", "changed")],
)
def test_every_file_is_covered(name: str, what: str, signed: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    bundle = Bundle.open(signed)
    (signed / name).write_bytes((signed / name).read_bytes() + b" ")
    with pytest.raises(BundleError, match=f"is not what was signed: since then {name} was {what}"):
        check_signature(bundle, [keys["ours"][1]])


def test_files_that_come_and_go_are_named(signed: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    bundle = Bundle.open(signed)
    (signed / "more.txt").write_text("x")
    with pytest.raises(BundleError, match=r"more\.txt was added"):
        check_signature(bundle, [keys["ours"][1]])
    (signed / "more.txt").unlink()
    (signed / "labels.txt").unlink()
    with pytest.raises(BundleError, match=r"labels\.txt is missing"):
        check_signature(bundle, [keys["ours"][1]])


def test_another_key_no_signature_and_what_is_none(
    signed: Path, keys: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fails(capsys, "verify", signed, "--signature", keys["theirs"][1])
    assert code == 4
    assert f"is no signature by {keys['theirs'][1]}" in line
    for text in ("{}", "no json", "[]", '{"verificationMaterial": 3}'):
        (signed / SIGNATURE).write_text(text)
        code, line = fails(capsys, "verify", signed, "--signature", keys["ours"][1])
        assert code == 4
        assert f"{signed / SIGNATURE} is no signature by" in line
    (signed / SIGNATURE).unlink()
    code, line = fails(capsys, "verify", signed, "--signature", keys["ours"][1])
    assert code == 4
    assert f"is not signed; sign it with: dualtoken sign {signed} --key key.pem" in line


def test_what_is_no_key(
    own_bundle: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("no key")
    for given, words in (
        (tmp_path / "key", "is no private key in PEM; make one with: openssl"),
        (keys["ours"][1], "is no private key in PEM"),
        (tmp_path / "none", "no such file"),
    ):
        code, line = fails(capsys, "sign", own_bundle, "--key", given)
        assert code == 4
        assert words in line
    assert not (own_bundle / SIGNATURE).exists()
    code, line = fails(capsys, "verify", own_bundle, "--signature", keys["ours"][0])
    assert code == 4
    assert "is no public key in PEM" in line


def test_a_key_with_a_password_takes_it_from_the_environment(
    own_bundle: Path,
    keys: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    locked = tmp_path / "locked.pem"
    openssl("pkcs8", "-topk8", "-in", keys["ours"][0], "-passout", "pass:secret", "-out", locked)
    code, line = fails(capsys, "sign", own_bundle, "--key", locked, "--password-env", "KEY_PASSWORD")
    assert (code, "the environment has no KEY_PASSWORD" in line) == (2, True)
    monkeypatch.setenv("KEY_PASSWORD", "wrong")
    code, line = fails(capsys, "sign", own_bundle, "--key", locked, "--password-env", "KEY_PASSWORD")
    assert (code, "cannot be used to sign" in line) == (4, True)
    monkeypatch.setenv("KEY_PASSWORD", "secret")
    main(["sign", str(own_bundle), "--key", str(locked), "--password-env", "KEY_PASSWORD"])
    assert check_signature(Bundle.open(own_bundle), [keys["ours"][1]])


def test_a_changed_bundle_is_not_signed(own_bundle: Path, keys: dict[str, tuple[Path, Path]]) -> None:
    (own_bundle / "labels.txt").write_text("x\n")
    with pytest.raises(BundleError, match="sha256 differs"):
        sign(Bundle.open(own_bundle, verify=False), keys["ours"][0])


def test_a_server_that_requires_a_signature_refuses_the_rest(
    signed: Path, keys: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The real command: what is signed is served; by another key it does not start."""
    import sys

    from tests.serving import serving

    ours, theirs = keys["ours"][1], keys["theirs"][1]
    with serving(tmp_path / "log", f"m={signed}", "--require-signature", ours) as server:
        assert server.addresses["http"]
    command = [sys.executable, "-m", "dualtoken_deploy", "serve", f"m={signed}", "--require-signature", str(theirs)]
    done = subprocess.run(
        [*command, "--port", "0", "--no-grpc"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 4
    assert f"is no signature by {theirs}" in done.stderr


def test_a_bundle_that_loses_its_signature_is_not_loaded_again(
    signed: Path, keys: dict[str, tuple[Path, Path]]
) -> None:
    from dualtoken_deploy.serve.signed import open_bundle

    key = keys["ours"][1]
    assert open_bundle(signed, (key,)).path == signed
    (signed / SIGNATURE).unlink()
    assert open_bundle(signed, ()).path == signed
    with pytest.raises(BundleError, match="is not signed"):
        open_bundle(signed, (key,))
