"""What the driver makes of the metrics of several updates."""

from __future__ import annotations

from rl.loop import metrics_of_round


def test_work_is_added_up_loads_are_the_last_and_the_rest_is_a_mean_over_the_updates_that_have_it() -> None:
    first = {"train/loss": 1.0, "train/tokens": 10.0, "moe/load": [[0.5, 0.5]]}
    last = {"train/loss": 2.0, "train/tokens": 20.0, "moe/load": [[0.25, 0.75]], "moe/owners_moved": 3.0}
    assert metrics_of_round([first, last]) == {
        "train/loss": 1.5,
        "train/tokens": 30,
        "moe/load": [[0.25, 0.75]],
        "moe/owners_moved": 3,
    }
