"""Batching heuristics: in which order engines admit requests today, and simple rules from the literature.

Each is a frozen dataclass whose `plan` returns a rule as data, with the router left open. None solves a program.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmopt.arrays import Floats
from llmopt.batcher import Batcher, Candidates
from llmopt.errors import PolicyError
from llmopt.plan import Plan
from llmopt.policy import Policy
from llmopt.predictions import ORACLE, Noise
from llmopt.scenario import Scenario


@dataclass(frozen=True)
class Fifo:
    """First come, first served, as the pool's engine admits.

    Source: the default scheduling policy `fcfs` of vLLM, and of SGLang and TGI.
    """

    name: str = "fifo"

    def plan(self, scenario: Scenario) -> Plan:
        """The engine's own rule."""
        return Plan(self.name)


@dataclass(frozen=True)
class FifoLookahead:
    """First come, first served, while memory suffices at every predicted completion.

    Source: MC-Benchmark of Jaillet et al., arXiv 2502.07115: the check of MC-SF in order of arrival.
    """

    name: str = "fifo-lookahead"

    def plan(self, scenario: Scenario) -> Plan:
        """Order of arrival, admission by look-ahead."""
        return Plan(self.name, batcher=Batcher(admission="lookahead"))


@dataclass(frozen=True)
class ShortestPrompt:
    """Fewest prompt tokens first, as far as memory goes now.

    Source: shortest job first with the prompt for a size, the part of it that an engine knows for certain.
    """

    name: str = "shortest-prompt"

    def plan(self, scenario: Scenario) -> Plan:
        """Key: prompt tokens."""
        return Plan(self.name, batcher=Batcher(order=prompt_tokens, admission="optimistic"))


@dataclass(frozen=True)
class ShortestOutput:
    """Fewest output tokens first with outputs known, as far as memory goes now.

    Source: shortest job first, Schrage, Oper. Res. 16 (1968) 687 (shortest remaining processing time), without
    preemption; an oracle knows the outputs.
    """

    name: str = "shortest-output"

    def plan(self, scenario: Scenario) -> Plan:
        """Key: true output tokens."""
        return Plan(self.name, batcher=Batcher("predicted", admission="optimistic", predictor=ORACLE))


@dataclass(frozen=True)
class ShortestOutputNoisy:
    """Fewest predicted output tokens first, predictions off by a lognormal factor with log standard deviation `sigma`.

    With the default 0.5 two thirds of the predictions lie within a factor of 1.65 of the truth.

    Source: shortest job first on predicted lengths, Fu et al., "Efficient LLM Scheduling by Learning to Rank", arXiv
    2408.15792; the error law is ours.
    """

    sigma: float = 0.5
    name: str = "shortest-output-noisy"

    def plan(self, scenario: Scenario) -> Plan:
        """Key: true output tokens times an error of its own."""
        noise = Noise(law="noise", sigma=self.sigma)
        rule = Batcher("predicted", admission="optimistic", predictor=noise)
        return Plan(self.name, batcher=rule, figures={"sigma": self.sigma})


@dataclass(frozen=True)
class VllmPriority:
    """vLLM's priority scheduling with the predicted output for a priority: fewest first; the last by priority and
    arrival is preempted when memory runs out.

    Source: `--scheduling-policy priority` of vLLM, vllm/v1/core/sched/scheduler.py, which takes priorities from the
    client; that a client sends predicted lengths is ours. Predictions are the scenario's.
    """

    name: str = "vllm-priority"

    def plan(self, scenario: Scenario) -> Plan:
        """Key: predicted output tokens; victims: the last by key."""
        return Plan(self.name, batcher=Batcher("predicted", admission="optimistic", victims="last"))


@dataclass(frozen=True)
class AlphaGreedy:
    """First come, first served, a part `alpha` of the memory kept free; when memory runs out everybody starts over.

    Source: alpha-protection greedy scheduling, a baseline of Jaillet et al., arXiv 2502.07115, with alpha = 0.3 among
    its settings; that all running requests are cleared is a detail that we could not confirm in the paper.
    """

    alpha: float = 0.3
    name: str = "alpha-greedy"

    def plan(self, scenario: Scenario) -> Plan:
        """Order of arrival, protected memory, all are victims."""
        rule = Batcher(admission="optimistic", overflow="restart", victims="all", protected=self.alpha)
        return Plan(self.name, batcher=rule, figures={"alpha": self.alpha})


@dataclass(frozen=True)
class AlphaBeta:
    """As alpha-greedy, but when memory runs out each running request starts over with probability `beta`.

    Source: alpha-protection beta-clearing, a baseline of Jaillet et al., arXiv 2502.07115, with (alpha, beta) =
    (0.2, 0.2) among its settings; that each request draws for itself is a detail that we could not confirm.
    """

    alpha: float = 0.2
    beta: float = 0.2
    name: str = "alpha-beta"

    def plan(self, scenario: Scenario) -> Plan:
        """Order of arrival, protected memory, each is a victim with probability beta."""
        rule = Batcher(
            admission="optimistic", overflow="restart", victims="each", clearing=self.beta, protected=self.alpha
        )
        return Plan(self.name, batcher=rule, figures={"alpha": self.alpha, "beta": self.beta})


