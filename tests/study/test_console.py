"""The study console over HTTP, served as it is without a cluster.

pytest tests/study/test_console.py
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from PIL import Image

from cluster.errors import Alive, ClusterError
from cluster.jobs import Home
from study.console import actions, app
from study.console.app import Settings, build_app
from study.console.guard import host_name, ray_token, refuse_exposed
from study.console.index import Index
from study.console.server import host_names
from study.folder import Storage, StudyFolder
from study.ledger import Ledger, Outcome, Result, Suggestion, read_suggestions
from tests.machine import wait_until
from tests.synthetic import ENVIRONMENT, HOSTILE, hostile_study, refreeze, write_study
from trainables.errors import UserError

TOKEN = "the-token-of-this-test"
OWN = {"Content-Type": "application/json", "X-Maskstudy": "1"}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Requests as they are on the wire; nothing is normalised."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        token: str | None = TOKEN,
        headers: dict[str, str | None] | None = None,
    ) -> Answer:
        content = None if body is None else json.dumps(body).encode()
        sent: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
        sent |= OWN if content is not None else {}
        sent |= {"Authorization": f"Bearer {token}"} if token else {}
        sent |= headers or {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=240)
        connection.putrequest(
            method or ("GET" if content is None else "POST"), path, skip_host=True
        )
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name, value)
        if content is not None:
            connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content)
        answer = connection.getresponse()
        found = Answer(answer.status, answer.headers, answer.read())
        connection.close()
        return found


@contextmanager
def served(storage: Path, **options: Any) -> Iterator[Client]:
    settings = Settings(
        storage=Storage(storage),
        token_sha256=hashlib.sha256(TOKEN.encode()).hexdigest(),
        host_names=host_names("127.0.0.1", []),
        **options,
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(settings), log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Client(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies, one of them with names that want to be markup; nothing in it is changed."""
    storage = tmp_path_factory.mktemp("storage")
    write_study(storage / "platelets", trials=14)
    hostile_study(storage / "hostile")
    return storage


@pytest.fixture(scope="module")
def ask(storage: Path) -> Iterator[Client]:
    with served(storage, allow_changes=True) as client:
        settled(client, "platelets")
        settled(client, "hostile")
        yield client


def settled(ask: Client, study: str, state: str | None = None) -> dict[str, Any]:
    """The study as it is told once all of it has been read."""

    def told() -> dict[str, Any]:
        found: dict[str, Any] = ask(f"/api/studies/{study}").json
        return found

    wait_until(lambda: told()["read"] == told()["suggested"] and state in (None, told()["state"]))
    return told()


# -- what it tells ------------------------------------------------------------------------------


def test_all_studies_are_told_with_their_numbers(ask: Client) -> None:
    told = ask("/api/studies").json
    assert [study["name"] for study in told["studies"]] == ["hostile", "platelets"]
    one = told["studies"][1]
    assert (one["question"], one["total"]) == ("Do small masks help the smallest cells?", 29)
    assert (one["suggested"], one["ended"]) == (14, 14)
    assert one["counts"] == {
        "complete": 9, "stopped": 4, "failed": 1, "diverged": 0, "out-of-memory": 0,
    }  # fmt: skip
    assert one["best"]["value"] > one["control"]["value"]
    assert (one["state"], one["ahead"]) == ("interrupted", [])


def test_the_table_of_trials_is_sorted_filtered_and_cut_into_pages(ask: Client) -> None:
    def page(**asked: Any) -> dict[str, Any]:
        words = "&".join(f"{key}={value}" for key, value in asked.items())
        found: dict[str, Any] = ask(f"/api/studies/platelets/trials?{words}").json
        return found

    first, second = page(limit=10), page(limit=10, offset=10)
    numbers = [line["number"] for line in first["trials"] + second["trials"]]
    assert numbers == list(range(1, 15)) and first["total"] == 14
    assert page(limit=10, offset=999)["offset"] == 10, "beyond the end is the last page"
    failed = page(outcome="failed")["trials"]
    assert [line["number"] for line in failed] == [10]
    assert failed[0]["why"] == "RuntimeError: the worker was lost"
    by_miou = page(order="segment/miou", falling=1)["trials"]
    scores = [line["values"].get("segment/miou") for line in by_miou]
    known = [score for score in scores if score is not None]
    assert known == sorted(known, reverse=True) and scores[: len(known)] == known
    found = page(words="worker%20LOST")["trials"]
    assert [line["number"] for line in found] == [10]


