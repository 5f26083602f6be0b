"""Whether a stream follows a switch of its prompt, by exact rules, and whether it keeps the rest.

Every captioned fact of the mover and of the background is judged from the fourth latent frame after the switch on. A
direction is right if the first steady motion since the switch, or since one of the two latent frames that follow, goes
there: later the mover may bounce. What the later caption did not change is kept if these facts still hold and the
mover goes on from its place, with its size, beside the same second object.
"""

import math
from collections.abc import Iterable

from torch import Tensor

from distill.data.scenes import LATENT, SPEED_RANGES, Scene
from distill.data.sprites import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZE
from distill.data.switches import FACTS, Switch
from distill.scores.dimensions import (
    PACES,
    SIZE_CHANGE,
    dimensions,
    hardly_seen,
    match,
    motion,
    share_of,
    with_totals,
)
from distill.scores.tracks import Reading, Track, read

SETTLED = 3 * LATENT  # pixel frames from the switch to the first frame that has to be right
OFFSETS = range(0, SETTLED, LATENT)  # pixel frames after the switch at which a first motion may begin
GROUND_SHARE, SHAPE_SHARE = 0.95, 0.8  # of the frames
MAX_LEAP = 8.0  # pixels between the mover's places just before and one latent frame after the switch
MAX_STRAY = 2.0  # pixels that the second object may move
FASTEST = SPEED_RANGES["quickly"][1]  # pixels per frame
NEAR = 6.0  # pixels to a wall within which a mover may bounce before its motion is read


def followed(video: Tensor, switch: Switch) -> dict[str, float]:
    """Scores of one clip, float [3, T, 32, 32] in [-1, 1]: `right`, `kept`, `quality` and one per fact; NaN: unread.

    right    1 if every fact that the switch changed is as the later caption says
    kept     1 if all the rest is as before
    quality  of the frames that have to be right, in VBench's vocabulary
    """
    if video.shape[1] < switch.frame + SETTLED + 2 * LATENT:
        raise ValueError(f"switch: got {video.shape[1]} frames, expected {switch.frame + SETTLED + 2 * LATENT} or more")
    part = video[:, switch.frame + SETTLED :]
    reading, before = read(part), read(video[:, : switch.frame])
    mover = match(reading, switch.after)[0]
    facts = {
        "colour": float(mover is not None and mover.colour == list(COLOURS).index(switch.after.mover.colour)),
        "shape": _shape(mover, switch.after),
        "direction": _direction(video, before, switch),
        "speed": _speed(mover, switch.after),
        "background": float(_ground(reading) == list(BACKGROUNDS).index(switch.after.background)),
    }
    rest = [facts[name] for name in FACTS if name not in switch.changed]
    rest += (
        _goes_on(before, read(video[:, switch.frame :]), switch) if switch.before.other == switch.after.other else []
    )
    return {
        "right": _all(facts[name] for name in switch.changed),
        "kept": _all(rest),
        "quality": with_totals(dimensions(part, switch.after, begins=False))["quality"],
        **facts,
    }


def _all(values: Iterable[float]) -> float:
    """Whether all of the known values are 1; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return float(min(known) == 1) if known else math.nan


def _shape(mover: Track | None, scene: Scene) -> float:
    if mover is None:
        return 0.0
    hits = share_of(mover.shape == SHAPES.index(scene.mover.shape), mover.clear)
    return math.nan if math.isnan(hits) else float(hits >= SHAPE_SHARE)


def _ground(reading: Reading) -> int:
    """The background of nearly all frames, or -1."""
    ground = int(reading.grounds.mode().values)
    return ground if float((reading.grounds == ground).float().mean()) >= GROUND_SHARE else -1


def _speed(mover: Track | None, scene: Scene) -> float:
    if mover is None:
        return 0.0
    low, high = PACES[scene.speed]
    return math.nan if hardly_seen(mover) else float(low <= motion(mover)[1] < high)


def _direction(video: Tensor, before: Reading, switch: Switch) -> float:
    wanted, unread = _headings(match(before, switch.before)[0], switch), True
    for offset in OFFSETS:
        mover = match(read(video[:, switch.frame + offset :]), switch.after)[0]
        if mover is not None and hardly_seen(mover):
            continue
        unread = False
        if mover is not None and motion(mover)[0] in wanted:
            return 1.0
    return math.nan if unread or not wanted else 0.0


def _headings(mover: Track | None, switch: Switch) -> set[str]:
    """Where the mover may head first after the switch; `mover` is its track before. Empty: there is no telling.

    To a new direction, unless a wall is near there. Else as before, and the other way as well near a wall.
    """
    named, step = switch.after.direction, DIRECTIONS[switch.after.direction]
    against = next(name for name, other in DIRECTIONS.items() if other == (-step[0], -step[1]))
    if mover is None or int(mover.clear.sum()) < 2:
        return {named} if "direction" in switch.changed else {named, against}
    axis, along = int(step[0] == 0), sum(step)
    clear, radius = mover.clear.nonzero()[:, 0], float(mover.radius[mover.clear].median())
    moves = (mover.centre[clear[1:], axis] - mover.centre[clear[:-1], axis]) / (clear[1:] - clear[:-1])
    place, pace = float(mover.centre[clear[-1], axis]), float(moves[-4:].mean())
    if "direction" in switch.changed:
        ahead = SIZE - radius - place if along > 0 else place - radius
        return {named} if ahead >= NEAR else set()
    place += pace * (switch.frame - 1 - int(clear[-1]))  # where it is when the prompt changes
    if min(place - radius, SIZE - radius - place) < NEAR:
        return {named, against}
    return {named} if pace * along > 0 else {against}


def _goes_on(before: Reading, after: Reading, switch: Switch) -> list[float]:
    """Whether mover and second object are where they were, of the same size; the second one with the same looks."""
    scores = []
    old, new = match(before, switch.before), match(after, switch.after)
    things = [switch.after.mover, switch.after.other]
    for number, (was, now, thing) in enumerate(zip(old, new, things, strict=False)):
        if was is None or now is None:
            scores.append(0.0)
            continue
        apart = was.clear & ~was.touched, now.clear[LATENT:] & ~now.touched[LATENT:]
        if not (bool(apart[0].any()) and bool(apart[1].any())):
            continue  # one in front of the other all the time
        last, first = int(apart[0].nonzero()[-1]), LATENT + int(apart[1].nonzero()[0])
        radius = float(was.radius[apart[0]].median()), float(now.radius[LATENT:][apart[1]].median())
        scores.append(float(abs(radius[1] / radius[0] - 1) < SIZE_CHANGE))
        gap = float((now.centre[first] - was.centre[last]).norm())
        unseen = switch.frame - 1 - last + first - LATENT
        scores.append(float(gap <= (MAX_STRAY if number else MAX_LEAP + FASTEST * unseen)))
        if number:
            assert thing is not None
            looks = share_of(now.shape[LATENT:] == SHAPES.index(thing.shape), apart[1]) >= SHAPE_SHARE
            scores.append(float(looks and now.colour == list(COLOURS).index(thing.colour)))
    return scores
