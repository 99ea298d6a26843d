"""Errors say what was given, what was expected and what to do."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from prunet_zoo import errors
from prunet_zoo.errors import PrunetError, SpecError, UnknownNameError, describe_validation, few, unknown_name


def test_every_error_is_a_prunet_error_and_a_builtin_one() -> None:
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, PrunetError)]
    assert len(classes) >= 6
    for cls in classes:
        assert cls.__doc__
        assert cls is PrunetError or any(base in (ValueError, KeyError, RuntimeError) for base in cls.__mro__)


def test_unknown_name_reads_as_a_sentence() -> None:
    error = unknown_name("arch", "PruNet_P0", ["prunet_p1", "prunet_p0"], "See --list.")
    assert isinstance(error, UnknownNameError)
    assert isinstance(error, KeyError)
    assert str(error) == "unknown arch 'PruNet_P0'; did you mean 'prunet_p0' or 'prunet_p1'? See --list."
    assert str(unknown_name("arch", "xyz", ["b", "a"])) == "unknown arch 'xyz'; known: a, b."


@given(st.lists(st.text("ab", max_size=3), max_size=9))
def test_few_names_are_shown_and_all_are_counted(names: list[str]) -> None:
    shown = few(iter(names))
    assert shown.startswith(", ".join(names[:4]))
    assert shown.removeprefix(", ".join(names[:4])) == (f", … ({len(names)})" if len(names) > 4 else "")


@given(st.text(max_size=20), st.lists(st.text(max_size=10), max_size=5))
def test_unknown_name_takes_anything(name: str, known: list[str]) -> None:
    assert repr(name) in str(unknown_name("arch", name, known))


class Inner(BaseModel):
    size: int = Field(ge=1, le=9)


class Outer(BaseModel):
    rows: list[Inner] = Field(min_length=1)
    name: str = "x"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rows": [{"size": 1}, {"size": 10}]}, "rows[1].size: Input should be less than or equal to 9 (given: 10)"),
        ({"rows": [{}]}, "rows[0].size: Field required"),
        ({"rows": [], "name": 3}, "rows: List should have at least 1 item"),
        ({"name": 3}, "name: Input should be a valid string (given: 3)"),
    ],
)
def test_describe_validation_names_fields(data: object, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    described = describe_validation(caught.value, "thing")
    assert isinstance(described, SpecError)
    assert str(described).startswith("thing is malformed: ")
    assert message in str(described)
    assert "\n" not in str(described)


def test_describe_validation_stays_readable_with_many_faults() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"rows": [{"size": 0}] * 100})
    assert len(str(describe_validation(caught.value, "thing"))) < 1000
