"""Commands that put a model to use on a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualtoken_deploy.cli.common import Device, Json, OneBundle, Threads, importing, say, show, with_torch


def predict(
    bundle: OneBundle,
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    device: Device = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Shows the most likely classes of pictures."""
    from dualtoken_deploy.predict import predict as run

    predictions = run(bundle, images, top, device, threads)
    show(json_output, [p.to_json() for p in predictions], lambda r: r.prediction_table(predictions))


def visualize(
    source: Annotated[str, typer.Argument(help="Bundle folder, or weights: of a run, or digits, or shapes.")],
    image: Annotated[Path, typer.Argument(help="Picture.")],
    output: Annotated[Path, typer.Option(help="Where to draw it (.png, .svg, .pdf).")],
) -> None:
    """Draws which global tokens the image tokens read in the last block (the paper's Figure 4)."""
    with_torch("looking into a model", importing("visualize")).visualize(source, image, output)
    say(f"drawn: {output}")
