# ruff: noqa: ANN001, ANN201, ANN202 (the arguments are Triton's)
# mypy: ignore-errors
"""The Triton kernels: many tensors into one buffer, one buffer into many tensors, and the digest of a buffer, one launch each.

A buffer is cut into blocks of 16 KiB, which a fixed number of programs take in turns. Addresses come from tables:
integers that are made pointers here. Every access is as wide as address and bounds allow, 16 bytes at best, and within what it is
given to the byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rollout_core.bucketing.digest import BLOCK_COLUMNS, BLOCK_NBYTES, BLOCK_SEEDS, KEY_SEEDS

# What makes the digest's definition: see digest.block_multilinear.
SIZE = tl.constexpr(BLOCK_NBYTES)
COLUMNS = tl.constexpr(BLOCK_COLUMNS)
ROWS = tl.constexpr(BLOCK_NBYTES // BLOCK_COLUMNS // 16)
KEY_SEED0, KEY_SEED1 = tl.constexpr(KEY_SEEDS[0]), tl.constexpr(KEY_SEEDS[1])
SEED0, SEED1 = tl.constexpr(BLOCK_SEEDS[0]), tl.constexpr(BLOCK_SEEDS[1])
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def _vectors(address):
    """A pointer to words at an address that is a multiple of 16. The hint has to be on the pointer: one on the integer is lost."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16)


@triton.jit
def _word():
    """Numbers of a block's words as [columns, rows, 4]. Triton gives threads the first of dimensions that are otherwise alike, so
    one has whole columns, and 16 bytes of each row in one access beside its neighbours'."""
    column = tl.arange(0, COLUMNS)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    return (row * COLUMNS + column) * 4 + tl.arange(0, 4)[None, None, :]


@triton.jit
def _column_sums(words, SEED: tl.constexpr):
    """For each column the sum of words times keys, modulo 2**64: a wide and a narrow multiplication each. The keys are constants
    to the compiler, and no thread holds them in registers."""
    number = (tl.arange(0, ROWS)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :] + 1).to(tl.uint64)
    key = _mix(number * _GOLDEN + SEED) | 1
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    wide = words.to(tl.uint64) * low.to(tl.uint64)
    products = wide + ((words * high).to(tl.uint64) << 32)
    return tl.sum(tl.sum(products.to(tl.int64), 2), 1).to(tl.uint64)


@triton.jit
def _add_block(lanes, words, block):
    """The sums of both lanes, by column, with one block more."""
    number = tl.arange(0, COLUMNS).to(tl.uint64) + 1 + block * tl.full((), COLUMNS, tl.uint64)
    state = number * _GOLDEN
    first, second = lanes
    first += _mix(_column_sums(words, KEY_SEED0) + state + SEED0)
    second += _mix(_column_sums(words, KEY_SEED1) + state + SEED1)
    return first, second


@triton.jit
def _no_lanes():
    return tl.zeros([COLUMNS], tl.uint64), tl.zeros([COLUMNS], tl.uint64)


@triton.jit
def _store_lanes(partials, lanes):
    first, second = lanes
    tl.store(partials + 2 * tl.program_id(0), tl.sum(first.to(tl.int64), 0))
    tl.store(partials + 2 * tl.program_id(0) + 1, tl.sum(second.to(tl.int64), 0))


