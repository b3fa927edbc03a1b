"""Routers: which experts each row goes to, and with what weights.

A router knows nothing of padding: a padded row, whatever it holds, gets experts and weights of
its own and the dispatch drops them. Shapes are static and nothing is read back from the device.

The choices are those of transformers: Qwen3-MoE and Qwen3-Next take the top of a softmax,
DeepSeek-V2 of a softmax within groups, the NemotronH router the top of a sigmoid with a correction
bias and groups of experts, as DeepSeek-V3 does (Liu et al., 2024). Weights stay float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from breakgraph.layers.linear import weight_parameter


class SoftmaxRouter(nn.Module):
    """The ``top_k`` experts of a softmax over all.

    Args:
        renormalize: make the chosen weights of a row sum to 1.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, renormalize: bool
    ) -> None:
        super().__init__()
        _check_top_k(top_k, num_experts)
        self.weight = weight_parameter(num_experts, hidden_size)
        self.top_k = top_k
        self.renormalize = renormalize

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``x: [rows, hidden]``.

        Returns:
            Weights, float32 ``[rows, top_k]``, and experts, int64 ``[rows, top_k]``, in no
            particular order within a row.
        """
        logits = F.linear(x, self.weight)
        if self.renormalize:  # the softmax of the chosen logits is the renormalised softmax
            chosen, experts = logits.topk(self.top_k, sorted=False)
            return chosen.softmax(-1, dtype=torch.float32), experts
        return logits.softmax(-1, dtype=torch.float32).topk(self.top_k, sorted=False)


class GroupedSoftmaxRouter(nn.Module):
    """The ``top_k`` experts of a softmax over all, within the groups of the most probable ones.

    Logits are float32 whatever the dtype of the weights.

    Args:
        num_groups: equal parts, in order, that the experts are divided into.
        groups_kept: how many of them a row may choose from: those with the best single experts.
        scale: factor on the weights, which are not made to sum to 1.

    Raises:
        ValueError: the numbers do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int,
        groups_kept: int,
        scale: float,
    ) -> None:
        super().__init__()
        _check_top_k(top_k, num_experts)
        _check_groups(top_k, num_experts, num_groups, groups_kept)
        self.weight = weight_parameter(num_experts, hidden_size)
        self.top_k, self.scale = top_k, scale
        self.num_groups, self.groups_kept = num_groups, groups_kept

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``x: [rows, hidden]``; returns what ``SoftmaxRouter.forward`` does."""
        scores = float32_product(x, self.weight).softmax(-1)
        if self.groups_kept < self.num_groups:
            best = scores.unflatten(1, (self.num_groups, -1)).amax(-1)
            scores = _within_best_groups(scores, best, self.groups_kept, 0.0)
        weights, experts = scores.topk(self.top_k, sorted=False)
        return weights.mul_(self.scale), experts


class SigmoidRouter(nn.Module):
    """The ``top_k`` experts by sigmoid score plus correction bias, weighted by score alone.

    Logits are float32 whatever the dtype of the weights, and so is the bias.

    Args:
        num_groups: equal parts, in order, that the experts are divided into.
        groups_kept: how many of them a row may choose from: those whose two best experts have
            the largest sum.
        renormalize: make the chosen weights of a row sum to 1, before ``scale``.
        scale: factor on the weights.

    Raises:
        ValueError: the numbers do not fit together.
    """

    float32_parameters = ("e_score_correction_bias",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int,
        groups_kept: int,
        renormalize: bool,
        scale: float,
    ) -> None:
        super().__init__()
        _check_top_k(top_k, num_experts)
        _check_groups(top_k, num_experts, num_groups, groups_kept, scored_by=2)
        self.weight = weight_parameter(num_experts, hidden_size)
        self.e_score_correction_bias = weight_parameter(num_experts)
        self.top_k = top_k
        self.num_groups, self.groups_kept = num_groups, groups_kept
        self.renormalize, self.scale = renormalize, scale

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``x: [rows, hidden]``; returns what ``SoftmaxRouter.forward`` does."""
        scores = float32_product(x, self.weight).sigmoid_()
        choice = self._within_groups(scores + self.e_score_correction_bias)
        experts = choice.topk(self.top_k, sorted=False)[1]
        weights = scores.gather(1, experts)
        if self.renormalize:
            weights.div_(weights.sum(-1, keepdim=True).add_(1e-20))
        if self.scale != 1:
            weights.mul_(self.scale)
        return weights, experts

    def _within_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """``choice``, with -inf for the experts of groups that a row may not choose from."""
        if self.groups_kept == self.num_groups:
            return choice
        best = choice.unflatten(1, (self.num_groups, -1)).topk(2, sorted=False)[0].sum(-1)
        return _within_best_groups(choice, best, self.groups_kept, float("-inf"))


def float32_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` as if both were cast to float32; ``[rows, out_features]``.

    A product of two 16-bit numbers is exact in the float32 that CUDA adds it up in, so there only
    the result needs the wider type.
    """
    if x.is_cuda and x.dtype.itemsize == 2 and weight.dtype == x.dtype:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def _within_best_groups(
    scores: torch.Tensor, best: torch.Tensor, kept: int, dropped_score: float
) -> torch.Tensor:
    """``scores: [rows, experts]``, with ``dropped_score`` for the experts of all groups but the
    ``kept`` ones that ``best: [rows, groups]`` ranks first."""
    groups = best.topk(kept, sorted=False)[1]
    dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, groups, False)
    grouped = scores.unflatten(1, (best.shape[1], -1))
    return grouped.masked_fill(dropped.unsqueeze(-1), dropped_score).flatten(1)


def _check_groups(
    top_k: int, num_experts: int, num_groups: int, groups_kept: int, scored_by: int = 1
) -> None:
    if num_experts % num_groups or not 1 <= groups_kept <= num_groups:
        raise ValueError(
            f"{num_experts} experts cannot be routed in n_group {num_groups} groups of which "
            f"topk_group {groups_kept} are kept"
        )
    if groups_kept < num_groups and num_experts < scored_by * num_groups:
        raise ValueError(
            f"{num_experts} experts in n_group {num_groups} leave a group fewer than the two "
            "experts it is scored by"
        )
    if top_k > groups_kept * (num_experts // num_groups):
        raise ValueError(
            f"num_experts_per_tok {top_k} is more than topk_group {groups_kept} groups hold"
        )


def _check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"num_experts_per_tok {top_k} is not between 1 and {num_experts} experts")
