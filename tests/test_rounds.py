"""The round model: what it refuses, and memory and latency against a second way to count them."""

from __future__ import annotations

import numpy as np
import pytest
from batching_oracle import INSTANCES, checked, held
from hypothesis import given
from hypothesis import strategies as st

from llmopt.errors import ScenarioError
from llmopt.rounds import Rounds, hand_instances, model_1, model_2


@pytest.mark.parametrize(
    ("arrival", "prompt", "output", "sentence"),
    [
        ([0, -1], [1, 1], [1, 1], "request 1 arrives at -1, before round 0; count rounds from 0"),
        ([0], [-2], [1], "request 0 has a prompt of -2 tokens; give 0 or more"),
        ([0], [1], [0], "request 0 has an output of 0 tokens; give at least 1"),
        ([0], [4], [7], "request 0 needs 11 tokens when it completes and can never fit in 10; raise capacity"),
        ([0, 0], [1], [1, 1], r"prompt has shape \(1,\); give one whole number for each of the 2 requests"),
        ([0], [1.5], [1], "prompt has values that are no whole numbers"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(arrival, prompt, output, sentence) -> None:
    with pytest.raises(ScenarioError, match=sentence):
        Rounds(arrival, prompt, output, 10)


@given(INSTANCES, st.randoms(use_true_random=False))
def test_usage_and_feasibility_agree_with_counting(instance, random) -> None:
    start = np.array([a + random.randrange(12) for a in instance.arrival.tolist()])
    tokens = held(instance, start)
    usage = instance.usage(start)
    assert [tokens.get(t, 0) for t in range(len(usage))] == usage.tolist()
    assert max(tokens) == len(usage) - 1
    assert instance.feasible(start) == (max(tokens.values()) <= instance.capacity)
    assert instance.latency(start) == sum((start + instance.output - instance.arrival).tolist())
    assert not instance.feasible(instance.arrival - 1)


def test_volume_counts_the_token_rounds() -> None:
    instance = model_1(3, 9)
    alone = [sum(held(instance, np.zeros(9))[t] for t in held(instance, np.zeros(9)))]
    assert instance.volume.sum() == alone[0]


def test_generators_draw_what_was_published() -> None:
    for seed in range(30):
        one, two = model_1(seed), model_2(seed)
        assert 40 <= len(one) <= 60
        assert not one.arrival.any()
        assert two.arrival.max() < 60
        for instance in (one, two):
            assert 30 <= instance.capacity <= 50
            assert instance.prompt.min() >= 1
            assert instance.prompt.max() <= 5
            assert instance.peak.max() <= instance.capacity
    assert np.array_equal(model_1(5, 12).output, model_1(5, 12).output)
    assert np.mean([len(model_2(s, 50)) for s in range(200)]) == pytest.approx(50, rel=0.1)


def test_hand_instances_and_the_empty_one() -> None:
    assert {name: len(x) for name, x in hand_instances().items()} == {"A": 4, "B": 7, "C": 24}
    nobody = Rounds.together([], 5)
    assert checked(nobody, []) == 0 == nobody.horizon
    assert nobody.feasible(np.zeros(0, dtype=int))
