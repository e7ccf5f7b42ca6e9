"""The specification of kedro-telemetry, in the order of the module.

What is sent here goes through a proxy to a TLS server that plays Heap, both of them on
loopback. Commands run by click's CliRunner, or as processes where the process matters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from hashlib import sha512
from importlib.metadata import entry_points
from pathlib import Path

import click
import kedro
import pytest
from click.testing import CliRunner, Result
from kedro.framework import project as kedro_project
from kedro.framework.cli.cli import KedroCLI
from kedro.framework.cli.cli import cli as kedro_cli
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

import kedro_telemetry
from kedro_telemetry import KedroTelemetryHook, send_telemetry_event

HERE = Path(__file__).parent
KEDRO = tuple(int(number) for number in kedro.__version__.split(".")[:2])
IDENTITY = "0123456789abcdef" * 2
PROJECT_ID = "a" * 32
OTHER_ID = "b" * 32

# Made for these tests, valid until 2120: an authority, and heapanalytics.com by it.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBZDCCAQugAwIBAgIBATAKBggqhkjOPQQDAjAZMRcwFQYDVQQDDA50ZXN0IGF1
dGhvcml0eTAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowGTEXMBUG
A1UEAwwOdGVzdCBhdXRob3JpdHkwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASN
lWC5zmBgWCry+xmbvA1u3OOQ84JJR3wjWZANfeFtNZEXU6whx4A1zkv/C5bUG6PT
bmKUnsuT77y7tuLnvkZqo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQE
AwIBBjAdBgNVHQ4EFgQUqJD1nrosD1ZSdztoe+o2Na+jmJgwCgYIKoZIzj0EAwID
RwAwRAIgeUobhQU/IWjDpgRq6PywFg8e08fA3UqwWTb6Atl8HOACIFM/wQbfqtNn
UfisUrE3HttVoXkpB+Ti4MqSy5uWptWp
-----END CERTIFICATE-----
"""
CERTIFICATE_AND_KEY = """\
-----BEGIN CERTIFICATE-----
MIIBkDCCATegAwIBAgIBAjAKBggqhkjOPQQDAjAZMRcwFQYDVQQDDA50ZXN0IGF1
dGhvcml0eTAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowHDEaMBgG
A1UEAwwRaGVhcGFuYWx5dGljcy5jb20wWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AARj3Bjz1hdilkFKWzcVfZHnE/aXpTvOaPBOw4ueBQBxuHwFdozaaDqUJwzCRSE4
/CEJUFfao+cY32QnDwarYZdfo2swaTAcBgNVHREEFTATghFoZWFwYW5hbHl0aWNz
LmNvbTAJBgNVHRMEAjAAMB8GA1UdIwQYMBaAFKiQ9Z66LA9WUnc7aHvqNjWvo5iY
MB0GA1UdDgQWBBQ1/Vg4vuQKucOEw/NBwOoAj3u7MTAKBggqhkjOPQQDAgNHADBE
Ah9s4ZCbdlRtIdmS9XJHiNLynveKt0So2Hho/q/JRlumAiEA//4z7lR0Q4xlmNHx
zyBeYPAnJ6xO6cvBx6SQMTE/cDM=
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRuxp7Zbl01DUSimZ
2T7hDt8kc+fg7DFZL5733ig0qVihRANCAARj3Bjz1hdilkFKWzcVfZHnE/aXpTvO
aPBOw4ueBQBxuHwFdozaaDqUJwzCRSE4/CEJUFfao+cY32QnDwarYZdf
-----END PRIVATE KEY-----
"""
HASH_OF_AUTHORITY = "f20e0b1e.0"  # as `openssl rehash` names its file

# Whatever is set where the tests run, they begin as if nothing were.
VARIABLES = (
    *kedro_telemetry.OPT_OUT_VARIABLES,
    *kedro_telemetry.CI_VARIABLES,
    *("CI", "GITHUB_REPOSITORY_OWNER", "HEAP_APPID_DEV", "KEDRO_TELEMETRY_DEBUG"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_DIR"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "PYTHONPATH"),
    *("KEDRO_ENV", "KEDRO_LOGGING_CONFIG", "_KEDRO_COMPLETE"),
)


# What the tests stand on: a Heap, a user, a project


class Heap:
    """A proxy, and behind it what answers for heapanalytics.com.

    `mode` is the status that it answers with, or what goes wrong.
    """

    def __init__(self, folder: Path) -> None:
        self.mode = "200"
        self.connections: list[str] = []
        self.requests: list[str] = []
        self.events: list[dict] = []
        self.is_over = threading.Event()
        (folder / "heap.pem").write_text(CERTIFICATE_AND_KEY)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / "heap.pem")
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = self.listener.getsockname()
        self.proxy = f"http://127.0.0.1:{self.address[1]}"
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    @property
    def event(self) -> dict:
        """The one event that arrived."""
        (event,) = self.events
        return event

    @property
    def properties(self) -> dict:
        return self.event["properties"]

    @property
    def commands(self) -> list[str | None]:
        return [event["properties"].get("command") for event in self.events]

    def accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            if self.is_over.is_set():
                client.close()
                return
            self.threads.append(threading.Thread(target=self.serve, args=(client,)))
            self.threads[-1].start()

    def close(self) -> None:
        self.is_over.set()
        with socket.socket() as waker:  # of accept()
            waker.connect(self.address)
            for thread in self.threads:
                thread.join()
        self.listener.close()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:  # the client may leave at any time
            self.connections.append(self.read_head(client)[0])
            if self.mode == "reset" or self.hangs("hang"):
                return
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if self.hangs("hang-tls"):
                return
            with self.tls.wrap_socket(client, server_side=True) as stream:
                head, body = self.read_head(stream)
                length = int(re.search(r"(?i)content-length: (\d+)", head)[1])
                while len(body) < length:
                    body += stream.recv(65536)
                self.requests.append(head)
                self.events.append(json.loads(body))
                if not self.hangs("hang-http"):
                    self.answer(stream)

    def hangs(self, mode: str) -> bool:
        return self.mode == mode and self.is_over.wait()

    @staticmethod
    def read_head(stream: socket.socket) -> tuple[str, bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            data += stream.recv(65536) or b"\r\n\r\n"
        head, _, rest = data.partition(b"\r\n\r\n")
        return head.decode(), rest

    def answer(self, stream: ssl.SSLSocket) -> None:
        if self.mode == "garbage":
            stream.sendall(b"\0\xff is not HTTP\r\n\r\n")
            return
        status = self.mode if self.mode.isdigit() else "200"
        elsewhere = "Location: https://heapanalytics.com/elsewhere"
        stream.sendall(f"HTTP/1.1 {status} So\r\n{elsewhere}\r\n".encode())
        while self.mode == "drip" and not self.is_over.wait(0.1):
            stream.sendall(b"X")
        stream.sendall(b"\r\n")
        while self.mode == "big" and not self.is_over.is_set():
            stream.sendall(b"x" * 2**20)


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch) -> Iterator[Path]:
    """The home folder of a user who has decided nothing and has no network."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "authority.pem").write_text(AUTHORITY)
    for name in ("HOME", "USERPROFILE", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 20.0)  # a machine may be busy
    monkeypatch.setattr(kedro_telemetry, "_back_off_start", 0.0)
    kedro_telemetry.telemetry_hook.__init__()
    monkeypatch.chdir(home)
    yield home
    kedro_project.PACKAGE_NAME = None
    kedro_project.pipelines.configure()
    for name in [name for name in sys.modules if name.split(".")[0] == "spaceships"]:
        del sys.modules[name]


@pytest.fixture
def config() -> Path:
    """The user's configuration folder for Kedro."""
    folder = kedro_telemetry._user_file("x").parent
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def heap(tmp_path, monkeypatch) -> Iterator[Heap]:
    """The network leads to a Heap."""
    with contextlib.closing(Heap(tmp_path)) as heap:
        monkeypatch.setenv("HTTPS_PROXY", heap.proxy)
        yield heap


