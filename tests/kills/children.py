"""Child processes that are killed at random moments by SIGKILL, as if memory were short."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

__all__ = ["Child", "FailedError", "leftovers"]


class FailedError(Exception):
    """A kill lost something, or a child failed that was not killed."""


class Child:
    """A forked process that runs a function; what it prints goes to a file."""

    def __init__(self, function: Callable[[], object], log: Path) -> None:
        self._log = log
        self._pid = os.fork()
        if self._pid == 0:
            self._run(function)

    def _run(self, function: Callable[[], object]) -> None:
        code = 1
        try:
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def kill_after(self, seconds: float) -> bool:
        """Kill it then; return False where it ended by itself before.

        Raises:
            FailedError: it ended with an error.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self.wait()
                return False
            time.sleep(min(left, 0.001))
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        if os.WIFEXITED(status):
            self._check(status)
            return False
        return True

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            FailedError: it ended with an error.
        """
        _, status = os.waitpid(self._pid, 0)
        self._check(status)

    def _check(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            raise FailedError(f"a child ended with {code}:\n{self._log.read_text()[-3000:]}")


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*.tmp"))
