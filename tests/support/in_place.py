"""Changes of a tensor that leave it in its memory, and make it another one all the same."""

from __future__ import annotations

import torch


def square() -> torch.Tensor:
    return torch.arange(16, dtype=torch.float32).view(4, 4)


#: Of what ``square`` gives. Each makes another tensor for a plan, or gives its bytes another order.
CHANGES = {
    "t_": lambda t: t.t_(),
    "transpose_": lambda t: t.transpose_(0, 1),
    "resize_": lambda t: t.resize_(2, 8),
    "resize_ to fewer": lambda t: t.resize_(4, 2),
    "unsqueeze_": lambda t: t.unsqueeze_(0),
    "as_strided_": lambda t: t.as_strided_((4, 4), (0, 1)),
    "set_": lambda t: t.set_(t.untyped_storage(), 0, (4, 4), (1, 4)),
    "data of another shape": lambda t: setattr(t, "data", t.data.view(8, 2)),
    "data of another dtype": lambda t: setattr(t, "data", t.data.view(torch.int32)),
    "data transposed": lambda t: setattr(t, "data", t.data.t()),
    "data negated": lambda t: setattr(t, "data", torch._neg_view(t.data)),
}
