"""Packing, unpacking and digests on a GPU. Importing this does not import Triton, and nothing outside has to know of it: the
functions of ``bucketing`` come here by themselves when the tensors are on a GPU, and to torch's operations when they are not."""
