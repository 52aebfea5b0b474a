"""The block pool: nothing lost, nothing given twice, prefixes found while they are there, the oldest evicted first."""

from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.text.kv_cache import KVCache, root_hash


def hashes_of(cache: KVCache, token_ids, salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    cache.extend_hashes(hashes, token_ids, salt)
    return hashes


def computed(cache: KVCache, token_ids, salt: str = "") -> list[int]:
    """The block table of a sequence that has computed these tokens and published its full blocks."""
    hashes = hashes_of(cache, token_ids, salt)
    cached = cache.find(hashes)
    blocks = cache.allocate(cached, -(-len(token_ids) // cache.block_size) - len(cached))
    assert blocks is not None
    for block, key in zip(blocks, hashes):
        cache.publish(block, key)
    return list(blocks)


def test_hash_of_a_block_covers_everything_before_it():
    cache = KVCache(4, block_size=2)
    first = sha256(root_hash(salt="s") + (7).to_bytes(4, "little") + (8).to_bytes(4, "little")).digest()
    second = sha256(first + (9).to_bytes(4, "little") + (1).to_bytes(4, "little")).digest()
    assert hashes_of(cache, [7, 8, 9, 1, 5], "s") == [first, second]


@given(tokens=st.lists(st.integers(0, 2**31 - 1), max_size=40), cut=st.integers(0, 40), block_size=st.integers(1, 5))
def test_hashing_in_pieces_gives_the_same_chain(tokens, cut, block_size):
    cache = KVCache(1, block_size)
    hashes = hashes_of(cache, tokens[:cut])
    cache.extend_hashes(hashes, tokens, "")
    assert hashes == hashes_of(cache, tokens)
    assert len(hashes) == len(tokens) // block_size


def test_salts_and_other_extras_cannot_pose_as_each_other():
    roots = [
        root_hash(),
        root_hash(salt=""),
        root_hash(salt="a"),
        root_hash(adapter="a"),
        root_hash(adapter="a", salt=""),
        root_hash(adapter="", salt="a"),
        root_hash(salt="adaptera"),
    ]
    assert len(set(roots)) == len(roots)


def test_prefix_is_shared_between_equal_salts_only():
    cache = KVCache(8, block_size=2)
    blocks = computed(cache, [1, 2, 3, 4], "tenant")
    assert cache.find(hashes_of(cache, [1, 2, 3, 4, 5, 6], "tenant")) == blocks
    assert cache.find(hashes_of(cache, [1, 2, 3, 4, 5, 6], "other")) == []


def test_prefix_ends_at_the_first_unknown_block():
    cache = KVCache(8, block_size=2)
    blocks = computed(cache, [1, 2, 3, 4, 5, 6])
    assert cache.find(hashes_of(cache, [1, 2, 9, 9, 5, 6])) == blocks[:1]


def test_freed_blocks_answer_until_they_are_taken():
    cache = KVCache(4, block_size=2)
    hashes = hashes_of(cache, [1, 2, 3, 4])
    blocks = computed(cache, [1, 2, 3, 4])
    cache.free(blocks)
    assert cache.num_free == 4
    assert cache.find(hashes) == blocks
    cache.allocate([], 3)
    assert cache.find(hashes) == blocks[:1], "what follows goes before its prefix"
    cache.allocate([], 1)
    assert cache.find(hashes) == []


def test_blocks_without_content_are_taken_first_then_the_longest_idle():
    cache = KVCache(6, block_size=2)
    old, new = computed(cache, [1, 2, 3, 4]), computed(cache, [5, 6, 7, 8])
    empty = cache.allocate([], 2)
    for blocks in old, new, empty:
        cache.free(blocks)
    assert list(cache.allocate([], 6)) == [*empty, *reversed(old), *reversed(new)]


def test_a_hit_makes_a_block_young_again():
    cache = KVCache(4, block_size=2)
    old, new = computed(cache, [1, 2]), computed(cache, [3, 4])
    cache.free(old)
    cache.free(new)
    cache.free(cache.allocate(old, 0))
    assert list(cache.allocate([], 4)[2:]) == [*new, *old]


def test_allocation_that_does_not_fit_takes_nothing():
    cache = KVCache(4, block_size=2)
    blocks = computed(cache, [1, 2, 3, 4])
    cache.free(blocks)
    assert cache.allocate(blocks, 3) is None
    assert cache.allocate(blocks, 2, reserve=1) is None
    assert cache.num_free == 4
    assert cache.find(hashes_of(cache, [1, 2, 3, 4])) == blocks


def test_hits_in_use_cost_no_free_block():
    cache = KVCache(3, block_size=2)
    blocks = computed(cache, [1, 2, 3, 4])
    assert list(cache.allocate(blocks, 1)) == [*blocks, 2]
    assert cache.num_unshared([blocks]) == 0


def test_equal_blocks_are_not_merged_and_the_one_in_use_answers():
    cache = KVCache(4, block_size=2)
    hashes = hashes_of(cache, [1, 2])
    (first,), (second,) = cache.allocate([], 1), cache.allocate([], 1)
    cache.publish(first, hashes[0])
    cache.publish(second, hashes[0])
    assert cache.find(hashes) == [first]
    cache.free([first])
    cache.publish(second, hashes[0])
    assert cache.find(hashes) == [second]
    assert list(cache.allocate([], 1)) == [first], "the idle copy is worth nothing any more"


def test_without_prefix_caching_nothing_is_hashed():
    assert hashes_of(KVCache(4, block_size=2, enable_prefix_caching=False), range(8)) == []


@pytest.mark.parametrize("num_blocks, block_size", [(0, 16), (4, 0)])
def test_impossible_sizes_are_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="at least 1"):
        KVCache(num_blocks, block_size)


@given(data=st.data(), num_blocks=st.integers(1, 12))
def test_every_block_is_in_use_or_free_and_every_prefix_found_has_its_content(data, num_blocks):
    """Random tables over a small alphabet, against a model that only knows contents and references."""
    cache = KVCache(num_blocks, block_size=1)
    content: dict[int, tuple[int, ...]] = {}
    tables: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if tables and data.draw(st.booleans()):
            cache.free(tables.pop(data.draw(st.integers(0, len(tables) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))
            hashes = hashes_of(cache, tokens)
            cached = cache.find(hashes[: len(tokens) - 1])
            assert [content[block] for block in cached] == [tuple(tokens[: i + 1]) for i in range(len(cached))]
            num_idle = len(set(cached) - {block for table in tables for block in table})
            fits = num_idle + len(tokens) - len(cached) <= cache.num_free
            blocks = cache.allocate(cached, len(tokens) - len(cached))
            assert (blocks is not None) == fits
            if blocks is not None:
                own = blocks[len(cached) :]
                assert not set(own) & {block for table in tables for block in table}, "an own block is nobody else's"
                content.update({block: tuple(tokens[: i + 1]) for i, block in enumerate(blocks)})
                tables.append(blocks)
                for block, key in zip(blocks, hashes):
                    cache.publish(block, key)
        references = Counter(block for table in tables for block in table)
        assert cache.num_free == num_blocks - len(references)
        for table in tables:
            assert cache.num_unshared([table]) == sum(references[block] == 1 for block in table)
    for table in tables:
        cache.free(table)
    assert sorted(cache.allocate([], num_blocks)) == list(range(num_blocks))


def test_forks_share_all_blocks_and_copy_only_the_last():
    cache = KVCache(8, block_size=2)
    parent = cache.allocate([], 3)
    child = cache.fork(parent)
    assert child == parent and child is not parent
    assert cache.num_free == 5 and cache.num_unshared([parent]) == 0 and cache.num_unshared([parent, child]) == 3
    child = cache.own_last(child)
    assert child[:-1] == parent[:-1] and child[-1] not in parent
    assert cache.num_references(parent[-1]) == cache.num_references(child[-1]) == 1
    cache.free(parent)
    assert cache.num_free == 5
    cache.free(child)
    assert cache.num_free == 8
