"""Which model types are shared, how, and what that gains: builds each tiny, looks, and writes the table of docs/models.md.

    make support-table                                                   every type, about six minutes on one core
    python -m tests.modeling.support_table qwen3 mamba2                  these only, printed and not written
    python -m tests.modeling.support_table --page                        the page again, from the file that is there

The types are those of transformers' causal-LM mapping and the vision-language models that we have verified. What a line
says was seen in this run: a type is "exact" where it is in the list of modeling/model_types.py *and* packed logits and
gradients equalled those of single rows just now, by the comparisons of test_families.py and test_images.py. One that
is in the list and differs ends the run with an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from benchmarks.harness import RESULTS, number, read_csv, read_facts, use, write_csv
from prefix_grouper_plugins import PrefixLayout, UnsupportedModelError, check_support, enable_prefix_grouper
from prefix_grouper_plugins.batch import GroupedBatch
from prefix_grouper_plugins.modeling import packed_inputs
from prefix_grouper_plugins.modeling.images import ImageRows
from prefix_grouper_plugins.modeling.model_types import VERIFIED_MODEL_TYPES, VERIFIED_MULTIMODAL_TYPES, known_of
from prefix_grouper_plugins.modeling.support.report import SupportReport
from tests import tiny
from tests.modeling import families, multimodal_families, test_families, test_images

FILE = RESULTS / "support-cpu.csv"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMAND = "make support-table"
PROMPT, RESPONSE, GROUP = 256, 32, 8  # the reference shape: one group
LARGEST = 20_000_000  # parameters of a model that still counts as tiny
TURNS, SECONDS, PATIENCE = 3, 1.0, 8.0  # so many turns, more until SECONDS are over, fewer once PATIENCE is
LOGITS, GRADIENTS = 1e-4, 1e-3  # what single rows and packed ones may differ by, relative
COLUMNS = """
model_type verdict reason in_trl layers logits_difference gradient_difference token_ratio update_ratio rows_seconds
packed_seconds turns
""".split()
SHARED = ("exact", "self-checked on first use")
VERDICTS = (*SHARED, "differs", "refused", "alias", "no text", "not built")
Row = dict[str, str]
Step = Callable[[], None]


def types() -> list[str]:
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VERIFIED_MULTIMODAL_TYPES})


# ----------------------------------------------------------------------------------------------------- what is supported


def examine(model_type: str) -> Row:
    """The line of a type."""
    row = dict.fromkeys(COLUMNS, "") | {"model_type": model_type}
    known = known_of(model_type)
    if known.refused is not None:  # some of these cannot be built from the config that the mapping has for them
        return row | {"verdict": "refused" if known.reads_text else "no text", "reason": known.refused}
    with_images = model_type in VERIFIED_MULTIMODAL_TYPES
    try:
        model = multimodal_families.build(model_type) if with_images else build(model_type)
    except Exception as error:  # configs and models refuse sizes with errors of every kind
        return row | {"verdict": "not built", "reason": f"{type(error).__name__}: {one_line(error)}"}
    kind, report = model.config.model_type, check_support(model)
    if report.reasons:
        return row | {"verdict": "refused", "reason": "; ".join(report.reasons)}
    if kind != model_type and kind in VERIFIED_MODEL_TYPES:
        return row | {"verdict": "alias", "reason": kind}
    row |= {"layers": layers_in_words(report), "in_trl": "; ".join(report.left_padding_reasons) or "yes"}
    if model.device.type == "meta":
        return row | {"verdict": "not built", "reason": "made of known parts, but there is no tiny config for it"}
    try:
        logits, gradients = compare_with_images(model_type, model) if with_images else compare(model)
    except UnsupportedModelError as error:
        return row | {"verdict": "refused", "reason": one_line(error), "layers": "", "in_trl": ""}
    row |= {"logits_difference": f"{logits:.0e}", "gradient_difference": f"{gradients:.0e}"}
    if not (logits <= LOGITS and gradients <= GRADIENTS):
        return row | {"verdict": "differs"}
    times = time_with_images(model_type, model) if with_images else time_text(model)
    return row | times | {"verdict": "self-checked on first use" if report.unverified else "exact"}


def build(model_type: str) -> PreTrainedModel:
    """A tiny model; without weights where it is refused anyway, or is not tiny, and then perhaps of the default config."""
    if model_type in VERIFIED_MODEL_TYPES:
        return families.build(model_type)
    with torch.device("meta"):
        try:
            model = families.build(model_type)
        except Exception:
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]())
            if check_support(model).supported:
                raise
            return model
    is_tiny = sum(weight.numel() for weight in model.parameters()) <= LARGEST
    return families.build(model_type) if is_tiny and check_support(model).supported else model


def layers_in_words(report: SupportReport) -> str:
    """Each kind of layers once, with its backend; numbers of the tiny config are left out."""
    kinds = (re.sub(r" (?:of )?[\d.]+(?=,|$)", "", layer.attention) for layer in report.layers)
    return "; ".join(
        dict.fromkeys(f"{kind}: {layer.backend}" for kind, layer in zip(kinds, report.layers, strict=True))
    )


def one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")


# -------------------------------------------------------------------------------------------------------- packed or rows


def compare(model: PreTrainedModel) -> tuple[float, float]:
    """Relative differences of logits and of gradients. Enables ``model``, by the self-check where nothing else speaks for it."""
    expected = test_families.single_rows(model)
    wanted = test_families.gradients(model, expected)
    enable_prefix_grouper(model, self_check=bool(check_support(model).unverified))
    got = test_families.packed(model)
    # Gradients that are zero, as those of key biases, come out as noise in float32.
    noise = 1e-3 * max(float(g.abs().max()) for g in wanted.values()) if model.dtype == torch.float32 else 1e-6
    return differences(got, test_families.gradients(model, got), expected, wanted, noise)


def compare_with_images(model_type: str, model: PreTrainedModel) -> tuple[float, float]:
    rows = multimodal_families.rows(model_type)
    expected = test_images.single_rows(model, model_type, rows)
    wanted = test_images.gradients(model, expected)
    enable_prefix_grouper(model)
    got = test_images.packed(model, model_type, rows)
    return differences(got, test_images.gradients(model, got), expected, wanted, 1e-6)


def differences(
    got: Iterable[Tensor],
    got_gradients: dict[str, Tensor],
    expected: Iterable[Tensor],
    wanted_gradients: dict[str, Tensor],
    noise: float,
) -> tuple[float, float]:
    """The largest of logits, over ``1 + |logit|``, and of gradients, over the largest of each parameter."""
    pairs = [(x.detach(), y.detach()) for x, y in zip(got, expected, strict=True)]
    logits = max(float(((x - y).abs() / (1 + y.abs())).max()) for x, y in pairs)
    if got_gradients.keys() != wanted_gradients.keys():
        return logits, float("nan")
    gradients = [
        float((got_gradients[name] - wanted).abs().max() / wanted.abs().max().clamp(min=noise))
        for name, wanted in wanted_gradients.items()
    ]
    return logits, max(gradients)


# ------------------------------------------------------------------------------------------------------- what that gains


def time_text(model: PreTrainedModel) -> Row:
    """Forward and backward of one group in float32, ``model`` being enabled."""
    ids = torch.stack(tiny.rows({PROMPT: [RESPONSE] * GROUP}))
    layout = PrefixLayout.from_rows(list(ids))

    def rows() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1]
        (-log_probs(logits, ids[:, PROMPT:]).sum()).backward()

    def packed() -> None:
        logits = model(**packed_inputs(layout, layout.pack(list(ids)))).logits[0]
        scores = layout.unpack(log_probs(logits, layout.labels(list(ids))))
        (-torch.stack(scores)[:, PROMPT - 1 :].sum()).backward()

    return in_turns(model, rows, packed)


def time_with_images(model_type: str, model: PreTrainedModel) -> Row:
    """The same for a prompt with one image, which is part of its tokens."""
    generator = torch.Generator().manual_seed(0)
    family = multimodal_families.FAMILIES[model_type]
    image = family.image(generator, False)
    prompt = multimodal_families.prompt([image], generator, words=PROMPT - 4 - image.tokens)
    words = torch.randint(multimodal_families.FIRST_WORD, multimodal_families.VOCABULARY, (GROUP, RESPONSE))
    made = [multimodal_families.Row(prompt, response, [image]) for response in words]
    blocks, tensors, counts, tiles = multimodal_families.batch_inputs(model_type, made)
    ids = torch.cat([blocks[0], blocks[2]], dim=1)
    of_rows = dict(tensors)
    if family.token_tensor:
        of_rows[family.token_tensor] = (ids == multimodal_families.IMAGE).int()

    def rows() -> None:
        logits = model(input_ids=ids, **of_rows, use_cache=False).logits[:, PROMPT - 1 : -1]
        (-log_probs(logits, ids[:, PROMPT:]).sum()).backward()

    def packed() -> None:
        images = ImageRows.from_processor(model, *blocks, tensors, counts, tiles)
        batch = GroupedBatch(*blocks, keys=images.keys)
        logits = model(**images.packed_inputs(batch)).logits[0, batch.positions]
        (-batch.scatter(log_probs(logits, batch.labels[batch.positions])).sum()).backward()

    return in_turns(model, rows, packed)


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each label."""
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def in_turns(model: PreTrainedModel, rows: Step, packed: Step) -> Row:
    """CPU seconds of both, and how many times as fast the packed one is: the median over turns."""
    model.float().train()
    row_tokens, packed_tokens = (tokens_of(model, step) for step in (rows, packed))
    turns: list[tuple[float, float]] = []
    while (spent := sum(map(sum, turns))) < SECONDS or (len(turns) < TURNS and spent < PATIENCE):
        turns.append((seconds_of(model, rows), seconds_of(model, packed)))
    return {
        "token_ratio": number(packed_tokens / row_tokens),
        "update_ratio": number(median(packed / rows for rows, packed in turns), 3),
        "rows_seconds": number(median(rows for rows, _ in turns)),
        "packed_seconds": number(median(packed for _, packed in turns)),
        "turns": str(len(turns)),
    }


