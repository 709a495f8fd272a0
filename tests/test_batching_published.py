"""The published studies in rounds: figures found before by another program, and the engine that plays them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.batching_published import intervals, play, ratios
from formulations.batching_start import mc_sf
from llmopt.rounds import Rounds, hand_instances, model_1, model_2


def test_sixty_small_instances_have_the_ratios_found_before() -> None:
    """Model 1, n = 6: average, worst and number optimal of MC-SF, of the skipping variant and of MC-Benchmark."""
    found = ratios(1, 6, 60)
    assert found["MC-SF"].mean() == pytest.approx(1.022, abs=5e-4)
    assert found["MC-SF"].max() == pytest.approx(1.111, abs=5e-4)
    assert (found["MC-SF"] <= 1).sum() == 25
    assert found["skipping"].mean() == pytest.approx(1.043, abs=5e-4)
    assert found["MC-Benchmark"].mean() == pytest.approx(1.357, abs=5e-4)
    assert found["MC-Benchmark"].max() == pytest.approx(2.17, abs=5e-3)


@pytest.mark.parametrize("seed", range(5))
def test_with_known_outputs_the_engine_plays_mc_sf(seed: int) -> None:
    for instance in (*hand_instances().values(), model_1(seed, 25), model_2(seed, 25)):
        played = play(instance, instance.output)
        assert played.start.tolist() == mc_sf(instance).tolist()
        assert played.restarts == 0


def test_who_outruns_a_low_belief_starts_over() -> None:
    """Believed to make one token each, three requests of 4 tokens start in 6 tokens; worked by hand.

    Rounds 1 and 2 hold 3 x 1 and 3 x 2 tokens. Round 3 would hold 9: the first starts over, believed to make 3. Round
    4 would hold 8: the second starts over, believed to make 4, and the third ends. Both start then, hold 3 + 3 in round
    7, and 4 + 4 would not fit in round 8: the first starts over again, once the second has ended.
    """
    instance = Rounds.together([(0, 4)] * 3, 6)
    played = play(instance, np.ones(3, dtype=np.int64))
    assert sorted(played.completion.tolist()) == [4, 8, 12]
    assert played.restarts == 3


def test_knowing_only_the_upper_end_costs_more_the_wider_the_interval() -> None:
    wide, narrow = intervals("uniform", 5, 60, 2), intervals("uniform", 50, 60, 2)
    assert wide[0].mean() > narrow[0].mean() > 1
    assert wide[1].mean() < wide[0].mean()
