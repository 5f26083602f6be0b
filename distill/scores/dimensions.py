"""The scorer of every task: dimensions in VBench's vocabulary, by exact rules on a reading of `distill.scores.tracks`.

Semantic dimensions compare with the caption. Quality dimensions ask whether objects and background stay the same. All
lie in [0, 1], and a drawn clip scores 1 up to pixel accuracy. Weights are VBench's: every dimension 1 except dynamic
degree 0.5; total = (4 quality + semantic) / 5. A dimension that does not apply is NaN and left out of means, for
example a spatial relation with one object.

Two more numbers, 0 or 1 for one clip, are in no total. `all_right`: the clip shows every fact of its caption at once.
`blink`: its mover vanishes and comes back, which no caption states.

The past counts. Another object may hide an object, and a mover may blink, but it has to come back. Motion smoothness
asks whether it comes back where constant speed and the walls put it, subject consistency whether it looks as before.
"""

import math
from collections.abc import Iterable
from itertools import groupby, permutations

import torch
from torch import Tensor

from distill.data.scenes import RELATIONS, Scene
from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZE
from distill.scores.tracks import Reading, Track, read

# Dimension -> the least value with which a clip counts as right in it.
SEMANTIC = {
    "object_class": 0.6,
    "multiple_objects": 0.8,
    "color": 0.8,
    "spatial_relationship": 1.0,
    "scene": 0.95,
    "direction": 1.0,
    "speed": 1.0,
}
QUALITY = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "dynamic_degree": 0.5,
    "imaging_quality": 1.0,
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0

LAG = 3  # frames between the two centres of a velocity
MIN_PACE = 0.15  # pixels per frame of something that moves
PACES = {"slowly": (MIN_PACE, 0.7), "quickly": (0.7, 1.5)}
ONE_WAY = 0.75  # without walls: least net way of a mover that keeps its direction, against its whole way
MAX_STEP = 3.0  # pixels between two frames
MAX_TURN = 1.0  # pixels per frame^2, away from the walls
WALL = 2.5  # pixels within which a wall may turn a mover round
MAX_MISS = 3.0  # pixels between the place where a hidden mover reappears and the expected one
MAX_STRAY = 1.5  # pixels that an object at rest may be away from its place
MIN_HIDDEN = 3  # frames; a shorter absence is flicker
MAX_COVERED = 24  # frames behind another object
SIZE_CHANGE, TONE_CHANGE, TONE_STEP = 0.25, 0.35, 0.25
GROUND_CHANGE, GROUND_STEP, GROUND_SPREAD = 0.15, 0.03, 0.1
SHARP = (0.6, 0.88)  # IoU with a drawing that scores 0 and 1


def _wrapped(difference: Tensor) -> Tensor:
    """Differences of positions on the torus."""
    return (difference + SIZE / 2) % SIZE - SIZE / 2


def _runs(flags: Tensor) -> list[tuple[bool, int, int]]:
    """(value, first, last + 1) of the runs of a bool sequence."""
    runs, start = [], 0
    for value, group in groupby(flags.tolist()):
        length = len(list(group))
        runs.append((value, start, start + length))
        start += length
    return runs


def _lost(track: Track, max_hidden: int, begins: bool) -> Tensor:
    """Frames in which the object should be visible and is not: bool [T].

    Absences of up to `max_hidden` frames are allowed, and longer ones that begin or end behind another object. A video
    that `begins` with an absence has lost the object.
    """
    lost = torch.zeros_like(track.found)
    for found, first, end in _runs(track.found):
        if found:
            continue
        behind = (first > 0 and bool(track.touched[first - 1])) or (end < len(lost) and bool(track.touched[end]))
        allowed = max(max_hidden, MAX_COVERED if behind else 0)
        lost[first:end] = (begins and first == 0) or end - first > allowed
    return lost


def share_of(hits: Tensor, among: Tensor) -> float:
    """Share of the frames `among` that are `hits`; NaN without such frames."""
    count = int(among.sum())
    return float((hits & among).sum()) / count if count else math.nan