def tokens_of(model: PreTrainedModel, step: Step) -> int:
    """How many tokens are embedded in a step."""
    seen = 0

    def count(module: torch.nn.Module, args: Any) -> None:
        nonlocal seen
        seen += args[0].numel()

    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    try:
        step()  # a self-check may run in front of it, since the model has another dtype, and a hook
        seen = 0
        step()
    finally:
        hook.remove()
    return seen


def seconds_of(model: PreTrainedModel, step: Step) -> float:
    model.zero_grad()
    start = time.process_time()
    step()
    return time.process_time() - start


# ------------------------------------------------------------------------------------------------------------- the page


def page(text: str, rows: list[Row], facts: dict[str, str]) -> str:
    """``text`` with what stands between its marks made anew."""
    for name, part in parts(rows, facts).items():
        text, found = re.subn(
            rf"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _, name=name, part=part: f"<!-- {name} -->\n\n{part}\n\n<!-- /{name} -->",
            text,
            flags=re.S,
        )
        assert found == 1, f"the page has no mark {name}"
    return text


def parts(rows: list[Row], facts: dict[str, str]) -> dict[str, str]:
    images = [row for row in rows if row["model_type"] in VERIFIED_MULTIMODAL_TYPES]
    text = [row for row in rows if row["model_type"] not in VERIFIED_MULTIMODAL_TYPES]
    return {
        "counts": counts(text, images, facts),
        "exact": gains([row for row in text if row["verdict"] in SHARED]),
        "images": gains([row for row in images if row["verdict"] in SHARED]),
        "others": others([row for row in rows if row["verdict"] not in SHARED]),
    }


