"""Commands that put a model to use on a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualtoken_deploy.cli.common import Device, Json, OneBundle, Threads, importing, say, show, with_torch
from dualtoken_deploy.errors import UsageError


def predict(
    bundle: OneBundle,
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Dense bundles: draw boxes or masks over the (one) picture here (.png).")
    ] = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Dense bundles: least score of an object.")] = 0.5,
    device: Device = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Shows the most likely classes of pictures; of a dense bundle, the objects or the areas in them."""
    from dualtoken_deploy.bundle.manifest import CLASSIFY
    from dualtoken_deploy.bundle.store import Bundle

    opened = Bundle.open(bundle)
    if opened.manifest.task == CLASSIFY:
        from dualtoken_deploy.use.predict import predict as run

        if output is not None:
            raise UsageError(f"{bundle} is a classifier and finds nothing to draw; leave --output out")
        predictions = run(opened, images, top, device, threads)
        show(json_output, [p.to_json() for p in predictions], lambda r: r.prediction_table(predictions))
        return
    from dualtoken_deploy.use import drawing
    from dualtoken_deploy.use.predict_dense import predict_dense

    if output is not None:
        drawing.check_png(output)
        if len(images) != 1:
            raise UsageError(f"--output is one drawing, but {len(images)} pictures were given; give one")
    found = predict_dense(opened, images, min_score, device, threads)
    if output is not None:
        drawing.draw(found[0], output)
        say(f"drawn: {output}")
    show(json_output, [p.to_json() for p in found], lambda r: r.found_table(found))


def visualize(
    source: Annotated[str, typer.Argument(help="Bundle folder, or weights: of a run, or digits, or shapes.")],
    image: Annotated[Path, typer.Argument(help="Picture.")],
    output: Annotated[Path, typer.Option(help="Where to draw it (.png, .svg, .pdf).")],
) -> None:
    """Draws which global tokens the image tokens read in the last block (the paper's Figure 4)."""
    with_torch("looking into a model", importing("use.visualize")).visualize(source, image, output)
    say(f"drawn: {output}")