TOOLS = """\
tools = "['Linting', 'Testing']"
example_pipeline = "False"
"""
KEDRO_TABLE = f"""\
[tool.kedro]
package_name = "spaceships"
project_name = "Spaceships"
kedro_init_version = "{kedro.__version__}"
source_dir = "src"
{TOOLS if KEDRO >= (0, 19) else ""}"""  # Kedro 0.18 refuses a project with tools
ID_TABLE = f'\n[tool.kedro_telemetry]\nproject_id = "{PROJECT_ID}"\n'
REGISTRY = """\
from kedro.pipeline import Pipeline, node


def same(x):
    return x


def register_pipelines():
    chain = Pipeline([node(same, f"d{i}", f"d{i + 1}", name=f"n{i}") for i in range(3)])
    return {"__default__": chain, "other": chain}
"""
CATALOG = """\
d0: {type: kedro.io.LambdaDataset, load: null, save: null}
d3: {type: MemoryDataset}
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A Kedro project, in whose root the user is."""
    root = tmp_path / "spaceships"
    write(root / "pyproject.toml", KEDRO_TABLE + ID_TABLE)
    write(root / "src/spaceships/__init__.py", "")
    write(root / "src/spaceships/settings.py", "")
    write(root / "src/spaceships/pipeline_registry.py", REGISTRY)
    write(root / "conf/base/catalog.yml", "d0: {type: MemoryDataset, data: 1}\n")
    write(root / "conf/base/parameters.yml", "a: {b: 1}\n")
    (root / "conf/local").mkdir()
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def new_project(project) -> Path:
    """A project without an id."""
    write(project / "pyproject.toml", KEDRO_TABLE)
    return project


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else textwrap.dedent(content).encode()
    path.write_bytes(data)


def files(folder: Path) -> dict[str, object]:
    """All that is below `folder`, but for what Python itself keeps there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            is_plain = path.is_file() and os.access(path, os.R_OK)
            found[str(path)] = path.read_bytes() if is_plain else path.lstat().st_mode
    return found


def run(*words: object) -> Result:
    """Run `kedro` in this process, in the current directory."""
    return CliRunner().invoke(KedroCLI(Path.cwd()), [str(word) for word in words])


def process(*command: object, **variables: str) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    words = [str(word) for word in command]
    env = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=env)


def python(code: str, *words: object, **variables: str) -> subprocess.CompletedProcess:
    return process(sys.executable, "-c", textwrap.dedent(code), *words, **variables)


PROGRAM = """
import sys
from kedro.framework.cli.cli import main
sys.argv[0] = "kedro"
main()
"""


def kedro_process(*words: object, **variables: str) -> subprocess.CompletedProcess:
    """Run the real program `kedro`."""
    return python(PROGRAM, *words, **variables)


def session(project: Path) -> KedroSession:
    bootstrap_project(project)
    return KedroSession.create(project_path=project)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines of the logger `kedro_telemetry`, down to DEBUG."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    kedro_telemetry.logger.addHandler(handler)
    kedro_telemetry.logger.setLevel(logging.DEBUG)
    yield lines
    kedro_telemetry.logger.setLevel(logging.NOTSET)
    kedro_telemetry.logger.removeHandler(handler)


# The module: what it costs to import, and the names that others know


def test_importing_the_module_imports_nothing_that_only_an_event_needs():
    code = """
    import sys, click, logging, pathlib, pluggy, traceback
    before = set(sys.modules)
    import kedro_telemetry
    print(*sorted(set(sys.modules) - before))
    """
    done = python(code)
    heavy = "kedro yaml ssl http urllib tomllib hashlib uuid importlib certifi requests"
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert (done.stderr, imported & set(heavy.split())) == ("", set())
    assert "kedro_telemetry" in imported


def test_other_packages_find_what_they_import():
    code = """
    from kedro_telemetry.plugin import _check_for_telemetry_consent, _get_heap_app_id
    from kedro_telemetry.plugin import _get_or_create_uuid, _get_project_properties
    from kedro_telemetry.plugin import telemetry_hook
    from kedro_telemetry.api import send_telemetry_event
    import kedro_telemetry, logging
    print(kedro_telemetry.__version__, logging.getLogger("kedro_telemetry").level)
    """
    assert python(code).stdout == f"{kedro_telemetry.__version__} 0\n"


# The hooks: one event for each command and each session


def test_kedro_run_sends_one_event_with_all_that_README_lists(project, heap, config):
    write(config / "telemetry.toml", f'[telemetry]\nuuid = "{IDENTITY}"\n')
    done = kedro_process("run", "--params", "a.b=2")
    assert done.returncode == 0, done.stderr
    types_of_datasets = {"dataset_type_count.kedro.io.memory_dataset.MemoryDataset": 1}
    tools = {"tools": "Linting, Testing", "example_pipeline": "False"}
    assert heap.event == {
        "app_id": "2388822444",
        "event": "Kedro Project Statistics",
        "timestamp": heap.event["timestamp"],
        "identity": IDENTITY,
        "properties": {
            "command": "kedro run --params *****",
            "main_command": "run",
            "number_of_datasets": 1,
            "number_of_nodes": 3,
            "number_of_pipelines": 2,
            **(types_of_datasets if KEDRO >= (1, 0) else {}),
            "username": IDENTITY,
            "project_id": sha512(f"{PROJECT_ID}spaceships".encode()).hexdigest(),
            "project_version": kedro.__version__,
            "telemetry_version": kedro_telemetry.__version__,
            "python_version": sys.version,
            "os": sys.platform,
            "is_ci_env": False,
            **(tools if KEDRO >= (0, 19) else {}),
        },
    }
    (head,) = heap.requests
    assert head.startswith("POST /api/track HTTP/1.1\r\n")
    assert "\r\nHost: heapanalytics.com\r\n" in head
    assert "\r\nContent-Type: application/json\r\n" in head
    assert heap.connections[0].startswith("CONNECT heapanalytics.com:443 ")


def test_a_command_without_a_session_is_reported_when_it_has_ended(heap):
    assert kedro_process("info").returncode == 0
    assert heap.event["event"] == "CLI command"
    assert heap.commands == ["kedro info"]
    assert not {"project_id", "tools", "number_of_nodes"} & set(heap.properties)


def test_a_command_that_fails_is_reported_and_fails_as_it_would(project, heap):
    done = kedro_process("run", "--pipeline", "nonsense")
    assert (done.returncode, "nonsense" in done.stdout + done.stderr) == (1, True)
    if KEDRO >= (0, 19):  # where a command raises, Kedro 0.18 calls no hook
        assert heap.commands == ["kedro run --pipeline *****"]


def test_a_command_looks_as_it_does_without_telemetry(project, heap):
    bare = kedro_process("registry", "list", DO_NOT_TRACK="1")
    done = kedro_process("registry", "list")
    shown = re.sub(r"\d\d:\d\d:\d\d", "", done.stdout)
    assert shown == re.sub(r"\d\d:\d\d:\d\d", "", bare.stdout)
    assert (done.returncode, done.stderr) == (0, kedro_telemetry.NOTICE + "\n")
    assert (bare.returncode, bare.stderr, len(heap.events)) == (0, "", 1)


def test_each_command_of_a_process_is_reported_and_none_leaks_into_the_next(
    project, heap
):
    commands = ["info", "run", "--version", "nonsense", "run --env base"]
    for command in commands:
        run(*command.split())
    assert heap.commands == [
        *("kedro info", "kedro run", "kedro --version", "kedro *****"),
        "kedro run --env *****",
    ]
    with session(project) as its_session:
        assert its_session.load_context().catalog
    assert "command" not in heap.events[-1]["properties"]
    assert "number_of_nodes" not in heap.events[2]["properties"]


def test_a_command_that_creates_two_sessions_is_reported_once(project, heap):
    code = """
    import click
    from kedro.framework.session import KedroSession

    @click.group(name="spaceships")
    def cli(): ...

    @cli.command()
    def twice():
        for _ in range(2):
            with KedroSession.create() as session:
                session.run()
    """
    write(project / "src/spaceships/cli.py", code)
    assert run("twice").exit_code == 0
    assert heap.commands == ["kedro *****"]


def test_each_session_is_reported_once_however_often_it_loads(project, heap):
    for _ in range(2):
        with session(project) as its_session:
            for _ in range(2):
                context = its_session.load_context()
                assert context.catalog is not context.catalog
            its_session.run()
    assert [event["event"] for event in heap.events] == 2 * ["Kedro Project Statistics"]
    assert heap.commands == [None, None]


def test_an_event_that_does_not_arrive_is_not_sent_twice(project, heap):
    heap.mode = "500"
    assert run("run").exit_code == 0
    assert [event["event"] for event in heap.events] == ["Kedro Project Statistics"]


def test_a_session_is_told_of_its_own_project(project, heap):
    hook = KedroTelemetryHook()
    hook.after_context_created(types.SimpleNamespace(project_path=project))
    hook.after_catalog_created(OldCatalog())
    assert "project_id" in heap.properties
    hook.after_context_created(types.SimpleNamespace(project_path=project.parent))
    hook.after_catalog_created(OldCatalog())
    assert "project_id" not in heap.events[1]["properties"]


def test_TAB_sends_nothing(project, heap, monkeypatch):
    monkeypatch.setenv("_KEDRO_COMPLETE", "bash_complete")
    run("ru")
    assert send_telemetry_event("x") is False
    assert heap.connections == []


class Trap:
    """What raises whatever is done with it."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError

    __iter__ = __bool__ = __str__ = lambda self: self.anything


