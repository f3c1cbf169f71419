"""Krylov methods against dense solutions."""

from __future__ import annotations

import math

import pytest
import torch

from solvers.layout import Layout
from solvers.linalg import gcr, gmres, minres

D = torch.float64


class Geometry:
    """Inner products and masks of a batch of vectors."""

    def __init__(self, batch, width):
        self.layout = Layout(torch.zeros(batch, width, dtype=D), 0)
        self.ops = self.layout.ops

    def dot(self, x, y):
        return self.layout.sum(x * y)

    def keep(self, mask, new, old):
        return torch.where(self.layout.spread(mask), new, old)

    def ratio(self, numerator, denominator):
        return numerator / torch.where(denominator > 0, denominator, math.nan)


def systems(batch=4, width=30):
    """Nonsymmetric, diagonally dominant, of very different condition."""
    torch.manual_seed(0)
    matrix = torch.randn(batch, width, width, dtype=D) / width**0.5
    weights = torch.logspace(0, 2, batch, dtype=D).view(-1, 1, 1)
    return torch.eye(width, dtype=D) + weights * (torch.diag_embed(torch.rand(batch, width, dtype=D)) + 0.1 * matrix)


@pytest.mark.parametrize("restart", [8, 40])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_gmres_solves_each_sample(restart, preconditioned):
    matrix = systems()
    b = torch.randn(4, 30, dtype=D)
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2)
    geometry = Geometry(4, 30)
    enough = 1e-10 * geometry.dot(b, b) ** 0.5
    x, residual, unsolved = gmres(
        lambda v: torch.einsum("bij,bj->bi", matrix, v), b, geometry, enough, running=torch.ones(4, dtype=torch.bool),
        restart=restart, max_iters=400, precond=(lambda v: v / diagonal) if preconditioned else None,
    )
    left = b - torch.einsum("bij,bj->bi", matrix, x)
    assert not unsolved.any() and (geometry.dot(left, left) ** 0.5 <= 1.01 * enough).all()
    assert torch.allclose(left, residual, rtol=0, atol=1e-11)
    assert torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-9)


def test_gmres_ends_after_as_many_products_as_unknowns():
    products = []
    matrix = systems(1, 6)

    def product(v):
        products.append(v)
        return v @ matrix[0].T

    b = torch.randn(1, 6, dtype=D)
    x, _, _ = gmres(product, b, Geometry(1, 6), torch.tensor([1e-12]), running=torch.ones(1, dtype=torch.bool))
    assert len(products) <= 6 and torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-9)


def test_gcr_solves_each_sample():
    matrix = systems()
    b = torch.randn(4, 30, dtype=D)
    geometry = Geometry(4, 30)
    enough = 1e-9 * geometry.dot(b, b) ** 0.5
    x, unsolved = gcr(lambda v: torch.einsum("bij,bj->bi", matrix, v), b, geometry, enough, 500, window=30)
    assert not unsolved.any() and torch.allclose(x, torch.linalg.solve(matrix, b), rtol=1e-5, atol=1e-8)


def test_gmres_says_which_samples_it_did_not_solve_and_what_is_left():
    matrix, b, geometry = systems(), torch.randn(4, 30, dtype=D), Geometry(4, 30)
    product = lambda v: torch.einsum("bij,bj->bi", matrix, v)
    enough = torch.tensor([1e-3, 1e-3, 1e-9, 1e-9], dtype=D) * geometry.dot(b, b) ** 0.5
    x, residual, unsolved = gmres(product, b, geometry, enough, running=torch.ones(4, dtype=torch.bool), max_iters=12)
    left = b - product(x)
    assert unsolved.tolist() == (geometry.dot(left, left) ** 0.5 > enough).tolist() == [False, False, True, True]
    assert torch.allclose(left, residual, rtol=0, atol=1e-11)


def test_minres_solves_symmetric_systems_and_says_where_it_breaks_down():
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 20, 20, dtype=D))[0]
    values = torch.stack([torch.linspace(1, 2, 20), torch.logspace(0, 4, 20), -torch.linspace(1, 2, 20)]).to(D)
    matrix, b, geometry = turn @ torch.diag_embed(values) @ turn.mT, torch.randn(3, 20, dtype=D), Geometry(3, 20)
    norm, enough = (lambda r: geometry.dot(r, r) ** 0.5), 1e-8 * geometry.dot(b, b) ** 0.5
    everyone = torch.ones(3, dtype=torch.bool)
    product = lambda v: torch.einsum("bij,bj->bi", matrix, v)
    x, residual, unsolved, broken = minres(product, b, geometry, norm, enough, running=everyone)
    assert unsolved.tolist() == broken.tolist() == [False, False, True]
    assert torch.allclose(b - product(x), residual, rtol=0, atol=1e-9)
    short = minres(product, b, geometry, norm, enough, running=everyone, max_iters=15)
    assert short[2].tolist() == [False, True, True] and short[3].tolist() == [False, False, True]
    assert torch.allclose(x[:2], torch.linalg.solve(matrix, b)[:2], rtol=1e-5, atol=1e-8)
    # The same minimum over the same space as GMRES, one product more or less.
    few = minres(product, b, geometry, norm, 0 * enough, running=everyone, max_iters=7)[1]
    full = gmres(product, b, geometry, 0 * enough, running=everyone, max_iters=7)[1]
    assert torch.allclose(few[:2], full[:2], atol=1e-9)
