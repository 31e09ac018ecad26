"""Encoders for numbers and categories, and an ensemble of members that share their weights.

Numbers use the piecewise linear encoding of Gorishniy et al., https://arxiv.org/abs/2203.05556,
whose pieces contain equally many training records. Categories use embeddings.

Shapes: N records of a sample, B batch, F numbers, C columns of categories, T pieces, D width,
M members, K outputs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.tasks import ClassTarget, LabelsTarget, Target
from train.tasks.columns.categorical import FIRST, MISSING, UNSEEN

# Numbers are clipped to this many standard deviations from the mean.
BOUND = 10.0
# Smallest number of values in a piece if a frequent value leaves few others.
LEAST_IN_PIECE = 100
# In training, MASKED is the largest share of a column's values that are masked as missing (and, for
# categories, as unseen), and MASKED_RECORDS of records with a masked value. Larger shares cost
# accuracy.
MASKED, MASKED_RECORDS = 0.01, 0.05
# Width of a piece that stays at 0.
ENDLESS = 1e30


class PiecewiseLinearEncoding(nn.Module):
    """Numbers, float32 [B, F], NaN if missing → float32 [B, F·(T + 2)].

    The output contains the filled share of each piece, 0..1, the clipped number, and whether it is
    missing. In training, some numbers of columns without missing values are masked, so that the
    network learns to handle missing values.
    """

    low_FT: Tensor
    width_FT: Tensor

    def __init__(
        self, num_numbers: int, num_bins: int, with_missing_F: Sequence[bool] = ()
    ) -> None:
        super().__init__()
        self._masked = [place for place, missing in enumerate(with_missing_F) if not missing]
        self.register_buffer("low_FT", torch.zeros(num_numbers, num_bins))
        self.register_buffer("width_FT", torch.ones(num_numbers, num_bins))

    @property
    def width(self) -> int:
        """Number of values in the output."""
        numbers, bins = self.low_FT.shape
        return numbers * (bins + 2)

    @torch.no_grad()
    def fit_inputs(self, numbers_NF: Tensor) -> None:
        """Set the edges of the pieces from the numbers of training records, float32 [N, F]."""
        num_pieces = self.low_FT.shape[1]
        steps = torch.linspace(0, 1, num_pieces + 1)
        for column, values_N in enumerate(numbers_NF.T):
            known = values_N[~values_N.isnan()]
            if len(known):
                spread = _limit_repeats(known.double(), num_pieces)
                edges = torch.quantile(spread, steps.double()).float()
                self.low_FT[column] = edges[:-1]
                self.width_FT[column] = edges.diff()
                # A frequent value leads to several pieces of width 0, which are all equal. Only
                # the first is kept; the others would multiply the value's weight.
                without = self.width_FT[column] == 0
                self.width_FT[column, 1:][without[1:] & without[:-1]] = ENDLESS

    def forward(self, numbers_BF: Tensor) -> Tensor:
        """float32 [B, F] → float32 [B, F·(T + 2)]."""
        missing_BF = torch.isnan(numbers_BF)
        if self.training and self._masked:
            masked = torch.rand(len(numbers_BF), len(self._masked), device=numbers_BF.device)
            missing_BF[:, self._masked] |= masked < masked_share(len(self._masked))
        values_BF = torch.where(missing_BF, 0.0, numbers_BF)
        above_BFT = values_BF[:, :, None] - self.low_FT
        full_BFT = (above_BFT / self.width_FT.clamp_min(1e-9)).clamp(0, 1)
        # A piece of width 0, from a frequent value, is 1 above that value and 0 otherwise.
        full_BFT = torch.where(self.width_FT > 0, full_BFT, (above_BFT > 0).float())
        full_BFT = full_BFT * (~missing_BF)[:, :, None]
        within_BF = values_BF.clamp(-BOUND, BOUND)
        return torch.cat([full_BFT.flatten(1), within_BF, missing_BF.float()], dim=1)


def masked_share(num_columns: int) -> float:
    """Return the share of each column's values that are masked in training."""
    return min(MASKED, MASKED_RECORDS / num_columns)


