"""Messages of other libraries that our commands cause and their users can't act on. All others are let through."""

import logging
import warnings
from dataclasses import dataclass


# The logger of each, and how it begins.
LOGGED = {
    # PEFT imports bitsandbytes where it is installed, and this speaks of a kernel for 4-bit layers on CPUs.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # Accelerate imports DeepSpeed where it is installed, to see if DeepSpeed wraps the model that is being saved.
    "DeepSpeed": ("Setting accelerator to", "Setting ds_accelerator to"),
}
# PEFT 0.21 asks every model for it.
DEPRECATED = "`is_gradient_checkpointing` is deprecated"


def drop_foreign_messages() -> None:
    """Keep these messages, and no other, from the terminal."""
    for logger, beginnings in LOGGED.items():
        logging.getLogger(logger).addFilter(_Without(beginnings))
    warnings.filterwarnings("ignore", message=DEPRECATED, category=FutureWarning)


@dataclass(frozen=True)  # equal filters are added once
class _Without:
    """Lets a record of a logger through unless it begins with one of these texts."""

    beginnings: tuple[str, ...]

    def __call__(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)
