"""Names what a camera sees, at 30 frames a second; frames that come while one is looked at are dropped and counted.

    python examples/python/camera.py BUNDLE                    webcam 0, with OpenCV: the extra [video]
    python examples/python/camera.py BUNDLE --source clip.mp4
    python examples/python/camera.py BUNDLE --source photos/   pictures of a folder in turn, without OpenCV

A thread reads and keeps the newest frame alone, so that what is named is never older than one look at it.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualtoken_deploy import Classifier

FPS = 30.0
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Newest:
    """The newest frame of a source; `dropped` counts those that nobody took."""

    def __init__(self, frames: Iterator[Any], pace: float = 1 / FPS) -> None:
        self.dropped = self.read = 0
        self._frames, self._pace = frames, pace
        self._there = threading.Condition()
        self._frame: Any = None
        self._ended = self._left = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        try:
            for frame in self._frames:
                with self._there:
                    if self._left:
                        break
                    self.dropped += self._frame is not None
                    self.read += 1
                    self._frame = frame
                    self._there.notify()
                due += self._pace
                time.sleep(max(due - time.monotonic(), 0))
        finally:  # also where the source failed: nobody waits for a frame that never comes
            with self._there:
                self._ended = True
                self._there.notify()

    def take(self) -> Any:
        """Waits for a frame that was not taken yet; None at the end."""
        with self._there:
            self._there.wait_for(lambda: self._frame is not None or self._ended)
            frame, self._frame = self._frame, None
            return frame

    def close(self) -> None:
        """Ends the reading before the source is released."""
        with self._there:
            self._left = True
        self._thread.join()


def from_opencv(source: str) -> tuple[Iterator[Any], Any]:
    import cv2  # the extra [video]

    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not capture.isOpened():
        raise SystemExit(f"{source} cannot be opened as a webcam or a video; give another --source")

    def frames() -> Iterator[Any]:
        while (found := capture.read())[0]:
            yield found[1]

    return frames(), capture.release


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--source", default="0", help="webcam, video file, or folder of pictures")
    parser.add_argument("--frames", type=int, default=None, help="stop after this many answers")
    options = parser.parse_args()
    folder = Path(options.source)
    if folder.is_dir():
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        if not pictures:
            raise SystemExit(f"{folder} has no picture; give another --source")
        frames, release = itertools.cycle(pictures), lambda: None
    else:
        frames, release = from_opencv(options.source)
    with Classifier(options.bundle, top=1) as classify:
        classify.warm_up()
        if classify.random_weights:
            print("the weights are random: answers mean nothing")
        newest, began, answered = Newest(frames), time.monotonic(), 0
        try:
            while options.frames is None or answered < options.frames:
                frame = newest.take()
                if frame is None:
                    break
                found = classify(frame, color="BGR")  # of paths the colour is not asked
                answered += 1
                seconds = time.monotonic() - began
                text = f"{found.label} {found.answers[0].probability:.2f}"
                print(f"{text:40s} {answered / seconds:5.1f} a second, {newest.dropped} of {newest.read} dropped")
        except KeyboardInterrupt:
            pass
        finally:
            newest.close()
            release()


if __name__ == "__main__":
    main()
