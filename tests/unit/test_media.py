"""VideoWriter, write_json and unique_path: what is read back, and what stays behind when writing fails."""

import dataclasses
import errno
import io
import json
import math
import random
import resource
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch

from chitu_diffusion.media import VideoWriter, to_pixels, unique_path, write_json, write_text

SIZE = (64, 48)  # (width, height)


def smooth_video(frame_num, device="cpu"):
    """[3, n, H, W] in [-1, 1]: a slow, moving colour ramp, as chroma subsampling blurs anything finer."""
    width, height = SIZE
    x = torch.linspace(-1, 1, width, device=device).expand(frame_num, height, width)
    y = torch.linspace(-1, 1, height, device=device)[:, None].expand(frame_num, height, width)
    t = torch.linspace(-0.5, 0.5, frame_num, device=device)[:, None, None].expand(frame_num, height, width)
    return torch.stack([0.8 * x, 0.8 * y, t])


def expected_pixels(frames):
    return ((frames.cpu() + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).float()


def read(path):
    return torch.from_numpy(iio.imread(path, plugin="pyav")).float()


def test_a_video_put_in_pieces_reads_back_whole(tmp_path):
    frames = smooth_video(9)
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE) as writer:
        for piece in (frames[:, :1], frames[:, 1:5], frames[:, 5:]):
            writer.put(piece)
    actual = read(tmp_path / "a.mp4")
    assert actual.shape == (9, 48, 64, 3)
    # measured 1.64: the reader's fast conversion from YUV darkens by 1.2; BT.709's matrix gives 6.0
    assert (actual - expected_pixels(frames)).abs().mean() < 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_the_file_is_tagged_h264_in_mp4_with_its_colours(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE) as writer:
        writer.put(smooth_video(3))
    with av.open(tmp_path / "a.mp4") as container:
        codec = container.streams.video[0].codec_context
        assert "mp4" in container.format.name
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 6, 1)


def test_luma_is_that_of_bt601_in_limited_range(tmp_path):
    frames = smooth_video(5)
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE) as writer:
        writer.put(frames)
    with av.open(tmp_path / "a.mp4") as container:
        planes = [torch.from_numpy(frame.to_ndarray()[:48]).float() for frame in container.decode(video=0)]
    expected = 16 + expected_pixels(frames) @ torch.tensor([0.299, 0.587, 0.114]) * 219 / 255
    # measured 0.42: rounding to whole numbers 0.25, crf 10 the rest; BT.709's matrix is off by 6.7
    assert (torch.stack(planes) - expected).abs().mean() < 0.75


@pytest.mark.parametrize(
    ("fps", "expected"), [(16, 16), (24.0, 24), (30000 / 1001, 30000 / 1001), (0.5, 0.5)]
)
def test_the_frame_rate_is_kept(tmp_path, fps, expected):
    with VideoWriter(tmp_path / "a.mp4", fps, SIZE) as writer:
        writer.put(smooth_video(4))
    with av.open(tmp_path / "a.mp4") as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(expected, rel=1e-6)  # mp4 stores whole ticks
        assert stream.frames == 4


def test_one_frame_is_a_video(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)
    writer.put(smooth_video(1))
    assert writer.close() == tmp_path / "a.mp4"
    assert read(tmp_path / "a.mp4").shape == (1, 48, 64, 3)


def test_values_are_clamped_and_truncated_to_bytes(tmp_path, monkeypatch):
    pictures = []
    real = av.VideoFrame.from_ndarray

    def spy(picture, format):
        pictures.append(torch.from_numpy(picture.copy()))
        return real(picture, format=format)

    monkeypatch.setattr(
        "chitu_diffusion.media.av.VideoFrame", type("Spy", (), {"from_ndarray": staticmethod(spy)})
    )
    frames = torch.full((3, 1, 48, 64), 0.999)  # 254.87 truncates to 254
    frames[0], frames[1] = -7.0, 7.0
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE) as writer:
        writer.put(frames)
    assert pictures[0][0, 0].tolist() == [0, 255, 254]


def test_pixels_are_written_as_the_frames_that_they_were(tmp_path):
    frames = smooth_video(5)
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE) as writer:
        writer.put(frames)
    with VideoWriter(tmp_path / "b.mp4", 16, SIZE) as writer:
        writer.put(to_pixels(frames))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_name_that_is_taken_while_a_video_is_made_is_left_alone(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr("chitu_diffusion.media.os.link", refuse_link)
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE, keeps_existing=True) as writer:
        writer.put(smooth_video(1))
        (tmp_path / "a.mp4").write_text("of another process")
        path = writer.close()
    assert path == tmp_path / "a_2.mp4"
    assert (tmp_path / "a.mp4").read_text() == "of another process"
    assert read(path).shape == (1, 48, 64, 3)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.mp4", "a_2.mp4"]


def test_a_name_that_a_record_has_is_left_alone(tmp_path):
    (tmp_path / "a.json").touch()
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE, keeps_existing=True) as writer:
        writer.put(smooth_video(1))
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.json", "a_2.mp4"]


def refuse_link(source, target):
    raise PermissionError(1, "Operation not permitted", source, None, target)


def test_frames_in_half_precision_are_accepted(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16, SIZE) as writer:
        writer.put(smooth_video(2).bfloat16())
    assert read(tmp_path / "a.mp4").shape[0] == 2


def test_closing_twice_and_aborting_after_close_change_nothing(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)
    writer.put(smooth_video(1))
    assert writer.close() == writer.close()
    writer.abort()
    assert (tmp_path / "a.mp4").exists()


