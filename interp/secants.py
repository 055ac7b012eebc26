"""Slopes between two points: (f(a) - f(b)) / (a - b), without dividing by a small difference.

A secant rule sends a score back through a non-linearity by the slope between its values in two runs, so that
differences are carried exactly. The plain quotient loses every digit where the runs nearly agree, and a sum of
attributions does not reveal it: a wrong slope at a tiny difference multiplies a tiny number there, but the same slope
passes huge multipliers on to what lies before. Each function here has the closed form instead; all are symmetric in a
and b and equal the derivative where a == b.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, "..."]
_GAP = 0.25  # differences below which the mean normal density is a series; with four terms its error is 1e-14 there


def decay(d: Values) -> Values:
    """(1 - exp(-d)) / d for d >= 0, and 1 at d = 0: the mean of exp over [-d, 0]."""
    minus = d.clamp_min(torch.finfo(d.dtype).tiny).neg_()
    return torch.expm1(minus).div_(minus)


def exp_slope(a: Values, b: Values) -> Values:
    """Of exp: its mean between the two points."""
    return torch.maximum(a, b).exp() * decay((a - b).abs())


def sigmoid_slope(a: Values, b: Values) -> Values:
    """Of sigmoid: sigmoid(high) sigmoid(-low) (1 - exp(-d)) / d; nothing in it can overflow."""
    return torch.maximum(a, b).sigmoid() * (-torch.minimum(a, b)).sigmoid() * decay((a - b).abs())


def swish_slope(a: Values, b: Values, h_a: Values, h_b: Values, h_slope: Values | float) -> Values:
    """Of x sigmoid(h(x)), given h at both points and h's own slope: x_mid slope + sigmoid_mid."""
    s_a, s_b = h_a.sigmoid(), h_b.sigmoid()
    # as `sigmoid_slope`, out of the two values at hand: 1 - sigmoid keeps too few digits only where nothing depends on them
    high, low = torch.maximum(s_a, s_b), torch.minimum(s_a, s_b)
    steep = (1 - low).mul_(high).mul_(decay((h_a - h_b).abs_())).mul_(h_slope)
    return (a + b).mul_(steep).add_(s_a).add_(s_b).div_(2)


def tanh_slope(a: Values, b: Values) -> Values:
    """Of tanh, as tanh(x) = 2 sigmoid(2x) - 1."""
    return 4 * sigmoid_slope(2 * a, 2 * b)


def normal_cdf_slope(a: Values, b: Values) -> Values:
    """Of the standard normal distribution function: the mean density between the two points."""
    d, middle = a - b, (a + b) / 2
    near, m2, h2 = d.abs() < _GAP, middle * middle, (d / 2) ** 2
    density = torch.exp(-m2 / 2) * (1 / math.sqrt(2 * math.pi))
    # Hermite polynomials: the density's even derivatives at the middle, divided by the density
    he2, he4 = m2 - 1, (m2 - 6) * m2 + 3
    he6, he8 = ((m2 - 15) * m2 + 45) * m2 - 15, (((m2 - 28) * m2 + 210) * m2 - 420) * m2 + 105
    series = density * (1 + h2 * (he2 / 6 + h2 * (he4 / 120 + h2 * (he6 / 5040 + h2 * he8 / 362880))))
    quotient = (torch.special.ndtr(a) - torch.special.ndtr(b)) / torch.where(near, 1.0, d)
    return torch.where(near, series.masked_fill(density == 0, 0), quotient)  # far out, where powers may overflow


def relu_slope(a: Values, b: Values) -> Values:
    """Of relu: 1, 0, or the share of the way that is above 0."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return torch.where(low > 0, 1.0, high.relu() / (high - low).clamp_min(torch.finfo(a.dtype).tiny))


def relu_squared_slope(a: Values, b: Values) -> Values:
    """Of relu(x)^2: the sum of the two values times relu's slope."""
    return (a.relu() + b.relu()) * relu_slope(a, b)


def probability_mean(x: Float[Tensor, "... key"], other: Float[Tensor, "... key"]) -> Float[Tensor, "... key"]:
    """Logarithmic mean L = dp / dlog p of two softmaxes p over the last axis: of a probability, its slope by its logarithm.

    It is bounded by both and blind to what is added to a whole row of one run. As the p sum to 1 in both runs,
    d(log of the sum of exp) = sum(L dx) / sum(L). What is -inf in both runs has L = 0.
    """
    log_p, log_q = x.log_softmax(-1), other.log_softmax(-1)
    difference = (log_p - log_q).abs().nan_to_num(0.0)  # -inf - -inf is no number
    return torch.maximum(log_p, log_q).exp() * decay(difference)


def product_slope(slope: Values, value_a: Values, value_b: Values, a: Values, b: Values) -> Values:
    """Of x g(x), given g's slope and values at both points: x_mid slope + g_mid (an exact identity)."""
    return ((a + b) * slope + value_a + value_b) / 2
