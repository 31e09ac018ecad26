"""A net for numbers and categories.

Each number goes through a piecewise linear encoding, after Gorishniy et al.,
https://arxiv.org/abs/2203.05556, whose pieces hold equally many training records; each category
through an embedding.

Shapes: B batch, F numbers, C columns of categories, T pieces, D width, M members, K outputs.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.tasks import ClassTarget, LabelsTarget, Target
from train.tasks.columns.categorical import FIRST, MISSING, UNSEEN

# In deviations from the mean; a number beyond is no further away.
BOUND = 10.0
# Pieces of the encoding hold no fewer values than this where a frequent value leaves few of them.
LEAST_IN_PIECE = 100
# Share of a column's values that count as missing, and as never seen, in training; and of records
# that have one such value. More costs what is learned of the others.
MASKED, MASKED_RECORDS = 0.01, 0.05
# The width of a piece that is never filled.
ENDLESS = 1e30


class PiecewiseLinearEncoding(nn.Module):
    """Numbers [B, F], NaN where missing → [B, F·(T + 2)]: how full each piece is, the number
    itself within bounds, and whether it is missing.

    In training a few numbers of the places that never lack one count as missing, so that it is
    learned what to make of that.
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
        numbers, bins = self.low_FT.shape
        return numbers * (bins + 2)

    @torch.no_grad()
    def fit_inputs(self, numbers_NF: Tensor) -> None:
        """Set the edges of the pieces, from a sample of training records."""
        num_pieces = self.low_FT.shape[1]
        steps = torch.linspace(0, 1, num_pieces + 1)
        for column, values_N in enumerate(numbers_NF.T):
            known = values_N[~values_N.isnan()]
            if len(known):
                spread = _limit_repeats(known.double(), num_pieces)
                edges = torch.quantile(spread, steps.double()).float()
                self.low_FT[column] = edges[:-1]
                self.width_FT[column] = edges.diff()
                # A value that many records have makes pieces without width. One of them says all;
                # the others would weigh it as often as there are.
                without = self.width_FT[column] == 0
                self.width_FT[column, 1:][without[1:] & without[:-1]] = ENDLESS

    def forward(self, numbers_BF: Tensor) -> Tensor:
        missing_BF = torch.isnan(numbers_BF)
        if self.training and self._masked:
            masked = torch.rand(len(numbers_BF), len(self._masked), device=numbers_BF.device)
            missing_BF[:, self._masked] |= masked < masked_share(len(self._masked))
        values_BF = torch.where(missing_BF, 0.0, numbers_BF)
        above_BFT = values_BF[:, :, None] - self.low_FT
        full_BFT = (above_BFT / self.width_FT.clamp_min(1e-9)).clamp(0, 1)
        # A value that many records have makes a piece without width: above it or not.
        full_BFT = torch.where(self.width_FT > 0, full_BFT, (above_BFT > 0).float())
        full_BFT = full_BFT * (~missing_BF)[:, :, None]
        within_BF = values_BF.clamp(-BOUND, BOUND)
        return torch.cat([full_BFT.flatten(1), within_BF, missing_BF.float()], dim=1)


def masked_share(num_columns: int) -> float:
    """The share of the values of each column that are masked in training."""
    return min(MASKED, MASKED_RECORDS / num_columns)


def _limit_repeats(values_N: Tensor, num_pieces: int) -> Tensor:
    """Return the values, the most frequent of them less often, so that they fill fewer pieces.

    Where most records have one value, such as 0 for what few people own, it would take most of the
    pieces, and the others would share the rest. A value may fill two pieces, and more where the
    others are so few that pieces would hold fewer than LEAST_IN_PIECE of them.
    """
    distinct_D, counts_D = values_N.unique(return_counts=True)
    limit = lower = len(values_N)
    total = limit
    while lower >= 1.8 * total / num_pieces and total >= LEAST_IN_PIECE * num_pieces:
        limit, lower = lower, int(0.9 * lower)
        total = int(counts_D.clamp_max(lower).sum())
    return distinct_D.repeat_interleave(counts_D.clamp_max(limit))


class CategoricalEmbeddings(nn.Module):
    """Codes [B, C] → [B, D], the columns' vectors side by side.

    In training a few codes are masked, so that the vectors of names that were never seen and of
    missing ones are learned as those of any record.
    """

    def __init__(self, sizes: Sequence[int], with_missing_C: Sequence[bool] = ()) -> None:
        super().__init__()
        self._with_missing_C = tuple(with_missing_C)
        # By fast.ai's rule of thumb, but short of its largest.
        widths = [min(32, round(1.6 * size**0.56)) for size in sizes]
        self.width = sum(widths)
        self.tables = nn.ModuleList(
            nn.Embedding(size, width) for size, width in zip(sizes, widths, strict=True)
        )
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.3)
            # What training shows rarely begins in the middle of all names.
            nn.init.zeros_(table.weight[:FIRST])

    def forward(self, codes_BC: Tensor) -> Tensor:
        if self.training and self._with_missing_C:
            codes_BC = self._masked(codes_BC)
        vectors = [table(codes_BC[:, column]) for column, table in enumerate(self.tables)]
        return torch.cat(vectors, dim=1)

    def _masked(self, codes_BC: Tensor) -> Tensor:
        """Codes of which a few are that of a name never seen, and of a missing one in columns that
        never lack one."""
        draws_BC = torch.rand(codes_BC.shape, device=codes_BC.device)
        known = torch.tensor(self._with_missing_C, device=codes_BC.device)
        share = masked_share(len(self.tables))
        codes_BC = torch.where(draws_BC < share, UNSEEN, codes_BC)
        return torch.where((draws_BC > 1 - share) & ~known, MISSING, codes_BC)


class MemberSigns(nn.Module):
    """Features [B, D] → [B, M, D]: each member of an ensemble sees them with signs of its own.

    The signs, which are learned on, are all that tells the members apart: TabM of Gorishniy et al.,
    https://arxiv.org/abs/2410.24210, in its smallest form.
    """

    def __init__(self, num_members: int, width: int) -> None:
        super().__init__()
        signs_MD = torch.randint(0, 2, (num_members, width)) * 2.0 - 1
        self.signs_MD = nn.Parameter(signs_MD)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD[:, None] * self.signs_MD


def average_members(outputs_BMK: Tensor, target: Target) -> Tensor:
    """Return outputs [B, K] whose predictions are the means of the members'."""
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
