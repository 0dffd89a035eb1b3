"""The PEFT tuner: attach, switch, detach, save and load streams on a causal LM."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from .attention import STREAMS_ATTRIBUTE, restore_stock_attention
from .config import ParScaleConfig
from .decoder import attach_stream_hooks
from .fingerprint import backbone_fingerprint, describe_difference
from .layers import AttentionStreams, DecoderStreams, ParScaleLayer
from .probe import Backbone, ObservedStates, find_decoder, probe_backbone
from .registration import PARAMETER_PREFIX, register_method
from .start import observe_token_states
from .state import (
    backbone_shapes,
    check_complete,
    checkpoint_key,
    expected_adapter_shapes,
    fold_reparameterized,
    load_backbone,
    refuse_reparameterized,
    saved_module_shapes,
)


class ParScaleModel(BaseTuner):
    """Parallel streams injected into a causal LM; made by [`peft.get_peft_model`] from a [`ParScaleConfig`]."""

    prefix: str = PARAMETER_PREFIX
    tuner_layer_cls = ParScaleLayer

    @cached_property
    def _backbone(self) -> Backbone:
        """Found before the first layer is attached, and kept."""
        with _unchanged_on_error(self.model):
            return probe_backbone(self.model)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return backbone_fingerprint(self.model)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        find_decoder(self.model)
        super()._check_new_adapter_config(config)
        owners = [name for name, other in self.peft_config.items() if other.train_backbone]
        if owners and len(self.peft_config) > 1:
            raise ValueError(
                f"Adapter {owners[0]!r} has `train_backbone=True` and so owns the backbone; it can't share it with "
                f"{sorted(set(self.peft_config) - {owners[0]})}. Load it on a backbone of its own."
            )
        if config.train_backbone and getattr(self.model, "is_quantized", False):
            raise ValueError(
                "`train_backbone=True` needs a backbone in full precision, got a quantized one: train with "
                "`train_backbone=False`, or load the backbone without quantization."
            )
        self._check_fingerprint(config)

    def _check_fingerprint(self, config: ParScaleConfig) -> None:
        if config.backbone_fingerprint is None or not config.describes_saved_adapter:
            config.backbone_fingerprint = self._fingerprint
            return
        difference = describe_difference(config.backbone_fingerprint, self._fingerprint)
        if difference is None:
            return
        message = f"The adapter was trained on another backbone than this {type(self.model).__name__}: {difference}."
        if config.verify_backbone:
            raise ValueError(
                f"{message} Load the backbone that it was trained on, or pass `verify_backbone=False` if you know "
                "that they fit."
            )
        warnings.warn(f"{message} Going on because of `verify_backbone=False`.", stacklevel=2)

    def _prepare_adapter_config(self, peft_config: ParScaleConfig, model_config: dict) -> ParScaleConfig:
        backbone = self._backbone
        if peft_config.num_streams == 1:
            peft_config.target_modules = DUMMY_TARGET_MODULES
        else:
            # A tuple, since PEFT shortens a list of 20 or more names to common endings.
            peft_config.target_modules = (backbone.decoder_name, *backbone.attention_shapes)
        return peft_config

    def _prepare_model(self, peft_config: ParScaleConfig, model: nn.Module) -> None:
        self._start_states: dict[str, ObservedStates] = {}
        if peft_config.init_weights == "tokens" and peft_config.num_streams > 1 and _needs_start(peft_config):
            with _unchanged_on_error(model):
                self._start_states = observe_token_states(
                    model, peft_config.num_streams, peft_config.num_prefix_tokens
                )

    @staticmethod
    def _check_target_module_exists(peft_config: ParScaleConfig, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: ParScaleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Give the target module a `parscale` child, or the child one more adapter; nothing is replaced."""
        layer = getattr(target, STREAMS_ATTRIBUTE, None)
        if layer is None:
            layer = self._new_layer(target, current_key)
            target.add_module(STREAMS_ATTRIBUTE, layer)
        layer.update_layer(adapter_name, peft_config)
        if current_key in self._start_states:
            states = self._start_states.pop(current_key)
            layer.start_from(adapter_name, states.key, states.value)

    def _new_layer(self, target: nn.Module, key: str) -> ParScaleLayer:
        if key == self._backbone.decoder_name:
            self._stream_hooks = attach_stream_hooks(target)
            attended_shapes = frozenset(self._backbone.attention_shapes.values())
            return DecoderStreams(target, self._backbone.hidden_size, attended_shapes)
        return AttentionStreams(target, self._backbone.attention_shapes[key])

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.train_backbone and not config.inference_mode:
                trained = backbone_shapes(model)
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name in trained:
                        parameter.requires_grad_(True)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch to one adapter.

        Raises:
            ValueError: several adapters are named; streams of different adapters can't run at once.
        """
        if isinstance(adapter_name, list) and len(adapter_name) > 1:
            raise ValueError(f"Only one ParScale adapter can be active at a time, got {adapter_name}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """Refuses PEFT's `adapter_names`, which would otherwise be ignored."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` can't mix adapters within a batch, since each may run another number of streams: "
                "switch with `set_adapter` and run each adapter on its own batch."
            )
        yield

    def unload(self) -> nn.Module:
        """The plain backbone, without any trace of streams."""
        for hook in self.__dict__.pop("_stream_hooks", []):
            hook.remove()
        for module in list(self.model.modules()):
            if isinstance(getattr(module, STREAMS_ATTRIBUTE, None), ParScaleLayer):
                delattr(module, STREAMS_ATTRIBUTE)
        restore_stock_attention(self.model)
        return super().unload()

    def merge_and_unload(self, *args, **kwargs) -> nn.Module:
        """Refused for P > 1: several streams can't be folded into the weights of one.

        Raises:
            ValueError: the active adapter has more than one stream.
        """
        for name in self.active_adapters:
            if self.peft_config[name].num_streams > 1:
                raise ValueError(
                    f"Adapter {name!r} runs {self.peft_config[name].num_streams} streams, which can't be merged into "
                    "the weights of one: save it with `save_pretrained` and load it on its backbone."
                )
        return self.unload()

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """One adapter's tensors, folded, with the trained backbone where there is one; checked to be complete."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        selected = fold_reparameterized(model, selected, adapter_name)
        expected = expected_adapter_shapes(model, adapter_name)
        if config.train_backbone:
            shapes = backbone_shapes(model)
            selected |= {name: state_dict[name] for name in shapes if name in state_dict}
            expected |= shapes
        check_complete(selected, expected, f"The state of adapter {adapter_name!r}")
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return checkpoint_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Names in the file to names in the model.

        Raises:
            ValueError: a tensor is missing, unexpected, or has another shape.
        """
        refuse_reparameterized(model, adapter_name)
        expected = expected_adapter_shapes(model, adapter_name) | saved_module_shapes(model, adapter_name)
        backbone = backbone_shapes(model) if config.train_backbone else {}
        model_keys = {checkpoint_key(key, adapter_name): key for key in expected}
        remapped = {model_keys.get(key, key): tensor for key, tensor in state_dict.items()}
        check_complete(remapped, expected | backbone, "The adapter file")
        load_backbone(model, {name: remapped.pop(name) for name in backbone})
        return remapped


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception:
        restore_stock_attention(model)
        raise


def _needs_start(config: ParScaleConfig) -> bool:
    return not config.describes_saved_adapter


register_method(ParScaleConfig, ParScaleModel)