def test_a_trial_is_told_with_settings_metrics_error_and_pictures(ask: Client) -> None:
    trials = ask("/api/studies/platelets/trials").json["trials"]
    control, failed = trials[0]["trial"], trials[9]["trial"]
    told = ask(f"/api/studies/platelets/trials/{control}").json
    assert told["settings"]["model.patch"] == "8"
    curve = next(m for m in told["metrics"] if (m["phase"], m["metric"]) == ("segment", "miou"))
    assert curve["progress"] == [0.25, 0.5, 1.0]
    assert curve["values"][-1] == trials[0]["values"]["segment/miou"]
    assert [picture["name"] for picture in told["pictures"]] == ["reconstruction", "segmentation"]
    shown = ask(f"/api/studies/platelets/trials/{control}/segmentation.png")
    assert shown.body.startswith(b"\x89PNG") and shown.headers["content-type"] == "image/png"
    assert "worker was lost" in ask(f"/api/studies/platelets/trials/{failed}").json["error"]


def test_the_figures_are_those_of_the_report(ask: Client) -> None:
    told = ask("/api/studies/platelets/figures").json["figures"]
    assert [item["name"] for item in told] == ["best", "curves", "ratio_patch"]
    assert all(item["figure"]["data"] for item in told)
    marks = {trace["name"] for trace in told[0]["figure"]["data"]}
    assert marks == {"searched", "control", "random-init", "frozen", "best so far"}


def test_a_study_that_is_begun_grows_before_ones_eyes(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "growing", trials=4)
    with served(tmp_path) as ask:
        assert settled(ask, "growing", "interrupted")["ended"] == 4
        first = read_suggestions(folder)[3]
        with Ledger.open(folder, {"job": None}) as ledger:
            new = Suggestion(4, "abc123", "a5", 0, "search", first.config, {}, first.labels)
            ledger.suggest(new)
            wait_until(lambda: ask("/api/studies/growing").json["suggested"] == 5)
            told = ask("/api/studies/growing").json
            assert told["state"] == "running"
            assert f"process {os.getpid()}" in told["why"]
            assert [trial["trial"] for trial in told["running"]] == ["abc123"]
            ledger.finish(Result("abc123", Outcome.DIVERGED, 2.0, None, {}))
            wait_until(lambda: ask("/api/studies/growing").json["counts"]["diverged"] == 1)
        wait_until(lambda: ask("/api/studies/growing").json["state"] == "interrupted")


def test_a_lock_that_a_dead_driver_left_is_doubted(tmp_path: Path) -> None:
    """Another host's lock, as a storage may keep it: that nothing was written for long shows."""
    folder = write_study(tmp_path / "old", trials=4)
    with Ledger.open(folder, {}):
        hour_ago = time.time() - 3600
        for path in [folder.root, *folder.root.rglob("*")]:
            os.utime(path, (hour_ago, hour_ago))
        with served(tmp_path) as ask:
            told = settled(ask, "old")
    assert told["state"] == "held"
    assert "nothing for 60 minutes" in told["why"]


