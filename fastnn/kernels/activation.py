"""The scalar functions of the kernels, float32. The activations are numbered as in csrc/params/activation.h."""

import triton
import triton.language as tl

RELU, GELU, GELU_TANH, SILU, SIGMOID, TANH, RELU2, HARDSWISH = (tl.constexpr(code) for code in range(1, 9))
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
GELU_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), the quotient rounded correctly: what is 1 - sigmoid must not lose digits."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Hyperbolic tangent: from e^2x, near 0, where that cancels, its series."""
    a = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.05396825 + square * 0.02186949))))
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.3, series, tl.where(x < 0.0, -large, large))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of that number; z itself for 0."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0.0, 0.0, z)  # NaN stays
    elif ACTIVATION == GELU:
        z = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == GELU_TANH:
        z = z * sigmoid((z + z * z * z * GELU_CUBIC) * GELU_SCALE)
    elif ACTIVATION == SILU:
        z = z * sigmoid(z)
    elif ACTIVATION == SIGMOID:
        z = sigmoid(z)
    elif ACTIVATION == TANH:
        z = tanh(z)
    elif ACTIVATION == RELU2:
        z = tl.where(z <= 0.0, 0.0, z * z)
    elif ACTIVATION == HARDSWISH:
        gate = z + 3.0
        gate = tl.where(gate <= 0.0, 0.0, tl.where(gate >= 6.0, 6.0, gate))
        z = z * (gate * 0.16666667)
    return z


@triton.jit
def slope(s, ACTIVATION: tl.constexpr):
    """f'(z) from s = f(z) for relu, sigmoid and tanh, from s = z for the others; where f is not cut off."""
    if ACTIVATION == RELU:
        f = tl.where(s <= 0.0, 0.0, 1.0)
    elif ACTIVATION == GELU:
        f = 0.5 * (1.0 + tl.erf(s * SQRT_HALF)) + s * tl.exp(-0.5 * s * s) * INVERSE_SQRT_2_PI
    elif ACTIVATION == GELU_TANH:
        u = (s + s * s * s * GELU_CUBIC) * GELU_SCALE
        p = sigmoid(u)
        f = p + s * p * sigmoid(-u) * GELU_SCALE * (1.0 + s * s * GELU_CUBIC * 3.0)
    elif ACTIVATION == SILU:
        p = sigmoid(s)
        f = p + s * p * sigmoid(-s)
    elif ACTIVATION == RELU2:
        f = 2.0 * s
    elif ACTIVATION == HARDSWISH:
        f = tl.where(s >= 3.0, 1.0, s * 0.33333333 + 0.5)
    elif ACTIVATION == SIGMOID:
        f = s * (1.0 - s)
    else:
        f = 1.0 - s * s
    return f


@triton.jit
def through(g, z, ACTIVATION: tl.constexpr, SAVED: tl.constexpr):
    """g f'(z) from z; SAVED: from f(z) for relu, sigmoid and tanh. Nothing comes through where f is cut off, no inf."""
    if ACTIVATION == SIGMOID and not SAVED:
        g = g * (sigmoid(z) * sigmoid(-z))
    elif ACTIVATION == TANH and not SAVED:
        g = g * (sigmoid(2.0 * z) * sigmoid(-2.0 * z) * 4.0)
    elif ACTIVATION == RELU:
        g = tl.where(z <= 0.0, 0.0, g)
    elif ACTIVATION == RELU2:
        g = tl.where(z <= 0.0, 0.0, g * slope(z, ACTIVATION))
    elif ACTIVATION == HARDSWISH:
        g = tl.where(z <= -3.0, 0.0, g * slope(z, ACTIVATION))
    else:
        g = g * slope(z, ACTIVATION)
    return g
