"""The policies that `aif evaluate` compares, by name.

base            what the run samples from (policy.model)
sft  ppo        trained in the run; 2/ppo: in its second iteration
best-of-4       the response that the reward model prefers, of 4 of the model PPO started from
reference       the responses in the file of the prompts
runs/other:ppo  a policy of another run
...             any model, as `aif respond --policy` takes it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from aif.config.settings import load_settings
from aif.errors import InputError, shown
from aif.run import Run
from aif.store.checkpoint import sealed

NAMES = "base, sft, ppo, 2/ppo, best-of-4, reference, runs/other:ppo or a model"
REFERENCE = "reference"
BEST_OF = "best-of-4"  # a default policy if the run has a reward model
_TRAINED = r"(?:\d+/)?(?:sft|ppo)"
_BEST_OF = re.compile(r"best-of-(\d+)")
_OF_ANOTHER = re.compile(rf"(.+):(base|{_TRAINED})")
MOST = 1000  # responses per prompt


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy to compare."""

    name: str
    model: str  # as `aif respond --policy` takes it; for `reference` the file
    best_of: int = 1

    @property
    def is_local(self) -> bool:
        """Whether the model runs in this process, so that its probabilities can be read."""
        return self.name != REFERENCE and ":" not in self.model


def chosen(run: Run) -> tuple[list[Policy], Policy]:
    """(the policies to compare, the policy that the others play against). Raises InputError for an
    unknown name or a missing policy."""
    settings = run.settings.evaluate
    against = settings.against or ("sft" if _is_trained(run.file("sft")) else "base")
    names = settings.policies or _every(run)
    names = names if against in names else [against, *names]
    policies = [named(run, name) for name in dict.fromkeys(names)]
    return policies, next(policy for policy in policies if policy.name == against)


def start_of(run: Run) -> str:
    """The model that PPO started from, or would start from."""
    tuned = run.file("sft")
    default = str(tuned) if _is_trained(tuned) else run.settings.policy.weights
    return run.state("ppo").get("from") or run.settings.ppo.model or default


def named(run: Run, name: str) -> Policy:
    """The policy of that name."""
    if name == "base":
        return Policy(name, run.settings.policy.model)
    if name == REFERENCE:
        if not run.settings.evaluate.prompts:
            raise _wrong(f"{name}, without a file", "--prompts FILE, whose responses it is")
        return Policy(name, run.settings.evaluate.prompts)
    if re.fullmatch(_TRAINED, name):
        return Policy(name, _trained(run.path, name))
    if match := _BEST_OF.fullmatch(name):
        if not 2 <= int(match[1]) <= MOST:
            raise _wrong(name, f"best-of-2 to best-of-{MOST}")
        if not _is_trained(run.file("reward")):
            raise _wrong(f"{name}, without {run.path}/reward", "`aif reward` before it")
        return Policy(name, start_of(run), int(match[1]))
    if match := _OF_ANOTHER.fullmatch(name):
        folder = Path(match[1])
        if folder.is_dir() and match[2] == "base":
            return Policy(name, load_settings(folder / "run.toml", {}).policy.model)
        if folder.is_dir():
            return Policy(name, _trained(folder, match[2]))
        if match[1] not in ("openai", "openai-batch", "scripted", "vllm"):
            raise _wrong(name, f"a run folder before the colon, and {shown(match[1])} is none")
    return Policy(name, name)


def _every(run: Run) -> list[str]:
    """All policies of the run, in the order of training."""
    turns = {int(path.parent.name): path for path in run.path.glob("[0-9]*/ppo")
             if path.parent.name.isdigit() and _is_trained(path)}  # fmt: skip
    names = ["base", "sft"] if _is_trained(run.file("sft")) else ["base"]
    names += [BEST_OF] if _is_trained(run.file("reward")) else []
    names += ["ppo"] if _is_trained(run.file("ppo")) else []
    return names + [f"{turns[number].parent.name}/ppo" for number in sorted(turns)]


def _trained(folder: Path, name: str) -> str:
    if not _is_trained(folder / name):
        stage = name.rpartition("/")[2]
        raise _wrong(
            f"{folder / name}, which is not there or not complete", f"`aif {stage}` before it"
        )
    return str(folder / name)


def _is_trained(folder: Path) -> bool:
    return sealed(folder) is not None


def _wrong(got: str, expected: str) -> InputError:
    return InputError("evaluate", "policies", got=got, expected=expected)
