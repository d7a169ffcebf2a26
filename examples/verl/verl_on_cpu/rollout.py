"""A rollout for verl that samples with a transformers model on a CPU: `actor_rollout_ref.rollout.name=hf_cpu`.

verl samples through servers: each replica starts one, requests come in one by one, and after each step the workers
send their weights. Here all replicas share **one** Ray actor, `Server`. It counts how often each prompt has been asked
for since the last weights arrived, and request number `k` gets response number `k` of that prompt. Thus the set of
responses of a prompt depends on the seed, the step, the prompt and the weights, not on the order in which requests
arrive, nor on the number of workers.

Load it with `actor_rollout_ref.model.external_lib=verl_on_cpu.rollout`.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from verl_on_cpu.sampling import Response, sample_group
from verl_on_cpu.turns import Turns

NAME = "hf_cpu"


class Server:
    """The Ray actor that holds the model; it samples one group at a time."""

    def __init__(self, model_path: str, group_size: int, max_tokens: int, seed: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.end_id = AutoTokenizer.from_pretrained(model_path).eos_token_id
        self.group_size, self.max_tokens, self.seed = group_size, max_tokens, seed
        self.turns = Turns.of_this_process()
        self.step = 0
        self.requests: Counter[tuple] = Counter()
        self.groups: dict[tuple, asyncio.Future[list[Response]]] = {}
        # One thread: groups and new weights take turns, while the event loop goes on accepting requests.
        self.worker = ThreadPoolExecutor(max_workers=1)

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """Answer a request with the next response of its prompt; `request_id` is random and plays no part."""
        if sampling_params.get("top_p", 1) != 1 or sampling_params.get("top_k", -1) > 0:
            raise ValueError(f"{NAME} samples from the full distribution, without top_p and top_k: {sampling_params}")
        temperature = float(sampling_params.get("temperature", 1))
        max_tokens = int(sampling_params.get("max_tokens") or self.max_tokens)
        prompt = (tuple(prompt_ids), temperature, max_tokens)
        number = self.requests[prompt]
        self.requests[prompt] += 1
        group, place = divmod(number, self.group_size) if temperature > 0 else (0, 0)
        if (prompt, group) not in self.groups:
            size = self.group_size if temperature > 0 else 1
            self.groups[prompt, group] = asyncio.get_running_loop().run_in_executor(
                self.worker,
                sample_group,
                self.model,
                list(prompt_ids),
                range(group * size, (group + 1) * size),
                max_tokens,
                temperature,
                self.end_id,
                (self.seed, self.step),
            )
        response = (await self.groups[prompt, group])[place]
        return TokenOutput(
            token_ids=response.token_ids,
            log_probs=response.log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )

    async def load_weights(self, weights: dict[str, Tensor], step: int, adapter_scale: float | None) -> None:
        """Take the weights of a step, or those of a LoRA adapter and its scale, and start counting requests anew.

        Where two trainings run in turns, this is the end of the step, and the other one's turn.
        """
        if self.turns is not None:
            await self.turns.end_step(step)
        if adapter_scale is not None:
            weights = self.base | merged_layers(self.base, weights, adapter_scale)
        await asyncio.get_running_loop().run_in_executor(self.worker, self.replace_weights, weights)
        self.step = step
        self.requests.clear()
        self.groups.clear()

    def replace_weights(self, weights: dict[str, Tensor]) -> None:
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        missing = set(missing) - set(self.model.all_tied_weights_keys)
        if missing or unexpected:
            raise ValueError(f"the weights do not fit the model: missing {sorted(missing)}, unexpected {unexpected}")

    async def ready(self) -> None:
        """Return once the model is loaded."""

    async def do_nothing(self, *args: Any, **kwargs: Any) -> None:
        """Memory and profiling are no concern of this server."""

    sleep = wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = do_nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = do_nothing


def merged_layers(base: dict[str, Tensor], adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The layers that a LoRA adapter changes, merged with it: `W + scale * B A`."""
    merged = {}
    for name, down in adapter.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight"
            merged[layer] = base[layer] + scale * adapter[name.replace(".lora_A.", ".lora_B.")] @ down
    return merged


class ServerAdapter(BaseRollout):
    """The end of the rollout that lives in each training worker and sends the weights."""

    async def resume(self, tags: list[str]) -> None:
        """Nothing to do: the server keeps its weights."""

    async def release(self) -> None:
        """Nothing to do: the server keeps its weights."""

    async def update_weights(
        self,
        weights: Iterator[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        peft_config: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Send full weights, or a LoRA adapter's, in the precision that they come in."""
        if wire_format != "named_tensors":
            raise ValueError(f"{NAME} takes named tensors only, not wire_format={wire_format!r}")
        scale = None if peft_config is None else peft_config["lora_alpha"] / peft_config["r"]
        # Gathering a tensor is a collective, so each worker does it, and the first one sends.
        gathered = {name: tensor.detach().clone() for name, tensor in weights}
        if int(os.environ["RANK"]) == 0:
            await ray.get_actor(NAME).load_weights.remote(gathered, global_steps or 0, scale)


class Replica(RolloutReplica):
    """The end of the rollout that lives in the trainer's process and finds or starts the server."""

    def rollout_worker_use_gpu(self) -> bool:
        return False

    async def launch_servers(self) -> None:
        server = (
            ray.remote(Server)
            .options(name=NAME, get_if_exists=True, num_cpus=0, max_concurrency=self.max_concurrency)
            .remote(self.model_config.path, self.config.n, self.config.response_length, self.config.seed)
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = f"{NAME}_{self.replica_rank}"  # the load balancer wants a name for each replica


_ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.{ServerAdapter.__name__}"
RolloutReplicaRegistry.register(NAME, lambda: Replica)
