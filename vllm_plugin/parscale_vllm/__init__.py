"""ParScale exports on vLLM: what vLLM loads by its entry point `vllm.general_plugins`, in each of its processes.

`core` and `version` are those of parscale_adapt itself: links in the repository, copies in what is installed.
"""


def register() -> None:
    """Make configurations, model classes and checks known to vLLM. Nothing changes for models without streams."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .checks import EngineChecks
    from .configuration import ARCHITECTURES, register_configurations

    register_configurations()
    for name in ARCHITECTURES:
        # By its name, since the modules of models may not be imported before a device is chosen.
        ModelRegistry.register_model(name, f"parscale_vllm.model:{name}")
        MODELS_CONFIG_MAP[name] = EngineChecks
