"""The training loop of both configuration systems: mixed precision, accumulation, exact resume, explained failures."""

from .ema import ModelEMA
from .failure import NonFiniteError, replay
from .hooks import PreciseBN, build_hooks
from .layers import EveryLayer, LayerEvaluators
from .loader import TrainLoader, sampler_from_config
from .loop import TrainingLoop
from .metrics import cut_metrics, read_metrics
from .precision import Precision
from .settings import TrainingSettings, warn_of_unscaled_learning_rate
from .step import Step

__all__ = [
    "EveryLayer",
    "LayerEvaluators",
    "ModelEMA",
    "NonFiniteError",
    "PreciseBN",
    "Precision",
    "Step",
    "TrainLoader",
    "TrainingLoop",
    "TrainingSettings",
    "build_hooks",
    "cut_metrics",
    "read_metrics",
    "replay",
    "sampler_from_config",
    "warn_of_unscaled_learning_rate",
]
