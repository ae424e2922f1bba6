"""Commands in their own sessions, which end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1
_PLACES = (
    *("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"),
    *("/opt/nvidia/nsight-compute/*", "/usr/local/cuda/nsight-compute-*"),
)


def python(module: str, *words: str) -> list[str]:
    """Return the command that runs a module in this Python, with unbuffered output."""
    return [sys.executable, "-u", "-m", module, *words]


def find_tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [f"{home}/bin" for home in homes if home]
    for place in _PLACES:
        folders += sorted(map(str, Path("/").glob(place.lstrip("/"))), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command and append its output to a file.

    Raises:
        OSError: it cannot be started.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """Let the system kill this process if its parent is killed and cannot do it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate what is left of a command's session, then kill it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):  # all have ended already
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def last_line(log: Path, offset: int = 0) -> str:
    """Return the last nonempty line of a file after an offset, or say that there is none."""
    lines = log.read_bytes()[offset:].decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"
