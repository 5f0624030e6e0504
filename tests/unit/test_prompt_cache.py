"""The cache of text embeddings: what it gives back, and what it lets go of."""

import pytest
import torch
from engines import configured

from chitu_diffusion.prompt_cache import PromptCache

ROW_BYTES = 8 * 2  # of an embedding of 8 bf16 numbers


def key(text):
    return tuple(text.encode())


def embeddings(rows, value=1.0):
    return torch.full((rows, 8), value, dtype=torch.bfloat16)


def filled(limit_rows, **prompts):
    cache = PromptCache(limit_rows * ROW_BYTES)
    for text, rows in prompts.items():
        cache.put(key(text), embeddings(rows))
    return cache


def kept(cache, texts):
    return [text for text in texts if cache.get(key(text)) is not None]


def test_what_was_put_comes_back_bit_for_bit():
    cache, given = PromptCache(1000), torch.randn(3, 8).bfloat16()
    cache.put(key("a cat"), given)
    found = cache.get(key("a cat"))
    assert found is not None
    assert torch.equal(found, given)


def test_a_copy_is_kept_that_holds_no_larger_tensor():
    cache, batch = PromptCache(1000), torch.ones(4, 3, 8)
    cache.put(key("a cat"), batch[0])
    batch.zero_()
    found = cache.get(key("a cat"))
    assert found is not None
    assert found.eq(1).all()
    assert found.untyped_storage().nbytes() == found.nbytes


def test_texts_that_differ_in_a_space_are_two():
    assert kept(filled(10, cat=1), ["cat", "cat "]) == ["cat"]


def test_what_was_used_longest_ago_goes_first():
    cache = filled(3, a=1, b=1, c=1)
    cache.get(key("a"))
    cache.put(key("d"), embeddings(1))
    assert kept(cache, "abcd") == ["a", "c", "d"]


def test_as_many_go_as_a_new_one_needs():
    cache = filled(4, a=1, b=1, c=1)
    cache.put(key("d"), embeddings(3))
    assert kept(cache, "abcd") == ["c", "d"]
    assert cache.num_bytes == 4 * ROW_BYTES


def test_what_is_too_large_by_itself_drops_nothing():
    cache = filled(3, a=1, b=1)
    cache.put(key("c"), embeddings(4))
    assert kept(cache, "abc") == ["a", "b"]


def test_a_key_that_is_put_again_counts_once():
    cache = filled(3, a=1, b=1)
    cache.put(key("a"), embeddings(2, value=2.0))
    found = cache.get(key("a"))
    assert found is not None
    assert found.eq(2).all()
    assert (len(cache), cache.num_bytes) == (2, 3 * ROW_BYTES)


def test_bytes_stay_below_the_limit_over_many_prompts():
    cache = PromptCache(50 * ROW_BYTES)
    for index in range(500):
        cache.put(key(f"prompt {index % 70}"), embeddings(1 + index % 7))
        assert cache.num_bytes <= cache.limit_bytes
    assert cache.num_bytes == sum(entry.nbytes for entry in cache._entries.values())


def test_a_limit_of_nothing_keeps_nothing():
    cache = filled(0, a=1)
    assert (kept(cache, "a"), len(cache)) == ([], 0)


def test_hits_and_misses_are_counted():
    cache = filled(3, a=1)
    kept(cache, ["a", "b", "a"])
    assert (cache.hits, cache.misses) == (2, 1)


def test_clearing_leaves_nothing():
    cache = filled(3, a=1, b=1)
    cache.clear()
    assert (len(cache), cache.num_bytes, kept(cache, "ab")) == (0, 0, [])


def test_a_limit_below_nothing_is_refused():
    with pytest.raises(ValueError, match="prompt_cache_mb"):
        PromptCache(-1)


def test_the_configuration_keeps_a_quarter_of_a_gigabyte():
    assert configured().infer.prompt_cache_mb == 256
    assert configured("infer.prompt_cache_mb=0").infer.prompt_cache_mb == 0


def test_the_configuration_refuses_a_limit_below_nothing():
    with pytest.raises(ValueError, match=r"infer\.prompt_cache_mb=-1: must be 0 or more"):
        configured("infer.prompt_cache_mb=-1")
