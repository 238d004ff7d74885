"""Bundles on the Hugging Face Hub, or a server that speaks as it does: pushed whole, pulled and verified before they
are there. The token is the Hub library's own (`hf auth login`, HF_TOKEN); no word of it is ours to print."""

from __future__ import annotations

import glob
import importlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dualtoken_deploy import __version__
from dualtoken_deploy.bundle.consistency import check
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import ARTIFACT, MANIFEST, MAX_MANIFEST, SIGNATURE, Bundle, new_folder
from dualtoken_deploy.errors import (
    PACKAGE,
    BundleError,
    InputError,
    MissingError,
    UsageError,
    first_line,
    missing_extra,
)
from dualtoken_deploy.files import folder_bytes, read_bytes

Tell = Callable[[str], None]
SCHEME = "hf://"
ADDRESS = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?")
OF_THE_HUB = (".gitattributes", ".gitignore")  # which it makes by itself
STALE = (f"{ARTIFACT}*", "engine.json")  # of another target's bundle, which would lie beside this one's model
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
ENDPOINT = "HF_ENDPOINT"


@dataclass(frozen=True)
class Repo:
    """ORG/NAME, at a branch, tag or commit; None: its main branch."""

    id: str
    revision: str | None

    @staticmethod
    def parse(address: str) -> Repo:
        """Of hf://ORG/NAME or hf://ORG/NAME@REVISION. Raises UsageError."""
        found = ADDRESS.fullmatch(address)
        if found is None:
            raise UsageError(f"{address!r} is no place on the Hub; give hf://ORG/NAME or hf://ORG/NAME@REVISION")
        return Repo(found[1], found[2])

    def __str__(self) -> str:
        return f"{SCHEME}{self.id}" + ("" if self.revision is None else f"@{self.revision}")


@dataclass(frozen=True)
class Shared:
    """What was pushed or pulled: `revision` is the commit, `files` and `bytes` those of the bundle."""

    bundle: str
    repo: str
    revision: str
    target: str
    precision: str
    files: int
    bytes: int
    signed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def push(
    path: Path, address: str, private: bool = False, message: str | None = None, force: bool = False,
    progress: Tell | None = None,
) -> Shared:  # fmt: skip
    """Puts a bundle that is whole into a repository, which is made where it is not there, as one commit.

    Raises UsageError where the repository holds something else and `force` is not given, BundleError, InputError and
    MissingError.
    """
    repo, tell = Repo.parse(address), progress or (lambda _: None)
    bundle = Bundle.open(path)
    signed = (path / SIGNATURE).is_file()
    names = [MANIFEST, *bundle.manifest.files, *([SIGNATURE] if signed else [])]
    with _hub(repo) as api:
        tell(f"looking at {repo}")
        api.create_repo(repo.id, private=private, exist_ok=True)
        if repo.revision is not None:
            api.create_branch(repo.id, branch=repo.revision, exist_ok=True)
        there = [name for name in api.list_repo_files(repo.id, revision=repo.revision) if name not in OF_THE_HUB]
        if there and MANIFEST not in there and not force:
            raise UsageError(
                f"{repo} holds {there[0]} and no bundle; give another name, or --force to put the bundle beside it"
            )
        tell(f"pushing {len(names)} files to {repo}")
        made = api.upload_folder(
            repo_id=repo.id,
            folder_path=path,
            revision=repo.revision,
            commit_message=message or f"{bundle.name} by {PACKAGE} {__version__}",
            allow_patterns=[p for name in names for p in (glob.escape(name), f"{glob.escape(name)}/*")],
            delete_patterns=list(STALE),
        )
    return _shared(bundle, repo, str(made.oid), signed, names)


def pull(address: str, output: Path | None = None, force: bool = False, progress: Tell | None = None) -> Shared:
    """Fetches the bundle of a repository into `output` (bundles/NAME unless given), which is there once every file is
    what its manifest says.

    Only files of the bundle are fetched. Raises UsageError where `output` exists and `force` is not given, BundleError
    where there is no bundle or it arrived damaged, InputError, MissingError, OutputError.
    """
    repo, tell = Repo.parse(address), progress or (lambda _: None)
    place = output or Path("bundles") / repo.id.rpartition("/")[2]
    with new_folder(place, force) as folder:
        with _hub(repo) as api:
            tell(f"looking at {repo}")
            info = api.model_info(repo.id, revision=repo.revision)
            there = [file.rfilename for file in info.siblings or ()]
            if MANIFEST not in there:
                raise BundleError(
                    f"{repo} has no {MANIFEST}, so it is no bundle; push one with: dualtoken push BUNDLE {repo}"
                )

            def fetch(name: str) -> None:
                api.hf_hub_download(repo.id, name, revision=info.sha, local_dir=folder)

            fetch(MANIFEST)
            manifest = _read(folder / MANIFEST, f"{repo}'s {MANIFEST}")
            wanted = [name for name in there if name != MANIFEST and _is_of(name, manifest)]
            for number, name in enumerate(wanted, 2):
                tell(f"pulling {name}, {number}/{len(wanted) + 1}")
                fetch(name)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes on what it fetched
        tell("checking the hashes")
        _verify(Bundle(folder, manifest), repo)
        signed = (folder / SIGNATURE).is_file()
    return _shared(Bundle(place, manifest), repo, str(info.sha), signed, [MANIFEST, *wanted])


