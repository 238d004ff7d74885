"""THE table of tasks: one row each. A new one is a module of this folder and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.tasks.base import Task
from dualtoken_deploy.tasks.classify import CLASSIFY
from dualtoken_deploy.tasks.detect import DETECT
from dualtoken_deploy.tasks.embed import EMBED
from dualtoken_deploy.tasks.forecast import FORECAST
from dualtoken_deploy.tasks.segment import SEGMENT
from dualtoken_deploy.tasks.tensors import TENSORS
from dualtoken_deploy.tasks.tokenize import TOKENIZE

_ROWS = (CLASSIFY, DETECT, SEGMENT, EMBED, TENSORS, FORECAST, TOKENIZE)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ROWS})


# Scores that are no shares of 1, whatever the task: names of a unit mean the same wherever they occur.
PLAIN = frozenset(name for task in _ROWS for name in task.plain)


def get_task(name: str) -> Task:
    """The row of a task. Raises UsageError that lists the valid names."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; valid tasks: {', '.join(TASKS)}")
    return TASKS[name]
