"""The PEFT tuner: attach, switch, detach, save and load streams on a causal LM."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.generation.continuous_batching.requests import GenerationOutput

from ..core.transforms import LINEAR, named_transforms
from ..hf.fingerprint import backbone_fingerprint
from ..hf.stream_call import STREAMS_ATTRIBUTE
from ..models.standalone import base_model_name, describe_streams, make_standalone, standalone_classes
from .attaching import AttachingTuner
from .config import ParScaleConfig, check_stream_chunk_size
from .files import stream_tensors, tensors_for_file, tensors_from_file
from .hosts import remove_streams
from .layer import DecoderStreams
from .registration import register_method
from .shared_lora import modules_by_row, remove_idle_lora
from .state import checkpoint_key, load_backbone, trains_backbone


class ParScaleModel(AttachingTuner):
    """Parallel streams injected into a causal LM; made by [`peft.get_peft_model`] from a [`ParScaleConfig`].

    In which order PEFT calls its methods back stands in [`AttachingTuner`].
    """

    _replace_module = LoraModel._replace_module  # knows layers that are nested around experts

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch to one adapter.

        Raises:
            ValueError: several adapters are named; streams of different adapters can't run at once.
        """
        if isinstance(adapter_name, list) and len(adapter_name) > 1:
            raise ValueError(f"Only one ParScale adapter can be active at a time, got {adapter_name}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def set_stream_chunk_size(self, size: int | None) -> None:
        """Run `size` streams of the active adapter at a time from now on, None for all; see `stream_chunk_size` of
        [`ParScaleConfig`].

        Raises:
            ValueError: it is neither None nor an integer of at least 1.
        """
        check_stream_chunk_size(size)
        for name in self.active_adapters:
            self.peft_config[name].stream_chunk_size = size
            for layer in self.model.modules():
                if isinstance(layer, DecoderStreams):
                    layer.chunk_size_of[name] = size

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one adapter with all its tensors; if it was active, another one becomes active in its place."""
        owned_backbone = adapter_name in self.peft_config and self.peft_config[adapter_name].train_backbone
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
        self._unfinished.pop(adapter_name, None)
        self.near_identity_of.pop(adapter_name, None)
        remove_idle_lora(self.model)
        self.active_adapter = active
        self._warned_owners.discard(adapter_name)
        if owned_backbone:  # which stays as that adapter left it
            self._fingerprint = backbone_fingerprint(self.model)

    def disable_adapter_layers(self) -> None:
        """Run the plain backbone, which is no fixed one where an adapter trains it; that is said once."""
        for name in self.active_adapters:
            is_owner = self.peft_config[name].train_backbone and name not in self._warned_owners
            if is_owner and self.model.training and trains_backbone(self.model):
                self._warned_owners.add(name)
                warnings.warn(
                    f"Adapter {name!r} has `train_backbone=True` and is switched off while it trains: what runs now is "
                    "the backbone in training, not the one that training began with, so it is no fixed reference. Give "
                    "the trainer a reference model of its own, or train with `train_backbone=False`.",
                    stacklevel=2,
                )
        super().disable_adapter_layers()

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
        with streams.mixed_batches(adapters, may_repeat), modules_by_row(self.model, streams.adapters_of_rows):
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
        remove_streams(self.model)
        return super().unload()

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
            remove_streams(self.model)
            return super().merge_and_unload(progressbar, safe_merge, names)
        standalone_classes(self.model, base_model_name(self.model, self._backbone.decoder_name))
        tensors = stream_tensors(self.model, names[0])
        projections = self._projections if named_transforms(config.stream_transform, LINEAR) else {}
        remove_streams(self.model)
        merged = super().merge_and_unload(progressbar, safe_merge, names)
        streams = describe_streams(merged, self._backbone, projections, config.to_dict())
        return make_standalone(merged, streams, tensors)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return tensors_for_file(model, config, adapter_name, selected, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return checkpoint_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Names in the file to names in the model.

        Raises:
            ValueError: a tensor is missing, unexpected, or has another shape, or the backbone is another one.
        """
        tuner: Any = getattr(model, "base_model", None)  # where layers were injected into a bare model, its decoder
        is_tuner = isinstance(tuner, ParScaleModel)
        with tuner._being_filled(adapter_name, state_dict) if is_tuner else nullcontext():
            tensors, backbone = tensors_from_file(model, config, adapter_name, state_dict)
            # The backbone is not left to PEFT's `load_state_dict`: with `low_cpu_mem_usage` that would put the file's
            # tensors in place of parameters, untie them and change their dtype; and no callback comes after it.
            load_backbone(model, backbone)
        return tensors


register_method(ParScaleConfig, ParScaleModel)
