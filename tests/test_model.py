"""A bundle that stays loaded: every kind of picture, many threads; and `predict` on folders, videos, stdin, with rows
for what cannot be read."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from dualtoken_deploy import Classifier, Detector, Segmenter, predict
from dualtoken_deploy.cli import main
from dualtoken_deploy.cli.using import _csv_line
from dualtoken_deploy.data.images import as_pixels, load_image
from dualtoken_deploy.errors import ImageError, MissingError, UsageError
from dualtoken_deploy.use.validate import validate
from tests.commands import fails, prints

ROOT = Path(__file__).parent.parent
MakeBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photograph: Path) -> Path:
    """Three pictures, one of them damaged."""
    place = tmp_path_factory.mktemp("pictures")
    with Image.open(photograph) as picture:
        picture.resize((80, 60)).save(place / "a.png")
        picture.resize((60, 80)).save(place / "c.jpg")
    (place / "b.png").write_bytes((place / "a.png").read_bytes()[:300])
    return place


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of six grey frames."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 30.0, (96, 64))
    for shade in range(6):
        writer.write(np.full((64, 96, 3), 40 * shade, np.uint8))
    writer.release()
    return path


# the model


def test_every_kind_of_picture_is_the_same_picture(small_bundle: MakeBundle, photograph: Path) -> None:
    pixels = load_image(photograph)
    with Classifier(small_bundle(), top=3) as classify:
        want = classify(photograph)
        assert want.probabilities.sum() == pytest.approx(1)
        assert want.label == classify.labels[int(want.probabilities.argmax())]
        assert len(want.answers) == 3
        kinds = (pixels, Image.fromarray(pixels), photograph.read_bytes(), str(photograph))
        for found in (
            *[classify(kind) for kind in kinds],
            *classify(list(kinds)),
            classify(pixels[:, :, ::-1], color="BGR"),
        ):
            np.testing.assert_array_equal(found.probabilities, want.probabilities)
        assert len(classify.many(np.stack([pixels, pixels]))) == 2
        assert not np.array_equal(classify(pixels, color="BGR").probabilities, want.probabilities)
        assert predict(classify, [pixels])[0].answers == want.answers
        (loaded,) = predict(small_bundle(), photograph, top=3)
        assert loaded.answers == want.answers


def test_frames_that_are_none(small_bundle: MakeBundle) -> None:
    with Classifier(small_bundle()) as classify:
        for frame, message in (
            (np.zeros((4, 4, 3), np.float32), "dtype float32"),
            (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
            (np.zeros((0, 4, 3), np.uint8), "shape"),
            (b"no picture", "is not a JPEG"),
        ):
            with pytest.raises(ImageError, match=message):
                classify(frame)
        with pytest.raises(UsageError, match="of type int"):
            classify(3)  # type: ignore[call-overload]
        with pytest.raises(UsageError, match="valid: RGB, BGR"):
            classify(np.zeros((4, 4, 3), np.uint8), color="HSV")
        assert classify(np.zeros((4, 6), np.uint8)).size == (4, 6)
    with pytest.raises(UsageError, match="closed"):
        classify(np.zeros((4, 4, 3), np.uint8))
    classify.close()


def test_many_threads_get_their_own_answers_one_at_a_time(
    small_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every runtime may be entered twice at once, so none is."""
    frames = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    inside, most, wrong = [0], [0], list[int]()
    with Classifier(small_bundle(), threads=1) as classify:
        classify.warm_up()
        want = [found.probabilities for found in classify.many(frames)]
        real = classify._runner.run

        def run(feeds: Any) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            out = real(feeds)
            inside[0] -= 1
            return out

        monkeypatch.setattr(classify._runner, "run", run)

        def ask(which: int) -> None:
            for _ in range(6):
                if not np.array_equal(classify(frames[which]).probabilities, want[which]):
                    wrong.append(which)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (wrong, most[0]) == ([], 1)


def test_each_task_has_its_class(small_bundle: MakeBundle, dense_bundle: MakeBundle, photograph: Path) -> None:
    with Detector(dense_bundle("retinanet"), min_score=0.1) as detect:
        found = detect(photograph)
        assert found.answers
        assert detect.draw(photograph, found).shape == load_image(photograph).shape
    with Segmenter(dense_bundle("pspnet")) as segment:
        seen = segment(photograph)
        assert seen.found.label_map is not None
        assert seen.found.label_map.shape == seen.size
    with pytest.raises(UsageError, match="open it with Classifier"):
        Detector(small_bundle())


