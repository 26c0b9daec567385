"""Formulas: pure functions that declare their units and can show themselves with their values (control speed).

A formula's text is read from its own source, so what ``--explain`` prints is what was computed. Code that uses formulas takes
an ``Apply``: ``plainly`` just computes, a ``Derivation`` computes and keeps each step. Must not know: what the numbers mean.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Protocol

from antiphon.planner.cost.units import Quantity, Unit, UnitMismatch

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Formula(Generic[P]):
    """One line of arithmetic: keyword arguments of the units in ``inputs`` give a number of ``unit``."""

    function: Callable[P, float]
    unit: str
    inputs: Mapping[str, str]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> float:
        """The value."""
        return self.function(*args, **kwargs)

    @property
    def name(self) -> str:
        """What it computes."""
        return self.function.__name__

    @property
    def prose(self) -> str:
        """The first line of its docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]

    @property
    def text(self) -> str:
        """The expression it returns, as written."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function)))
        returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
        return ast.unparse(returned[-1])

    def check_units(self) -> None:
        """Compute once with quantities.

        Raises:
            UnitMismatch: the units inside don't fit, or the answer's is not the declared one.
        """
        function: Callable[..., Any] = self.function
        arguments = {name: Quantity.of(2.0 + index, unit) for index, (name, unit) in enumerate(self.inputs.items())}
        answer = function(**arguments)
        unit = answer.unit if isinstance(answer, Quantity) else Unit()
        if unit != Unit.of(self.unit):
            raise UnitMismatch(f"{self.name} is declared in {self.unit or 'plain numbers'} and gives {unit}")


def formula(unit: str, **inputs: str) -> Callable[[Callable[P, float]], Formula[P]]:
    """Make a function of keyword-only arguments, whose body is one return, a formula."""

    def declare(function: Callable[P, float]) -> Formula[P]:
        if set(inputs) != set(inspect.signature(function).parameters):
            raise TypeError(f"{function.__name__}: the declared units are not those of its arguments")
        return Formula(function, unit, inputs)

    return declare


class Apply(Protocol):
    """Computes a formula."""

    def __call__(self, formula: Formula[P], /, *args: P.args, **kwargs: P.kwargs) -> float:
        """The formula's value."""
        ...


def plainly(formula: Formula[P], /, *args: P.args, **kwargs: P.kwargs) -> float:
    """Compute and keep nothing."""
    return formula.function(*args, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One computed number: which formula, of what, with which result."""

    section: str
    name: str
    prose: str
    text: str
    values: tuple[tuple[str, float, str], ...]  # name, value, unit
    result: float
    unit: str


@dataclass(slots=True)
class Derivation:
    """Keeps every step of one computation; owned by whoever asked for the explanation."""

    steps: list[Step] = field(default_factory=list)

    def section(self, title: str) -> Apply:
        """An ``Apply`` that files its steps under ``title``."""
        return _Section(self, title)


@dataclass(frozen=True, slots=True)
class _Section:
    owner: Derivation
    title: str

    def __call__(self, formula: Formula[P], /, *args: P.args, **kwargs: P.kwargs) -> float:
        result = formula.function(*args, **kwargs)
        values = tuple((name, float(value), formula.inputs[name]) for name, value in kwargs.items())  # type: ignore[arg-type]
        self.owner.steps.append(
            Step(
                section=self.title,
                name=formula.name,
                prose=formula.prose,
                text=formula.text,
                values=values,
                result=float(result),
                unit=formula.unit,
            )
        )
        return result
