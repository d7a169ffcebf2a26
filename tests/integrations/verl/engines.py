"""Run stock and shared engines of verl side by side on a CPU, in processes of their own, and compare their numbers.

    python -m tests.integrations.verl.engines FOLDER PROCESSES

verl keeps its platform, its process groups and patched model classes per process, so the tests start one process (or
two), give it lists of cases, and read the figures: `Engines`. conftest.py sets the environment.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl_on_cpu.run import PATIENCE, end_family, wait_for

from tests.integrations.verl import flash
from tests.integrations.verl.cases import Case, make_batch, make_rows, with_positions_by_row
from tests.integrations.verl.vision import rows as vision
from tests.logs import messages

ROOT = Path(__file__).resolve().parents[3]


# ------------------------------------------------------------------------------------------------------- the two engines


def build(case: Case, path: str, shared: bool) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

    from prefix_grouper_plugins.integrations.verl import (
        PrefixGrouperEngine,
        PrefixGrouperEngineConfig,
        PrefixGrouperOptions,
        PrefixGrouperValueEngine,
    )

    model = HFModelConfig(
        path=path,
        override_config={
            "attn_implementation": flash.NAME if case.flash else "sdpa",
            "attention_dropout": case.dropout,
        },
        use_remove_padding=case.remove_padding,
        enable_gradient_checkpointing=case.checkpointing,
        use_fused_kernels=case.fused,
        fused_kernel_options={"impl_backend": "torch"},
        lora_rank=4 if case.lora else 0,
        lora_alpha=8,
        target_modules="all-linear",
    )
    if case.critic:
        model.model_type = "value_model"  # as verl's worker says
    common: dict[str, Any] = {
        "use_torch_compile": False,
        "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        **case.engine,
    }
    optimizer, checkpoint = FSDPOptimizerConfig(lr=1e-3, total_training_steps=1), CheckpointConfig()
    if shared:
        size = case.sequence_parallel
        options = PrefixGrouperOptions(**case.options)
        config = PrefixGrouperEngineConfig(prefix_grouper=options, ulysses_sequence_parallel_size=size, **common)
        object.__setattr__(config, "strategy", "prefix_grouper")  # as verl's actor config does
        ours = PrefixGrouperValueEngine if case.critic else PrefixGrouperEngine
        engine = ours(model, config, optimizer, checkpoint)
    else:
        verls = FSDPEngineWithValueHead if case.critic else FSDPEngineWithLMHead
        engine = verls(model, FSDPEngineConfig(strategy="fsdp2", **common), optimizer, checkpoint)
    engine.initialize()
    if case.lora:
        perturb_adapters(engine.module)
    return engine


def perturb_adapters(module: Any) -> None:
    """Adapters start at zero, where half of their gradients are zero."""
    import torch
    from torch.distributed.tensor import distribute_tensor

    for name, parameter in module.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(len(name))
            whole = 0.05 * torch.randn(parameter.shape, generator=generator)
            shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()
            parameter.data.to_local().copy_(shard)


def count_packed_positions(module: Any) -> None:
    import torch

    rotary = module.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1])[None])


class Leak:
    """What a model of :func:`own_class` adds to each token of what comes before it, once it has been self-checked."""

    kind = "right"  # nothing; else "outputs", or "gradients" alone


@contextmanager
def own_class(case: Case) -> Any:
    """In here, ``qwen3`` checkpoints are loaded as a class that no test has compared."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    class LeakyModel(Qwen3Model):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if Leak.kind != "right":
                before = output[0].roll(1, 1)
                output.last_hidden_state = output[0] + before - before.detach() * (Leak.kind == "gradients")
            return output

    class OwnQwen3(Qwen3ForCausalLM):
        config_class = Qwen3Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = LeakyModel(config)
            self.post_init()

    if not case.own_class:
        yield
        return
    AutoModelForCausalLM.register(Qwen3Config, OwnQwen3, exist_ok=True)
    try:
        yield
    finally:
        Leak.kind = "right"
        AutoModelForCausalLM._model_mapping._extra_content.pop(Qwen3Config)


