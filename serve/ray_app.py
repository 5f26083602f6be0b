"""Streams over several processes or machines, with Ray Serve.

    serve run serve.ray_app:app                                               # the embedded model, one replica
    serve run serve.ray_app:build model=Wan2.1-T2V-1.3B checkpoint=... replicas=2 gpus=1
    serve run serve.ray_app:build replicas=2 cores=1 sessions=4               # on a laptop

Arguments are the options of `python -m serve`, and those of `Replicas`. Each replica runs that server on a free port.
One door in front of them passes requests on (serve/many); the media of WebRTC goes from the replica directly.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ray
import uvicorn
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from engine.options import Parser, add_options, option, options_of
from serve import many
from serve.build import add_server_options
from serve.build import build as build_server
from serve.many.door import Door
from serve.options import Network, Sessions
from serve.web.app import make_app
from serve.web.ending import PoliteServer

log = logging.getLogger("serve")
AGAIN = 2.0  # seconds between two registrations
OPEN = 10_000  # requests that one replica takes: it has its own rules
NOT_HERE = ("host", "port", "tls_cert", "tls_key", "open")  # options of a server that Ray's own proxy listens for


@dataclass(frozen=True)
class Replicas:
    """How many servers there are, and what each one gets."""

    replicas: int = option(1, "replicas, at least", metavar="N")
    max_replicas: int | None = option(
        None, "replicas at most; more start when sessions and jobs wait; default: no more", metavar="N"
    )
    cores: float = option(1.0, "cores of a replica", metavar="N")
    gpus: float | None = option(None, "GPUs of a replica; default: 1 if this machine has one, else 0", metavar="N")
    target: float | None = option(
        None, "sessions and jobs per replica above which more start; default: three quarters of --sessions, or 2",
        metavar="N",
    )  # fmt: skip
    drain: float = option(60.0, "seconds that a replica which is to stop gives its sessions to end", metavar="S")

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= 1000:
            raise ValueError(f"replicas: got {self.replicas}, expected 1 to 1000")
        if self.max_replicas is not None and not self.replicas <= self.max_replicas <= 1000:
            raise ValueError(f"max_replicas: got {self.max_replicas}, expected {self.replicas} (replicas) to 1000")
        for name in ("cores", "target", "drain"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: got {value:g}, expected a positive number")
        if self.gpus is not None and not 0 <= self.gpus <= 1000:
            raise ValueError(f"gpus: got {self.gpus:g}, expected 0 to 1000")


class ByName(RequestRouter):
    """Gives a request to the replica that its argument names, so that it stands in that replica's count."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.args[0] if pending_request is not None and pending_request.args else None
        return [[one for one in candidate_replicas if one.replica_id.unique_id == wanted] or candidate_replicas]


