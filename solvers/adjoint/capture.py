"""What f has captured: tensors that require a gradient and reach f neither as the state nor as an argument.

An adjoint that hides the steps from autograd must hand every such tensor to autograd itself, or its gradient would be
silently lost. One evaluation at the start shows most of them; each replayed step is searched for others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..events import evaluate
from ..loop import IN_PLACE
from ..status import ArgumentError, UnsupportedError


class Captured(NamedTuple):
    """``tensors``: to be differentiated for. ``through``: whether replays must differentiate through graphs that existed
    before the solve, and so must not free them. ``work``: calls of f that the search took beside that at the start of the
    solve, whose value is ``slope``."""

    tensors: tuple[Tensor, ...]
    through: bool
    work: int
    slope: Tensor


class Given:
    """f, with the times handed to it that it has marked as requiring a gradient, and at the start parts of the state, too:
    leaves of its graph that nobody differentiates for. Flows with a divergence in them do so at each call."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func
        self.marked: list[Tensor] = []

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        dy = self.func(t, y, *args)
        if t.requires_grad and t.is_leaf:
            self.marked.append(t)
        return dy

    def __getattr__(self, name: str) -> Any:
        """What else f has, a bound on its spectrum for example."""
        if name == "func":
            raise AttributeError(name)
        return getattr(self.func, name)


def find(plan: Any, y0: Tensor) -> Captured:
    """Tensors that f, the maps of jumps and what events call use at the start of the solve, and parameters of modules among
    them.

    A tensor that was computed before the solve (w = 2 p) is taken as it is where that is possible: one whose graph leads to
    no other captured tensor, and that the evaluation showed by name. Else the leaves behind it are taken instead.
    """
    field = plan.field.renewed(pytree.tree_map_only(Tensor, Tensor.detach, plan.field.args), None)
    given = plan.field.func
    parameters = [p for module in _modules(plan) for p in module.parameters() if p.requires_grad]
    direct: dict[int, Tensor] = {id(p): p for p in parameters}
    with torch.enable_grad():
        start = _sequence_number()
        roots, parts = _evaluate(plan, field, y0)
        slope = roots[0].detach().clone()
        leaves, crossings = _boundary(roots, start)
        own = {id(x) for x in (*parts, *given.marked)}
        direct.update((key, leaf) for key, leaf in leaves.items() if key not in own)
        given.marked.clear()
        if not crossings:
            # Nodes are numbered per thread: elsewhere than in the main one, older graphs may pass for new.
            return Captured(tuple(direct.values()), threading.current_thread() is not threading.main_thread(), 0, slope)
        # Alive until here, because the graph's nodes are what the second evaluation's tensors are compared with.
        with _Watch() as watch:
            _evaluate(plan, field, y0)
        given.marked.clear()
    named = {edge: watch.seen[edge] for edge in crossings if edge in watch.seen}
    behind, mixed = _behind(crossings, direct)
    if len(named) == len(crossings) and not mixed:
        return Captured((*direct.values(), *named.values()), False, 1, slope)
    direct.update(behind)
    return Captured(tuple(direct.values()), True, 1, slope)


class Strangers:
    """Looks for leaves that a replay has met and nobody knows.

    Args:
        known: the tensors that the replay is differentiated for. given: f, a :class:`Given`.
    """

    def __init__(self, known: Iterable[Tensor], given: Any) -> None:
        self._given = given
        self._tensors = list(known)
        self._ids = {id(x) for x in self._tensors}
        # A known tensor with a history hides what lies behind it.
        self._hidden = {x.grad_fn for x in self._tensors if x.grad_fn is not None}

    def refuse(self, roots: Iterable[Tensor], own: Iterable[Tensor]) -> None:
        """Raise ``UnsupportedError`` if the graphs of ``roots`` lead to a leaf that is neither known nor ``own``."""
        known = self._ids.union(map(id, own), map(id, self._given.marked))
        for leaf in _leaves([x.grad_fn for x in roots if x.grad_fn is not None], set(self._hidden)):
            if id(leaf) not in known:
                raise UnsupportedError(
                    f"f uses a captured tensor of shape {tuple(leaf.shape)} that requires a gradient and that it did not "
                    "use at the start of the solve, so its gradient would be lost: pass it in args=, or use "
                    "adjoint='backprop'"
                )
        self._given.marked.clear()