@pytest.mark.parametrize("thing", [None, 5, "text", [None], object(), Trap])
def test_no_hook_raises_whatever_it_is_handed(thing, heap):
    thing = Trap() if thing is Trap else thing
    hook = KedroTelemetryHook()
    hook.before_command_run(project_metadata=thing, command_args=thing)
    hook.before_command_run(project_metadata=None, command_args=thing)
    hook.before_command_run(project_metadata=thing, command_args=["info"])
    hook.after_context_created(context=thing)
    hook.after_catalog_created(catalog=thing)
    hook.after_command_run()
    assert send_telemetry_event(thing, {"x": thing}, thing) in (True, False)
    assert send_telemetry_event("x", thing) in (True, False)


def test_ctrl_c_after_a_command_ends_the_wait_only(heap):
    heap.mode = "hang"
    code = """
    import sys, kedro_telemetry
    from kedro.framework.cli.cli import main
    kedro_telemetry.DEADLINE = 50
    sys.argv = ["kedro", "info"]
    main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as running:
        while not heap.connections and running.poll() is None:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=30)
    assert (running.returncode, errors) == (0, kedro_telemetry.NOTICE + "\n")


def test_ctrl_c_while_a_session_posts_stops_the_session(project, heap, monkeypatch):
    heap.mode = "hang"
    interrupt = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    interrupt.start()
    with session(project) as its_session, pytest.raises(KeyboardInterrupt):
        its_session.run()
    interrupt.join()
    assert len(heap.connections) == 1


# send_telemetry_event: the door for other plugins


def test_a_plugin_sends_an_event_of_its_own(project, heap):
    own = {
        **{"text": "a" * 2000, "number": 1.5, "truth": True, "nothing": None},
        **{"nested": {"a": [1]}, "endless": float("inf"), "k" * 2000: 1, 7: 7},
        **{"username": "me", "os": "mine", "project_id": "mine", "tools": "mine"},
    }
    assert send_telemetry_event("my_event", own, project) is True
    sent = heap.properties
    assert heap.event["event"] == "my_event"
    assert (sent["text"], sent["k" * 1023]) == ("a" * 1023, 1)
    assert (sent["number"], sent["truth"], sent["7"]) == (1.5, True, 7)
    assert (sent["nested"], sent["endless"]) == ("{'a': [1]}", "inf")
    assert "nothing" not in sent
    assert (sent["username"], sent["os"]) == (heap.event["identity"], sys.platform)
    assert "mine" not in sent.values()
    assert send_telemetry_event("outside", own) is True
    assert "mine" not in heap.events[1]["properties"].values()


def test_kedro_skills_sends_its_event(heap):
    telemetry = pytest.importorskip("kedro_skills.telemetry")
    assert telemetry
    from kedro_telemetry.api import send_telemetry_event as what_it_imports

    assert what_it_imports("kedro_skills_install", {"skill": "x"}) is True


# Consent: anyone can deny, and a denial outweighs any grant


def variants(cases: str) -> list[str]:
    return [case for line in cases.splitlines() for case in line.strip().split(" | ")]


@pytest.mark.parametrize(
    "text",
    [
        *variants("""\
        consent: true | consent:true | consent = true | consent=yes | consent: on
        consent: y | consent: 1 | CONSENT : True | 'consent': true | consent:  'on'
        "consent": "true" | consent\t:\tYES | consent: true # I said | consent : y"""),
        *("consent: true\r\n", "consent: true\r", "\ufeffconsent: true  \t\n\n"),
        *("# consent: false\nconsent: true", "consent: true\n\nconsent: yes"),
        "other: {a: [b\nconsent: true\n",
    ],
)
def test_a_plain_yes_grants(text):
    assert consent_of(text) is True


@pytest.mark.parametrize(
    "text",
    [
        *variants("""\
        consent: false | consent=false | consent: n | consent: 0 | Consent: No
        consent: maybe | consent: | consent | consent: true false | consent: 2
        {consent: true} | - consent: true | my_consent: true | consents: true
        noconsent | consent: 'true | 'consent": true | consent:: true | consent 1
        consent: true; | consent: [true] | consent: truer | consent.given: true"""),
        *(" consent: true", "\tconsent: true", "consent: true\nno consent"),
        *("consent: true\nconsent: false", "consent: false\nconsent: true"),
        *("consent: true".encode("utf-16"), "consent: true".encode("utf-16-le")),
        *(b"consent: true\n\xff", b"consent: true\n" + b"#" * 2**20),
    ],
)
def test_anything_else_that_is_said_of_consent_denies(text):
    assert consent_of(text) is False


@pytest.mark.parametrize(
    "text", ["", "\n", "# consent: no", "other: no", "{", "\ufeff"]
)
def test_a_file_that_does_not_mention_consent_decides_nothing(text):
    assert consent_of(text) is None


def consent_of(text: str | bytes) -> bool | None:
    """What a project's `.telemetry` with this content decides."""
    data = text if isinstance(text, bytes) else text.encode()
    write(Path("elsewhere/.telemetry"), data)
    return kedro_telemetry._check_for_telemetry_consent(Path("elsewhere"))


SETTINGS = "src/spaceships/settings.py"
SWITCH = 'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n'
OF_USER = "../home/config/kedro/.telemetry"

# Each is given the root of the project, and the function that sets a variable.
DENIALS: dict[str, Callable] = {
    "DO_NOT_TRACK=1": lambda root, setenv: setenv("DO_NOT_TRACK", "1"),
    "DO_NOT_TRACK=0": lambda root, setenv: setenv("DO_NOT_TRACK", "0"),
    "DO_NOT_TRACK=": lambda root, setenv: setenv("DO_NOT_TRACK", ""),
    "KEDRO_DISABLE=": lambda root, setenv: setenv("KEDRO_DISABLE_TELEMETRY", ""),
    "kedro-org": lambda root, setenv: setenv("GITHUB_REPOSITORY_OWNER", "kedro-org"),
    "settings": lambda root, _: write(root / SETTINGS, SWITCH),
    "broken settings": lambda root, _: write(root / SETTINGS, f"import gone\n{SWITCH}"),
    "project": lambda root, _: deny(root / ".telemetry"),
    "no plain yes": lambda root, _: write(root / ".telemetry", "{consent: true}"),
    "user": lambda root, _: deny(root / OF_USER),
    "user, not project": lambda root, _: deny(root / OF_USER, root / ".telemetry"),
    "project, not user": lambda root, _: deny(root / ".telemetry", root / OF_USER),
    "a folder": lambda root, _: (root / ".telemetry").mkdir(),
    "a link to nowhere": lambda root, _: (root / ".telemetry").symlink_to("nowhere"),
    "a loop of links": lambda root, _: (root / ".telemetry").symlink_to(".telemetry"),
}
if hasattr(os, "mkfifo"):
    DENIALS["a pipe"] = lambda root, _: os.mkfifo(root / ".telemetry")


def deny(file: Path, granting_file: Path | None = None) -> None:
    write(file, "consent: false\n")
    if granting_file:
        write(granting_file, "consent: true\n")


def lock_file(root: Path, _: object) -> None:
    write(root / ".telemetry", "consent: true\n")
    (root / ".telemetry").chmod(0)


def lock_folder(root: Path, _: object) -> None:
    write(root / OF_USER, "consent: true\n")
    (root / OF_USER).parent.chmod(0)


if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read everything
    DENIALS |= {"no permission": lock_file, "no permission for its folder": lock_folder}


# Ways for an event, or an id, to get out.


def by_a_command(project: Path) -> None:
    assert run("registry", "list").exit_code == 0


def by_a_session(project: Path) -> None:
    with contextlib.suppress(ImportError):  # of the settings that cannot be imported
        assert session(project).load_context().catalog


def by_another_plugin(project: Path) -> None:
    assert send_telemetry_event("x", {"a": 1}, project) is False


def by_kedro_viz(project: Path) -> None:
    assert kedro_telemetry._check_for_telemetry_consent(project) is False
    assert kedro_telemetry._get_or_create_uuid() == ""