def test_a_damaged_study_says_what_is_damaged_and_the_others_are_shown(tmp_path: Path) -> None:
    write_study(tmp_path / "sound", trials=4)
    folder = write_study(tmp_path / "damaged", trials=4)
    part = next(folder.trials.glob("*/rows/*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with served(tmp_path) as ask:
        wait_until(lambda: ask("/api/studies/damaged").json["problem"] is not None)
        told = ask("/api/studies").json["studies"]
        assert "checksum" in told[0]["problem"] and str(tmp_path) not in told[0]["problem"]
        assert told[1]["problem"] is None
        report = ask("/report/damaged")
        assert report.status == 503 and report.body.startswith(b"There is no report of damaged: ")
        assert b"checksum" in report.body and str(tmp_path).encode() not in report.body


def test_a_study_file_of_another_kind_hides_neither_itself_nor_the_others(tmp_path: Path) -> None:
    write_study(tmp_path / "sound", trials=4)
    folder = write_study(tmp_path / "strange", trials=4)
    refreeze(folder, folder.spec.read_text(), "study: [strange\n")
    with served(tmp_path) as ask:
        wait_until(lambda: ask("/api/studies/strange").json["problem"] is not None)
        sound, strange = ask("/api/studies").json["studies"]
        assert strange["problem"].startswith("strange/study.yaml:2: not YAML")
        assert sound["problem"] is None and sound["suggested"] == 4
        report = ask("/report/strange")
        assert report.status == 503 and b"study.yaml:2: not YAML" in report.body


def test_the_report_is_built_on_demand_and_again_when_the_ledger_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_study(tmp_path / "reported", trials=4)
    render, built = app.render, []

    def counted(*arguments: Any) -> str:
        built.append(arguments)
        return render(*arguments)

    monkeypatch.setattr(app, "render", counted)
    with served(tmp_path) as ask:
        settled(ask, "reported")
        first = ask("/report/reported")
        assert first.status == 200 and b"It rests on 4 trials" in first.body
        assert ask("/report/reported").body == first.body
        assert len(built) == 1, "the second one is not made anew"
        old = read_suggestions(folder)[3]
        with Ledger.open(folder, {}) as ledger:
            ledger.suggest(Suggestion(4, "abc", "a5", 0, "search", old.config, {}, old.labels))
        wait_until(lambda: ask("/api/studies/reported").json["suggested"] == 5)
        settled(ask, "reported")
        assert b"It rests on 5 trials" in ask("/report/reported").body


# -- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "127.0.0.1@evil.example", ""],
)
def test_a_foreign_host_is_refused_whatever_it_asks(ask: Client, host: str) -> None:
    for path in ("/", "/api/studies", "/static/console.css", "/report/platelets"):
        assert ask(path, headers={"Host": host}).status == 400
    assert ask("/api/studies/platelets/stop", {}, headers={"Host": host}).status == 400


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_its_own_names_are_known_behind_any_port(ask: Client, host: str) -> None:
    assert ask("/api/studies", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/api/studies",
        "/api/studies/platelets",
        "/api/studies/platelets/trials",
        "/api/studies/platelets/figures",
        "/api/studies/platelets/log",
        "/api/studies/nothing-of-this-name",
        "/static/console.js",
    ],
)
@pytest.mark.parametrize("token", [None, "wrong", ""])
def test_without_the_token_nothing_is_told(ask: Client, path: str, token: str | None) -> None:
    refused = ask(path, token=token)
    assert refused.status == 401
    assert b"platelets" not in refused.body
    cookie = {"Cookie": "maskstudy-console=wrong"}
    assert ask(path, token=None, headers=cookie).status == 401


@pytest.mark.parametrize("path", ["/", "/study/platelets", "/report/platelets"])
def test_without_the_token_pages_ask_for_it(ask: Client, path: str) -> None:
    page = ask(path, token=None)
    assert page.status == 401
    assert b'id="token"' in page.body and b"platelets" not in page.body


def test_the_token_is_exchanged_for_a_cookie_that_no_script_reads(ask: Client) -> None:
    assert ask("/api/login", {"token": "wrong"}, token=None).status == 403
    entered = ask("/api/login", {"token": TOKEN}, token=None)
    cookie = entered.headers["set-cookie"]
    assert entered.status == 200
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    sent = {"Cookie": cookie.partition(";")[0]}
    assert ask("/api/studies", token=None, headers=sent).status == 200
    own = {**sent, "Origin": f"http://127.0.0.1:{ask.port}"}
    act = "/api/studies/platelets/stop"
    assert ask(act, {}, token=None, headers=own).status == 409, "it is not running"
    assert ask(act, {}, token=None, headers=sent).status == 403, "a browser says where it is"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"X-Maskstudy": None}, 403),
        ({"X-Maskstudy": "0"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": None}, 415),
        ({"Authorization": None}, 401),
    ],
)
@pytest.mark.parametrize("action", ["resume", "stop", "extend", "enqueue"])
def test_a_change_from_elsewhere_is_refused(
    ask: Client, storage: Path, action: str, headers: dict[str, str | None], status: int
) -> None:
    body = {"extend": {"trials": 3}, "enqueue": {"settings": {"model.patch": 4}}}.get(action, {})
    refused = ask(f"/api/studies/platelets/{action}", body, headers=headers)
    assert refused.status == status
    assert not StudyFolder(storage / "platelets").requests.exists()


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST"])
def test_other_methods_do_nothing_and_no_other_origin_is_let_in(ask: Client, method: str) -> None:
    preflight = {
        "Origin": "http://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-maskstudy",
    }
    refused = ask("/api/studies/platelets/stop", method=method, headers=preflight)
    assert 400 <= refused.status < 500
    assert not [name for name in refused.headers if name.lower().startswith("access-control")]


