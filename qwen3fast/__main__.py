"""`python -m qwen3fast`."""

from qwen3fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
