"""The algorithms of TRL whose trainers share rows, and where TRL keeps their classes. Imports nothing, for the launcher."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """
    Attributes:
        homes: modules of TRL that hold its classes, the newest first, without ``_trainer`` or ``_config`` at their end.
        rows_in_common: which rows of a micro-batch begin alike.
        samples: whether the trainer samples several completions of each prompt.
    """

    homes: tuple[str, ...]
    rows_in_common: str
    samples: bool = False


_PAIR = "the chosen and the rejected completion of a prompt share it"
_SAMPLED = "completions sampled from one prompt share it"

ALGORITHMS = {
    "DPO": Algorithm(("trl.trainer.dpo",), _PAIR),
    "KTO": Algorithm(
        ("trl.trainer.kto", "trl.experimental.kto.kto"),
        "completions of one prompt, and what they are compared with for the KL term, share it",
    ),
    "Reward": Algorithm(("trl.trainer.reward",), _PAIR),
    "ORPO": Algorithm(("trl.experimental.orpo.orpo",), _PAIR),
    "CPO": Algorithm(("trl.experimental.cpo.cpo",), _PAIR),
    "TPO": Algorithm(
        ("trl.experimental.tpo.tpo",), "the chosen, the rejected and the reference completion of a prompt share it"
    ),
    "OnlineDPO": Algorithm(("trl.experimental.online_dpo.online_dpo",), _SAMPLED, samples=True),
    "SDPO": Algorithm(("trl.experimental.sdpo.sdpo",), _SAMPLED, samples=True),
    "SDFT": Algorithm(("trl.experimental.sdft.sdft",), _SAMPLED, samples=True),
}
# Trainers that forward one completion of each prompt, by their modules. GKD, GOLD and MiniLLM are made of the first.
NOTHING_TO_SHARE = {
    "trl.trainer.sft_trainer": "SFTTrainer",
    "trl.trainer.distillation_trainer": "DistillationTrainer",
}


def modules_of(algorithm: str, kind: str) -> list[str]:
    """Modules of TRL that may hold its ``"Trainer"`` or its ``"Config"``."""
    return [f"{home}_{kind.lower()}" for home in ALGORITHMS[algorithm].homes]
