"""`python -m qwen3fast`, and the command `qwen3fast`."""

import warnings
from importlib import import_module


def main() -> int:
    """Run the command line. Returns: the exit status."""
    warnings.formatwarning = lambda message, *_: f"qwen3fast: warning: {message}\n"
    try:
        cli = import_module("qwen3fast.cli")  # by name, in here: Ctrl-C may come meanwhile
    except KeyboardInterrupt:
        return 130
    status: int = cli.main()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
