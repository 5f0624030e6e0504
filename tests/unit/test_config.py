"""The one door of configuration: every packaged model passes, and every wrong value is refused by its key."""

import dataclasses

import pytest
from engines import composed
from omegaconf import DictConfig, OmegaConf

from chitu_core.config import load

MODELS = ("demo", "Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.2-T2V-A14B")


def changed(key, value):
    """The default configuration with one value set after composition, as a script may do."""
    config = composed()
    OmegaConf.set_struct(config, False)
    OmegaConf.update(config, key, value)
    return config


@pytest.mark.parametrize("name", MODELS)
def test_every_packaged_model_loads(name):
    config = load(composed(f"models={name}", "models.ckpt_dir=somewhere"))
    assert config.models.name == name
    assert len(config.models.sampler.guidance_scale) == len(config.models.sampler.boundary) + 1


def test_the_defaults_are_the_documented_ones():
    config = load(composed())
    assert (config.models.name, config.infer.attn_type, config.infer.dtype) == ("demo", "auto", "auto")
    assert (config.infer.max_reqs, config.infer.schedule_policy) == (8, "fifo")
    assert (config.output.root_dir, config.output.enable_run_log) == ("outputs", True)
    assert (config.output.enable_timer_dump, config.output.hydra_dump_mode) == (False, "video_dir")


@pytest.mark.parametrize(
    ("name", "steps", "shift", "boundary"),
    [
        ("Wan2.1-T2V-1.3B", 50, 5.0, ()),
        ("Wan2.1-T2V-14B", 50, 5.0, ()),
        ("Wan2.2-T2V-A14B", 40, 12.0, (0.875,)),
    ],
)
def test_sampling_defaults_are_those_of_the_released_models(name, steps, shift, boundary):
    sampler = load(composed(f"models={name}", "models.ckpt_dir=x")).models.sampler
    assert (sampler.sample_steps, sampler.sample_shift, sampler.boundary) == (steps, shift, boundary)


def test_no_node_of_the_composer_passes():
    def walk(value):
        assert not isinstance(value, DictConfig)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name))
        elif not isinstance(value, str | int | float | None):
            assert isinstance(value, tuple), type(value)

    walk(load(composed()))


def test_a_nested_dict_is_as_good_as_a_composed_configuration():
    plain = OmegaConf.to_container(composed())
    assert load(plain) == load(composed())


def test_a_loaded_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(composed()).infer.max_reqs = 2


