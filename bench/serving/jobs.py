"""A viewer who orders a whole video (/v1/videos), and looks until it is there."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from bench.serving.playback import Arrival
from bench.serving.process import Answered, Server
from bench.serving.viewers import Plan, Seen

VIDEO_SECONDS = 4  # of each ordered video
EVERY = 0.2  # seconds between two looks
BUSY = 429


async def by_job(server: Server, plan: Plan, until: float) -> Seen:
    """Order a video and wait for it, until a time. It arrives at once; one that is not there in time is taken back."""
    seen = Seen(plan, "jobs")
    await asyncio.sleep(plan.delay)
    seen.asked = time.monotonic()
    order = {"prompt": plan.prompts[0], "seconds": str(VIDEO_SECONDS), "seed": plan.seed}
    try:
        job = await asyncio.to_thread(server.ask, "/v1/videos", order)
        place = f"/v1/videos/{job['id']}"
        seen.waited = job["status"] == "queued"
        while job["status"] in ("queued", "in_progress") and time.monotonic() < until:
            await asyncio.sleep(EVERY)
            job = await asyncio.to_thread(server.ask, place)
        if job["status"] == "completed":
            video = await asyncio.to_thread(server.ask, place + "/content")
            seen.bytes = len(video)
            seen.arrivals.append(Arrival(time.monotonic(), round(VIDEO_SECONDS * plan.fps)))
        elif job["status"] == "failed":
            seen.failed = f"the job failed: {job['error']}"
        with suppress(OSError):
            await asyncio.to_thread(server.ask, place, None, "DELETE")
    except Answered as error:
        if error.status == BUSY:
            seen.refused = "busy"
        else:
            seen.failed = str(error)
    except OSError as error:
        seen.failed = f"{type(error).__name__}: {error}"
    return seen
