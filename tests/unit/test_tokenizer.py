"""Cleaning and splitting of prompts, and the refusal of tokenizers that do not belong to the text encoder."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

import chitu_diffusion
from chitu_diffusion.encoders.tokenizer import PromptTokenizer, clean

DEMO = Path(chitu_diffusion.__path__[0]) / "demo" / "tokenizer"
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")
WORDS = ("▁a", "▁red", "▁blue", "▁circle", "▁square", "▁")
PROMPTS = [
    "a red circle moves right on a blue background",
    "A small yellow ring moves slowly down and to the left.",
    "  white\n\tspace \u3000 everywhere  ",
    "Ünïcode, 你好, émoji 🎬 and words never seen: zebra",
    "Tom &amp;amp; Jerry &lt;3 â€œquotedâ€\x9d",
    "a </s> inside",
    "",
]


def write_tokenizer(folder: Path, special=SPECIAL, words=WORDS) -> Tokenizer:
    vocab = [(token, 0.0) for token in special] + [(word, -float(i + 1)) for i, word in enumerate(words)]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


# cleaning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\t red \n\n circle  ", "a red circle"),
        ("a\u00a0red\u3000circle\u2028moves", "a red circle moves"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("<b> &amp;amp;amp;", "<b> &amp;"),  # twice; without the "<" ftfy resolves one more
        ("&amp;nbsp;x&nbsp;", "x"),  # white space born from an entity goes too
        ("cafÃ© rÃ©al", "café réal"),
        ("“curly” quotes", '"curly" quotes'),
        ("A Red CIRCLE", "A Red CIRCLE"),
        ("色调艳丽，过曝", "色调艳丽,过曝"),  # ftfy makes full-width punctuation half-width, as in training
        ("", ""),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


# the demo tokenizer


@pytest.mark.parametrize("text", PROMPTS)
def test_ids_of_the_demo_equal_those_of_transformers(text):
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(DEMO)(clean(text), add_special_tokens=True).input_ids
    prompt = PromptTokenizer(DEMO, 512, 384).encode(text)
    assert (list(prompt.ids), prompt.num_dropped) == (expected, 0)


@pytest.mark.parametrize("max_length", [1, 2, 5])
def test_a_long_prompt_is_cut_as_transformers_cuts_it(max_length):
    from transformers import AutoTokenizer

    text = PROMPTS[0]
    full = PromptTokenizer(DEMO, 512, 384).encode(text)
    prompt = PromptTokenizer(DEMO, max_length, 384).encode(text)
    expected = AutoTokenizer.from_pretrained(DEMO)(text, truncation=True, max_length=max_length).input_ids
    assert (list(prompt.ids), prompt.num_dropped) == (expected, len(full.ids) - max_length)


# tokenizers built here


def test_ids_end_in_the_end_token_whatever_the_file_says_of_padding_and_truncation(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    tokenizer.enable_padding(length=32)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt = PromptTokenizer(tmp_path, 8, 10).encode("a red  circle a blue square")
    assert (prompt.ids, prompt.num_dropped) == ((4, 5, 7, 4, 6, 8, 1), 0)


def test_an_empty_prompt_is_the_end_token_alone(tmp_path):
    write_tokenizer(tmp_path)
    assert PromptTokenizer(tmp_path, 8, 10).encode(" \n ").ids == (1,)


@pytest.mark.parametrize("extra", [0, 1, 4])
def test_exactly_the_tokens_beyond_the_limit_are_dropped(tmp_path, extra):
    write_tokenizer(tmp_path)
    prompt = PromptTokenizer(tmp_path, 8, 10).encode("red " * (7 + extra))
    assert (prompt.ids, prompt.num_dropped) == ((5,) * 7 + (1,), extra)


def test_a_broken_surrogate_is_an_unknown_token(tmp_path):
    write_tokenizer(tmp_path)
    assert PromptTokenizer(tmp_path, 8, 10).encode("red \ud800").ids[0] == 5


# refusals


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"no tokenizer in {tmp_path}: .*models.ckpt_dir"):
        PromptTokenizer(tmp_path, 512, 384)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_an_unreadable_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the tokenizer {tmp_path}.*download the file again"):
        PromptTokenizer(tmp_path, 512, 384)


def test_more_ids_than_rows_of_the_encoder_are_refused(tmp_path):
    write_tokenizer(tmp_path)
    PromptTokenizer(tmp_path, 512, 10)
    with pytest.raises(
        ValueError, match=f"go up to 9, .* 9 rows: {tmp_path} is the wrong tokenizer for this text"
    ):
        PromptTokenizer(tmp_path, 512, 9)


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (("<s>", "</s>", "<unk>", "<pad>"), "<pad> must have id 0, got 3"),
        (("<pad>", "<s>", "<unk>", "</s>"), "</s> must have id 1, got 3"),
        (("[PAD]", "</s>", "<unk>", "<s>"), "<pad> must have id 0, got None"),
    ],
)
def test_special_tokens_at_other_ids_are_refused(tmp_path, special, message):
    write_tokenizer(tmp_path, special)
    with pytest.raises(
        ValueError, match=f"{message}: {tmp_path} is the wrong tokenizer for this text encoder"
    ):
        PromptTokenizer(tmp_path, 512, 384)


@pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed"
)
def test_a_sentencepiece_file_alone_names_the_package_that_is_missing(tmp_path):
    shutil.copy(DEMO / "spiece.model", tmp_path)
    with pytest.raises(ValueError, match=f"cannot convert {tmp_path}/spiece.model; .*install sentencepiece"):
        PromptTokenizer(tmp_path, 512, 384)


def test_a_sentencepiece_file_alone_gives_the_ids_of_the_json_file(tmp_path):
    pytest.importorskip("sentencepiece")
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEMO / name, tmp_path)
    sentencepiece, json = PromptTokenizer(tmp_path, 512, 384), PromptTokenizer(DEMO, 512, 384)
    assert sentencepiece.encode(PROMPTS[0]) == json.encode(PROMPTS[0])