def test_loading_leaves_the_composed_configuration_as_it_was():
    config = composed()
    before = OmegaConf.to_yaml(config)
    load(config)
    assert OmegaConf.to_yaml(config) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("infer.max_reqs", 0, r"infer\.max_reqs=0: must be at least 1"),
        ("infer.max_reqs", "many", r"infer\.max_reqs: .*many"),
        ("infer.dtype", "int8", r"infer\.dtype=int8: choose one of auto, bfloat16, float16, float32"),
        ("infer.compile", "maybe", r"infer\.compile=maybe: choose off, auto or on"),
        ("infer.use_cuda_graph", "2", r"infer\.use_cuda_graph=2: choose off, auto or on"),
        ("infer.warmup", ["832x480"], r"infer\.warmup=832x480: write WIDTHxHEIGHTxFRAMES"),
        ("infer.warmup", ["832x480x81", "800x450x81"], r"infer\.warmup=800x450x81: .*multiples of 16"),
        ("infer.warmup", ["832x480x80"], r"infer\.warmup=832x480x80: frames must be 4n \+ 1"),
        ("infer.vae_dtype", "float16", r"infer\.vae_dtype=float16: choose one of float32, bfloat16"),
        ("infer.vae_chunk", 0, r"infer\.vae_chunk=0: must be auto or a whole number, at least 1"),
        ("infer.vae_chunk", "all", r"infer\.vae_chunk=all: must be auto or a whole number, at least 1"),
        ("infer.op_impl", "npu", r"infer\.op_impl=npu: choose torch or cpu"),
        ("infer.schedule_policy", "fair", r"infer\.schedule_policy=fair: choose one of fifo"),
        ("infer.dp_size", 0, r"infer\.dp_size=0: must be at least 1"),
        ("infer.dp_size", "two", r"infer\.dp_size: .*two"),
        ("infer.tempo", 3, r"infer\.tempo: .*tempo"),
        ("infer.diffusion.cfg_size", 3, r"infer\.diffusion\.cfg_size=3: must be auto, 1 or 2"),
        ("infer.diffusion.cfg_size", 0, r"infer\.diffusion\.cfg_size=0: must be auto, 1 or 2"),
        ("infer.diffusion.cfg_size", "both", r"infer\.diffusion\.cfg_size=both: must be auto, 1 or 2"),
        ("infer.diffusion.cp_size", 0, r"infer\.diffusion\.cp_size=0: must be auto or a whole number"),
        ("infer.diffusion.cp_size", "-2", r"infer\.diffusion\.cp_size=-2: must be auto or a whole number"),
        ("infer.diffusion.cp_size", "all", r"infer\.diffusion\.cp_size=all: must be auto or a whole number"),
        ("infer.diffusion.up_limit", 0, r"infer\.diffusion\.up_limit=0: must be at least 1"),
        ("infer.vae_tile_px", 100, r"infer\.vae_tile_px=100: must be a multiple of 8, at least 64"),
        ("infer.vae_tile_px", 56, r"infer\.vae_tile_px=56: must be a multiple of 8, at least 64"),
        (
            "infer.vae_tile_stride_px",
            256,
            r"vae_tile_stride_px=256: must be .* below infer\.vae_tile_px",
        ),
        ("infer.vae_tile_stride_px", 0, r"infer\.vae_tile_stride_px=0: must be a multiple of 8"),
        (
            "infer.diffusion.low_mem_level",
            5,
            r"low_mem_level=5: must be auto or a whole number",
        ),
        (
            "infer.diffusion.low_mem_level",
            -1,
            r"low_mem_level=-1: must be auto or a whole number",
        ),
        (
            "infer.diffusion.low_mem_level",
            "all",
            r"low_mem_level=all: must be auto or a whole",
        ),
        ("infer.diffusion.stream_dtype", "int4", r"infer\.diffusion\.stream_dtype=int4: choose one of model"),
        ("infer.diffusion.stream_dtype", "float8_e4m3fn", r"stream_dtype=float8_e4m3fn: only .*level=4"),
        ("infer.diffusion.resident_gb", 3, r"infer\.diffusion\.resident_gb=3: at .*level=0 no block"),
        (
            "infer.diffusion.resident_gb",
            -1.5,
            r"infer\.diffusion\.resident_gb=-1\.5: must be auto or a number",
        ),
        (
            "infer.diffusion.resident_gb",
            "some",
            r"infer\.diffusion\.resident_gb=some: must be auto or a number",
        ),
        (
            "infer.diffusion.resident_gb",
            "nan",
            r"infer\.diffusion\.resident_gb=nan: must be auto or a number",
        ),
        ("infer.diffusion.flexcache_max_gb", 0, r"infer\.diffusion\.flexcache_max_gb=0\.0: must be above 0"),
        ("infer.diffusion.flexcache_max_gb", float("nan"), r"flexcache_max_gb=nan: must be above 0"),
        ("eval.eval_type", 3, r"eval\.eval_type=3: write a list of metrics"),
        ("eval.eval_type", ["psnr", 3], r"eval\.eval_type=\['psnr', 3\]: write a list of metrics"),
        ("eval.pairing", "sorted", r"eval\.pairing=sorted: choose one of match, ignore_steps, order"),
        ("quant", "int8", r"quant=int8: choose one of null, fp8"),
        ("output.root_dir", " ", r"output\.root_dir=' ': name a directory"),
        ("output.hydra_dump_mode", "keep", r"output\.hydra_dump_mode=keep: choose one of video_dir"),
        ("output.enable_run_log", "perhaps", r"output\.enable_run_log: .*perhaps"),
        ("models.ckpt_dir", "", r"models\.ckpt_dir='': name a directory or a repo id"),
        ("models.type", "diffusion-flux", r"models\.type=diffusion-flux: known: diffusion-wan"),
        ("models.task", "i2v", r"models\.task=i2v: only text to video"),
        ("models.sampler.sample_steps", 0, r"models\.sampler\.sample_steps=0: must be at least 1"),
        ("models.sampler.sample_shift", float("nan"), r"models\.sampler\.sample_shift=nan: must be a number"),
        ("models.sampler.guidance_scale", [1.0, 2.0], r"models\.sampler\.guidance_scale=.*needs 1 value"),
        ("models.sampler.guidance_scale", [float("inf")], r"models\.sampler\.guidance_scale=.*finite"),
        ("models.sampler.boundary", [1.5], r"models\.sampler\.boundary=.*between 0 and 1"),
        ("models.transformer.patch_size", "big", r"models\.transformer\.patch_size: "),
        ("models.name", "???", r"models\.name: .*[Mm]issing"),
        ("float_16bit_variant", "int4", r"float_16bit_variant=int4: choose one of"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(key, value, message):
    with pytest.raises(ValueError, match=message):
        load(changed(key, value))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], ()),
        (None, ()),
        ("none", ()),
        ("", ()),
        ("PSNR", ("psnr",)),
        ("psnr, ssim,psnr", ("psnr", "ssim")),
        (["Psnr", "none", "fvd"], ("psnr", "fvd")),
    ],
)
def test_metrics_may_be_named_in_every_documented_way(given, kept):
    assert load(changed("eval.eval_type", given)).eval.eval_type == kept


