"""Loads what all tests share, in the processes that run tests."""

import gc

import pytest

# Imports and collection make two million objects, which live on: nothing is searched for garbage
# until they are there, and afterwards not among them.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Load `tests.shared`, which imports torch, unless this process only controls others."""
    has_workers = config.getoption("numprocesses", None) and not config.option.collectonly
    if hasattr(config, "workerinput") or not has_workers:
        config.pluginmanager.import_plugin("tests.shared")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    # Tracing makes many objects, most of which live on: fewer collections save a tenth of the time.
    gc.set_threshold(50_000, 20, 50)
    gc.enable()
