"""The PEFT tuner: attach, switch, detach, save and load streams on a causal LM."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import MethodType

import torch
from peft import PeftConfig, functional
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.generation.continuous_batching.requests import GenerationOutput

from ..hf.backbone import Backbone, ObservedStates, probe_backbone
from ..hf.decoder import attach_streams, detach_streams
from ..hf.engines import keep_unpacked
from ..hf.fingerprint import backbone_fingerprint
from ..hf.paged import init_continuous_batching
from ..hf.projections import ProjectionShape, observe_projections
from ..hf.stream_call import STREAMS_ATTRIBUTE
from ..models.standalone import base_model_name, describe_streams, make_standalone, standalone_classes
from .config import ParScaleConfig
from .layer import AttentionStreams, DecoderStreams, ParScaleLayer, ProjectionStreams, attach_projection_hook
from .refusals import (
    check_fingerprint,
    refuse_copied_hosts,
    refuse_loading_by_transformers,
    refuse_second_tuner,
    refuse_shared_ownership,
    refuse_streams_of_its_own,
    refuse_training_quantized_backbone,
    refuse_unusable_name,
)
from .registration import PARAMETER_PREFIX, register_method
from .shared_lora import backbone_modules, inject_shared_lora, lora_by_row, remove_idle_lora, unwrapped
from .start import observe_token_states, streams_off
from .state import (
    backbone_shapes,
    check_complete,
    checkpoint_key,
    embedding_shapes,
    expected_adapter_shapes,
    fold_reparameterized,
    load_backbone,
    refuse_reparameterized,
    saved_module_shapes,
)


class ParScaleModel(BaseTuner):
    """Parallel streams injected into a causal LM; made by [`peft.get_peft_model`] from a [`ParScaleConfig`]."""

    prefix: str = PARAMETER_PREFIX
    tuner_layer_cls = (ParScaleLayer, LoraLayer)  # PEFT only hands it to isinstance
    _replace_module = LoraModel._replace_module  # knows layers that are nested around experts

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ):
        refuse_second_tuner(model)
        refuse_loading_by_transformers(peft_config)
        keep_unpacked(model)
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    @cached_property
    def _backbone(self) -> Backbone:
        """Found before the first layer is attached, and kept."""
        return probe_backbone(self.model)

    @cached_property
    def _projections(self) -> dict[str, ProjectionShape]:
        """Found when the first adapter asks for them, and kept."""
        with streams_off(self.model):
            return observe_projections(self.model, backbone_modules(self.model))

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return backbone_fingerprint(self.model)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if "_backbone" not in vars(self):  # later, PEFT's wrappers may stand around the embedding
            refuse_streams_of_its_own(self.model)
        super()._check_new_adapter_config(config)
        refuse_shared_ownership(self.peft_config)
        refuse_training_quantized_backbone(self.model, config)
        check_fingerprint(config, self._fingerprint, type(self.model).__name__)

    def _prepare_adapter_config(self, peft_config: ParScaleConfig, model_config: dict) -> ParScaleConfig:
        backbone = self._backbone
        # Tuples, since PEFT shortens a list of 20 or more names to common endings.
        if peft_config.num_streams == 1:
            # No streams, but PEFT wants a layer to switch, and a cache must know whose keys and values it holds.
            peft_config.target_modules = (backbone.decoder_name,)
        elif peft_config.stream_transform == "prefix":
            if not backbone.attention_shapes:
                raise ValueError(
                    f"{type(self.model).__name__} has no attention that streams can reach: none of its layers calls "
                    "transformers' attention interface, so there is nowhere to put a prefix; use "
                    "`stream_transform='lora'` or `'bitfit'`."
                )
            peft_config.target_modules = (backbone.decoder_name, *backbone.attention_shapes)
        else:
            peft_config.target_modules = (backbone.decoder_name, *self._projections)
            refuse_copied_hosts(peft_config, self._projections)
        return peft_config

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add one adapter: its streams, then the LoRA that they share.

        Raises:
            ValueError: the name, the backbone, the configuration or the shared LoRA's targets don't fit; nothing is
                changed.
        """
        refuse_unusable_name(adapter_name)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config = self.peft_config[adapter_name]
        if config.lora is None:
            return
        config.lora.inference_mode = config.inference_mode
        requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            configs = {name: other.lora for name, other in self.peft_config.items() if other.lora is not None}
            inject_shared_lora(model, configs, adapter_name, low_cpu_mem_usage)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        except Exception:
            self._forget(adapter_name)
            raise
        finally:
            for parameter, value in requires_grad.items():
                parameter.requires_grad_(value)

    def _forget(self, adapter_name: str) -> None:
        """Take back an adapter that could not be added completely."""
        if len(self.peft_config) == 1:
            self.unload()
        else:
            functional.delete_adapter(self.model, adapter_name, self.prefix, self.tuner_layer_cls)
            remove_idle_lora(self.model)

    def _prepare_model(self, peft_config: ParScaleConfig, model: nn.Module) -> None:
        self._start_states: dict[str, ObservedStates] = {}
        if peft_config.init_weights == "tokens" and peft_config.num_streams > 1 and _needs_start(peft_config):
            self._start_states = observe_token_states(model, peft_config.num_streams, peft_config.num_prefix_tokens)

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
        host = unwrapped(target)
        layer = getattr(host, STREAMS_ATTRIBUTE, None)
        if layer is None:
            layer = self._new_layer(host, current_key)
            host.add_module(STREAMS_ATTRIBUTE, layer)
        layer.update_layer(adapter_name, peft_config)
        if current_key in self._start_states:
            states = self._start_states.pop(current_key)
            layer.start_from(adapter_name, states.key, states.value)

    def _new_layer(self, target: nn.Module, key: str) -> ParScaleLayer:
        if key == self._backbone.decoder_name:
            self._stream_hooks: list[RemovableHandle] = []
            attach_streams(target, map(self.model.get_submodule, self._backbone.attention_shapes))
            self.model.init_continuous_batching = MethodType(init_continuous_batching, self.model)
            found = self._backbone
            return DecoderStreams(target, found.hidden_size, found.attended_layers, found.masks_per_row)
        if key in self._backbone.attention_shapes:
            return AttentionStreams(target, self._backbone.attention_shapes[key])
        self._stream_hooks.append(attach_projection_hook(target))
        decoder = self.model.get_submodule(self._backbone.decoder_name)
        return ProjectionStreams(target, self._projections[key], getattr(decoder, STREAMS_ATTRIBUTE))

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

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter with all its tensors; if it was active, another one becomes active in its place."""
        active = [name for name in self.active_adapters if name != adapter_name]
        remaining = sorted(name for name in self.peft_config if name != adapter_name)
        if not active and remaining and adapter_name in self.peft_config:
            active = remaining[:1]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}.",
                stacklevel=2,
            )
            self.set_adapter(active)
        super().delete_adapter(adapter_name)
        remove_idle_lora(self.model)
        self.active_adapter = active

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """Let every sample of a batch run the adapter that PEFT's `adapter_names` gives it; `"__base__"` is the plain
        backbone.

        Raises:
            ValueError: the model is in training mode, or a name is unknown.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("`adapter_names` mixes adapters for inference only, got a model in training mode.")
        given = (*args, *(kwargs.get(key) for key in ("input_ids", "inputs", "inputs_embeds")))
        samples = next((value for value in given if value is not None), None)  # PEFT passes them for `generate` only
        if samples is not None and len(names) != len(samples):
            raise ValueError(
                f"`adapter_names` must name one adapter per sample, got {len(names)} names for {len(samples)} samples."
            )
        unknown = sorted(set(names) - self.peft_config.keys() - {"__base__"})
        if unknown:
            raise ValueError(f"`adapter_names` must name loaded adapters, {sorted(self.peft_config)}, got {unknown}.")
        with self._mixed_adapters([None if name == "__base__" else name for name in names], samples is not None):
            yield

    @contextmanager
    def _mixed_adapters(self, adapters: list[str | None], may_repeat: bool) -> Iterator[None]:
        streams = getattr(self.model.get_submodule(self._backbone.decoder_name), STREAMS_ATTRIBUTE, None)
        if streams is None:  # no adapter has more than one stream
            yield
            return
        with streams.mixed_batches(adapters, may_repeat), lora_by_row(self.model, streams.adapters_of_rows):
            yield

    def generate_batch(self, *args, **kwargs) -> dict[str, GenerationOutput]:
        """transformers' continuous batching, under the active adapter.

        Raises:
            ValueError: `adapter_names` is given, which transformers would ignore.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "Continuous batching runs one adapter for all requests, got `adapter_names`: call `set_adapter`, or mix "
                "adapters in a batch by `generate`."
            )
        return self.model.generate_batch(*args, **kwargs)

    def unload(self) -> nn.Module:
        """The plain backbone, without any trace of streams."""
        self._detach_streams()
        return super().unload()

    def _detach_streams(self) -> None:
        for hook in self.__dict__.pop("_stream_hooks", []):
            hook.remove()
        self.model.destroy_cached_continuous_batching_manager()
        self.model.__dict__.pop("init_continuous_batching", None)
        decoder = self.model.get_submodule(self._backbone.decoder_name)
        detach_streams(decoder, map(self.model.get_submodule, self._backbone.attention_shapes))
        for module in list(self.model.modules()):
            if isinstance(getattr(module, STREAMS_ATTRIBUTE, None), ParScaleLayer):
                delattr(module, STREAMS_ATTRIBUTE)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Refused: what several streams do is no single set of weights.

        Raises:
            ValueError: always; nothing is changed.
        """
        raise ValueError("ParScale adapters can't be merged in place: use `merge_and_unload`.")

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """One model without PEFT: the backbone, shared LoRA merged into it, in the streams of one adapter.

        With one stream it is the plain backbone. Several streams can't be folded into the weights of one; the backbone
        then becomes a model that owns them, whose `save_pretrained` writes a checkpoint that loads without this
        package (`parscale_adapt.models.standalone`). The backbone's parameters stay the very same tensors.

        Args:
            progressbar, safe_merge: as in PEFT, for the shared LoRA.
            adapter_names: the one adapter to keep; the active one by default.

        Raises:
            ValueError: not one adapter is named, or the backbone can't stand alone; nothing is changed then.
        """
        names = adapter_names or self.active_adapters
        if len(names) != 1 or names[0] not in self.peft_config:
            raise ValueError(
                f"Streams of one loaded adapter can be merged, got {names}: name one of {sorted(self.peft_config)}."
            )
        config = self.peft_config[names[0]]
        if config.num_streams == 1:
            self._detach_streams()
            return super().merge_and_unload(progressbar, safe_merge, names)
        standalone_classes(self.model, base_model_name(self.model, self._backbone.decoder_name))
        tensors = self._stream_tensors(names[0])
        projections = {} if config.stream_transform == "prefix" else self._projections
        self._detach_streams()
        merged = super().merge_and_unload(progressbar, safe_merge, names)
        streams = describe_streams(merged, self._backbone, projections, config.to_dict())
        return make_standalone(merged, streams, tensors)

    def _stream_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's streams by their names in a file, folded, without shared LoRA."""
        state = fold_reparameterized(self.model, self.model.state_dict(), adapter_name)
        keys = {key: checkpoint_key(key, adapter_name) for key in expected_adapter_shapes(self.model, adapter_name)}
        return {name: state[key] for key, name in keys.items() if f".{PARAMETER_PREFIX}" in name}

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
        embeddings = embedding_shapes(model)
        expected |= {name: embeddings[name] for name in state_dict.keys() & embeddings.keys() - backbone.keys()}
        model_keys = {checkpoint_key(key, adapter_name): key for key in (*expected, *backbone)}
        remapped = {model_keys.get(key, key): tensor for key, tensor in state_dict.items()}
        check_complete(remapped, expected | backbone, "The adapter file")
        load_backbone(model, {name: remapped.pop(name) for name in backbone})
        return remapped


def _needs_start(config: ParScaleConfig) -> bool:
    return not config.describes_saved_adapter


register_method(ParScaleConfig, ParScaleModel)
