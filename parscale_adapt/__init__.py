"""Parallel scaling (ParScale) for causal language models, as a PEFT method.

After `import parscale_adapt`, PEFT knows the method and transformers the model type `qwen2_parscale`, in whatever order
the three are imported. The import itself is light: names are loaded on first use.
"""

from typing import TYPE_CHECKING

from .deferred import import_after, lazy_names
from .version import __version__


if TYPE_CHECKING:
    from .core.decorrelation import stream_decorrelation
    from .models.qwen2_parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM, Qwen2ParScaleModel
    from .training.diversity import final_stream_states
    from .training.learning_rates import parameter_groups
    from .training.stream_config import StreamConfig
    from .training.stream_statistics import StreamStatisticsCallback
    from .training.trainer import StreamTrainer
    from .tuner.config import ParScaleArguments, ParScaleConfig
    from .tuner.grow import grow_streams
    from .tuner.model import ParScaleModel


__all__ = [
    "ParScaleArguments",
    "ParScaleConfig",
    "ParScaleModel",
    "Qwen2ParScaleConfig",
    "Qwen2ParScaleForCausalLM",
    "Qwen2ParScaleModel",
    "StreamConfig",
    "StreamStatisticsCallback",
    "StreamTrainer",
    "__version__",
    "final_stream_states",
    "grow_streams",
    "parameter_groups",
    "stream_decorrelation",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ParScaleArguments": "tuner.config",
        "ParScaleConfig": "tuner.config",
        "ParScaleModel": "tuner.model",
        "Qwen2ParScaleConfig": "models.qwen2_parscale",
        "Qwen2ParScaleForCausalLM": "models.qwen2_parscale",
        "Qwen2ParScaleModel": "models.qwen2_parscale",
        "StreamConfig": "training.stream_config",
        "StreamStatisticsCallback": "training.stream_statistics",
        "StreamTrainer": "training.trainer",
        "final_stream_states": "training.diversity",
        "grow_streams": "tuner.grow",
        "parameter_groups": "training.learning_rates",
        "stream_decorrelation": "core.decorrelation",
    },
)

import_after("transformers", "parscale_adapt.models.qwen2_parscale")
import_after("peft", "parscale_adapt.tuner.model")
