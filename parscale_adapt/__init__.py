"""Parallel scaling (ParScale) for causal language models, as a PEFT method.

Importing the package registers the method with PEFT and the model type `qwen2_parscale` with transformers.
"""

from .models.qwen2_parscale import Qwen2ParScaleConfig, Qwen2ParScaleForCausalLM, Qwen2ParScaleModel
from .tuner.config import ParScaleConfig
from .tuner.grow import grow_streams
from .tuner.model import ParScaleModel
from .version import __version__


__all__ = [
    "ParScaleConfig",
    "ParScaleModel",
    "Qwen2ParScaleConfig",
    "Qwen2ParScaleForCausalLM",
    "Qwen2ParScaleModel",
    "__version__",
    "grow_streams",
]