def _limit_repeats(values_N: Tensor, num_pieces: int) -> Tensor:
    """Return the values with fewer copies of the most frequent ones, which then fill fewer pieces.

    If most records have the same value, such as an amount of 0, it would fill most of the pieces
    and leave few for the others. A value may fill two pieces, or more if pieces would otherwise
    contain fewer than LEAST_IN_PIECE values.
    """
    distinct_D, counts_D = values_N.unique(return_counts=True)
    limit = lower = len(values_N)
    total = limit
    while lower >= 1.8 * total / num_pieces and total >= LEAST_IN_PIECE * num_pieces:
        limit, lower = lower, int(0.9 * lower)
        total = int(counts_D.clamp_max(lower).sum())
    return distinct_D.repeat_interleave(counts_D.clamp_max(limit))


class CategoricalEmbeddings(nn.Module):
    """Codes, int32 [B, C] → float32 [B, D], the concatenated embeddings of the columns.

    In training, some codes are masked, so that the embeddings of unseen names and of missing values
    are trained too.
    """

    def __init__(self, sizes: Sequence[int], with_missing_C: Sequence[bool] = ()) -> None:
        super().__init__()
        self._with_missing_C = tuple(with_missing_C)
        # The rule of thumb of fast.ai, with a lower maximum.
        widths = [min(32, round(1.6 * size**0.56)) for size in sizes]
        self.width = sum(widths)
        self.tables = nn.ModuleList(
            nn.Embedding(size, width) for size, width in zip(sizes, widths, strict=True)
        )
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.3)
            # Unseen and missing are rare in training; they start at the mean of all names.
            nn.init.zeros_(table.weight[:FIRST])

    def forward(self, codes_BC: Tensor) -> Tensor:
        """int32 codes [B, C] → float32 [B, D]."""
        if self.training and self._with_missing_C:
            codes_BC = self._masked(codes_BC)
        vectors = [table(codes_BC[:, column]) for column, table in enumerate(self.tables)]
        return torch.cat(vectors, dim=1)

    def _masked(self, codes_BC: Tensor) -> Tensor:
        """Replace some codes by UNSEEN and, in columns without missing values, some by MISSING."""
        draws_BC = torch.rand(codes_BC.shape, device=codes_BC.device)
        known = torch.tensor(self._with_missing_C, device=codes_BC.device)
        share = masked_share(len(self.tables))
        codes_BC = torch.where(draws_BC < share, UNSEEN, codes_BC)
        return torch.where((draws_BC > 1 - share) & ~known, MISSING, codes_BC)


class MemberSigns(nn.Module):
    """Features [B, D] → [B, M, D], multiplied by a sign for each member of an ensemble.

    The signs are initialised at random and trained; all other weights are shared by the members.
    This is the smallest form of TabM by Gorishniy et al., https://arxiv.org/abs/2410.24210.
    """

    def __init__(self, num_members: int, width: int) -> None:
        super().__init__()
        signs_MD = torch.randint(0, 2, (num_members, width)) * 2.0 - 1
        self.signs_MD = nn.Parameter(signs_MD)

    def forward(self, x_BD: Tensor) -> Tensor:
        """float32 [B, D] → float32 [B, M, D]."""
        return x_BD[:, None] * self.signs_MD


def average_members(outputs_BMK: Tensor, target: Target) -> Tensor:
    """Return outputs [B, K] whose predictions are the means of the members' predictions.

    outputs_BMK: float32 [B, M, K].
    """
    num_members = outputs_BMK.shape[1]
    if isinstance(target, ClassTarget):
        logs_BMK = F.log_softmax(outputs_BMK, dim=2)
        return torch.logsumexp(logs_BMK, dim=1) - math.log(num_members)
    if isinstance(target, LabelsTarget):
        yes_BK, no_BK = (
            torch.logsumexp(F.logsigmoid(sign * outputs_BMK), dim=1) for sign in (1, -1)
        )
        return yes_BK - no_BK
    return outputs_BMK.mean(dim=1)
