import json
from pathlib import Path

import pytest
import recording


def test_what_is_recorded_starts_with_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "commit", lambda: "0123abc")
    recording.record({"threads": 2}, tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text("utf-8")
    assert list(json.loads(text).items()) == [("commit", "0123abc"), ("threads", 2)]
    assert text.endswith("}\n")
