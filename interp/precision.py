"""In which precision numbers are summed, divided and compared."""

from jaxtyping import Float
from torch import Tensor, float32, promote_types


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """x in float32 if it is narrower (bfloat16, float16), else unchanged: statistics, ratios and slopes are formed in this."""
    return x.to(promote_types(x.dtype, float32))
