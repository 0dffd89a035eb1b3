"""The one place that tells PEFT about the method: its name and PEFT's three mappings."""

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


def register_method(config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    """Make `get_peft_model`, `PeftModel.from_pretrained` and `AutoPeftModelForCausalLM` know the method.

    Raises:
        RuntimeError: another package already registered the name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PARSCALE)
    if registered not in (None, config_class):
        raise RuntimeError(f"PEFT already knows a method named {PARSCALE!r} from {registered.__module__}.")
    PEFT_TYPE_TO_CONFIG_MAPPING[PARSCALE] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[PARSCALE] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[PARSCALE] = PARAMETER_PREFIX
