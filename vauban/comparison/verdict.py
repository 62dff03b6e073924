"""What a comparison of weights amounts to, in words. Knows its figures only; reads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vauban._results import to_plain
from vauban.comparison.changes import COUNTED, SharedDirections, shared_directions

if TYPE_CHECKING:
    from vauban.comparison.folder_diff import FolderDiff
    from vauban.comparison.tensor_changes import MatrixChange

# A cut takes out what was there: the cosine of both.
_ALIGNED = 0.8
_FINE_TUNE = 0.9


@dataclass(frozen=True, eq=False)
class Shared:
    """Changes that share directions (s, d) on their `side` ("output" or "input").

    `cosine` is the smallest of the members' with the first direction; `cut` says whether each
    takes out a share of what was there. `matches` is the largest |cosine| of the shared directions
    with a given one, `residual` the residual it was measured at where the file has one for each.
    `behind_norms` counts the members behind a post-norm whose gain their directions were divided
    by: what a cut removes there is g ∘ d, and d is what they share.
    """

    side: str
    members: tuple[str, ...]
    of: int
    cosine: float
    cut: bool
    strengths: tuple[float, float] | None
    strongest: str | None
    near: tuple[str, ...]
    directions: np.ndarray
    matches: float | None = None
    residual: int | None = None
    behind_norms: int = 0

    @property
    def rank(self) -> int:
        return len(self.directions)

    def words(self) -> str:
        count = "one direction" if self.rank == 1 else f"{self.rank} directions"
        place = "writers" if self.side == "output" else "readers"
        text = (
            f"a {'cut of' if self.cut else 'change along'} {count} in {len(self.members)} {place}"
        )
        if self.cut and self.strengths is not None:
            low, high = self.strengths
            text += f", strength {high:.2f}"
            if high - low > 0.02:
                text += f" at most ({self.strongest}) and {low:.2f} at least"
        if self.behind_norms:
            text += f", divided by the gain of the post-norm in {self.behind_norms}"
        return text

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k != "directions"}
        return {**to_plain(plain), "rank": self.rank}


def shared_changes(
    changes: Sequence[MatrixChange], gains: Mapping[str, np.ndarray] | None = None
) -> tuple[Shared, ...]:
    """The largest group of changes with a common direction, on either side of the stream.

    Output sides are those of the writers, and the rows of embedding tables. `gains` (d,) by name
    are those of the post-norms behind writers: what these share is looked for as it stands in the
    matrices, and as the stream gets it; the reading with more members holds.
    """
    changed = [c for c in changes if c.rank]
    writers = [(c, c.right if c.is_table else c.left) for c in changed]
    readers = [(c, c.right) for c in changed if not c.is_table]
    readings = [_group("output", writers)]
    behind = {c.label for c, basis in writers if basis.size and c.name in (gains or {})}
    if gains and behind:
        divided = [(c, _divided(b, gains[c.name]) if c.label in behind else b) for c, b in writers]
        readings.append(_group("output", divided, behind))
    output = max(readings, key=lambda one: (len(one.members), one.cosine) if one else (0, 0.0))
    groups = (output, _group("input", readers))
    return tuple(group for group in groups if group is not None)


def _divided(basis: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Orthonormal rows (k, d) that span what becomes the span of `basis` times the gain."""
    small = np.abs(gain) <= 1e-6 * np.abs(gain).max()
    rows = basis * np.divide(1.0, gain, out=np.zeros_like(gain), where=~small)
    # The first row stays the leading one.
    return np.linalg.qr(rows.T)[0].T


def _group(
    side: str,
    sides: Sequence[tuple[MatrixChange, np.ndarray]],
    behind: Collection[str] = (),
) -> Shared | None:
    sides = [(change, basis) for change, basis in sides if basis.size]
    shared: SharedDirections | None = shared_directions([basis for _, basis in sides])
    if shared is None:
        return None
    members = [sides[i][0] for i in shared.members]
    cut = side == "output" and all((c.alignment or 0.0) >= _ALIGNED for c in members)
    strengths = [c.strength or 0.0 for c in members]
    strongest = members[int(np.argmax(strengths))]
    return Shared(
        side=side,
        members=tuple(c.label for c in members),
        of=len(sides),
        cosine=min(shared.cosines),
        cut=cut,
        strengths=(min(strengths), max(strengths)) if cut else None,
        strongest=strongest.label if strongest.block is None else f"block {strongest.block}",
        near=tuple(sides[i][0].label for i in shared.near),
        directions=shared.directions,
        behind_norms=sum(c.label in behind for c in members),
    )


