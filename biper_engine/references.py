"""Code that a user names: `module:callable`, or a file, as in `mynet.py:build`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["call", "parsed", "resolve"]

_REFERENCE = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


def parsed(text: str) -> tuple[str, str] | None:
    """Return module, or file of Python code, and name of an object in it; None for other texts."""
    match = _REFERENCE.fullmatch(text)
    return (match[1], match[2]) if match else None


def resolve(module_name: str, attribute: str) -> Any:
    """Import the module, also from the current directory, or run the file, and return the object.

    Raises:
        ValueError: there is no such module, file or name, or the file is not Python code.
        ImportError: something else that the module imports is missing.
    """
    from_file = module_name.endswith(".py")
    target: Any = _run_file(Path(module_name)) if from_file else _imported(module_name)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ValueError(
                f"'{module_name}:{attribute}': {'file' if from_file else 'module'} {module_name} "
                f"has no '{attribute}'."
            )
        target = getattr(target, name)
    return target


def call(target: Any, text: str, wanted: str, then: str = "") -> Any:
    """Call an object without arguments.

    Args:
        target: from `resolve`.
        text: what messages call it.
        wanted: what it should return.
        then: what follows once there is a function without arguments.

    Raises:
        ValueError: it cannot be called so.
    """
    if not callable(target):
        raise ValueError(
            f"'{text}' is a {type(target).__name__}, wanted a callable without required arguments "
            f"that returns {wanted}."
        )
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise ValueError(
            f"'{text}' cannot be called without arguments: {error}. Write a function without "
            f"arguments that calls it, and name that one{f', {then}' if then else ''}."
        ) from error
    return target()


def _imported(name: str) -> Any:
    """Import a module, also from the current directory, as `python -m` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"No module '{name}' in '{here}' or among the installed packages. "
                "Run biper where the file is, or pass the file, as in path/to/mynet.py:build."
            ) from error
        raise
    finally:
        sys.path.remove(here)


def _run_file(path: Path) -> Any:
    """Run a file of Python code as a module, which may import what is beside it."""
    if not path.is_file():
        raise ValueError(f"There is no file '{path}' in '{Path.cwd()}'.")
    name = path.stem if path.stem not in sys.modules else f"_{path.stem}_of_biper"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None, "the name ends with .py"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[name] = module  # as importing does: dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        if "relative import" in str(error):
            raise ValueError(
                f"'{path}' imports from its own package: run biper in the folder of the package, "
                f"and name the module with dots, as in {path.parent.name}.{path.stem}:build."
            ) from error
        raise
    except SyntaxError as error:
        del sys.modules[name]
        raise ValueError(f"'{path}' is not Python code: {error}.") from error
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module
