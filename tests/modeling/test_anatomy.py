"""What a model is made of: found in one walk, whatever asks for it, and right for wrapped and multimodal models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prefix_grouper_plugins import PrefixLayout, check_support, disable_prefix_grouper, enable_prefix_grouper
from prefix_grouper_plugins.modeling import packed_inputs, self_check
from prefix_grouper_plugins.modeling.anatomy import Anatomy, row_limit
from prefix_grouper_plugins.modeling.rope import RowLimit
from prefix_grouper_plugins.modeling.self_check.result import SelfCheck
from tests import tiny
from tests.modeling import families, multimodal_families
from tests.modeling.comparing import lora


class CountedChildren(dict[str, Any]):
    """A module's children. Every walk of a module tree goes through them, torch's own (``modules``, ``parameters``,
    ``children``, ``apply``, ``train``, ``state_dict``) and one that reads ``_modules`` itself."""

    visits = 0

    def __iter__(self) -> Any:
        self.visits += 1
        return super().__iter__()

    def items(self) -> Any:
        self.visits += 1
        return super().items()

    def values(self) -> Any:
        self.visits += 1
        return super().values()

    def keys(self) -> Any:
        self.visits += 1
        return super().keys()


def most_visits(model: nn.Module, run: Callable[[], Any]) -> int:
    """How often ``run`` goes through the children of the module that it visits most."""
    modules = list(model.modules())
    for module in modules:
        module._modules = CountedChildren(module._modules)
    run()
    visits = Counter({type(module).__name__: module._modules.visits for module in modules})  # type: ignore[attr-defined]
    assert min(visits.values()) > 0  # nothing escaped the count
    return max(visits.values())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": tiny.model,
    "LoRA": lambda: lora(tiny.model()),
    "windows": lambda: families.build("gemma3_text"),
    "mixers": lambda: families.build("bamba"),
    "experts": lambda: families.build("mixtral"),
    "multimodal": lambda: multimodal_families.build("qwen2_vl"),
}


@pytest.mark.parametrize("name", MODELS)
def test_checking_visits_each_module_at_most_twice(name: str) -> None:
    model = MODELS[name]()
    assert most_visits(model, lambda: check_support(model)) <= 2


@pytest.mark.parametrize("when", [False, "later", True])
@pytest.mark.parametrize("name", MODELS)
def test_enabling_visits_each_module_at_most_twice(name: str, when: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forwards of the self-check are left out: what they visit is the model's own doing."""

    class Compared:
        def __init__(self, anatomy: Anatomy, *options: Any) -> None:
            pass

        def run(self) -> SelfCheck:
            return SelfCheck("model", passed=True)

    monkeypatch.setattr(self_check, "Comparison", Compared)
    model = MODELS[name]()
    assert most_visits(model, lambda: enable_prefix_grouper(model, self_check=when)) <= 2


@pytest.mark.parametrize("walk", [lambda m: list(m.modules()), lambda m: list(m.parameters()), lambda m: m.eval()])
def test_the_count_sees_every_kind_of_walk(walk: Callable[[nn.Module], Any]) -> None:
    model = tiny.model()
    assert most_visits(model, lambda: [walk(model) for _ in range(3)]) >= 3


def test_modules_stand_in_the_order_and_under_the_names_of_torch() -> None:
    for build in MODELS.values():
        model = build()
        assert Anatomy(model).modules == list(model.named_modules())


def test_the_parts_of_a_multimodal_model_leave_its_vision_tower_out() -> None:
    model = multimodal_families.build("qwen2_vl")
    anatomy = Anatomy(model)
    assert anatomy.base is model and anatomy.text is model.get_decoder()
    assert anatomy.attention_layers and not any("visual" in name for name, _ in anatomy.attention_layers)
    assert anatomy.configs == [model.config.get_text_config()]


def test_a_module_without_a_transformers_model_has_no_base() -> None:
    anatomy = Anatomy(nn.Linear(2, 2))
    assert anatomy.base is None and anatomy.attention_layers == [] and anatomy.first_weight is None


def test_the_lowest_limit_of_several_kinds_of_layers_counts() -> None:
    """Layers of one kind are longrope from 24 tokens on, those of the other dynamic from 40 on."""
    model = families.build("gemma3_text")
    rotary = model.model.rotary_emb
    kinds = sorted(rotary.rope_type)
    assert len(kinds) == 2
    rotary.rope_type = {kinds[0]: "dynamic", kinds[1]: "longrope"}
    rotary.original_max_seq_len = 40
    rotary.config.rope_parameters[kinds[1]]["original_max_position_embeddings"] = 24
    assert sorted(Anatomy(model).row_limits) == [RowLimit(24, "longrope"), RowLimit(40, "dynamic")]
    assert row_limit(model) == (24, "longrope")
    ((module, limits),) = Anatomy(model).modules_with_row_limit
    assert module is model.model and min(limits) == (24, "longrope")
    # What runs in front of a packed forward keeps to the same limit.
    enable_prefix_grouper(model, self_check=False)
    rows = tiny.rows({20: [9, 8]})
    layout = PrefixLayout.from_rows(rows)
    with pytest.raises(ValueError, match=r"a row reaches 29 tokens, and from 24 on rope_type 'longrope'"):
        model(**packed_inputs(layout, layout.pack(rows)))


@pytest.mark.parametrize(
    "name", ["drop_path", "drop_path_rate", "drop_prob", "layerdrop", "router_jitter", "noise_scale"]
)
def test_every_kind_of_randomness_besides_dropout_is_refused(name: str) -> None:
    model = tiny.model()
    setattr(model.model.layers[1].mlp, name, 0.125)
    (reason,) = check_support(model).reasons
    assert f"({name}=0.125)" in reason and f"set `{name}` to 0" in reason
    setattr(model.model.layers[1].mlp, name, 0.0)
    assert check_support(model).supported


def test_enabling_again_replaces_its_hooks_and_disabling_leaves_none() -> None:
    """A check that enabling forgets to take off runs for every time that the model was enabled."""
    model = tiny.model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    enable_prefix_grouper(model, self_check=False)
    once = hooks()
    assert once >= 2  # of the call, and of the rows' length
    for _ in range(2):
        enable_prefix_grouper(model, self_check=False)
    assert hooks() == once
    disable_prefix_grouper(model)
    assert hooks() == 0


def test_where_the_model_is_is_told_by_its_first_weight() -> None:
    with torch.device("meta"):
        model = tiny.model()
    assert Anatomy(model).first_weight is next(model.parameters())
    assert {id(p) for p in Anatomy(model).parameters} == {id(p) for p in model.parameters()}