@pytest.mark.parametrize(("given", "kept"), [("off", "off"), ("false", "off"), ("true", "on"), ("ON", "on")])
def test_a_switch_may_be_given_as_yaml_reads_it(given, kept):
    infer = load(composed(f"infer.compile={given}", f"infer.use_cuda_graph={given}")).infer
    assert (infer.compile, infer.use_cuda_graph) == (kept, kept)


def test_sizes_to_warm_up_are_read_as_numbers():
    (size,) = load(composed("infer.warmup=[832x480x81]")).infer.warmup_sizes
    assert (size.width, size.height, size.num_frames, str(size)) == (832, 480, 81, "832x480x81")


def test_degrees_may_be_given_as_text():
    degrees = load(composed("infer.diffusion.cfg_size='2'", "infer.diffusion.cp_size='4'")).infer.diffusion
    assert (degrees.cfg_size, degrees.cp_size) == (2, 4)


def test_memory_may_be_given_as_text_and_is_read_as_numbers():
    words = ["low_mem_level='4'", "resident_gb='2.5'", "stream_dtype=float8_e4m3fn"]
    memory = load(composed(*(f"infer.diffusion.{word}" for word in words))).infer.diffusion
    assert (memory.level, memory.resident_bytes) == (4, 2_500_000_000)
    assert load(composed("infer.diffusion.low_mem_level=4")).infer.diffusion.resident_bytes == 0
    whole = load(composed("infer.diffusion.low_mem_level=4", "infer.diffusion.resident_gb=3")).infer.diffusion
    assert whole.resident_bytes == 3_000_000_000


def test_degrees_are_found_unless_they_are_given():
    infer = load(composed()).infer
    assert (infer.dp_size, infer.diffusion.cfg_size, infer.diffusion.cp_size) == (1, "auto", "auto")
    infer = load(composed("infer.dp_size=2", "infer.diffusion.up_limit=4")).infer
    assert (infer.dp_size, infer.diffusion.up_limit) == (2, 4)


@pytest.mark.parametrize(("key", "value"), [("height", 100), ("width", 0), ("num_frames", 16), ("fps", 0)])
def test_request_defaults_of_a_model_must_be_legal_requests(key, value):
    with pytest.raises(ValueError, match=rf"models\.video\.{key}={value}"):
        load(changed(f"models.video.{key}", value))


def test_a_model_trained_on_no_timesteps_is_refused():
    with pytest.raises(ValueError, match=r"models\.sampler\.num_train_timesteps=0"):
        load(changed("models.sampler.num_train_timesteps", 0))


def test_a_model_without_a_checkpoint_names_the_key_and_the_source():
    with pytest.raises(
        ValueError, match=r"models\.ckpt_dir=None: .*add models\.ckpt_dir=DIRECTORY .*https?://"
    ):
        load(composed("models=Wan2.1-T2V-1.3B"))


def test_random_weights_need_no_checkpoint():
    assert load(composed("models=Wan2.1-T2V-1.3B", "debug.skip_model_load=true")).debug.skip_model_load


