"""Cases for `benchmarks.same_bytes`: each makes a file from fixed inputs."""

from benchmarks.byte_cases import encoders, models, real, state_dicts, training
from benchmarks.byte_cases.case import Case

__all__ = ["CASES", "Case"]

CASES: dict[str, Case] = {
    case.name: case
    for room in (state_dicts, encoders, models, training, real)
    for case in room.cases()
}
"""By name, in the order in which they run."""
