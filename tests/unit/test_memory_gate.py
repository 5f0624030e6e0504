"""The level that `auto` settles on, and requests that do not fit: on the sizes of the released models."""

import dataclasses
import logging

import pytest
from engines import configured

from chitu_core.config import VideoSize
from chitu_core.memory import GIB
from chitu_diffusion.memory_choice import Limits
from chitu_diffusion.memory_gate import MemoryGate, least, settle, videos_of
from chitu_diffusion.memory_setting import STREAMED, Setting
from chitu_diffusion.params import DiffusionUserParams
from chitu_diffusion.resolve import resolve
from chitu_diffusion.result import MemoryRecord
from chitu_diffusion.survey import yaml_sizes

MODEL = "Wan2.1-T2V-14B"
HOST = 128 * GIB


def config_of(*overrides):
    return configured(f"models={MODEL}", "debug.skip_model_load=true", *overrides)


def setting_of(**changes):
    return Setting(yaml_sizes(config_of().models), **{"capability": (9, 0)} | changes)


def settled(device_gib, *overrides, videos=()):
    config = config_of("infer.diffusion.low_mem_level=auto", *overrides)
    limits = None if device_gib is None else Limits(int(device_gib * GIB), HOST)
    return settle(config, setting_of(), limits, videos or videos_of(config, ())).infer.diffusion


@pytest.mark.parametrize(("device_gib", "level"), [(140, 0), (40, 2), (24, 4), (16, 4), (None, 0)])
def test_auto_becomes_the_lowest_level_that_fits(device_gib, level):
    assert settled(device_gib).level == level


def test_auto_keeps_as_many_blocks_as_fit_and_no_block_is_lost_to_rounding():
    few, many = settled(16), settled(24)
    block = setting_of().transformer.blocks[0].num_bytes
    assert 0 <= few.resident_bytes // block < many.resident_bytes // block
    assert many.resident_bytes - many.resident_bytes // block * block < 100  # whole blocks, a few bytes more


def test_auto_makes_room_for_what_is_expected_and_for_warm_ups():
    large = VideoSize(1280, 720, 81)
    config = config_of("infer.diffusion.low_mem_level=auto", "infer.warmup=[1280x720x81]")
    assert videos_of(config, ()) == (VideoSize(848, 480, 81), large)
    assert videos_of(config, [VideoSize(64, 64, 5)]) == (VideoSize(64, 64, 5), large)
    assert settled(24, videos=[large, VideoSize(64, 64, 5)]).resident_bytes < settled(24).resident_bytes
    assert settled(50).level < settled(50, videos=[large]).level


def test_a_level_that_is_named_stays():
    config = config_of("infer.diffusion.low_mem_level=3")
    assert settle(config, setting_of(), Limits(GIB, GIB), videos_of(config, ())) is config


def test_what_streams_has_no_effect_where_auto_does_not_stream(caplog):
    with caplog.at_level(logging.WARNING):
        found = settled(140, "infer.diffusion.stream_dtype=float8_e4m3fn", "infer.diffusion.resident_gb=2")
    assert (found.stream_dtype, found.resident_gb) == ("model", "auto")
    assert "no effect at level 0" in caplog.text


def test_nothing_that_fits_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"low_mem_level=auto: no level fits .*what fits: "):
        settled(7)


def test_ranks_take_what_the_poorest_has():
    assert least([Limits(5, 9), Limits(7, 8)]) == Limits(5, 8)
    assert least([Limits(5, 9), None]) is None


def gate(device_gib, level, **changes):
    return MemoryGate(setting_of(**changes), Limits(int(device_gib * GIB), HOST), level, 0)


def request(**changes):
    return resolve(DiffusionUserParams(prompt="a", **changes), config_of().models)


def test_a_request_that_does_not_fit_is_refused_with_what_would():
    large, small = request(size=(1280, 720)), request(size=(416, 240), num_frames=17)
    refusal = gate(40, 0).refusal(large, 0)
    assert "a video of 1280x720x81 would take" in refusal
    assert "at infer.diffusion.low_mem_level=0; what fits: infer.diffusion.low_mem_level=" in refusal
    assert gate(44, 0).refusal(small, 0) is None
    assert gate(44, 0).refusal(small, 40 * 10**9) is not None  # a step cache counts


def test_the_record_of_a_plan_says_where_what_lives():
    record = gate(80, STREAMED).record(request(size=(832, 480)), 10**9)
    assert isinstance(record, MemoryRecord)
    assert record.level == 4
    assert record.resident_blocks == 0
    assert record.places["dit"] == "host, streamed"
    assert set(record.device_gib) == {"text", "denoise", "decode"}
    assert record.host_gib > 30
    assert MemoryRecord(**dataclasses.asdict(record)) == record


def test_without_a_gpu_nothing_is_foretold():
    unknown = MemoryGate(setting_of(), None, 0, 0)
    assert unknown.record(request(), 0) is None
    assert unknown.refusal(request(size=(1280, 720)), 10**15) is None


def test_the_plan_is_announced_and_a_warning_where_the_usual_video_does_not_fit(caplog):
    with caplog.at_level(logging.INFO):
        for gib in (80, 20):
            gate(gib, 2).announce([VideoSize(832, 480, 81)])
    first, second, warning = (record.getMessage() for record in caplog.records)
    assert first.startswith("memory for ")
    assert "text encoder: host" in first
    assert second == first
    assert "would take" in warning


def test_what_a_request_leaves_is_for_the_other_expert():
    params, there = request(), gate(80, 3)
    usable = Limits(80 * GIB, HOST).device_usable
    assert there.spare_bytes(params, 0) == usable - there.plan(params, 0).denoise_bytes > 0
    assert there.spare_bytes(params, 100 * GIB) == 0
    assert MemoryGate(setting_of(), None, 3, 0).spare_bytes(params, 0) == 0