def test_the_older_name_of_the_dtype_counts_and_must_not_contradict():
    assert load(composed("float_16bit_variant=float16")).dtype == "float16"
    assert load(composed("infer.dtype=float32")).dtype == "float32"
    with pytest.raises(ValueError, match=r"float_16bit_variant=float16: contradicts infer\.dtype=float32"):
        load(composed("float_16bit_variant=float16", "infer.dtype=float32"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("video.fps", 5000, r"video\.fps=5000: must be from 1 to 1000"),
        ("sampler.sample_steps", 1001, r"sample_steps=1001: must be at most .*num_train_timesteps=1000"),
        ("encoder.text_len", 0, r"encoder\.text_len=0: must be at least 1"),
        ("encoder.num_heads", 0, r"encoder\.num_heads=0: must be at least 1"),
        ("encoder.attention_dim", 100, r"encoder\.attention_dim=100: must be a multiple .*num_heads=6"),
        ("encoder.dim", 10, r"transformer\.text_dim=192: must be models\.encoder\.dim=10"),
        ("vae.base_dim", 0, r"vae\.base_dim=0: must be at least 1"),
        ("vae.z_dim", 8, r"vae\.z_dim=8: must be 16"),
        ("transformer.dim", -4, r"transformer\.dim=-4: must be at least 1"),
        ("transformer.dim", 252, r"transformer\.dim=252: must be an even multiple .*num_heads=4"),
        ("transformer.num_heads", 0, r"transformer\.num_heads=0: must be at least 1"),
        ("transformer.num_heads", 3, r"transformer\.dim=256: must be an even multiple .*num_heads=3"),
        ("transformer.freq_dim", 7, r"transformer\.freq_dim=7: must be even"),
        ("transformer.out_dim", 8, r"transformer\.out_dim=8: must be models\.transformer\.in_dim=16"),
        ("transformer.text_dim", 10, r"transformer\.text_dim=10: must be models\.encoder\.dim=192"),
        ("transformer.eps", 0, r"transformer\.eps=0\.0: must be a number above 0"),
        ("transformer.eps", float("nan"), r"transformer\.eps=nan: must be a number above 0"),
        ("transformer.patch_size", [], r"patch_size=\[\]: must be 1 frame, 1 or 2 rows"),
        ("transformer.patch_size", [1, 2], r"patch_size=\[1, 2\]: must be 1 frame, 1 or 2 rows"),
        ("transformer.patch_size", [1, 2, 0], r"patch_size=\[1, 2, 0\]: must be 1 frame, 1 or 2 rows"),
        ("transformer.patch_size", [2, 2, 2], r"patch_size=\[2, 2, 2\]: must be 1 frame, 1 or 2 rows"),
    ],
)
def test_sizes_that_no_network_can_have_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        load(changed(f"models.{key}", value))


def test_latents_of_transformer_and_vae_must_fit():
    config = changed("models.transformer.in_dim", 8)
    config.models.transformer.out_dim = 8
    with pytest.raises(ValueError, match=r"models\.transformer\.in_dim=8: must be models\.vae\.z_dim=16"):
        load(config)


@pytest.mark.parametrize("seed", [10**24, 2**63, -(2**63) - 1])
def test_a_seed_beyond_int64_is_refused(seed):
    with pytest.raises(ValueError, match=rf"infer\.seed={seed}: must lie between"):
        load(changed("infer.seed", seed))
    assert load(changed("infer.seed", 2**63 - 1)).infer.seed == 2**63 - 1


def test_the_other_name_of_the_switch_for_reuse_counts_and_must_not_contradict():
    assert not load(composed()).infer.diffusion.enable_flexcache
    assert load(composed("infer.enable_flexcache=true")).infer.diffusion.enable_flexcache
    assert not load(composed("infer.enable_flexcache=false")).infer.diffusion.enable_flexcache
    both = composed("infer.enable_flexcache=true", "infer.diffusion.enable_flexcache=true")
    assert load(both).infer.diffusion.enable_flexcache
    with pytest.raises(ValueError, match=r"infer\.enable_flexcache=false: contradicts infer\.diffusion"):
        load(composed("infer.enable_flexcache=false", "infer.diffusion.enable_flexcache=true"))
