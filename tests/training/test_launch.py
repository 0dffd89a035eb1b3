"""Where a recipe's arguments lead: the data, the identity of a run, and how wrong ones are reported."""

import dataclasses

import pytest
from trl import SFTConfig, TrlParser

from parscale_adapt.data import TextSource
from parscale_adapt.training import BackboneArguments, DataArguments, prepare_packed_training, run_identity, run_recipe
from parscale_adapt.tuner.config import ParScaleArguments


def test_one_source_or_a_mixture():
    assert DataArguments().sources() == []
    one = DataArguments(dataset_name="a.jsonl", text_field="code", streaming=True)
    assert one.sources() == [TextSource("a.jsonl", text_field="code", streaming=True)]
    mixture = DataArguments(datasets=[{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 2}])
    assert [source.weight for source in mixture.sources()] == [1, 2]
    with pytest.raises(ValueError, match="Give either `dataset_name` or `datasets`"):
        DataArguments(dataset_name="a", datasets=[{"path": "b"}])


def test_held_out_text_is_all_of_a_local_file_and_the_test_split_of_the_hub(material):
    assert DataArguments().heldout_source() is None
    assert DataArguments(heldout_dataset=material.heldout).heldout_source().split == "train"
    assert DataArguments(heldout_dataset="owner/name").heldout_source().split == "test"
    assert DataArguments(heldout_dataset="owner/name", heldout_split="dev").heldout_source().split == "dev"


def identity(tmp_path, streams=None, **training):
    config = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **training)
    return run_identity("cpt", streams or ParScaleArguments(), BackboneArguments(), DataArguments(), config)


def test_a_run_is_known_by_what_decides_its_numbers(tmp_path):
    reference = identity(tmp_path)
    assert identity(tmp_path) == reference
    assert identity(tmp_path, seed=1) != reference
    assert identity(tmp_path, gradient_accumulation_steps=2) != reference
    assert identity(tmp_path, streams=ParScaleArguments(num_streams=2)) != reference
    assert identity(tmp_path, logging_steps=3, save_steps=7) == reference


def test_trls_own_packing_is_refused(tmp_path):
    training = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, padding_free=True)
    with pytest.raises(ValueError, match="have no effect here"):
        prepare_packed_training(training, BackboneArguments())


@dataclasses.dataclass
class Arguments:
    number: int = 0


@pytest.mark.parametrize(
    "arguments", [["--number", "x"], ["--num", "1"], ["--other", "1"], ["--config", "missing.yaml"], ["--number", "3"]]
)
def test_every_wrong_argument_is_one_line(capsys, arguments):
    def main(parsed):
        raise ValueError(f"number is {parsed.number},\n  which is wrong")

    with pytest.raises(SystemExit) as stop:
        run_recipe(main, TrlParser((Arguments,)), arguments)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_other_errors_keep_their_traceback():
    def main(parsed):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_recipe(main, TrlParser((Arguments,)), [])