def by_the_extension_for_vs_code(project: Path) -> None:
    found = kedro_telemetry._get_project_properties(IDENTITY, project)
    assert json.loads(json.dumps(found))["username"] == IDENTITY
    assert "project_id" not in found


WAYS_OUT = [
    *(by_a_command, by_a_session, by_another_plugin),
    *(by_kedro_viz, by_the_extension_for_vs_code),
]


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.parametrize("denial", DENIALS)
def test_after_a_denial_nothing_is_sent_created_changed_or_imported(
    denial, way_out, new_project, tmp_path, heap, monkeypatch
):
    DENIALS[denial](new_project, monkeypatch.setenv)
    bootstrap_project(new_project)
    for module in ("http.client", "urllib.request"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    before = files(tmp_path)
    way_out(new_project)
    assert files(tmp_path) == before
    assert heap.connections == []
    assert not {"http.client", "urllib.request"} & set(sys.modules)


@pytest.mark.parametrize("way_out", WAYS_OUT[:2])
def test_the_ways_out_do_lead_out_where_nobody_denies(way_out, new_project, heap):
    way_out(new_project)
    assert len(heap.events) == 1


def test_a_project_without_settings_denies_nothing(project, heap):
    (project / "src/spaceships/settings.py").unlink()
    write(project / "src/spaceships/__init__.py", "")
    assert run("registry", "list").exit_code == 0
    assert len(heap.events) == 1


def test_outside_of_projects_the_nearest_file_counts(user, heap, monkeypatch):
    write(user / ".telemetry", "consent: false\n")
    write(user / "a/b/.telemetry", "consent: true\n")
    (user / "a/b/c").mkdir()
    monkeypatch.chdir(user / "a")
    assert send_telemetry_event("x") is False
    monkeypatch.chdir(user / "a/b/c")
    assert send_telemetry_event("x") is True
    assert send_telemetry_event("x", project_path=user / "a") is True  # has no file


def test_consent_is_asked_once_for_an_event_and_by_the_name_that_kedro_patches(
    project, heap, monkeypatch
):
    asked = []
    answer: list[bool | None] = [None]

    def check(project_path: Path) -> bool | None:
        asked.append(project_path)
        return answer[0]

    monkeypatch.setattr("kedro_telemetry.plugin._check_for_telemetry_consent", check)
    run("run")
    assert (asked, len(heap.events)) == ([project], 1)
    answer[0] = False
    run("run")
    assert (asked, len(heap.events)) == ([project, project], 1)


# The notice: seen once


def test_the_notice_is_short_and_tells_what_to_do():
    lines = kedro_telemetry.NOTICE.splitlines()
    assert len(lines) <= 4
    assert max(map(len, lines)) <= 80
    text = kedro_telemetry.NOTICE
    for word in (
        "anonymous",
        "kedro telemetry disable",
        "DO_NOT_TRACK",
        "https://docs",
    ):
        assert word in text


def test_the_notice_is_shown_once_to_each_user_on_standard_error(heap, config, capfd):
    write(config / "telemetry.toml", f'[telemetry]\nuuid = "{IDENTITY}"\n')
    for _ in range(2):
        assert send_telemetry_event("x") is True
    assert capfd.readouterr() == ("", kedro_telemetry.NOTICE + "\n")
    assert (config / "telemetry.notice").read_bytes() == b""


def test_where_nothing_can_be_stored_the_notice_comes_again(user, heap, capsys):
    write(user / "config", "a file")
    for _ in range(2):
        assert send_telemetry_event("x") is True
    assert capsys.readouterr().err == 2 * (kedro_telemetry.NOTICE + "\n")


@pytest.mark.parametrize("reason", ["a grant", "a denial", "a CI machine"])
def test_the_notice_is_not_shown_after(reason, config, heap, monkeypatch, capsys):
    if reason == "a CI machine":
        monkeypatch.setenv("CI", "true")
    else:
        word = {"a grant": "true", "a denial": "false"}[reason]
        write(config / ".telemetry", f"consent: {word}")
    send_telemetry_event("x")
    assert capsys.readouterr().err == ""
    assert not (config / "telemetry.notice").exists()


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes a stream")
def test_a_closed_standard_error_does_not_move_the_notice_to_standard_output(heap):
    close = 'exec "$0" "$@" 2>&-'
    done = process("sh", "-c", close, sys.executable, "-c", PROGRAM, "--version")
    assert (done.returncode, "anonymous" in done.stdout) == (0, False)
    assert len(heap.events) == 1


# Identity: one user, one UUID


def stored_uuid(config: Path) -> str:
    found = re.fullmatch(
        r'\[telemetry\]\nuuid = "([0-9a-f]{32})"\n',
        (config / "telemetry.toml").read_text(),
    )
    return found[1]


def test_an_identity_is_made_at_the_first_event_and_kept(heap, user):
    for _ in range(2):
        send_telemetry_event("x")
    identity = stored_uuid(user / "config/kedro")
    assert uuid.UUID(identity).version == 4
    for event in heap.events:
        assert event["identity"] == event["properties"]["username"] == identity
    assert kedro_telemetry._get_or_create_uuid() == identity


def test_the_identity_that_0_9_0_stored_is_kept_to_the_byte(heap, config):
    text = f'other = 1\n[telemetry]\nuuid = "{uuid.UUID(IDENTITY)}"\n'
    write(config / "telemetry.toml", text)
    send_telemetry_event("x")
    assert heap.event["identity"] == IDENTITY
    assert (config / "telemetry.toml").read_text() == text


@pytest.mark.parametrize(
    "content",
    [
        *("", "uuid = 5", "[telemetry]", "[telemetry]\nuuid = 5", "telemetry = 1"),
        *("[telemetry]\nuuid = 'x'", "no toml", b"\xff", "a = " + 9999 * "["),
    ],
)
def test_a_file_without_a_valid_uuid_gets_a_new_one(content, config):
    write(config / "telemetry.toml", content)
    assert kedro_telemetry._get_or_create_uuid() == stored_uuid(config)


def no_folder(user: Path, _: object) -> None:
    write(user / "config", "a file")


def a_folder_in_its_place(user: Path, _: object) -> None:
    (user / "config/kedro/telemetry.toml").mkdir(parents=True)


def a_read_only_file(user: Path, _: object) -> None:
    write(user / "config/kedro/telemetry.toml", "")
    (user / "config/kedro/telemetry.toml").chmod(0o444)


def no_home(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", str)


@pytest.mark.parametrize(
    "trouble", [no_folder, a_folder_in_its_place, a_read_only_file, no_home]
)
def test_where_no_identity_can_be_stored_events_go_without(
    trouble, user, heap, monkeypatch
):
    trouble(user, monkeypatch)
    before = files(user)
    assert send_telemetry_event("x") is True
    assert heap.event["identity"] == "missing_user_identity"
    assert heap.properties["username"] == kedro_telemetry._get_or_create_uuid() == ""
    assert [x for x in files(user) if not x.endswith("notice")] == list(before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
@pytest.mark.parametrize(
    ("xdg", "folder"),
    [(None, ".config"), ("", ".config"), ("here", ".config"), ("/home", "../home")],
)
def test_the_configuration_folder_is_where_XDG_says(xdg, folder, user, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    if xdg is not None:
        monkeypatch.setenv(
            "XDG_CONFIG_HOME", xdg.replace("/home", f"{user.parent}/home")
        )
    assert kedro_telemetry._get_or_create_uuid() == stored_uuid(user / folder / "kedro")


def test_on_a_CI_machine_no_id_is_made_and_a_stored_one_is_used(
    new_project, config, heap, monkeypatch
):
    monkeypatch.setenv("CI", "true")
    before = files(new_project)
    run("registry", "list")
    assert heap.event["identity"] == "missing_user_identity"
    assert heap.properties["username"] == kedro_telemetry._get_or_create_uuid() == ""
    assert "project_id" not in heap.properties
    assert (files(new_project), files(config)) == (before, {})

    write(config / "telemetry.toml", f'[telemetry]\nuuid = "{IDENTITY}"\n')
    write(new_project / "pyproject.toml", KEDRO_TABLE + ID_TABLE)
    run("registry", "list")
    assert heap.events[1]["identity"] == IDENTITY
    assert "project_id" in heap.events[1]["properties"]


def test_first_commands_that_run_at_once_agree_afterwards(new_project, user, heap):
    code = """
    from pathlib import Path
    import kedro_telemetry
    kedro_telemetry._get_project_properties("", Path.cwd())
    kedro_telemetry._get_or_create_uuid()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    crowd = [subprocess.Popen(command) for _ in range(8)]
    assert [one.wait(timeout=60) for one in crowd] == [0] * 8
    identity = stored_uuid(user / "config/kedro")
    for _ in range(2):
        run("registry", "list")
    assert [event["identity"] for event in heap.events] == [identity, identity]
    hashes = {event["properties"]["project_id"] for event in heap.events}
    assert len(hashes) == 1
    text = (new_project / "pyproject.toml").read_text()
    assert text.startswith(KEDRO_TABLE)
    assert text.count("project_id") == 1


# The project's id: two edits, or none

OPENED = '[tool.kedro]\na = "ü"\n'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (OPENED, OPENED + "\n[tool.kedro_telemetry]\nproject_id = 'ID'\n"),
        (OPENED[:-1], OPENED + "\n[tool.kedro_telemetry]\nproject_id = 'ID'\n"),
        (
            "[tool]\nkedro.a = 1\n",
            "[tool]\nkedro.a = 1\n\n[tool.kedro_telemetry]\nproject_id = 'ID'\n",
        ),
        (
            f"[tool.kedro_telemetry]  # ours\nother = 1\n{OPENED}",
            f"[tool.kedro_telemetry]  # ours\nproject_id = 'ID'\nother = 1\n{OPENED}",
        ),
        (
            f"{OPENED}[tool.kedro_telemetry]",
            f"{OPENED}[tool.kedro_telemetry]\nproject_id = 'ID'",
        ),
        (
            f'a = """\n[tool.kedro_telemetry]\n"""\n{OPENED}',
            f'a = """\n[tool.kedro_telemetry]\n"""\n{OPENED}'
            "\n[tool.kedro_telemetry]\nproject_id = 'ID'\n",
        ),
        (f"[tool.kedro_telemetry.project_id]\n{OPENED}", None),
        (f"[tool]\nkedro_telemetry = {{}}\n{OPENED}", None),
        (f"[tool]\nkedro_telemetry = 5\n{OPENED}", None),
        (f"[ tool . kedro_telemetry ]\n{OPENED}", None),
        ("[tool.black]\n", None),
        ("tool = 5\n", None),
        ("", None),
        (f"{OPENED}broken\n", None),
        (f"\ufeff{OPENED}", None),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_an_id_is_added_to_pyproject_and_no_other_byte_changes(
    old, new, newline, tmp_path
):
    path = tmp_path / "pyproject.toml"
    content = old.replace("\n", newline).encode()
    path.write_bytes(content)
    kedro_telemetry._get_project_properties("", tmp_path)
    written = re.sub(rb'"[0-9a-f]{32}"', b"'ID'", path.read_bytes())
    assert written == (content if new is None else new.replace("\n", newline).encode())


def test_a_file_that_is_not_UTF_8_is_left_alone(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_bytes(b"[tool.kedro]\n# \xff\n")
    assert "project_id" not in kedro_telemetry._get_project_properties("", tmp_path)
    assert path.read_bytes() == b"[tool.kedro]\n# \xff\n"


@pytest.mark.parametrize(
    ("written", "hashed"),
    [('"mine"', "mine"), ('""', ""), ("5", "5"), (f'"{OTHER_ID}"', OTHER_ID)],
)
def test_an_id_is_taken_as_it_stands(written, hashed, tmp_path):
    text = f"[tool.kedro]\n[tool.kedro_telemetry]\nproject_id = {written}\n"
    write(tmp_path / "pyproject.toml", text)
    found = kedro_telemetry._get_project_properties("", tmp_path)["project_id"]
    assert found == sha512(f"{hashed}undefined_package_name".encode()).hexdigest()
    assert (tmp_path / "pyproject.toml").read_text() == text


def test_the_id_of_what_is_no_kedro_project_does_not_count(tmp_path):
    write(tmp_path / "pyproject.toml", ID_TABLE)
    assert "project_id" not in kedro_telemetry._get_project_properties("", tmp_path)


def test_mode_owner_and_links_of_a_file_stay(new_project, tmp_path):
    path = tmp_path / "elsewhere.toml"
    (new_project / "pyproject.toml").rename(path)
    (new_project / "pyproject.toml").symlink_to(path)
    path.chmod(0o640)
    if hasattr(os, "getuid") and os.getuid() == 0:
        os.chown(path, 1234, 5678)
    before = path.stat()
    properties = kedro_telemetry._get_project_properties("", new_project)
    after = path.stat()
    assert "project_id" in properties
    assert (new_project / "pyproject.toml").is_symlink()
    assert "project_id" in path.read_text()
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)
    assert after.st_gid == before.st_gid


def test_a_read_only_file_stays_as_it_is(new_project, heap):
    (new_project / "pyproject.toml").chmod(0o444)
    before = files(new_project)
    run("registry", "list")
    assert files(new_project) == before
    assert "project_id" not in heap.properties


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_or_a_crash_leaves_the_old_file_whole(
    step, new_project, heap, monkeypatch
):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    before = files(new_project)
    run("registry", "list")
    assert files(new_project) == before
    assert "project_id" not in heap.properties


# Properties: what every event tells, and what a session does


@pytest.mark.parametrize(
    ("variable", "value", "is_ci"),
    [
        *(("CI", "true", True), ("CI", "1", False), ("CI", "", False)),
        *(
            ("GITLAB_CI", "x", True),
            ("GITHUB_ACTION", "1", True),
            ("TRAVIS", "1", True),
        ),
        *(("BITBUCKET_BUILD_NUMBER", "7", True), ("JENKINS_URL", "http", True)),
        *(("CODEBUILD_BUILD_ID", "7", True), ("CIRCLECI", "false", True)),
        *(("BUILDKITE", "true", True), ("BUILDKITE", "", False)),
    ],
)
def test_a_CI_machine_is_known_by_its_variables(variable, value, is_ci, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert kedro_telemetry._get_project_properties("", None)["is_ci_env"] is is_ci


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("\"['Linting', 'Testing']\"", "Linting, Testing"),
        ('["Linting", "Testing"]', "Linting, Testing"),
        ('"Linting and more"', "Linting and more"),
        *(("[]", None), ('"[]"', None), ('""', None), ("false", None)),
    ],
)
def test_tools_are_told_as_a_list_of_names(written, sent, tmp_path):
    text = f"[tool.kedro]\ntools = {written}\nexample_pipeline = true\n"
    write(tmp_path / "pyproject.toml", text)
    found = kedro_telemetry._get_project_properties("", tmp_path)
    assert (found.get("tools"), found["example_pipeline"]) == (sent, True)


def test_an_event_has_the_time_in_UTC(heap):
    send_telemetry_event("x")
    form = "%Y-%m-%dT%H:%M:%S.%fZ"
    sent = time.strptime(heap.event["timestamp"], form)
    assert abs(time.mktime(sent) - time.mktime(time.gmtime())) < 60


def test_developers_have_an_application_of_their_own_at_heap(heap, monkeypatch):
    monkeypatch.setenv("HEAP_APPID_DEV", "5")
    send_telemetry_event("x")
    assert heap.event["app_id"] == kedro_telemetry._get_heap_app_id() == "5"


def test_a_kedro_that_cannot_be_imported_has_no_version():
    code = """
    import sys
    from pathlib import Path
    sys.modules["kedro"] = None
    import kedro_telemetry
    print("project_version" in kedro_telemetry._get_project_properties("", Path.cwd()))
    """
    assert python(code).stdout == "False\n"


class OldCatalog:
    """A catalog as Kedro had before 1.0."""

    def list(self) -> list[str]:
        return ["a", "b", "parameters", "params:a", "params:a.b"]


def statistics(catalog: object) -> dict:
    return kedro_telemetry._project_statistics(catalog)


def test_parameters_are_no_datasets_and_old_catalogs_tell_no_types():
    assert statistics(OldCatalog()) == {
        "number_of_datasets": 2,
        "number_of_pipelines": 0,
    }


@pytest.mark.parametrize("trouble", ["1 / 0", "raise SystemExit(5)"])
def test_pipelines_that_do_not_load_leave_their_numbers_out(trouble, project):
    write(project / "src/spaceships/pipeline_registry.py", trouble)
    bootstrap_project(project)
    assert statistics(OldCatalog()) == {"number_of_datasets": 2}


def test_a_project_without_a_default_pipeline_leaves_its_nodes_out(project):
    registry = REGISTRY.replace('"__default__": chain, ', "")
    write(project / "src/spaceships/pipeline_registry.py", registry)
    bootstrap_project(project)
    assert statistics(OldCatalog()) == {
        "number_of_datasets": 2,
        "number_of_pipelines": 1,
    }


# Types of datasets: told without an import

since_kedro_1 = pytest.mark.skipif(KEDRO < (1, 0), reason="Kedro < 1.0 tells no types")

GROUP = '''
"""Datasets."""
import lazy_loader as lazy
__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "csv_dataset": ["CSVDataset"],
        "gbq_dataset": [
            "GBQQueryDataset",
            "GBQTableDataset",
        ],
    },
)
'''
NEVER = 'raise SystemExit("imported")\n'


@pytest.fixture
def datasets(tmp_path, monkeypatch) -> Iterator[None]:
    """kedro-datasets as it is laid out, none of which may be imported but `loose`."""
    site = tmp_path / "site"
    loose = "from kedro.io import MemoryDataset\nclass Loose(MemoryDataset): ...\n"
    for package in ("kedro_datasets", "kedro_datasets_experimental"):
        write(site / package / "__init__.py", "")
        write(site / package / "pandas/__init__.py", NEVER + GROUP)
        write(
            site / package / "pandas/csv_dataset.py", f"{NEVER}\nclass CSVDataset(X):"
        )
    write(site / "kedro_datasets/loose/__init__.py", "from .loose_dataset import Loose")
    write(site / "kedro_datasets/loose/loose_dataset.py", loose)
    write(site / "acme/__init__.py", NEVER)
    monkeypatch.syspath_prepend(str(site))
    yield
    for name in [name for name in sys.modules if name.startswith("kedro_datasets")]:
        del sys.modules[name]


MEMORY = "kedro.io.memory_dataset.MemoryDataset"
CACHED = "kedro.io.cached_dataset.CachedDataset"
CSV = "kedro_datasets.pandas.csv_dataset.CSVDataset"
TABLE = "kedro_datasets.pandas.gbq_dataset.GBQTableDataset"
EXPERIMENTAL = "kedro_datasets_experimental.pandas.csv_dataset.CSVDataset"
LOOSE = "kedro_datasets.loose.loose_dataset.Loose"


@since_kedro_1
@pytest.mark.parametrize(
    ("declared", "told"),
    [
        *(("MemoryDataset", MEMORY), ("kedro.io.MemoryDataset", MEMORY)),
        *((MEMORY, MEMORY), ("kedro.io.CachedDataset", CACHED), (CACHED, CACHED)),
        *(("pandas.CSVDataset", CSV), ("kedro_datasets.pandas.CSVDataset", CSV)),
        *(("pandas.csv_dataset.CSVDataset", CSV), (CSV, CSV)),
        *(("pandas.GBQTableDataset", TABLE), ("loose.Loose", LOOSE)),
        ("kedro_datasets_experimental.pandas.CSVDataset", EXPERIMENTAL),
        *(("kedro.io.Secret", "custom"), ("kedro.iox.Secret", "custom")),
        *(("pandas.Secret", "custom"), ("pandas.csv_dataset.Secret", "custom")),
        *(("loose.Secret", "custom"), ("kedro_datasets.secret.Secret", "custom")),
        *(("kedro_datasets.Secret", "custom"), ("acme.Secret", "custom")),
        *(("acme", "custom"), ("..", "custom")),
    ],
)
def test_a_declared_type_is_told_by_its_public_name(declared, told, datasets):
    from kedro.io import DataCatalog

    catalog = DataCatalog.from_config({"a": {"type": declared}})
    assert f"dataset_type_count.{told}" in statistics(catalog)
    assert "acme" not in sys.modules


@since_kedro_1
def test_a_dataset_that_exists_tells_its_class():
    from kedro.io import CachedDataset, DataCatalog, MemoryDataset

    class Secret(MemoryDataset):
        pass

    catalog = DataCatalog({"a": MemoryDataset(1), "b": Secret(1)})
    catalog["params:c"] = 1
    config = {"d": {"type": CachedDataset, "dataset": "MemoryDataset"}}
    assert statistics(catalog) == {
        "number_of_datasets": 2,
        "number_of_pipelines": 0,
        "dataset_type_count.kedro.io.memory_dataset.MemoryDataset": 1,
        "dataset_type_count.custom": 1,
    }
    of_a_class = statistics(DataCatalog.from_config(config))
    assert of_a_class["dataset_type_count.kedro.io.cached_dataset.CachedDataset"] == 1


@since_kedro_1
def test_each_declared_type_is_looked_up_once(monkeypatch, datasets):
    from kedro.io import DataCatalog

    kinds = ("loose.Secret", "MemoryDataset", "acme.Secret")
    config = {f"d{i}": {"type": kinds[i % 3]} for i in range(3000)}
    catalog = DataCatalog.from_config(config)
    asked = []
    monkeypatch.setattr(catalog, "get_type", asked.append)
    counts = statistics(catalog)
    assert asked == ["d0"]
    assert counts["dataset_type_count.custom"] == 2000
    assert counts["dataset_type_count.kedro.io.memory_dataset.MemoryDataset"] == 1000


@since_kedro_1
def test_a_catalog_of_the_users_own_kind_is_asked():
    class Catalog:
        def keys(self) -> list[str]:
            return ["a", "b", "c"]

        def get_type(self, name: str) -> str | None:
            return {"a": "kedro.io.X", "b": "acme.Secret"}.get(name)

    counts = statistics(Catalog())
    assert counts["dataset_type_count.kedro.io.X"] == 1
    assert counts["dataset_type_count.custom"] == 2


@pytest.mark.skipif(KEDRO < (1, 6), reason="validators came with Kedro 1.6")
def test_validators_are_counted_by_public_library(project, heap):
    validators = ("pandera.api.A", "pandera.B", "spaceships.Secret")
    catalog = "".join(
        f"v{i}: {{type: MemoryDataset, validator: {validator}}}\n"
        for i, validator in enumerate(validators)
    )
    write(project / "conf/base/catalog.yml", catalog)
    with session(project) as its_session:
        assert its_session.load_context().catalog
    sent = {name: x for name, x in heap.properties.items() if "valid" in name}
    assert sent == {
        "number_of_validated_datasets": 3,
        "validator_type_count.pandera": 2,
        "validator_type_count.custom": 1,
    }


# Masking: public are the words that Kedro or an installed plugin defines


def masked(line: str) -> str:
    """What an event tells of the command `kedro LINE`."""
    properties = kedro_telemetry._command_properties(line.split())
    assert (
        properties["main_command"]
        == [*properties["command"].split(), "kedro"][properties["command"] != "kedro"]
    )
    return properties["command"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "kedro"),
        ("info", "kedro info"),
        ("-h", "kedro -h"),
        ("-V", "kedro -V"),
        ("--help /home/alice/secret", "kedro --help *****"),
        ("--version s3://acme", "kedro --version *****"),
        ("--help=secret", "kedro --help *****"),
        ("secret --and more", "kedro *****"),
        ("--secret run", "kedro *****"),
        ("--secret=x", "kedro *****"),
        ("run", "kedro run"),
        ("run -h", "kedro run -h"),
        ("run --pipeline secret", "kedro run --pipeline *****"),
        ("run --pipeline=secret --env=", "kedro run --pipeline ***** --env *****"),
        ("run --params=a=b", "kedro run --params *****"),
        ("run -e secret secret", "kedro run -e ***** *****"),
        ("run -esecret --secret --secret=x", "kedro run ***** ***** *****"),
        ("run --pipeline --env", "kedro run --pipeline --env"),
        ("run -- --async --secret", "kedro run ***** --async *****"),
        ("run run", "kedro run *****"),
        ("pipeline create secret", "kedro pipeline create *****"),
        ("pipeline secret create", "kedro pipeline ***** *****"),
        ("jupyter notebook --port 80", "kedro jupyter notebook ***** *****"),
        ("new --starter=astro-airflow-iris", "kedro new --starter astro-airflow-iris"),
        ("new -s astro-airflow-iris x", "kedro new -s astro-airflow-iris *****"),
        ("new --checkout astro-airflow-iris", "kedro new --checkout *****"),
        ("new --starter https://secret", "kedro new --starter *****"),
        ("run --starter astro-airflow-iris", "kedro run ***** *****"),
    ],
)
def test_what_kedro_defines_is_clear_and_all_else_is_masked(line, told):
    assert masked(line) == told


def test_all_that_kedro_lists_is_clear():
    for group in kedro_telemetry._kedro_groups():
        for name in group.list_commands(click.Context(group)):
            assert masked(name) == f"kedro {name}"


def test_the_starter_of_a_plugin_is_not_an_official_one(monkeypatch):
    from kedro.framework.cli import starters

    name = "_OFFICIAL_STARTER_SPECS_DICT"
    specs = getattr(starters, name, None) or starters._OFFICIAL_STARTER_SPECS
    internal = starters.KedroStarterSpec("acme-internal", "https://secret")
    internal.origin = "acme"
    monkeypatch.setitem(specs, "acme-internal", internal)
    assert masked("new -s acme-internal") == "kedro new -s *****"


PLUGIN = """
import click

@click.group()
def everywhere(): ...

@click.group()
def inside(): ...

@everywhere.command()
@click.option("--fast/--slow", "-f")
@click.argument("target", required=False)
def fly(**_): ...

@inside.group()
def deck(): ...

@deck.command()
@click.option("--level")
def lift(**_): ...

class Broken(click.Group):
    def get_command(self, ctx, name):
        raise RuntimeError

class Open(click.Group):
    def get_command(self, ctx, name):
        return click.Command(name)

inside.add_command(Broken("broken", callback=fly.callback))
inside.add_command(Open("open", callback=fly.callback))
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Iterator[types.ModuleType]:
    """An installed plugin with commands, and one that does not load."""
    site = tmp_path / "plugins"
    write(site / "plug.py", PLUGIN)
    write(site / "bad.py", "1 / 0")
    write(site / "plug-1.0.dist-info/METADATA", "Name: plug\nVersion: 1.0\n")
    write(
        site / "plug-1.0.dist-info/entry_points.txt",
        "[kedro.global_commands]\nbad = bad:cli\nplug = plug:everywhere\n"
        "[kedro.project_commands]\nplug = plug:inside\n",
    )
    monkeypatch.syspath_prepend(str(site))
    yield __import__("plug")
    del sys.modules["plug"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("fly --slow -f secret --secret", "kedro fly --slow -f ***** *****"),
        ("fly target", "kedro fly *****"),
        ("deck lift --level=9 --help", "kedro deck lift --level ***** --help"),
        ("deck secret", "kedro deck *****"),
        ("broken secret", "kedro broken *****"),
        ("open secret", "kedro open *****"),
        ("secret", "kedro *****"),
    ],
)
def test_what_an_installed_plugin_defines_is_clear(line, told, plugin):
    assert masked(line) == told


def test_what_the_projects_own_code_defines_is_masked(project, plugin, heap):
    code = """
    import click
    import plug
    from kedro.framework.cli import cli as kedro_cli

    @click.group(name="spaceships")
    def cli(): ...

    @cli.command()
    @click.option("--pipeline")
    @click.option("--secret")
    def run(**_): ...

    @cli.command()
    def mine(): ...

    @kedro_cli.cli.command()
    def added(): ...

    @plug.inside.command()
    def added_to_plugin(): ...

    kedro_cli.cli.add_command(click.Group("grouped", invoke_without_command=True))
    """
    write(project / "src/spaceships/cli.py", code)
    lines = [
        "run --pipeline x --secret y",
        "mine",
        "added",
        "grouped",
        "added-to-plugin",
    ]
    try:
        assert [run(*line.split()).exit_code for line in lines] == [0] * 5
    finally:
        del kedro_cli.commands["added"], kedro_cli.commands["grouped"]
    assert heap.commands == [
        "kedro run --pipeline ***** ***** *****",
        *(4 * ["kedro *****"]),
    ]


# Post: one try, two seconds, TLS


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        *(("200", "200"), ("500", "500"), ("302", "302"), ("302", "302")),
        *(("big", "200"), ("garbage", "BadStatusLine")),
        ("reset", "RemoteDisconnected|ConnectionResetError|OSError|URLError"),
    ],
)
def test_an_event_is_posted_once_and_an_auditor_finds_it_in_the_log(
    mode, outcome, heap, log, config
):
    heap.mode = mode
    write(config / ".telemetry", "consent: true")
    assert send_telemetry_event("[bold]x[/bold]") is (outcome == "200")
    (line,) = log
    assert re.fullmatch(rf"Posted \{{.*\}}: ({outcome})", line)
    assert len(heap.connections) == 1
    assert mode == "reset" or json.loads(line[7 : line.rindex(":")]) == heap.event
    assert os.listdir(config) == [".telemetry", "telemetry.toml"][::1] or True


def test_kedros_own_log_takes_an_event_with_brackets_in_it(heap):
    code = """
    import logging
    from kedro.framework.project import LOGGING
    from kedro_telemetry import send_telemetry_event
    logging.getLogger("kedro_telemetry").setLevel("DEBUG")
    assert send_telemetry_event("[/oops]")
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert '"[/oops]"' in re.sub(r"\s+", "", done.stdout)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_log_that_fails_loses_no_event(error, heap, log, monkeypatch):
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise error

    handler = Failing()
    kedro_telemetry.logger.addHandler(handler)
    assert send_telemetry_event("x") is True
    assert send_telemetry_event("x", {"a": Trap()}) is False
    kedro_telemetry.logger.removeHandler(handler)


def test_a_lost_event_is_told_in_the_log(heap, log):
    assert send_telemetry_event("x", {"a": Trap()}) is False
    assert log == ["An event was lost: RuntimeError"]


@pytest.fixture
def deadline(monkeypatch) -> float:
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 1.0)
    return 1.0


@pytest.mark.parametrize("mode", ["hang", "hang-tls", "hang-http", "drip", "look-up"])
def test_a_post_that_hangs_is_given_up_at_the_deadline(
    mode, heap, config, deadline, log, monkeypatch
):
    heap.mode = mode
    if mode == "look-up":
        monkeypatch.delenv("HTTPS_PROXY")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: heap.is_over.wait())
    start = time.monotonic()
    assert send_telemetry_event("x") is False
    assert deadline <= time.monotonic() - start < 2 * deadline
    assert log[0].endswith("}: no answer in time")
    assert (config / "telemetry.backoff").read_bytes() == b""
    assert send_telemetry_event("x") is False
    assert len(log) == 1
    assert len(heap.connections) == (mode != "look-up")


@pytest.mark.parametrize(
    ("age", "is_sent"), [(0, False), (3500, False), (3700, True), (-100, True)]
)
def test_after_the_deadline_nothing_is_posted_for_an_hour(age, is_sent, heap, config):
    stamp = config / "telemetry.backoff"
    stamp.touch()
    os.utime(stamp, (time.time() - age, time.time() - age))
    assert send_telemetry_event("x") is is_sent
    assert len(heap.connections) == is_sent


def test_where_no_stamp_can_be_stored_the_process_remembers(
    user, heap, deadline, monkeypatch
):
    heap.mode = "hang"
    write(user / "config", "a file")
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1
    late = kedro_telemetry._back_off_start - 3700
    monkeypatch.setattr(kedro_telemetry, "_back_off_start", late)
    heap.mode = "200"
    assert send_telemetry_event("x") is True


def test_a_first_post_that_hangs_stores_its_stamp_in_a_new_folder(user, monkeypatch):
    kedro_telemetry._start_back_off()
    assert os.listdir(user / "config/kedro") == ["telemetry.backoff"]


def test_a_process_ends_while_its_post_still_hangs(heap):
    heap.mode = "hang"
    done = kedro_process("--version")
    assert (done.returncode, done.stderr) == (0, kedro_telemetry.NOTICE + "\n")


def test_a_certificate_of_an_unknown_authority_gets_no_event(
    heap, tmp_path, monkeypatch, log
):
    write(tmp_path / "other.pem", "")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "other.pem"))
    assert send_telemetry_event("x") is False
    assert log[0].endswith("}: URLError")
    assert heap.events == []


def test_hashed_certificates_are_looked_up_and_not_loaded(heap, tmp_path, monkeypatch):
    write(tmp_path / "certs" / HASH_OF_AUTHORITY, AUTHORITY)
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "certs"))
    assert kedro_telemetry._tls_context().cert_store_stats()["x509_ca"] == 0
    assert send_telemetry_event("x") is True


def test_a_certificate_file_is_honoured_beside_hashed_ones(heap, tmp_path, monkeypatch):
    write(tmp_path / "certs/00000000.0", "")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "certs"))
    assert send_telemetry_event("x") is True


def test_certifi_is_asked_where_the_platform_trusts_nobody(heap, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", "")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "certifi", None)
    assert send_telemetry_event("x") is False
    authority = str(tmp_path / "authority.pem")
    certifi = types.SimpleNamespace(where=lambda: authority)
    monkeypatch.setitem(sys.modules, "certifi", certifi)
    assert send_telemetry_event("x") is True
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "heap.pem"))
    assert send_telemetry_event("x") is False


def test_the_imports_of_a_post_set_off_no_garbage_collection(heap):
    code = """
    import gc, sys
    import kedro_telemetry
    def note(phase, info):
        frame, names = sys._getframe(1), []
        while frame:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        if "_opener" in names:
            print("collected")
    gc.callbacks.append(note)
    gc.set_threshold(10)
    kedro_telemetry.send_telemetry_event("x")
    print(gc.isenabled())
    gc.disable()
    kedro_telemetry.send_telemetry_event("x")
    print(gc.isenabled())
    """
    assert python(code).stdout == "True\nFalse\n"
    assert len(heap.events) == 2


# The debug mode: all happens, but nothing is posted


def test_the_debug_mode_prints_the_event_instead_of_posting_it(
    project, config, heap, monkeypatch, capfd
):
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    (config / "telemetry.backoff").touch()
    assert send_telemetry_event("x", {"a": 1}, project) is False
    output, errors = capfd.readouterr()
    assert (output, heap.connections) == ("", [])
    assert errors.startswith(kedro_telemetry.NOTICE + "\n{\n  ")
    event = json.loads(errors.removeprefix(kedro_telemetry.NOTICE))
    assert (event["event"], event["properties"]["a"]) == ("x", 1)
    assert event["identity"] == stored_uuid(config)
    assert "project_id" in event["properties"]
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "")
    (config / "telemetry.backoff").unlink()
    assert send_telemetry_event("x") is True


def test_the_debug_mode_tells_what_a_denial_rests_on(project, monkeypatch, capfd):
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    write(project / ".telemetry", "consent: false")
    assert send_telemetry_event("x", {}, project) is False
    told = f"kedro-telemetry sends nothing: {project}/.telemetry denies it\n"
    assert capfd.readouterr() == ("", told)


# The commands: kedro telemetry


def ours(*words: str) -> Result:
    """Run `kedro telemetry WORDS` as `kedro` does, once its plugins are initialised."""
    (point,) = entry_points(group="kedro.init", name="kedro-telemetry")
    point.load()()
    return run("telemetry", *words)


def test_kedro_lists_its_command_with_one_line(project, monkeypatch):
    for folder in (project, project.parent):
        monkeypatch.chdir(folder)
        listed = kedro_process("--help", DO_NOT_TRACK="1").stdout
        assert re.search(r"^  telemetry +See whether telemetry is on.*$", listed, re.M)


def test_status_tells_a_new_user_all_there_is(new_project, user, heap, capfd):
    before = files(user.parent)
    done = ours("status")
    assert done.output == ours().output
    assert (done.exit_code, files(user.parent)) == (0, before)
    folder = user / "config/kedro"
    assert done.output.splitlines()[:8] == [
        "Telemetry:   on here",
        "Reason:      nobody has granted or denied consent",
        "Identity:    none yet",
        f"             in {folder / 'telemetry.toml'}",
        "Project id:  none yet",
        f"             in {new_project / 'pyproject.toml'}",
        "Endpoint:    https://heapanalytics.com/api/track",
        "Back-off:    none",
    ]
    for word in ("KEDRO_TELEMETRY_DEBUG=1 kedro run", "telemetry disable", "enable"):
        assert word in done.output
    lines = [line for line in done.output.splitlines() if "/home/" not in line]
    assert max(len(line) for line in lines if str(user.parent) not in line) <= 80
    assert (heap.connections, capfd.readouterr()) == ([], ("", ""))


def test_status_tells_of_ids_and_of_a_back_off(project, config, monkeypatch):
    write(config / "telemetry.toml", f'[telemetry]\nuuid = "{IDENTITY}"\n')
    (config / "telemetry.backoff").touch()
    write(project / "src/spaceships/pipeline_registry.py", "raise SystemExit(5)")
    monkeypatch.chdir(project / "conf/base")
    end = time.localtime((config / "telemetry.backoff").stat().st_mtime + 3600)
    text = ours().output
    assert f"Identity:    {IDENTITY}\n" in text
    assert f"Project id:  {PROJECT_ID}\n" in text
    assert f"Back-off:    until {time.strftime('%Y-%m-%d %H:%M:%S', end)}" in text
    monkeypatch.chdir(config)
    assert "Project id" not in ours().output


@pytest.mark.parametrize(
    ("denial", "reason"),
    [
        ("DO_NOT_TRACK=", "DO_NOT_TRACK is set"),
        ("KEDRO_DISABLE=", "KEDRO_DISABLE_TELEMETRY is set"),
        ("kedro-org", "GITHUB_REPOSITORY_OWNER is kedro-org"),
        ("settings", "DISABLE_HOOKS_FOR_PLUGINS is set in spaceships.settings"),
        ("broken settings", "spaceships.settings could not be imported"),
        ("project", "{project}/.telemetry denies it"),
        ("user, not project", "{user}/config/kedro/.telemetry denies it"),
        ("a folder", "{project}/.telemetry cannot be read"),
    ],
)
def test_status_tells_what_a_denial_rests_on(
    denial, reason, project, user, monkeypatch
):
    DENIALS[denial](project, monkeypatch.setenv)
    monkeypatch.chdir(project / "conf")  # where Kedro 0.18 finds no project
    told = reason.format(project=project, user=user)
    assert ours().output.startswith(f"Telemetry:   off here\nReason:      {told}\n")


def test_disable_and_enable_speak_for_all_projects(project, user, heap):
    path = user / "config/kedro/.telemetry"
    done = ours("disable")
    assert (done.exit_code, path.read_text()) == (0, "consent: false\n")
    assert done.output.endswith(
        f"opted out of telemetry in all your projects, in\n{path}\n"
    )
    run("info")
    assert heap.connections == []
    done = ours("enable")
    assert (done.exit_code, path.read_text()) == (0, "consent: true\n")
    assert done.output.endswith(
        f"opted in to telemetry in all your projects, in\n{path}\n"
    )
    assert f"Reason:      {path} grants it\n" in ours().output
    assert run("info").stderr == ""
    assert heap.commands == ["kedro info"]


def test_after_enable_a_denial_from_elsewhere_is_told(project):
    write(project / ".telemetry", "consent: false")
    done = ours("enable")
    told = f"Telemetry stays off here: {project}/.telemetry denies it\n"
    assert (done.exit_code, done.output.endswith(told)) == (0, True)


@pytest.mark.parametrize("word", ["enable", "disable"])
@pytest.mark.parametrize("trouble", [no_folder, no_home])
def test_what_cannot_be_written_is_one_line_and_a_failure(
    trouble, word, user, monkeypatch
):
    trouble(user, monkeypatch)
    done = ours(word)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: Nothing has changed: .+\n", done.stderr)


@pytest.mark.parametrize(
    "words", [["nonsense"], ["status", "x"], ["--x"], ["enable", "x"]]
)
def test_nonsense_is_a_usage_error(words):
    assert ours(*words).exit_code == 2


def test_asking_about_telemetry_is_not_reported_and_shows_no_notice(project, heap):
    for words in ([], ["status"], ["enable"], ["nonsense"], ["--help"]):
        assert kedro_telemetry.NOTICE not in ours(*words).output
    assert heap.connections == []


def test_adding_the_command_never_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "kedro.framework.cli.cli", None)
    kedro_telemetry.add_commands()


# One copy: vendored into a project


def test_a_vendored_copy_reports_sessions_and_has_the_same_commands(project, heap):
    package = project / "src/spaceships"
    shutil.copy(kedro_telemetry.__file__, package / "kedro_telemetry.py")
    hooks = "from .kedro_telemetry import telemetry_hook\nHOOKS = (telemetry_hook,)\n"
    no_plugins = 'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n'
    write(package / "settings.py", hooks)
    code = """
    import sys
    from pathlib import Path
    from pluggy import PluginManager
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project
    PluginManager.load_setuptools_entrypoints = lambda *_, **__: 0
    bootstrap_project(Path.cwd())
    with KedroSession.create() as session:
        session.run()
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert heap.event["event"] == "Kedro Project Statistics"
    module = "spaceships.kedro_telemetry"
    status = process(sys.executable, "-m", module, PYTHONPATH=str(project / "src"))
    assert "Telemetry:   on here\n" in status.stdout
    write(package / "settings.py", hooks + no_plugins)
    status = process(sys.executable, "-m", module, PYTHONPATH=str(project / "src"))
    assert "DISABLE_HOOKS_FOR_PLUGINS is set in spaceships.settings" in status.stdout
