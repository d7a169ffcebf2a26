"""Cases in which a stock and a shared engine of verl are compared, their rows, and the batches that verl makes of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tests.integrations.verl.vision import rows as vision


@dataclass
class Case:
    """One comparison. Options are those of verl that have the same name."""

    model: str = "qwen3"
    lora: bool = False
    tied: bool = False
    remove_padding: bool = True
    dynamic: bool = True
    fused: bool = False
    checkpointing: bool = False
    v0: bool = False
    sequence_parallel: int = 1
    temperature: float | list[float] = 0.7
    rows_per_group: int = 4
    groups: int = 3
    members: list[int] = field(default_factory=list)  # rows of each group, dealt group by group, in place of those two
    prompt_tokens: int = 9  # of the first group, those of each other group are 7 longer than the last
    token_budget: int = 100_000
    micro_batch_size: int = 8
    loss_mode: str = "vanilla"
    policy_loss: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    sum_pi_squared: bool = False
    without_prompts: bool = False
    dropout: float = 0.0
    wrong_positions: bool = False  # of packed rows, as in a model that somebody has patched
    own_class: str = ""  # a model class that no test has compared, see `Leak`
    images: str = ""
    alone: bool = False  # the stock engine gets each row in a micro-batch of its own
    actor: dict[str, Any] = field(default_factory=dict)  # more of the actor's config, by which its loss is computed
    saves_to_cpu: bool = False  # weights, as trainers with separate rollouts do
    log_probs_first: bool = False  # a log-prob pass comes before the update, as in training
    ordinary_on_rank: int = -1  # whose rows cannot be shared, as each says its own temperature
    forks: bool = False  # responses of a group fork late, and one row goes on where another ended, as in agent loops
    log_prob_rows: int = 0  # of a micro-batch in a log-prob pass, which another update follows
    critic: bool = False
    distillation: str = ""  # by the teacher's top-k tokens: "alone", or "and rewards"
    flash: bool = False  # attention; critics have no other in verl
    own_loss: bool = False  # of a critic: it reads the value at the last token of each row, which verl's own does not

    def __str__(self) -> str:
        changed = {k: v for k, v in asdict(self).items() if v != getattr(type(self)(), k)}
        return "-".join(f"{k}={v}" for k, v in changed.items()) or "default"


def make_rows(case: Case) -> list[dict[str, Any]]:
    """Rows of a training batch, in an order that scatters every group."""
    import torch

    torch.manual_seed(1)
    rows: list[dict[str, Any]] = []
    for group, members in enumerate(case.members or [case.rows_per_group] * case.groups):
        prompt = torch.randint(4, 250, (case.prompt_tokens + 7 * group,))
        for member in range(members):
            length = int(torch.randint(1, 9, ()))
            rows.append(
                {
                    "uid": f"g{group}",
                    "prompt": prompt,
                    "response": torch.randint(4, 250, (length,)),
                    "mask": torch.ones(length, dtype=torch.long),
                    "old": -5.5 + 0.3 * torch.randn(length),
                    "ref": -5.5 + 0.3 * torch.randn(length),
                    "advantage": torch.randn(()) * torch.ones(length),
                    "order": group if case.members else member * case.groups + group,
                }
            )
    if case.images:
        vision.add_images(case.model, case.images, rows)
    if case.forks:
        fork(rows, case.rows_per_group)
    for row in rows:
        row.setdefault("positions", torch.arange(len(row["prompt"]) + len(row["response"])))
    return sorted(rows, key=lambda row: row["order"])


def fork(rows: list[dict[str, Any]], members: int) -> None:
    """Let the responses of each group begin alike, half of them for longer, and the last row's prompt be another's all."""
    import torch

    for start in range(0, len(rows), members):
        first, *others = rows[start : start + members]
        turn, more = torch.randint(4, 250, (6,)), torch.randint(4, 250, (5,))
        for i, row in enumerate([first, *others]):
            begins = torch.cat([turn, more]) if i % 2 else turn
            row["response"] = torch.cat([begins, row["response"]])
        last = others[-1]
        last["prompt"] = torch.cat([first["prompt"], first["response"], torch.randint(4, 250, (4,))])
        for row in rows[start : start + members]:
            length = len(row["response"])
            row["mask"] = (torch.rand(length) < 0.8).long().index_fill(0, torch.tensor([0, length - 1]), 1)
            row["old"], row["ref"] = (-5.5 + 0.3 * torch.randn(length) for _ in range(2))
            row["advantage"] = row["advantage"][0] * torch.ones(length)


def make_batch(case: Case, rows: list[dict[str, Any]], global_rows: int) -> Any:
    """``rows`` as verl's trainer hands them to an engine."""
    import torch
    from verl.utils import tensordict_utils as tu

    def nested(name: Any) -> Any:
        return torch.nested.as_nested_tensor([name(row) for row in rows], layout=torch.jagged)

    tensors = {
        "input_ids": nested(lambda r: torch.cat([r["prompt"], r["response"]])),
        "position_ids": nested(lambda r: r["positions"]),
        "prompts": nested(lambda r: r["prompt"]),
        "responses": nested(lambda r: r["response"]),
        "response_mask": nested(lambda r: r["mask"]),
        "loss_mask": nested(lambda r: r["mask"]),
        "old_log_probs": nested(lambda r: r["old"]),
        "ref_log_prob": nested(lambda r: r["ref"]),
        "advantages": nested(lambda r: r["advantage"]),
        "values": nested(lambda r: r["old"]),  # which a critic's loss reads
        "returns": nested(lambda r: r["ref"]),
    }
    settings: dict[str, Any] = {"temperature": case.temperature}
    if isinstance(case.temperature, list):  # one for each row, in turns
        tensors["temperature"] = torch.tensor((case.temperature * len(rows))[: len(rows)])
        settings = {}
    if case.v0:
        tensors |= padded_as_in_v0(rows)
    if case.distillation:
        generator = torch.Generator().manual_seed(3)
        lengths = [len(row["positions"]) for row in rows]
        teacher = [torch.randn(n, 256, generator=generator).log_softmax(-1).topk(8) for n in lengths]
        tensors["teacher_logprobs"], tensors["teacher_ids"] = (
            torch.nested.as_nested_tensor(list(of_rows), layout=torch.jagged) for of_rows in zip(*teacher, strict=True)
        )
        settings |= {"distillation_use_topk": True, "distillation_only": case.distillation == "alone"}
    if case.images:
        tensors["multi_modal_inputs"] = [row["inputs"] for row in rows]
    batch = tu.get_tensordict(
        tensors | {"uid": [row["uid"] for row in rows]},
        non_tensor_dict=settings
        | {
            "calculate_entropy": True,
            "calculate_sum_pi_squared": case.sum_pi_squared,
            "use_remove_padding": case.remove_padding,
            "use_fused_kernels": case.fused,
            "use_dynamic_bsz": case.dynamic,
            "max_token_len_per_gpu": case.token_budget,
            "micro_batch_size_per_gpu": case.micro_batch_size,
            "global_batch_size": global_rows,
        },
    )
    tu.maybe_fix_3d_position_ids(batch)  # as verl's engines begin
    return batch


