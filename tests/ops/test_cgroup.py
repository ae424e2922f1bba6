"""The processors that control groups allow."""

from pathlib import Path

import pytest

from biper_engine.ops.cgroup import cgroup_limit


@pytest.mark.parametrize(
    ("membership", "files", "wanted"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 100000"}, 1),
        (
            "4:cpu,cpuacct:/box\n3:memory:/box\n0::/",
            {
                "cpu,cpuacct/box/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            "4:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("3:memory:/box", {"memory/box/cpu.max": "100000 100000"}, None),
        ("", {}, None),
        ("no group\n0::/", {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_the_quota_of_every_group_above_counts(
    tmp_path: Path, membership: str, files: dict[str, str], wanted: int | None
) -> None:
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(membership, encoding="ascii")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    limit = cgroup_limit(root, proc)
    assert limit == wanted if wanted is not None else limit > 1_000_000
