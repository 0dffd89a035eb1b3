"""A few kills at random moments; `make faults` has twenty for each engine."""

import pytest
from support.faults import SETUPS, in_one_process, kill_and_resume


@pytest.mark.parametrize("setup", SETUPS)
def test_a_run_that_is_killed_and_resumed_ends_with_the_very_same_tensors(recipes, material, tmp_path, setup):
    kills = kill_and_resume(in_one_process(recipes, SETUPS[setup], material, tmp_path), num_kills=3)
    assert [kill for kill in kills if kill.problem] == []
    assert len(kills) == 3
