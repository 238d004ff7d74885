"""A stand-in of adb's command line and of three programs on a phone. No proof that either works with a real one.

`adb` here knows `devices`, `push`, `pull` and `shell`, with the texts and exit codes of platform tools 29; what the
shell is asked runs in this machine's own, below a folder. The programs print what their sources print; their times are
made up, their answers are the golden ones with a known error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ADB = r"""#!{python}
import json, os, shutil, subprocess, sys
state = json.load(open({state!r}))
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\n")
if words == ["devices"]:
    print("List of devices attached")
    for serial, what in state["devices"].items():
        print(f"{{serial}}\t{{what}}")
    print()
    sys.exit(0)
assert words[0] == "-s", words
serial, what = words[1], words[2:]
if state["devices"].get(serial) != "device":
    sys.exit(f"error: device '{{serial}}' not found")
if what[0] == "push":
    if state.get("full"):
        with open(what[2], "wb") as file:
            file.write(b"a part")
        sys.exit(f"adb: error: failed to copy '{{what[1]}}' to '{{what[2]}}': remote write failed: No space left"
                 " on device")
    shutil.copyfile(what[1], what[2])
    if state.get("flip"):
        with open(what[2], "ab") as file:
            file.write(b"x")
    print(f"{{what[1]}}: 1 file pushed.")
elif what[0] == "pull":
    shutil.copyfile(what[1], what[2])
elif what[0] == "shell":
    if state.get("lost") and state["lost"] in what[1]:
        sys.exit("error: closed")
    path = {tools!r} + ":" + os.environ["PATH"]
    sys.exit(subprocess.run(["/bin/sh", "-c", what[1]], env=dict(os.environ, PATH=path)).returncode)
else:
    sys.exit(f"adb: unknown command {{what[0]}}")
"""
GETPROP = """#!/bin/sh
case "$1" in
ro.product.manufacturer) echo Acme;; ro.product.model) echo "Phone 9";; ro.soc.manufacturer) echo Chips;;
ro.soc.model) echo C1000;; ro.build.version.release) echo 16;; ro.product.cpu.abi) echo arm64-v8a;;
esac
"""
# what each prints is of LiteRT's benchmark_model.cc with stats_calculator.h, of executor_runner.cpp, of benchncnn.cpp
LITERT = """
    print("INFO: Inference timings in us: Init: 5000, First inference: 9000, Warmup (avg): 9000, Inference (avg): 4000")
    print("INFO: count=1 curr=9000 p5=9000 median=9000 p95=9000")
    print("INFO: count=25 first=4100 curr=3900 min=3800 max=4600 avg=4000.5 std=90 p5=3850 median=3990 p95=4400")
"""
EXECUTORCH = """
    count = int(said["num_executions"])
    for i in range(count):
        print(f"I 00:00:00.01 executorch:executor_runner.cpp:700] Iteration {i + 1} of {count}: {8.0 + i % 3:.6f} ms")
    print(f"I 00:00:00.02 executorch:runner.cpp:712] Model executed successfully {count} time(s) in 1.0 ms.")
"""
NCNN = """
    print(f"loop_count = {loops}\\nnum_threads = {sys.argv[2]}\\npowersave = 0\\ngpu_device = -1\\ncooling_down = 0")
    print(f"{'model':>20}  min =   10.00  max =   12.00  avg =   11.00")
"""
PROGRAM = """#!{python}
import json, sys
import numpy as np
said = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
loops = sys.argv[1]
plan = json.load(open({plan!r}))
if plan.get("fails"):
    print("Error: " + plan["fails"])
    sys.exit(1)
assert open(said.get("graph") or said.get("model_path") or said["param"], "rb").read(5) == b"model"
given = (said.get("input_layer_value_files") or "").rpartition(":")[2] or said.get("inputs")
if given:
    golden = np.load(plan["golden"])
    assert np.fromfile(given, golden["input"].dtype).tobytes() == golden["input"].tobytes()
    answer = (golden["logits"] + np.float32(plan["error"])).astype("float32")
    answer.tofile(said.get("output_filepath") or said["output_file"] + "-0.bin")
else:
    pass
{times}
"""


class Phone:
    """The stand-in in `folder`; `say(**state)` changes what the device does next."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.device = folder, folder / "device"
        self.state, self.log, self.plan = folder / "state.json", folder / "log", folder / "plan.json"
        tools = folder / "tools"
        for made in (tools, self.device, folder / "bin", folder / "programs"):
            made.mkdir()
        self.say()
        self.log.touch()
        self.play()
        adb = ADB.format(python=sys.executable, state=str(self.state), log=str(self.log), tools=str(tools))
        self._write(folder / "bin" / "adb", adb)
        self._write(tools / "getprop", GETPROP)
        for name, times in (("benchmark_model", LITERT), ("executor_runner", EXECUTORCH), ("benchncnn", NCNN)):
            text = PROGRAM.format(python=sys.executable, plan=str(self.plan), times=f"if not given:{times}")
            self._write(folder / "programs" / name, text)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def say(self, devices: Mapping[str, str] = {"P9": "device"}, **state: Any) -> None:
        self.state.write_text(json.dumps({"devices": dict(devices), **state}))

    def play(self, **plan: Any) -> None:
        self.plan.write_text(json.dumps({"error": 0.0, **plan}))

    @property
    def asked(self) -> Sequence[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def left_over(self) -> list[str]:
        """What is in the device's work folder, and files that did not arrive whole."""
        base = self.device / "base"
        return [p.name for p in (base / "work").glob("*")] + [p.name for p in (base / "files").glob(".*")]
