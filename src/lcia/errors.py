"""What can go wrong because of the user's input, as one exception with one exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad usage, configuration or data: the command prints the message and exits with code 2.

    The message names the file, line or key, and says what would be right.
    """

    exit_code = 2


class GateError(Exception):
    """A gate said no, for example forgetting over its budget: exit code 3."""

    exit_code = 3


class RunsFailed(Exception):
    """Of runs in processes of their own some failed; what they said has been told: exit code 1."""

    exit_code = 1


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """A sentence that names the nearest valid name, or lists all of them when none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {near[0]!r}?"
    return "Valid: " + ", ".join(names) + "."
