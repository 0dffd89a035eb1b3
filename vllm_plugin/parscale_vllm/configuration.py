"""From the `config.json` of an export to the stock configuration of its backbone, with what the streams need beside it.

vLLM's transformers backend builds the stock model from it; streams are put around that (`model.py`). The code that
travels with an export is not run.
"""

from collections.abc import Mapping
from typing import Any

import vllm
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .version import __version__


TESTED_VLLM = "0.32"
STANDALONE = "parscale_"
PUBLISHED_TYPE = "qwen2_parscale"
ARCHITECTURES = DENSE, WITH_EXPERTS = ("ParScaleForCausalLM", "ParScaleMoEForCausalLM")
_PUBLISHED_KEYS = ("parscale_n", "parscale_n_tokens", "parscale_attn_smooth")
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_FULL_ATTENTION = "full_attention"


def register_configurations() -> None:
    """Let transformers read the configurations of exports; for a type that it doesn't know there is no backbone."""
    for model_type in CONFIG_MAPPING_NAMES:
        AutoConfig.register(STANDALONE + model_type, _config_class(STANDALONE + model_type), exist_ok=True)
    AutoConfig.register(PUBLISHED_TYPE, _config_class(PUBLISHED_TYPE), exist_ok=True)


def _config_class(model_type: str) -> type[PreTrainedConfig]:
    return type("ExportConfig", (_ExportConfig,), {"model_type": model_type, "__module__": __name__})


class _ExportConfig(PreTrainedConfig):
    """Reads the configuration of an export; what it gives is one of the stock class."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The stock configuration; its `parscale` says how the streams are laid out.

        Raises:
            ValueError: the plugin can't serve such an export.
        """
        refuse_untested_vllm(vllm.__version__)
        fields = {name: value for name, value in config_dict.items() if name not in ("auto_map", "model_type")}
        if cls.model_type == PUBLISHED_TYPE:
            stock_type, streams = "qwen2", _published_streams(fields)
        else:
            stock_type, streams = cls.model_type.removeprefix(STANDALONE), fields.pop("parscale", None)
            refuse_unknown_format(streams)
        loaded: Any = AutoConfig.for_model(stock_type).from_dict(fields, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if streams["num_streams"] > 1:
            refuse_unserveable(config, streams)
            has_experts = any(getattr(config, name, None) for name in _NUMBERS_OF_EXPERTS)
            config.architectures = [WITH_EXPERTS if has_experts else DENSE]
            config.parscale = streams
        else:  # the authors' layout has a place for one stream, which is a plain Qwen2
            config.architectures = ["Qwen2ForCausalLM"]
        return loaded


def _published_streams(fields: dict[str, Any]) -> dict[str, Any]:
    """The authors' three keys, taken from `fields`, as `config.parscale` of a standalone export says it."""
    num_streams, num_prefix_tokens, smoothing = (fields.pop(key, None) for key in _PUBLISHED_KEYS)
    return {
        "num_streams": num_streams or 1,
        "num_prefix_tokens": 48 if num_prefix_tokens is None else num_prefix_tokens,
        "aggregator": "dynamic",
        "aggregator_smoothing": 0.01 if smoothing is None else smoothing,
        "stream_transform": "prefix",
    }


def refuse_untested_vllm(found: str) -> None:
    """Check the version of vLLM.

    Raises:
        ValueError: the plugin was not tested with it.
    """
    if not found.startswith(f"{TESTED_VLLM}."):
        raise ValueError(
            f"parscale-vllm {__version__} needs vLLM {TESTED_VLLM}, whose inner interfaces it builds on, got {found}: "
            f"install vLLM {TESTED_VLLM}, or a parscale-vllm for that version."
        )


def refuse_unknown_format(streams: Mapping[str, Any] | None) -> None:
    """Check that this plugin knows what an export says of its streams.

    Raises:
        ValueError: it says nothing, or was written by a newer version.
    """
    if not isinstance(streams, Mapping) or "version" not in streams:
        raise ValueError(
            "`parscale` in the config.json of the export must say how the streams are laid out, and is missing: export "
            "again with `parscale export ADAPTER --output DIR`."
        )
    written_by = streams["version"]
    if _minor_version(written_by) > _minor_version(__version__):
        raise ValueError(
            f"The export was written by parscale_adapt {written_by}, which is newer than this parscale-vllm "
            f"{__version__}: install the parscale-vllm of that version."
        )


def _minor_version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def refuse_unserveable(config: PreTrainedConfig, streams: Mapping[str, Any]) -> None:
    """Check that vLLM can run this backbone in such streams.

    Raises:
        ValueError: it can't.
    """
    name = f"A {config.model_type} export"
    if config.get_text_config() is not config:
        raise ValueError(
            f"{name} has parts for images or sound, which the plugin doesn't serve: use `parscale serve`."
        )
    if streams["stream_transform"] not in ("prefix", ["prefix"]):
        raise ValueError(
            f"Streams must differ by prefixes alone to be served by vLLM, got `stream_transform` "
            f"{streams['stream_transform']!r}: use `parscale serve`."
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"{name} caches latent keys, among which a prefix has no place: use `parscale serve`.")
    others = set(getattr(config, "layer_types", None) or ()) - {_FULL_ATTENTION}
    window = getattr(config, "sliding_window", None)
    if others or window is not None:
        found = ", ".join(sorted(others)) or f"a window of {window} tokens"
        raise ValueError(
            f"Every layer must have full attention to be served by vLLM in streams, since a window hides the prefix and "
            f"other layers have no keys for it, got {found} in a {config.model_type} export: use `parscale serve`."
        )
    shapes = streams.get("attention_shapes")
    if shapes is not None and (
        len(shapes) != config.num_hidden_layers
        or any(shape != next(iter(shapes.values())) or shape[1] != shape[2] for shape in shapes.values())
        or streams["masks_per_row"]
    ):
        raise ValueError(
            f"{name} must have one attention module a layer, all of one size, whose keys and values are as wide as each "
            "other and whose masks are those of transformers: use `parscale serve`."
        )