@triton.jit
def _load_part(address, start, end, WORDS: tl.constexpr):
    """The words of a block of which the bytes from ``start`` to ``end`` lie at ``address + start``, the others being 0."""
    word = tl.arange(0, WORDS)
    unit = address | start | end
    start, end = start.to(tl.int32), end.to(tl.int32)
    if unit % 16 == 0:
        first, last = tl.multiple_of(start // 4, 4), tl.multiple_of(end // 4, 4)
        words = tl.load(_vectors(address) + word, mask=(word >= first) & (word < last), other=0)
    elif unit % 4 == 0:
        pointer = address.to(tl.pointer_type(tl.uint32))
        words = tl.load(pointer + word, mask=(word >= start // 4) & (word < end // 4), other=0)
    elif unit % 2 == 0:
        halves = address.to(tl.pointer_type(tl.uint16))
        first, last = start // 2, end // 2
        words = tl.zeros([WORDS], tl.uint32)
        for k in tl.static_range(2):
            at = 2 * word + k
            half = tl.load(halves + at, mask=(at >= first) & (at < last), other=0)
            words |= half.to(tl.uint32) << (16 * k)
    else:
        bytes_ = address.to(tl.pointer_type(tl.uint8))
        words = tl.zeros([WORDS], tl.uint32)
        for k in tl.static_range(4):
            at = 4 * word + k
            byte = tl.load(bytes_ + at, mask=(at >= start) & (at < end), other=0)
            words |= byte.to(tl.uint32) << (8 * k)
    return words


@triton.jit
def _store_part(address, start, end, words, WORDS: tl.constexpr):
    """Write the bytes from ``start`` to ``end`` of a block's words to ``address + start``."""
    word = tl.arange(0, WORDS)
    unit = address | start | end
    start, end = start.to(tl.int32), end.to(tl.int32)
    if unit % 16 == 0:
        first, last = tl.multiple_of(start // 4, 4), tl.multiple_of(end // 4, 4)
        tl.store(_vectors(address) + word, words, mask=(word >= first) & (word < last))
    elif unit % 4 == 0:
        pointer = address.to(tl.pointer_type(tl.uint32))
        tl.store(pointer + word, words, mask=(word >= start // 4) & (word < end // 4))
    elif unit % 2 == 0:
        halves = address.to(tl.pointer_type(tl.uint16))
        for k in tl.static_range(2):
            at = 2 * word + k
            tl.store(halves + at, (words >> (16 * k)).to(tl.uint16), mask=(at >= start // 2) & (at < end // 2))
    else:
        bytes_ = address.to(tl.pointer_type(tl.uint8))
        for k in tl.static_range(4):
            at = 4 * word + k
            tl.store(bytes_ + at, (words >> (8 * k)).to(tl.uint8), mask=(at >= start) & (at < end))


@triton.jit
def _aligned_sources(i, blocks, ones, others, splits, ends, bases, word):
    """Pointers to the words of entry ``i`` of ``gather_aligned``, its block, and how many vectors it has."""
    block = tl.load(blocks + i)
    split = tl.multiple_of(tl.load(splits + i), 4)
    begin = block * tl.full((), SIZE, tl.int64)
    one = tl.load(bases + tl.load(ones + i)) + begin
    other = tl.load(bases + tl.load(others + i)) + begin
    source = tl.where(word < split, _vectors(one), _vectors(other)) + word
    # Four words in a row are of one source: newer compilers do not find it out. The hint has to be where the pointers are made.
    return tl.max_contiguous(tl.multiple_of(source, [1, 1, 16]), [1, 1, 4]), block, tl.load(ends + i) // 4


@triton.jit(do_not_specialize=["target", "count"])
def gather_aligned(target, count, blocks, ones, others, splits, ends, bases, partials, DIGEST: tl.constexpr):
    """Fill blocks of a buffer at ``target`` that have one source or two, and all on multiples of 16 bytes.

    Entry ``i`` is block ``blocks[i]``: its words before ``splits[i]`` are of row ``ones[i]``, those after of row ``others[i]``, up
    to ``ends[i]``, where the buffer ends. Byte ``k`` of the buffer is read at ``bases[row] + k``. With DIGEST each
    program's lanes go to ``partials``, and each loads its next block while it digests one.
    """
    word = _word()
    if DIGEST:
        lanes = _no_lanes()
        step = tl.num_programs(0)
        source, block, vectors = _aligned_sources(tl.program_id(0), blocks, ones, others, splits, ends, bases, word)
        words = tl.load(source, mask=word < vectors * 4, other=0)
        for i in range(tl.program_id(0), count, step):
            following = tl.minimum(i + step, count - 1)
            source, next_block, next_vectors = _aligned_sources(following, blocks, ones, others, splits, ends, bases, word)
            address = _vectors(target + block * tl.full((), SIZE, tl.int64))
            tl.store(address + word, words, mask=word < vectors * 4)
            next_words = tl.load(source, mask=word < next_vectors * 4, other=0)
            lanes = _add_block(lanes, words, block)
            words, block, vectors = next_words, next_block, next_vectors
        _store_lanes(partials, lanes)
    else:
        for i in range(tl.program_id(0), count, tl.num_programs(0)):
            source, block, vectors = _aligned_sources(i, blocks, ones, others, splits, ends, bases, word)
            address = _vectors(target + block * tl.full((), SIZE, tl.int64))
            tl.store(address + word, tl.load(source, mask=word < vectors * 4, other=0), mask=word < vectors * 4)


@triton.jit(do_not_specialize=["target"])
def gather_whole(target, blocks, sources):
    """Copy whole blocks, a program for each: block ``blocks[i]`` from address ``sources[i]``, a multiple of 16. Nothing that is
    loaded depends on something else that is, except the bytes."""
    i = tl.program_id(0)
    word = tl.arange(0, SIZE // 4)
    begin = tl.load(blocks + i) * tl.full((), SIZE, tl.int64)
    tl.store(_vectors(target + begin) + word, tl.load(_vectors(tl.load(sources + i)) + word))


@triton.jit
def _load_shifted(address, word):
    """A block's words at any address, each from the two aligned words that it lies in."""
    past = (address % 4).to(tl.uint32) * 8
    pointer = (address // 4 * 4).to(tl.pointer_type(tl.uint32))
    low = tl.load(pointer + word)
    high = tl.load(pointer + word + 1)
    # Shifted up in two steps: by 32 bits at once is undefined.
    return (low >> past) | ((high << 1) << (31 - past))


@triton.jit(do_not_specialize=["target", "count"])
def gather_shifted(target, count, blocks, ones, bases, partials, DIGEST: tl.constexpr):
    """Fill whole blocks from within one row each: block ``blocks[i]`` from row ``ones[i]``, at any address. The 3 bytes before and
    after are of that row, too, and are read."""
    word = _word()
    lanes = _no_lanes()
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        block = tl.load(blocks + i)
        begin = block * tl.full((), SIZE, tl.int64)
        words = _load_shifted(tl.load(bases + tl.load(ones + i)) + begin, word)
        tl.store(_vectors(target + begin) + word, words)
        if DIGEST:
            lanes = _add_block(lanes, words, block)
    if DIGEST:
        _store_lanes(partials, lanes)


@triton.jit(do_not_specialize=["target", "count", "nbytes"])
def gather_parts(
    target, count, blocks, rows, stops, bases, row_starts, row_ends, nbytes, partials, DIGEST: tl.constexpr
):  # fmt: skip
    """Fill blocks of any content: block ``blocks[i]`` has parts of the rows ``rows[i]`` to ``stops[i]``. Row ``r`` is the bytes
    ``row_starts[r]`` to ``row_ends[r]`` of the buffer, read at ``bases[r] + row_starts[r]``. What no row has becomes 0."""
    lanes = _no_lanes()
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        block = tl.load(blocks + i)
        begin = block * tl.full((), SIZE, tl.int64)
        left = tl.minimum(nbytes - begin, SIZE)
        words = tl.zeros([SIZE // 4], tl.uint32)
        for row in range(tl.load(rows + i), tl.load(stops + i)):
            start = tl.maximum(tl.load(row_starts + row) - begin, 0)
            end = tl.minimum(tl.load(row_ends + row) - begin, left)
            words |= _load_part(tl.load(bases + row) + begin, start, end, SIZE // 4)
        _store_part(target + begin, tl.full((), 0, tl.int64), left, words, SIZE // 4)
        if DIGEST:
            lanes = _add_block(lanes, tl.permute(tl.reshape(words, [ROWS, COLUMNS, 4]), [1, 0, 2]), block)
    if DIGEST:
        _store_lanes(partials, lanes)


@triton.jit(do_not_specialize=["source", "words_in_all", "blocks"])
def digest_aligned(source, words_in_all, blocks, partials):
    """The lanes of ``words_in_all`` words, a multiple of 4, at ``source``: each program's part goes to ``partials``. The last block
    comes first: the GPU's cache has the end of a buffer that was just written, and then the beginning for who reads it next."""
    word = _word()
    lanes = _no_lanes()
    for i in range(tl.program_id(0), blocks, tl.num_programs(0)):
        block = blocks - 1 - i
        start = block * tl.full((), SIZE // 4, tl.int64)
        words = tl.load(_vectors(source) + start + word, mask=word < tl.multiple_of(words_in_all - start, 4), other=0)
        lanes = _add_block(lanes, words, block)
    _store_lanes(partials, lanes)


@triton.jit(do_not_specialize=["source", "nbytes", "block"])
def digest_part(source, nbytes, block, partials):
    """The lanes of one block, of ``nbytes`` at ``source``."""
    words = _load_part(source, tl.full((), 0, tl.int64), nbytes, SIZE // 4)
    _store_lanes(partials, _add_block(_no_lanes(), tl.permute(tl.reshape(words, [ROWS, COLUMNS, 4]), [1, 0, 2]), block))


@triton.jit
def _count_in(lanes, row, sums):
    """Add what a program has summed up to the lanes of a payload, which others add to as well."""
    first, second = sums
    tl.atomic_add(lanes + 2 * row, tl.sum(first.to(tl.int64), 0))
    tl.atomic_add(lanes + 2 * row + 1, tl.sum(second.to(tl.int64), 0))


@triton.jit(do_not_specialize=["count", "each", "payloads"])
def digest_rows(count, each, payloads, rows, table, lanes, ALIGNED: tl.constexpr):
    """Add to lanes, two for each payload, those of all blocks of some payloads. A program has ``each`` blocks that follow each
    other, and so few payloads. Block ``i`` is of the one in column ``rows[i]`` of the table, which has ``payloads`` columns and
    these rows: its address, its bytes, the number that its first block has for the digest, ``i`` of its first block, and whose
    lanes it has. ALIGNED: addresses and bytes are multiples of 16; else they may be any."""
    word = _word()
    zero = tl.full((), 0, tl.int64)
    begin = tl.program_id(0) * each
    column = tl.load(rows + tl.minimum(begin, count - 1))
    sums = _no_lanes()
    for i in range(begin, tl.minimum(begin + each, count)):
        now = tl.load(rows + i)
        if now != column:
            _count_in(lanes, tl.load(table + 4 * payloads + column), sums)
            sums = _no_lanes()
            column = now
        entry = table + column
        place = i - tl.load(entry + 3 * payloads)
        start = place * SIZE
        address = tl.load(entry) + start
        end = tl.minimum(tl.load(entry + payloads) - start, SIZE)
        block = (tl.load(entry + 2 * payloads) + place).to(tl.int32)
        if ALIGNED:
            words = tl.load(_vectors(address) + word, mask=word < tl.multiple_of((end // 4).to(tl.int32), 4), other=0)
        else:
            part = _load_part(address, zero, end, SIZE // 4)
            words = tl.permute(tl.reshape(part, [ROWS, COLUMNS, 4]), [1, 0, 2])
        sums = _add_block(sums, words, block)
    _count_in(lanes, tl.load(table + 4 * payloads + column), sums)


@triton.jit(do_not_specialize=["source"])
def copy_aligned(source, starts, targets, sizes):
    """Copy ``sizes[i]`` bytes, a block at most, from ``source + starts[i]`` to address ``targets[i]``, all multiples of 16; a
    program for each. The targets overlap neither each other nor a source."""
    i = tl.program_id(0)
    word = tl.arange(0, SIZE // 4)
    inside = word < tl.multiple_of(tl.load(sizes + i) // 4, 4)
    words = tl.load(_vectors(source + tl.load(starts + i)) + word, mask=inside)
    tl.store(_vectors(tl.load(targets + i)) + word, words, mask=inside)


@triton.jit(do_not_specialize=["source"])
def copy_shifted(source, starts, targets, sizes):
    """``copy_aligned`` for whole blocks from any address to a multiple of 16. The 3 bytes before and after the block are read, too;
    ``sizes`` are not."""
    i = tl.program_id(0)
    word = _word()
    tl.store(_vectors(tl.load(targets + i)) + word, _load_shifted(source + tl.load(starts + i), word))


@triton.jit(do_not_specialize=["source"])
def copy_parts(source, starts, targets, sizes):
    """``copy_aligned`` for any addresses and sizes."""
    i = tl.program_id(0)
    zero = tl.full((), 0, tl.int64)
    end = tl.load(sizes + i)
    _store_part(tl.load(targets + i), zero, end, _load_part(source + tl.load(starts + i), zero, end, SIZE // 4), SIZE // 4)
