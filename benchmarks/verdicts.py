"""Who is better at which size: every peer's row against ours of its bytes or fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.methods import TASKS, Task
from benchmarks.rows import Group, is_ours

DATA_FREE = "dither"
SAME = 0.95
"""A file of ours is of a peer's size from this share of its bytes on."""


@dataclass(frozen=True)
class Verdict:
    """One peer's row, and the best of ours that takes no more bytes.

    Attributes:
        peer: its row.
        ours: None where all our files are larger.
        margin: points by which the peer is better; negative where ours is.
    """

    peer: Group
    ours: Group | None
    margin: float | None

    @property
    def peer_wins(self) -> bool:
        """Whether the peer is better; not where there is nothing to compare with."""
        return self.margin is not None and self.margin > 0


def best(groups: Sequence[Group], task: Task, nbytes: int, least: float = 0) -> Group | None:
    """The best score within so many bytes; of equal ones the smallest file."""
    found: Group | None = None
    for group in groups:
        if not least <= group.nbytes <= nbytes or group.score is None:
            continue
        if found is None or found.score is None or task.better(group.score, found.score):
            found = group
    return found


def verdicts(
    groups: Sequence[Group], name: str, methods: Sequence[str] = (), share: float = 0
) -> list[Verdict]:
    """For each peer's row with a score, the largest first, against the best of ours.

    Args:
        groups: of the task.
        name: of the task.
        methods: of ours; all, if none is given.
        share: of the peer's bytes that a file of ours takes at least.
    """
    task = TASKS[name]
    ours = [g for g in groups if is_ours(g) and (not methods or g.run.method in methods)]
    found = []
    for peer in groups:
        if peer.run.ours or peer.score is None:
            continue
        # A seed of a trained model is another model: those that the peer had are compared.
        rivals = ours if task.checkpoint else [s for g in ours if (s := g.of(peer.seeds))]
        rival = best(rivals, task, peer.nbytes, share * peer.nbytes)
        margin = None
        if rival is not None and rival.score is not None:
            margin = rival.score - peer.score if task.less else peer.score - rival.score
        found.append(Verdict(peer, rival, margin))
    return found[::-1]


def sentence(verdict: Verdict) -> str:
    """What the verdict says."""
    peer, ours = verdict.peer, verdict.ours
    head = f"{peer.label} scores {peer.score:.2f} with {peer.nbytes:,} bytes"
    head += f" (mean of {len(peer.rows)} seeds)" if len(peer.rows) > 1 else ""
    if ours is None or verdict.margin is None:
        return f"{head}; no file of ours is that small"
    seeds = f", mean of {len(ours.rows)} seeds" if len(ours.rows) > 1 else ""
    rival = f"{ours.score:.2f} ({ours.label}, {ours.nbytes:,} bytes{seeds})"
    word = "better" if verdict.peer_wins else "worse" if verdict.margin else "different"
    margin = abs(verdict.margin)
    return f"{head}, {margin:.{2 if margin >= 0.005 else 4}f} {word} than {rival}"


def at_its_size(groups: Sequence[Group], name: str, methods: Sequence[str] = ()) -> list[str]:
    """Where a peer beats our file of its size, and only a smaller one of ours beats the peer."""
    worse = {v.peer for v in verdicts(groups, name, methods) if v.peer_wins}
    same = verdicts(groups, name, methods, SAME)
    wins = [v for v in same if v.peer_wins and v.peer not in worse]
    if not wins:
        return []
    head = f"Better than our file of its size ({100 * SAME:.0f} to 100 % of its bytes)"
    lines = [f"- {sentence(verdict)}." for verdict in wins]
    return ["", f"{head}, though worse than a smaller one of ours:", "", *lines]


def beaten(found: Sequence[Verdict]) -> list[str]:
    """Where peers beat us, as lines of Markdown; said too where they do not, or nobody ran."""
    if not found:
        return ["No peer has a score here: nothing can be compared."]
    wins = [v for v in found if v.peer_wins]
    small = [v for v in found if v.ours is None]
    compared = _rows(len(found) - len(small))
    if wins:
        times = _times(len(wins))
        lines = [f"**Peers beat the best of ours {times}**, of {compared} compared:", ""]
        lines += [f"- {sentence(verdict)}." for verdict in wins]
    else:
        lines = [f"No peer beats the best of ours within its bytes, of {compared} compared."]
    if small:
        lines += ["", "Smaller than all our files, so not compared:", ""]
        lines += [f"- {sentence(verdict)}." for verdict in small]
    return lines


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
