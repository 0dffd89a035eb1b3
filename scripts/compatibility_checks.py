"""What must hold for streams on any architecture, each property checked on its own.

A check returns a remark (often empty), raises [`NotApplicable`] where the plain backbone itself lacks the property,
and raises anything else where the property fails. The first line of its docstring is what the document says of it.
"""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from compatibility_case import (
    BATCH_SIZE,
    NUM_PADDING,
    NUM_STREAMS,
    Broken,
    Case,
    Inputs,
    NotApplicable,
    describe_error,
    distance,
    logits_of,
)
from compatibility_oracle import logits_by_brute_force
from peft import PeftModel
from tiny_architectures import CAUSAL_LM, SEQ_CLS, VOCABULARY, answer_of
from torch import nn
from torch.nn import functional as F


TOLERANCE = 1e-4
NUM_NEW_TOKENS = 8


def require_close(found: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Raise [`Broken`] where two tensors are further apart than `tolerance`, or not comparable (NaN)."""
    if not distance(found, expected) <= tolerance:
        raise Broken(f"{what} differ by {distance(found, expected):.1e}")


def adapter_off(case: Case) -> str:
    """With the adapter off, the logits are the plain backbone's, bit for bit."""
    for inputs in (case.plain, case.ragged):
        expected = logits_of(case.backbone, inputs)
        with case.model.disable_adapter():
            found = logits_of(case.model, inputs)
        if not torch.equal(found, expected):
            raise Broken(f"logits with the adapter off differ by {distance(found, expected):.1e}")
    return ""


def _change_of_the_past(model: nn.Module, input_ids: torch.Tensor) -> float:
    changed = input_ids.clone()
    changed[:, -2:] = 3 + (changed[:, -2:] + 1) % (VOCABULARY - 3)
    before, after = (logits_of(model, {"input_ids": ids}) for ids in (input_ids, changed))
    if not distance(after[:, -2:], before[:, -2:]) > TOLERANCE:
        raise Broken("a changed token doesn't change its own logits")
    return distance(after[:, :-2], before[:, :-2])


def causality(case: Case) -> str:
    """Changing the last two tokens changes no earlier logits."""
    if _change_of_the_past(case.backbone, case.input_ids) > TOLERANCE:
        raise NotApplicable("in the plain backbone later tokens change earlier logits")
    if (change := _change_of_the_past(case.model, case.input_ids)) > TOLERANCE:
        raise Broken(f"later tokens change earlier logits by {change:.1e}")
    return ""


def _change_by_batching(model: nn.Module, input_ids: torch.Tensor) -> float:
    alone = torch.cat([logits_of(model, {"input_ids": row[None]}) for row in input_ids])
    return distance(logits_of(model, {"input_ids": input_ids}), alone)


def batch_invariance(case: Case) -> str:
    """Rows in one batch have the logits that they have alone."""
    if _change_by_batching(case.backbone, case.input_ids) > TOLERANCE:
        raise NotApplicable("rows of the plain backbone change each other")
    if (change := _change_by_batching(case.model, case.input_ids)) > TOLERANCE:
        raise Broken(f"rows change each other by {change:.1e}")
    return ""


def _change_by_padding(case: Case, model: nn.Module) -> float:
    unpadded, padded = (logits_of(model, case.moved_right(count)) for count in (0, NUM_PADDING))
    return distance(padded[:, NUM_PADDING:] if case.answers_by_token else padded, unpadded)


def _padding_changes_tokens(case: Case, model: nn.Module) -> bool:
    unpadded, padded = (_generate(model, case.moved_right(count), use_cache=False) for count in (0, NUM_PADDING))
    return not torch.equal(padded[:, -NUM_NEW_TOKENS:], unpadded[:, -NUM_NEW_TOKENS:])


def left_padding(case: Case) -> str:
    """Masked tokens on the left change neither logits nor generated tokens."""
    if _change_by_padding(case, case.backbone) > TOLERANCE:
        raise NotApplicable("left-padding changes the plain backbone's logits")
    if (change := _change_by_padding(case, case.model)) > TOLERANCE:
        raise Broken(f"left-padding changes logits by {change:.1e}")
    if case.task != CAUSAL_LM:
        return ""
    if _padding_changes_tokens(case, case.backbone):
        return "left-padding changes the tokens that the plain backbone generates"
    if _padding_changes_tokens(case, case.model):
        raise Broken("left-padding changes generated tokens")
    return ""


def _change_by_pooling(case: Case, model: nn.Module) -> float:
    unpadded = logits_of(model, case.padded(0, 0))
    paddings = ((NUM_PADDING, 0), (0, NUM_PADDING), (1, NUM_PADDING))
    return max(distance(logits_of(model, case.padded(*padding)), unpadded) for padding in paddings)


def pooling(case: Case) -> str:
    """Padding on the left, on the right or on both sides doesn't change from which token a row is classified."""
    if _change_by_pooling(case, case.backbone) > TOLERANCE:
        raise NotApplicable("padding changes the plain backbone's logits")
    if (change := _change_by_pooling(case, case.model)) > TOLERANCE:
        raise Broken(f"padding changes logits by {change:.1e}")
    return ""


@torch.no_grad()
def default_cache(case: Case) -> str:
    """A call that says nothing about caches gives the logits of one without cache."""
    try:
        case.backbone(**case.plain)
    except Exception as error:
        raise NotApplicable(f"the plain backbone can't: {describe_error(error)}") from error
    require_close(answer_of(case.model(**case.plain)), logits_of(case.model, case.plain), "logits")
    return ""


def _generate(model: nn.Module, inputs: Inputs, **options) -> torch.Tensor:
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # positions are up to `generate`
    options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, pad_token_id=0, **options)


