"""What tests of trainings share."""

from __future__ import annotations

from typing import Any

import pytest

from seriatim.training import budget as budgets
from seriatim.training.budget import Pace
from seriatim.training.task import Costs


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is replaced by constants, so that the amounts do not depend on how busy the machine is."""
    measured = budgets.measured_pace

    def constant(*arguments: Any, **options: Any) -> Pace:
        found = measured(*arguments, **options)
        assert found.image > 0 and found.save > 0
        return Pace(0.01, 0.02, Costs(sample=1e-4, look=1e-3, judged=1e-3), found.steps)

    monkeypatch.setattr(budgets, "measured_pace", constant)
