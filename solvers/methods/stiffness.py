"""What differences of f that are at hand say of the eigenvalues of its Jacobian."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DAMPED = 0.04
"""-Re lambda / |lambda| from which on a mode that swings is one that decays."""
LASTING = 1.5
"""What a mode counts that hardly decays: it makes dopri5 unstable from |dt lambda| = 1.1 on, not from 3.3. Steps that it limits
by stability are found at 1.04 to 1.4, those that follow it at .23, .37, .59 and .93 for tolerances of 1e-6 to 1e-3."""
GROWING = 0.02
"""Re lambda / |lambda| of a mode that grows in truth, and has to be followed."""
SWINGING = 0.5
"""|Im lambda| / |Re lambda| from which on two eigenvalues are worth being told from a real one."""
AGREEING = 0.25
"""Relative change of the eigenvalues found in two steps in a row up to which they are believed."""
INDEPENDENT = 1e3
"""Multiple of the machine epsilon that sin**2 of the angle between two differences has to exceed."""
TOLD_APART = 1e-3
"""sin**2 of the angle between v and M^-1 v, over two steps, from which on a pair of eigenvalues can be told from one."""
UNEXPLAINED = 0.6
"""Share of |M^-2 v|**2 that may be something else's; of a pair alone 1e-5 and less is left."""


class Seen(NamedTuple):
    """Two arguments of f differed by ``change``, its values by ``slopes``, in the direction of time; ``found``: |lambda|**2 and
    Re lambda of the pair of eigenvalues that these and the ones before belong to, floats or ``(B,)``, 0 if there is none."""

    change: Tensor
    slopes: Tensor
    found: tuple[Any, Any]


def unseen(layout: Any, y: Tensor) -> Seen:
    none = torch.zeros_like(y.detach())
    zero = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=layout.real_dtype, device=layout.device)
    return Seen(none, none, (zero, zero))


@torch.no_grad()
def stiffness(layout: Any, scale: Any, change: Tensor, slopes: Tensor, before: Seen) -> tuple[Any, Seen]:
    """The largest |lambda| of modes that decay, as far as two differences show it, 0 if none does, in 1 / t; float or ``(B,)``.

    One difference v gives |Jv| / |v|, which is right for a real lambda. If a pair of conjugate eigenvalues is the largest,
    two differences span its plane, and J restricted to it has them, however far from normal J is. ``scale``: units in which the
    modes that hold a step back stand out from larger ones that do not.
    """
    ops = layout.ops
    v2, a2, va, fit = _products(layout, torch.stack([change, slopes, before.change, before.slopes]) / scale)
    along = (va < 0) & (va * va > 0.25 * v2 * a2) & (v2 > 0)
    single = ops.power(ops.where(along, a2, 0.0) / ops.where(along, v2, 1.0), 0.5)
    square, real = _eigenvalues(ops, fit, INDEPENDENT * torch.finfo(layout.real_dtype).eps)
    old_square, old_real = before.found
    near = (abs(square - old_square) < 2 * AGREEING * square) & ((real - old_real) * (real - old_real) < AGREEING**2 * square)
    decays = (real < 0) & (real * real > DAMPED**2 * square)
    lasts = (real < 0) | (real * real < GROWING**2 * square)
    pair = ops.power(ops.where(decays, 1.0, ops.where(lasts, LASTING**2, 0.0)) * square, 0.5)
    return ops.where(near, pair, single), Seen(change, slopes, (square, real))


class Swing(NamedTuple):
    """Of v, a step's difference from what was foreseen, q = M^-1 v and p = M^-1 q for M = I - g J: <v, v>, <v, q>, <q, q>,
    <v, p>, <q, p>, <p, p>; and g, 0 where nothing was looked at. Floats or ``(B,)``."""

    products: tuple[Any, ...]
    g: Any


def at_rest(layout: Any) -> Swing:
    zero = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
    return Swing((zero,) * 6, zero)


