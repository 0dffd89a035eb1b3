"""Where streams enter a backbone and leave it: layers beside their hosts, the decoder's door, hooks of linear layers."""

from types import MethodType

from peft import functional
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..hf.backbone import Backbone
from ..hf.decoder import attach_streams, detach_streams
from ..hf.paged import init_continuous_batching
from ..hf.projections import ProjectionShape
from ..hf.stream_call import STREAMS_ATTRIBUTE
from .layer import AttentionStreams, DecoderStreams, ParScaleLayer, ProjectionStreams
from .registration import PARAMETER_PREFIX
from .shared_lora import remove_idle_lora, unwrapped


def stream_layers(model: nn.Module) -> dict[nn.Module, ParScaleLayer]:
    """The layers of streams by the modules that they stand in."""
    return {
        model.get_submodule(name.rpartition(".")[0]): module
        for name, module in model.named_modules()
        if isinstance(module, ParScaleLayer)
    }


def stream_layer(
    model: nn.Module, backbone: Backbone, key: str, projections: dict[str, ProjectionShape]
) -> ParScaleLayer:
    """The layer of one host, made and put there if it is the first adapter's.

    Args:
        model: the causal LM.
        backbone: what is known of it.
        key: name of the host.
        projections: sizes of linear layers that can be hosts; only asked for where `key` is one.
    """
    host = unwrapped(model.get_submodule(key))
    layer = getattr(host, STREAMS_ATTRIBUTE, None)
    if layer is not None:
        return layer
    if key == backbone.decoder_name:
        layer = DecoderStreams(host, backbone, model.get_submodule(backbone.output_module))
    elif key in backbone.attention_shapes:
        layer = AttentionStreams(host, backbone.attention_shapes[key])
    else:  # asks the decoder's layer for the layout of its rows
        decoder_streams = stream_layer(model, backbone, backbone.decoder_name, projections)
        assert isinstance(decoder_streams, DecoderStreams)
        layer = ProjectionStreams(host, projections[key], decoder_streams)
    host.add_module(STREAMS_ATTRIBUTE, layer)
    return layer


def open_streams(model: PreTrainedModel, backbone: Backbone) -> None:
    """Let all layers take part in the forward: the one place where something is hung into the backbone's calls."""
    for host, layer in stream_layers(model).items():
        if isinstance(layer, ProjectionStreams):
            layer.attach_hook()
        if isinstance(layer, DecoderStreams) and not layer.is_open:
            attach_streams(host, map(model.get_submodule, backbone.attention_shapes))
            if hasattr(model, "init_continuous_batching"):  # it generates
                model.init_continuous_batching = MethodType(init_continuous_batching, model)
            lm_head = model.get_output_embeddings()
            if lm_head is not None:
                layer.logits_hook = lm_head.register_forward_hook(layer.replay_room.see_logits)
            layer.is_open = True


def remove_streams(model: PreTrainedModel) -> None:
    """Undo [`stream_layer`] and [`open_streams`] for all adapters, also where they stopped half-way."""
    if "init_continuous_batching" in vars(model):
        model.destroy_cached_continuous_batching_manager()
        del model.init_continuous_batching
    for host, layer in stream_layers(model).items():
        if isinstance(layer, DecoderStreams):
            with_config = [part for part in host.modules() if isinstance(vars(part).get("config"), PreTrainedConfig)]
            detach_streams(host, with_config)
            if layer.logits_hook is not None:
                layer.logits_hook.remove()
        _remove_layer(host, layer)


def take_back(model: PreTrainedModel, adapter_name: str) -> None:
    """Remove one adapter, complete or not, with all that was put into the model for no other one."""
    functional.delete_adapter(model, adapter_name, PARAMETER_PREFIX, (ParScaleLayer, LoraLayer))
    remove_idle_lora(model)
    _remove_idle_copies(model, adapter_name)
    layers = stream_layers(model)
    if not any(layer.streams_of for layer in layers.values()):
        remove_streams(model)
        vars(model).pop("peft_config", None)
        return
    for host, layer in layers.items():
        if not layer.streams_of:
            _remove_layer(host, layer)


def remove_unfilled_streams(model: nn.Module) -> None:
    """Remove what a load left behind whose tensors never came, for want of a file, say: it gave no model to anyone."""
    configs = vars(model).get("peft_config", {})
    if configs and all(getattr(config, "is_being_loaded", False) for config in configs.values()):
        for adapter_name in list(configs):
            take_back(model, adapter_name)


def _remove_layer(host: nn.Module, layer: ParScaleLayer) -> None:
    if isinstance(layer, ProjectionStreams):
        layer.detach_hook()
    delattr(host, STREAMS_ATTRIBUTE)


def _remove_idle_copies(model: nn.Module, adapter_name: str) -> None:
    """Put modules back in place of PEFT's wrappers around them that hold no adapter's copy any more."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module._adapters.discard(adapter_name)  # PEFT notes the name before it copies
        if isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)