class Streams:
    """A replica: the server of `python -m serve` on a free port, which it tells the door."""

    def __init__(self, args: argparse.Namespace) -> None:
        warnings.simplefilter("ignore")  # sessions tell their viewers what concerns them
        self._secret = secrets.token_urlsafe(24)
        args.token = self._secret  # the door checks the users' one
        self._server = build_server(args)
        self._holds = 0
        context = ray_serve.get_replica_context()
        self._name, self._app = context.replica_id.unique_id, context.app_name
        self._listening = socket.create_server((ray.util.get_node_ip_address(), 0))
        host, port = self._listening.getsockname()[:2]
        self._url = f"http://{host}:{port}"
        config = uvicorn.Config(
            make_app(self._server), log_config=None, access_log=False, forwarded_allow_ips="*",
            ws_max_size=self._server.network.upload_mb << 20, timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._web = PoliteServer(config, self._server)
        self._thread = threading.Thread(target=self._web.run, args=([self._listening],), name="server", daemon=True)
        self._thread.start()
        threading.Thread(target=self._register, name="register", daemon=True).start()

    def _register(self) -> None:
        """Tell the door where this replica serves, again and again: a door may start later, or anew."""
        while self._thread.is_alive():
            try:
                door = ray_serve.get_deployment_handle("Door", self._app)
                door.register.remote(self._name, self._url, self._secret).result(timeout_s=30)
            except Exception:  # there is no door yet, or it starts again
                log.debug("the door was not reached", exc_info=True)
            time.sleep(AGAIN)

    async def hold(self, wanted: str) -> bool:
        """Count as one request until it is cancelled, or until this replica has fewer sessions and jobs than holds.

        False if another replica was meant, which takes no new ones.
        """
        if wanted != self._name:
            return False
        self._holds += 1
        try:
            while self._holds <= self._load():
                await asyncio.sleep(1.0)
        finally:
            self._holds -= 1
        return True

    def _load(self) -> int:
        house, jobs = self._server.house, self._server.jobs
        return house.running + house.waiting + jobs.running + jobs.queued

    def check_health(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("the server of this replica has ended")

    def __del__(self) -> None:
        if hasattr(self, "_web"):
            self._web.should_exit = True
            self._thread.join(15)


@ray_serve.ingress(lambda: many.door.opened.app)
class FrontDoor:
    """The door, as a deployment."""

    def __init__(
        self, streams: DeploymentHandle, network: Network, token: str, jobs: Path | None, at_once: int
    ) -> None:
        async def hold(wanted: str) -> bool:
            response = streams.hold.remote(wanted)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise

        context = ray.get_runtime_context()
        folder = jobs or Path(tempfile.gettempdir()) / f"greedy-jobs-{context.get_session_name()}"
        many.door.opened = self._door = Door(network, token, folder, at_once, hold)

    async def register(self, name: str, url: str, secret: str) -> None:
        """A replica says where it serves."""
        await self._door.register(name, url, secret)


def build(args: Mapping[str, Any]) -> ray_serve.Application:
    """The application of `serve run serve.ray_app:build KEY=VALUE ...`, or of a config file's `args`.

    ValueError for options that no server has.
    """
    given = _parser().parse_args(_command_line(args))
    network, sessions, replicas = options_of(given, Network), options_of(given, Sessions), options_of(given, Replicas)
    gpus = _gpus() if replicas.gpus is None else replicas.gpus
    folder = vars(given).pop("jobs_dir", None)  # of all jobs, at the door; each replica has a temporary one
    for name in ("allow_origin", *Replicas.__dataclass_fields__):
        vars(given).pop(name, None)  # the door's; a replica that knew its number would be replaced when that changes
    if not gpus and not hasattr(given, "threads"):
        given.threads = max(1, int(replicas.cores))
    target = replicas.target or (0.75 * sessions.sessions if sessions.sessions else 2)
    number: dict[str, Any] = {"num_replicas": replicas.replicas}
    if replicas.max_replicas is not None and replicas.max_replicas > replicas.replicas:
        scaling = AutoscalingConfig(
            min_replicas=replicas.replicas, max_replicas=replicas.max_replicas, target_ongoing_requests=target,
            upscale_delay_s=5.0, downscale_delay_s=300.0, metrics_interval_s=2.0, look_back_period_s=10.0,
        )  # fmt: skip
        number = {"autoscaling_config": scaling}
    router: Any = ByName  # a class is right; the type of the field says otherwise
    deployment: Any = ray_serve.deployment  # its overloads do not fit classes
    streams = deployment(
        Streams, name="Streams", max_ongoing_requests=OPEN, health_check_period_s=2.0,
        graceful_shutdown_timeout_s=replicas.drain, graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": replicas.cores, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=router), **number,
    )  # fmt: skip
    door = deployment(
        FrontDoor, name="Door", num_replicas=1, max_ongoing_requests=OPEN, health_check_period_s=2.0,
        graceful_shutdown_timeout_s=replicas.drain, graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0}, logging_config=LoggingConfig(enable_access_log=False),
    )  # fmt: skip
    return door.bind(streams.bind(given), network, network.secret, folder, sessions.jobs)


class _Arguments(Parser):
    def error(self, message: str) -> NoReturn:
        """A ValueError: in a cluster this runs in a process that must not end."""
        raise ValueError(f"arguments: {' '.join(message.split())}")


def _parser() -> Parser:
    made = _Arguments(prog="serve run serve.ray_app:build", description=__doc__)
    add_options(made, Replicas, "replicas")
    add_server_options(made)
    return made


def _command_line(args: Mapping[str, Any]) -> list[str]:
    """KEY=VALUE pairs as a command line. ValueError for keys that have no meaning here."""
    words: list[str] = []
    for key, value in args.items():
        name = key.strip("-").replace("_", "-")
        if name.replace("-", "_") in NOT_HERE:
            raise ValueError(f"{key}: got {value!r}, expected none: Ray Serve listens (http_options of its config)")
        for one in value if isinstance(value, list | tuple) else [value]:
            on = isinstance(one, bool) or str(one).lower() in ("true", "false")
            words += ([f"--{name}"] if str(one).lower() == "true" else []) if on else [f"--{name}={one}"]
    return words


def _gpus() -> float:
    """GPUs of a replica: 1 where the cluster, or this machine if there is none yet, has one."""
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0) >= 1)
    import torch

    return float(torch.cuda.is_available())


def __getattr__(name: str) -> ray_serve.Application:
    if name == "app":
        return build({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