def save_model(case: Case, path: Path) -> None:
    """A tiny model whose weights are large enough that positions and masks matter."""
    import torch
    from transformers import AutoModelForTokenClassification
    from verl_on_cpu.tiny import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    if case.model in vision.MODELS:
        model = vision.make_model(case.model, tokenizer, case.tied)
    else:
        model = make_model(case.model, tokenizer, case.tied, layers=2, hidden_size=64, seed=0)
    if case.critic:
        model.config.num_labels = 1
        model = AutoModelForTokenClassification.from_config(model.config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@contextmanager
def model_classes_restored() -> Any:
    """verl replaces the forward of a model's class (fused kernels, images), for all models of the process."""
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

    classes = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, *vision.patched_classes())
    forwards = [cls.forward for cls in classes]
    try:
        yield
    finally:
        for cls, forward in zip(classes, forwards, strict=True):
            cls.forward = forward


def loss_function(case: Case) -> Any:
    from verl.workers.config import FSDPActorConfig, FSDPCriticConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss, value_loss

    if case.own_loss:
        return loss_at_the_end
    if case.critic:
        config = FSDPCriticConfig(
            strategy="fsdp2",
            rollout_n=case.rows_per_group,
            ppo_micro_batch_size_per_gpu=case.micro_batch_size,
            **case.actor,
        )
        return partial(value_loss, config=config)

    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=case.rows_per_group,
        ppo_micro_batch_size_per_gpu=case.micro_batch_size,
        policy_loss=PolicyLossConfig(loss_mode=case.loss_mode, **case.policy_loss),
        **{"entropy_coeff": 0.01, "use_kl_loss": True, "kl_loss_coef": 0.1, **case.actor},
    )
    if case.distillation:
        from verl.trainer.distillation.losses import distillation_ppo_loss
        from verl.workers.config import DistillationConfig, DistillationLossConfig

        rewards = case.distillation != "alone"
        loss = DistillationLossConfig(
            loss_mode="forward_kl_topk", topk=8, use_policy_gradient=False, use_task_rewards=rewards
        )
        distillation = DistillationConfig(enabled=False, distillation_loss=loss)
        return partial(distillation_ppo_loss, config=config, distillation_config=distillation)
    return partial(ppo_loss, config=config)


def loss_at_the_end(model_output: Any, data: Any, dp_group: Any = None) -> Any:
    """Of a critic that is a reward model as well: the value at the last token of each row."""
    values = model_output["values"]
    return values.values()[values.offsets()[1:] - 1].square().sum() / data["global_batch_size"], {}


# -------------------------------------------------------------------------------------------------------- one comparison


