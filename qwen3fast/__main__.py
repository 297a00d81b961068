"""`python -m qwen3fast`, and the command `qwen3fast`."""

import atexit
import signal
import warnings
from importlib import import_module


def main() -> int:
    """Run the command line. Returns: the exit status."""
    warnings.formatwarning = lambda message, *_: f"qwen3fast: warning: {message}\n"
    try:
        status: int = import_module("qwen3fast.cli").main()  # by name, in here: Ctrl-C may come meanwhile
        return status
    except KeyboardInterrupt:
        return 130
    finally:
        atexit.register(_end_at_ctrl_c)


def _end_at_ctrl_c() -> None:
    """Let Ctrl-C just end Python, which takes half a second to end; not where it is ignored, as after nohup."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    raise SystemExit(main())
