"""A bundle with all that can be measured of it here; what cannot is said, and no reason to stop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import MissingError, UsageError, missing_extra
from dualtoken_deploy.prove.contents import Subject
from dualtoken_deploy.prove.measure import Setting, Tell, measure

if TYPE_CHECKING:
    from dualtoken_deploy.use.diagnose import Diagnosis


def look(bundle: Bundle, setting: Setting, drift: bool, command: str, tell: Tell) -> Subject:
    """Raises what measuring raises, but for a runtime or device that is not here."""
    try:
        report = measure(bundle, setting, command, tell)
    except MissingError as error:
        return Subject(bundle, None, str(error))
    return Subject(bundle, report, drift=_drift(bundle, setting, tell) if drift else None)


def _drift(bundle: Bundle, setting: Setting, tell: Tell) -> Diagnosis | None:
    try:
        module = importlib.import_module("dualtoken_deploy.use.diagnose")
    except ModuleNotFoundError as error:
        raise missing_extra("export", "diagnosing a bundle") from error
    try:
        found: Diagnosis = module.diagnose(bundle, setting.data, progress=tell)
    except UsageError as error:  # a target that cannot be looked into
        tell(str(error))
        return None
    return found