def _caching_changes_tokens(model: nn.Module, inputs: Inputs, num_beams: int) -> bool:
    options = {"num_beams": num_beams, "num_return_sequences": num_beams}
    cached, uncached = (_generate(model, inputs, use_cache=use_cache, **options) for use_cache in (True, False))
    return not torch.equal(cached, uncached)


def _more_rows(inputs: Inputs) -> Inputs:
    """Four times as many rows, since a wrong cache leaves the tokens of some rows as they are."""
    input_ids = inputs["input_ids"]
    shuffled = torch.cat([input_ids, input_ids.flip(1), input_ids.roll(3, 1), input_ids.roll(5, 1)])
    return {"input_ids": shuffled, "attention_mask": inputs["attention_mask"].repeat(4, 1)}


def _cached_tokens(case: Case, num_beams: int) -> str:
    problems: list[str] = []
    for kind, inputs in (("left-padded rows", case.ragged), ("unpadded rows", case.moved_right(0))):
        inputs = _more_rows(inputs)
        try:
            lacking = _caching_changes_tokens(case.backbone, inputs, num_beams)
            problem = f"the plain backbone's cache changes tokens, on {kind}"
        except Exception as error:
            lacking, problem = True, f"the plain backbone can't, on {kind}: {describe_error(error)}"
        if lacking:
            problems.append(problem)
            continue
        if _caching_changes_tokens(case.model, inputs, num_beams):
            raise Broken(f"the cache changes tokens, on {kind}")
        return problems[0] if problems else ""
    raise NotApplicable(problems[-1])


def cached_greedy(case: Case) -> str:
    """Greedy search over left-padded rows gives the same tokens with and without cache."""
    return _cached_tokens(case, num_beams=1)


def cached_beams(case: Case) -> str:
    """Three beams over left-padded rows give the same tokens with and without cache."""
    return _cached_tokens(case, num_beams=3)


