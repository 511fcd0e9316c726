"""Digests of a bucket's bytes: 128 bits, sensitive to order, bound to what the bytes are for.

Neither algorithm is cryptographic: they find damage, mix-ups and replays, not an attacker who forges digests.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

import torch
import xxhash

#: ``xxh3-128`` hashes at memory speed on a CPU. ``multilinear-128`` is made of torch operations only, so it runs where the
#: bytes are, GPU included, and gives the same value everywhere.
Algorithm: TypeAlias = Literal["xxh3-128", "multilinear-128"]
ALGORITHMS: Final[tuple[str, ...]] = get_args(Algorithm)
#: "auto" picks by device; None makes no digests.
DigestChoice: TypeAlias = Algorithm | Literal["auto"] | None

_CHUNK_WORDS: Final = 1 << 20  # bounds the temporaries: about 40 MiB
_SEEDS: Final = (0x243F6A8885A308D3, 0x13198A2E03707344)  # the first fractional digits of pi: nothing up the sleeve


def default_algorithm(device: torch.device) -> Algorithm:
    return "xxh3-128" if device.type == "cpu" else "multilinear-128"


def check_choice(choice: object) -> None:
    if choice not in (*ALGORITHMS, "auto", None):
        raise ValueError(f"digest is {choice!r}; it is one of {', '.join(ALGORITHMS)}, 'auto' or None")


def payload_digest(buffer: torch.Tensor, context: bytes, algorithm: str) -> bytes:
    """16 bytes for a 1-d uint8 tensor and the context that it is bound to.

    ``xxh3-128``: XXH3-128 of context, context length (u64 LE) and payload, big-endian as xxhash prints it. ``multilinear-128``: the
    same over context, context length, payload length (u64 LE) and the two lanes of ``multilinear`` (u64 LE each).
    """
    header = context + len(context).to_bytes(8, "little")
    if algorithm == "xxh3-128":
        state = xxhash.xxh3_128(header)
        state.update(buffer.cpu().numpy().data)
        return state.digest()
    if algorithm == "multilinear-128":
        lanes = b"".join(lane.to_bytes(8, "little") for lane in multilinear(buffer))
        return xxhash.xxh3_128_digest(header + buffer.numel().to_bytes(8, "little") + lanes)
    raise ValueError(f"digest algorithm is {algorithm!r}; it is one of {', '.join(ALGORITHMS)}")


def multilinear(buffer: torch.Tensor) -> tuple[int, int]:
    """Two lanes of ``sum of key[i] * word[i]`` modulo 2**64, over little-endian 32-bit words, the last one filled with zeros.

    ``key[i]`` is splitmix64's output number i for the lane's seed, made odd: an odd key times a difference of one 32-bit word is
    never 0 modulo 2**64, so a change within one word always shows. Multilinear hashing: Carter and Wegman 1979, with keys as in
    Lemire and Kaser 2014. splitmix64: Steele, Lea and Flood 2014.
    """
    totals = [torch.zeros((), dtype=torch.int64, device=buffer.device) for _ in _SEEDS]
    words = _words(buffer)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64) & 0xFFFFFFFF
        counter = torch.arange(start + 1, start + 1 + chunk.numel(), dtype=torch.int64, device=buffer.device)
        for lane, seed in enumerate(_SEEDS):
            totals[lane] += (chunk * _splitmix64(counter, seed)).sum()
    first, second = (int(total) & 0xFFFFFFFFFFFFFFFF for total in totals)
    return first, second


def _words(buffer: torch.Tensor) -> torch.Tensor:
    spare = -buffer.numel() % 4
    aligned = buffer.data_ptr() % 4 == 0 and buffer.storage_offset() % 4 == 0
    if spare or not aligned:
        buffer = torch.nn.functional.pad(buffer, (0, spare)) if spare else buffer.clone()
    return buffer.view(torch.int32)


def _splitmix64(counter: torch.Tensor, seed: int) -> torch.Tensor:
    """splitmix64's outputs for these counters, made odd; int64 arithmetic wraps as unsigned does."""
    z = counter * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shift_right(z, 31)) | 1


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch shifts int64 arithmetically."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