def test_actions_are_never_a_get(ask: Client) -> None:
    for action in ("resume", "stop", "extend", "enqueue"):
        assert ask(f"/api/studies/platelets/{action}").status == 405


def test_a_console_that_only_shows_changes_nothing(storage: Path) -> None:
    with served(storage) as ask:
        for action in ("resume", "stop", "extend", "enqueue"):
            refused = ask(f"/api/studies/platelets/{action}", {})
            assert refused.status == 403 and "--allow-changes" in refused.json["error"]


def test_bodies_are_small_json_objects(ask: Client) -> None:
    act = "/api/studies/platelets/extend"
    assert ask(act, {"trials": "x" * 70_000}).status == 413
    assert ask(act, [1]).status == 400
    assert ask(act, {}, headers={"Content-Length": "-1"}).status in (400, 413)
    for body in ({}, {"trials": "3"}, {"trials": 3, "more": 1}, {"trials": True}, {"trials": 0}):
        assert ask(act, body).status == 409


@pytest.mark.parametrize(
    "path",
    [
        "/api/studies/..",
        "/api/studies/%2e%2e",
        "/api/studies/..%2fsecret",
        "/api/studies/../../etc/passwd",
        "/api/studies/platelets/trials/..%2f..%2fsecret",
        "/api/studies/platelets/trials/../../secret",
        "/api/studies/platelets/trials/%2e%2e/x.png",
        "/api/studies/platelets/trials/71bce47f1cc4/..%2f..%2fsecret.png",
        "/api/studies/platelets/trials/71bce47f1cc4/error.png",
        "/report/..%2fsecret",
        "/static/..%2fapp.py",
        "/static/app.py",
        "/api/studies/PLATELETS",
        "/api/studies/platelets%00",
        "/api/studies/" + "x" * 5000,
        "//etc/passwd",
    ],
)
def test_no_path_leads_out_of_the_storage(ask: Client, path: str) -> None:
    found = ask(path)
    assert found.status in (400, 404, 405), found.body[:200]
    assert b"root:" not in found.body


def test_links_out_of_the_storage_are_not_followed(tmp_path: Path) -> None:
    storage, outside = tmp_path / "storage", write_study(tmp_path / "outside", trials=4)
    folder = write_study(storage / "inside", trials=4)
    (storage / "linked").symlink_to(outside.root)
    trials = [s.trial for s in read_suggestions(folder)]
    secret = tmp_path / "secret.png"
    Image.new("RGB", (3, 3)).save(secret)
    picture = folder.pictures(trials[0]) / "segmentation.png"
    picture.unlink()
    picture.symlink_to(secret)
    shutil.rmtree(folder.pictures(trials[1]))
    folder.pictures(trials[1]).symlink_to(tmp_path)
    with served(storage) as ask:
        assert [study["name"] for study in ask("/api/studies").json["studies"]] == ["inside"]
        assert ask("/api/studies").json["strange"] == 1
        assert ask("/api/studies/linked").status == 404
        settled(ask, "inside")
        api = "/api/studies/inside/trials"
        assert ask(f"{api}/{trials[0]}/segmentation.png").status == 404
        assert ask(f"{api}/{trials[1]}/secret.png").status == 404
        shutil.move(folder.suggestions, tmp_path / "moved")
        folder.suggestions.symlink_to(tmp_path / "moved")
        wait_until(lambda: ask("/api/studies/inside").json["problem"] is not None)
        assert "link" in ask("/api/studies/inside").json["problem"]


