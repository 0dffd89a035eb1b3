"""Questions and answers as token ids: what is trained, under the templates of real models too."""

import pathlib

import pytest
import trl
from datasets import Dataset, Features, List, Value
from support.tiny_tokenizers import byte_tokenizer
from tokenizers import processors
from transformers import ByT5Tokenizer
from trl.data_utils import common_prefix_length

from parscale_adapt.data import CHATML, InstructionSettings, RowPreparer, load_stdlib_corpus, train_tokenizer
from parscale_adapt.data.packing import IGNORED_LABEL


TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted((pathlib.Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training")
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "rain", "arguments": '{"place": "Graz"}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "rain",
        "description": "Says whether it rains.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Where."}}},
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TWO_TURNS = [user("Question one?"), assistant("Answer one."), user("Question two?"), assistant("Answer two.")]


@pytest.fixture(scope="module")
def merging_tokenizer():
    """A tokenizer that merges spaces and line breaks with what stands beside them, as real ones do."""
    tokenizer = train_tokenizer([text[:900] for text in load_stdlib_corpus()["train"]["text"][:60]], 400)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


@pytest.fixture
def any_end(monkeypatch):
    """Lets answers end as they like: templates of real models write end tokens that tiny tokenizers lack."""
    monkeypatch.setattr(RowPreparer, "_check_end_token", lambda *arguments: None)


def prepare(tokenizer, row, is_arrow=False, max_length=None, **settings):
    settings = InstructionSettings(max_length, end_token_ids=frozenset({tokenizer.eos_token_id}), **settings)
    return RowPreparer(tokenizer, settings).prepare(row, is_arrow)


def trained(tokenizer, row, **settings):
    """The text of all tokens that are trained, in [brackets] where something else lies between."""
    prepared = prepare(tokenizer, row, **settings)
    assert prepared.problem is None
    text, was_trained = "", False
    for token, label in zip(prepared.input_ids, prepared.labels):
        is_trained = label != IGNORED_LABEL
        text += ("[" if is_trained and not was_trained else "]" if was_trained and not is_trained else "") + (
            tokenizer.decode([token]) if is_trained else ""
        )
        was_trained = is_trained
    return text + "]"


# ---- the last answer, as TRL finds it


@pytest.mark.parametrize("trims_offsets", [None, False, True])
@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_the_last_answer_is_what_trl_trains(any_end, merging_tokenizer, template, trims_offsets):
    tokenizer = merging_tokenizer
    tokenizer.chat_template = TEMPLATES[template] if template else CHATML
    if trims_offsets is not None:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims_offsets)
    for question, answer in [
        ("Hi", " leading"),
        ("What?\n", "\n\nbreaks"),
        ("é", "漢字 😀"),
        ("x", "def f(x):\n    pass\n"),
    ]:
        messages = [user(question), assistant(answer)]
        prepared = prepare(tokenizer, {"messages": messages})
        if prepared.problem is not None:
            assert template in ("idefics3", "llava_next", "smolvlm")  # they read parts of content, not text
            continue
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
        assert prepared.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
        start = common_prefix_length(prompt, prepared.input_ids)
        assert prepared.labels == [IGNORED_LABEL] * start + prepared.input_ids[start:]


def test_a_template_may_escape_what_it_is_given_and_close_what_it_renders():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | tojson }} {% endfor %}{{ eos_token }}"
    )
    assert (
        trained(tokenizer, {"messages": [user('a "b"'), assistant('c "d"')]})
        == '[assistant: "c \\"d\\"" <|endoftext|>]'
    )


# ---- all answers


@pytest.mark.parametrize(
    "template", sorted(set(TEMPLATES) & {"gemma", "gemma3", "llama3", "lfm2", "qwen2_5", "cohere"})
)
def test_all_answers_of_templates_without_marks(any_end, template):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = TEMPLATES[template]
    text = trained(tokenizer, {"messages": TWO_TURNS}, train_on="all_answers")
    first, second = text[1:-1].split("][")
    assert first.startswith("Answer one.")
    assert second.startswith("Answer two.")
    assert first.removeprefix("Answer one.") == second.removeprefix("Answer two.") != ""


