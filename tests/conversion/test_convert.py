"""convert: arguments, structures, messages, and an unchanged model."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biper_engine.conversion import convert, verify
from biper_engine.engine import Engine
from biper_engine.errors import ConversionError, GeometryError
from biper_engine.metadata import Metadata
from biper_engine.models import build
from tests.conversion.comparison import (
    Functional,
    assert_close,
    assert_exact,
    convert_quietly,
    converted,
    images_of,
)
from tests.conversion.foreign_models import (
    BinaryNet,
    PlainNet,
    QConv,
    QLinear,
    SmallNet,
    seeded,
)


def float_net() -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(12):
        layers += [nn.Conv2d(3 if index == 0 else 16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def test_no_binary_layer_says_what_was_found() -> None:
    with pytest.raises(ConversionError) as caught:
        convert(float_net(), images_of((3, 6, 6)))
    message = str(caught.value)
    assert "12 convolutions" in message
    assert re.search(r"its input is a ReLU, its weight has 230\d distinct values", message)
    assert "stage-1" not in message


def test_weights_that_were_never_binarised_are_named() -> None:
    model = seeded(lambda: PlainNet(binarize=lambda w: w))
    with pytest.raises(ConversionError) as caught:
        convert(model, images_of((3, 8, 8)))
    message = str(caught.value)
    assert re.search(r"the input is a sign, but weights are real \(\d+ distinct values\)", message)
    assert "Binarise them before `convert`" in message
    assert "stage-1" not in message


def test_no_layer_at_all() -> None:
    with pytest.raises(ConversionError, match="no convolution, no linear layer and no other"):
        convert(nn.ReLU(), torch.randn(2, 3))


def test_a_stage_1_network_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"stage-1 network.*Train stage 2"):
        convert(build("cifar10/resnet20_1w1a", stage=1))


def test_a_foreign_stage_1_network_is_refused() -> None:
    model = seeded(lambda: SmallNet(binarize=lambda w: torch.sin(20 * w)))
    with pytest.raises(ConversionError, match=r"distinct values.*stage-1 checkpoint\?"):
        convert(model, images_of((3, 8, 8)))


def test_the_example_is_asked_for() -> None:
    with pytest.raises(ConversionError, match=r"PlainNet does not say.*torch.randn\(1, 3, 224"):
        convert(PlainNet())


def test_an_example_of_the_wrong_shape_or_kind() -> None:
    with pytest.raises(ConversionError, match=r"could not be captured.*model\(\*example_inputs\)"):
        convert(PlainNet(), torch.randn(1, 4, 8, 8))
    with pytest.raises(TypeError, match="`example_inputs` is a list"):
        convert(PlainNet(), [torch.randn(1, 3, 8, 8)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option",
    [{"unconverted": "no"}, {"compute_dtype": torch.float64}],
)
def test_options_out_of_range(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        convert(PlainNet(), torch.randn(1, 3, 8, 8), **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_parameters_than_float32_are_refused_with_advice(dtype: torch.dtype) -> None:
    model = seeded(PlainNet).to(dtype)
    with pytest.raises(ConversionError, match=r"float32.*model.float\(\)"):
        convert(model, images_of((3, 8, 8)).to(dtype))


def test_calls_that_do_not_fit_are_refused() -> None:
    engine, _, images = converted(PlainNet, (3, 8, 8))
    with pytest.raises(GeometryError, match="converted for images of 3x8x8"):
        engine(images[:, :, :-1])
    with pytest.raises(TypeError, match="must be float32"):
        engine(images.double())
    with pytest.raises(RuntimeError, match="inference only"):
        engine(images.clone().requires_grad_())


@pytest.mark.some(1)
@pytest.mark.parametrize(("model_class", "training"), [(SmallNet, True), (BinaryNet, False)])
def test_the_model_is_left_alone(model_class: type[nn.Module], training: bool) -> None:
    model = seeded(model_class).train(training)
    before = copy.deepcopy(model.state_dict())
    identities = [id(value) for value in [*model.parameters(), *model.buffers()]]
    engine = convert_quietly(model, images_of((3, 8, 8)), check=False)
    verify(engine, model, images_of((3, 8, 8)))
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert [id(value) for value in [*model.parameters(), *model.buffers()]] == identities
    assert all(value.requires_grad for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_a_later_change_of_the_model_does_not_reach_the_engine() -> None:
    engine, model, images = converted(PlainNet, (3, 8, 8))
    expected = engine(images)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert torch.equal(engine(images), expected)


def test_dropout_and_train_mode() -> None:
    def build_model() -> nn.Module:
        return Functional(
            lambda s, x: s.d(F.dropout(s.drop(s.norm(s.c(x))), 0.5, s.training)),
            c=QConv(3, 8, 3),
            norm=nn.BatchNorm2d(8),
            drop=nn.Dropout2d(),
            d=QConv(8, 4, 3),
        )

    model, images = seeded(build_model).train(), images_of((3, 8, 8))
    engine = convert_quietly(model, images)
    assert engine.report.packed == 2
    assert_exact(engine, model, images)


def test_several_inputs_and_a_dict_of_lists() -> None:
    def run(self: nn.Module, x: Tensor, pair: dict[str, Tensor]) -> dict[str, object]:
        y = self.a(x) + self.b(pair["side"])
        return {"maps": [y, self.c(y + 0.5)], "input": x, "mean": pair["other"].mean((2, 3))}

    model = seeded(lambda: Functional(run, a=QConv(3, 4, 3), b=QConv(2, 4, 3), c=QConv(4, 5, 1)))
    inputs = (images_of((3, 6, 6)), {"side": images_of((2, 6, 6)), "other": images_of((1, 2, 2))})
    engine = convert_quietly(model, inputs)
    assert engine.report.packed == 3
    for count in (1, 3):
        x, pair = inputs[0][:count], {key: value[:count] for key, value in inputs[1].items()}
        got, expected = engine(x, pair), model(x, pair)
        assert list(got) == list(expected)
        assert isinstance(got["maps"], list)
        means = [result.pop("mean") for result in (got, expected)]
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(*means, rtol=2.0**-22, atol=0)  # four values in another order


def test_a_sign_directly_on_two_inputs() -> None:
    model = seeded(lambda: Functional(lambda s, x, y: s.a(x) - s.a(y), a=QConv(3, 4, 3)))
    x, y = images_of((3, 6, 6)), images_of((3, 6, 6), seed=4)
    engine = convert_quietly(model, (x, y))
    assert torch.equal(engine(x, y), model(x, y))


def test_a_submodule_converts_in_place_of_itself() -> None:
    detector = seeded(lambda: nn.Sequential(PlainNet(), nn.ReLU(), nn.Linear(10, 2)))
    images = images_of((3, 8, 8))
    expected = copy.deepcopy(detector)
    detector[0] = convert_quietly(detector[0], images)
    assert isinstance(detector.train()[0], Engine)
    with torch.no_grad():
        torch.testing.assert_close(detector(images), expected(images), rtol=1e-5, atol=1e-5)


def test_metadata_comes_along() -> None:
    metadata = Metadata(class_names=("a", "b"))
    engine, model, images = converted(PlainNet, (3, 8, 8), metadata=metadata)
    assert engine.metadata is metadata
    assert engine.options == {
        "keep_float": [],
        "compute_dtype": "float32",
    }
    assert_close(engine, model, images)


def test_conversion_is_deterministic_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, _, _ = converted(PlainNet, (3, 8, 8), check=False)
    second, _, _ = converted(PlainNet, (3, 8, 8), check=False)
    assert torch.equal(torch.get_rng_state(), state)
    one, two = first.graph_module.state_dict(), second.graph_module.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert first.graph_module.code == second.graph_module.code


def test_a_layer_behind_a_binary_one_names_it_in_words() -> None:
    layers = {"c": QLinear(16, 8), "fc": nn.Linear(8, 3)}
    model = seeded(lambda: Functional(lambda s, x: s.fc(s.c(x)), **layers))
    rows = {row.name: row for row in convert_quietly(model, images_of((16,))).report.layers}
    assert str(rows["fc"].reason).startswith("its input is a binary layer, its weight has")
