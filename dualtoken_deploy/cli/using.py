"""Commands that put a model to use on a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualtoken_deploy.cli.common import (
    AllowNative,
    Device,
    Json,
    OneBundle,
    Threads,
    command_line,
    importing,
    progress,
    remark,
    say,
    show,
    with_torch,
    write_out,
)
from dualtoken_deploy.errors import ImageError, UsageError
from dualtoken_deploy.use.text import printable

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.store import Bundle
    from dualtoken_deploy.use.model import Model, Prediction
    from dualtoken_deploy.use.sources import Frame, VideoFile

TABLE, CSV, JSON_LINES = "table", "csv", "jsonl"
AT_ONCE = 16  # pictures in memory


def predict(
    bundle: OneBundle,
    images: Annotated[
        list[str] | None, typer.Argument(help="Pictures, videos, folders or globs of them; `-` is a picture on stdin.")
    ] = None,
    webcam: Annotated[int | None, typer.Option(min=0, help="Take the frames of this webcam, until Ctrl-C.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classifiers: classes to show.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Draw boxes or masks: one picture .png, one video .mp4, several into a folder.")
    ] = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Detectors: least score of an object.")] = 0.5,
    form: Annotated[
        str | None,
        typer.Option("--format", help="table, csv or jsonl (a JSON object a line, as it comes); of videos csv."),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Videos and webcams: stop after this many frames.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Videos and webcams: take each n-th frame.")] = 1,
    device: Device = None,
    threads: Threads = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Shows what a bundle sees in pictures: the most likely classes, objects, areas, or a vector, by its task.

    A picture that cannot be read is a row with its error; the others are answered, and the exit code is 4.
    """
    from dualtoken_deploy.bundle.store import Bundle
    from dualtoken_deploy.bundle.trust import permit_native
    from dualtoken_deploy.use import sources
    from dualtoken_deploy.use.model import Model

    permit_native(allow_native)
    if form not in (None, TABLE, CSV, JSON_LINES):
        raise UsageError(f"unknown format {form!r}; valid formats: {TABLE}, {CSV}, {JSON_LINES}")
    if (webcam is None) == (not images):
        raise UsageError("predict takes pictures, or --webcam N; give one of them")
    opened = Bundle.open(bundle)
    if opened.manifest.input.kind == "series":
        if webcam is not None or output is not None or form in (CSV, JSON_LINES):
            raise UsageError(
                f"{bundle} forecasts series; give .csv files, and leave --webcam, --output and --format out"
            )
        _forecast(opened, images or [], device, threads, json_output)
        return
    names = [] if webcam is not None else sources.find_pictures(images or [])
    moving = webcam is not None or any(map(sources.is_video, names))
    filming = output is not None and _films(opened, output, moving, len(names))
    with progress() as tell:
        tell(f"loading {opened.name}")
        model = Model(opened, device, threads, top, min_score)
    if filming and model.task.paint is None:
        raise UsageError(f"{bundle} is for the task {model.task.name}, which has nothing to draw; leave --output out")
    if model.random_weights:
        remark("warning: the weights are random: answers mean nothing")
    taken = _taken(names, webcam, every, frames)
    asked = form or (CSV if moving and not json_output else TABLE)
    with model:
        answers = _answered(model, taken, output, len(names), filming)
        _tell(model, answers, len(names), TABLE if json_output else asked, json_output)


def _films(bundle: Bundle, output: Path, moving: bool, pictures: int) -> bool:
    """Whether what is found is drawn as a video. Raises UsageError where it can be drawn in no way."""
    from dualtoken_deploy.use.predict import check_drawing

    if moving and output.suffix.lower() == ".mp4":
        return True
    if moving:
        raise UsageError(f"{output} does not end in .mp4; what was found in a video is drawn as one")
    check_drawing(bundle, output, pictures)
    return False


def _forecast(bundle: Bundle, names: list[str], device: str | None, threads: int | None, json_output: bool) -> None:
    from dualtoken_deploy.use.model import Model

    with Model(bundle, device, threads) as model:
        if model.random_weights:
            remark("warning: the weights are random: answers mean nothing")
        found = model.many(names)
        rows = [(prediction.image, None, prediction) for prediction in found]
        show(json_output, [p.to_json() for p in found], lambda r: r.prediction_table(rows, model))


Row = tuple["Frame", "Prediction | None"]


def _taken(names: Sequence[str], webcam: int | None, every: int, most: int | None) -> Iterator[Frame]:
    from dualtoken_deploy.use.sources import Video, frames

    if webcam is None:
        for count, frame in enumerate(frames(names, every)):
            if most is not None and count >= most:
                return
            yield frame
        return
    with Video(webcam) as video:
        for count, frame in enumerate(video.frames(every)):
            if most is not None and count >= most:
                return
            yield frame


