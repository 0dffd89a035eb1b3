"""Command lines and YAML files of the recipes: every spelling, and what was given explicitly."""

import dataclasses

import pytest

from parscale_adapt.training import BackboneArguments, DataArguments, InstructionArguments, RecipeParser, StreamConfig
from parscale_adapt.tuner.config import ParScaleArguments


RECIPES = {
    "cpt": (ParScaleArguments, BackboneArguments, DataArguments, StreamConfig),
    "sft": (ParScaleArguments, BackboneArguments, InstructionArguments, StreamConfig),
}
QUIET = ["--use_cpu", "true", "--bf16", "false"]


def is_known(parser, option):
    """Whether an option is taken, or refused for its value alone."""
    try:
        _, unknown = parser.parse_known_args([f"{option}=?"])
    except ValueError as error:
        return f"{option}:" in str(error) or f"{option}/" in str(error)
    return not unknown


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_is_spelled_with_underscores_or_with_dashes(recipe):
    parser = RecipeParser(RECIPES[recipe])
    fields = [field for kind in RECIPES[recipe] for field in dataclasses.fields(kind) if field.init]
    assert len(fields) > 100
    spellings = [f"--{name}" for field in fields for name in {field.name, field.name.replace("_", "-")}]
    assert [spelling for spelling in spellings if not is_known(parser, spelling)] == []
    assert not is_known(parser, "--num_stream")
    assert not is_known(parser, "--explicit_settings")


def parse(*arguments):
    return RecipeParser(RECIPES["cpt"]).parse_args_and_config([*QUIET, *arguments])


def explicit(*arguments):
    return parse(*arguments)[1].explicit_settings - {"use_cpu", "bf16"}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("num-streams: 2\nlearning_rate: 1.0e-3\nverify-backbone: false\nenv: {A_VARIABLE: x}\n")
    return str(path)


def test_a_file_is_read_in_either_spelling(config, monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "")
    streams, backbone, _, training = parse("--config", config)
    assert (streams.num_streams, backbone.verify_backbone, training.learning_rate) == (2, False, 1e-3)
    streams, backbone, *_ = parse(f"--config={config}", "--num-streams", "8", "--verify_backbone")
    assert (streams.num_streams, backbone.verify_backbone) == (8, True)


def test_what_was_given_is_told_from_defaults(config, monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "")
    assert explicit() == set()
    assert explicit("--num_streams", "4", "--max-steps=7", "--no_verify_backbone") == {
        "num_streams",
        "max_steps",
        "verify_backbone",
    }
    in_file = {"num_streams", "learning_rate", "verify_backbone"}
    assert explicit("--config", config) == in_file
    assert explicit("--aggregator", "dynamic", "--config", config) == in_file | {"aggregator"}


@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        ([], "", "prefix"),
        (["--stream_transform", "lora"], "", "lora"),
        (["--stream-transform", "lora", "prefix", "--num_streams", "2"], "", ["prefix", "lora"]),
        ([], "stream_transform: bitfit", "bitfit"),
        ([], "stream_transform: [prefix, lora]", ["prefix", "lora"]),
        (["--stream_transform", "prefix"], "stream_transform: [prefix, lora]", "prefix"),
    ],
)
def test_one_transform_or_several_are_named_on_the_command_line_and_in_a_file(tmp_path, words, content, expected):
    path = tmp_path / "run.yaml"
    path.write_text(f"env: {{}}\n{content}\n")
    arguments = [*words, "--config", str(path)]
    assert parse(*arguments)[0].stream_transform == expected
    assert explicit(*arguments) - {"num_streams"} == ({"stream_transform"} if words or content else set())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_streams: [", "is no YAML"),
        ("- num_streams", "must contain a YAML mapping"),
        ("num_streams: 2\nnum-streams: 4", "`num_streams` is given twice"),
        ("num-stream: 2", "Unknown arguments from config file"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_streams", "two"], "invalid int value: 'two'"),
        (["--num_stream", "2"], "--num_stream"),
        (["--config"], "needs the path of a YAML file"),
        (["--stream_transform"], "--stream_transform.*: expected at least one argument"),
        (["--stream_transform", "prefix", "suffix"], r"`stream_transform` must be .*, got \['prefix', 'suffix'\]"),
    ],
)
def test_a_wrong_command_line_is_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "P, the number of parallel streams. 1 is the plain backbone. (default: 4)" in text
    assert "also work where attention can't be reached. (default: prefix)" in text


@pytest.mark.parametrize("given", [[], ["--gradient_checkpointing", "false"], ["--no_gradient_checkpointing"]])
def test_a_setting_that_transformers_has_renamed_is_taken_without_a_warning(recwarn, given):
    training = parse(*given)[3]
    assert training.gradient_checkpointing == (not given)
    assert [str(warning.message) for warning in recwarn if "gradient_checkpointing" in str(warning.message)] == []
