"""Who is better at which size: every peer's row against ours of its bytes or fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.methods import TASKS, Task
from benchmarks.rows import Group, is_ours

DATA_FREE = "dither"


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


def best(groups: Sequence[Group], task: Task, nbytes: int) -> Group | None:
    """The best score within so many bytes; of equal ones the smallest file."""
    found: Group | None = None
    for group in groups:
        if group.nbytes > nbytes or group.score is None:
            continue
        if found is None or found.score is None or task.better(group.score, found.score):
            found = group
    return found


def verdicts(groups: Sequence[Group], name: str, methods: Sequence[str] = ()) -> list[Verdict]:
    """For each peer's row with a score, the largest first; ours of some methods, or of all."""
    task = TASKS[name]
    ours = [g for g in groups if is_ours(g) and (not methods or g.run.method in methods)]
    found = []
    for peer in groups:
        if peer.run.ours or peer.score is None:
            continue
        rival = best(ours, task, peer.nbytes)
        margin = None
        if rival is not None and rival.score is not None:
            margin = rival.score - peer.score if task.less else peer.score - rival.score
        found.append(Verdict(peer, rival, margin))
    return found[::-1]


def sentence(verdict: Verdict) -> str:
    """What the verdict says."""
    peer, ours = verdict.peer, verdict.ours
    head = f"{peer.label} scores {peer.score:.2f} with {peer.nbytes:,} bytes"
    if ours is None or verdict.margin is None:
        return f"{head}; no file of ours is that small"
    seeds = f", mean of {len(ours.rows)} seeds" if len(ours.rows) > 1 else ""
    rival = f"{ours.score:.2f} ({ours.label}, {ours.nbytes:,} bytes{seeds})"
    word = "better" if verdict.peer_wins else "worse" if verdict.margin else "different"
    margin = abs(verdict.margin)
    return f"{head}, {margin:.{2 if margin >= 0.005 else 4}f} {word} than {rival}"


def beaten(found: Sequence[Verdict]) -> list[str]:
    """Where peers beat us, as lines of Markdown; said too where they do not, or nobody ran."""
    if not found:
        return ["No peer has a score here: nothing can be compared."]
    wins = [v for v in found if v.peer_wins]
    small = [v for v in found if v.ours is None]
    lines = []
    if wins:
        lines += [f"**Peers beat us {_times(len(wins))}**, of {_rows(len(found))} compared:", ""]
        lines += [f"- {sentence(verdict)}." for verdict in wins]
    else:
        compared = len(found) - len(small)
        lines.append(f"No peer beats us at its size, of {_rows(compared)} compared.")
    if small:
        lines += ["", "Smaller than all our files, so not compared:", ""]
        lines += [f"- {sentence(verdict)}." for verdict in small]
    return lines


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