def mean_known(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _at_wall(track: Track, axis: int) -> Tensor:
    return torch.minimum(track.centre[:, axis], SIZE - track.centre[:, axis]) < track.radius + WALL


def hardly_seen(track: Track) -> bool:
    """Whether another object is in the way so often that the motion cannot be read."""
    whole = track.clear.unfold(0, LAG + 1, 1).all(1)
    return int(whole.sum()) < 4 and float(track.touched.float().mean()) > 0.3


def motion(track: Track, walls: bool = True) -> tuple[str | None, float, bool]:
    """First direction (None without a steady motion along one axis), pixels per frame, whether it moves to the end.

    Only `walls` may turn a steady motion round.
    """
    if len(track.clear) <= LAG:
        return None, 0.0, False
    moves = _wrapped(track.centre[LAG:] - track.centre[:-LAG])
    whole = track.clear.unfold(0, LAG + 1, 1).all(1)
    if int(whole.sum()) < 2:
        return None, 0.0, False
    steps = _wrapped(track.centre[1:] - track.centre[:-1]).norm(dim=1)[track.clear[1:] & track.clear[:-1]]
    paces = moves.abs() / LAG
    mean = paces[whole].mean(0)
    axis = int(mean.argmax())
    pace = float(paces[whole, axis].median())
    ends = [paces[part, axis] for part in whole.nonzero()[:, 0].tensor_split(2)]
    lasting = all(bool(part.mean() >= MIN_PACE) for part in ends)
    steady = float(mean[axis]) >= MIN_PACE and float(mean[1 - axis]) < 0.5 * float(mean[axis])
    steady = steady and (walls or abs(float(moves[whole, axis].mean())) >= ONE_WAY * float(mean[axis]) * LAG)
    if not steady or float(steps.max()) > MAX_STEP:
        return None, pace, lasting
    first = int(track.clear.nonzero()[0])
    way = _wrapped(track.centre[:, axis] - track.centre[first, axis])
    begun = (track.clear & (way.abs() >= 2)).nonzero()
    if not len(begun):
        return None, pace, lasting
    sign = 1 if float(way[begun[0, 0]]) > 0 else -1
    name = next(name for name, step in DIRECTIONS.items() if step[axis] == sign)
    return name, pace, lasting


def _reappears(track: Track, axis: int, before: int, after: int, walls: bool) -> bool:
    """Whether a mover that is unseen between two frames comes back where its speed and the walls put it."""
    clear = track.clear.nonzero()[:, 0]
    clear = clear[clear <= before]
    moves = _wrapped(track.centre[clear[1:], axis] - track.centre[clear[:-1], axis])
    if not len(moves):
        return True
    pace, last = float(moves.abs().median()), float(moves[-1])
    here, there = float(track.centre[before, axis]), float(track.centre[after, axis])
    signs = (1.0, -1.0) if walls and bool(_at_wall(track, axis)[before]) else (math.copysign(1.0, last),)
    radius = float(track.radius[clear].median())
    span = SIZE - 2 * radius
    misses = []
    for sign in signs:
        way = here + sign * pace * (after - before)
        if walls:
            way = (way - radius) % (2 * span)
            way = radius + min(way, 2 * span - way)
        misses.append(abs((there - way + SIZE / 2) % SIZE - SIZE / 2))
    across = abs(float(_wrapped(track.centre[after, 1 - axis] - track.centre[before, 1 - axis])))
    return min(misses) <= MAX_MISS and across <= MAX_MISS


def _smoothness(track: Track, moving: bool, walls: bool) -> float:
    """Share of the frames without a jerk. A jump, or a return elsewhere, costs all frames from there on."""
    frames = len(track.clear)
    clear = track.clear.nonzero()[:, 0]
    if len(clear) < 3:
        return math.nan if frames < 3 or bool(track.touched.any()) else 0.0
    if not moving:
        place = track.centre[clear].median(0).values
        stray = _wrapped(track.centre - place).abs().amax(1) > MAX_STRAY
        return 1 - share_of(stray, track.clear)
    turn = _wrapped(_wrapped(track.centre[2:] - track.centre[1:-1]) - _wrapped(track.centre[1:-1] - track.centre[:-2]))
    axis = int(_wrapped(track.centre[clear[1:]] - track.centre[clear[:-1]]).abs().sum(0).argmax())
    near = _at_wall(track, axis)[1:-1] if walls else torch.zeros(frames - 2, dtype=torch.bool)
    whole = track.clear.unfold(0, 3, 1).all(1)
    share = 1 - share_of((turn.norm(dim=1) > MAX_TURN) & ~near, whole) if bool(whole.any()) else 1.0
    for before, after in zip(clear[:-1].tolist(), clear[1:].tolist(), strict=True):
        step = float(_wrapped(track.centre[after] - track.centre[before]).norm())
        if after == before + 1:
            fine = step <= MAX_STEP
        elif bool(track.found[before + 1 : after].all()):  # occluded in part, but visible all the time
            fine = step <= MAX_STEP * (after - before)
        else:
            fine = _reappears(track, axis, before, after, walls)
        if not fine:
            return share * before / frames
    return share


def _consistency(track: Track, lost: Tensor) -> float:
    """Share of the frames in which the object has the size, colour and shape of its first clear frames."""
    judged = track.found & (track.clear | ~track.touched) | lost
    if not bool(track.clear.any()):
        return 0.0 if bool(judged.any()) else math.nan
    first = track.clear.nonzero()[:9, 0]
    area, tone = track.area[first].median(), track.tone[first].median(0).values
    same = (track.area / area - 1).abs() < SIZE_CHANGE
    same &= (track.tone - tone).norm(dim=1) < TONE_CHANGE
    same &= track.shape == track.shape[first].mode().values
    return share_of(same & track.clear, judged)


def _flicker(reading: Reading, tracks: list[Track]) -> float:
    """Share of the steps between frames in which no lasting object comes, goes or changes its colour."""
    steady = reading.ground_change < GROUND_STEP
    for track in tracks:
        both = track.clear[1:] & track.clear[:-1]
        steady &= ~(both & ((track.tone[1:] - track.tone[:-1]).norm(dim=1) > TONE_STEP))
        for found, first, end in _runs(track.found):
            inside = first > 0 and end < len(track.found)
            if not found and inside and end - first < MIN_HIDDEN and not bool(track.touched[[first - 1, end]].any()):
                steady[first - 1 : end] = False
    return float(steady.float().mean())


def _fits(track: Track, scene: Scene, number: int, walls: bool) -> float:
    """How well a track fits object `number` of the caption."""
    thing = scene.mover if number == 0 else scene.other
    if thing is None:
        return 0.0
    colour = 2.0 * (track.colour == list(COLOURS).index(thing.colour))
    shape = share_of(track.shape == SHAPES.index(thing.shape), track.clear)
    moving = motion(track, walls)[0] is not None
    return (
        colour + (0.0 if math.isnan(shape) else shape) + (moving == (number == 0)) + float(track.found.float().mean())
    )


def match(reading: Reading, scene: Scene, walls: bool = True) -> list[Track | None]:
    """The tracks of the caption's objects, mover first; None for an object that the clip does not show."""
    wanted = 1 if scene.other is None else 2
    found: list[Track | None] = [*reading.tracks, *[None] * wanted]

    def worth(choice: Iterable[Track | None]) -> float:
        return sum(_fits(track, scene, number, walls) for number, track in enumerate(choice) if track is not None)

    return list(max(permutations(found[: len(reading.tracks) + wanted], wanted), key=worth))


def _blinks(mover: Track | None) -> bool:
    """Whether the mover vanishes for a latent frame or more and comes back, with nothing in front of it.

    This is no score, as no caption states it. The share of such clips tells whether a model still draws such facts.
    """
    if mover is None:
        return False
    return any(
        not found and first > 0 and end < len(mover.found) and end - first >= MIN_HIDDEN
        and not bool(mover.touched[[first - 1, end]].any())
        for found, first, end in _runs(mover.found)
    )  # fmt: skip


def _all_right(scores: dict[str, float]) -> bool:
    """Whether every semantic dimension that applies reaches its bar."""
    return all(math.isnan(scores[name]) or scores[name] >= bar for name, bar in SEMANTIC.items())


def dimensions(
    video: Tensor, scene: Scene, *, max_hidden: int = 9, walls: bool = True, begins: bool = True
) -> dict[str, float]:
    """Every dimension of a clip, float [3, T, 32, 32] in [-1, 1], against its scene; then `all_right` and `blink`.

    max_hidden  frames in a row that an object may be unseen
    walls       movers bounce off walls; otherwise they cross a torus
    begins      the clip is the beginning of a video, not a part of a longer one
    """
    reading = read(video)
    chosen = match(reading, scene, walls)
    things = [scene.mover] if scene.other is None else [scene.mover, scene.other]
    tracks = [track for track in chosen if track is not None]
    lost = [torch.ones_like(reading.extra) if t is None else _lost(t, max_hidden, begins) for t in chosen]
    named = list(zip(chosen, lost, things, strict=True))
    none = torch.zeros_like(reading.extra)
    surplus = reading.extra.clone()
    for track in reading.tracks:
        if not any(track is other for other in chosen):
            surplus |= track.found

    def share(what: str, names: Iterable[str], among: str) -> float:
        names, values = list(names), []
        for track, gone, thing in named:
            if track is None:
                values.append(0.0)
                continue
            wanted = names.index(getattr(thing, "colour" if what == "colour" else what))
            hits = torch.full_like(none, track.colour == wanted) if what == "colour" else track.shape == wanted
            values.append(share_of(hits & getattr(track, among), getattr(track, among) | gone))
        return mean_known(values)

    mover = chosen[0]
    direction, pace, lasting = motion(mover, walls) if mover is not None else (None, 0.0, False)
    moves = video.shape[1] > LAG  # a still has no motion to judge
    unread = not moves or (mover is not None and hardly_seen(mover))
    low, high = PACES[scene.speed]
    found = {
        "object_class": share("shape", SHAPES, "clear"),
        "multiple_objects": 1 - share_of(surplus | torch.stack(lost).any(0), ~none),
        "color": share("colour", COLOURS, "found"),
        "spatial_relationship": _relation(chosen, scene),
        "scene": share_of(reading.grounds == list(BACKGROUNDS).index(scene.background), ~none),
        "direction": math.nan if unread else float(direction == scene.direction),
        "speed": math.nan if unread else float(direction is not None and low <= pace < high),
        "subject_consistency": mean_known(0.0 if t is None else _consistency(t, gone) for t, gone, _ in named),
        "background_consistency": share_of(
            (reading.ground_tone - reading.ground_tone[0]).norm(dim=1) < GROUND_CHANGE, ~none
        ),
        "temporal_flickering": _flicker(reading, tracks),
        "motion_smoothness": mean_known(
            (0.0 if moves else math.nan) if t is None else _smoothness(t, number == 0, walls)
            for number, t in enumerate(chosen)
        ),
        "dynamic_degree": math.nan if unread else float(lasting),
        "imaging_quality": _imaging(reading, chosen),
    }
    return found | {"all_right": float(_all_right(found)), "blink": float(_blinks(mover))}


def _relation(chosen: list[Track | None], scene: Scene) -> float:
    """Whether the stated relation holds in the first frame that shows both objects."""
    if scene.other is None:
        return math.nan
    mover, other = chosen
    if mover is None or other is None:
        return 0.0
    both = (mover.found & other.found).nonzero()
    if not len(both) or int(both[0]) > 8:
        return 0.0
    gap = mover.centre[int(both[0])] - other.centre[int(both[0])]
    axis = int(gap.abs().argmax())
    step = RELATIONS[str(scene.relation)]
    return float(step[axis] != 0 and step[axis] * float(gap[axis]) > 2)


def _imaging(reading: Reading, chosen: list[Track | None]) -> float:
    """How closely the objects match drawings, times how plain the background is."""
    low, high = SHARP
    sharp = [0.0 if t is None else float(((t.iou[t.clear] - low) / (high - low)).clamp(0, 1).mean()) for t in chosen]
    plain = (1 - (reading.ground_spread / GROUND_SPREAD - 0.2).clamp(0, 1)).mean()
    known = mean_known(sharp)
    return math.nan if math.isnan(known) else known * float(plain)


def with_totals(clip: dict[str, float]) -> dict[str, float]:
    """The scores of one clip, behind `semantic`, `quality` and `total`: weighted means of the dimensions that apply."""
    semantic = mean_known(clip[name] for name in SEMANTIC)
    known = {name: weight for name, weight in QUALITY.items() if not math.isnan(clip[name])}
    quality = sum(clip[name] * weight for name, weight in known.items()) / sum(known.values())
    total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {"semantic": semantic, "quality": quality, "total": total, **clip}


def summarise(scores: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Means and standard errors over clips of everything that `dimensions` returns, and of the totals."""
    if not scores:
        raise ValueError("scores: got an empty list, expected at least one clip")
    rows = [with_totals(clip) for clip in scores]
    found = {name: mean_and_error(row[name] for row in rows) for name in rows[0]}
    return {name: value for name, value in found.items() if value["n"]}


def mean_and_error(values: Iterable[float]) -> dict[str, float]:
    """Mean, standard error and number of the values that are not NaN."""
    known = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(known):
        return {"mean": math.nan, "se": math.nan, "n": 0}
    error = float(known.std(correction=1)) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    return {"mean": round(float(known.mean()), 4), "se": round(error, 4), "n": len(known)}
