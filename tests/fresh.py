"""Programs in a process of their own that has imported torch, and nothing of this package.

An import of torch takes seconds; a server that has done it once forks the processes.
"""

import multiprocessing
import os
import tempfile
from pathlib import Path
from subprocess import CompletedProcess


def _child(program: str, environment: dict[str, str], folder: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def fresh_run(program: str, **environment: str) -> CompletedProcess[str]:
    """Run a program as `python -c` would, with further variables; wait for its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, **environment}
        child = context.Process(target=_child, args=(program, variables, folder))
        child.start()
        child.join()
        said = {name: Path(folder, name).read_text("utf-8") for name in ("out", "err")}
    assert child.exitcode is not None
    return CompletedProcess(["fresh"], child.exitcode, said["out"], said["err"])
