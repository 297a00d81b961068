"""Regular expressions of an adapter_config.json, matched with a time limit, as the file is not trusted."""

from __future__ import annotations

import json
import subprocess
import sys

MAX_SECONDS = 5
Matches = dict[str, set[str]]  # a regular expression -> the names that it matches as a whole

_PROGRAM = (
    "import json, re, sys; patterns, names = json.load(sys.stdin); "
    "json.dump([[n for n in names if re.fullmatch(p, n)] for p in patterns], sys.stdout)"
)


def match_patterns(patterns: list[str], names: list[str]) -> Matches:
    """Return the names that each regular expression matches as a whole.

    Python's engine backtracks, for years on some expressions, and cannot be interrupted: they are matched in a
    process of their own, for MAX_SECONDS at most.
    Raises: ValueError naming the expressions that take longer.
    """
    if not patterns:
        return {}
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=MAX_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        listed = ", ".join(f"{pattern!r:.100}" for pattern in patterns)
        message = f"matching takes more than {MAX_SECONDS} s: {listed}; name the modules in a list instead"
        raise ValueError(message) from None
    return {pattern: set(matched) for pattern, matched in zip(patterns, json.loads(result.stdout), strict=True)}