def counts(text: list[Row], images: list[Row], facts: dict[str, str]) -> str:
    found = Counter(row["verdict"] for row in text)
    names = {"alias": "under another name", "no text": "for other things than text", "not built": "not tried"}
    said = ", ".join(f"{found[verdict]} {names.get(verdict, verdict)}" for verdict in VERDICTS if found[verdict])
    no_trl = [f"`{row['model_type']}`" for row in text if row["in_trl"] not in ("", "yes")]
    measured = [row for row in text + images if row["logits_difference"]]
    largest = [max(float(row[f"{name}_difference"]) for row in measured) for name in ("logits", "gradient")]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("transformers", "torch", "python"))
    return "\n".join(
        [
            f"Of the {len(text)} entries of the mapping for text: **{said}**. With images: "
            f"**{sum(row['verdict'] == 'exact' for row in images)} exact**.",
            f"Not in TRL, which pads on the left, but in `prefix_grouped_logps` and verl: {', '.join(no_trl) or 'none'}.",
            f"Largest differences seen, relative: {largest[0]:.0e} of logits, {largest[1]:.0e} of gradients.",
            "",
            f"From [support-cpu.csv](../benchmarks/results/support-cpu.csv): `{facts['command']}` on {facts['machine']}, "
            f"{facts['date']}; {versions}. {facts['note']}.",
        ]
    )


def gains(rows: list[Row]) -> str:
    """A table of types that share."""
    lines = ["| Type | Verdict | Layers | Tokens | Update time |", "|---" * 5 + "|"]
    for row in rows:
        verdict = row["verdict"] if row["in_trl"] == "yes" else f"{row['verdict']}; not in TRL"
        ratios = [f"{float(row[name]):.2f}" for name in ("token_ratio", "update_ratio")]
        lines.append(f"| `{row['model_type']}` | {verdict} | {row['layers']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def others(rows: list[Row]) -> str:
    """A table of types that do not share, or were not tried."""
    lines = ["| Type | Verdict | Why |", "|---" * 3 + "|"]
    for row in rows:
        reason = row["reason"].replace("|", "\\|")
        said = {
            "alias": ("under another name", f"built as `{reason}`"),
            "no text": ("not for text", reason),
            "not built": ("not tried", reason),
        }.get(row["verdict"], (row["verdict"], reason))
        lines.append(f"| `{row['model_type']}` | {' | '.join(said)} |")
    return "\n".join(lines)


def write_page() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), read_csv(FILE), read_facts(FILE)), encoding="utf-8")
    print(f"filled in {PAGE}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types, by default all")
    parser.add_argument("--page", action="store_true", help="make the page from the file, without a run")
    args = parser.parse_args(arguments)
    if args.page:
        return write_page()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    use("cpu")
    rows, chosen = [], args.types or types()
    for i, model_type in enumerate(chosen, 1):
        start = time.process_time()
        rows.append(row := examine(model_type))
        said = row["reason"] or f"update {row['update_ratio']}, {row['layers']}"
        print(
            f"{i}/{len(chosen)} {model_type}: {row['verdict']}; {said} ({time.process_time() - start:.1f} s)",
            flush=True,
        )
    if not args.types:
        note = f"One group: prompt {PROMPT}, response {RESPONSE}, G = {GROUP}; tiny models in float32, process CPU time"
        write_csv(FILE, rows, "cpu", note, command=COMMAND)
        write_page()
    if wrong := [row["model_type"] for row in rows if row["verdict"] == "differs"]:
        raise SystemExit(f"packed rows are not single rows: {', '.join(wrong)}")
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
