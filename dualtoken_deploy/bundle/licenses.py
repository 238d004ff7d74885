"""Under which licence weights and code are: SPDX expressions, as `--license` takes them."""

from __future__ import annotations

from collections.abc import Sequence

from dualtoken_deploy.bundle.blocks import Licenses
from dualtoken_deploy.errors import UsageError, missing_extra

OURS = "Apache-2.0"  # of this package: its code, and the weights that come along
PARTS = ("weights", "code")


def parse_licenses(given: Sequence[str], known: Licenses | None = None) -> Licenses:
    """ "EXPR", "weights=EXPR" or "code=EXPR", in any order; the first is of both, but for a part that is `known`.

    Raises UsageError on what is no SPDX expression and on a part that is given twice, MissingError without the list.
    """
    said: dict[str, str] = {}
    both: str | None = None
    for text in given:
        part, separator, expression = text.partition("=")
        if separator and part not in PARTS:
            raise UsageError(f"--license {text!r} is of neither weights nor code; give EXPR, weights=EXPR or code=EXPR")
        if (part in said) if separator else (both is not None):
            raise UsageError(f"--license is given twice for {part if separator else 'weights and code'}; give it once")
        if separator:
            said[part] = spdx(expression)
        else:
            both = spdx(text)
    known = known or Licenses()
    return Licenses(
        weights=said.get("weights") or both or known.weights,
        code=said.get("code") or known.code or both,
    )


def spdx(expression: str) -> str:
    """An expression in SPDX's own spelling. Raises UsageError on one that names no licence of its list."""
    try:
        from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
    except ImportError as error:
        raise missing_extra("export", "SPDX's list of licences") from error
    try:
        return str(canonicalize_license_expression(expression))
    except InvalidLicenseExpression as error:
        raise UsageError(
            f"--license {expression!r} is no SPDX expression ({error}); give one such as MIT, Apache-2.0 OR MIT, "
            "CC-BY-NC-4.0, or LicenseRef-NAME for one of your own (https://spdx.org/licenses)"
        ) from error
