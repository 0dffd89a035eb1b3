"""How PEFT attaches an adapter: what is checked, what is made, and what is taken back where that fails."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..core.transforms import ATTENTION, LINEAR, named_transforms
from ..hf.backbone import ObservedStates, probe_backbone
from ..hf.engines import keep_unpacked
from ..hf.fingerprint import backbone_fingerprint, embedding_name
from ..hf.projections import ProjectionShape, observe_projections
from .config import ParScaleConfig
from .hosts import open_streams, remove_unfilled_streams, stream_layer, take_back
from .layer import ParScaleLayer
from .near_identity import NearIdentity, start_near_identity
from .refusals import (
    check_fingerprint,
    name_head,
    refuse_copied_hosts,
    refuse_loading_by_transformers,
    refuse_missing_head,
    refuse_offloaded_backbone,
    refuse_quantized_copies,
    refuse_second_tuner,
    refuse_shared_ownership,
    refuse_streams_of_its_own,
    refuse_training_quantized_backbone,
    refuse_unusable_name,
)
from .registration import PARAMETER_PREFIX
from .shared_lora import backbone_modules, inject_shared_lora
from .start import observe_token_states, streams_off
from .state import backbone_shapes, is_reparameterized


class AttachingTuner(BaseTuner):
    """The part of [`parscale_adapt.tuner.model.ParScaleModel`] that adds adapters, each completely or not at all.

    PEFT calls back in this order. Attaching, in `inject_adapter`: `_check_new_adapter_config`,
    `_prepare_adapter_config` (names the hosts), `_prepare_model` (runs the backbone for a start, before anything is
    changed), `_create_and_replace` for each host, `set_adapter`, `_mark_only_adapters_as_trainable`, then its copies for
    `modules_to_save`; here follow shared LoRA and [`open_streams`]; at last PEFT calls `_cast_adapter_dtype`. Loading goes
    on with `_remap_adapter_state_dict_for_load` and PEFT's own `load_state_dict`. Saving: `_get_adapter_state_dict`,
    then `_remove_adapter_name_from_key` for each tensor.
    """

    prefix: str = PARAMETER_PREFIX
    tuner_layer_cls = (ParScaleLayer, LoraLayer)  # PEFT only hands it to isinstance

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ):
        if isinstance(peft_config, PeftConfig):  # not from a `PeftModel`
            config = peft_config.handed_over()
            refuse_loading_by_transformers(model, config)
        else:
            config = peft_config[adapter_name].handed_over()
        remove_unfilled_streams(model)
        refuse_second_tuner(model)
        refuse_streams_of_its_own(model)
        keep_unpacked(model)
        # All fields come before PEFT's constructor, which attaches the first adapter. What is found here stays true
        # of the backbone when PEFT's wrappers stand around its modules.
        self._backbone = probe_backbone(model)
        self._fingerprint = backbone_fingerprint(model)
        self._embedding_name = embedding_name(model)
        self._projections: dict[str, ProjectionShape] = {}  # found when the first adapter asks for them
        self._start_states: dict[str, ObservedStates] = {}
        # What was measured of the adapters that started here by `init_weights="near_identity"`, by name.
        self.near_identity_of: dict[str, NearIdentity] = {}
        # Adapters that were begun and are not complete: which parameters were trained before, by name.
        self._unfinished: dict[str, dict[str, bool]] = {}
        self._warned_owners: set[str] = set()
        super().__init__(model, {adapter_name: config}, adapter_name, low_cpu_mem_usage, state_dict)

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
            ValueError: the name, the backbone, the configuration or the shared LoRA's targets don't fit. Whatever is
                raised, nothing is changed.
        """
        given = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = given.handed_over()
        with self._all_or_nothing(adapter_name):
            refuse_unusable_name(adapter_name)
            name_head(config)
            if not config.is_being_loaded:
                self._begin_anew(config, given)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if not self._backbone.decoder_name:
                self._add_streams_of_model(adapter_name, low_cpu_mem_usage)
            if config.lora is not None:
                self._add_shared_lora(adapter_name, low_cpu_mem_usage)
            open_streams(self.model, self._backbone)
            # With `low_cpu_mem_usage` there are no tensors yet, and those of a file will come.
            if config.init_weights == "near_identity" and not (config.is_being_loaded or low_cpu_mem_usage):
                self._start_near_identity(adapter_name, config)

    def _begin_anew(self, config: ParScaleConfig, given: ParScaleConfig) -> None:
        """Let a configuration, which may be that of a file or of another adapter, describe a new adapter."""
        config.backbone_fingerprint, config.parscale_version = self._fingerprint, None
        config.base_model_name_or_path = vars(self.model).get("name_or_path") or None
        twins = [name for name, other in self.peft_config.items() if other is given]
        if config.init_weights == "reparameterized" and twins and not is_reparameterized(self.model, twins[0]):
            # Trainers copy an adapter into a second one name by name, and what came from a file is folded.
            config.init_weights = "normal"

    @contextmanager
    def _all_or_nothing(self, adapter_name: str) -> Iterator[None]:
        """Take an unfinished adapter back if the block is left by an exception, be it the user's Ctrl-C."""
        before = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        before = self._unfinished.setdefault(adapter_name, before)
        try:
            yield
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            self._start_states.clear()
            self.near_identity_of.pop(adapter_name, None)
            take_back(self.model, adapter_name)
            del self._unfinished[adapter_name]
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(before.get(name, parameter.requires_grad))
            raise

    @contextmanager
    def _being_filled(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside the block an adapter gets the tensors of a file. One that was attached for them is complete after it;
        what the check at that time left open, since the file could bring it, is checked before."""
        if adapter_name not in self._unfinished:
            yield
            return
        with self._all_or_nothing(adapter_name):
            if f"base_model.model.{self._embedding_name}" not in tensors:
                others = self._fingerprint.keys() - {self._embedding_name}
                check_fingerprint(self.peft_config[adapter_name], self._fingerprint, type(self.model).__name__, others)
            yield
        self.peft_config[adapter_name].is_being_loaded = False
        del self._unfinished[adapter_name]

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        refuse_missing_head(self.model, config)
        refuse_shared_ownership(self.peft_config)
        refuse_training_quantized_backbone(self.model, config)
        refuse_quantized_copies(self.model, config)
        refuse_offloaded_backbone(self.model, config)
        if config.is_being_loaded:  # the file may bring the embedding
            check_fingerprint(config, self._fingerprint, type(self.model).__name__, {self._embedding_name})
            config.backbone_fingerprint = config.backbone_fingerprint or self._fingerprint

    def _prepare_adapter_config(self, peft_config: ParScaleConfig, model_config: dict) -> ParScaleConfig:
        backbone = self._backbone
        # One stream has no more hosts; but PEFT wants a layer to switch, and a cache must know whose keys it holds.
        hosts = [backbone.decoder_name]
        has_streams = peft_config.num_streams > 1
        if has_streams and named_transforms(peft_config.stream_transform, ATTENTION):
            if not backbone.attention_shapes:
                raise ValueError(
                    f"{type(self.model).__name__} has no attention that streams can reach: none of its layers calls "
                    "transformers' attention interface, so there is nowhere to put a prefix; use "
                    "`stream_transform='lora'` or `'bitfit'`."
                )
            hosts += backbone.attention_shapes
        if has_streams and named_transforms(peft_config.stream_transform, LINEAR):
            if not self._projections:
                with streams_off(self.model):
                    self._projections = observe_projections(self.model, backbone_modules(self.model))
            hosts += self._projections
        refuse_copied_hosts(peft_config, (*hosts, *backbone.attention_shapes))
        # A tuple, since PEFT shortens a list of 20 or more names to common endings; without the model itself, which PEFT
        # passes by.
        peft_config.target_modules = tuple(filter(None, hosts)) or DUMMY_TARGET_MODULES
        return peft_config

    def _prepare_model(self, peft_config: ParScaleConfig, model: nn.Module) -> None:
        if peft_config.init_weights == "tokens" and peft_config.num_streams > 1 and not peft_config.is_being_loaded:
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
        layer = stream_layer(self.model, self._backbone, current_key, self._projections)
        layer.update_layer(adapter_name, peft_config)
        if current_key in self._start_states:
            states = self._start_states.pop(current_key)
            layer.start_from(adapter_name, states.key, states.value)

    def _start_near_identity(self, adapter_name: str, config: ParScaleConfig) -> None:
        if config.num_streams > 1:
            self.near_identity_of[adapter_name] = start_near_identity(
                self.model, adapter_name, config.num_streams, config.num_prefix_tokens
            )

    def _add_streams_of_model(self, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        """The host that PEFT passes by: a model that is the decoder itself."""
        config = self.peft_config[adapter_name]
        with self._adding_tensors(config), init_empty_weights() if low_cpu_mem_usage else nullcontext():
            stream_layer(self.model, self._backbone, "", self._projections).update_layer(adapter_name, config)

    def _add_shared_lora(self, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        config = self.peft_config[adapter_name]
        config.lora.inference_mode = config.inference_mode
        configs = {name: other.lora for name, other in self.peft_config.items() if other.lora is not None}
        with self._adding_tensors(config):
            inject_shared_lora(self.model, configs, adapter_name, low_cpu_mem_usage)

    @contextmanager
    def _adding_tensors(self, config: ParScaleConfig) -> Iterator[None]:
        """After the block, what it added is trained where its adapter is active, and all else as before."""
        requires_grad = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        yield
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for parameter, value in requires_grad.items():
            parameter.requires_grad_(value)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        is_new = adapter_name in self._unfinished
        with self._all_or_nothing(adapter_name) if is_new else nullcontext():
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if is_new and not self.peft_config[adapter_name].is_being_loaded:
            del self._unfinished[adapter_name]

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.train_backbone and not config.inference_mode:
                trained = backbone_shapes(model)
                for parameter_name, parameter in model.named_parameters():
                    if parameter_name in trained:
                        parameter.requires_grad_(True)