def test_an_existing_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    (tmp_path / "a.mp4").write_text("old")
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)
    writer.put(smooth_video(2))
    assert (tmp_path / "a.mp4").read_text() == "old"
    writer.close()
    assert read(tmp_path / "a.mp4").shape[0] == 2


def test_abort_leaves_nothing(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)
    for _ in range(5):
        writer.put(smooth_video(4))
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def decode_and_fail(path):
    with VideoWriter(path, 16, SIZE) as writer:
        writer.put(smooth_video(2))
        raise RuntimeError("out of memory")


def test_an_exception_while_decoding_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        decode_and_fail(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_video_without_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no frame.*a\.mp4"), VideoWriter(tmp_path / "a.mp4", 16, SIZE):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_thread_surfaces_in_a_later_put_with_the_path(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(VideoWriter, "_encode", full)
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)

    def put_three():  # the third uses the buffer of the first, so that it hears of it at the latest
        for _ in range(3):
            writer.put(smooth_video(1))

    with pytest.raises(OSError, match=r"No space left on device.*a\.mp4") as caught:
        put_three()
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.FileIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_refuses_every_byte_surfaces_at_close(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)
    writer.put(smooth_video(2))
    with pytest.raises(OSError, match=r"No space left on device.*a\.mp4"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_by_the_kernel_leaves_nothing(tmp_path):
    torch.manual_seed(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, hard)
    )  # EFBIG takes the same way as ENOSPC, and needs no root
    try:
        with (
            pytest.raises(OSError, match=r"File too large.*a\.mp4"),
            VideoWriter(tmp_path / "a.mp4", 16, SIZE) as writer,
        ):
            writer.put(torch.rand(3, 40, 48, 64) * 2 - 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_turns_out_to_be_a_directory_is_named_and_left_alone(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)
    writer.put(smooth_video(1))
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OSError, match=r"a\.mp4"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_an_encoder_that_fails_in_any_other_way_is_heard_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(VideoWriter, "_encode", lambda *_: 1 / 0)
    writer = VideoWriter(tmp_path / "a.mp4", 16, SIZE)
    writer.put(smooth_video(1))
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_size_are_our_mistake_and_leave_nothing(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 16, (32, 32))
    with pytest.raises(AssertionError):
        writer.put(smooth_video(1))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, 1e9])
def test_a_bad_frame_rate_is_refused(tmp_path, fps):
    with pytest.raises(ValueError, match="fps must be"):
        VideoWriter(tmp_path / "a.mp4", fps, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_an_odd_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size must be even"):
        VideoWriter(tmp_path / "a.mp4", 16, (65, 48))


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    path = tmp_path / ("n" * 251 + ".mp4")
    with VideoWriter(path, 16, SIZE) as writer:
        writer.put(smooth_video(1))
    assert path.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_frames_on_the_gpu_give_the_same_file_as_on_the_cpu(tmp_path):
    frames = smooth_video(24)
    for name, device in (("cpu.mp4", "cpu"), ("cuda.mp4", "cuda")):
        with VideoWriter(tmp_path / name, 16, SIZE) as writer:
            for start in range(0, 24, 3):
                writer.put(frames[:, start : start + 3].to(device))
    assert torch.equal(read(tmp_path / "cpu.mp4"), read(tmp_path / "cuda.mp4"))


@dataclasses.dataclass(frozen=True)
class Inner:
    path: Path
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    prompt: str
    inner: Inner | None


def test_write_json_writes_nested_dataclasses_as_readable_utf8(tmp_path):
    write_json(tmp_path / "a.json", Record("一只猫 \udcff", Inner(Path("/x"), (1.5, 2))))
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "一只猫" in text
    assert text.startswith("{\n  ")
    assert json.loads(text) == {"prompt": "一只猫 \udcff", "inner": {"path": "/x", "values": [1.5, 2]}}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("record", "error"), [({"a": math.nan}, ValueError), ({"a": object()}, TypeError)])
def test_write_json_refuses_what_is_not_json_and_keeps_the_old_file(tmp_path, record, error):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(error):
        write_json(tmp_path / "a.json", record)
    assert (tmp_path / "a.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_keeps_the_old_text(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("old")
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.yaml", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.yaml").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_unique_path_names_a_free_neighbour(tmp_path):
    path = tmp_path / "a.b_seed1.mp4"
    assert unique_path(path) == path
    path.touch()
    assert unique_path(path) == tmp_path / "a.b_seed1_2.mp4"
    (tmp_path / "a.b_seed1_2.mp4").symlink_to("nowhere")
    assert unique_path(path) == tmp_path / "a.b_seed1_3.mp4"


def test_the_same_frames_make_the_same_file(tmp_path):
    """Whatever lay in the memory that the encoder gets; with AVX-512 that showed in noisy frames."""
    chance, garbage, files = random.Random(0), [], set()
    noise = torch.randn(3, 17, 96, 160, generator=torch.Generator().manual_seed(3))
    frames = to_pixels(torch.linspace(-1, 1, 160).expand_as(noise) + 0.1 * noise)
    for _ in range(24):
        garbage.append(np.full(chance.randint(100, 200_000), chance.randint(0, 255), np.uint8))
        if len(garbage) > 3:
            garbage.pop(chance.randrange(3))
        with VideoWriter(tmp_path / "clip.mp4", 16, (160, 96)) as writer:
            writer.put(frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1
