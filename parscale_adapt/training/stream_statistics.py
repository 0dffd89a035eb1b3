"""The aggregator's weights in the log of any transformers or TRL trainer, [`StreamTrainer`] included."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.aggregator import Aggregator
from ..core.weight_statistics import stream_statistics
from ..hf.stream_call import STREAMS_ATTRIBUTE
from ..tuner.layer import DecoderStreams
from .stream_warnings import StreamWatch


__all__ = ["StreamStatisticsCallback", "stream_statistics"]


class StreamStatisticsCallback(TrainerCallback):
    """Adds [`stream_statistics`] of the latest batch to every training log, and warns where they go wrong
    ([`StreamWatch`]).

        trainer = DPOTrainer(...)
        StreamStatisticsCallback.add_to(trainer)

    Passed as `callbacks=[StreamStatisticsCallback()]` it works too, but then runs after the trackers of `report_to`,
    which don't see its figures. [`StreamTrainer`] has one from the start. Tokens that the attention mask hides, which
    are padding, don't count; all others do, whether they are trained or only read. Under data parallelism each process
    sees its own batch.
    """

    def __init__(self) -> None:
        self._aggregator: Aggregator | None = None
        self._token_mask: torch.Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._recorded_before = False
        self._watch: StreamWatch | None = None

    @classmethod
    def add_to(cls, trainer: Trainer) -> "StreamStatisticsCallback":
        """Put a new callback in front of all others of `trainer`."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        decoder = _find_decoder(kwargs["model"])
        streams: DecoderStreams = getattr(decoder, STREAMS_ATTRIBUTE)
        self._aggregator = streams.parscale_aggregator[streams.current_adapter]
        self._recorded_before = self._aggregator.record_weights
        self._aggregator.record_weights = True
        self._watch = StreamWatch(self._aggregator.num_streams, self._aggregator.smoothing)

        def keep_mask(module: nn.Module, inputs: tuple, arguments: dict[str, Any]) -> None:
            if streams.num_streams > 1:
                self._token_mask = arguments.get("attention_mask")

        # In front of all other hooks: accelerate's replace the arguments.
        self._hook = decoder.register_forward_pre_hook(keep_mask, with_kwargs=True, prepend=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        weights = None if self._aggregator is None else self._aggregator.last_weights
        if logs is None or "loss" not in logs or weights is None:
            return
        mask = self._token_mask
        if not isinstance(mask, torch.Tensor) or mask.shape != weights.shape[:2]:
            mask = None
        statistics = stream_statistics(weights, mask)
        logs.update(statistics)
        state.log_history[-1].update(statistics)
        if self._watch is not None and state.is_world_process_zero:
            weights_by_stream = [statistics[f"stream_weight/{p}"] for p in range(weights.shape[-1])]
            for message in self._watch.see(state.global_step, weights_by_stream):
                warnings.warn(message, stacklevel=2)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
        if self._aggregator is not None:
            self._aggregator.record_weights = self._recorded_before
        self._hook = self._aggregator = self._token_mask = self._watch = None


def runs_in_streams(model: nn.Module) -> bool:
    """Whether several streams run in `model`."""
    return _decoder_in_streams(model) is not None


def _find_decoder(model: nn.Module) -> nn.Module:
    """The decoder whose streams run.

    Raises:
        ValueError: no streams run in `model`.
    """
    decoder = _decoder_in_streams(model)
    if decoder is None:
        raise ValueError(
            f"StreamStatisticsCallback found no active ParScale adapter with several streams in {type(model).__name__}: "
            "leave it out, or wrap the model with `get_peft_model` first."
        )
    return decoder


def _decoder_in_streams(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        streams = getattr(module, STREAMS_ATTRIBUTE, None)
        if isinstance(streams, DecoderStreams) and streams.num_streams > 1:
            return module
    return None
