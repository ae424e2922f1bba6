"""Two-stage BiPer training in one call; needs the extra `train`.

Lightning and scikit-learn are imported when `fit` runs, not when this package is imported.
"""

from biper_engine.training.config import (
    AugmentConfig,
    OptimizerConfig,
    RunOptions,
    StageConfig,
    TrainingConfig,
)
from biper_engine.training.fit import export_official, fit
from biper_engine.training.result import StageResult, TrainingResult

__all__ = [
    "AugmentConfig",
    "OptimizerConfig",
    "RunOptions",
    "StageConfig",
    "StageResult",
    "TrainingConfig",
    "TrainingResult",
    "export_official",
    "fit",
]
