"""Small scenarios with round numbers, for tests that need one and do not care which."""

from __future__ import annotations

from typing import Any

from llmopt.scenario import Scenario

CONSTANT_STEP = ({"name": "step", "base": 0.01},)
TWO_PIECES: tuple[dict[str, Any], ...] = (
    {"name": "memory", "base": 0.01, "kv": 2e-8, "decode": 2e-5, "prefill": 1e-6},
    {"name": "compute", "base": 0.002, "prefill": 6e-5, "decode": 6e-5},
)


def pool(name: str = "only", replicas: int = 1, **settings: Any) -> dict[str, Any]:
    """A pool whose steps last 10 ms whatever they hold, with 64 sequences at most and memory for all of them."""
    basics = {"step_time": CONSTANT_STEP, "kv_capacity": 64_000, "max_batch": 64, "token_budget": 4096, "price": 2.0}
    return {"name": name, "replicas": replicas, **basics, **settings}


def request_class(name: str = "chat", prompt: int = 100, output: int = 101, **settings: Any) -> dict[str, Any]:
    """Constant lengths: with the defaults 101 steps, one of them prefill."""
    constant = ({"law": "constant", "value": n} for n in (prompt, output))
    share = {} if "rate" in settings else {"share": 1.0}
    return {"name": name, **share, **dict(zip(("prompt", "output"), constant, strict=True)), **settings}


def scenario(pools: list[dict[str, Any]], classes: list[dict[str, Any]] | None = None, **settings: Any) -> Scenario:
    """A scenario of these parts; `rate`, `arrivals`, `horizon` and `seeds` go where they belong."""
    workload: dict[str, Any] = {"arrivals": settings.pop("arrivals", {"law": "poisson"})}
    evaluation = {key: settings.pop(key) for key in ("horizon", "warmup", "seeds") if key in settings}
    workload["classes"] = classes or [request_class()]
    if "share" in workload["classes"][0]:
        workload["rate"] = settings.pop("rate", 10.0)
    return Scenario.model_validate(
        {"name": "t", "workload": workload, "pools": pools, "evaluation": evaluation, **settings}
    )


def slower(factor: float) -> list[dict[str, Any]]:
    """`TWO_PIECES` with every coefficient times `factor`."""
    return [{k: v if isinstance(v, str) else v * factor for k, v in piece.items()} for piece in TWO_PIECES]


def unlike_pools(rate: float = 20.0, **settings: Any) -> Scenario:
    """Two classes, short and long, on three pools of unlike speed and memory."""
    speeds = {"fast": (1, 0.5, 200_000), "middle": (2, 1.0, 100_000), "slow": (2, 2.5, 30_000)}
    pools = [pool(name, n, step_time=slower(s), kv_capacity=kv) for name, (n, s, kv) in speeds.items()]
    laws = {"short": (0.75, 400, 200, 4000), "long": (0.25, 3000, 150, 12_000)}
    classes = [
        {
            "name": name,
            "share": share,
            "prompt": {"law": "lognormal", "mean": float(prompt), "cv": 1.0, "max": most},
            "output": {"law": "lognormal", "mean": float(output), "cv": 0.8, "max": 1000},
        }
        for name, (share, prompt, output, most) in laws.items()
    ]
    return scenario(pools, classes, rate=rate, **settings)
