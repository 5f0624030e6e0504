"""Classifier-free guidance: which branches run, and the formula."""

import pytest
import torch

from chitu_diffusion.guidance import guided_velocity, needs_cfg


class Branches:
    """Fixed velocities for both branches, and a list of those that were asked for."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.velocity = {name: torch.randn(4, 3, generator=generator) for name in ("cond", "uncond")}
        self.calls = []

    def __call__(self, branch):
        self.calls.append(branch)
        return self.velocity[branch]


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0])
def test_guidance_of_zero_or_less_or_exactly_one_runs_the_conditional_branch_alone(scale):
    branches = Branches()
    assert guided_velocity(branches, scale) is branches.velocity["cond"]
    assert branches.calls == ["cond"]
    assert not needs_cfg(scale)


@pytest.mark.parametrize("scale", [0.3, 0.999, 1.5, 7.0])
def test_other_guidance_runs_both_branches_and_follows_the_formula(scale):
    branches = Branches()
    cond, uncond = (branches.velocity[name].double() for name in ("cond", "uncond"))
    actual = guided_velocity(branches, scale)
    # 1e-5 relative L2, the figure of all fp32 oracles: two roundings, amplified by the scale
    expected = uncond + scale * (cond - uncond)
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert branches.calls == ["cond", "uncond"]
    assert actual.dtype == torch.float32


class FakePair:
    """A rank of a pair whose partner predicts what `branches` has for the other branch."""

    def __init__(self, index, branches):
        self.index = index
        self.velocity = branches.velocity

    def both(self, x):
        assert torch.equal(x, self.velocity[("cond", "uncond")[self.index]])
        return self.velocity["cond"], self.velocity["uncond"]


@pytest.mark.parametrize("index", [0, 1])
def test_each_rank_of_a_pair_predicts_its_branch_and_gets_the_same_velocity(index):
    branches, alone = Branches(), Branches()
    assert torch.equal(guided_velocity(branches, 4.0, FakePair(index, branches)), guided_velocity(alone, 4.0))
    assert branches.calls == [("cond", "uncond")[index]]


@pytest.mark.parametrize("index", [0, 1])
def test_without_guidance_both_ranks_of_a_pair_predict_the_conditional_branch_and_exchange_nothing(index):
    branches = Branches()
    assert guided_velocity(branches, 1.0, FakePair(index, branches)) is branches.velocity["cond"]
    assert branches.calls == ["cond"]
