"""Batching rules with guarantees that need no program: shortest output first with an exact look ahead."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.batcher import Batcher
from llmopt.plan import Plan
from llmopt.scenario import Scenario


@dataclass(frozen=True)
class McSf:
    """Fewest predicted output tokens first, while memory suffices at every predicted completion; stop at the first that
    does not fit.

    Source: MC-SF, Jaillet et al., "Online Scheduling for LLM Inference with KV Cache Constraints", arXiv 2502.07115,
    equation (5). Guarantee there (theorem 4.3): a constant factor of the optimal total latency if all requests arrive
    together with equal prompts, predictions are between o and alpha o, and M >= 2 max(s + o); no deterministic online
    rule has one for arrivals over time (theorem 4.1, Omega(sqrt n)). Unequal prompts can cost it any factor
    (arXiv 2508.06133): see `sorted-f`.
    """

    name: str = "mc-sf"

    def plan(self, scenario: Scenario) -> Plan:
        """Order by prediction, admission by look-ahead, no skips."""
        return Plan(self.name, batcher=Batcher(order="predicted", admission="lookahead"))


@dataclass(frozen=True)
class AMax:
    """MC-SF that believes the upper end of an interval prediction, so that memory never runs out.

    Source: A_max, Chen, Ye, Zhou, arXiv 2508.14544. Guarantee reported for outputs in a common interval [l, u], equal
    prompts, all at once: a ratio to shortest-first with known outputs that grows like (u / l)^2.
    """

    name: str = "a-max"

    def plan(self, scenario: Scenario) -> Plan:
        """As MC-SF with belief = "high"."""
        return Plan(self.name, batcher=Batcher(order="predicted", admission="lookahead", belief="high"))


@dataclass(frozen=True)
class AMin:
    """MC-SF that believes the lower end of an interval prediction and raises it as tokens come.

    When memory runs out, running requests with the least believed output start over, and are believed to produce at
    least what they had produced.

    Source: A_min, Chen, Ye, Zhou, arXiv 2508.14544. Guarantee reported for outputs in a common interval [l, u], equal
    prompts, all at once: a ratio O(log(u / l)) to shortest-first with known outputs.
    """

    name: str = "a-min"

    def plan(self, scenario: Scenario) -> Plan:
        """As MC-SF with belief = "low"; victims have the least belief and lose their tokens."""
        rule = Batcher(order="predicted", admission="lookahead", belief="low", victims="least", overflow="restart")
        return Plan(self.name, batcher=rule)
