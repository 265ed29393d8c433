"""The running average of parameters, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dual_process.trainers.average import Average


def test_a_plain_mean_while_young_and_a_moving_one_later():
    parameter = nn.Parameter(torch.tensor(100.0))
    average = Average([parameter], decay=0.75)
    averages = []
    for value in (2.0, 4.0, 6.0, 8.0, 10.0, 12.0):
        parameter.data.fill_(value)
        average.update()
        averages.append(average.values[0].item())
    assert averages == pytest.approx([2, 3, 4, 5, 5 * 0.75 + 10 * 0.25, 6.25 * 0.75 + 12 * 0.25])


def test_no_decay_is_no_average():
    parameter = nn.Parameter(torch.zeros(2))
    average = Average([parameter], decay=0.0)
    for value in (1.0, 5.0):
        parameter.data.fill_(value)
        average.update()
    assert average.values[0].tolist() == [5.0, 5.0]


def test_applied_is_for_a_while_even_when_it_ends_in_an_error():
    parameter = nn.Parameter(torch.zeros(1))
    average = Average([parameter], decay=0.5)
    for value in (1.0, 3.0):
        parameter.data.fill_(value)
        average.update()
    with pytest.raises(ZeroDivisionError), average.applied():
        assert parameter.item() == 2.0
        1 / 0
    assert parameter.item() == 3.0 and average.values[0].item() == 2.0
