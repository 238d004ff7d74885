"""Where the pictures of `dualtoken predict` come from: files, folders, globs, stdin, videos, a webcam."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dualtoken_deploy.data.folders import IMAGE_SUFFIXES
from dualtoken_deploy.data.images import Pixels, load_image
from dualtoken_deploy.errors import ImageError, MissingError, OutputError, UsageError, missing_extra
from dualtoken_deploy.files import is_file, is_folder

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"})
STDIN = "-"
MAX_STDIN = 256 << 20  # bytes
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")


def find_pictures(given: Sequence[str]) -> list[str]:
    """The names of pictures and videos, folders and globs unfolded; STDIN stays as it is.

    Raises UsageError on a URL and where nothing was named, ImageError on a folder or glob without pictures.
    """
    found: list[str] = []
    for text in given:
        if _URL.match(text):
            raise UsageError(f"{text} is a URL, and predict fetches none; download the picture and name the file")
        path = Path(text)
        if text == STDIN:
            found.append(text)
        elif is_folder(path):
            inside = sorted(p for p in path.iterdir() if _shown(p))
            if not inside:
                raise ImageError(f"{text} is a folder without pictures ({' '.join(sorted(IMAGE_SUFFIXES))})")
            found += map(str, inside)
        elif _GLOB.search(text) and not is_file(path):
            matches = sorted(str(p) for p in _matching(text) if not is_folder(p))
            if not matches:
                raise ImageError(f"nothing matches {text}; check the pattern")
            found += matches
        else:
            found.append(text)
    if not found:
        raise UsageError("no picture was named; give files, folders, '-' for stdin, or --webcam 0")
    return found


def _matching(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    return Path(path.anchor).glob(str(path.relative_to(path.anchor))) if path.anchor else Path().glob(pattern)


def _shown(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and path.name[0] != "." and is_file(path)


def is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Frame:
    """One picture with its name; or, without pixels, why it could not be read."""

    name: str
    pixels: Pixels | None
    error: ImageError | None = None


def frames(names: Sequence[str], every: int = 1) -> Iterator[Frame]:
    """Each picture, and each `every`-th frame of a video; what cannot be read comes as an error and ends nothing."""
    for name in names:
        try:
            if is_video(name):
                with Video(name) as video:
                    yield from video.frames(every)
            elif name == STDIN:
                data = sys.stdin.buffer.read(MAX_STDIN + 1)
                if len(data) > MAX_STDIN:
                    raise ImageError(f"stdin has more than {MAX_STDIN >> 20} MiB, which is no picture; send one")
                yield Frame("stdin", load_image(data))
            else:
                yield Frame(name, load_image(name))
        except ImageError as error:
            yield Frame(name, None, error)


class Video:
    """A video file or, by its number, a webcam. Raises MissingError without OpenCV, ImageError where it cannot open."""

    def __init__(self, source: str | int) -> None:
        self.name = f"webcam {source}" if isinstance(source, int) else source
        cv2 = open_cv("reading a video")
        if isinstance(source, str) and not is_file(Path(source)):
            raise ImageError(f"no video at {source}; check the path")
        self._capture: Any = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            if isinstance(source, int):
                raise MissingError(f"no webcam {source} can be opened; check that it is there and not in use")
            raise ImageError(f"{source} cannot be read as a video; convert it to an MP4")
        self.fps = float(self._capture.get(cv2.CAP_PROP_FPS)) or 30.0

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Frames in RGB, named by their number. Raises ImageError where there is none at all."""
        number = -1
        while True:
            there, pixels = self._capture.read()
            if not there:
                break
            number += 1
            if number % every == 0:
                yield Frame(f"{self.name}#{number}", pixels[:, :, ::-1].copy())
        if number < 0:
            raise ImageError(f"{self.name} has no frame that can be read; convert it to an MP4")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.release()


class VideoFile:
    """Writes drawn frames, RGB, as an MP4 of the first one's size. Raises OutputError."""

    def __init__(self, path: Path, fps: float) -> None:
        self._cv2, self._path, self._fps = open_cv("writing a video"), path, fps
        self._writer: Any = None

    def add(self, picture: Pixels) -> None:
        height, width = picture.shape[:2]
        if self._writer is None:
            code = self._cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = self._cv2.VideoWriter(str(self._path), code, self._fps, (width, height))
            if not self._writer.isOpened():
                raise OutputError(f"cannot write {self._path}; choose another --output that ends in .mp4")
        self._writer.write(picture[:, :, ::-1].copy())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()


def open_cv(what: str) -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise missing_extra("video", what) from error
    return cv2