@dataclass(frozen=True)
class MultiLevelFeedback:
    """A multi-level feedback queue: whoever has produced more tokens gives way to whoever has produced fewer.

    A request sinks by a level at q, 3 q, 7 q, ... output tokens, quanta that double from q = a quarter of the mean
    output, over `levels` levels. Output lengths are not used. Whoever gives way keeps its tokens: they are computed
    again, or parked where the pool swaps.

    Source: Corbato, Merwin-Daggett, Daley, "An experimental time-sharing system" (1962); for LLM serving FastServe, Wu
    et al., arXiv 2305.05920, whose skip-join by prompt length is left out.
    """

    levels: int = 5
    name: str = "mlfq"

    def plan(self, scenario: Scenario) -> Plan:
        """Levels from the mean output.

        Raises
        ------
        PolicyError
            If a pool restarts whoever loses memory, with which long requests never finish.
        """
        for pool in scenario.pools:
            if pool.preemption == "restart":
                raise PolicyError(
                    f"policy {self.name!r}: pool {pool.name!r} throws the tokens of a preempted request away, so that "
                    'long ones never finish; set preemption = "recompute" or "swap"'
                )
        edges = quanta(scenario, self.levels)
        rule = Batcher(admission="optimistic", levels=edges)
        return Plan(self.name, batcher=rule, figures={"levels": list(edges)})


@dataclass(frozen=True)
class Sarathi:
    """Every step decodes all that run, then spends the rest of the token budget on prefill, in chunks.

    The order of vLLM V1, so that it equals `fifo` under the step that most pools describe.

    Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv 2403.02310.
    Work-conserving in the sense of Dai, Deng, Li, Peng, arXiv 2504.07347, theorem 2: stable whenever any rule is, if
    memory never binds, steps of b tokens take c + a ceil(b / b0) s, and one replica serves all.
    """

    name: str = "sarathi"

    def plan(self, scenario: Scenario) -> Plan:
        """Decodes first."""
        return Plan(self.name, batcher=Batcher(mixing="decode-first"))


@dataclass(frozen=True)
class Orca:
    """Every step prefills first, then decodes with what is left of the token budget.

    Source: Yu et al., "Orca", OSDI 2022, as Dai, Deng, Li, Peng model it, arXiv 2504.07347; work-conserving, hence as
    stable as Sarathi by theorem 2 there, where that holds.
    """

    name: str = "orca"

    def plan(self, scenario: Scenario) -> Plan:
        """Prefills first, mixed with decodes."""
        return Plan(self.name, batcher=Batcher(mixing="prefill-first"))


@dataclass(frozen=True)
class VllmV0:
    """A step prefills whole prompts alone if anybody can be admitted, else it decodes.

    Source: the scheduler of vLLM before chunked prefill (V0), as Dai, Deng, Li, Peng model it, arXiv 2504.07347; it is
    not work-conserving and can be unstable where others are not. A prompt above the token budget never starts.
    """

    name: str = "vllm-v0"

    def plan(self, scenario: Scenario) -> Plan:
        """Prefills alone."""
        return Plan(self.name, batcher=Batcher(mixing="prefill-only"))


@dataclass(frozen=True)
class FasterTransformer:
    """A batch decodes to its end before the next one is admitted.

    Source: request-level batching of NVIDIA FasterTransformer, as Dai, Deng, Li, Peng model it, arXiv 2504.07347; it is
    not work-conserving and can be unstable where others are not. A prompt above the token budget never starts.
    """

    name: str = "faster-transformer"

    def plan(self, scenario: Scenario) -> Plan:
        """Decodes alone."""
        return Plan(self.name, batcher=Batcher(mixing="decode-only"))


def prompt_tokens(candidates: Candidates) -> Floats:
    """Prompt tokens of each request, shape (n,)."""
    return candidates.prompt.astype(float)


def quanta(scenario: Scenario, levels: int) -> tuple[int, ...]:
    """Output tokens at which a request sinks: q, 3 q, 7 q, ... with q a quarter of the mean output, at least 1."""
    shares = scenario.workload.rates / scenario.workload.total_rate
    mean = float(shares @ np.array([cls.mean_output for cls in scenario.workload.classes]))
    first = max(int(mean / 4), 1)
    return tuple(first * (2**k - 1) for k in range(1, levels))


POLICIES: tuple[Policy, ...] = (
    Fifo(),
    FifoLookahead(),
    ShortestPrompt(),
    ShortestOutput(),
    ShortestOutputNoisy(),
    VllmPriority(),
    AlphaGreedy(),
    AlphaBeta(),
    MultiLevelFeedback(),
    Sarathi(),
    Orca(),
    VllmV0(),
    FasterTransformer(),
)
