"""Runge-Kutta tableaux: their checks, and what the checks can't say (orders above 5, by measuring them)."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import DOP853, RK23, RK45

from solvers.methods.tableau import Extension, Tableau, TableauError, rooted_trees, stage_weights
from solvers.methods.tableaus import TABLEAUS

ALL = pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS.keys())
PAIRS = [tableau for tableau in TABLEAUS.values() if tableau.b_error]
FSAL = {"bosh3", "dopri5", "tsit5"}
EXTENSION_ORDER = {1: 1, 2: 2, 3: 3, 4: 3, 5: 4, 8: 7}


# --- a Runge-Kutta step in numpy -------------------------------------------------------------------------------------


def field(t, y):
    """Nonlinear and not autonomous; its solution is entire, so that orders show at moderate steps."""
    y1, y2, y3, y4 = y
    return np.array([np.cos(t) * np.sqrt(y2), 2 * y4 * np.exp(2 * (y3 - 1)), y4 * y1**2 / y2, -np.sin(t) * y2 / y1**2])


def exact(t):
    s = np.sin(t)
    return np.array([np.exp(s), np.exp(2 * s), s + 1, np.cos(t)])


def stages_of(tableau, t, y, dt):
    """Values of f at all stages, the extra ones of the extension included: (stages, dim)."""
    k = []
    for node, row in zip(tableau.all_c, tableau.all_a):
        k.append(field(t + node * dt, y + dt * sum((w * x for w, x in zip(row, k)), np.zeros_like(y))))
    return np.array(k)


def step(tableau, t, y, dt):
    return y + dt * (np.array(tableau.b) @ stages_of(tableau, t, y, dt)[: tableau.stages])


def dense(tableau, t, y, dt, theta):
    """The extension at the points theta: (points, dim)."""
    P = np.array(tableau.extension.P)
    weights = theta[:, None] ** np.arange(1, P.shape[1] + 1) @ P.T
    return y + dt * weights @ stages_of(tableau, t, y, dt)


def slope(sizes, errors):
    """Observed order: the least-squares slope of log error over log dt."""
    assert min(errors) > 1e-13, f"errors {errors} drown in rounding"
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def vary(row, i, by=1e-6):
    return tuple(value + by * (j == i) for j, value in enumerate(row))


# --- what every tableau holds ----------------------------------------------------------------------------------------


@ALL
def test_names_references_and_a_rebuild_from_its_own_data(tableau):
    assert TABLEAUS[tableau.name] is tableau
    assert tableau.reference
    assert replace(tableau) == tableau
    assert hash(replace(tableau)) == hash(tableau)


def test_the_registry_holds_the_promised_methods():
    assert set(TABLEAUS) == {
        *("euler", "midpoint", "heun2", "ralston2", "heun3", "ssprk33", "rk4", "rk4_classic"),
        *("adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8", "dop853"),
    }


def test_rooted_trees_are_counted_right():
    counts = np.bincount([tree.order for tree in rooted_trees(8)])
    assert counts.tolist() == [0, 1, 1, 2, 4, 9, 20, 48, 115]
    assert {str(tree): tree.density for tree in rooted_trees(3)} == {"t": 1, "[t]": 2, "[[t]]": 6, "[t,t]": 3}


@ALL
def test_fsal_and_the_stage_at_the_end_are_derived(tableau):
    assert tableau.fsal == (tableau.name in FSAL)
    if tableau.f1_stage is None:
        assert tableau.order <= 2
        return
    t, dt = 0.4, 0.3
    y1 = step(tableau, t, exact(t), dt)
    np.testing.assert_allclose(stages_of(tableau, t, exact(t), dt)[tableau.f1_stage], field(t + dt, y1), rtol=1e-14)
    assert tableau.f1_stage == (tableau.stages - 1 if tableau.fsal else tableau.stages)


@ALL
def test_every_order_condition_holds_through_the_full_order(tableau):
    """Through order 8, where building a tableau stops at 5; extension included, and one order more fails."""
    weights = stage_weights(tableau.all_a, 9)
    b = np.array([*tableau.b, *[0.0] * len(tableau.extension.a_extra)])
    P = np.array(tableau.extension.P)
    for what, rows, order in (("b", b[:, None], tableau.order), ("P", P, tableau.extension.order)):
        residual = np.zeros(order + 2)
        for tree in rooted_trees(order + 1):
            target = np.zeros(rows.shape[1])
            if what == "b":
                target[0] = 1 / tree.density
            elif tree.order <= len(target):
                target[tree.order - 1] = 1 / tree.density
            gap = np.abs(np.array(weights[tree]) @ rows - target).max()
            if what == "P" and tree.order > rows.shape[1]:
                gap = 1.0  # theta^order itself is missing
            residual[tree.order] = max(residual[tree.order], gap)
        # As floats; the extensions of order 7 have coefficients of 600 that cancel.
        assert residual[:-1].max() < 1e-14 * max(10, np.abs(rows).max()), what
        assert residual[-1] > 1e-7, f"{what} is of a higher order than declared"


@ALL
def test_the_extension_joins_the_steps(tableau):
    """Continuous at both ends everywhere; with a continuous derivative where f(t1, y1) is among the stages."""
    P = np.array(tableau.extension.P)
    powers = np.arange(1, P.shape[1] + 1)
    unit = np.eye(len(P))
    np.testing.assert_allclose(P.sum(1)[: tableau.stages], tableau.b, rtol=0, atol=1e-12)
    if tableau.order > 1:
        np.testing.assert_array_equal(P[:, 0], unit[0])
    if tableau.f1_stage is not None:
        np.testing.assert_allclose(P @ powers, unit[tableau.f1_stage], rtol=0, atol=2e-12)


def test_exponents_of_the_error_estimates():
    found = {tableau.name: tableau.error_order for tableau in PAIRS}
    assert found == {"adaptive_heun": 2, "fehlberg2": 2, "bosh3": 3, "dopri5": 5, "tsit5": 5, "dopri8": 8, "dop853": 8}
    assert TABLEAUS["rk4"].error_order is None


def conditions(a, order, columns):
    """Order conditions, times gamma, of weights over ``columns``: (trees, columns), and right sides (trees, order)."""
    weights, trees = stage_weights(a, order), rooted_trees(order)
    matrix = np.array([np.array(weights[tree])[columns] * tree.density for tree in trees])
    return matrix, np.array([np.arange(1, order + 1) == tree.order for tree in trees], dtype=float)


def test_the_extension_of_dopri8_follows_from_its_derivation():
    tableau, columns = TABLEAUS["dopri8"], [0, *range(5, 14)]
    a, c, P = tableau.all_a, tableau.all_c, np.array(tableau.extension.P)
    np.testing.assert_allclose(c[14:16], [0.5 - 0.5 / 7**0.5, 0.5 + 0.5 / 7**0.5], rtol=1e-15)
    for i in (14, 15, 16):  # a row is the solution of least norm of the conditions of order 6 at its node
        matrix, right = conditions(a[:i], 6, columns)
        row = np.linalg.pinv(matrix, rcond=1e-10) @ right @ c[i] ** np.arange(1, 7)
        np.testing.assert_allclose(np.array(a[i])[columns], row, rtol=0, atol=1e-12)
        np.testing.assert_allclose(matrix @ row, right @ c[i] ** np.arange(1, 7), rtol=0, atol=1e-12)
        columns.append(i)
    # order 7 leaves multiples of b - b_hat, and nothing else
    matrix, right = conditions(a, 7, columns)
    rest = P[columns] - np.linalg.pinv(matrix, rcond=1e-10) @ right
    null = np.array([*tableau.b_error[0], 0, 0, 0, 0])[columns]
    np.testing.assert_allclose(rest, np.outer(null, null @ rest / (null @ null)), rtol=0, atol=1e-8)
    assert not P[1:5].any()


# --- measured orders -------------------------------------------------------------------------------------------------


def global_error(tableau, steps, t0, t1):
    y, dt = exact(t0), (t1 - t0) / steps
    for n in range(steps):
        y = step(tableau, t0 + n * dt, y, dt)
    return np.abs(y / exact(t1) - 1).max()


@pytest.mark.parametrize("ends", [(0.0, 1.5), (1.5, 0.1)], ids=["forwards", "backwards"])
@ALL
def test_observed_order_of_the_solution(tableau, ends):
    counts = {1: (400, 800, 1600), 2: (200, 400, 800), 3: (100, 200, 400), 4: (60, 120, 240), 5: (20, 30, 40, 60)}
    steps = np.array(counts.get(tableau.order, (5, 6, 8, 10)))
    order = slope(1 / steps, [global_error(tableau, n, *ends) for n in steps])
    assert tableau.order - 0.2 <= order


def local_errors(tableau, dt, theta):
    """Root mean square, over components and some starting times, of one step's dense error: (points,)."""
    errors = [
        dense(tableau, t, exact(t), dt, theta) / exact(t + theta * dt).T - 1 for t in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    return np.sqrt(np.mean(np.square(errors), axis=(0, 2)))


@ALL
def test_observed_order_of_the_extension(tableau):
    """A local error of dt^(q + 1) at every theta, and no better at the worst one."""
    declared = tableau.extension.order
    assert declared == EXTENSION_ORDER[tableau.order]
    theta = np.array([0.15, 0.35, 0.5, 0.65, 0.85, 0.95])
    sizes = np.array([0.4, 0.3, 0.2, 0.15] if declared == 7 else [0.1, 0.05, 0.025])
    errors = np.array([local_errors(tableau, dt, theta) for dt in sizes])
    orders = [slope(sizes, column) - 1 for column in errors.T]
    assert min(orders) > declared - 0.5, orders
    assert abs(slope(sizes, errors.max(1)) - 1 - declared) < 0.3


@pytest.mark.parametrize("tableau", PAIRS, ids=lambda pair: pair.name)
def test_error_estimates_start_at_their_power_of_dt(tableau):
    """The first tree that an error row sees: dt^error_order; dt^6 and dt^4 in the two rows of dop853."""
    weights = stage_weights(tableau.a, 8)
    powers = [
        min(tree.order for tree in rooted_trees(8) if abs(np.dot(row, weights[tree])) > 1e-12)
        for row in tableau.b_error
    ]
    assert powers == ([6, 4] if tableau.name == "dop853" else [tableau.error_order])


# --- a wrong coefficient is caught -----------------------------------------------------------------------------------


def spoil(tableau, part, i):
    """The tableau with its i-th coefficient of one part changed by 1e-6, or with an order too high by one."""
    if part == "order":
        return replace(tableau, order=tableau.order + 1, extension=None)
    if part in ("b", "c"):
        return replace(tableau, **{part: vary(getattr(tableau, part), i % tableau.stages)})
    if part == "a":
        return replace(tableau, a=(*tableau.a[:-1], vary(tableau.a[-1], i % (tableau.stages - 1))))
    if part == "b_error":
        return replace(tableau, b_error=tuple(vary(row, i % len(row)) for row in tableau.b_error))
    P = tableau.extension.P
    return replace(tableau, extension=replace(tableau.extension, P=(vary(P[0], i % len(P[0])), *P[1:])))


def parts(tableau):
    """What of a tableau can be spoilt; above order 5 the order is measured, not checked."""
    known = {"a": tableau.stages > 1, "b_error": tableau.b_error, "order": tableau.order < 5}
    return ["b", "c", "P", *(part for part, there in known.items() if there)]


@pytest.mark.parametrize("i", [0, -1])
@pytest.mark.parametrize("name, part", [(t.name, part) for t in TABLEAUS.values() for part in parts(t)])
def test_a_wrong_coefficient_is_caught(name, part, i):
    with pytest.raises(TableauError, match=name) as caught:
        spoil(TABLEAUS[name], part, i)
    assert abs(caught.value.residual) > 1e-10


def test_a_row_with_the_right_sum_and_wrong_entries_is_caught():
    """A transposed digit that keeps the row sum: only the order conditions see it."""
    for name in ("bosh3", "dopri5", "tsit5", "dopri8", "dop853"):
        tableau = TABLEAUS[name]
        i = tableau.stages - 2
        row = vary(vary(tableau.a[i], i - 1, 1e-4), 0, -1e-4)
        with pytest.raises(TableauError, match="order condition"):
            replace(tableau, a=(*tableau.a[:i], row, *tableau.a[i + 1 :]))


def test_the_embedded_weights_in_the_place_of_the_solution_are_caught():
    """Tsitouras' pair is easily taken the wrong way round; it then carries on a solution of order 4."""
    tsit5 = TABLEAUS["tsit5"]
    b_hat = tuple(b - e for b, e in zip(tsit5.b, tsit5.b_error[0]))
    with pytest.raises(TableauError, match=r"order 5\) of the solution"):
        replace(tsit5, b=b_hat, extension=None)


def euler_like(**changes):
    data = {"name": "probe", "order": 1, "c": (0.0,), "a": ((),), "b": (1.0,), "reference": "none"} | changes
    return Tableau(**data)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"a": ((1.0,),)}, "row 0 of an explicit tableau"),
        ({"c": (0.0, 1.0)}, "must agree"),
        ({"b": (), "a": (), "c": ()}, "at least one stage"),
        ({"order": 0}, "order of at least 1"),
        ({"b": (float("nan"),)}, "not finite"),
        ({"b_error": ((1.0, 0.0),), "embedded_order": 1}, "rows of 1 weights"),
        ({"b_error": ((0.0,),)}, "come together"),
        ({"embedded_order": 1}, "come together"),
        ({"b_error": ((0.0,),), "embedded_order": 1}, "higher order than 2"),
        ({"extension": Extension(1, ((1.0,), (0.0,)))}, "P needs 1 rows"),
        ({"extension": Extension(1, ((),))}, "P needs 1 rows"),
        ({"extension": Extension(2, ((1.0,),))}, "degree 1"),
        ({"extension": Extension(1, ((0.5,),))}, "order condition t of the extension"),
        ({"extension": Extension(1, ((1.0,), (0.0,)), ((1.0, 2.0),), (1.0,))}, "extra stage 1"),
        ({"extension": Extension(1, ((1.0,), (0.0,)), ((1.0,),))}, "c_extra and a_extra"),
        ({"extension": Extension(1, ((1.0,), (0.0,)), ((0.5,),), (1.0,))}, "row sum of stage 1"),
        ({"c": (0.0, 2.0), "a": ((), (2.0,)), "b": (1.0, 0.0)}, r"must lie in \[0, 1\]"),
    ],
)
def test_a_malformed_tableau_says_what_is_wrong(changes, words):
    with pytest.raises(TableauError, match=words) as caught:
        euler_like(**changes)
    assert isinstance(caught.value, ValueError)
    assert caught.value.tableau == "probe"


