"""Where policies are found by name, bundled or a user's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from llmopt.errors import PolicyError
from llmopt.policy import Policy

PACKAGES = ("formulations", "baselines")


@cache
def _bundled() -> dict[str, Policy]:
    """Policies of the two packages by name, formulations first."""
    found: dict[str, Policy] = {}
    for package in PACKAGES:
        for policy in chain.from_iterable(_load(package).POLICIES.values()):
            if policy.name in found:
                raise PolicyError(f"two policies are named {policy.name!r}, one in {package}; rename one of them")
            found[policy.name] = policy
    return found


def policy_names(problem: str | None = None) -> tuple[str, ...]:
    """Names of the bundled policies, or of those for one `problem`, optimized ones first."""
    if problem is None:
        return tuple(_bundled())
    groups = [_load(package).POLICIES.get(problem, ()) for package in PACKAGES]
    return tuple(policy.name for policy in chain.from_iterable(groups))


def get_policy(name: str) -> Policy:
    """A policy by its name, or a user's own by ``module:attribute`` or ``path/to/file.py:attribute``.

    The module may lie in the current folder. The attribute is a policy, or a class or function that returns one
    when called without arguments.

    Raises
    ------
    PolicyError
        If there is no such policy, with near names; or if the user's module cannot be loaded, with the reason.
    """
    if ":" in name:
        return _own(name)
    bundled = _bundled()
    if name in bundled:
        return bundled[name]
    near = difflib.get_close_matches(name, bundled, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}" if near else f"choose one of {', '.join(bundled)}"
    raise PolicyError(f"no policy is named {name!r}; {hint}, or reach your own by module:attribute")


def _own(name: str) -> Policy:
    """The policy behind ``module:attribute``."""
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise PolicyError(f"{name!r} names no policy; write it like mymodule:mypolicy or path/to/file.py:mypolicy")
    module = _load(where)
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1) or names[-1:]
        raise PolicyError(f"{where!r} has no attribute {attribute!r}; it has {', '.join(near) or 'none'}")
    target = getattr(module, attribute)
    makes = isinstance(target, type) or (callable(target) and not hasattr(target, "plan"))
    policy = _made(target, name) if makes else target
    if not isinstance(policy, Policy):
        raise PolicyError(f"{name!r} is of type {type(policy).__name__}; a policy has a name and plan(scenario)")
    return policy


def _made(factory: Any, name: str) -> Any:
    """What a class or function without arguments returns."""
    try:
        return factory()
    except Exception as error:
        raise PolicyError(f"{name!r} cannot be made without arguments: {short_error(error)}; give defaults") from error


def _load(where: str) -> ModuleType:
    """Import a module by name or file; the current folder is searched as `python -m` does."""
    try:
        return _from_file(Path(where)) if where.endswith(".py") else _from_path(where)
    except PolicyError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{where}.".startswith(f"{error.name}."):
            raise PolicyError(f"no module {where!r} in this folder or on the Python path; check its name") from error
        raise PolicyError(f"policy module {where!r} cannot be imported: {short_error(error)}; install it") from error
    except Exception as error:
        raise PolicyError(f"policy module {where!r} raised {short_error(error)}; fix it and try again") from error


def _from_path(where: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(where)


def _from_file(path: Path) -> ModuleType:
    """Run a file as a module under a name of its own, so that it hides no other module."""
    name = f"_policies_in_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise PolicyError(f"there is no Python file {str(path)!r}; check the path before the ':'")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def short_error(error: BaseException) -> str:
    """Kind and first line of an error."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