def test_avif_always_and_heic_with_its_extra(photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    with Image.open(photograph) as picture:
        small = picture.convert("RGB").resize((64, 48))
    small.save(tmp_path / "p.avif", quality=95)
    pillow_heif.from_pillow(small).save(tmp_path / "p.heic", quality=95)
    for name in ("p.avif", "p.heic"):
        error = np.abs(load_image(tmp_path / name).astype(int) - np.asarray(small).astype(int)).mean()
        assert error < 6, name
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    with pytest.raises(ImageError, match=r"\[heif\]; run: pip install"):
        load_image(tmp_path / "p.heic")
    assert as_pixels(small).shape == (48, 64, 3)


# the command


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("=1+1", "'=1+1"), ("+cmd", "'+cmd"), ("-cmd", "'-cmd"), ("@SUM(A1)", "'@SUM(A1)"), ("\uff1d1", "'\uff1d1"),
        ("-0.25", "-0.25"), ("+1e-3", "+1e-3"), ("cat", "cat"), ("a=b", "a=b"), ("", ""), ("-", "'-"),
    ],
)  # fmt: skip
def test_no_cell_is_a_formula(cell: str, shown: str) -> None:
    """OWASP's list of first characters; the numbers of a vector stay numbers."""
    assert next(csv.reader([_csv_line([cell, "x"])])) == [shown, "x"]