def _gradients(model: nn.Module, input_ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
    logits = answer_of(model(input_ids=input_ids, use_cache=False))
    if logits.shape[-1] == VOCABULARY:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    else:
        loss = (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def _is_zero_somewhere(name: str, gradient: torch.Tensor) -> bool:
    """Whether a gradient is zero, or that of a prefix `[P, ...]` is for one of the streams."""
    by_stream = gradient.flatten(1).abs().sum(1) if "parscale_prefix" in name else gradient.abs().sum()
    return bool(by_stream.min() == 0)


def _is_reached(host: str, plain: dict[str, torch.Tensor | None]) -> bool:
    """Whether the plain backbone's own weights below `host` get gradients; behind hard choices they don't."""
    return any(gradient is not None for name, gradient in plain.items() if name.startswith(host))


def gradients(case: Case) -> str:
    """Every adapter tensor has a finite gradient that is zero for no stream."""
    plain = _gradients(case.fresh_backbone(), case.input_ids)
    found = _gradients(case.adapted(), case.input_ids)
    found = {name.removeprefix("base_model.model."): gradient for name, gradient in found.items()}
    hosts = {name: re.split(r"parscale|\.modules_to_save", name)[0] for name in found}
    trained = {name: gradient for name, gradient in found.items() if _is_reached(hosts[name], plain)}
    for name, gradient in trained.items():
        if gradient is None:
            raise Broken(f"no gradient reaches {name}")
        if not gradient.isfinite().all():
            raise Broken(f"the gradient of {name} is not finite")
        if _is_zero_somewhere(name, gradient):
            raise Broken(f"the gradient of {name} is zero")
    if len(trained) < len(found):
        return f"no gradient reaches {len(found) - len(trained)} prefixes, nor the plain backbone's weights there"
    return ""


def checkpointed_gradients(case: Case) -> str:
    """Gradient checkpointing gives the gradients of training without it."""
    if not case.backbone.supports_gradient_checkpointing:
        raise NotApplicable("the plain backbone doesn't support it")
    try:
        plain = case.fresh_backbone().train()
        plain.gradient_checkpointing_enable()
        plain.enable_input_require_grads()  # as PEFT does
        plain(**case.plain, use_cache=False)
    except Exception as error:
        raise NotApplicable(f"the plain backbone can't: {describe_error(error)}") from error
    expected = _gradients(case.adapted().train(), case.input_ids)
    model = case.adapted().train()
    model.gradient_checkpointing_enable()
    found = _gradients(model, case.input_ids)
    for name, gradient in expected.items():
        if gradient is not None:
            largest = gradient.abs().max()
            require_close(found[name] / largest, gradient / largest, f"gradients of {name}")
    return ""


def save_and_load(case: Case) -> str:
    """A saved adapter, loaded on a newly built backbone, gives the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(case.fresh_backbone(), folder).eval()
        require_close(logits_of(loaded, case.plain), logits_of(case.model, case.plain), "logits", tolerance=1e-6)
    return ""


@torch.no_grad()
def equal_prefixes(case: Case) -> str:
    """While all streams have the same prefix, the aggregator doesn't matter."""
    model = case.adapted()
    tensors = {name: parameter for name, parameter in model.named_parameters() if "parscale" in name}
    for name, parameter in tensors.items():
        if "parscale_prefix" in name:
            parameter.copy_(parameter[:1].expand_as(parameter))
    expected = logits_of(model, case.plain)
    for name, parameter in tensors.items():
        if "parscale_aggregator" in name:
            parameter.normal_()
    require_close(logits_of(model, case.plain), expected, "logits with another aggregator")
    return ""


def brute_force(case: Case) -> str:
    """One forward per stream through the plain backbone with that stream's prefix, mixed in numpy, gives the logits."""
    more_rows = {"input_ids": case.input_ids.repeat(NUM_STREAMS, 1)}
    if distance(logits_of(case.backbone, more_rows)[:BATCH_SIZE], logits_of(case.backbone, case.plain)) > TOLERANCE:
        raise NotApplicable("more rows change the plain backbone's logits")
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        for inputs in (case.plain, case.ragged, case.short):
            found = logits_of(case.model, inputs)
            expected = logits_by_brute_force(case.fresh_backbone("eager"), Path(folder), inputs)
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            real = real if case.answers_by_token else torch.ones(BATCH_SIZE, dtype=torch.bool)
            require_close(found[real], expected[real], "logits")
            if distance(found, logits_of(case.backbone, inputs)) < 100 * TOLERANCE:
                raise Broken("the streams hardly change the backbone's logits, so that nothing is shown")
    return ""


CHECKS: dict[str, Callable[[Case], str]] = {
    "brute force": brute_force,
    "adapter off": adapter_off,
    "causality": causality,
    "batch": batch_invariance,
    "left-padding": left_padding,
    "pooling": pooling,
    "default cache": default_cache,
    "greedy": cached_greedy,
    "beams": cached_beams,
    "gradients": gradients,
    "checkpointing": checkpointed_gradients,
    "save and load": save_and_load,
    "equal prefixes": equal_prefixes,
}


def checks_of(task: str) -> dict[str, Callable[[Case], str]]:
    """What can be asked of a model for that task: only causal LMs generate, and only classifiers of rows pool."""
    left_out = {CAUSAL_LM: {"pooling"}, SEQ_CLS: {"causality", "greedy", "beams"}}.get(
        task, {"pooling", "greedy", "beams"}
    )
    return {name: check for name, check in CHECKS.items() if name not in left_out}