def test_pages_let_no_script_run_but_their_own(ask: Client) -> None:
    for path in ("/", "/study/platelets"):
        page = ask(path)
        rules = page.headers["content-security-policy"]
        nonce = rules.partition("'nonce-")[2].partition("'")[0]
        assert len(nonce) > 20 and nonce not in ask(path).headers["content-security-policy"]
        assert page.body.count(f'nonce="{nonce}"'.encode()) == 2
        for rule in ("default-src 'none'", "frame-ancestors 'none'", "form-action 'none'"):
            assert rule in rules
        assert "unsafe" not in rules.partition("script-src")[2].partition(";")[0]
    for path in ("/", "/api/studies", "/nowhere", "/static/console.css", "/report/platelets"):
        for token in (TOKEN, None):
            headers = ask(path, token=token).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
    rules = ask("/report/platelets").headers["content-security-policy"]
    assert "sandbox allow-scripts allow-downloads" in rules and "connect-src" not in rules


def test_hostile_names_are_data_and_pages_hold_none(ask: Client) -> None:
    told = ask("/api/studies/hostile")
    assert told.headers["content-type"] == "application/json"
    assert b"<" not in told.body and HOSTILE[1] in told.json["question"]
    for path in ("/", "/study/hostile", "/study/%3Cscript%3Ealert(1)%3C%2Fscript%3E"):
        assert b"alert(1)" not in ask(path).body


def test_an_error_of_ours_tells_nothing_and_keeps_the_headers(ask: Client) -> None:
    found = ask("/api/studies/platelets/trials/71bce47f1cc4/nothing.png")
    assert found.status == 404 and b"/" not in found.json["error"].encode()
    assert found.headers["x-content-type-options"] == "nosniff"


# -- where it may listen ------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "node7.example"])
def test_it_listens_to_others_in_token_mode_only(host: str) -> None:
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        refuse_exposed(host, {})
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        refuse_exposed(host, {"RAY_AUTH_MODE": "disabled"})
    refuse_exposed(host, {"RAY_AUTH_MODE": "token"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_it_listens_to_this_machine_always(host: str) -> None:
    refuse_exposed(host, {})


def test_rays_token_is_found_where_ray_looks(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("of-home\n")
    (tmp_path / "elsewhere").write_text("of-path")
    on = {"RAY_AUTH_MODE": "token", "HOME": str(home)}
    elsewhere = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "elsewhere")}
    assert ray_token({"HOME": str(home), "RAY_AUTH_TOKEN": "x"}) is None, "the mode is off"
    assert ray_token(on) == "of-home"
    assert ray_token(on | elsewhere) == "of-path"
    assert ray_token(on | elsewhere | {"RAY_AUTH_TOKEN": "of-env"}) == "of-env"
    with pytest.raises(UserError, match="ray get-auth-token"):
        ray_token(on | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "missing")})


def test_host_names_by_hand() -> None:
    assert host_name("Example.org:80") == "example.org"
    assert host_name("[::1]:8000") == "::1"
    assert host_name("a@b") is None and host_name("a:b") is None and host_name("a/b") is None


# -- what it changes ----------------------------------------------------------------------------


def test_extending_and_enqueueing_leave_requests_for_the_driver(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "asked", trials=4)
    with served(tmp_path, allow_changes=True) as ask:
        before = settled(ask, "asked", "interrupted")
        said = ask("/api/studies/asked/extend", {"trials": 3})
        assert said.status == 200 and "3 more trials" in said.json["said"]
        wait_until(lambda: ask("/api/studies/asked").json["total"] == before["total"] + 3)
        refused = ask("/api/studies/asked/extend", {"flops": 1e12})
        assert (
            refused.status == 409 and "is in trials; extend what ends it" in refused.json["error"]
        )
        refused = ask("/api/studies/asked/extend", {"flops": "many"})
        assert refused.status == 409 and "expected a number" in refused.json["error"]
        refused = ask("/api/studies/asked/enqueue", {"settings": {"model.pacth": 4}})
        assert refused.status == 409 and "did you mean" in refused.json["error"]
        assert ask("/api/studies/asked/enqueue", {"settings": {"model.patch": 16}}).status == 200
    assert len(list(folder.requests.iterdir())) == 2


def test_stopping_asks_the_driver_that_holds_the_study(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "asked", trials=4)
    with served(tmp_path, allow_changes=True) as ask:
        refused = ask("/api/studies/asked/stop", {})
        assert refused.status == 409 and "not running" in refused.json["error"]
        with Ledger.open(folder, {}):
            assert ask("/api/studies/asked/stop", {}).status == 200
            assert ask("/api/studies/asked/resume", {}).status == 409, "it runs already"
    assert folder.stop_request.exists()


