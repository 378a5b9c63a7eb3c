import inspect

import pytest

from anygen import errors

ALL = [
    error
    for _, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, Exception) and not issubclass(error, Warning)
]


@pytest.mark.parametrize("error", ALL)
def test_one_except_catches_them_all_and_the_message_is_printed_as_it_is(error: type[Exception]) -> None:
    assert issubclass(error, errors.AnyGenError)
    assert str(error("what is 'wrong'")) == "what is 'wrong'"


@pytest.mark.parametrize("error", [error for error in ALL if error is not errors.AnyGenError])
def test_each_is_also_the_builtin_that_a_caller_may_expect(error: type[Exception]) -> None:
    builtin = (ValueError, KeyError, OSError, MemoryError)
    assert issubclass(error, builtin)


def test_an_unknown_component_without_a_message_prints_nothing() -> None:
    assert str(errors.UnknownComponentError()) == ""
