"""The `parscale` command as users run it: results, files, and one sentence for bad input."""

import os
import re


# On a busy machine the fit's tiny linear systems wait for BLAS threads; this must precede the import of scipy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import subprocess
import sys

import pytest
import typer

from parscale_adapt import __version__, cli
from parscale_adapt.serving import launcher


PNG_START = b"\x89PNG"


@pytest.fixture
def runs_csv(tmp_path):
    lines = ["num_params,num_streams,loss"]
    for size in (1e6, 2e6, 4e6, 8e6):
        lines += [f"{size},{streams},{1 + (1e6 / size / (1 + 0.3 * i)) ** 0.3}" for i, streams in enumerate((1, 2, 4))]
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines))
    return path


def test_help_lists_every_command(parscale):
    code, out, _ = parscale("--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        code, out, _ = parscale(name, "--help")
        assert code == 0
        # Those either report nothing but run, or write their report into a folder of their own.
        has_report = re.search(r"^ +--json", out, re.MULTILINE) is not None
        assert has_report == (name not in ("chat", "serve", "page", "evaluate")), name


def test_version_is_that_of_the_package(parscale):
    assert parscale("--version") == (0, f"parscale_adapt {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["cost", "--help"], ["chat", "--help"]], ids=" ".join
)
def test_help_and_version_load_few_modules_and_no_heavy_ones(arguments):
    """Counted instead of timed: 187 for the group and 286 for a command, whose option types load pydantic."""
    program = (
        "import contextlib, io, sys\n"
        "sys.argv[0] = 'parscale'\n"
        "from parscale_adapt.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "assert out.getvalue()\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    heavy = {"torch", "transformers", "peft", "accelerate", "trl", "datasets", "deepspeed"}
    heavy |= {"matplotlib", "scipy", "numpy", "pandas", "rich"}
    assert not heavy & modules
    assert len(modules) < (230 if len(arguments) == 1 else 350)


def test_predictions_need_no_torch_and_one_thread():
    program = (
        "import os, sys\n"
        "sys.argv[0] = 'parscale'\n"
        "from parscale_adapt.cli import app\n"
        "app(standalone_mode=False)\n"
        "print(*({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)), os.environ['OPENBLAS_NUM_THREADS'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    for arguments in (
        ["predict", "--model", "1.6B"],
        ["cost"],
        ["cost", "--paper-claim"],
        ["fit-law", "pile", "--bootstrap", "0"],
    ):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.splitlines()[-1] == "1", arguments


def parse(parent, command, arguments):
    """What a command reads from its arguments: the values that were given, and what it has no option for."""
    context = type(parent)(command, parent=parent, info_name=command.name, **command.context_settings)
    values, rest, _ = command.make_parser(context).parse_args(arguments)
    return {name: value for name, value in values.items() if value is not None}, rest


def test_every_option_is_spelled_with_dashes_or_underscores():
    group = typer.main.get_command(cli.app)
    checked = 0
    with group.make_context("parscale", ["cost"]) as parent:
        for command in group.commands.values():
            for parameter in command.params:
                for option in (name for name in parameter.opts if "-" in name.removeprefix("--")):
                    value = [] if parameter.is_flag else ["a_b-c"]  # never changed itself
                    with_dashes = parse(parent, command, [option, *value])
                    assert list(with_dashes[0]) == [parameter.name]
                    assert parse(parent, command, ["--" + option[2:].replace("-", "_"), *value]) == with_dashes
                    checked += 1
    assert checked >= 18


def test_both_spellings_say_the_same(parscale):
    dashes = parscale("predict", "--num-params", 3e6, "--match-params", 4e6, "--num-streams", 2, "--num-streams=4")
    underscores = parscale(
        "predict", "--num_params", 3e6, "--match_params=4e6", "--num_streams", 2, "--num-streams", 4
    )
    assert dashes == underscores
    assert dashes[0] == 0


def test_what_a_command_hands_over_keeps_its_spelling(parscale, tmp_path, monkeypatch):
    handed = []
    monkeypatch.setattr(launcher, "serve", lambda *arguments: handed.append(arguments))
    assert parscale("serve", tmp_path, "--cb-num-blocks", 8, "--cb_max_batch_tokens=16")[0] == 0
    assert handed == [(str(tmp_path), "localhost", 8000, ["--cb-num-blocks", "8", "--cb_max_batch_tokens=16"])]


def test_fit_law_prints_and_writes_the_same_figures(parscale, tmp_path):
    arguments = ("fit-law", "stack-v2-python", "--bootstrap", 20, "--show-points", "--json", tmp_path / "law.json")
    code, out, _ = parscale(*arguments, "--plot", tmp_path / "law.png")
    assert code == 0
    law = json.loads((tmp_path / "law.json").read_text())
    assert f"R² = {law['r2']:.4f}" in out
    for name in ("k", "A", "alpha", "E"):
        assert f"{law[name]:.5g}" in out
        low, high = law["intervals"][name]
        assert low < law[name] < high
        assert f"{low:.4g} to {high:.4g}" in out
    assert len(law["points"]) == 24
    first = law["points"][0]
    assert first["loss"] - first["predicted"] == pytest.approx(first["residual"])
    assert (tmp_path / "law.png").read_bytes().startswith(PNG_START)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["law.json", "law.png"]


def test_a_fitted_law_is_used_by_the_other_commands(parscale, runs_csv, tmp_path):
    law = tmp_path / "law.json"
    assert parscale("fit-law", runs_csv, "--form", "diversity", "--bootstrap", 0, "--json", law)[0] == 0
    code, out, err = parscale("predict", "--num-params", 3e6, "--law", law, "--json", tmp_path / "predictions.json")
    assert (code, err) == (0, "")
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert predictions["law"]["form"] == "diversity"
    assert [row["num_streams"] for row in predictions["rows"]] == [1, 2, 4, 8]
    for row in predictions["rows"]:
        assert f"{row['loss']:.4f}" in out
        assert row["equivalent_params"] == pytest.approx(3e6 * row["gain"])
    losses = [row["loss"] for row in predictions["rows"]]
    assert losses == sorted(losses, reverse=True)


def test_predict_counts_the_adapter_of_a_model_and_finds_the_streams_to_match(parscale, tmp_path):
    file = tmp_path / "predictions.json"
    code, out, _ = parscale("predict", "--model", "1.6B", "--match-params", 2.8e9, "--num-streams", 8, "--json", file)
    assert code == 0
    predictions = json.loads(file.read_text())
    assert predictions["rows"][0]["num_params"] == 1595669000
    match = predictions["match"]
    assert match["whole_streams"] - 1 < match["num_streams"] <= match["whole_streams"]
    assert f"P = {match['num_streams']:.2f}" in out


def test_cost_prints_and_writes_the_same_figures(parscale, tmp_path):
    files = [tmp_path / name for name in ("cost.json", "batch.png", "loss.png")]
    arguments = ("cost", "--model", "0.5B", "--json", files[0], "--plot", files[1], "--plot-loss", files[2])
    code, out, _ = parscale(*arguments)
    assert code == 0
    figures = json.loads(files[0].read_text())
    assert [row["num_streams"] for row in figures["rows"]] == [1, 8, 1]
    # The first row is one of the authors' own numbers.
    assert round(figures["rows"][0]["memory_gib"], 3) == 1.272
    for row in figures["rows"]:
        assert f"{row['memory_gib']:.3f}" in out
        assert f"{row['latency_seconds']:.3f}" in out
    assert f"{figures['memory_ratio']:.1f}x the memory" in out
    assert all(file.read_bytes().startswith(PNG_START) for file in files[1:])


def test_cost_reads_a_config_and_lays_measurements_over_the_estimate(parscale, tmp_path):
    from transformers import AutoConfig

    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    AutoConfig.for_model("llama", **config, intermediate_size=48).save_pretrained(tmp_path / "tiny")
    row = {"num_streams": 2, "batch_size": 1, "input_len": 8, "output_len": 8}
    measured = tmp_path / "decode.json"
    measured.write_text(json.dumps({"rows": [row | {"memory_gib": 0.1, "latency_seconds": 0.2}]}))
    arguments = ("cost", "--model", tmp_path / "tiny", "--num-streams", 2, "--device", "h200", "--dtype", "float32")
    code, out, err = parscale(*arguments, "--plot", tmp_path / "cost.png", "--measured", measured)
    assert (code, err) == (0, "")
    assert "tiny, P = 2" in out
    assert (tmp_path / "cost.png").read_bytes().startswith(PNG_START)
    measured.write_text(measured.read_text().replace('"num_streams": 2', '"num_streams": 16'))
    code, _, err = parscale(*arguments, "--plot", tmp_path / "cost.png", "--measured", measured)
    assert code == 1
    assert "holds measurements with 16 streams: give --num-streams 16" in err


def test_cost_says_what_does_not_fit(parscale):
    _, out, _ = parscale("cost", "--model", "4.4B", "--device", "l4", "--batch-size", 512, "--input-len", 512)
    assert "4.4B, P = 8 does not fit in the 24 GB of l4." in out


def test_cost_recomputes_the_claim_of_the_paper(parscale, tmp_path):
    code, out, _ = parscale("cost", "--paper-claim", "--json", tmp_path / "claim.json")
    assert code == 0
    claim = json.loads((tmp_path / "claim.json").read_text())
    assert claim["published"] == {"figure 4": [22, 6], "figure 1": [7, 1.7]}
    best = claim["readings"][0]
    assert f"{best['ratios']['figure 4'][0]:.2f}x" in out
    assert f"{best['worst_deviation']:.1%}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit-law", "missing.csv"), "`missing.csv` is neither a CSV file"),
        (("fit-law", "pile", "--form", "cubic"), "`form` must be one of log, diversity, got `cubic`"),
        (("fit-law", "pile", "--json", "no/such/folder/law.json"), "folder"),
        (("fit-law", "pile", "--plot", "law.pdf"), "pictures are written as PNG"),
        (("predict", "--num-params", "-1"), "parameters must be positive, got -1"),
        (("predict", "--num-params", "1e9", "--law", "c4"), "`--law c4` is neither stack-v2-python nor pile"),
        (("predict", "--num-params", "1e9", "--match-params", "1e8"), "cannot match 1e+08 parameters"),
        (("cost", "--model", "no_model"), "`no_model` is neither one of the paper's sizes"),
        (("cost", "--device", "abacus"), "no device is called `abacus`: choose one of a100-40gb"),
        (("cost", "--dtype", "int3"), "no dtype is called `int3`"),
        (("cost", "--plot", "cost.png", "--measured", "nothing.json"), "there is no file nothing.json"),
    ],
)
def test_bad_input_is_one_sentence_and_no_traceback(parscale, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = parscale(*arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [("no-such-command",), ("cost", "--num-streams", 1), ("predict",), ("cost", "--measured", "a.json"), ("fit-law",)],
)
def test_wrong_usage_exits_with_2(parscale, arguments):
    code, _, err = parscale(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_a_user_sees_a_missing_column_in_one_sentence(parscale, tmp_path):
    (tmp_path / "runs.csv").write_text("num_params,loss\n1e9,1.2\n")
    code, _, err = parscale("fit-law", tmp_path / "runs.csv")
    assert code == 1
    assert "no column `num_streams`" in err
