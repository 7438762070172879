"""Ray's Jobs API, asked over HTTP. What it cannot do is a ClusterError, with a text for people."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.errors import ClusterError, Refused


@dataclass(frozen=True)
class Client:
    """What is asked of the Jobs API behind the dashboard at `address`."""

    address: str
    api: JobSubmissionClient

    def jobs(self) -> list[JobDetails]:
        with _told(self.address):
            return list(self.api.list_jobs())

    def status(self, job: str) -> JobStatus:
        with _told(self.address):
            return self.api.get_job_status(job)

    def log(self, job: str) -> str:
        with _told(self.address):
            return str(self.api.get_job_logs(job))

    def follow(self, job: str, write: Callable[[str], None]) -> None:
        """Write a job's log as it grows, until the job ends."""

        async def tail() -> None:
            pieces = self.api.tail_job_logs(job)
            while True:
                with _told(self.address):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                write(piece)

        asyncio.run(tail())

    def submit(
        self,
        entrypoint: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str] | None = None,
        submission_id: str | None = None,
    ) -> str:
        with _told(self.address):
            job = self.api.submit_job(
                entrypoint=entrypoint,
                runtime_env=runtime_env,
                metadata=metadata,
                submission_id=submission_id,
            )
            return str(job)

    def stop(self, job: str) -> None:
        with _told(self.address):
            self.api.stop_job(job)

    def delete(self, job: str) -> None:
        with _told(self.address):
            self.api.delete_job(job)

    def has_package(self, uri: str) -> bool:
        """Whether an uploaded package is there; asking keeps it for a while."""
        with _told(self.address):
            return bool(self.api._package_exists(uri))


def connected(address: str) -> Client:
    """A client of the dashboard at this address, which has answered."""
    if not re.fullmatch(r"https?://[^/\s#][^\s#]*", address):
        raise ClusterError(
            f"--address: given {address!r}; expected the dashboard's, such as http://127.0.0.1:8265"
        )
    with _told(address):
        try:
            return Client(address, JobSubmissionClient(address))
        except (RuntimeError, KeyError, requests.JSONDecodeError) as error:
            raise ClusterError(
                f"{address}: what answers there is no Ray dashboard; expected its address, such as "
                f"http://127.0.0.1:8265"
            ) from error


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Around one call of Ray's client, and nothing else: what it raises becomes a ClusterError."""
    try:
        yield
    except RuntimeError as error:  # so its methods report whatever the server refuses
        raise Refused(f"{address}: {error}") from error
    except ConnectionError as error:
        raise ClusterError(
            f"{address}: no Ray dashboard answers there; expected its address, such as "
            f"http://127.0.0.1:8265, through a tunnel if the cluster is far away"
        ) from error
    except (requests.HTTPError, AuthenticationError) as error:
        refusal = getattr(getattr(error, "response", None), "status_code", None)
        if refusal in (None, 401, 403):
            told = re.split(r"\n|\. ", str(error))[0]  # Ray goes on with a page of advice
            raise ClusterError(
                f"{address}: the cluster wants a token; set RAY_AUTH_MODE=token, and put the "
                f"cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN "
                f"({told})"
            ) from error
        raise ClusterError(f"{address}: {error}") from error
    except (requests.RequestException, aiohttp.ClientError) as error:
        raise ClusterError(f"{address}: {error}") from error
