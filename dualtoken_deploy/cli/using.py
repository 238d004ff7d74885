"""Commands that put a model to use on a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualtoken_deploy.cli.common import AllowNative, Device, Json, OneBundle, Threads, importing, say, show, with_torch


def predict(
    bundle: OneBundle,
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    top: Annotated[int, typer.Option(min=1, help="Classifiers: classes to show.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Draw boxes or masks over the (one) picture here (.png).")] = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Detectors: least score of an object.")] = 0.5,
    device: Device = None,
    threads: Threads = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Shows what a bundle sees in pictures: the most likely classes, objects, areas, or a vector, by its task."""
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    from dualtoken_deploy.bundle.store import Bundle
    from dualtoken_deploy.use import predict as module

    opened = Bundle.open(bundle)
    if output is not None:
        module.check_drawing(opened, output, len(images))
    predictions = module.predict(opened, images, top, min_score, device, threads)
    if output is not None:
        module.draw(predictions[0], output)
        say(f"drawn: {output}")
    show(json_output, [p.to_json() for p in predictions], lambda r: r.prediction_table(predictions))


def visualize(
    source: Annotated[str, typer.Argument(help="Bundle folder, or weights: of a run, or digits, or shapes.")],
    image: Annotated[Path, typer.Argument(help="Picture.")],
    output: Annotated[Path, typer.Option(help="Where to draw it (.png, .svg, .pdf).")],
) -> None:
    """Draws which global tokens the image tokens read in the last block (the paper's Figure 4)."""
    with_torch("looking into a model", importing("use.visualize")).visualize(source, image, output)
    say(f"drawn: {output}")