def test_a_file_named_as_a_formula_is_a_name(
    small_bundle: MakeBundle,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "=cmd|' -C calc'!A0.jpg"
    (tmp_path / name).write_bytes((folder / "c.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    main(["predict", str(small_bundle()), name, "--format", "csv", "--top", "1"])
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert line["image"] == f"'{name}"


def test_one_bad_picture_is_a_row(small_bundle: MakeBundle, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (str(folder), str(folder / "*.*")):
        with pytest.raises(SystemExit) as caught:
            main(["predict", str(small_bundle()), source, "--json", "--top", "1"])
        out, err = capsys.readouterr()
        rows = json.loads(out)
        assert caught.value.code == 4
        assert [Path(row["image"]).name for row in rows] == ["a.png", "b.png", "c.jpg"]
        assert ["error" in row for row in rows] == [False, True, False]
        assert (rows[1]["error"]["code"], rows[0]["weights"]) == (4, "random")
        assert "weights are random" in err
    with pytest.raises(SystemExit):
        main(["predict", str(small_bundle()), str(folder), "--format", "csv", "--top", "2"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [Path(line["image"]).name for line in lines] == ["a.png", "a.png", "b.png", "c.jpg", "c.jpg"]
    assert "damaged" in lines[2]["error"]
    with pytest.raises(SystemExit):
        main(["predict", str(small_bundle()), str(folder), "--format", "jsonl"])
    kept = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(row.get("guesses", [])) for row in kept] == [5, 0, 5]
    with pytest.raises(SystemExit):
        main(["predict", str(small_bundle()), str(folder)])
    shown = capsys.readouterr().out
    assert "not read" in shown
    assert "weights are random" in shown


def test_stdin_and_what_is_no_source(
    small_bundle: MakeBundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "dualtoken_deploy", "predict", str(small_bundle()), "-", "--json"]
    done = subprocess.run(command, input=(folder / "a.png").read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["image"] == "stdin"
    for source, code, message in (
        ("https://example.org/cat.jpg", 2, "is a URL"),
        (str(tmp_path), 4, "folder without pictures"),
        (str(tmp_path / "*.png"), 4, "nothing matches"),
    ):
        found, line = fails(capsys, "predict", small_bundle(), source)
        assert (found, message in line) == (code, True), line
    assert fails(capsys, "predict", small_bundle())[0] == 2


def test_videos_are_answered_frame_by_frame_and_drawn(
    small_bundle: MakeBundle, dense_bundle: MakeBundle, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(small_bundle()), str(clip), "--top", "1", "--every", "2"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["image"].rpartition("#")[2] for line in lines] == ["0", "2", "4"]
    drawn = tmp_path / "drawn.mp4"
    rows = prints(capsys, "predict", dense_bundle("pspnet"), clip, "--frames", "3", "--output", drawn, "--json")
    assert len(rows) == 3
    import cv2

    capture = cv2.VideoCapture(str(drawn))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FRAME_WIDTH)) == (3, 96)
    code, line = fails(capsys, "predict", small_bundle(), clip, "--output", drawn)
    assert (code, "nothing to draw" in line) == (2, True)
    code, line = fails(capsys, "predict", small_bundle(), "--webcam", "63")
    assert (code, "no webcam 63" in line) == (MissingError.exit_code, True)


class Webcam:
    """OpenCV's capture of a device, which no machine for tests has: BGR frames from a list, each read once."""

    opened: ClassVar[list[Any]] = []

    def __init__(self, source: int | str) -> None:
        type(self).opened.append(source)
        self.left, self.released = [np.full((48, 64, 3), (number, 100, 200), np.uint8) for number in range(5)], False

    def isOpened(self) -> bool:  # noqa: N802  # OpenCV's names
        return True

    def get(self, _: int) -> float:
        return 0.0  # what a webcam says that does not know

    def read(self) -> tuple[bool, Any]:
        return (True, self.left.pop(0)) if self.left else (False, None)

    def release(self) -> None:
        self.released = True


def test_a_webcam_is_answered_frame_by_frame(
    small_bundle: MakeBundle, dense_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import cv2

    monkeypatch.setattr(cv2, "VideoCapture", Webcam)
    Webcam.opened.clear()
    main(["predict", str(small_bundle()), "--webcam", "2", "--top", "1", "--every", "2"])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["image"] for line in lines] == ["webcam 2#0", "webcam 2#2", "webcam 2#4"]
    assert Webcam.opened == [2], "by its number, not by a name"
    Image.fromarray(np.full((48, 64, 3), (200, 100, 0), np.uint8)).save(tmp_path / "rgb.png")
    (as_picture,) = prints(capsys, "predict", small_bundle(), tmp_path / "rgb.png", "--json")
    (as_frame,) = prints(capsys, "predict", small_bundle(), "--webcam", "2", "--frames", "1", "--json")
    assert as_frame["guesses"] == as_picture["guesses"], "BGR is turned into RGB"
    drawn = tmp_path / "drawn.mp4"
    main(["predict", str(dense_bundle("pspnet")), "--webcam", "0", "--frames", "3", "--output", str(drawn)])
    monkeypatch.undo()
    assert cv2.VideoCapture(str(drawn)).get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_an_interrupt_ends_a_webcam_and_keeps_what_was_drawn(
    dense_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    cameras: list[Webcam] = []

    class Interrupted(Webcam):
        def read(self) -> tuple[bool, Any]:
            cameras.append(self)
            if len(self.left) == 3:
                raise KeyboardInterrupt
            return super().read()

    monkeypatch.setattr(cv2, "VideoCapture", Interrupted)
    drawn = tmp_path / "drawn.mp4"
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(dense_bundle("pspnet")), "--webcam", "0", "--output", str(drawn)])
    monkeypatch.undo()
    assert caught.value.code == 130
    assert cameras[-1].released
    assert cv2.VideoCapture(str(drawn)).get(cv2.CAP_PROP_FRAME_COUNT) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_several_drawings_go_into_a_folder(
    dense_bundle: MakeBundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = fails(capsys, "predict", dense_bundle("pspnet"), folder, "--output", tmp_path / "drawn")
    assert code == 4  # of the damaged one
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["a.png", "c.png"]


def test_validation_skips_and_counts_what_cannot_be_read(small_bundle: MakeBundle, folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 3 pictures .* left out: .*b\.png"):
        (result,) = validate([small_bundle()], folder)
    assert (result.images, result.unreadable) == (2, 1)


def test_the_camera_example_counts_what_it_drops(small_bundle: MakeBundle, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.png").write_bytes((folder / "a.png").read_bytes())
    command = [sys.executable, str(ROOT / "examples/python/camera.py"), str(small_bundle()), "--source", str(tmp_path)]
    done = subprocess.run(
        [*command, "--frames", "3"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "weights are random" in lines[0]
    assert len(lines) == 4
    assert " dropped" in lines[-1]


def test_the_camera_example_takes_a_video_to_its_end(small_bundle: MakeBundle, clip: Path, tmp_path: Path) -> None:
    """Frames of OpenCV are arrays, which are not compared with None; a source that cannot be opened is one line."""
    command = [sys.executable, str(ROOT / "examples/python/camera.py"), str(small_bundle()), "--source"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(clip)], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert " dropped" in done.stdout.splitlines()[-1]
    done = subprocess.run(
        [*command, str(tmp_path / "none.mp4")], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert done.returncode == 1
    assert "cannot be opened as a webcam or a video" in done.stderr
    assert "Traceback" not in done.stderr
