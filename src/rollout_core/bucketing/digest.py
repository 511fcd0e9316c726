"""Digests of a bucket's bytes: 128 bits, sensitive to order, bound to what the bytes are for.

No algorithm here is cryptographic: they find damage, mix-ups and replays, not an attacker who forges digests.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol, TypeAlias, get_args

import torch
import xxhash

from rollout_core.bucketing import cuda

#: ``xxh3-128`` hashes at memory speed on a CPU. ``block-multilinear-128`` does so on a GPU, in a kernel of its own or in the one
#: that packs, and is made of torch operations elsewhere; ``multilinear-128`` is made of them everywhere, and needs several times as
#: long. Both give the same value on every device.
Algorithm: TypeAlias = Literal["xxh3-128", "multilinear-128", "block-multilinear-128"]
ALGORITHMS: Final[tuple[str, ...]] = get_args(Algorithm)
#: "auto" picks by device; None makes no digests.
DigestChoice: TypeAlias = Algorithm | Literal["auto"] | None

#: The algorithm that a kernel computes while it packs.
BLOCK_ALGORITHM: Final = "block-multilinear-128"
#: Part of its definition.
BLOCK_NBYTES: Final = 16 << 10
BLOCK_COLUMNS: Final = 128
#: Two sums modulo 2**64, from which a digest of either multilinear algorithm is made.
Lanes: TypeAlias = tuple[int, int]


class LaterLanes(Protocol):
    """Lanes that a device may still be at work on."""

    def wait(self) -> Lanes: ...


_CHUNK_WORDS: Final = 1 << 20  # bounds the temporaries: about 40 MiB
_CHUNK_BLOCKS: Final = {"cpu": 8}  # likewise, for blocks: temporaries of 256 KiB stay in a CPU's cache
_MANY_BLOCKS: Final = 256
_MASK: Final = (1 << 64) - 1
# The first fractional digits of pi: nothing up the sleeve.
_SEEDS: Final = (0x243F6A8885A308D3, 0x13198A2E03707344)
KEY_SEEDS: Final = _SEEDS
BLOCK_SEEDS: Final = (0xA4093822299F31D0, 0x082EFA98EC4E6C89)
_GOLDEN: Final = 0x9E3779B97F4A7C15


def default_algorithm(device: torch.device) -> Algorithm:
    return "xxh3-128" if device.type == "cpu" else "block-multilinear-128"


def chosen_algorithm(choice: DigestChoice, device: torch.device) -> Algorithm | None:
    """What a choice comes to for a buffer on a device."""
    return default_algorithm(device) if choice == "auto" else choice


def check_choice(choice: object) -> None:
    if choice not in (*ALGORITHMS, "auto", None):
        raise ValueError(f"digest is {choice!r}; it is one of {', '.join(ALGORITHMS)}, 'auto' or None")


def payload_digest(buffer: torch.Tensor, context: bytes, algorithm: str) -> bytes:
    """16 bytes for a 1-d uint8 tensor and the context that it is bound to.

    ``xxh3-128``: XXH3-128 of context, context length (u64 LE) and payload, big-endian as xxhash prints it. ``multilinear-128`` and
    ``block-multilinear-128``: the same over context, context length, payload length (u64 LE) and the two lanes of ``multilinear``
    or ``block_multilinear`` (u64 LE each).
    """
    if algorithm == "xxh3-128":
        state = xxhash.xxh3_128(_header(context))
        state.update(buffer.cpu().numpy().data)
        return state.digest()
    if algorithm == "multilinear-128":
        return lanes_digest(multilinear(buffer), buffer.numel(), context)
    if algorithm == "block-multilinear-128":
        return lanes_digest(block_multilinear(buffer), buffer.numel(), context)
    raise ValueError(f"digest algorithm is {algorithm!r}; it is one of {', '.join(ALGORITHMS)}")


def lanes_digest(lanes: Lanes, nbytes: int, context: bytes) -> bytes:
    """``payload_digest`` of ``nbytes`` whose lanes are known."""
    words = b"".join(lane.to_bytes(8, "little") for lane in lanes)
    return xxhash.xxh3_128_digest(_header(context) + nbytes.to_bytes(8, "little") + words)


def _header(context: bytes) -> bytes:
    return context + len(context).to_bytes(8, "little")


def multilinear(buffer: torch.Tensor) -> Lanes:
    """Two lanes of ``sum of key[i] * word[i]`` modulo 2**64, over little-endian 32-bit words, the last one filled with zeros.

    ``key[i]`` is splitmix64's output number i for the lane's seed, made odd: an odd key times a difference of one 32-bit word is
    never 0 modulo 2**64, so a change within one word always shows. Multilinear hashing: Carter and Wegman 1979, with keys as in
    Lemire and Kaser 2014. splitmix64: Steele, Lea and Flood 2014.
    """
    totals = [torch.zeros((), dtype=torch.int64, device=buffer.device) for _ in _SEEDS]
    words = _words(buffer)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = _unsigned(words[start : start + _CHUNK_WORDS])
        counter = torch.arange(start + 1, start + 1 + chunk.numel(), dtype=torch.int64, device=buffer.device)
        for lane, seed in enumerate(_SEEDS):
            totals[lane] += (chunk * _odd_keys(counter, seed)).sum()
    return _as_lanes(totals)


def block_multilinear(buffer: torch.Tensor) -> Lanes:
    """Two lanes, each a sum of ``mix(h + n * golden + seed)`` over the columns of the payload, modulo 2**64.

    The payload, filled with zeros to whole blocks of 16 KiB, is read as little-endian 32-bit words. A block is 8 rows of 128 cells
    of 4 words; a column is the 8 cells that stand below each other, and ``n`` counts columns from 1, block by block. ``h`` is the
    column's own ``multilinear`` lane: its 32 words, times the lane's first 32 keys. ``mix`` is splitmix64's finalizer, ``golden``
    its increment. No blocks give lanes of 0.

    A GPU thread reads whole columns, 16 bytes at a time beside its neighbours', with 32 keys that are constants, where
    ``multilinear`` has to compute one for each word. ``mix`` is a bijection, so what changes the ``h`` of one column changes the
    lane; and of a lane's 32 keys no two are equal or opposite modulo 2**33, so two swapped words or two flipped bits of one column
    always change it.
    """
    if cuda.possible(buffer.device):
        from rollout_core.bucketing.cuda import launching

        if launching.usable(buffer.device):
            return launching.digest_lanes(buffer)
    return block_multilinear_by_torch(buffer)


def block_multilinear_by_torch(buffer: torch.Tensor, *, first: int = 0) -> Lanes:
    """``block_multilinear`` as torch operations; ``first``: of a part of a payload, the blocks before it."""
    keys = block_keys(buffer.device)
    whole = buffer.numel() // BLOCK_NBYTES * BLOCK_NBYTES
    rest = torch.nn.functional.pad(buffer[whole:], (0, -buffer.numel() % BLOCK_NBYTES))
    totals = [torch.zeros((), dtype=torch.int64, device=buffer.device) for _ in keys]
    done = first * BLOCK_COLUMNS
    for part in (buffer[:whole], rest):
        cells = _words(part).view(-1, BLOCK_NBYTES // BLOCK_COLUMNS // 16, BLOCK_COLUMNS, 4)
        for chunk in torch.split(cells, _CHUNK_BLOCKS.get(buffer.device.type, _MANY_BLOCKS)):
            words = _unsigned(chunk)
            number = torch.arange(done + 1, done + 1 + len(chunk) * BLOCK_COLUMNS, dtype=torch.int64, device=buffer.device)
            for lane, seed in enumerate(BLOCK_SEEDS):
                h = (words * keys[lane]).sum((1, 3)).flatten()
                totals[lane] += _mix(h + number * _signed(_GOLDEN) + _signed(seed)).sum()
            done += number.numel()
    return _as_lanes(totals)


def block_keys(device: torch.device) -> torch.Tensor:
    """The keys of ``block_multilinear``: int64 of shape [2 lanes, 8 rows, 1, 4 words]."""
    rows = BLOCK_NBYTES // BLOCK_COLUMNS // 16
    counter = torch.arange(1, 1 + 4 * rows, dtype=torch.int64, device=device)
    return torch.stack([_odd_keys(counter, seed).view(rows, 1, 4) for seed in _SEEDS])


def _as_lanes(totals: list[torch.Tensor]) -> Lanes:
    first, second = (int(total) & _MASK for total in totals)
    return first, second


def _words(buffer: torch.Tensor) -> torch.Tensor:
    spare = -buffer.numel() % 4
    aligned = buffer.data_ptr() % 4 == 0 and buffer.storage_offset() % 4 == 0
    if spare or not aligned:
        buffer = torch.nn.functional.pad(buffer, (0, spare)) if spare else buffer.clone()
    return buffer.view(torch.int32)


def _unsigned(words: torch.Tensor) -> torch.Tensor:
    return words.to(torch.int64) & 0xFFFFFFFF


def _odd_keys(counter: torch.Tensor, seed: int) -> torch.Tensor:
    """splitmix64's outputs for these counters, made odd; int64 arithmetic wraps as unsigned does."""
    return _mix(counter * _signed(_GOLDEN) + _signed(seed)) | 1


def _mix(z: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer, a bijection of 64 bits."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch shifts int64 arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