def _read(file: Path, what: str) -> Manifest:
    manifest = Manifest.parse(read_bytes(file, MAX_MANIFEST, BundleError, "ask who pushed it"), what)
    check(manifest, what)
    return manifest


def _is_of(name: str, manifest: Manifest) -> bool:
    """Whether a file of the repository is one of the bundle's, or in one of its folders."""
    parts = PurePosixPath(name).parts
    return (parts[0] in manifest.files and ".." not in parts) or name == SIGNATURE


def _verify(bundle: Bundle, repo: Repo) -> None:
    try:
        bundle.verify()
    except BundleError as error:
        said = str(error).replace(f"{bundle.path}{os.sep}", "").replace(str(bundle.path), "the bundle")
        raise BundleError(f"what came from {repo} is not what its manifest says, and was not kept: {said}") from error


def _shared(bundle: Bundle, repo: Repo, revision: str, signed: bool, names: list[str]) -> Shared:
    size = sum(folder_bytes(bundle.path / top) for top in dict.fromkeys(PurePosixPath(n).parts[0] for n in names))
    manifest = bundle.manifest
    return Shared(
        str(bundle.path), str(repo), revision, manifest.target, manifest.precision, len(names), size, signed
    )  # fmt: skip


@contextmanager
def _hub(repo: Repo) -> Iterator[Any]:
    """The Hub's client, quiet, its errors in our words: no text of a request, which may tell of a token, goes on."""
    try:
        library: Any = importlib.import_module("huggingface_hub")
        errors: Any = importlib.import_module("huggingface_hub.errors")
        utils: Any = importlib.import_module("huggingface_hub.utils")
    except ImportError as error:
        raise missing_extra("hub", "pushing to the Hub and pulling from it") from error
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[
        0
    ]  # of the HTTP library that this version of it stands on
    bars, before = utils.are_progress_bars_disabled(), utils.logging.get_verbosity()
    utils.disable_progress_bars()
    utils.logging.set_verbosity(logging.CRITICAL)  # what is wrong comes as an exception
    try:
        yield library.HfApi(
            endpoint=os.environ.get(ENDPOINT) or None, library_name=PACKAGE, library_version=__version__
        )
    except (errors.HfHubHTTPError, transport, OSError, RuntimeError, ValueError) as error:
        raise _in_our_words(error, repo, errors, transport) from error
    finally:
        utils.logging.set_verbosity(before)
        if not bars:
            utils.enable_progress_bars()


def _in_our_words(error: BaseException, repo: Repo, errors: Any, transport: type[Exception]) -> Exception:
    """What the library raised, or the first below it that says more."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    answers = [one for one in chain if isinstance(one, errors.HfHubHTTPError)]
    if answers:
        return _answered(answers[0], repo, errors)
    lost = (transport, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if any(isinstance(one, lost) for one in chain):
        where = os.environ.get(ENDPOINT) or "https://huggingface.co"
        return MissingError(
            f"the Hub ({_plain(where)}) cannot be reached for {repo}, or the connection broke; look at the network and "
            "try again"
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo} is no name that the Hub takes; give hf://ORG/NAME")
    if "README.md" in str(error):
        return BundleError(
            "the Hub does not take the README.md of the bundle; write it anew with: dualtoken card BUNDLE"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return error  # of this machine's files: `new_folder` has words for it
    return BundleError(f"{repo} did not arrive whole ({first_line(error)}); nothing was kept, try again")  # type: ignore[arg-type]


def _answered(error: Any, repo: Repo, errors: Any) -> Exception:
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return MissingError(f"{repo} asks for consent to its terms, on its page, and for a token: {LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repo} has no such branch, tag or commit; look at its page, or leave @REVISION out")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return InputError(
            f"there is no {repo}, or nobody without the right token may see it; check the name, or {LOGIN}"
        )
    if status in (401, 403):
        return MissingError(f"no rights for this at {repo} (HTTP {status}); ask its owner, or {LOGIN}")
    if status == 429 or status >= 500:
        return MissingError(f"the Hub cannot do this for {repo} now (HTTP {status}); try again later")
    return InputError(f"the Hub refuses this for {repo} (HTTP {status}); check name and rights")


def _plain(url: str) -> str:
    """Without a user and a password in it."""
    return re.sub(r"//[^/@]*@", "//", url)
