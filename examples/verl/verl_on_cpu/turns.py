"""Two trainings in turns, one step of each at a time, so that a machine that is busy for a while slows both.

The rollout server of each marks the end of a step by a file, and takes new weights only when it is its turn: a training whose
weights are on their way has done its step and cannot begin the next. What verl times inside of a step is not touched, but for
`timing_s/update_weights`, which holds the time of waiting.
"""

import asyncio
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "VERL_ON_CPU_TURNS"
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Turns:
    """The part of one of the two trainings.

    Attributes:
        folder: an empty folder that both write to.
        own, other: names of the two trainings.
        is_first: whether this one makes the first step of each pair.
        steps: how many each of them makes.
    """

    folder: str
    own: str
    other: str
    is_first: bool
    steps: int

    @classmethod
    def of_this_process(cls) -> "Turns | None":
        """What `environment` has said to this process; None where no other training runs."""
        return cls(**json.loads(os.environ[VARIABLE])) if VARIABLE in os.environ else None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which the processes of the training know."""
        return {VARIABLE: json.dumps(asdict(self))}

    def mark(self, name: str, step: int) -> Path:
        """The file that says that training `name` has ended `step`, or its set-up at 0."""
        return Path(self.folder) / f"{name}-{step}"

    async def end_step(self, step: int) -> None:
        """Say that this training has ended `step`, and return when it may go on."""
        self.mark(self.own, step).touch()
        awaited = step if self.is_first else step + 1
        while awaited <= self.steps and not self.mark(self.other, awaited).exists():
            await asyncio.sleep(POLL_SECONDS)
