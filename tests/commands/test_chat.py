"""`parscale chat`: answers as `generate` gives them, streams switched in the middle, one sentence for bad input."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.chat_material import MAX_LENGTH, ChatMaterial, chat_prompt, greedy_answer
from transformers import AutoModelForCausalLM, TextStreamer
from typer.testing import CliRunner

from parscale_adapt.cli import app
from parscale_adapt.commands.chat import follow
from parscale_adapt.serving.conversation import Conversation
from parscale_adapt.serving.loading import find_speaker, load_speaker


NUM_TOKENS = 12


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return ChatMaterial(tmp_path_factory.mktemp("chat"))


def talk(*arguments, lines=(), num_tokens=NUM_TOKENS):
    """Run the command with these lines typed."""
    options = ["chat", *map(str, arguments), "--max-new-tokens", str(num_tokens)]
    return CliRunner().invoke(app, options, input="".join(f"{line}\n" for line in lines))


def expected_answers(material, turns):
    """Questions and answers from `generate`, each with a model loaded for itself and an empty cache."""
    messages = []
    for voice, question in turns:
        messages.append({"role": "user", "content": question})
        prompt = chat_prompt(material.tokenizer, messages)
        answer = greedy_answer(material.model(voice), material.tokenizer, prompt, NUM_TOKENS)
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_streams_are_switched_while_the_conversation_goes_on(material):
    adapters = ("--adapter", f"small={material.root / 'two'}", "--adapter", material.root / "four")
    lines = ["hello", "and then?", "/p 4", "go on", "/off", "more", "/use small", "last", "/p 1", "bye", "/quit", "no"]
    result = talk(material.root / "backbone", *adapters, lines=lines)
    turns = [("two", "hello"), ("two", "and then?"), ("four", "go on"), (None, "more"), ("two", "last"), (None, "bye")]
    answers = expected_answers(material, turns)
    assert len(set(answers)) == len(answers)
    assert result.stdout.splitlines() == [
        "/help shows the commands.",
        f"small, P = 2> {answers[0]}",
        f"small, P = 2> {answers[1]}",
        "small, P = 2> Now: four, P = 4.",
        f"four, P = 4> {answers[2]}",
        "four, P = 4> Now: backbone, P = 1.",
        f"backbone, P = 1> {answers[3]}",
        "backbone, P = 1> Now: small, P = 2.",
        f"small, P = 2> {answers[4]}",
        "small, P = 2> Now: backbone, P = 1.",
        f"backbone, P = 1> {answers[5]}",
        "backbone, P = 1> ",
    ]
    assert result.exit_code == 0


def test_reset_forgets_what_was_said(material):
    folder = material.root / "a=b" / "four"  # no name of an adapter
    folder.parent.mkdir()
    folder.symlink_to(material.root / "four")
    result = talk(folder, lines=["hello", "/reset", "other", "", "/adapters"])
    first, second = (expected_answers(material, [("four", question)])[0] for question in ("hello", "other"))
    lines = result.stdout.splitlines()
    assert lines[1:4] == [
        f"four, P = 4> {first}",
        "four, P = 4> The conversation starts anew.",
        f"four, P = 4> {second}",
    ]
    assert [line.split() for line in lines if line.split()[:1] in (["four"], ["backbone"])] == [
        ["four", "4"],
        ["backbone", "1"],
    ]


def test_checkpoints_with_streams_of_their_own_answer_too(material):
    result = talk(material.export, lines=["hello", "/p 4", "/off"])
    answer = expected_answers(material, [("four", "hello")])[0]
    assert result.stdout.splitlines()[1] == f"export, P = 4> {answer}"
    assert result.stdout.count("This checkpoint owns its streams, they can't be switched off") == 1
    assert "No adapter has" not in result.stdout

    model = material.published()
    prompt = chat_prompt(material.tokenizer, [{"role": "user", "content": "hello"}])
    answer = greedy_answer(model, material.tokenizer, prompt, NUM_TOKENS)
    assert f"published, P = 2> {answer}" in talk(material.root / "published", lines=["hello"]).stdout.splitlines()


def test_without_chat_template_the_text_goes_on(material, tmp_path):
    folder = shutil.copytree(material.root / "backbone", tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    result = talk(folder, lines=["def f", "g"])
    text, answers = "", []
    for line in ("def f", "\ng"):
        text += line
        prompt = material.tokenizer(text, return_tensors="pt").input_ids
        answers.append(greedy_answer(material.plain(), material.tokenizer, prompt, NUM_TOKENS))
        text += answers[-1]
    assert result.stdout.splitlines()[:4] == [
        "The tokenizer has no chat template: the model goes on with your text as it stands.",
        "/help shows the commands.",
        f"plain, P = 1> {answers[0]}",
        f"plain, P = 1> {answers[1]}",
    ]


def conversation_with(material, *names, **options):
    adapters = [str(material.root / name) for name in names]
    loaded = load_speaker(find_speaker(str(material.root / "backbone"), adapters=adapters))
    return Conversation(*loaded, max_new_tokens=NUM_TOKENS, **options)


def test_the_cache_is_kept_for_the_same_voice_only(material):
    conversation = conversation_with(material, "two", "four")
    read = []
    embedding = conversation.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: read.append(args[0].shape[1]))
    tokenizer = material.tokenizer

    def first_read(question):
        """Tokens that the model reads at once before it answers, and tokens of the prompt."""
        del read[:]
        prompt = chat_prompt(tokenizer, [*conversation.messages, {"role": "user", "content": question}])
        conversation.say(question)
        assert read[1:] == [1] * (NUM_TOKENS - 1)
        return read[0], prompt.shape[1]

    num_read, num_first = first_read("hello")
    assert num_read == num_first
    num_read, num_tokens = first_read("and then?")
    assert num_read == num_tokens - (num_first + NUM_TOKENS - 1)
    conversation.use(conversation.with_streams(4))
    assert len(set(first_read("go on"))) == 1
    conversation.use(conversation.plain)
    assert len(set(first_read("more"))) == 1
    conversation.reset()
    assert len(set(first_read("anew, and with a question that is longer than all that was said before" * 4))) == 1


def test_answers_are_streamed_token_by_token(material, monkeypatch):
    pieces = []
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: pieces.append(text))
    monkeypatch.setattr(TextStreamer, "_is_chinese_char", lambda self, code: True)  # no waiting for the word's end
    answer = conversation_with(material, "four").say("hello")
    assert "".join(pieces) == answer
    assert [piece for piece in pieces if piece] == list(answer)


def test_temperature_draws_and_zero_does_not(material):
    def answer(temperature, seed):
        conversation = conversation_with(material, "four", temperature=temperature)
        torch.manual_seed(seed)
        return conversation.say("hello")

    greedy = expected_answers(material, [("four", "hello")])[0]
    assert answer(0, 1) == answer(0, 2) == greedy
    assert answer(1.5, 1) == answer(1.5, 1) != answer(1.5, 2)


def test_a_conversation_that_outgrows_the_model_is_refused_and_goes_on(material):
    result = talk(material.root / "four", lines=["x" * MAX_LENGTH, "hello"])
    answer = expected_answers(material, [("four", "hello")])[0]
    assert f"longer than the {MAX_LENGTH} that the model can read" in result.stdout
    assert f"four, P = 4> {answer}" in result.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "/p 3",
            "No adapter has 3 streams: choose by name, with /use, among two (P = 2), four (P = 4), four_too (P =",
        ),
        ("/p 4", "Several adapters have 4 streams: choose by name, with /use, among four (P = 4), four_too (P = 4)."),
        ("/p", "/p needs a number of streams, such as /p 4, got ''."),
        ("/p four", "/p needs a number of streams, such as /p 4, got 'four'."),
        ("/use five", "There is no 'five': choose among two, four, four_too, backbone."),
        ("/nothing", "There is no command /nothing: /help shows them all."),
    ],
)
def test_a_wrong_command_is_one_sentence_and_nothing_is_said(material, line, message):
    conversation = conversation_with(material, "two", "four", "four_too")
    voice = conversation.voice
    with pytest.raises(ValueError) as error:  # noqa: PT011
        follow(conversation, line)
    assert str(error.value).startswith(message)
    assert conversation.messages == []
    assert conversation.voice == voice


def test_help_names_every_command(material):
    help_text = talk(material.root / "four", lines=["/help"]).stdout
    assert all(command in help_text for command in ("/p N", "/use NAME", "/off", "/adapters", "/reset", "/quit"))


@pytest.fixture
def broken(material, tmp_path):
    """Folders that can't be talked to."""
    lora = get_peft_model(material.plain(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    silent = shutil.copytree(material.root / "backbone", tmp_path / "silent")
    (silent / "tokenizer.json").unlink()
    (silent / "tokenizer_config.json").unlink()
    owner = shutil.copytree(material.root / "two", tmp_path / "owner")
    fields = json.loads((owner / "adapter_config.json").read_text())
    (owner / "adapter_config.json").write_text(json.dumps(fields | {"train_backbone": True}))
    (tmp_path / "empty").mkdir()
    for name in ("backbone", "two", "four", "export"):
        (tmp_path / name).symlink_to(material.root / name)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nothing", (), "There is no folder"),
        ("empty", (), "holds no config.json"),
        ("lora", (), "must hold a ParScale adapter, got one of the method LORA"),
        ("silent", (), "There is no tokenizer in"),
        ("export", ("--adapter", "two"), "has streams of its own, adapters go on a plain backbone"),
        ("export", ("--backbone", "backbone"), "is no adapter, so it needs no backbone: leave --backbone out"),
        ("backbone", ("--adapter", "a=two", "--adapter", "a=four"), "needs a name of its own, got 'a'"),
        ("backbone", ("--adapter", "backbone=two"), "needs a name of its own, got 'backbone'"),
        ("backbone", ("--adapter", "owner", "--adapter", "four"), "'owner' brings a backbone of its own"),
        ("two", ("--backbone", "export"), "a standalone checkpoint with streams of its own: give the plain one"),
    ],
)
def test_bad_input_is_refused_before_weights_load(broken, monkeypatch, path, options, message):
    monkeypatch.chdir(broken)
    monkeypatch.setattr("parscale_adapt.serving.loading.load_source", lambda source: pytest.fail("loads weights"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loads weights"))
    result = talk(path, *options)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert result.stdout == ""
