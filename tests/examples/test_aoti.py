"""The C++ program that runs packages of AOTInductor with our operators, without Python."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from biper_engine import Engine
from biper_engine.bits import pack_weight
from biper_engine.graph.operators import OPERATORS
from tests.examples.aoti_program import EXAMPLE, built
from tests.native.builds import succeed
from tests.networks_by_hand import GraphBuilder, classifier, engine_of, signature

aten, biper = torch.ops.aten, torch.ops.biper


def test_the_schemas_are_those_of_the_operators() -> None:
    text = (EXAMPLE / "schemas.inc").read_text(encoding="utf-8")
    found = dict(re.findall(r'^BIPER_OPERATOR\("(\w+)", "(.*)"\)$', text, re.MULTILINE))
    for name, schema in found.items():
        wanted = str(getattr(torch.ops.biper, name).default._schema)
        assert f"biper::{name}{schema}" == wanted
    declared = {name for name in OPERATORS if name.startswith("biper.")}
    assert {f"biper.{name}" for name in found} == declared


def test_every_operator_of_the_schemas_has_a_kernel() -> None:
    names = re.findall(r'OPERATOR\("(\w+)"', (EXAMPLE / "schemas.inc").read_text("utf-8"))
    kernels = re.findall(r'm\.impl\("(\w+)"', (EXAMPLE / "operators.cpp").read_text("utf-8"))
    assert names == kernels


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory)


@pytest.mark.weekly
def test_it_gives_what_pythons_package_gives_bit_for_bit(program: Path, tmp_path: Path) -> None:
    engine, package = classifier(), tmp_path / "network.pt2"
    engine.export(package)
    images = torch.randn(5, 3, 8, 8)
    images.numpy().tofile(tmp_path / "images.f32")
    out = succeed(program, package, tmp_path / "images.f32", "5,3,8,8")
    logits = torch.tensor([float(word) for word in out.split()]).view(5, -1)
    assert torch.equal(logits, torch._inductor.aoti_load_package(str(package))(images))
    assert torch.allclose(logits, engine(images), atol=1e-5)


def weight_only() -> Engine:
    """A network of a linear layer and a convolution that have binary weights and real inputs."""
    g = GraphBuilder()
    vector = [g.constant(f"v{i}", g.normal(40)) for i in range(2)]
    packed = pack_weight(g.normal(40, 3, 3, 3) >= 0)
    weight = g.call(
        *("unpacked", biper.unpack_weight.default, g.constant("conv.weight", packed), *vector),
        channels=3,
    )
    maps = g.call("conv", aten.conv2d.default, g.input("image"), weight)
    rows = g.call("rows", aten.mean.dim, maps, [2, 3])
    words = pack_weight(g.normal(6, 40, 1, 1) >= 0)[:, 0, 0]
    held = [g.constant("fc.weight", words), g.constant("fc.multiplier", g.normal(6))]
    result = g.call("fc", biper.weight_linear.default, rows, *held)
    return engine_of(g.module(result), signature({"image": (3, 8, 8)}, (0,), {}, 0))


def with_products() -> Engine:
    """A network of a product of two packed maps, of integer sums, a bit pool and `unbinarize`."""
    g = GraphBuilder()
    bits = g.call("bits", biper.binarize.default, g.input("image"))
    pooled = g.call("pool", biper.bmaxpool2d.default, bits, 3, [2, 2], stride=[2, 2])
    held = g.constant("weight", pack_weight(g.normal(5, 3, 3, 3) >= 0))
    sums = g.call("sums", biper.bconv2d.default, pooled, held, in_channels=3)
    product = g.call("product", biper.bmatmul.default, bits, bits, channels=3)
    scaled = {"multiplier": 0.5, "row_multiplier": 2.0, "bias": 1.0, "low_b": 0}
    other = g.call("scaled", biper.bmatmul_float.default, bits, bits, channels=3, **scaled)
    signs = g.call("signs", biper.unbinarize.default, pooled, 3)
    outputs = [
        g.call(f"f{i}", aten._to_copy.default, x, dtype=torch.float32)
        for i, x in enumerate((sums, product, other, signs))
    ]
    return engine_of(g.module(*outputs), signature({"image": (3, 8, 8)}, (0,), {}, [0] * 4))


@pytest.mark.weekly
@pytest.mark.parametrize("make", [weight_only, with_products])
def test_it_has_every_other_operator(
    program: Path, tmp_path: Path, make: Callable[[], Engine]
) -> None:
    engine, package = make(), tmp_path / "network.pt2"
    engine.export(package)
    images = torch.randn(5, 3, 8, 8)
    images.numpy().tofile(tmp_path / "images.f32")
    out = succeed(program, package, tmp_path / "images.f32", "5,3,8,8")
    got = torch.tensor([float(word) for word in out.split()])
    result = torch._inductor.aoti_load_package(str(package))(images)
    tensors = result if isinstance(result, (list, tuple)) else [result]
    assert torch.equal(got, torch.cat([x.flatten() for x in tensors]))


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.pt2", "images.f32", "5,3,8,8"], "gone.pt2"),
        (["gone.pt2", "images.f32", "6,3,8,8"], "images.f32 must hold 4608 bytes"),
        ([], "usage: "),
    ],
)
def test_it_names_what_is_wrong(
    program: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    torch.randn(5, 3, 8, 8).numpy().tofile(tmp_path / "images.f32")
    done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert message in done.stderr
