"""Units of the planner's numbers, and numbers that carry theirs (control speed).

Formulas compute with plain floats; the unit check runs every one of them with ``Quantity`` arguments and compares the unit of
the answer with the one declared. Must not know: any formula.

    base     meaning
    flop     one floating-point operation (a multiply-add is two)
    byte     eight bits
    value    one number held in memory: a weight, an element of the KV cache or of a state
    token    one cached position of a context
    row      one token being computed: a row of a batch
    s        second
    usd      US dollar
    card     one accelerator
    request  one request
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BASE = ("flop", "byte", "value", "token", "row", "s", "usd", "card", "request")


class UnitMismatch(ArithmeticError):
    """Two quantities of different units were added, subtracted or compared."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A product of powers of base units; ``Unit.of("byte/s")`` reads one, the empty text is a plain number."""

    powers: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, text: str) -> Unit:
        """Read ``a*b/c/d``: factors before the first slash multiply, each after a slash divides.

        Raises:
            ValueError: a factor is no base unit.
        """
        powers: dict[str, float] = {}
        numerator, *denominators = text.split("/")
        for factor in numerator.split("*"):
            if factor.strip() not in ("", "1"):
                powers[factor.strip()] = powers.get(factor.strip(), 0) + 1
        for factor in denominators:
            powers[factor.strip()] = powers.get(factor.strip(), 0) - 1
        for name in powers:
            if name not in BASE:
                raise ValueError(f"{name!r} is no base unit; they are {', '.join(BASE)}")
        return cls._from(powers)

    @classmethod
    def _from(cls, powers: Mapping[str, float]) -> Unit:
        return cls(tuple(sorted((name, power) for name, power in powers.items() if power)))

    def times(self, other: Unit, sign: int = 1) -> Unit:
        """The product with ``other``, or with sign -1 the quotient."""
        powers = dict(self.powers)
        for name, power in other.powers:
            powers[name] = powers.get(name, 0) + sign * power
        return Unit._from(powers)

    def to_the(self, exponent: float) -> Unit:
        """The unit raised to a power."""
        return Unit._from({name: power * exponent for name, power in self.powers})

    def __str__(self) -> str:
        above = [name if power == 1 else f"{name}^{power:g}" for name, power in self.powers if power > 0]
        below = [name if power == -1 else f"{name}^{-power:g}" for name, power in self.powers if power < 0]
        return "/".join(["*".join(above) or ("1" if below else ""), *below])


PLAIN = Unit()


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its unit. Plain numbers mix in as unitless; zero and infinity compare and add with any unit."""

    value: float
    unit: Unit = field(default=PLAIN)

    @classmethod
    def of(cls, value: float, unit: str) -> Quantity:
        """A number of the unit that ``Unit.of`` reads."""
        return cls(value, Unit.of(unit))

    def _same(self, other: Quantity | float) -> float:
        if isinstance(other, Quantity):
            if other.unit != self.unit:
                raise UnitMismatch(f"{self.unit or 'a plain number'} against {other.unit or 'a plain number'}")
            return other.value
        if self.unit != PLAIN and other not in (0, float("inf")):
            raise UnitMismatch(f"{self.unit} against the plain number {other}")
        return other

    def __add__(self, other: Quantity | float) -> Quantity:
        return Quantity(self.value + self._same(other), self.unit)

    __radd__ = __add__

    def __sub__(self, other: Quantity | float) -> Quantity:
        return Quantity(self.value - self._same(other), self.unit)

    def __rsub__(self, other: Quantity | float) -> Quantity:
        return Quantity(self._same(other) - self.value, self.unit)

    def __mul__(self, other: Quantity | float) -> Quantity:
        if isinstance(other, Quantity):
            return Quantity(self.value * other.value, self.unit.times(other.unit))
        return Quantity(self.value * other, self.unit)

    __rmul__ = __mul__

    def __truediv__(self, other: Quantity | float) -> Quantity:
        if isinstance(other, Quantity):
            return Quantity(self.value / other.value, self.unit.times(other.unit, -1))
        return Quantity(self.value / other, self.unit)

    def __rtruediv__(self, other: float) -> Quantity:
        return Quantity(other / self.value, PLAIN.times(self.unit, -1))

    def __pow__(self, exponent: Quantity | float) -> Quantity:
        plain = exponent.value if isinstance(exponent, Quantity) else exponent
        if isinstance(exponent, Quantity) and exponent.unit != PLAIN:
            raise UnitMismatch(f"an exponent can't be in {exponent.unit}")
        return Quantity(self.value**plain, self.unit.to_the(plain))

    def __rpow__(self, base: float) -> Quantity:
        if self.unit != PLAIN:
            raise UnitMismatch(f"an exponent can't be in {self.unit}")
        return Quantity(base**self.value)

    def __float__(self) -> float:
        if self.unit != PLAIN:
            raise UnitMismatch(f"{self.unit} is no plain number")
        return self.value

    def __lt__(self, other: Quantity | float) -> bool:
        return self.value < self._same(other)

    def __gt__(self, other: Quantity | float) -> bool:
        return self.value > self._same(other)

    def __le__(self, other: Quantity | float) -> bool:
        return self.value <= self._same(other)

    def __ge__(self, other: Quantity | float) -> bool:
        return self.value >= self._same(other)
