"""Other binarizers, a teacher, a model and data sets given as objects, and every network."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from biper_engine import convert, models, verify
from biper_engine.errors import CheckpointError, DataError
from biper_engine.models import load_checkpoint
from biper_engine.nn import binary_layers, regularizer, set_tau
from biper_engine.training import (
    DistillationConfig,
    RunOptions,
    StageConfig,
    TrainingConfig,
    export_official,
    fit,
)
from biper_engine.training.distillation import distilled
from tests.golden.networks import BIPER
from tests.golden.published import SMALL, small
from tests.models.test_gradients import SHAPES, USUAL
from tests.training.few_images import few_images

STAGE = StageConfig(epochs=1, lr=0.05, weight_decay=1e-3, tau=0.02)
CONFIG = TrainingConfig(stage1=STAGE, stage2=STAGE, batch_size=16)
QUIET = RunOptions(progress_bar=False, accelerator="cpu", devices=1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    with few_images():
        yield


def test_a_binarizer_is_in_the_checkpoint_and_comes_back(tmp_path):
    config = dataclasses.replace(CONFIG, weight_binarizer="triangle", activation_surrogate="clip")
    result = fit(config=config, output_dir=tmp_path, options=QUIET)
    loaded = load_checkpoint(result.stage2.path)
    assert loaded.provenance.weight_binarizer == "triangle"
    assert {layer.weight_binarizer for _, layer in binary_layers(loaded)} == {"triangle"}
    assert {layer.activation_surrogate for _, layer in binary_layers(loaded)} == {"bireal"}
    with pytest.raises(ValueError, match="wanted 'periodic'"):
        export_official(result)


def test_a_binarizer_that_is_unknown_in_a_file_is_refused(tmp_path):
    network = models.build("cifar10/resnet20_1w1a", weight_binarizer="sign")
    models.save_checkpoint(tmp_path / "a.pt", network)
    contents = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**contents, "weight_binarizer": "cosine"}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="weight binarizer 'cosine'"):
        load_checkpoint(tmp_path / "b.pt")


def test_networks_that_are_not_bipers_have_their_own(tmp_path):
    config = dataclasses.replace(
        CONFIG, architecture="cifar10/birealnet18", weight_binarizer="sawtooth"
    )
    with pytest.raises(ValueError, match="cifar10/birealnet18 has its own"):
        fit(config=config, output_dir=tmp_path / "a", options=QUIET)
    with pytest.raises(ValueError, match="has its own"):
        models.build("cifar10/birealnet18", activation_surrogate="clip")
    assert not (tmp_path / "a").exists()


class Images(TensorDataset):
    """Sixteen bytes images of 8x8 noise with labels 0, 1, 2."""

    classes = ("a", "b", "c")

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=generator, dtype=torch.uint8)
        super().__init__(pixels, torch.arange(16) % 3)


@pytest.mark.deep
def test_a_model_and_data_sets_may_be_objects(tmp_path):
    model = models.build("cifar10/resnet20_1w1a", num_classes=3, frequency=7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tiny = dataclasses.replace(CONFIG, stage1=dataclasses.replace(STAGE, lr=1e-30, tau=0.0))
    result = fit(
        model, train=Images(), validation=Images(), config=tiny, output_dir=tmp_path, options=QUIET
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    first = load_checkpoint(result.stage1.path)
    assert first.provenance.frequency == 7.0
    assert first.metadata.class_names == ("a", "b", "c")
    torch.testing.assert_close(first.conv1.weight, model.conv1.weight)
    assert result.stage2.test_accuracy is None
    assert 0 <= result.stage2.validation_accuracy <= 1


def test_training_data_alone_is_measured_on_nothing(tmp_path):
    result = fit(
        "cifar10/resnet20_1w1a", train=Images(), config=CONFIG, output_dir=tmp_path, options=QUIET
    )
    assert (result.stage2.test_accuracy, result.stage2.validation_accuracy) == (None, None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "`model` is a Linear; wanted a name"),
        ({"model": "cifar10/resnet21"}, ValueError, "Unknown network"),
        ({"validation": Images()}, ValueError, "`validation` was given without `train`"),
    ],
)
def test_objects_of_another_kind_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        fit(**options, config=CONFIG, output_dir=tmp_path / "a", options=QUIET)
    assert not (tmp_path / "a").exists()


def test_a_model_of_other_classes_is_refused(tmp_path):
    model = models.build("cifar10/resnet20_1w1a", num_classes=4)
    with pytest.raises(DataError, match=r"`model` has 4 classes, but the data has 3"):
        fit(model, train=Images(), output_dir=tmp_path / "a", options=QUIET)
    assert not (tmp_path / "a").exists()


class TestTeacher:
    def test_the_loss_is_the_equation(self):
        generator = torch.Generator().manual_seed(0)
        logits, wanted = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        labels = torch.arange(6) % 4
        heat, weight = 3.0, 0.25
        p, q = (wanted / heat).softmax(1), (logits / heat).softmax(1)
        divergence = (p * (p / q).log()).sum(1).mean()
        value = (1 - weight) * F.cross_entropy(logits, labels) + weight * heat**2 * divergence
        settings = DistillationConfig(weight=weight, temperature=heat)
        torch.testing.assert_close(distilled(logits, labels, wanted, settings), value)
        alone = distilled(logits, labels, wanted, DistillationConfig())
        torch.testing.assert_close(
            alone, (wanted.softmax(1) * (wanted.softmax(1) / logits.softmax(1)).log()).sum(1).mean()
        )

    @pytest.mark.deep
    def test_a_checkpoint_or_a_module_teaches(self, tmp_path):
        plain = fit(config=CONFIG, output_dir=tmp_path / "plain", options=QUIET)
        settings = DistillationConfig(teacher=str(plain.stage1.path), weight=0.5)
        config = dataclasses.replace(CONFIG, distillation=settings)
        taught = fit(config=config, output_dir=tmp_path / "taught", options=QUIET)
        teacher = load_checkpoint(plain.stage1.path)
        again = fit(
            teacher=teacher,
            config=dataclasses.replace(CONFIG, distillation=DistillationConfig(weight=0.5)),
            output_dir=tmp_path / "again",
            options=QUIET,
        )
        states = [load_checkpoint(r.stage2.path).state_dict() for r in (plain, taught, again)]
        assert torch.equal(states[1]["conv1.weight"], states[2]["conv1.weight"])
        assert not torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"])
        unchanged = load_checkpoint(plain.stage1.path).state_dict()
        assert all(torch.equal(v, unchanged[name]) for name, v in teacher.state_dict().items())

    @pytest.mark.parametrize(
        ("teacher", "message"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), r"returns \[7\] for an image"),
            (nn.Linear(5, 10), "does not take images of"),
        ],
    )
    def test_a_teacher_of_another_task_is_refused(self, tmp_path, teacher, message):
        with pytest.raises(DataError, match=message):
            fit(teacher=teacher, config=CONFIG, output_dir=tmp_path / "a", options=QUIET)
        assert not (tmp_path / "a").exists()

    def test_a_foreign_checkpoint_is_refused(self, tmp_path):
        torch.save({"something": torch.zeros(3)}, tmp_path / "foreign.pt")
        settings = DistillationConfig(teacher=str(tmp_path / "foreign.pt"))
        config = dataclasses.replace(CONFIG, distillation=settings)
        with pytest.raises(CheckpointError, match="foreign"):
            fit(config=config, output_dir=tmp_path / "a", options=QUIET)
        assert not (tmp_path / "a").exists()


def train_one_step(network, images, stage):
    """Take one step of SGD, as the trainer does, and return whether every parameter got it."""
    for _, layer in binary_layers(network):
        layer.stage = stage
    set_tau(network, 0.02)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    labels = torch.arange(len(images)) % 3
    loss = F.cross_entropy(network.train()(images), labels) + regularizer(network)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(parameter.isfinite().all() for parameter in learned)


def check_converted(network, images):
    engine = convert(network.eval(), images, check=False, unconverted="ignore")
    report = verify(engine, network, images)
    assert report.ok, str(report)


# A network of each kind; the others differ in widths.
DEEP = ("cifar10/resnet20_1w1a", "cifar10/resnet20_1w32a", "cifar10/vgg_small_1w1a")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.deep if n in DEEP else pytest.mark.weekly) for n in BIPER],
)
def test_networks_of_biper_train_convert_and_verify(name):
    torch.manual_seed(0)
    count, size = SHAPES.get(name, USUAL)
    network, images = models.build(name), torch.randn(count, 3, size, size)
    for stage in (1, 2):
        train_one_step(network, images, stage)
    check_converted(network, images)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.deep if n == "bnext" else pytest.mark.weekly)
        for n in SMALL
    ],
)
def test_other_networks_train_convert_and_verify(name):
    torch.manual_seed(0)
    network, size = small(name), SMALL[name][1]
    images = torch.randn(4, 3, size, size)
    for stage in (1, 2):
        train_one_step(network, images, stage)
    check_converted(network, images)
