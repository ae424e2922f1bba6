"""Every kernel compiles to the intended instructions, on every target, without a GPU.

Checked in machine code: matrix instructions for products, POPC for counting bits, no spilled
registers, and no contracted product and sum. For the versions of Triton see
`tests/ops/test_triton.py`.
"""

import importlib.util
import os

import pytest

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
pytestmark = [
    pytest.mark.deep,
    needs_compiler,
    pytest.mark.skipif(
        bool(os.environ.get("TRITON_INTERPRET")), reason="TRITON_INTERPRET=1 compiles nothing"
    ),
]
TARGETS = ("sm_80", "sm_90", "sm_120", "gfx942")
# One launch of every kernel: their instructions are those of sm_80 (sm_120 for sm_100).
ALIKE = ("sm_89", "sm_100")
ONE_EACH = ("float16, bits, residual", "groups of 16", "7x7 stem in float16", "maps", "tail")


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[pytest.mark.weekly] * (target != "sm_90"))
        for target in (*TARGETS, *ALIKE)
    ],
)
def test_kernels_use_the_right_instructions_and_no_local_memory(target: str) -> None:
    from tests.kernels import launches
    from tests.kernels.compiling import compiled

    amd = target.startswith("gfx")
    integer = r"v_mfma_i32" if amd else r"\b(?:IMMA|IGMMA|UTCIMMA)\b"
    half = r"v_mfma_f32" if amd else r"\b(?:HMMA|HGMMA|UTCHMMA)\b"
    wanted = {
        **dict.fromkeys(launches.MATRIX, integer),
        **dict.fromkeys(launches.POPCOUNT, r"v_bcnt_u32" if amd else r"\bPOPC\b"),
        **{name: half for name in launches.STEMS if "float32" not in name},
    }
    cases = launches.MATRIX | launches.POPCOUNT | launches.STEMS | launches.OTHERS
    rows = []
    for name in ONE_EACH if target in ALIKE else cases:
        record = cases[name]
        for launch in record(0 if amd else int(target[3:])):
            code = compiled(launch, target)
            found = code.count(wanted[name]) if name in wanted else 0
            if launch.kernel.__name__.startswith("bconv2d"):
                # The epilogue's one fma, and none that a compiler made of a product and a sum.
                assert code.fused == code.conversions, name
            rows.append((name, launch.kernel.__name__, code.registers, code.spills, found))
    print(f"{target}: case, kernel, registers, spills, instructions wanted")
    print(*rows, sep="\n")
    assert [row for row in rows if row[3]] == []
    assert [row for row in rows if row[0] in wanted and not row[4]] == []