def findings(diff: FolderDiff) -> tuple[str, ...]:
    """The conclusion: one finding a string, the weights' first."""
    found: list[str] = []
    members = {name for group in diff.shared for name in group.members}
    requantized = [c for c in diff.changes if c.rounding_alone and c.label not in members]
    rest = [c for c in diff.changes if c not in requantized]
    if diff.shapes or diff.only_base or diff.only_edited:
        found.append(_inventory(diff))
    reformatted = [pair for pair in diff.formats.values() if pair[0] != pair[1]]
    if reformatted:
        found.append(_formats(reformatted, requantized))
    found += _changed(diff, rest)
    if diff.unread:
        found.append(f"{len(diff.unread)} tensors of a type that vauban does not read differ")
    if not found:
        found.append("weights equal")
    return (*found, *diff.settings.differences)


def _inventory(diff: FolderDiff) -> str:
    parts = []
    for names, where in ((diff.only_base, "the base"), (diff.only_edited, "the edited folder")):
        if names:
            parts.append(f"{len(names)} tensors only in {where} ({_first(names)})")
    if diff.shapes:
        parts.append(f"{len(diff.shapes)} tensors of another shape ({_first(tuple(diff.shapes))})")
    return "another set of tensors: " + ", ".join(parts)


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}, …"


def _formats(pairs: Sequence[tuple[str, str]], rounded: Sequence[MatrixChange]) -> str:
    counts = Counter(pairs)
    # A conversion to a packed format leaves the vectors as floats; the packing is the news.
    packed = [pair for pair in counts if any("-bit" in name for name in pair)]
    before, after = max(packed or counts, key=lambda pair: counts[pair])
    count = counts[before, after]
    what = "requantized" if packed else "stored as another type"
    text = f"{what}: {before} became {after} in {count} tensors"
    if count < len(pairs):
        text += f", {len(pairs) - count} others became another type"
    names = len({change.name for change in rounded})
    return f"{text}; {names} differ by rounding alone" if names else text


def _changed(diff: FolderDiff, rest: Sequence[MatrixChange]) -> list[str]:
    """The changes beyond a conversion."""
    matrices = [c for c in rest if c.rank is not None]
    vectors = [c for c in rest if c.rank is None and c.formats[0] == c.formats[1]]
    if diff.adapter and not matrices and not vectors:
        return ["an adapter that adds nothing"]
    found = []
    members = {name for group in diff.shared for name in group.members}
    low = [c for c in matrices if c.low_rank and c.rank]
    full = [c for c in matrices if not (c.low_rank and c.rank)]
    changed = len({c.name for c in (*matrices, *vectors)})
    if full and changed >= _FINE_TUNE * diff.tensors:
        every = (
            "every tensor" if changed == diff.tensors else f"{changed} of {diff.tensors} tensors"
        )
        return [f"{every} changed: a fine-tune"]
    if full:
        found.append(
            f"{len(full)} matrices changed at full rank: a fine-tune of a part of the model"
            if changed > 0.1 * diff.tensors
            else f"{len(full)} matrices changed at full rank ({_first([c.label for c in full])})"
        )
    found += [group.words() for group in diff.shared]
    alone = [c for c in low if c.label not in members]
    if alone:
        top = max(c.rank or 0 for c in alone)
        rank = f"rank {top}" if top < COUNTED else f"rank {COUNTED} or more"
        if diff.shared:
            found.append(f"low-rank changes (up to {rank}) beside it in {len(alone)} matrices")
        elif len(alone) == 1:
            found.append(f"a change of {rank} in one matrix ({alone[0].label})")
        else:
            found.append(
                f"a low-rank change (up to {rank}) without a common direction in {len(alone)} "
                "matrices"
            )
    if vectors:
        found.append(f"{len(vectors)} vectors changed ({_first([c.label for c in vectors])})")
    return found
