"""A plugin of pytest: a failure is printed when it happens, and a process that is ended prints where it was.

pytest itself prints tracebacks when all tests are done, which a process that hangs does not reach.
After an error that the device keeps, the other tests of the process are left out: they would all fail with it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Generator

import pytest

from gpu_check.processes import CAUSE

faulthandler.register(signal.SIGTERM, os.dup(2), chain=True)  # pytest redirects standard error later


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print the error of a test that has failed."""
    report = yield
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        [cause, *_] = (crash.message if crash is not None else str(report.longrepr)).splitlines() or [""]
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"{CAUSE}{report.nodeid}: {cause}\n{report.longreprtext}")
        if error := lasting_error():
            item.session.shouldstop = f"the device reports an error to every call: {error}"
    return report


def lasting_error() -> str:
    """Return the error that the device reports from now on; "" if there is none."""
    torch = sys.modules.get("torch")  # not imported here: tests choose its threads before
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as err:
            return str(err).splitlines()[0]
    return ""
