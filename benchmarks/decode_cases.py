"""Reading a prompt and writing tokens behind it, for P, batch, context and cache; milliseconds, and of the limit."""

import argparse
import gc
import statistics
from dataclasses import dataclass, field

import torch
from backbone import build_backbone, random_ids
from limits import ForwardPass, Limits, forward_work, seconds_at_limit
from peft import get_peft_model
from timing import seconds
from transformers import DynamicCache, PreTrainedConfig, StaticCache

from parscale_adapt import ParScaleConfig


CACHES = ("dynamic", "static", "static, compiled")


@dataclass
class DecodeCase:
    """One number of streams (1 is the plain backbone), batch, context and cache."""

    num_streams: int
    batch_size: int
    context: int
    cache: str
    prefill_times: list[float] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)


class Decoder:
    """Greedy decoding behind a full cache.

    Args:
        model: of P streams.
        case: what it is to run.
        args: of the command line.
    """

    def __init__(self, model: torch.nn.Module, case: DecodeCase, args: argparse.Namespace):
        self.model, self.case, self.args = model, case, args
        self.step_model = torch.compile(model) if case.cache == "static, compiled" else model
        self.prompt = random_ids(argparse.Namespace(**{**vars(args), "seq_len": case.context}), case.batch_size)
        self.token = self.prompt[:, :1]
        self.cache = self.new_cache()

    def new_cache(self):
        if self.case.cache == "dynamic":
            return DynamicCache(config=self.model.config)
        num_places = self.case.context + self.args.output_len + 2
        return StaticCache(config=self.model.config, max_cache_len=num_places)

    @torch.no_grad()
    def prefill(self) -> None:
        self.cache = self.new_cache()
        self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def fill(self) -> None:
        """A cache as a prompt would leave it, with random content: what tokens behind it cost doesn't depend on that."""
        self.model(input_ids=self.prompt[:, :1], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        for index, layer in enumerate(self.cache.layers):
            shape = (*layer.keys.shape[:2], self.case.context - 1, layer.keys.shape[-1])
            states = torch.randn(shape, device=layer.keys.device, dtype=layer.keys.dtype)
            self.cache.update(states, states, index)

    @torch.no_grad()
    def step(self) -> None:
        output = self.step_model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)


def decode_cases(args: argparse.Namespace, config: PreTrainedConfig, itemsize: int) -> list[DecodeCase]:
    """All cases whose cache fits; compiled only at the first batch size, since each shape is compiled anew."""
    return [
        DecodeCase(num_streams, batch_size, context, cache)
        for batch_size in args.batch_sizes
        for context in args.contexts
        for cache in CACHES
        for num_streams in args.decode_streams
        if cache != "static, compiled" or (batch_size == args.batch_sizes[0] and args.compile)
        if cache_bytes(config, itemsize, num_streams, batch_size, context) <= args.max_cache_gib * 2**30
    ]


def cache_bytes(config: PreTrainedConfig, itemsize: int, num_streams: int, batch_size: int, context: int) -> int:
    size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return 2 * config.num_hidden_layers * num_streams * batch_size * context * size * itemsize


def measure_decoding(cases: list[DecodeCase], args: argparse.Namespace, limits: Limits) -> None:
    """Cases of one batch and context take turns, token by token; a prompt is read where the limit lets it be short."""
    models = {num_streams: _model(args, num_streams) for num_streams in args.decode_streams}
    itemsize = next(models[args.decode_streams[0]].parameters()).element_size()
    for key in dict.fromkeys((case.batch_size, case.context) for case in cases):
        group = [case for case in cases if (case.batch_size, case.context) == key]
        decoders = [Decoder(models[case.num_streams], case, args) for case in group]
        for decoder in decoders:
            work = forward_work(
                models[decoder.case.num_streams].config, itemsize, ForwardPass(decoder.case.num_streams, *key)
            )
            if seconds_at_limit(work, limits) <= args.max_prefill_seconds and decoder.case.cache != "static, compiled":
                for _ in range(2):
                    decoder.case.prefill_times.append(seconds(decoder.prefill, args.device))
                decoder.cache = decoder.new_cache()
            decoder.fill()
            decoder.step()  # the first ones may compile
            decoder.step()
        for _ in range(args.output_len):
            for decoder in decoders:
                decoder.case.token_times.append(seconds(decoder.step, args.device))
        del decoders
        torch.compiler.reset()
        gc.collect()


def _model(args: argparse.Namespace, num_streams: int) -> torch.nn.Module:
    model = build_backbone(args)
    if num_streams > 1:
        model = get_peft_model(model, ParScaleConfig(num_streams=num_streams))
    return model.eval()


def as_rows(cases: list[DecodeCase], config: PreTrainedConfig, itemsize: int, limits: Limits) -> list[dict]:
    """Figures of all cases; ratios are to one stream with the same cache."""
    medians = {_key(case): statistics.median(case.token_times) for case in cases}
    rows = []
    for case in cases:
        shape = (case.num_streams, case.batch_size)
        one_token = forward_work(config, itemsize, ForwardPass(*shape, 1, case.context))
        prompt = forward_work(config, itemsize, ForwardPass(*shape, case.context, num_head_tokens=1))
        prefill = case.prefill_times[-1] if case.prefill_times else None
        one_stream = medians.get((1, *_key(case)[1:]))
        median = medians[_key(case)]
        rows.append(
            {
                "num_streams": case.num_streams,
                "batch_size": case.batch_size,
                "context": case.context,
                "cache": case.cache,
                "ms_per_token": 1000 * median,
                "spread": [1000 * min(case.token_times), 1000 * max(case.token_times)],
                "ratio": None if one_stream is None else median / one_stream,
                "fraction_of_limit": seconds_at_limit(one_token, limits) / median,
                "prefill_seconds": prefill,
                "prefill_fraction_of_limit": None if prefill is None else seconds_at_limit(prompt, limits) / prefill,
            }
        )
    return rows


def _key(case: DecodeCase) -> tuple:
    return case.num_streams, case.batch_size, case.context, case.cache