def _modules(plan: Any) -> Iterator[nn.Module]:
    """Modules in reach: f itself, the owner of a bound method, what jumps and events call, and modules among the arguments."""
    functions = [plan.field.func, *(jump.map for jump in plan.jumps)]
    functions += [function for event in plan.events for function in (event.fn, event.reset)]
    for function in (*functions, *pytree.tree_leaves(plan.field.args)):
        while hasattr(function, "func"):  # functools.partial
            function = function.func
        for thing in (function, getattr(function, "__self__", None)):
            if isinstance(thing, nn.Module):
                yield thing


def _evaluate(plan: Any, field: Any, y0: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What f and all the others return, f's first, and the parts of the state that f was given."""
    y = y0.detach()
    parts = plan.layout.unflatten(y)
    version = None if y.is_inference() else y._version
    slope = field.func(field.time(plan.clock.start), parts, *field.args)
    roots: list[Any] = [plan.layout.flatten(slope, "the value returned by f")]
    if version is not None and y._version != version:
        raise ArgumentError(IN_PLACE)
    for number, event in enumerate(plan.events):
        roots.append(evaluate(plan.events, number, field, plan.clock.start, y))
        if event.reset is not None:
            found = event.reset(field.time(plan.clock.start), plan.layout.unflatten(y.clone()), *field.args)
            roots += pytree.tree_leaves(found)
    for jump in plan.jumps:
        if jump.map is not None:
            time = torch.as_tensor(jump.t, dtype=torch.float64, device=y.device).detach()
            time = time if plan.layout.joint else time.expand(plan.layout.batch)
            roots += pytree.tree_leaves(jump.map(field.time(time), plan.layout.unflatten(y)))
    return [x for x in roots if isinstance(x, Tensor)], pytree.tree_leaves(parts)


def _sequence_number() -> int:
    """Nodes that autograd makes from now on, in this thread, have a number above this one."""
    return torch.ones((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]


def _boundary(roots: list[Tensor], start: int) -> tuple[dict[int, Tensor], dict[tuple[Any, int], None]]:
    """Leaves below ``roots``, by id, and the edges (node, output number) to nodes older than ``start``."""
    leaves: dict[int, Tensor] = {}
    crossings: dict[tuple[Any, int], None] = {}
    seen: set[Any] = set()
    stack: list[tuple[Any, int]] = [(x.grad_fn, x.output_nr) for x in roots if x.grad_fn is not None]
    leaves.update({id(x): x for x in roots if x.grad_fn is None and x.requires_grad})
    while stack:
        node, number = stack.pop()
        leaf = _variable(node)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        elif node._sequence_nr() < start:
            crossings[(node, number)] = None
        elif node not in seen:
            seen.add(node)
            stack += [edge for edge in node.next_functions if edge[0] is not None]
    return leaves, crossings


def _behind(crossings: Iterable[tuple[Any, int]], direct: dict[int, Tensor]) -> tuple[dict[int, Tensor], bool]:
    """Leaves behind the crossings, and whether one of the crossings leads to another one or to a tensor in ``direct``.

    Differentiated for both, an upstream tensor would be given the downstream one's share a second time.
    """
    nodes = [node for node, _ in crossings]
    found: dict[int, Tensor] = {}
    mixed = len(set(nodes)) < len(nodes)
    for node in nodes:
        seen: set[Any] = set()
        found.update({id(leaf): leaf for leaf in _leaves([f for f, _ in node.next_functions if f is not None], seen)})
        mixed = mixed or any(other in seen for other in nodes)
    return found, mixed or any(key in direct for key in found)


def _leaves(stack: list[Any], seen: set[Any]) -> Iterator[Tensor]:
    """Leaf tensors in the graph below the nodes in ``stack``, not looking behind nodes in ``seen``, which is added to."""
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        if following:
            for child, _ in following:
                if child is not None and child not in seen:
                    stack.append(child)
        else:
            leaf = _variable(node)
            if leaf is not None:
                yield leaf


def _variable(node: Any) -> Tensor | None:
    """The leaf that this node collects the gradient of; None for all other nodes."""
    return getattr(node, "variable", None)


class _Watch(TorchFunctionMode):
    """Notes the tensors with a history that torch functions are called with, by the edge of the graph they stand for."""

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, int], Tensor] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                self.seen[(x.grad_fn, x.output_nr)] = x
        return func(*args, **(kwargs or {}))
