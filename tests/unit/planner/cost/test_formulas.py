"""Every formula's units fit, and what is explained is what is computed."""

import importlib
import pkgutil

import pytest

import antiphon.planner
from antiphon.planner.cost.formula import Derivation, Formula, formula, plainly
from antiphon.planner.cost.hardware import Catalogue
from antiphon.planner.cost.library import find_model
from antiphon.planner.cost.token_cost import attention_usd, token_cost
from antiphon.planner.cost.units import Quantity, Unit, UnitMismatch


def all_formulas():
    found = {}
    for module in pkgutil.walk_packages(antiphon.planner.__path__, "antiphon.planner."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Formula):
                found[value.name] = value
    return found


FORMULAS = all_formulas()


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_the_units_of_every_formula_fit(name):
    FORMULAS[name].check_units()  # raises, and says which side has which unit


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_every_formula_says_what_it_is_and_shows_its_text(name):
    assert FORMULAS[name].prose
    assert all(argument in FORMULAS[name].text for argument in FORMULAS[name].inputs)


def test_there_are_formulas_for_every_part_of_a_plan():
    assert len(FORMULAS) > 30


def test_a_formula_whose_units_do_not_fit_is_found():
    @formula("s", seconds="s", size="byte")
    def wrong(*, seconds, size):
        """Adds apples to pears."""
        return seconds + size

    with pytest.raises(UnitMismatch, match="s against byte"):
        wrong.check_units()


def test_a_formula_that_declares_another_unit_than_it_gives_is_found():
    @formula("s", rate="byte/s", size="byte")
    def upside_down(*, rate, size):
        """Divides the wrong way."""
        return rate / size

    with pytest.raises(UnitMismatch, match="gives 1/s"):
        upside_down.check_units()


def test_a_derivation_computes_the_same_and_keeps_text_values_and_units():
    derivation = Derivation()
    values = {"attention_flops": 3.0, "linear_flops": 1.0, "kv_bytes": 2.0, "usd_per_flop": 5.0, "usd_per_byte": 7.0}
    assert derivation.section("here")(attention_usd, **values) == plainly(attention_usd, **values) == 3 * 5 + 5
    (step,) = derivation.steps
    assert step.text == "max(attention_flops * usd_per_flop, kv_bytes * usd_per_byte) + linear_flops * usd_per_flop"
    assert ("kv_bytes", 2.0, "byte/row") in step.values
    assert (step.section, step.result, step.unit) == ("here", 20.0, "usd/row")


def test_evaluating_the_shown_text_with_the_shown_values_gives_the_shown_number():
    derivation = Derivation()
    token_cost(find_model("llama-4-maverick"), Catalogue.built_in().priced, 20_000, derivation=derivation)
    assert len(derivation.steps) > 20
    for step in derivation.steps:
        names = {name: value for name, value, _ in step.values}
        assert eval(step.text, {"max": max, "min": min}, names) == pytest.approx(step.result)


def test_units_multiply_divide_and_print():
    rate = Quantity.of(6.0, "byte/s")
    assert str((rate * Quantity.of(2.0, "s")).unit) == "byte"
    assert str((Quantity.of(1.0, "usd/card/s") / Quantity.of(1.0, "flop/card/s")).unit) == "usd/flop"
    assert (Quantity.of(9.0, "s*s") ** 0.5) == Quantity.of(3.0, "s")
    assert str(Unit.of("1/s")) == "1/s"


def test_unknown_units_are_refused():
    with pytest.raises(ValueError, match="parsec"):
        Unit.of("parsec/s")
