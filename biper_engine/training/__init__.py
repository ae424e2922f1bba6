"""Two-stage BiPer training in one call; needs the extra `train`.

Lightning and scikit-learn are imported when `fit` runs, not when this package is imported.
"""

from biper_engine.training.config import (
    AugmentConfig,
    DistillationConfig,
    OptimizerConfig,
    RunOptions,
    StageConfig,
    TrainingConfig,
)
from biper_engine.training.directory import is_first_process
from biper_engine.training.fit import export_official, fit
from biper_engine.training.recipe import read_recipe, recipe_for, shipped, to_yaml
from biper_engine.training.report import write_report
from biper_engine.training.result import StageResult, TrainingResult
from biper_engine.training.sweep import sweep_configs

__all__ = [
    "AugmentConfig",
    "DistillationConfig",
    "OptimizerConfig",
    "RunOptions",
    "StageConfig",
    "StageResult",
    "TrainingConfig",
    "TrainingResult",
    "export_official",
    "fit",
    "is_first_process",
    "read_recipe",
    "recipe_for",
    "shipped",
    "sweep_configs",
    "to_yaml",
    "write_report",
]
