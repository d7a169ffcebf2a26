"""Run one verl training on a CPU, from start to end, and give back what verl logged.

    from verl_on_cpu.run import run_training

    steps = run_training(Path("out/stock"), ["actor_rollout_ref.actor.strategy=fsdp2"], steps=2)
    print([step["critic/rewards/mean"] for step in steps])

The training is `python -m verl.trainer.main_ppo` in a process of its own, with a Ray cluster of its own that is gone
when the function returns. In the folder remain `log.txt`, `metrics.jsonl` and `checkpoints/`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
from safetensors.torch import load_file
from torch import Tensor

from verl_on_cpu.tiny import make_inputs

PACKAGE = Path(__file__).parent
MARK = "VERL_ON_CPU_RUN"  # environment variable by which the processes of a run are known
ACTOR, REF, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "ref", "rollout"))
PATIENCE = 600.0  # seconds
# Ray gives its own processes 30 seconds to start, which is too short on a machine with much other work.
RAY_IS_LATE, ATTEMPTS = "The current node timed out during startup", 3
PRECISION = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"

Step = dict[str, float]


class TrainingError(RuntimeError):
    """A training that failed or hung, with the end of its log."""


def run_training(
    folder: Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    *,
    inputs: Path | None = None,
    workers: int = 2,
    steps: int = 2,
    patience: float = PATIENCE,
    on_step: Callable[[Step], None] | None = None,
    cluster: str | None = None,
    stop: threading.Event | None = None,
) -> list[Step]:
    """Train by GRPO and return verl's metrics of each step; `step["step"]` is its number, from 1.

    `inputs` is a folder that `make_inputs` has filled; without it a default one is made in `folder`. `overrides` are
    options of verl, `key=value`, that come after ours below, and `environment` is set in all processes.
    `on_step` is called as soon as a step is logged. `cluster` is the address of a Ray cluster of two nodes, with as many
    made-up GPUs on each as there are `workers`; by default each training starts one of its own.

    Raises `TrainingError` if the training fails, makes no progress for `patience` seconds, or is to `stop`.
    """
    folder = folder.resolve()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if inputs is None:
        inputs = folder / "inputs"
        make_inputs(inputs)
    log, metrics = folder / "log.txt", folder / "metrics.jsonl"
    metrics.write_bytes(b"")
    reader = MetricsReader(metrics, on_step)

    ours = [
        *cpu_options(workers),
        *training_options(inputs.resolve(), steps),
        *folder_options(folder, steps),
        *overrides,
    ]
    ray = partial(ray_options, workers=workers, cluster=cluster)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            run_once(folder, ours, ray, environment or {}, reader, patience, stop)
            break
        except TrainingError:
            if attempt == ATTEMPTS or RAY_IS_LATE not in log.read_text(encoding="utf-8", errors="replace"):
                raise
    if len(reader.steps) != steps:
        raise failure(f"The training logged {len(reader.steps)} of {steps} steps", log)
    return reader.steps


def run_once(
    folder: Path,
    options: Sequence[str],
    ray: Callable[[str], list[str]],
    environment: Mapping[str, str],
    reader: "MetricsReader",
    patience: float,
    stop: threading.Event | None,
) -> None:
    """Start verl in `folder` and wait for it; `ray` gives the options of a Ray cluster whose files are in a given folder."""
    mark, log = uuid.uuid4().hex, folder / "log.txt"
    # Not the usual folder for temporary files: the paths of Ray's sockets may have no more than 107 characters.
    ray_folder = tempfile.mkdtemp(prefix="verl-", dir="/tmp")
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "verl.trainer.main_ppo", *ray(ray_folder), *options],
                cwd=folder,
                env=make_environment(mark, reader.path, environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_for(process, log, patience, also=reader.read, stop=stop)
        reader.read()
    finally:
        end_all(mark)
        shutil.rmtree(ray_folder, ignore_errors=True)


def final_weights(folder: Path) -> dict[str, Tensor]:
    """The weights that a run in `folder` ended with, in float32."""
    (path,) = folder.glob("checkpoints/global_step_*/actor/huggingface/model.safetensors")
    return load_file(path)


def cpu_options(workers: int) -> list[str]:
    """How to run on a CPU."""
    return [
        "trainer.device=cpu",
        f"trainer.n_gpus_per_node={workers}",
        f"{ACTOR}.strategy=fsdp2",  # verl's FSDP1 does not run on a CPU
        *(f"+{part}.fsdp_config.mixed_precision={PRECISION}" for part in (ACTOR, REF)),
        *(f"{part}.use_torch_compile=False" for part in (ACTOR, f"{ACTOR}.fsdp_config", f"{REF}.fsdp_config")),
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.external_lib=verl_on_cpu.rollout",
        f"{ROLLOUT}.name=hf_cpu",
        f"{ROLLOUT}.load_format=auto",
        f"{ROLLOUT}.tensor_model_parallel_size=1",
        f"{ROLLOUT}.agent.num_workers=1",
        "reward.num_workers=1",
        "data.dataloader_num_workers=0",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"trainer.v1.sampler.custom_sampler.path={PACKAGE / 'replay.py'}",
        "trainer.v1.sampler.custom_sampler.name=QuickReplayBuffer",
    ]


def ray_options(ray_folder: str, workers: int, cluster: str | None) -> list[str]:
    """Where to run: in a Ray cluster that is small and quick to start, or in one of two nodes that is there."""
    if cluster is not None:
        return ["trainer.nnodes=2", f"+ray_kwargs.ray_init.address={cluster}"]
    return [
        "trainer.nnodes=1",
        # Its GPUs and most of its CPUs are made up: verl's processes reserve them.
        "+ray_kwargs.ray_init.address=local",
        f"+ray_kwargs.ray_init._temp_dir={ray_folder}",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=200000000",
        f"+ray_kwargs.ray_init.num_gpus={workers}",
        f"ray_kwargs.ray_init.num_cpus={4 + 3 * workers}",
    ]


def training_options(inputs: Path, steps: int) -> list[str]:
    """What to train: GRPO with a KL loss, 4 prompts a step with 4 responses each."""
    return [
        "algorithm.adv_estimator=grpo",
        f"{ACTOR}.use_kl_loss=True",
        f"{ACTOR}.optim.lr=1e-3",
        # At Adam's usual 1e-8, rounding alone can move a weight whose gradient is nearly zero by the learning rate.
        f"{ACTOR}.optim.override_optimizer_config={{eps: 1e-6}}",
        f"trainer.total_training_steps={steps}",
        f"actor_rollout_ref.model.path={inputs / 'model'}",
        f"data.train_files={inputs / 'train.parquet'}",
        f"data.val_files={inputs / 'train.parquet'}",
        "data.seed=0",
        "data.train_batch_size=4",
        "data.max_prompt_length=1024",
        "data.max_response_length=16",
        f"{ROLLOUT}.n=4",
        f"{ACTOR}.ppo_mini_batch_size=4",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=4",
        f"{REF}.log_prob_micro_batch_size_per_gpu=4",
        f"reward.custom_reward_function.path={PACKAGE / 'reward.py'}",
        "reward.custom_reward_function.name=compute_score",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.resume_mode=disable",
    ]


def folder_options(folder: Path, steps: int) -> list[str]:
    """What to leave behind: the metrics and, at the end, the model in the format of transformers."""
    return [
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.save_freq={steps}",
        f"{ACTOR}.checkpoint.save_contents=[hf_model]",
        "hydra.run.dir=.",
        "hydra/job_logging=none",
        "hydra.output_subdir=null",
    ]


def make_environment(mark: str, metrics: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of the driver, which all Ray processes of the run inherit."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "VERL_"))}
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **inherited,
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",  # for each process: there are at least as many as cores
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu.platform",
        "VERL_ENGINE_DEVICE": "cuda",  # verl registers its FSDP engine for "cuda" and "npu"; on a CPU it runs just so
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "TQ_NUM_THREADS": "1",  # of the queue between the processes; it warns at each call otherwise
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it would end a training because other programs take memory
        "RAY_worker_niceness": "0",  # at its usual 15, a training beside other work takes many times as long as alone
        "RAY_enable_worker_prestart": "0",  # else as many idle Python processes as there are CPUs
        "RAY_prestart_worker_first_driver": "0",
        **extra,
    }


class MetricsReader:
    """Reads the file that verl's file logger writes, while it is being written."""

    def __init__(self, path: Path, on_step: Callable[[Step], None] | None) -> None:
        self.path, self.on_step = path, on_step
        self.position = 0
        self.steps: list[Step] = []

    def read(self) -> bool:
        """Take in the lines that are complete and new; whether there are any."""
        text = self.path.read_bytes()
        end = text.rfind(b"\n") + 1
        for line in map(json.loads, text[self.position : end].splitlines()):
            step = {"step": line["step"], **line["data"]}
            self.steps.append(step)
            if self.on_step:
                self.on_step(step)
        found, self.position = end > self.position, end
        return found


