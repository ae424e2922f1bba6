"""The processors that the control groups of this process pay for."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cgroup_limit"]


def _quota(text: str) -> int | None:
    """Return the processors that a cgroup's "quota period" allows, rounded up; None: no limit."""
    fields = text.split()
    if len(fields) != 2 or not all(field.lstrip("-").isdigit() for field in fields):
        return None  # "max 100000"
    quota, period = map(int, fields)
    return max(1, -(-quota // period)) if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc/self")) -> int:
    """Return the processors that the control groups of this process allow; many without a limit.

    A limit holds for the groups below it, so every group up to the root counts. Reads `cpu.max` of
    version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` of version 1.
    """
    limits = []
    for line in _read(proc / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not number or not separator:
            continue  # no "number:controllers:path"
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts) + 1):
                group = mount.joinpath(*parts[:depth])
                period = _read(group / "cpu.cfs_period_us")
                limits.append(_quota(_read(group / "cpu.max")))
                limits.append(_quota(f"{_read(group / 'cpu.cfs_quota_us')} {period}"))
    return min((limit for limit in limits if limit is not None), default=1 << 30)
