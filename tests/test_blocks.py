"""Packed tokens by index, over files' boundaries, in an order that follows from the seed and the step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttl_utils.blocks import TokenBlocks, TokenWriter, step_indices
from ttl_utils.errors import DamagedFile, TTLError
from ttl_utils.pretraining import block_steps, token_blocks

DOCUMENTS = st.lists(st.lists(st.integers(0, 65_535), max_size=12), max_size=12)


def write(folder, documents, shard_tokens=10, side="train"):
    writer = TokenWriter(folder, side, shard_tokens)
    for ids in documents:
        writer.add(ids)
    return writer, writer.close()


@given(DOCUMENTS, st.integers(1, 20), st.integers(1, 9), st.data())
@settings(max_examples=200, deadline=None)
def test_blocks_are_a_plain_list_cut_up(tmp_path_factory, documents, shard_tokens, block_size, data):
    writer, paths = write(tmp_path_factory.mktemp("tokens"), documents, shard_tokens)
    tokens = [index for ids in documents for index in ids]
    assert writer.totals == {"tokens": len(tokens), "documents": len(documents)}
    # in whatever order the paths come
    blocks = TokenBlocks(data.draw(st.permutations(paths)), block_size)
    assert blocks.tokens == len(tokens) and len(blocks) == len(tokens) // block_size
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(tokens))] * 2)))
    assert blocks.span(start, stop).tolist() == tokens[start:stop]
    assert blocks.span(start, stop).dtype == np.int64
    cut = [tokens[n : n + block_size] for n in range(0, len(tokens), block_size)]
    assert [blocks.block(n).tolist() for n in range(len(blocks))] == cut[: len(blocks)]
    assert [token for n in range(len(blocks)) for token in blocks.block(n)] + blocks.remainder().tolist() == tokens
    if len(blocks):
        order = data.draw(st.lists(st.integers(0, len(blocks) - 1), min_size=1, max_size=5))
        assert blocks.batch(order).tolist() == [cut[n] for n in order]


@given(DOCUMENTS, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_documents_begin_where_the_starts_say_and_straddle_no_file(tmp_path_factory, documents, shard_tokens):
    _, paths = write(tmp_path_factory.mktemp("tokens"), documents, shard_tokens)
    read = []
    for path in paths[::2]:
        ids, starts = np.fromfile(path, dtype="<u2"), np.load(path.with_suffix(".starts.npy"))
        assert path.with_suffix(".starts.npy") in paths and starts[0] == 0
        read += [part.tolist() for part in np.split(ids, starts[1:])]
        # it was still open when its last document came
        assert starts[-1] < shard_tokens
    assert read == documents


def test_ids_are_little_endian_16_bit(tmp_path):
    _, paths = write(tmp_path, [[1, 258, 65_535]])
    assert paths[0].read_bytes() == b"\x01\x00\x02\x01\xff\xff"
    for ids in ([65_536], [-1]):
        with pytest.raises(ValueError, match="does not fit in 16 bits"):
            write(tmp_path / "other", [ids])


def test_spans_outside_are_refused(tmp_path):
    blocks = TokenBlocks(write(tmp_path, [[1, 2, 3], [4, 5]])[1], 2)
    for start, stop in ((-1, 2), (0, 6), (3, 2)):
        with pytest.raises(IndexError, match=rf"\[{start}, {stop}\) of 5"):
            blocks.span(start, stop)
    with pytest.raises(IndexError):
        blocks.block(2 + len(blocks))


def test_a_file_cut_short_is_named(tmp_path):
    _, paths = write(tmp_path, [[1, 2, 3], [4, 5]], shard_tokens=2)
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with pytest.raises(DamagedFile, match=r"train-00001\.bin has an odd number of bytes"):
        TokenBlocks(paths, 2)


def test_an_empty_corpus_has_no_block(tmp_path):
    _, paths = write(tmp_path, [])
    assert paths == []
    blocks = TokenBlocks(paths, 4)
    assert (len(blocks), blocks.tokens) == (0, 0) and blocks.remainder().size == 0
    with pytest.raises(TTLError, match="not one whole block"):
        step_indices(42, 0, 4, len(blocks))
    # documents without a token make a file of no bytes
    blocks = TokenBlocks(write(tmp_path, [[], []])[1], 4)
    assert blocks.tokens == 0


# documents


NAMED = st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=12), min_size=1, max_size=12)


@given(NAMED, st.integers(1, 30), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_documents_are_read_by_their_index(tmp_path_factory, documents, shard_tokens, block_size):
    _, paths = write(tmp_path_factory.mktemp("tokens"), documents, shard_tokens)
    blocks = TokenBlocks(paths, block_size)
    assert blocks.documents == len(documents)
    assert [blocks.document(n).tolist() for n in range(len(documents))] == documents
    for outside in (-1, len(documents)):
        with pytest.raises(IndexError, match=f"document {outside} of {len(documents)}"):
            blocks.document(outside)
    # the place of a token in its document, or in its block where the document began before
    places = [n for ids in documents for n in range(len(ids))]
    for index in range(len(blocks)):
        first = index * block_size
        expected = [min(place, n) for n, place in enumerate(places[first : first + block_size])]
        assert blocks.positions([index]).tolist() == [expected]
    if len(blocks):
        order = [len(blocks) - 1, 0]
        assert blocks.positions(order).tolist() == [blocks.positions([n])[0].tolist() for n in order]


@given(NAMED, st.integers(1, 30), st.data())
@settings(max_examples=100, deadline=None)
def test_a_document_may_run_over_the_end_of_a_file(tmp_path_factory, documents, shard_tokens, data):
    """As in published tokens, whose rows are cut anywhere."""
    writer = TokenWriter(tmp_path_factory.mktemp("tokens"), "train", shard_tokens)
    ids = [index for document in documents for index in document]
    starts = np.cumsum([0, *map(len, documents[:-1])])
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids)), max_size=6)) | {0, len(ids)})
    for one, other in zip(cuts, cuts[1:], strict=False):
        writer.add(ids[one:other], [n - one for n in starts if one <= n < other])
    blocks = TokenBlocks(writer.close(), 3)
    assert [blocks.document(n).tolist() for n in range(blocks.documents)] == documents


def test_starts_that_are_missing_or_damaged_are_named(tmp_path):
    _, paths = write(tmp_path, [[1, 2, 3], [4, 5], [6]], shard_tokens=4)
    starts = paths[1]
    whole = starts.read_bytes()
    # they are read when they are asked for: whole rows need none
    for damage, message in [
        (None, "is missing: it says where documents begin; make stage 02 again"),
        (b"", "is damaged"),
        (whole[:100], "is damaged"),
        (whole[:-8], "is damaged"),
        (b"no starts, but just as many bytes".ljust(len(whole)), "is damaged"),
        (whole[:-8] + b"\x09".ljust(8, b"\0"), "does not belong to the 5 tokens beside it"),
    ]:
        if damage is None:
            starts.unlink()
        else:
            starts.write_bytes(damage)
        blocks = TokenBlocks(paths, 2)
        assert blocks.block(0).tolist() == [1, 2]
        with pytest.raises(DamagedFile, match=rf"train-00000\.starts\.npy {message}"):
            blocks.document(0)
        with pytest.raises(DamagedFile, match=rf"train-00000\.starts\.npy {message}"):
            blocks.positions([0])
    starts.write_bytes(whole)
    assert TokenBlocks(paths, 2).document(1).tolist() == [4, 5]


# the order


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 15), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_every_block_is_seen_once_an_epoch(seed, blocks, batch, epochs):
    steps = -(-blocks * epochs // batch)
    order = np.concatenate([step_indices(seed, step, batch, blocks) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(order[epoch * blocks : (epoch + 1) * blocks]) == list(range(blocks))


@given(st.integers(0, 2**32), st.integers(0, 1000), st.integers(1, 15), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_a_step_depends_on_nothing_before_it(seed, step, batch, blocks, other):
    once = step_indices(seed, step, batch, blocks).tolist()
    step_indices(seed, other, batch, blocks)
    np.random.seed(other)
    assert step_indices(seed, step, batch, blocks).tolist() == once
    # and the batch's size only groups the same order
    ones = [int(step_indices(seed, n, 1, blocks)[0]) for n in range(step * batch, (step + 1) * batch)]
    assert ones == once


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(step_indices(seed, epoch, 50, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # no order is the files' own
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_a_batch_out_without_overlap(tiny_done, processes):
    blocks = token_blocks(tiny_done, "train")
    get_step = block_steps(blocks, tiny_done)
    for step in (0, 3, 400):
        wanted = blocks.batch(step_indices(42, step, 4, len(blocks))).tolist()
        taken = []
        for rank in range(processes):
            part = get_step(step, SimpleNamespace(process_index=rank, num_processes=processes))
            taken += [row for batch in part.micro_batches for row in batch["input_ids"].tolist()]
            # the loss of each process is divided by the whole batch's targets
            assert part.targets == 4 * 63
        assert sorted(taken) == sorted(wanted)
