"""verl's replay buffer, asked more often: `trainer.v1.sampler.custom_sampler`.

The trainer asks it every two seconds whether all responses are there. A tiny model has them in half a second.
"""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class QuickReplayBuffer(ReplayBuffer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, poll_interval=0.1)
