"""Schedules as hypothesis draws them."""

from hypothesis import strategies as st


def schedules(*, most_cycles: int, longest_cycle: int) -> st.SearchStrategy[dict[str, int]]:
    """Sections [schedule] that a profile accepts."""
    return st.builds(
        lambda warm, cycles, length: {
            "warm_start_steps": warm,
            "cycles": cycles,
            "cycle_length": length,
            "warmup_steps": min(20, length),
            "restart_warmup_steps": min(10, length - 1),
        },
        st.integers(0, 500),
        st.integers(1, most_cycles),
        st.integers(2, longest_cycle),
    )
