"""What Python and torch are too slow for when tensors are small and many: compiled code that finds them, and copies them on a CPU,
for ``bucketing.finding`` and ``bucketing.gathering``.

By torch's own functions finding ten thousand takes longer than copying them, mostly because each question goes through all of them,
and their memory, again. ``many.c`` asks once, by DLPack's C exchange API, which torch has from 2.11 on. It is compiled with the C
compiler that Triton, too, needs for its kernels, once for each process; without one torch is asked, and copies.
"""
