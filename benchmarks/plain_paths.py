"""Our bundles of S against the plain paths that users take today, in one interleaved run.

    .venv/bin/python benchmarks/plain_paths.py [--rounds 9] [--seconds 1.5] [--threads 2] [--output results.md]

All contestants have the same random weights and take the same normalised float32 tensor. Plain paths:
torch.onnx.export (opset 20 and 23) with onnxsim's defaults, in ONNX Runtime and in OpenVINO, and ov.convert_model. All
compute in float32 but for those whose name ends in bf16, which take part on CPUs that have it: there OpenVINO
computes in bfloat16 where nobody asks for anything, so that plain path is what its users get.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import onnxsim
import openvino as ov
import torch

from dualtoken_deploy import Bundle, export
from dualtoken_deploy.bench import bench
from dualtoken_deploy.bundle.store import write_bundle
from dualtoken_deploy.models.registry import random_model
from dualtoken_deploy.targets.openvino.runner import has_bfloat16


def plain_bundles(folder: Path, ours: Bundle) -> list[Path]:
    """One bundle for each plain path, with the manifest of ours but for name and target."""
    model, image = random_model("s"), torch.randn(1, 3, 224, 224)
    made: list[Path] = []

    def seal(name: str, target: str, precision: str = "fp32") -> None:
        manifest = replace(ours.manifest, target=target, precision=precision, rules=(), files={})
        write_bundle(folder / name, manifest, ours.golden, ours.labels)
        made.append(folder / name)

    for opset in (20, 23):
        names = {"input_names": ["input"], "output_names": ["logits"]}
        program = torch.onnx.export(model, (image,), dynamo=True, opset_version=opset, verbose=False, **names)
        if program is None:
            raise RuntimeError("torch.onnx returned no program")
        graph, _ = onnxsim.simplify(program.model_proto)
        (folder / f"plain-ort-{opset}").mkdir()
        onnx.save(graph, folder / f"plain-ort-{opset}" / "model.onnx")
        seal(f"plain-ort-{opset}", "onnxruntime")
        (folder / f"plain-ov-{opset}").mkdir()
        converted = ov.convert_model(folder / f"plain-ort-{opset}" / "model.onnx")
        ov.save_model(converted, folder / f"plain-ov-{opset}" / "model.xml", compress_to_fp16=False)
        seal(f"plain-ov-{opset}", "openvino")
    (folder / "plain-ov-torch").mkdir()
    converted = ov.convert_model(model, example_input=image, input=[1, 3, 224, 224])
    converted.inputs[0].get_tensor().set_names({"input"})
    converted.outputs[0].get_tensor().set_names({"logits"})
    ov.save_model(converted, folder / "plain-ov-torch" / "model.xml", compress_to_fp16=False)
    seal("plain-ov-torch", "openvino")
    if has_bfloat16():
        (folder / "plain-ov-torch-bf16").mkdir()
        ov.save_model(converted, folder / "plain-ov-torch-bf16" / "model.xml", compress_to_fp16=True)
        seal("plain-ov-torch-bf16", "openvino", "bf16")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = []
        for target, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
            if precision == "fp32" or has_bfloat16():
                ours.append(folder / f"ours-{target}-{precision}")
                export("s", target, precision, input_kind="tensor", output=ours[-1])
        everyone = [*ours, *plain_bundles(folder, Bundle.open(ours[0]))]
        report = bench(everyone, "eager", arguments.threads, rounds=arguments.rounds, seconds=arguments.seconds)
    text = report.to_markdown()
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
