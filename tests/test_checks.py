"""Numbers of any type are taken, bools and what is out of range are refused by name."""

import math

import numpy as np
import pytest
import torch

from tl_lenses.checks import finite_number, one_of, whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])], ids=repr)
def test_every_integer_type_is_a_whole_number(value):
    assert whole_number("n", value) == 3 and type(whole_number("n", value)) is int


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 3.0, "3", None, math.nan, [3]], ids=repr)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(TypeError, match="n must be a whole number, got"):
        whole_number("n", value)


def test_the_range_of_a_whole_number_is_said():
    assert whole_number("n", 1, least=1, most=2) == 1
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        whole_number("n", 0, least=1)
    with pytest.raises(ValueError, match="n must be at most 2, got 3"):
        whole_number("n", 3, most=2)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int8(2), torch.tensor(2.0), torch.tensor(2)], ids=repr)
def test_every_number_type_is_a_number(value):
    assert finite_number("x", value) == 2.0 and type(finite_number("x", value)) is float


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), "2", None, [2.0], 2j, torch.ones(2)], ids=repr)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="x must be a finite number, got"):
        finite_number("x", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_must_be_finite(value):
    with pytest.raises(ValueError, match="x must be a finite number, got"):
        finite_number("x", value)


def test_the_range_of_a_number_is_said():
    with pytest.raises(ValueError, match="x must be positive and finite, got 0"):
        finite_number("x", 0, above=0)
    with pytest.raises(ValueError, match="x must be larger than 1, got 1"):
        finite_number("x", 1, above=1)
    with pytest.raises(ValueError, match="x must be at least 1, got 0.5"):
        finite_number("x", 0.5, least=1)


def test_a_word_is_one_of_those_allowed():
    assert one_of("side", "left", ("left", "right")) == "left"
    for value in ("up", None, ["left"]):
        with pytest.raises(ValueError, match="side must be 'left' or 'right', got"):
            one_of("side", value, ("left", "right"))
