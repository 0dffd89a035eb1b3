"""Answers of the page: those of `generate`, of several visitors at once, with the weights that the aggregator gives."""

import threading
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.chat_material import MAX_LENGTH, chat_prompt, greedy_answer

from parscale_adapt import ParScaleConfig
from parscale_adapt.page import answers as module
from parscale_adapt.page.answers import Answers
from parscale_adapt.page.questions import Question
from parscale_adapt.serving.loading import find_speaker, load_speaker


NUM_TOKENS = 10
HELLO = [{"role": "user", "content": "hello"}]


def asked(text="hello", **changes):
    settings = {"temperature": 0.0, "seed": 0, "max_new_tokens": NUM_TOKENS, **changes}
    return Question([{"role": "user", "content": text}], **settings)


def events_of(answers, question, names, on_event=lambda event, stopped: None):
    """Everything that is emitted; `on_event` may set `stopped`."""
    events, stopped = [], threading.Event()

    def emit(event):
        events.append(event)
        on_event(event, stopped)

    answers.answer(question, answers.named(names), emit, stopped)
    return events


def texts_of(events):
    return [answer["text"] for answer in events[-1]["answers"]]


def expected(chat_material, name, text="hello", num_tokens=NUM_TOKENS):
    prompt = chat_prompt(chat_material.tokenizer, [{"role": "user", "content": text}])
    return greedy_answer(chat_material.model(name), chat_material.tokenizer, prompt, num_tokens)


def test_answers_side_by_side_are_those_of_each_adapter_alone(answers, chat_material):
    events = events_of(answers, asked(), ["four", "backbone", "two"])
    alone = [expected(chat_material, name) for name in ("four", None, "two")]
    assert texts_of(events) == alone
    assert len(set(alone)) == 3
    pieces = [event["texts"] for event in events if event["event"] == "tokens"]
    assert ["".join(column) for column in zip(*pieces)] == alone
    ids = [event["tokens"] for event in events if event["event"] == "tokens"]
    assert [list(column) for column in zip(*ids)] == [answer["tokens"] for answer in events[-1]["answers"]]


def test_figures_are_those_of_the_answer(answers, chat_material):
    (start, *steps, end) = events_of(answers, asked(), ["backbone", "four"])
    prompt = chat_prompt(chat_material.tokenizer, HELLO)
    assert start == {"event": "start", "prompt_tokens": prompt.shape[1], "max_new_tokens": NUM_TOKENS}
    assert len(steps) == NUM_TOKENS
    config = chat_material.plain().config
    size = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    one_stream = 2 * config.num_hidden_layers * size * 4 * (prompt.shape[1] + NUM_TOKENS - 1)
    assert [answer["cache_bytes"] for answer in end["answers"]] == [one_stream, 4 * one_stream]
    for answer in end["answers"]:
        assert answer["ended"] == "length"
        assert answer["tokens_per_second"] * answer["ms_per_token"] == pytest.approx(1000)


def test_an_answer_ends_for_itself(answers, chat_material, monkeypatch):
    whole = [answer["tokens"] for answer in events_of(answers, asked(), ["backbone", "two"])[-1]["answers"]]
    place = next(index for index, pair in enumerate(zip(*whole)) if pair[0] != pair[1])
    monkeypatch.setattr(answers.model.generation_config, "eos_token_id", whole[0][place])
    events = events_of(answers, asked(), ["backbone", "two"])
    first, second = events[-1]["answers"]
    assert first["tokens"] == whole[0][: place + 1]
    assert first["ended"] == "end"
    assert second["tokens"][: place + 1] == whole[1][: place + 1]
    assert len(second["tokens"]) > len(first["tokens"])
    assert events[-2]["tokens"][0] is None
    assert events[-2]["texts"][0] is None


def test_drawn_answers_depend_on_the_seed_and_not_on_the_neighbors(answers):
    def answer(seed, *names):
        return texts_of(events_of(answers, asked(temperature=1.0, seed=seed), list(names)))

    (alone,) = answer(1, "two")
    assert answer(1, "backbone", "two", "four")[1] == alone
    assert answer(2, "two") != [alone]
    torch.manual_seed(7)
    assert answer(1, "two") == [alone]