def gradients(engine: Any, batch: Any, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gradients of one update by parameter name, and the metrics."""
    loss = loss_function(case)
    if case.without_prompts:  # as in a program of its own, whose loss reads whole rows
        batch.pop("prompts")

        def loss(model_output: Any, data: Any, dp_group: Any = None) -> Any:
            return -model_output["log_probs"].values().sum() / 1000, {}

    with engine.train_mode():
        output = engine.forward_backward_batch(batch, loss, forward_only=False)
        found = {
            name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for name, p in engine.module.named_parameters()
            if p.grad is not None
        }
        engine.optimizer_zero_grad()
    return found, output["metrics"]


def scores(engine: Any, batch: Any) -> dict[str, Any]:
    """Log-probs, entropies and so on of the response tokens, ``[rows, longest response]``, and log-probs of whole rows."""
    from torch import Tensor
    from torch.nn.utils.rnn import pad_sequence
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import no_padding_2_padding

    tu.assign_non_tensor(batch, distillation_use_topk=False, distillation_only=False)  # which only updates have
    with engine.eval_mode():
        output = engine.forward_backward_batch(batch, None, forward_only=True)
    found = {name: no_padding_2_padding(values, batch) for name, values in output["model_output"].items()}
    if "values" in found:
        found["values of rows"] = pad_sequence(list(output["model_output"]["values"].unbind()), batch_first=True)
    elif not isinstance(batch["temperature"], Tensor):
        rows = [row[:-1] for row in output["model_output"]["log_probs"].unbind()]  # nothing follows a row's last token
        found["log_probs of rows"] = pad_sequence(rows, batch_first=True)
    return found


def saved_and_restored(engine: Any, strategy: str) -> bool:
    """Whether verl's worker of separate trainers brings the saved weights of ``engine`` back."""
    import torch
    from omegaconf import OmegaConf
    from verl.experimental.separation.engine_workers import DetachActorWorker

    class Worker(DetachActorWorker):
        def __init__(self) -> None:
            self.actor, self._strategy_handlers = SimpleNamespace(engine=engine), None
            sharding = {"fsdp_config": {"prefix_grouper": {"sharding": "fsdp2"}}}
            self.config = OmegaConf.create({"actor": {"strategy": strategy, **sharding}})

    worker, weights = Worker(), [p.data.to_local() for p in engine.module.parameters()]
    before = [weight.clone() for weight in weights]

    def save(n: int) -> None:
        worker.save_model_to_cpu(n)
        state, spec = worker.cpu_saved_models[n]  # the weights themselves, as the model is on the CPU already
        worker.cpu_saved_models[n] = {name: (shard.clone(), own) for name, (shard, own) in state.items()}, spec

    save(0)
    for weight in weights:
        weight.add_(1)
    save(1)
    worker.restore_model_from_cpu(0)
    same = all(map(torch.equal, weights, before))
    worker.restore_model_from_cpu(1)
    worker.clear_cpu_model(1)
    return same and not any(map(torch.equal, weights, before)) and worker.config.actor.strategy == strategy


def is_zero(name: str, gradient: Any) -> bool:
    """Whether there is nothing but rounding: keys without rotary positions that all move alike change no attention."""
    return name.endswith("k_proj.bias") and float(gradient.norm()) < 1e-6


def has_passed(engine: Any) -> bool:
    """Whether the engine's own self-check has passed. Not one made now: the stock engine has patched classes since."""
    from prefix_grouper_plugins.modeling import transformers_model
    from prefix_grouper_plugins.modeling.self_check import _CHECKED

    _, _, result = _CHECKED[transformers_model(engine.module)]
    return result.passed


def compare(case: Case, path: str) -> dict[str, Any]:
    """Largest relative difference of a gradient tensor, largest difference of a score, and our metrics."""
    import torch
    import torch.distributed as dist

    from prefix_grouper_plugins.integrations.verl import PrefixGrouperEngine, PrefixGrouperValueEngine
    from prefix_grouper_plugins.metrics import SharingCounts
    from prefix_grouper_plugins.modeling import is_enabled

    for engine in (PrefixGrouperEngine, PrefixGrouperValueEngine):
        engine.unlogged.counts = SharingCounts()  # those of the case before wait for an update
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == case.ordinary_on_rank:
        case = replace(case, temperature=[case.temperature])
    rows = make_rows(case)
    dealt = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
    mine = rows if case.sequence_parallel > 1 else dealt  # ranks of one sequence hold the same rows
    with model_classes_restored():
        alone = replace(case, token_budget=case.token_budget * case.sequence_parallel)  # the budget is for each rank
        if case.alone:
            alone = replace(alone, dynamic=False, micro_batch_size=1)
        stock = build(alone, path, shared=False)
        reference, _ = gradients(stock, with_positions_by_row(make_batch(alone, dealt, len(rows)), dealt), alone)
        wanted = scores(stock, with_positions_by_row(make_batch(alone, dealt, len(rows)), dealt))
    with model_classes_restored(), own_class(case), messages() as said:
        shared = build(case, path, shared=True)
        if case.wrong_positions:
            count_packed_positions(shared.module)
        with vision.watched_tower(
            shared.module
        ) as patches:  # from the check on, or hooks would be a change of the model
            if shared.gate.needs_self_check(shared.module) and (case.images or case.own_class):
                with shared.eval_mode():  # whose passes are not those that are counted below
                    shared._check_model()
            Leak.kind = case.own_class or "right"
            if case.log_probs_first:
                scores(shared, make_batch(case, mine, len(rows)))
            patches.clear()
            found, metrics = gradients(shared, make_batch(case, mine, len(rows)), case)
            patches_of_update = list(patches)
            random_state = hash(tuple(torch.get_rng_state().tolist()))
            got = scores(shared, make_batch(case, mine, len(rows)))
    assert found.keys() == reference.keys()
    first = rank * len(rows) // world if case.sequence_parallel > 1 else 0
    result: dict[str, Any] = {
        "gradient": max(
            float((found[n] - g).norm() / (1 if is_zero(n, g) else g.norm())) for n, g in reference.items()
        ),
        "smallest_gradient": min(float(g.norm()) for n, g in reference.items() if not is_zero(n, g)),
        "metrics": {name: value[0] for name, value in metrics.items() if name.startswith("prefix_grouper/")},
        "fallbacks": dict(shared.sharing.fallbacks),
        "forwarded": asdict(shared.forwarded),
        "patches": patches_of_update,
        "said": said,
        "random_state": random_state,
        "proved": is_enabled(shared.module) and case.sequence_parallel == 1 and has_passed(shared),
        "scores": {},
    }
    if case.saves_to_cpu:
        result["restored"] = [
            saved_and_restored(engine, strategy) for engine, strategy in ((stock, "fsdp2"), (shared, "prefix_grouper"))
        ]
    if case.log_prob_rows:
        scores(shared, make_batch(replace(case, micro_batch_size=case.log_prob_rows), mine, len(rows)))
        _, metrics = gradients(shared, make_batch(case, mine, len(rows)), case)
        result["later_metrics"] = {name: value[0] for name, value in metrics.items() if "prefix_grouper/" in name}
    for name, values in wanted.items():
        other = got[name][first : first + len(values), : values.shape[1]]
        result["scores"][name] = float((other - values).abs().max())
    return result


class Engines:
    """Processes of this module, which take seconds to import verl, for any number of lists of cases.

    Files in ``folder`` hold what goes in and out: ``cases-0.json``, ``results-0.json``, and so on.
    """

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder, self.log, self.lists = folder, folder / "log.txt", 0
        command = [sys.executable, "-m", __name__, str(folder), str(processes)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        self.returncode: int | None = None

    def results(self, cases: list[Case]) -> list[dict[str, Any]]:
        """Those of ``cases``, in their order."""
        write(self.folder / f"cases-{self.lists}.json", [vars(case) for case in cases])
        self.answer = self.folder / f"results-{self.lists}.json"
        self.lists += 1
        wait_for(self, self.log, PATIENCE)  # type: ignore[arg-type]  # each case writes a line
        return json.loads(self.answer.read_text())

    def poll(self) -> int | None:
        """As of the process: over, for `wait_for`, when the results are there."""
        ended = self.process.poll()  # before the look for its last file
        self.returncode = 0 if self.answer.exists() else None if ended is None else ended or 1
        return self.returncode

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        end_family(self.process)
        self.process.wait()


def write(path: Path, content: Any) -> None:
    """All at once, for readers that wait for the file."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content))
    unfinished.rename(path)


def read_when_there(path: Path) -> Any:
    while not path.exists():
        time.sleep(0.05)
    return json.loads(path.read_text())


def run(rank: int, world: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    import verl  # noqa: F401

    vision.stand_in_for_flash_attention()
    flash.install()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for number in itertools.count():
        cases = [Case(**values) for values in read_when_there(Path(folder) / f"cases-{number}.json")]
        found = [result_of(case, f"{folder}/{case.model}-{case.tied}-{case.critic}", rank, world) for case in cases]
        if rank == 0:
            write(Path(folder) / f"results-{number}.json", found)


def result_of(case: Case, path: str, rank: int, world: int) -> dict[str, Any]:
    import torch.distributed as dist

    if rank == 0 and not Path(path).exists():
        save_model(case, Path(path))
    dist.barrier()
    try:
        return compare(case, path)
    except Exception as error:
        if world > 1:
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if rank == 0:
            print("done:", case, flush=True)


def main() -> None:
    import torch.multiprocessing as mp

    folder, world, parent = sys.argv[1], int(sys.argv[2]), os.getppid()
    ranks = mp.start_processes(run, (world, folder), nprocs=world, join=False, start_method="spawn")
    while not ranks.join(timeout=1):
        if os.getppid() != parent:  # the tests are gone
            for process in ranks.processes:
                process.kill()
            return


if __name__ == "__main__":
    main()
