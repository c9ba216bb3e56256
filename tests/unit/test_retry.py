from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.policy.retry import next_attempt

WAITS = (60.0, 300.0, 3600.0)


@pytest.mark.parametrize(("attempts", "wait"), [(1, 60), (2, 300), (3, 3600), (4, 3600), (1000, 3600)])
def test_waits_grow_as_configured_and_the_last_repeats(attempts: int, wait: float) -> None:
    assert next_attempt(attempts, 1000.0, WAITS, jitter=0.0, random=0.7) == 1000.0 + wait


@pytest.mark.parametrize(("random", "wait"), [(0.0, 48.0), (0.5, 60.0), (0.75, 66.0)])
def test_jitter_varies_a_wait_to_both_sides(random: float, wait: float) -> None:
    assert next_attempt(1, 0.0, WAITS, jitter=0.2, random=random) == pytest.approx(wait)


@given(
    st.integers(1, 10**6),
    st.floats(0, 1e9),
    st.lists(st.floats(0.01, 1e6), min_size=1),
    st.floats(0, 0.5),
    st.floats(0, 1, exclude_max=True),
)
def test_the_next_attempt_lies_within_the_jitter_and_never_in_the_past(
    attempts: int, now: float, waits: list[float], jitter: float, random: float
) -> None:
    due = next_attempt(attempts, now, waits, jitter, random)
    wait = waits[min(attempts, len(waits)) - 1]
    assert now <= due
    assert abs(due - now - wait) <= wait * jitter + 1e-6  # what a float at 1e9 leaves


@pytest.mark.parametrize(("attempts", "waits"), [(0, WAITS), (-1, WAITS), (1, ())])
def test_a_due_date_is_not_made_of_nothing(attempts: int, waits: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        next_attempt(attempts, 0.0, waits, 0.2, 0.5)