def _answered(model: Model, taken: Iterator[Frame], output: Path | None, pictures: int, filming: bool) -> Iterator[Row]:
    """Each frame with its answer, drawn where that was asked for."""
    from dualtoken_deploy.use.predict import draw
    from dualtoken_deploy.use.sources import Frame, VideoFile

    film: VideoFile | None = VideoFile(output, 30.0) if filming and output is not None else None
    used: set[str] = set()
    try:
        for frame in taken:
            if frame.pixels is None:
                yield frame, None
                continue
            told = Frame(frame.name, None)  # whose pixels need not be kept
            (found,) = model.answer([(frame.name, frame.pixels)])
            if film is not None:
                film.add(model.draw(frame.pixels, found))
            elif output is not None:
                place = output if pictures == 1 and output.suffix else output / _file_name(frame.name, used)
                draw(found, place, frame.pixels)
                say(f"drawn: {place}")
            yield told, found
    finally:
        if film is not None:
            film.close()
            say(f"drawn: {output}")


def _file_name(name: str, used: set[str]) -> str:
    """A name of its own in the folder of drawings: pictures of two folders may be called the same."""
    stem, number = Path(name).stem, 1
    while f"{stem}.png" in used:
        number += 1
        stem = f"{Path(name).stem}-{number}"
    used.add(f"{stem}.png")
    return f"{stem}.png"


def _tell(model: Model, answers: Iterator[Row], pictures: int, form: str, json_output: bool) -> None:
    """Prints the answers. Raises ImageError at the end where pictures could not be read."""
    failed: list[Frame] = []
    shown: list[Any] = []
    rows: list[Row] = []
    if form == CSV:
        write_out(_csv_line(["image", *model.task.columns, "error"]))
    with progress() as tell:
        kept = iter(answers) if form != TABLE else _counted(answers, pictures, tell)
        if form == TABLE:
            rows = list(kept)
    for frame, found in rows if form == TABLE else kept:
        if found is None:
            failed.append(frame)
        if form == CSV:
            for line in _cells(model, frame, found):
                write_out(_csv_line(line))
        elif form == JSON_LINES:
            write_out(json.dumps(_plain(frame, found), allow_nan=False))
        else:
            shown.append(_plain(frame, found))
    if form == TABLE and (json_output or len(failed) < len(rows)):
        show(json_output, shown, lambda r: r.prediction_table([(f.name, f.error, p) for f, p in rows], model))
    if failed:
        first = failed[0].error
        total = pictures if form == TABLE else "them"
        raise ImageError(
            str(first) if len(failed) == 1 else f"{len(failed)} pictures of {total} could not be read; {first}"
        )


def _counted(answers: Iterator[Row], pictures: int, tell: Any) -> Iterator[Row]:
    for number, row in enumerate(answers):
        tell(f"looking at pictures: {number}/{max(pictures, number)}")
        yield row


def _plain(frame: Frame, found: Prediction | None) -> dict[str, Any]:
    if found is not None:
        return found.to_json()
    code = ImageError.exit_code
    return {"image": frame.name, "error": {"code": code, "message": str(frame.error)}}


def _cells(model: Model, frame: Frame, found: Prediction | None) -> list[list[str]]:
    width = len(model.task.columns)
    if found is None:
        return [[frame.name, *[""] * width, str(frame.error)]]
    return [[frame.name, *answer.cells(), ""] for answer in found.answers] or [[frame.name, *[""] * width, ""]]


def _csv_line(cells: Sequence[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow([_harmless(printable(cell)) for cell in cells])
    return out.getvalue()


# What a cell begins with that a spreadsheet computes (OWASP, "CSV Injection"); the last four are = + - @ in full width
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _harmless(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: names of files and classes are whoever's. Numbers stay."""
    if not cell.startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def visualize(
    source: Annotated[str, typer.Argument(help="Bundle folder, or weights: of a run, or digits, or shapes.")],
    image: Annotated[Path, typer.Argument(help="Picture.")],
    output: Annotated[Path, typer.Option(help="Where to draw it (.png, .svg, .pdf).")],
) -> None:
    """Draws which global tokens the image tokens read in the last block (the paper's Figure 4)."""
    with progress() as tell:
        tell("loading the model")
        with_torch("looking into a model", importing("use.visualize")).visualize(source, image, output, command_line())
    say(f"drawn: {output}")
