"""Which tokens a row scores highest, exactly: screened by one fast product, judged by a better one.

A fast matrix product (float32, or bfloat16 with float32 sums) rounds each score s = <w, u> by at most

    |s' - s| <= b = r |w| max_t |u_t|        r = d 2^-23 (float32, any order of sums), 1.01 * 2^-7 more if inputs are bfloat16

so its c best tokens hold the k best for certain once the k-th best of those c, computed anew, is above the c-th screened score by
more than b. Rows for which that fails are screened again in float32 with more candidates, and those for which that fails
too - ties above all - are computed in float64 as a whole.

Scores are sums in float64 rounded to the rows' dtype (at least float32), so that what is returned does not depend on how a
product was cut into blocks: tokens with equal vectors have equal scores, and of equal scores the lowest id comes first.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import OptionError
from interp_kernels.unembed_top_k import TopTokens, unembed_top_k

_SPARE = {False: 6, True: 54}  # candidates beyond k, by whether they are screened in bfloat16
_MORE = 128  # candidates of rows that were not certain: as many as the kernel keeps
_NUMBERS = 2**21  # of candidates' vectors, or of scores, that are held in float64 at once


@torch.no_grad()
def top_tokens(
    rows: Float[Tensor, "row d"], weight: Float[Tensor, "vocabulary d"], k: int, *, both: bool = False, moments: bool = False,
    screen: torch.dtype | None = None,
) -> TopTokens:  # fmt: skip
    """The k tokens of largest <row, u_t> for each row, exactly; ties go to the lowest id.

    both: also the k largest of -<row, u_t>, as a second pole. moments: sums over the vocabulary of the screened scores' first
    four powers. screen: torch.bfloat16 screens in that; the result is the same. Raises `OptionError` where k is not from 1 to the
    size of the vocabulary.
    """
    if not 1 <= k <= len(weight):
        raise OptionError(f"cannot name {k} of {len(weight)} tokens")
    result, left = None, torch.arange(len(rows), device=rows.device)
    for dtype, c in ((screen or rows.dtype, k + _SPARE[screen is not None]), (rows.dtype, _MORE)):
        if k <= c < len(weight) and len(left):
            found, certain = _screened(rows[left], weight, k, c, dtype, both, moments and result is None)
            if result is None:
                result = found
            else:
                result.values[:, left], result.ids[:, left] = found.values, found.ids
            left = left[~certain]
    if result is None:
        found = unembed_top_k(rows, weight, 1, both=both, moments=moments)
        shape = (1 + both, len(rows), k)
        result = TopTokens(found.values.new_empty(shape), found.ids.new_empty(shape), found.moments)
    for part in left.split(max(1, _NUMBERS // len(weight))):
        scores = _exact(rows[part], weight).to(result.values.dtype)
        for pole in range(1 + both):
            best, ids = (-scores if pole else scores).sort(dim=1, descending=True, stable=True)
            result.values[pole, part], result.ids[pole, part] = best[:, :k], ids[:, :k]
    return result


def _screened(
    rows: Float[Tensor, "row d"], weight: Float[Tensor, "vocabulary d"], k: int, c: int, dtype: torch.dtype, both: bool,
    moments: bool,
) -> tuple[TopTokens, Bool[Tensor, " row"]]:  # fmt: skip
    """The k best of c candidates, and for which rows they are certain to be the best of all."""
    found = unembed_top_k(rows.to(dtype), weight.to(dtype), c, both=both, moments=moments)
    bound = _rounding(rows.shape[1], dtype) * rows.norm(dim=1) * weight.norm(dim=1).max()
    judged = [_judged(rows, weight, ids, k, sign) for sign, ids in zip((1, -1), found.ids, strict=False)]
    values, ids = (torch.stack(side) for side in zip(*judged, strict=True))
    certain = (values[:, :, -1] > found.values[:, :, -1] + bound).all(0)
    return TopTokens(values, ids, found.moments), certain


def _exact(rows: Float[Tensor, "row d"], weight: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "row vocabulary"]:
    wide = rows.double()
    return torch.cat([wide @ part.double().T for part in weight.split(max(1, _NUMBERS // weight.shape[1]))], 1)


def _rounding(d: int, dtype: torch.dtype) -> float:
    """r: the most that a screened score can be off, as a share of |w| |u|."""
    sums = d * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return sums + (1.01 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0)


def _judged(
    rows: Float[Tensor, "row d"], weight: Float[Tensor, "vocabulary d"], ids: Int[Tensor, "row c"], k: int, sign: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The k best of each row's candidates by scores in float64, rounded; ties to the lowest id."""
    ids = ids.sort(dim=1).values
    dtype, c = torch.promote_types(rows.dtype, torch.float32), ids.shape[1]
    scores = torch.empty(ids.shape, dtype=dtype, device=rows.device)
    for part in torch.arange(len(rows), device=rows.device).split(max(1, _NUMBERS // (c * rows.shape[1]))):
        vectors = weight[ids[part].flatten()].double().unflatten(0, (len(part), c))
        scores[part] = (sign * (vectors @ rows[part].double()[:, :, None])[:, :, 0]).to(dtype)
    best, place = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k].contiguous(), ids.gather(1, place[:, :k])
