"""Diffusion fields of the main job (a line, a terrain, a photograph), each with its exact sparse Jacobian."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

__all__ = ["HillslopeDiffusion", "PeriodicDiffusion", "PeronaMalik"]


@dataclass(frozen=True)
class PeriodicDiffusion:
    """Linear diffusion on a periodic line: dy_i/dt = (y_{i-1} - 2 y_i + y_{i+1}) / spacing**2 (Xia 2023, section 5.3).

    `spacing` is the distance between points; `y` is `(..., N)`.
    """

    spacing: float

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) / self.spacing**2

    def energy(self, t: Tensor, y: Tensor) -> Tensor:
        """The Dirichlet energy of which the field is the negative gradient, `(...)`."""
        return ((torch.roll(y, -1, -1) - y) / self.spacing).square().sum(-1) / 2

    def exact(self, y0: Tensor, times: Tensor) -> Tensor:
        """Solution at `times` `(T,)`, as `(T, N)`.

        The stencil is circulant, so that its matrix exponential is diagonal in Fourier space.
        """
        points = y0.shape[-1]
        wave = 2 * torch.pi * torch.arange(points, dtype=y0.dtype) / points
        decay = (2 * torch.cos(wave) - 2) / self.spacing**2
        spectrum = torch.fft.fft(y0) * torch.exp(times[:, None] * decay)
        return torch.fft.ifft(spectrum).real

    def jacobian(self, y: Tensor) -> sparse.csc_array:
        """df/dy, `(N, N)`, the same for every `y`."""
        points = y.shape[-1]
        band = sparse.diags([1.0, 1.0, -2.0, 1.0, 1.0], offsets=[1 - points, -1, 0, 1, points - 1], shape=(points, points))
        return sparse.csc_array(band / self.spacing**2)


@dataclass(frozen=True)
class HillslopeDiffusion:
    """Nonlinear hillslope diffusion dh/dt = div q, q = K g (1 + (g/S)**2 + (g/S)**4), without flux through the borders.

    g is the slope *across the face* between two cells, (h_j - h_i) / distance: a one-dimensional difference. So each
    face has a flux phi'(g) of its own slope only, the field is the exact negative gradient of the convex `energy`, and
    what leaves one cell enters its neighbour. The polynomial is the Taylor form of
    Ganti et al. 2012, Water Resour. Res. 48, W05507.

    `spacing` in m between rows and between columns, `diffusivity` in m**2/yr, heights `(rows, columns)` in m, t in yr.
    """

    spacing: tuple[float, float]
    diffusivity: float = 0.03
    critical_slope: float = 1.25

    def __call__(self, t: Tensor, height: Tensor) -> Tensor:
        change = torch.zeros_like(height)
        for axis, spacing in enumerate(self.spacing):
            cells = height.shape[axis]
            drop = torch.diff(height, dim=axis)
            square = (drop * drop).mul(1 / (spacing * self.critical_slope) ** 2)
            flow = drop * torch.addcmul(square + 1, square, square) * (self.diffusivity / spacing**2)
            change.narrow(axis, 0, cells - 1).add_(flow)
            change.narrow(axis, 1, cells - 1).sub_(flow)
        return change

    def energy(self, t: Tensor, height: Tensor) -> Tensor:
        """Sum over faces of phi(g) = K (g**2/2 + g**4/(4 S**2) + g**6/(6 S**4)); the field is minus its gradient."""
        total = height.new_zeros(())
        for axis, spacing in enumerate(self.spacing):
            square = (torch.diff(height, dim=axis) / spacing) ** 2
            ratio = square / self.critical_slope**2
            total = total + self.diffusivity * (square * (0.5 + ratio * (0.25 + ratio / 6))).sum()
        return total

    def jacobian(self, height: Tensor) -> sparse.csc_array:
        """df/dh, `(cells, cells)`, symmetric, negative semidefinite: -D^T phi''(g) D, summed over both directions."""
        parts = []
        for axis, spacing in enumerate(self.spacing):
            difference = _difference(height.shape, axis) / spacing
            ratio = (torch.diff(height, dim=axis) / (spacing * self.critical_slope)).square().reshape(-1).numpy()
            curvature = self.diffusivity * (1 + ratio * (3 + ratio * 5))
            parts.append(difference.T @ sparse.diags(curvature) @ difference)
        return sparse.csc_array(-sum(parts))


@dataclass(frozen=True)
class PeronaMalik:
    """Perona-Malik denoising du/dt = div(c grad u), c = 1 / (1 + |grad u_s|**2 / contrast**2), no flux through borders.

    u_s is u after a binomial smoothing (1, 2, 1)/4 along both axes, which makes the problem well posed (Catte, Lions,
    Morel, Coll 1992, SIAM J. Numer. Anal. 29, 182-193). Gradients of u_s are central, a face's conductance is the mean
    of its two cells'. Pixels are 1 apart, grey levels in [0, 1]; `u` is `(rows, columns)`.
    """

    contrast: float

    def __call__(self, t: Tensor, image: Tensor) -> Tensor:
        conductance = self.conductance(image)
        change = torch.zeros_like(image)
        for axis in (0, 1):
            cells = image.shape[axis]
            near, far = conductance.narrow(axis, 0, cells - 1), conductance.narrow(axis, 1, cells - 1)
            flow = torch.diff(image, dim=axis) * (near + far) * 0.5
            change.narrow(axis, 0, cells - 1).add_(flow)
            change.narrow(axis, 1, cells - 1).sub_(flow)
        return change

    def conductance(self, image: Tensor) -> Tensor:
        """c of every cell, in (0, 1], from the smoothed image; borders are mirrored."""
        smooth = image
        for axis in (0, 1):
            smooth = (_shift(smooth, 1, axis) + 2 * smooth + _shift(smooth, -1, axis)) * 0.25
        slopes = [(_shift(smooth, -1, axis) - _shift(smooth, 1, axis)) * 0.5 for axis in (0, 1)]
        return 1 / (1 + (slopes[0].square() + slopes[1].square()) / self.contrast**2)

    def jacobian(self, image: Tensor) -> sparse.csc_array:
        """df/du, `(cells, cells)`: the diffusion with c held fixed, plus what a change of c does."""
        flat = image.reshape(-1).numpy()
        smoothing = sparse.kron(_binomial(image.shape[0]), _binomial(image.shape[1]), format="csr")
        slope_matrices = [_central(image.shape, axis) @ smoothing for axis in (0, 1)]
        slopes = [matrix @ flat for matrix in slope_matrices]
        conductance = 1 / (1 + (slopes[0] ** 2 + slopes[1] ** 2) / self.contrast**2)
        weight = -2 * conductance**2 / self.contrast**2
        conductance_jacobian = sum(sparse.diags(weight * g) @ m for g, m in zip(slopes, slope_matrices))
        total = 0
        for axis in (0, 1):
            difference = _difference(image.shape, axis)
            mean = abs(difference) * 0.5
            flow = sparse.diags(mean @ conductance) @ difference
            flow = flow + sparse.diags(difference @ flat) @ mean @ conductance_jacobian
            total = total - difference.T @ flow
        return sparse.csc_array(total)


def _shift(x: Tensor, by: int, axis: int) -> Tensor:
    """x moved by one cell along `axis`, the border cell repeated."""
    cells = x.shape[axis]
    if by > 0:
        return torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, cells - 1)], axis)
    return torch.cat([x.narrow(axis, 1, cells - 1), x.narrow(axis, cells - 1, 1)], axis)


def _along(shape: tuple[int, ...], axis: int, matrix: sparse.sparray) -> sparse.csr_array:
    """`matrix` applied along one axis of a flattened `(rows, columns)` array."""
    factors = [sparse.eye(n) for n in shape]
    factors[axis] = matrix
    return sparse.csr_array(sparse.kron(factors[0], factors[1]))


def _difference(shape: tuple[int, ...], axis: int) -> sparse.csr_array:
    """(D x)_face = x_next - x_this, `(faces, cells)`."""
    cells = shape[axis]
    return _along(shape, axis, sparse.diags([-1.0, 1.0], offsets=[0, 1], shape=(cells - 1, cells)))


def _binomial(cells: int) -> sparse.csr_array:
    """The smoothing (1, 2, 1)/4 with mirrored borders."""
    matrix = sparse.lil_array(sparse.diags([0.25, 0.5, 0.25], offsets=[-1, 0, 1], shape=(cells, cells)))
    matrix[0, 0] = matrix[cells - 1, cells - 1] = 0.75
    return sparse.csr_array(matrix)


def _central(shape: tuple[int, ...], axis: int) -> sparse.csr_array:
    """Central differences with mirrored borders, `(cells, cells)`."""
    cells = shape[axis]
    matrix = sparse.lil_array(sparse.diags([-0.5, 0.5], offsets=[-1, 1], shape=(cells, cells)))
    matrix[0, 0], matrix[cells - 1, cells - 1] = -0.5, 0.5
    return _along(shape, axis, sparse.csr_array(matrix))


def sparsity(jacobian: sparse.csc_array) -> sparse.csc_array:
    """The pattern of a Jacobian, for solvers that difference it by columns."""
    pattern = jacobian.copy()
    pattern.data = np.ones_like(pattern.data)
    return pattern