def test_what_follows_an_answer_is_not_trained_with_it(any_end):
    """Phi's template closes a conversation with a token that begins like the one that opens the next turn."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    text = trained(tokenizer, {"messages": TWO_TURNS}, train_on="all_answers")
    assert text == "[Answer one.<|end|>][Answer two.<|end|><|endoftext|>]"


@pytest.mark.parametrize("template", sorted(set(TEMPLATES) & {"qwen3", "qwen3_6"}))
def test_a_template_that_forgets_earlier_answers_is_refused(any_end, template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    problem = prepare(tokenizer, {"messages": TWO_TURNS}, train_on="all_answers").problem
    assert "renders the answer in message 2 differently when others follow" in problem
    loop = [user("Rain?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "no"}, assistant("No.")]
    if template == "qwen3":
        problem = prepare(tokenizer, {"messages": loop, "tools": [TOOL]}, train_on="all_answers").problem
        assert "renders the answer in message 2 differently when others follow" in problem


def test_each_answer_needs_its_end():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{{ eos_token }}"
    row = {"messages": TWO_TURNS}
    assert prepare(tokenizer, row).problem is None
    assert "never with the end token" in prepare(tokenizer, row, train_on="all_answers").problem
    assert prepare(tokenizer, row, train_on="all_text").problem is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'user' }}{% endfor %}"
    assert "never with the end token" in prepare(tokenizer, row, train_on="all_text").problem


# ---- tool calls


@pytest.mark.parametrize("arguments", ['{"place": "Graz"}', {"place": "Graz"}])
@pytest.mark.parametrize("template", ["chatml", *sorted(set(TEMPLATES) & {"qwen2_5", "llama3_1", "qwen3_6"})])
def test_arguments_are_written_once_as_json_or_as_the_template_does(any_end, template, arguments):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES.get(template, CHATML)
    call = {"type": "function", "function": {"name": "rain", "arguments": arguments}}
    text = trained(tokenizer, {"messages": [user("Rain?"), assistant(None, tool_calls=[call])], "tools": [TOOL]})
    assert "rain" in text
    assert "Graz" in text
    assert "\\" not in text
    assert "None" not in text


def test_a_template_that_takes_arguments_as_text_gets_text():
    tokenizer = byte_tokenizer()
    for rendering in ("'' + c.function.arguments", "c.function.arguments"):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} "
            "{{ " + rendering + " }}{% endfor %}{{ eos_token }}{% endfor %}"
        )
        text = trained(tokenizer, {"messages": [user("Rain?"), assistant("", tool_calls=[CALL])]})
        assert text == '[assistant: rain {"place": "Graz"}<|endoftext|>]'


def test_nulls_that_arrow_fills_in_are_not_rendered():
    """In an Arrow table each tool has the parameters of all tools, and each call the arguments of all calls."""
    tools = [{"function": {"name": name, "parameters": {name: {"type": "string"}}}} for name in ("rain", "snow")]
    rows = [
        {
            "messages": [
                user(name),
                assistant(None, tool_calls=[{"function": {"name": name, "arguments": {name: "x"}}}]),
            ]
        }
        for name in ("rain", "snow")
    ]
    table = Dataset.from_list([{**row, "tools": [tool]} for row, tool in zip(rows, tools)], on_mixed_types=None)
    assert "snow" in table[0]["tools"][0]["function"]["parameters"]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    text = trained(tokenizer, table[0], is_arrow=True, train_on="all_text")
    assert "snow" not in text
    assert "null" not in text
    assert '{"name": "rain", "arguments": {"rain": "x"}}' in text


# ---- columns


def test_messages_of_every_origin_read_alike():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    messages = [user("Hi?"), assistant("Hello.")]
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string"), "name": Value("string")})}
    )
    arrow = Dataset.from_dict({"messages": [messages]}, features=features)[0]
    expected = prepare(tokenizer, {"messages": messages})
    assert expected.num_trained > 0
    assert prepare(tokenizer, arrow, is_arrow=True).input_ids == expected.input_ids
    assert prepare(tokenizer, arrow, is_arrow=True).unused == []


def test_columns_of_ones_own_win_over_conversations():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    row = {"messages": TWO_TURNS, "question": "Hi?", "answer": "Hello."}
    prepared = prepare(tokenizer, row, prompt_field="question", completion_field="answer")
    assert "Hello." in tokenizer.decode(prepared.input_ids)
    assert list(prepared.unused) == ["messages"]


def test_several_answers_of_a_completion_are_trained_and_what_lies_between_is_not():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    completion = [assistant("Wait.", tool_calls=[CALL]), {"role": "tool", "content": "SECRET"}, assistant("No.")]
    text = trained(tokenizer, {"prompt": [user("Rain?")], "completion": completion})
    assert text.startswith("[Wait.")
    assert text.endswith("[No.<|endoftext|>\n]")
    assert "SECRET" not in text


@pytest.mark.parametrize("keeps_end", [False, True])
def test_rows_are_cut_at_the_end_that_was_chosen(keeps_end):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    row = {"messages": [user("Hi?"), assistant("Hello.")]}
    whole, cut = (prepare(tokenizer, row, max_length=n, keeps_end=keeps_end) for n in (None, 20))
    part = slice(-20, None) if keeps_end else slice(20)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[part], whole.labels[part])
    assert cut.num_tokens == len(whole.input_ids)


def test_a_tokenizer_without_places_is_refused():
    with pytest.raises(
        ValueError, match="ByT5Tokenizer can't tell where its tokens lie in a text, which needs a fast"
    ):
        RowPreparer(ByT5Tokenizer(), InstructionSettings(None))