def test_draws_follow_the_probabilities():
    from parscale_adapt.serving.generation import _SeededDraw, _warpers

    model = type("Model", (), {"generation_config": type("Own", (), {"top_k": 3, "top_p": 1.0, "min_p": None})})
    scores = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    draw = _SeededDraw(_warpers(model, 0.5), [3])
    counts = torch.bincount(torch.stack([draw(None, scores.clone()).argmax() for _ in range(4000)]), minlength=4)
    weights = torch.tensor([0.16, 0.09, 0.04, 0.0])
    torch.testing.assert_close(counts / 4000, weights / weights.sum(), atol=0.03, rtol=0)
    assert counts[3] == 0


def test_two_visitors_are_answered_token_by_token_in_turn(answers, chat_material):
    order, both_began = [], threading.Barrier(2)
    results = {}

    def ask(name, text):
        def emit(event):
            if event["event"] == "start":
                return
            order.append(name)
            if event["event"] == "end":
                results[name] = event["answers"][0]["text"]

        both_began.wait()
        answers.answer(asked(text), answers.named([name]), emit, threading.Event())

    threads = [threading.Thread(target=ask, args=pair) for pair in (("two", "hello"), ("four", "and then?"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {
        "two": expected(chat_material, "two"),
        "four": expected(chat_material, "four", "and then?"),
    }
    changes = sum(first != second for first, second in pairwise(order))
    assert changes >= NUM_TOKENS // 2, order


def test_an_answer_that_nobody_waits_for_stops(answers):
    def leave(event, stopped):
        if event["event"] == "tokens" and event["tokens"]:
            stopped.set()

    events = events_of(answers, asked(), ["two"], leave)
    assert [event["event"] for event in events] == ["start", "tokens", "end"]
    assert events[-1]["answers"][0]["ended"] == "stopped"
    assert texts_of(events_of(answers, asked(), ["two"])) != texts_of(events)

    stopped = threading.Event()
    stopped.set()
    answers.answer(asked(), answers.named(["two"]), lambda event: pytest.fail("answers"), stopped)


def test_more_visitors_than_places_are_told(answers, monkeypatch):
    monkeypatch.setattr(answers, "_places", threading.BoundedSemaphore(1))

    def ask_again(event, stopped):
        if event["event"] == "start":
            with pytest.raises(ValueError, match=f"{module.MAX_ANSWERS} answers are being given already"):
                answers.answer(asked(), answers.named(["two"]), lambda event: None, threading.Event())

    assert len(texts_of(events_of(answers, asked(), ["two"], ask_again))) == 1
    assert len(texts_of(events_of(answers, asked(), ["two"]))) == 1


def test_the_room_in_the_context_bounds_the_answer(answers, chat_material):
    text = "x" * 400
    length = chat_prompt(chat_material.tokenizer, [{"role": "user", "content": text}]).shape[1]
    start = events_of(answers, asked(text, max_new_tokens=10_000), ["backbone"], lambda event, stopped: stopped.set())
    assert start[0]["max_new_tokens"] == MAX_LENGTH - length > 0
    with pytest.raises(ValueError, match=rf"has \d+ tokens, and the model reads {MAX_LENGTH} with its answer"):
        events_of(answers, asked("x" * MAX_LENGTH), ["two"])
    with pytest.raises(ValueError, match="tokens, and the model reads"):
        answers.streams(HELLO, answers.named(["two"])[0], [40] * MAX_LENGTH)


def aggregator_weights(model, sequence):
    """`[T, P]` what the only aggregator of a model gives in a plain forward."""
    (aggregator,) = [part for name, part in model.named_modules() if name.endswith("aggregator.default")]
    aggregator.record_weights = True
    with torch.no_grad():
        model(input_ids=sequence)
    return aggregator.last_weights[0]


@pytest.mark.parametrize("name", ["two", "four"])
def test_weights_and_predictions_are_those_of_a_plain_forward(answers, chat_material, name):
    tokens = events_of(answers, asked(), [name])[-1]["answers"][0]["tokens"]
    found = answers.streams(HELLO, answers.named([name])[0], tokens)
    prompt = chat_prompt(chat_material.tokenizer, HELLO)
    sequence = torch.cat([prompt, torch.tensor([tokens])], 1)
    model = chat_material.adapted(name)
    weights = aggregator_weights(model, sequence)[prompt.shape[1] - 1 : -1]
    shown = torch.tensor([row["weights"] for row in found["tokens"]])
    torch.testing.assert_close(shown, weights, atol=1e-5, rtol=0)
    entropy = -(weights * weights.log()).sum(-1)
    torch.testing.assert_close(torch.tensor([row["entropy"] for row in found["tokens"]]), entropy, atol=1e-5, rtol=0)
    with torch.no_grad():
        probs = model(input_ids=sequence).logits[0, prompt.shape[1] - 1 : -1].softmax(-1)
    for row, token, prob in zip(found["tokens"], tokens, probs):
        assert row["token_probs"][-1] == pytest.approx(prob[token].item(), abs=1e-5)
        assert row["top_probs"][-1] == pytest.approx(prob.max().item(), abs=1e-5)
        assert row["tops"][-1] == chat_material.tokenizer.decode([prob.argmax().item()])
    assert "".join(row["text"] for row in found["tokens"]) == chat_material.tokenizer.decode(tokens)
    share = found["statistics"]["stream_weight/0"]
    assert share == pytest.approx(weights[:, 0].mean().item(), abs=1e-5)


def test_each_stream_alone_says_what_its_own_state_predicts(answers, chat_material):
    """A mixture that takes one stream alone is that stream."""
    found = answers.streams(HELLO, answers.named(["four"])[0], [40, 41, 42])
    prompt = chat_prompt(chat_material.tokenizer, HELLO)
    sequence = torch.cat([prompt, torch.tensor([[40, 41, 42]])], 1)
    model = chat_material.adapted("four")
    (aggregator,) = [part for name, part in model.named_modules() if name.endswith("aggregator.default")]
    for stream in range(4):
        hook = aggregator.register_forward_hook(lambda part, args, output, stream=stream: args[0][stream : stream + 1])
        with torch.no_grad():
            probs = model(input_ids=sequence).logits[0, prompt.shape[1] - 1 : -1].softmax(-1)
        hook.remove()
        shown = torch.tensor([row["top_probs"][stream] for row in found["tokens"]])
        torch.testing.assert_close(shown, probs.max(-1).values, atol=1e-5, rtol=0)
        tops = [chat_material.tokenizer.decode([token]) for token in probs.argmax(-1).tolist()]
        assert [row["tops"][stream] for row in found["tokens"]] == tops


def test_a_checkpoint_that_owns_its_streams_shows_them_too(answers, chat_material):
    export = Answers(*load_speaker(find_speaker(str(chat_material.export))))
    (voice,) = export.voices
    own, adapted = export.streams(HELLO, voice, [40, 41]), answers.streams(HELLO, answers.named(["four"])[0], [40, 41])
    weights = [torch.tensor([row["weights"] for row in found["tokens"]]) for found in (own, adapted)]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)
    assert texts_of(events_of(export, asked(), [voice.name])) == [expected(chat_material, "four")]


def test_one_stream_has_nothing_to_show(answers):
    with pytest.raises(ValueError, match="backbone has one stream, so nothing is weighed"):
        answers.streams(HELLO, answers.named(["backbone"])[0], [40])


def test_shared_lora_runs_for_its_own_voice_alone(chat_material, tmp_path):
    """Threads that interleave leave hooks of each other on the same LoRA layers."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(chat_material.plain(), ParScaleConfig(num_streams=2, num_prefix_tokens=3, lora=lora))
    model.save_pretrained(tmp_path / "lora")
    both = [f"lora={tmp_path / 'lora'}", str(chat_material.root / "two")]
    mixed = Answers(*load_speaker(find_speaker(str(chat_material.root / "backbone"), adapters=both)))
    results = {}

    def ask(name):
        results[name] = texts_of(events_of(mixed, asked(), [name]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("lora", "two", "backbone")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    prompt = chat_prompt(chat_material.tokenizer, HELLO)
    alone = PeftModel.from_pretrained(chat_material.plain(), tmp_path / "lora").eval()
    assert results == {
        "lora": [greedy_answer(alone, chat_material.tokenizer, prompt, NUM_TOKENS)],
        "two": [expected(chat_material, "two")],
        "backbone": [expected(chat_material, None)],
    }
    assert len({text for (text,) in results.values()}) == 3