@torch.no_grad()
def swinging(layout: Any, scale: Any, g: Any, v: Tensor, q: Tensor, p: Tensor, before: Swing) -> tuple[Any, ...]:
    """Whether there was a step before of the same g; |g lambda| of the pair of eigenvalues of J that v belongs to in both, 0 if
    there is none; its damping -Re lambda / |lambda|; what was seen. Floats or ``(B,)``. ``scale``: of the error norm.

    In the plane of a pair p = t q - d v, t and d trace and determinant of M^-1, whatever the norm sees of the plane: of a heavy
    pendulum on a stiff spring it sees velocities only. M^-1 makes nothing of the stiffer modes, which would be all that
    products with J leave.
    """
    ops = layout.ops
    seen = Swing(_gram(layout, torch.stack([v, q, p]) / scale), g)
    vv, vq, qq, vp, qp, pp = (new + old for new, old in zip(seen.products, before.products, strict=True))
    spread = vv * qq - vq * vq
    apart = (spread > TOLD_APART * vv * qq) & (before.g == g)
    spread = ops.where(apart, spread, 1.0)
    half, square = 0.5 * (qp * vv - vp * vq) / spread, (qp * vq - vp * qq) / spread
    left = pp - 2 * half * qp + square * vp
    imaginary = square - half * half
    swings = apart & (left < UNEXPLAINED * pp) & (imaginary > 0)
    square = ops.where(swings, square, 1.0)
    real, imaginary = 1.0 - half / square, ops.where(swings, imaginary, 0.0) / (square * square)
    swings = swings & (imaginary > SWINGING**2 * real * real)
    size = ops.power(ops.where(swings, real * real + imaginary, 0.0), 0.5)
    return before.g == g, size, ops.where(swings, -real, 0.0) / ops.where(swings, size, 1.0), seen


def _gram(layout: Any, rows: Tensor) -> tuple[Any, ...]:
    if layout.joint:
        rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
        (vv, vq, vp), (_, qq, qp), (_, _, pp) = (rows @ rows.T).tolist()
        return vv, vq, qq, vp, qp, pp
    vv, vq, vp = _sums(layout, rows.conj() * rows[0])
    qq, qp = _sums(layout, rows[1:].conj() * rows[1])
    (pp,) = _sums(layout, rows[2:].conj() * rows[2])
    return tuple(x.double() for x in (vv, vq, qq, vp, qp, pp))


def _products(layout: Any, rows: Tensor) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """Of v, a = Jv, u, b = Ju: |v|**2, |a|**2, <v, a>; and |v|**2, |u|**2, <v, u>, <v, a>, <u, a>, <v, b>, <u, b>."""
    if layout.joint:
        rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
        (v2, va, vu, vb), (_, a2, ua, _), (_, _, u2, ub), _ = (rows @ rows.T).tolist()
        return v2, a2, va, (v2, u2, vu, va, ua, vb, ub)
    v2, va, vu, vb = _sums(layout, rows.conj() * rows[0])
    ua, u2, ub = _sums(layout, rows[1:].conj() * rows[2])
    (a2,) = _sums(layout, rows[1:2].conj() * rows[1])
    return v2, a2, va, (v2, u2, vu, va, ua, vb, ub)


def _sums(layout: Any, products: Tensor) -> tuple[Tensor, ...]:
    """Sums over each sample's elements of several states' real parts at once."""
    products = products.real if products.is_complex() else products
    if layout.index is not None:
        return tuple(layout.sum(x) for x in products)
    return layout.sum(products.flatten(0, 1)).unflatten(0, (len(products), -1)).unbind(0)


def _eigenvalues(ops: Any, products: tuple[Any, ...], least: float) -> tuple[Any, Any]:
    """|lambda|**2 and Re lambda of J in the plane of v and u, 0 where they are no pair that swings."""
    v2, u2, vu, va, ua, vb, ub = products
    spread = v2 * u2 - vu * vu
    plane = spread > least * v2 * u2
    spread = ops.where(plane, spread, 1.0)
    vv, vw, wv, ww = u2 * va - vu * ua, u2 * vb - vu * ub, v2 * ua - vu * va, v2 * ub - vu * vb
    real = 0.5 * (vv + ww) / spread
    square = (vv / spread) * (ww / spread) - (vw / spread) * (wv / spread)
    swings = plane & (square - real * real > SWINGING**2 * real * real)
    return ops.where(swings, square, 0.0), ops.where(swings, real, 0.0)
