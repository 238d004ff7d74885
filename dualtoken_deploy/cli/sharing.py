"""Commands that hand bundles on: to the Hugging Face Hub, and from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualtoken_deploy.cli.common import Json, OneBundle, answer, progress, remark, show

Address = Annotated[str, typer.Argument(help="hf://ORG/NAME, or hf://ORG/NAME@REVISION.")]


def push(
    bundle: OneBundle,
    address: Address,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made now is private.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit; the bundle's name unless given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Into a repository that holds something else, too.")] = False,
    json_output: Json = False,
) -> None:
    """Puts a bundle, verified, into a repository of the Hugging Face Hub, as one commit."""
    from dualtoken_deploy.remote.hub import push as send

    with progress() as tell:
        found = send(bundle, address, private, message, force, tell)
    if not json_output:
        answer(f"pushed {found.files} files ({found.bytes / 2**20:.1f} MiB) to {found.repo}, commit {found.revision}")
        return
    show(True, found.to_json(), lambda _: None)


def pull(
    address: Address,
    output: Annotated[Path | None, typer.Option(help="The bundle's own folder; bundles/NAME unless given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    json_output: Json = False,
) -> None:
    """Fetches a bundle from the Hugging Face Hub; it is there once every file is what its manifest says."""
    from dualtoken_deploy.remote.hub import pull as fetch

    with progress() as tell:
        found = fetch(address, output, force, tell)
    if found.signed:
        remark(f"note: it is signed; whose it is says: dualtoken verify {found.bundle} --signature KEY.pub")
    if not json_output:
        answer(
            f"pulled {found.files} files ({found.bytes / 2**20:.1f} MiB) into {found.bundle}, commit {found.revision}"
        )
        return
    show(True, found.to_json(), lambda _: None)
