"""Every sampler of the folder: interface, known grids and trajectories, an ODE with a known solution."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import chitu_diffusion.samplers
from chitu_diffusion.samplers._flow import combine, log_snr, shift_sigmas, spaced_sigmas

NAMES = sorted(path.stem for path in Path(chitu_diffusion.samplers.__path__[0]).glob("[!_]*.py"))
ORDERS = {"unipc": 2, "dpmpp": 2}  # a new sampler is held to order 1 until it is named here


def build(name: str, steps: int, shift: float, **kwargs):
    return importlib.import_module(f"chitu_diffusion.samplers.{name}").Sampler(steps, shift, **kwargs)


def integrate(sampler, velocity, sample: Tensor) -> Tensor:
    for index in range(len(sampler.timesteps)):
        sample = sampler.step(velocity(sample, sampler.sigmas[index]), sample)
    return sample


def test_the_folder_holds_the_three_samplers():
    assert NAMES == ["dpmpp", "euler", "unipc"]


# grids


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unipc", (0.9997998, 0.9372655, 0.8330554, 0.6246874, 0)),
        ("euler", (0.9997998, 0.9372655, 0.8330554, 0.6246874, 0)),
        ("dpmpp", (1, 0.9375, 0.8333333, 0.625, 0)),
    ],
)
def test_sigmas_of_four_steps_with_shift_5(name, expected):
    assert build(name, 4, 5.0).sigmas == pytest.approx(expected, abs=1e-7)  # given with seven digits


def test_unipc_sigmas_of_fifty_steps_with_shift_5():
    sigmas = build("unipc", 50, 5.0).sigmas
    assert [sigmas[i] for i in (0, 1, 2, 49, 50)] == pytest.approx(
        [0.9998, 0.995732, 0.99153, 0.092507, 0], abs=5e-7
    )  # given with six digits
    assert build("dpmpp", 50, 5.0).sigmas[49] == pytest.approx(0.092593, abs=5e-7)


UNIPC_50 = """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854
843 833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92"""
UNIPC_40 = """999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898
888 877 865 852 837 819 799 776 749 717 678 631 571 492 386 235"""


@pytest.mark.parametrize(
    ("name", "steps", "shift", "expected"),
    [
        ("unipc", 4, 5.0, "999 937 833 624"),
        ("dpmpp", 4, 5.0, "1000 937 833 625"),
        ("unipc", 50, 5.0, UNIPC_50),
        ("euler", 50, 5.0, UNIPC_50),
        ("unipc", 40, 12.0, UNIPC_40),
    ],
)
def test_timesteps_are_the_official_ones(name, steps, shift, expected):
    assert build(name, steps, shift).timesteps == tuple(int(t) for t in expected.split())


def test_timesteps_agree_with_the_excerpts_known():
    ten = build("unipc", 10, 5.0).timesteps
    assert (ten[:5], ten[-3:]) == ((999, 978, 952, 920, 882), (681, 555, 356))
    fifty = build("dpmpp", 50, 5.0).timesteps
    assert (fifty[:5], fifty[-3:]) == ((1000, 995, 991, 987, 982), (241, 172, 92))


@pytest.mark.parametrize("name", ["unipc", "dpmpp"])
def test_forty_steps_with_shift_12_have_26_at_or_above_the_expert_boundary(name):
    assert sum(t >= 875 for t in build(name, 40, 12.0).timesteps) == 26


@pytest.mark.parametrize("start", [1.0, 0.9990000128746033])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 40, 50, 100, 1000])
def test_spacing_rounds_as_numpy_does(start, steps):
    assert spaced_sigmas(start, steps) == np.linspace(start, 0, steps + 1)[:-1].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("steps", "shift"), [(1, 5.0), (2, 3.0), (50, 1.0), (100, 12.0), (1000, 12.0), (20, 0.3)]
)
def test_sigmas_fall_from_at_most_1_to_0_and_are_fp32(name, steps, shift):
    sampler = build(name, steps, shift)
    assert (len(sampler.timesteps), len(sampler.sigmas), sampler.sigmas[-1]) == (steps, steps + 1, 0.0)
    assert sampler.sigmas[0] <= 1
    assert all(before > after for before, after in zip(sampler.sigmas, sampler.sigmas[1:], strict=False))
    assert list(sampler.sigmas) == torch.tensor(sampler.sigmas, dtype=torch.float32).tolist()
    assert all(type(t) is int for t in sampler.timesteps)


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_training_timesteps_scales_the_timesteps(name):
    assert build(name, 2, 1.0, num_train_timesteps=100).timesteps[0] in (99, 100)


def test_shift_1_is_the_identity_and_log_snr_has_its_limits():
    assert shift_sigmas([0.9, 0.3], 1.0) == [0.9, 0.3]
    assert (log_snr(1.0), log_snr(0.5), log_snr(0.0)) == (-math.inf, 0.0, math.inf)


# refusals


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(name, steps):
    with pytest.raises(ValueError, match=rf"num_inference_steps must be >= 1, got {steps}; "):
        build(name, steps, 5.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-20])
def test_a_shift_that_is_no_positive_number_is_refused(name, shift):
    with pytest.raises(ValueError, match=rf"models.sampler.sample_shift must be .*, got {shift}; "):
        build(name, 4, shift)


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_that_makes_equal_noise_levels_is_refused(name):
    with pytest.raises(
        ValueError, match=r"sample_shift = 1000000000.0 with num_inference_steps = 4 .* equal"
    ):
        build(name, 4, 1e9)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_after_the_last_is_refused(name):
    sampler, x = build(name, 2, 3.0), torch.ones(2)
    integrate(sampler, lambda x, _: x, x)
    with pytest.raises(ValueError, match="all its 2 steps; build one for each task"):
        sampler.step(x, x)


# trajectories


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unipc", (0.9923055, 0.9672469, 0.9115080, 0.7987621, 0.5846295)),
        ("dpmpp", (0.9923077, 0.9713286, 0.9196106, 0.8086208, 0.5943351)),
    ],
)
def test_scalar_trajectory_of_five_steps_with_shift_3(name, expected):
    sampler, x, actual = build(name, 5, 3.0), torch.ones(()), []
    for index in range(5):
        x = sampler.step(torch.tensor(0.1 * (index + 1)), x)
        actual.append(x.item())
    assert actual == pytest.approx(expected, abs=2e-7)  # given with seven digits, computed in fp32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 3.0), (3, 1.0), (50, 5.0), (100, 12.0)])
def test_a_constant_velocity_ends_on_its_x0(name, steps, shift):
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 4, 3, 5, 7, generator=generator)
    sampler = build(name, steps, shift)
    actual = integrate(sampler, lambda *_: v, x)
    # fp32: each step rounds values of size 5 a few times
    torch.testing.assert_close(actual, x - sampler.sigmas[0] * v, atol=1e-7 * (10 + 2 * steps), rtol=0)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_steps_that_share_an_integer_timestep_are_separate_steps(name):
    sampler = build(name, 100, 12.0)
    assert sampler.timesteps[:2] == (999, 999)
    x = integrate(sampler, lambda x, _: torch.tanh(x), torch.ones(3))
    assert x.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_order_of_convergence_on_gaussian_data(name):
    """Data N(mean, deviation^2): velocity is linear in x, and (x - (1-s) mean) / spread(s) stays constant."""
    mean, deviation = 0.7, 0.5

    def spread(sigma: float) -> float:
        return math.hypot((1 - sigma) * deviation, sigma)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        growth = (sigma - (1 - sigma) * deviation**2) / spread(sigma) ** 2
        return growth * (x - (1 - sigma) * mean) - mean

    def error(steps: int) -> float:
        sampler = build(name, steps, 1.0)
        x = torch.tensor([1.3, -0.4], dtype=torch.float64)
        z = (x - (1 - sampler.sigmas[0]) * mean) / spread(sampler.sigmas[0])
        return (integrate(sampler, velocity, x) - (mean + deviation * z)).norm().item()

    measured = math.log2(error(160) / error(640)) / 2
    # the steps in lambda stay large at both ends, which costs a factor log(steps): 1.8 is seen for order 2
    assert measured == pytest.approx(ORDERS.get(name, 1), abs=0.25)


# the interface


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 16, 3, 5, 7)])
def test_any_shape_comes_back_in_fp32_without_a_wait_for_the_device(name, shape):
    sampler = build(name, 4, 5.0)
    x = integrate(sampler, lambda x, _: x, torch.empty(shape, device="meta"))  # .item() would fail on meta
    assert (x.shape, x.dtype, x.device.type) == (shape, torch.float32, "meta")


@pytest.mark.parametrize("name", NAMES)
def test_two_samplers_share_nothing(name):
    x = torch.linspace(-1, 1, 5)
    alone = integrate(build(name, 6, 5.0), lambda x, _: torch.tanh(x), x)
    first, second = build(name, 6, 5.0), build(name, 6, 5.0)
    a, b = x, 3 * x
    for _ in range(6):
        a, b = first.step(torch.tanh(a), a), second.step(torch.cos(b), b)
    assert torch.equal(a, alone)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone_and_may_be_overwritten_by_the_caller(name):
    x = torch.linspace(-1, 1, 5)
    expected = integrate(build(name, 6, 5.0), lambda x, _: torch.tanh(x), x)
    assert torch.equal(x, torch.linspace(-1, 1, 5))
    sampler, latent, velocity = build(name, 6, 5.0), x.clone(), torch.empty_like(x)
    for _ in range(6):  # as with the static buffers of a CUDA graph
        latent.copy_(sampler.step(torch.tanh(latent, out=velocity), latent))
    assert torch.equal(latent, expected)


def test_combine_is_the_weighted_sum_in_a_new_tensor():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert combine((2.0, a), (0.5, b)).tolist() == [7.0, 14.0]
    assert a.tolist() == [1.0, 2.0]