def with_positions_by_row(batch: Any, rows: list[dict[str, Any]]) -> Any:
    """``batch``, which verl itself can select rows of if they are all of one length, too."""
    from verl.utils import tensordict_utils as tu

    batch["position_ids"] = tu.nested_tensor_from_tensor_list([row["positions"] for row in rows])
    return batch


def padded_as_in_v0(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """verl's V0 trainer leaves everything but the model's inputs padded, prompts on the left."""
    import torch
    from torch.nn.functional import pad

    width, length = (max(len(row[name]) for row in rows) for name in ("prompt", "response"))

    def left(x: Any) -> Any:
        return pad(x, (width - len(x), 0))

    def right(x: Any) -> Any:
        return pad(x, (0, length - len(x)))

    mask = [torch.cat([left(torch.ones_like(r["prompt"])), right(torch.ones_like(r["response"]))]) for r in rows]
    names = {"response_mask": "mask", "loss_mask": "mask", "old_log_probs": "old", "ref_log_prob": "ref"}
    names |= {"values": "old", "returns": "ref"}
    names |= {"advantages": "advantage", "responses": "response"}
    padded = {key: torch.stack([right(r[name]) for r in rows]) for key, name in names.items()}
    return padded | {"prompts": torch.stack([left(r["prompt"]) for r in rows]), "attention_mask": torch.stack(mask)}
