"""Recipes: shipped ones, a user's own, and what is refused."""

import dataclasses

import pytest

from biper_engine import models
from biper_engine.models.registry import architecture
from biper_engine.training import AugmentConfig, TrainingConfig, data, read_recipe, shipped, to_yaml
from biper_engine.training.recipe import recipe_for


def written(tmp_path, text):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_survive_being_printed(name, tmp_path):
    config = read_recipe(name)
    assert read_recipe(written(tmp_path, to_yaml(config))) == config
    assert config.architecture in models.available()
    if name != "folder":
        assert config.dataset in data.available()


def test_every_published_result_has_a_recipe():
    reported = {
        name
        for name in models.available()
        if architecture(name).frequency and architecture(name).reported_top1
    }
    assert reported <= {read_recipe(name).architecture for name in shipped()}


def test_the_defaults_are_the_recipe_of_the_digits():
    assert read_recipe("digits") == TrainingConfig()


def test_the_settings_of_the_authors_are_in_the_recipes():
    cifar, imagenet = read_recipe("cifar10_resnet18"), read_recipe("imagenet_resnet18")
    assert [(s.epochs, s.lr, s.weight_decay, s.tau) for s in (cifar.stage1, cifar.stage2)] == [
        (600, 0.021, 0.0016, 0.037),
        (300, 0.0037, 0.00016, 0.0468),
    ]
    assert (imagenet.stage1.warmup_epochs, imagenet.stage2.warmup_epochs) == (5, 0)
    assert (imagenet.optimizer.decay, cifar.optimizer.decay) == ("weights", "all")


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("digits", "digits"),
        ("fashion-mnist", "fashion_mnist"),
        ("cifar10", "cifar10_resnet20"),
        ("imagenet", "imagenet_resnet18"),
        ("photos", "folder"),
        ("hub:a/b", "folder"),
    ],
)
def test_data_has_a_recipe(dataset, name):
    assert recipe_for(dataset) == name


def test_a_rate_of_both_stages_can_be_set():
    config = read_recipe("digits", ["optimizer.lr=0.01", "stage2.lr=1e-3", "augment.flip=true"])
    assert (config.stage1.lr, config.stage2.lr) == (0.01, 0.001)
    default = TrainingConfig().augment
    assert config.augment == dataclasses.replace(default, flip=True)
    assert read_recipe("digits", ["stage2.lr=1", "optimizer.lr=0.01"]).stage2.lr == 0.01


def test_in_a_file_the_longer_key_wins(tmp_path):
    text = "stage2: {lr: 0.5}\noptimizer: {lr: 0.2, name: adam}\n"
    config = read_recipe(written(tmp_path, text))
    assert (config.stage1.lr, config.stage2.lr, config.optimizer.name) == (0.2, 0.5, "adam")


def test_augmentation_starts_from_none(tmp_path):
    config = read_recipe(written(tmp_path, "augment: {flip: true}"))
    assert config.augment == AugmentConfig(flip=True)
    assert read_recipe(written(tmp_path, "seed: 3")).augment == TrainingConfig().augment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1}", "unknown key 'optimizer.lrr'. Did you mean 'optimizer.lr'"),
        ("model: x", "unknown key 'model'. Did you mean 'architecture'"),
        ("lr: 1", "Did you mean 'optimizer.lr'"),
        ("stag1: {epochs: 2}", "Did you mean 'stage1.epochs'"),
        ("flip: true", "Did you mean 'augment.flip'"),
        ("xyzzy: 1", "Known keys: dataset"),
        ("seed: one", "'seed' is 'one', wanted a whole number"),
        ("seed: true", "'seed' is True, wanted a whole number"),
        ("hold_out: 1", "'hold_out' is 1, wanted true or false"),
        ("frequency: fast", "'frequency' is 'fast', wanted a number"),
        ("augment: {crop_area: 3}", r"'augment.crop_area' is 3, wanted 2 numbers"),
        ("stage1: {epochs: 0}", "`epochs` (=0) must be 1 or more"),
        ("- a\n- b", "has a list; wanted"),
        ("a: [", "is not YAML"),
        ("seed: 1\nseed: 2", "has the key 'seed' twice. Leave one out."),
        ("optimizer: {lr: 0.1, lr: 0.2}", "has the key 'lr' twice"),
        ("optimizer.lr: 0.1\noptimizer: {lr: 0.2}", "has the key 'optimizer.lr' twice"),
        ("a: &a {b: *a}", "has values in values without end, or too deep"),
        ("augment: {crop_area: &a [*a, 1]}", "without end, or too deep"),
        ("a: " + "[" * 3000, "without end, or too deep"),
        ("seed: " + "9" * 5000, "is not YAML"),
        ("stage1:", "'stage1' is None, wanted `key: value` lines below it. Known keys: stage1.ep"),
        ("optimizer: [1]", "'optimizer' is [1], wanted `key: value` lines below it"),
        ("optimizer: {lr: .inf}", "`lr` (=inf) must be finite"),
        ("stage1: {tau: .inf}", "`tau` (=inf) must be finite"),
        ("augment: {max_rotation_deg: .inf}", "`max_rotation_deg` (=inf) must be finite"),
        ("augment: {crop_ratio: [1, .inf]}", "`crop_ratio` (=(1.0, inf)) must be finite"),
        ("distillation: {temperature: .inf}", "`temperature` (=inf) must be finite"),
        (f"seed: {2**45 + 1}", "`seed` (=35184372088833) must be 35,184,372,088,832 or less"),
        ("stage1: {epochs: 65537}", "`epochs` (=65537) must be 65,536 or less"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_recipe(written(tmp_path, text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion-mnist", r"no recipe 'fashion-mnist'. Did you mean 'fashion_mnist'"),
        ("nothing.yaml", r"Shipped: cifar10_resnet18"),
    ],
)
def test_a_missing_recipe_lists_the_shipped_ones(name, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(name)


def test_a_setting_needs_a_value():
    with pytest.raises(ValueError, match="wanted key=value"):
        read_recipe("digits", ["hold_out"])
