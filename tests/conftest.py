"""Hypothesis: no deadline, since machines differ; the same examples every time in CI."""

import os

from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed" if os.environ.get("CI") else "local")