def test_a_driver_that_cannot_go_on_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study was begun on other data than are here, and a driver of its own finds that out."""
    monkeypatch.setattr(actions, "BIRTH_SECONDS", 200.0)
    monkeypatch.setattr(actions, "FAILURE_SECONDS", 30.0)
    environment = ENVIRONMENT | {"data_fingerprint": "0" * 64}
    folder = write_study(tmp_path / "asked", trials=4, environment=environment)
    with served(tmp_path, allow_changes=True) as ask:
        refused = ask("/api/studies/asked/resume", {})
        assert refused.status == 409 and "could not go on" in refused.json["error"]
        log = ask("/api/studies/asked/log").json
    assert log["source"] == folder.console_log.name and "begun on other data" in log["lines"]


def test_two_who_resume_at_once_submit_one_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_study(tmp_path / "platelets", trials=4)
    submitted: list[str] = []

    def resubmit(address: str, study: str, **_: Any) -> tuple[str, str]:
        if submitted:
            raise Alive(f"study {study!r} is running already, as job {submitted[0]}")
        time.sleep(0.3)  # that looking and submitting take
        submitted.append("platelets-1")
        return "platelets-1", "a link"

    def resume(_: int) -> str:
        try:
            return actions.resume(drivers, folder, {})
        except Alive as error:
            return str(error)

    monkeypatch.setattr("cluster.jobs.resubmit", resubmit)
    drivers = actions.Drivers("http://127.0.0.1:8265", folder.storage)
    with ThreadPoolExecutor(2) as people:
        told = sorted(people.map(resume, range(2)))
    assert told == [
        "platelets goes on as job platelets-1",
        "study 'platelets' is running already, as job platelets-1",
    ]


def test_a_cluster_that_refuses_is_told_and_a_defect_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_study(tmp_path / "platelets", trials=4)
    drivers = actions.Drivers("http://127.0.0.1:8265", folder.storage)
    monkeypatch.setattr(drivers, "job", lambda _: {"id": "platelets-1"})

    def logs_with(error: Exception) -> None:
        def logs(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr("cluster.jobs.logs", logs)

    logs_with(ClusterError("no dashboard answers"))
    assert drivers.log(folder) == (
        "job platelets-1",
        "its log cannot be read: no dashboard answers",
    )
    logs_with(RuntimeError("ours"))
    with pytest.raises(RuntimeError, match="ours"):
        drivers.log(folder)


def test_a_cluster_that_does_not_answer_is_told_to_whoever_resumes(tmp_path: Path) -> None:
    write_study(tmp_path / "platelets", trials=4)
    with served(tmp_path, allow_changes=True, address="http://127.0.0.1:9") as ask:
        refused = ask("/api/studies/platelets/resume", {})
    assert refused.status == 409 and "no Ray dashboard answers there" in refused.json["error"]


def test_a_driver_begins_however_often_the_console_looks(tmp_path: Path) -> None:
    """Whoever asks for the lock has it for a moment, which must not look like another driver."""
    folder = write_study(tmp_path / "looked-at", trials=3)
    from study.ledger import is_held

    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            is_held(folder)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(30):
            Ledger.open(folder, {}).close()
    finally:
        ended.set()
        for looker in lookers:
            looker.join()


def test_what_is_known_of_a_trial_that_has_ended_is_not_read_again(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "settled", trials=14)
    index = Index(Storage(tmp_path))

    def look() -> int:
        found = index.look("settled")
        return found.revision if found.is_read else -1

    wait_until(lambda: look() > 0)
    before = look()
    complete = [s.trial for s in read_suggestions(folder) if s.origin.startswith("control")]
    for trial in complete:
        shutil.rmtree(folder.trial(trial))
    time.sleep(1.2)
    assert look() == before and index.look("settled").problem is None


def test_a_job_of_unknown_storage_belongs_to_the_study_that_it_has_driven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home(str(tmp_path), frozenset({"driven"}))
    assert home.has("driven", "") and home.has("driven", "/elsewhere")
    assert home.has("submitted", f"{tmp_path}/x/..")
    assert not home.has("namesake", "") and not home.has("namesake", "/elsewhere")