class LogReader:
    """Reads a log while it is being written, and tells lines of a new kind from those that repeat.

    Ray and verl write lines again and again while they wait, with other numbers in them: those are no progress.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self.kinds: set[bytes] = set()

    def read(self) -> bool:
        """Take in the lines that are complete and new; whether one of them is of a new kind."""
        with self.path.open("rb") as file:
            file.seek(self.position)
            text = file.read()
        end = text.rfind(b"\n") + 1
        self.position += end
        kinds = {re.sub(rb"[0-9a-f]*[0-9][0-9a-f]*", b"0", line) for line in text[:end].splitlines()} - self.kinds
        self.kinds |= kinds
        return bool(kinds)


def wait_for(
    process: subprocess.Popen,
    log: Path,
    patience: float,
    also: Callable[[], bool] = bool,
    stop: threading.Event | None = None,
) -> None:
    """Wait until a process is over that writes to `log`.

    `also` tells of progress that is not in the log. Raises `TrainingError` if the process fails, if there is no
    progress for `patience` seconds, or as soon as `stop` is set.
    """
    lines, moved = LogReader(log), time.monotonic()
    while process.poll() is None:
        if lines.read() | also():
            moved = time.monotonic()
        elif time.monotonic() - moved > patience:
            raise failure(f"There was no progress for {patience:.0f} s", log)
        if stop is not None and stop.is_set():
            raise TrainingError("stopped")
        time.sleep(0.2)
    if process.returncode:
        raise failure(f"It stopped with exit code {process.returncode}", log)


def failure(what: str, log: Path, lines: int = 25) -> TrainingError:
    """The error to raise: the last lines of the log, what happened, and where the log is."""
    end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    return TrainingError(f"{end}\n\n{what}; all of its output: {log}")


def end_all(mark: str) -> None:
    """End what is left of a run: Ray leaves processes behind when its driver does not end as it should."""
    end({member for process in psutil.process_iter() for member in family(process, mark)})


def end_family(process: subprocess.Popen) -> None:
    """End a process and its descendants, if they are still there."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        end({parent, *parent.children(recursive=True)})


def end(left: set[psutil.Process]) -> None:
    """End these processes."""
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def family(process: psutil.Process, mark: str) -> list[psutil.Process]:
    """The process and its descendants, if the mark of the run is in its environment.

    Ray's Python workers write their titles over their environments, but the daemon that starts them does not.
    """
    try:
        return [process, *process.children(recursive=True)] if process.environ().get(MARK) == mark else []
    except psutil.Error:  # of another user, or gone by now
        return []
