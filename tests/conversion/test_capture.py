"""Capture: one functional graph of any model, without changes to the model itself."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion.capture import capture
from biper_engine.errors import ConversionError
from tests.conversion.comparison import Functional, assert_exact, convert_quietly, images_of, packed
from tests.conversion.foreign_models import (
    BinaryNet,
    BufferBranch,
    LearnableBias,
    QConv,
    QLinear,
    SmallNet,
    seeded,
)


def targets(model: nn.Module, *inputs: Tensor) -> list[str]:
    graph = capture(model, inputs).graph_module.graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_what_depends_on_parameters_alone_is_folded() -> None:
    called = targets(seeded(BufferBranch), torch.randn(2, 4, 8, 8))
    assert called.count("aten.sign.default") == 1
    assert not any("mean" in target or "item" in target for target in called)


@pytest.mark.some(1)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_stays_free(batch: int) -> None:
    model = seeded(SmallNet)
    graph = capture(model, (images_of((3, 8, 8), batch),)).graph_module
    for count in (1, 2, 3, 7):
        x = images_of((3, 8, 8), count)
        with torch.no_grad():
            torch.testing.assert_close(graph(x)[0], model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.some(2)
@pytest.mark.parametrize("build", [SmallNet, BinaryNet, BufferBranch])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_not_changed(build: type[nn.Module], training: bool) -> None:
    model = seeded(build).train(training)
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    identities = [id(value) for value in [*model.parameters(), *model.buffers()]]
    grads = [value.requires_grad for value in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    channels = 4 if build is BufferBranch else 3
    capture(model, (torch.randn(1, channels, 8, 8),))
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(value) for value in [*model.parameters(), *model.buffers()]] == identities
    assert [value.requires_grad for value in model.parameters()] == grads
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not any(hasattr(value, "org") for value in model.parameters())


def test_the_example_is_not_changed() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        x.data = x.data.sign()
        return self.conv(x)

    model = Functional(run, conv=QConv(3, 4, 3))
    example = torch.randn(2, 3, 5, 5)
    copied = example.clone()
    engine = convert_quietly(model, example)
    assert torch.equal(example, copied)
    engine(example)
    assert torch.equal(example, copied)


def test_sizes_that_follow_the_batch_work() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        zeros = torch.zeros(x.size(0), 1, x.size(2), x.size(3))
        tokens = self.token.bias.expand(x.size(0), -1, 5, 5)
        return self.conv(torch.cat([self.move(x), tokens, zeros + 1], 1))

    model = seeded(
        lambda: Functional(run, conv=QConv(6, 4, 3), move=LearnableBias(3), token=LearnableBias(2))
    )
    engine = convert_quietly(model, torch.randn(2, 3, 5, 5))
    for count in (1, 2, 5):
        assert_exact(engine, model, images_of((3, 5, 5), count))


def test_layers_keep_their_paths_and_repeats_are_numbered() -> None:
    model = Functional(
        lambda self, x: self.body[0](self.body[0](x) - 0.5), body=nn.Sequential(QConv(4, 4, 1))
    )
    engine = convert_quietly(model, torch.randn(2, 4, 3, 3))
    assert packed(engine) == ["body.0", "body.0#2"]


def test_functional_layers_of_the_outermost_forward_have_names() -> None:
    model = Functional(
        lambda self, x: F.conv2d(
            torch.sign(F.conv2d(torch.sign(x), torch.sign(self.conv.weight)) - 0.5),
            torch.sign(self.conv.weight),
        ),
        conv=nn.Conv2d(4, 4, 1),
    )
    names = packed(convert_quietly(model, torch.randn(2, 4, 3, 3)))
    assert len(set(names)) == 2
    assert all(name.isidentifier() for name in names)


def test_a_branch_on_the_input_is_refused_with_advice() -> None:
    model = Functional(lambda self, x: self.conv(x if x.sum() > 0 else -x), conv=QConv(3, 4, 3))
    words = (
        r"^A value computed from the input leaves the graph: `bool\(\)` in .*test_capture.py:\d+"
    )
    with pytest.raises(ConversionError, match=words):
        capture(model, (torch.randn(2, 3, 5, 5),))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ((torch.randn(2, 3, 5, 5), object()), "has a object"),
        ((3,), "contains no tensor"),
        ((torch.randn(()),), "batch of at least 1"),
        ((torch.randn(0, 3, 5, 5),), "batch of at least 1"),
        ((torch.randn(2, 3), torch.randn(3, 3)), "share one batch"),
        ((torch.randn(2, 7, 5, 5),), "could not be captured"),
    ],
)
def test_a_wrong_example_is_named(example: tuple[object, ...], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        capture(Functional(lambda self, x, y=None: self.conv(x), conv=QConv(3, 4, 3)), example)


def test_other_results_than_tensors_and_constants_are_refused() -> None:
    model = Functional(lambda self, x: {"y": self.conv(x), "n": object()}, conv=QConv(3, 4, 3))
    with pytest.raises(ConversionError, match="returns a object"):
        capture(model, (torch.randn(2, 3, 5, 5),))
    model = Functional(lambda self, x: (self.conv(x), x.shape[0]), conv=QConv(3, 4, 3))
    with pytest.raises(ConversionError, match="depends on the batch size"):
        capture(model, (torch.randn(2, 3, 5, 5),))


def test_rows_after_a_norm_over_transposed_tokens_are_captured() -> None:
    """Batch norm of a transposed value has other strides on the CPU than in a trace."""
    model = seeded(
        lambda: Functional(
            lambda s, x: s.b(s.n(s.a(x).transpose(1, 2)).transpose(1, 2)),
            a=QLinear(6, 6),
            n=nn.BatchNorm1d(6),
            b=QLinear(6, 5),
        )
    )
    engine = convert_quietly(model, images_of((7, 6)))
    assert engine.report.packed == 2


@pytest.mark.weekly
def test_an_environment_behind_a_symbolic_link(tmp_path: Path) -> None:
    packages = Path(torch.__file__).parent.parent
    link = tmp_path / "packages"
    try:
        link.symlink_to(packages, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"no symbolic link can be made ({error})")
    program = (
        "import torch\n"
        "from biper_engine import convert\n"
        "from biper_engine.nn import BinaryConv2d\n"
        "convert(torch.nn.Sequential(BinaryConv2d(3, 4, 3)).eval(), torch.zeros(1, 3, 5, 5))\n"
        "print(torch.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(link), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(link))
