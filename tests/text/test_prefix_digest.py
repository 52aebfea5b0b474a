"""The digest of cached prefixes, and a gateway's copy of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.prefix_view import PrefixView, prompt_keys
from serve.text.kv_cache import KVCache
from serve.text.prefix_digest import PrefixDigest


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + b"rest of the hash"


def follow(view: PrefixView, digest: PrefixDigest, mark: int | None) -> int | None:
    change = digest.since(mark)
    if change is None:
        return mark
    view.change(digest.block_size, is_whole=change.is_whole, added=change.added, removed=change.removed)
    return change.mark


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.booleans())), st.integers(1, 5))
def test_a_copy_follows_whenever_it_asks(changes, max_changes):
    digest, view, mark = PrefixDigest(16, max_changes=max_changes), PrefixView(), None
    expected: set[int] = set()
    for number, comes, asks in changes:
        (digest.add if comes else digest.discard)(key(number))
        (expected.add if comes else expected.discard)(number)
        if asks:
            mark = follow(view, digest, mark)
            assert view.keys == expected
    follow(view, digest, mark)
    assert view.keys == expected


def test_nothing_is_told_twice():
    digest = PrefixDigest(16)
    digest.add(key(1))
    change = digest.since(None)
    assert change is not None and change.is_whole and digest.since(change.mark) is None
    digest.add(key(1))
    assert digest.since(change.mark) is None


def test_a_full_digest_keeps_its_oldest():
    digest, view = PrefixDigest(16, max_keys=2), PrefixView()
    for number in (1, 2, 3):
        digest.add(key(number))
    mark = follow(view, digest, None)
    assert view.keys == {1, 2}
    digest.discard(key(1))
    digest.add(key(4))
    follow(view, digest, mark)
    assert view.keys == {2, 4}


def test_the_cache_tells_what_a_prompts_keys_find():
    digest, view = PrefixDigest(4), PrefixView()
    cache = KVCache(num_blocks=2, block_size=4, digest=digest)
    prompt, hashes = [*range(9)], []
    cache.extend_hashes(hashes, prompt, "salt")
    blocks = cache.allocate([], 2)
    for block, block_hash in zip(blocks, hashes, strict=True):
        cache.publish(block, block_hash)
    mark = follow(view, digest, None)
    assert prompt_keys(prompt, 4, "salt") == [
        number for number in prompt_keys(prompt, 4, "salt") if number in view.keys
    ]
    assert len(view.keys) == 2 and not view.keys & {*prompt_keys(prompt, 4, "other")}
    cache.free(blocks)
    cache.allocate([], 1)  # takes the last block of the prefix
    follow(view, digest, mark)
    assert view.keys == {prompt_keys(prompt, 4, "salt")[0]}


def test_the_last_position_is_never_answered_by_a_cache():
    assert len(prompt_keys(range(8), 4, "")) == 1 and len(prompt_keys(range(9), 4, "")) == 2
