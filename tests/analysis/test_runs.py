"""Reading training runs, and the sentences about those that cannot be read."""

import json

import pytest

from parscale_adapt.analysis.runs import Run, published_runs, read_runs


HEADER = "num_params,num_streams,loss\n"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_file_is_read_whatever_its_order_and_other_columns(tmp_path):
    path = write(tmp_path / "runs.csv", "name, loss ,num_streams, num_params\na,1.5,2,1e9\nb, 1.4 ,4,2000000000\n")
    assert read_runs(path) == [Run(1e9, 2, 1.5), Run(2e9, 4, 1.4)]


def test_published_points_are_complete():
    for dataset, first, last in (("stack-v2-python", 1.1722, 0.9794), ("pile", 2.1113, 1.7772)):
        runs = read_runs(dataset)
        assert len(runs) == 24
        assert runs[0] == Run(535813376, 1, first)
        assert runs[-1] == Run(4414502408, 8, last)


def test_a_folder_of_runs_is_read(tmp_path):
    for index, (streams, loss) in enumerate([(1, 1.5), (2, 1.4)]):
        folder = tmp_path / f"run{index}"
        folder.mkdir()
        metrics = {"num_params": 1e6, "num_streams": streams, "heldout_loss": loss, "speed": 3}
        write(folder / "metrics.json", json.dumps(metrics))
    assert read_runs(tmp_path) == [Run(1e6, 1, 1.5), Run(1e6, 2, 1.4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_params,loss\n1e9,1.2\n", r"no column `num_streams` \(it has `num_params`, `loss`\)"),
        ("", r"no column .* \(it has no header\)"),
        (HEADER, r"has a header but no rows"),
        (HEADER + "1e9,2,0\n", r"line 2: `loss` must be positive \(nats per token\), got 0"),
        (HEADER + "1e9,1,2\n1e9,2,-0.5\n", r"line 3: `loss` must be positive .* got -0.5"),
        (HEADER + "1e9,2,nan\n", r"line 2: `loss` must be a number, got 'nan'"),
        (HEADER + "1e9,2\n", r"line 2: `loss` must be a number, got ''"),
        (HEADER + "big,2,1.0\n", r"line 2: `num_params` must be a number, got 'big'"),
        (HEADER + "0,2,1.0\n", r"line 2: `num_params` must be positive, got 0"),
        (HEADER + "1e9,0,1.0\n", r"line 2: `num_streams` must be a whole number of at least 1, got 0"),
        (HEADER + "1e9,1.5,1.0\n", r"`num_streams` must be a whole number of at least 1, got 1.5"),
        ("dataset," + HEADER + "a,1e9,1,1\nb,1e9,2,2\n", r"mixes the data sets a, b"),
    ],
)
def test_a_bad_csv_file_gets_one_sentence(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_runs(write(tmp_path / "runs.csv", text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"runs.csv is not a text file in UTF-8"):
        read_runs(path)


def test_a_data_set_is_chosen_from_a_mixed_file(tmp_path):
    path = write(tmp_path / "runs.csv", "dataset," + HEADER + "a,1e9,1,1\nb,1e9,2,2\n")
    assert read_runs(path, dataset="b") == [Run(1e9, 2, 2.0)]
    with pytest.raises(ValueError, match=r"no rows of data set `c`, only of a, b"):
        read_runs(path, dataset="c")
    plain = write(tmp_path / "plain.csv", HEADER + "1e9,1,1\n")
    with pytest.raises(ValueError, match=r"no column `dataset`"):
        read_runs(plain, dataset="a")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ('{"num_params": 1, "num_streams": 1}', r"metrics.json has no key `heldout_loss`"),
        ('{"num_params": 1, "num_streams": 1, "heldout_loss": null}', r"`heldout_loss` must be a number, got None"),
        ('{"num_params": 1, "num_streams": true, "heldout_loss": 1}', r"`num_streams` must be a number, got True"),
        ("[]", r"has no key `num_params`"),
        ("{", r"metrics.json is not JSON"),
    ],
)
def test_a_bad_metrics_file_is_named(tmp_path, metrics, message):
    write(tmp_path / "metrics.json", metrics)
    with pytest.raises(ValueError, match=message):
        read_runs(tmp_path)


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics.json below"):
        read_runs(tmp_path)
    with pytest.raises(ValueError, match=r"`no_such_file.csv` is neither a CSV file, nor a folder of runs"):
        read_runs("no_such_file.csv")
    with pytest.raises(ValueError, match=r"no published data set is called `c4`"):
        published_runs("c4")
