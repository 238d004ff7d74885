"""Executes Core ML programs (MIL) from a saved .mlpackage in numpy, operation by operation, on any machine.

This is a reference execution and not Core ML: it tells what the program computes, not how fast a device is. Every
stored tensor is rounded to the dtype that the program declares, so float16 overflow and loss show; sums inside one
operation are float32, while hardware may also accumulate in float16.
"""

from dualtoken_deploy.targets.coreml.mil.execute import MilProgram
from dualtoken_deploy.targets.coreml.mil.program import load_program

__all__ = ["MilProgram", "load_program"]
