"""From a prompt to token ids: clean the text as Wan does, split it into tokens, end with </s>.

No padding: the encoder runs on the tokens alone. tokenizer.json is read by the `tokenizers` package, which
needs no class name; a folder that holds only spiece.model goes through transformers.
"""

import html
from dataclasses import dataclass
from pathlib import Path

import ftfy
from tokenizers import Tokenizer

PAD_ID = 0
END_ID = 1


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token `ids`, the last one </s>, and the number of tokens cut off before it because they did not fit."""

    ids: tuple[int, ...]
    num_dropped: int


class PromptTokenizer:
    """The tokenizer in `folder`, for prompts of at most `max_length` tokens, </s> included.

    Raises ValueError when the folder holds no readable tokenizer, or one that does not fit a text encoder of
    `vocab_size` rows with <pad> at 0 and </s> at 1.
    """

    def __init__(self, folder: Path, max_length: int, vocab_size: int) -> None:
        assert max_length >= 1, "there must be room for </s>"
        self.max_length = max_length
        self._tokenizer = _load(folder)
        _check(self._tokenizer, folder, vocab_size)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> TokenizedPrompt:
        """Clean and split `text`; a long prompt is cut so that </s> stays the last of `max_length` ids."""
        ids = self._tokenizer.encode(clean(text), add_special_tokens=False).ids
        kept = ids[: self.max_length - 1]
        return TokenizedPrompt(ids=(*kept, END_ID), num_dropped=len(ids) - len(kept))


def clean(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities twice, make every run of white space one space.

    Source: `whitespace_clean(basic_clean(text))` of the official Wan tokenizer.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def _load(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _load_json(folder / "tokenizer.json")
    if (folder / "spiece.model").is_file():
        return _load_sentencepiece(folder)
    raise ValueError(
        f"no tokenizer in {folder}: it holds neither tokenizer.json nor spiece.model; download the "
        "checkpoint's tokenizer files, or correct models.ckpt_dir"
    )


def _load_json(path: Path) -> Tokenizer:
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"cannot read the tokenizer {path}: {error}; download the file again") from error
    return tokenizer


def _load_sentencepiece(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # seconds to import, and seldom needed

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"cannot convert {folder / 'spiece.model'}; put the checkpoint's tokenizer.json beside it, or "
            f"install sentencepiece and protobuf: {error}"
        ) from error
    return tokenizer


def _check(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    remedy = f"{folder} is the wrong tokenizer for this text encoder; take the one of the same checkpoint"
    for token, expected in (("<pad>", PAD_ID), ("</s>", END_ID)):
        actual = tokenizer.token_to_id(token)
        if actual != expected:
            raise ValueError(f"{token} must have id {expected}, got {actual}: {remedy}")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"token ids go up to {largest}, but the text encoder has {vocab_size} rows: {remedy}"
        )