# --- agreement with other packages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, peer", [("bosh3", RK23), ("dopri5", RK45)])
def test_coefficients_agree_with_scipy(name, peer):
    tableau, n = TABLEAUS[name], peer.n_stages
    np.testing.assert_allclose(tableau.c[:n], peer.C, rtol=1e-15)
    np.testing.assert_allclose(tableau.b[:n], peer.B, rtol=1e-15)
    for i in range(n):
        np.testing.assert_allclose(tableau.a[i], peer.A[i, :i], rtol=1e-15)
    # scipy takes b_hat - b; only the size of an error estimate has a meaning. Shampine's pair for dopri5 is 2/3 of
    # Dormand and Prince's.
    factor = 2 / 3 if name == "dopri5" else 1.0
    np.testing.assert_allclose(tableau.b_error[0], -factor * peer.E, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(tableau.extension.P, peer.P, rtol=1e-13, atol=1e-14)


def test_dop853_agrees_with_scipy():
    tableau, n = TABLEAUS["dop853"], DOP853.n_stages
    np.testing.assert_allclose(tableau.all_c, [*DOP853.C, 1.0, *DOP853.C_EXTRA], rtol=1e-15)
    np.testing.assert_allclose(tableau.b, DOP853.B, rtol=1e-15)
    for i in range(n):
        np.testing.assert_allclose(tableau.a[i], DOP853.A[i, :i], rtol=1e-15)
    for i, row in enumerate(tableau.extension.a_extra[1:]):
        np.testing.assert_allclose(row, DOP853.A_EXTRA[i, : n + 1 + i], rtol=1e-15)
    np.testing.assert_allclose(tableau.b_error, [DOP853.E5[:-1], DOP853.E3[:-1]], rtol=1e-13, atol=1e-16)


def test_dop853_extension_agrees_with_scipy():
    t, dt = 0.4, 0.3
    peer = DOP853(field, t, exact(t), 5.0, first_step=dt, rtol=1e-3, atol=1e-3)
    peer.step()
    assert peer.t == t + dt
    theta = np.linspace(0, 1, 11)
    ours = dense(TABLEAUS["dop853"], t, exact(t), dt, theta)
    np.testing.assert_allclose(ours, peer.dense_output()(t + theta * dt).T, rtol=1e-12)


@pytest.mark.parametrize("name", ["adaptive_heun", "fehlberg2", "bosh3", "dopri5", "dopri8"])
def test_coefficients_agree_with_torchdiffeq(name):
    peers = pytest.importorskip("torchdiffeq._impl.odeint").SOLVERS
    tableau, peer = TABLEAUS[name], peers[name].tableau
    np.testing.assert_allclose(tableau.all_c[1 : len(peer.alpha) + 1], peer.alpha.numpy(), rtol=1e-15)
    for row, theirs in zip(tableau.all_a[1:], peer.beta):
        np.testing.assert_allclose(row[: len(theirs)], theirs.numpy(), rtol=1e-15)
    np.testing.assert_allclose(tableau.b, peer.c_sol.numpy()[: tableau.stages], rtol=1e-15)
