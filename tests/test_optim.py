"""The learning rate as a function of the step; which optimiser gets which weights; the moving average."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from dalle_mini_impl.config import StageConfig
from dalle_mini_impl.layers.attention import Attention
from dalle_mini_impl.training.ema import EMA
from dalle_mini_impl.training.optim import (
    MOST_FORGOTTEN,
    build_optimizers,
    clip_gradients,
    learning_rate_share,
    set_rates,
    timed_decay,
)
from tests.tiny import tiny_bundle


def test_the_rate_warms_up_stays_and_falls() -> None:
    config = StageConfig(warmup_steps=10, decay_share=0.5, final_lr_share=0.1)
    rates = [learning_rate_share(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < rates[99] < 0.12
    assert all(a >= b for a, b in itertools.pairwise(rates[50:]))


def test_a_longer_plan_does_not_change_the_rates_before_its_decay() -> None:
    config = StageConfig(warmup_steps=10, decay_share=0.5)
    unknown, short, long = ([learning_rate_share(s, total, config) for s in range(50)] for total in (None, 100, 400))
    assert unknown == short == long


def test_a_short_run_still_reaches_its_full_rate() -> None:
    config = StageConfig(warmup_steps=1000, decay_share=0.5)
    assert max(learning_rate_share(step, 20, config) for step in range(20)) == 1.0
    assert learning_rate_share(0, 1, config) == 1.0


def test_muon_takes_the_hidden_matrices_and_adamw_every_other_weight_once() -> None:
    dalle = tiny_bundle().dalle
    assert dalle is not None
    config = StageConfig(optimizer="muon", muon_learning_rate=0.02, weight_decay=0.1)
    adamw, muon = build_optimizers(dalle, config)
    taken = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (adamw, muon)]
    assert set(taken[1]) == {id(p) for p in dalle.hidden_matrices()}
    assert sorted(taken[0] + taken[1]) == sorted(id(p) for p in dalle.parameters())
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups if group["params"][0].ndim < 2)
    set_rates([adamw, muon], 0, None, config.model_copy(update={"warmup_steps": 2}))
    assert {group["lr"] for group in muon.param_groups} == {0.01}
    assert {group["weight_decay"] for group in muon.param_groups} == {0.1}


def test_muon_takes_queries_keys_and_values_head_by_head() -> None:
    bundle = tiny_bundle()
    for model in (bundle.dalle, bundle.clip):
        assert model is not None
        _, muon = build_optimizers(model, StageConfig(optimizer="muon", muon_per_head=True))
        stacked = {parameter: group["stacked"] for group in muon.param_groups for parameter in group["params"]}
        assert set(stacked) == set(model.hidden_matrices())
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        expected = {attention.qkv.weight: 3 * attention.heads for attention in attentions}
        assert len(expected) > 1 and {p: count for p, count in stacked.items() if count != 1} == expected
        _, muon = build_optimizers(model, StageConfig(optimizer="muon", muon_per_head=False))
        assert [group["stacked"] for group in muon.param_groups] == [1]


@pytest.mark.parametrize("total", [200, 20_000])
def test_muon_forgets_within_a_share_of_the_run_whatever_its_length(total: int) -> None:
    dalle = tiny_bundle().dalle
    assert dalle is not None
    config = StageConfig(muon_timescale=0.4, weight_decay=0.3, warmup_steps=0)
    adamw, muon = build_optimizers(dalle, config)
    set_rates([adamw, muon], 0, None, config)  # while its length isn't known
    assert muon.param_groups[0]["weight_decay"] == 0
    set_rates([adamw, muon], 0, total, config)
    for group in muon.param_groups:
        left = (1 - group["lr"] * group["weight_decay"]) ** (0.4 * total)
        assert left == pytest.approx(math.exp(-1), rel=0.01)
    assert adamw.param_groups[0]["weight_decay"] == 0.3


def test_a_run_of_a_few_steps_does_not_forget_all_in_each() -> None:
    assert timed_decay(0.005, 1, 0.5) * 0.005 == pytest.approx(MOST_FORGOTTEN)


def test_muon_is_refused_where_there_is_nothing_for_it() -> None:
    with pytest.raises(ValueError, match="no hidden matrices for Muon"):
        build_optimizers(nn.Linear(2, 2), StageConfig(optimizer="muon"))


def test_clipping_bounds_the_norm_and_tells_the_one_before() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
    assert clip_gradients(model, 1.0).item() == pytest.approx(5.0)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_the_average_follows_its_warm_up_and_gives_the_weights_back_to_the_bit() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update(model)  # decay (1 + 0) / (10 + 0)
    assert ema.weights["weight"].tolist() == [[pytest.approx(0.9)] * 2]
    for _ in range(50):
        ema.update(model)
    assert ema.weights["weight"].tolist() == [[pytest.approx(1.0)] * 2]
    with torch.no_grad():
        model.weight.fill_(0.1)
    before = model.weight.detach().clone()
    with ema.swapped_in(model):
        assert model.weight.tolist() == ema.weights["weight"].tolist() or model.weight[0, 0].item() > 0.9
        assert not model.training
    assert torch.equal(model.weight, before) and model.training


def test_no_decay_means_the_raw_weights() -> None:
    model = nn.Linear(2, 1)
    ema = EMA(model, decay=0.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    assert torch.equal(ema.weights["weight"], model.weight)
