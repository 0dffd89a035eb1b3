"""The one place that tells PEFT about the method: its name and PEFT's three mappings."""

import peft
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner


class _ThirdPartyPeftType(str):
    """A plain string with the `value`, `name` and printed form that PEFT reads off members of its own enum."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{self.name}"


PARSCALE = _ThirdPartyPeftType("PARSCALE")
PARAMETER_PREFIX = "parscale_"
# What PEFT calls by these names, most of them private; an override of a name that is gone would never be called.
CALLBACKS = (
    "_cast_adapter_dtype",
    "_check_new_adapter_config",
    "_check_target_module_exists",
    "_create_and_replace",
    "_get_adapter_state_dict",
    "_mark_only_adapters_as_trainable",
    "_prepare_adapter_config",
    "_prepare_model",
    "_remap_adapter_state_dict_for_load",
    "_remove_adapter_name_from_key",
    "_replace_module",
    "delete_adapter",
    "disable_adapter_layers",
    "inject_adapter",
    "merge_adapter",
    "merge_and_unload",
    "set_adapter",
    "unload",
)


def register_method(config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and `AutoPeftModelForCausalLM` know the method.

    Raises:
        RuntimeError: another package already registered the name, or PEFT has no such callbacks any more.
    """
    missing = [name for name in CALLBACKS if not hasattr(BaseTuner, name)]
    if missing:
        raise RuntimeError(
            f"PEFT {peft.__version__} no longer calls {', '.join(missing)}, by which ParScale adapters are attached, saved "
            "and loaded: install the version of PEFT that parscale_adapt asks for (`pip check` names it)."
        )
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PARSCALE)
    if registered not in (None, config_class):
        raise RuntimeError(f"PEFT already knows a method named {PARSCALE!r} from {registered.__module__}.")
    PEFT_TYPE_TO_CONFIG_MAPPING[PARSCALE] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[PARSCALE] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[PARSCALE] = PARAMETER_PREFIX
