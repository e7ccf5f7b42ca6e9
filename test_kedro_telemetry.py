"""The specification of kedro-telemetry, in the order of the module.

What is sent here goes through a proxy to a TLS server that plays Heap, both on
loopback. Commands run by click's CliRunner, or as processes where the process matters.

What needs README.md or the installed package is skipped where the module and this file
have been copied alone.
"""

import contextlib
import copy
import gc
import http.client
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha512
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import click
import kedro
import pytest
from click.testing import CliRunner, Result
from kedro.framework import project as kedro_project
from kedro.framework.cli import cli as kedro_cli
from kedro.framework.cli import starters
from kedro.framework.session import KedroSession
from kedro.framework.startup import ProjectMetadata, bootstrap_project
from kedro.io import CachedDataset, DataCatalog, MemoryDataset
from kedro.logging import RichHandler
from pluggy import PluginManager

import kedro_telemetry
from kedro_telemetry import send_telemetry_event

KEDRO = tuple(int(number) for number in kedro.__version__.split(".")[:2])
IDENTITY = "0123456789abcdef" * 2
PROJECT_ID = "a" * 32
OTHER_PROJECT_ID = "b" * 32
HOUR = 3600

# Made for these tests, valid until 2120: heapanalytics.com, its own authority.
HEAP_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBiTCCAS+gAwIBAgIBATAKBggqhkjOPQQDAjAcMRowGAYDVQQDDBFoZWFwYW5hbHl0aWNzLmNv
bTAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowHDEaMBgGA1UEAwwRaGVhcGFuYWx5
dGljcy5jb20wWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARozZIgd5S80FS8gxeynB9Y520cd9AZ
6oCDPaAY5lXYQTA0iJdaF+CYZnUFNRAIrmZviIqKMZFyq7IBIkS0WF+Oo2AwXjAcBgNVHREEFTAT
ghFoZWFwYW5hbHl0aWNzLmNvbTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNV
HQ4EFgQUf0D+Hf47gdrlq6OcHVjAWIlnvoUwCgYIKoZIzj0EAwIDSAAwRQIgOoiqsDwWbUBanwLQ
itMeMRLq7VT2B99aK1rxmMw8uWQCIQCO/0Cjj3ztOMgwAenZg5bALitpny6vvLV+B+HWwrOFHA==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg5LeEFEbFfKpVcJDUMWaI6KePiqAy
WOTeG51DNrIDzPihRANCAARozZIgd5S80FS8gxeynB9Y520cd9AZ6oCDPaAY5lXYQTA0iJdaF+CY
ZnUFNRAIrmZviIqKMZFyq7IBIkS0WF+O
-----END PRIVATE KEY-----
"""
HEAP_CERTIFICATE = HEAP_PEM.partition("-----BEGIN PRIVATE KEY-----")[0]
HASH_LINK = "8bd8b012.0"  # of its file, as `openssl rehash` names it

# Whatever is set where the tests run, they begin as if nothing were.
VARIABLES = (
    *kedro_telemetry.OPT_OUT_VARIABLES,
    *kedro_telemetry.CI_VARIABLES,
    "GITHUB_REPOSITORY_OWNER",
    "HEAP_APPID_DEV",
    "KEDRO_TELEMETRY_DEBUG",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "KEDRO_ENV",
    "KEDRO_LOGGING_CONFIG",
    "_KEDRO_COMPLETE",
)
HOME_VARIABLES = ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CONFIG_HOME")
MODULES_OF_TESTS = ("spaceships", "rockets", "plug", "idle", "kedro_datasets")

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such thing")
not_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root may read and write everything"
)
since_kedro_0_19 = pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 does not")
since_kedro_1 = pytest.mark.skipif(KEDRO < (1, 0), reason="no types before Kedro 1.0")


# What the tests are built on: a Heap, a user, projects


class Heap(socketserver.ThreadingTCPServer):
    """A proxy and, behind it, Heap. `mode` is its status, or what goes wrong."""

    def __init__(self, pem: Path) -> None:
        super().__init__(("127.0.0.1", 0), ConnectionToHeap)
        self.mode = "200"
        self.signal: int | None = None  # to send to this process, when it connects
        self.connections: list[str] = []
        self.proxy_headers: dict[str, str] = {}
        self.events: list[dict] = []
        self.headers: dict[str, str] = {}
        self.path = ""
        self.is_over = threading.Event()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(pem)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def commands(self) -> list[str | None]:
        """The commands of the events that have arrived, None for other events."""
        return [event["properties"].get("command") for event in self.events]

    @property
    def properties(self) -> dict:
        """The properties of the event that arrived last."""
        return self.events[-1]["properties"]

    @property
    def project_ids(self) -> set[str | None]:
        """The ids of the projects of all events that have arrived."""
        return {event["properties"].get("project_id") for event in self.events}

    def handle_error(self, *_: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # the client may leave any time
            raise error

    def hangs_if(self, mode: str) -> bool:
        return self.mode == mode and self.is_over.wait()


class ConnectionToHeap(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_CONNECT(self) -> None:
        heap = self.server
        heap.connections.append(self.path)
        heap.proxy_headers = dict(self.headers.items())
        if heap.signal is not None:
            heap.is_over.wait(0.2)  # until the main thread waits for the answer
            signal.pthread_kill(threading.main_thread().ident, heap.signal)
        if heap.mode == "slow reset":
            heap.is_over.wait(0.3)
        if heap.mode in ("reset", "slow reset") or heap.hangs_if("hang"):
            return
        self.send_response(200)
        self.end_headers()
        if heap.hangs_if("hang-tls"):
            return
        with heap.tls.wrap_socket(self.connection, server_side=True) as stream:
            if heap.mode == "close":
                return  # which ends the connection by FIN
            self.rfile = stream.makefile("rb")
            self.wfile = stream.makefile("wb", 0)
            self.handle_one_request()

    def do_POST(self) -> None:
        heap = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        heap.path = self.path
        heap.headers = dict(self.headers.items())
        heap.events.append(json.loads(body))
        if heap.mode == "garbage":
            self.wfile.write(b"\0\xff is not HTTP\r\n\r\n")
        if heap.mode == "garbage" or heap.hangs_if("hang-http"):
            return
        self.send_response(int(heap.mode) if heap.mode.isdigit() else 200)
        self.send_header("Location", "https://heapanalytics.com/elsewhere")
        self.flush_headers()
        while heap.mode == "drip" and not heap.is_over.wait(0.1):
            self.wfile.write(b"X")
        self.end_headers()
        while heap.mode == "big" and not heap.is_over.is_set():
            self.wfile.write(b"x" * 2**20)


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch) -> Iterator[Path]:
    """The home folder of a user who has decided nothing and has no network."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    write(tmp_path / "heap.pem", HEAP_PEM)
    for name in HOME_VARIABLES:
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "heap.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "no certificates"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 20.0)  # a machine may be busy
    monkeypatch.setattr(kedro_telemetry._Post, "back_off_start", 0.0)
    monkeypatch.setattr(kedro_telemetry.telemetry_hook, "_command_report", None)
    monkeypatch.chdir(home)
    yield home
    kedro_project.PACKAGE_NAME = None
    kedro_project.pipelines.configure()
    for name in list(sys.modules):
        if name.split(".")[0] in MODULES_OF_TESTS:
            del sys.modules[name]


@pytest.fixture
def config(user) -> Path:
    """The user's configuration folder for Kedro, which is not there yet."""
    if sys.platform == "win32":
        return user / "kedro/kedro"
    if sys.platform == "darwin":
        return user / "Library/Application Support/kedro"
    return user / "kedro"


@pytest.fixture
def known_user(config) -> Path:
    """The file of a user who has an identity, as 0.9.0 stored it."""
    text = f'other = 1\n[telemetry]\nuuid = "{uuid.UUID(IDENTITY)}"\n'
    return write(config / "telemetry.toml", text)


@pytest.fixture
def heap(tmp_path, monkeypatch) -> Iterator[Heap]:
    """The network leads to a Heap."""
    with Heap(tmp_path / "heap.pem") as heap:
        threading.Thread(target=heap.serve_forever, args=[0.002]).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://{heap.address}")
        yield heap
        heap.is_over.set()
        heap.shutdown()


# Kedro 0.18 refuses a project with tools.
TOOLS = """tools = "['Linting', 'Testing']"\nexample_pipeline = "False"\n"""
KEDRO_TABLE = f"""\
[tool.kedro]
package_name = "spaceships"
project_name = "Spaceships"
kedro_init_version = "{kedro.__version__}"
{TOOLS if KEDRO >= (0, 19) else ""}"""
ID_TABLE = f'\n[tool.kedro_telemetry]\nproject_id = "{PROJECT_ID}"\n'
REGISTRY = """\
from kedro.pipeline import Pipeline, node
def register_pipelines():
    chain = Pipeline([node(repr, f"d{i}", f"d{i + 1}", name=f"n{i}") for i in range(3)])
    return {"__default__": chain, "other": chain}
"""
SETTINGS = "src/spaceships/settings.py"
PIPELINES = "src/spaceships/pipeline_registry.py"
CATALOG = "conf/base/catalog.yml"


def write_project(root: Path, package: str, pyproject: str) -> Path:
    """Write a Kedro project with one dataset, three nodes and two pipelines."""
    source = root / "src" / package
    write(root / "pyproject.toml", pyproject)
    write(source / "__init__.py", "")
    write(source / "settings.py", "")
    write(source / "pipeline_registry.py", REGISTRY)
    write(root / CATALOG, "d0: {type: MemoryDataset, data: 1}\n")
    write(root / "conf/base/parameters.yml", "a: {b: 1}\n")
    (root / "conf/local").mkdir()
    return root


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A Kedro project, in whose root the user is."""
    root = write_project(
        tmp_path / "work/spaceships", "spaceships", KEDRO_TABLE + ID_TABLE
    )
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def other_project(tmp_path) -> Path:
    """A project that the user works on at the same time, in another folder."""
    pyproject = (KEDRO_TABLE + ID_TABLE).replace("spaceships", "rockets")
    pyproject = pyproject.replace(PROJECT_ID, OTHER_PROJECT_ID)
    return write_project(tmp_path / "other/rockets", "rockets", pyproject)


@pytest.fixture
def new_project(project) -> Path:
    """A project without an id."""
    write(project / "pyproject.toml", KEDRO_TABLE)
    return project


def hashed_id(project_id: str, package: str) -> str:
    """What Heap sees of a project's id."""
    return sha512(f"{project_id}{package}".encode()).hexdigest()


SPACESHIPS = hashed_id(PROJECT_ID, "spaceships")
ROCKETS = hashed_id(OTHER_PROJECT_ID, "rockets")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else textwrap.dedent(content).encode()
    path.write_bytes(data)
    return path


def files(folder: Path) -> dict[Path, int]:
    """All that is below `folder`, each with the time of its last change."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def run(line: str) -> Result:
    """Run `kedro LINE` in this process, in the current directory."""
    return CliRunner().invoke(kedro_cli.KedroCLI(Path.cwd()), line.split())


def run_python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run another Python to its end."""
    return run_process([sys.executable, *map(textwrap.dedent, words)], **variables)


def run_process(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    env = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=60, env=env
    )


def create_session(project: Path) -> KedroSession:
    bootstrap_project(project)
    return KedroSession.create(project_path=project)


def load_catalogs(project: Path) -> None:
    """Let a new session load two contexts, each of which creates two catalogs."""
    with create_session(project) as session:
        for _ in range(2):
            context = session.load_context()
            assert context.catalog is not context.catalog


def base_properties(project_path: Path | None) -> dict:
    """The properties of every event, as Kedro's extension for VS Code asks for them."""
    return kedro_telemetry._get_project_properties("", project_path)


def consent(project_path: Path | None = None) -> bool | None:
    """The consent that Kedro-Viz sees."""
    return kedro_telemetry._check_for_telemetry_consent(project_path)


def report_session(catalog: object, project: Path) -> None:
    """Let Kedro create a context and then this catalog."""
    manager = PluginManager("kedro")
    context = SimpleNamespace(_hook_manager=manager, project_path=project)
    kedro_telemetry.telemetry_hook.after_context_created(context)
    for plugin in manager.get_plugins():
        plugin.after_catalog_created(catalog)


def statistics(catalog: object, heap: Heap, project: Path) -> dict:
    """The properties of an event that reports a catalog."""
    report_session(catalog, project)
    return heap.properties


def counts(prefix: str, properties: dict) -> dict[str, int]:
    """The properties that begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): count
        for name, count in properties.items()
        if name.startswith(prefix)
    }


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    """The logger of the module, down to DEBUG."""
    # For the first project of a process, Kedro removes all handlers, also pytest's.
    if KEDRO >= (0, 19):
        kedro_project.LOGGING.set_project_logging("spaceships")
    caplog.set_level(logging.DEBUG, "kedro_telemetry")
    return caplog


# The module: what it costs to import, its names and its constants


def test_importing_the_module_by_any_name_imports_nothing_that_only_an_event_needs():
    code = """
    import sys, click, logging, pathlib, pluggy, signal, traceback
    before = set(sys.modules)
    import kedro_telemetry.api, kedro_telemetry.plugin
    print(*sorted(set(sys.modules) - before))
    """
    done = run_python("-c", code)
    imported = {name.split(".")[0] for name in done.stdout.split()}
    heavy = {
        "ast",
        "certifi",
        "hashlib",
        "http",
        "importlib",
        "kedro",
        "requests",
        "shutil",
        "ssl",
        "tomllib",
        "urllib",
        "uuid",
        "yaml",
    }
    assert (done.stderr, imported & heavy) == ("", set())
    assert "kedro_telemetry" in imported


@pytest.mark.parametrize(
    "line",
    [
        "from kedro_telemetry import __version__, send_telemetry_event",
        "from kedro_telemetry.api import send_telemetry_event",
        "from kedro_telemetry.plugin import _check_for_telemetry_consent",
        "from kedro_telemetry.plugin import _get_heap_app_id, _get_or_create_uuid",
        "from kedro_telemetry.plugin import _get_heap_app_id, _is_valid_syntax",
        "from kedro_telemetry.plugin import _get_project_properties",
        "from kedro_telemetry.plugin import ProjectMetadata",
    ],
)
def test_other_packages_find_the_names_that_they_import(line):
    done = run_python("-W", "ignore", "-c", line)
    assert (done.returncode, done.stderr) == (0, "")


def test_ProjectMetadata_is_kedros_and_no_other_name_is_made_up():
    assert kedro_telemetry.plugin.ProjectMetadata is ProjectMetadata
    with pytest.raises(AttributeError, match="has no attribute 'KedroCLI'"):
        kedro_telemetry.plugin.KedroCLI  # noqa: B018


@pytest.mark.parametrize(
    ("parsed", "is_valid"),
    [
        ({"consent": True}, True),
        ({"consent": False}, True),
        ({"consent": "yes"}, False),
        ({}, False),
        (None, False),
        ("consent: true", False),
    ],
)
def test_old_versions_of_kedro_viz_learn_whether_a_file_decides(parsed, is_valid):
    assert kedro_telemetry.plugin._is_valid_syntax(parsed) is is_valid


def installed() -> object:
    """The installed package, if it is this one."""
    try:
        found = distribution("kedro-telemetry")
    except PackageNotFoundError:
        pytest.skip("the package is not installed")
    if found.version != kedro_telemetry.__version__:
        pytest.skip("another release is installed")
    return found


def test_kedro_finds_the_hooks_where_0_9_0_has_them():
    """So that neither a leftover folder of 0.9.0 nor a vendored copy breaks them."""
    points = installed().entry_points
    assert {(point.group, point.name, point.value) for point in points} == {
        ("kedro.hooks", "kedro-telemetry", "kedro_telemetry.plugin:telemetry_hook"),
        ("kedro.cli_hooks", "kedro-telemetry", "kedro_telemetry.plugin:telemetry_hook"),
    }


def test_the_page_in_a_registry_leads_to_documentation_source_and_tracker():
    urls = installed().metadata.get_all("Project-URL")
    shown = dict(url.split(", ", 1) for url in urls)
    assert shown["Documentation"] == kedro_telemetry.DOCUMENTATION
    assert shown["Source"].startswith("https://github.com/kedro-org/kedro-plugins/")
    assert shown["Issues"] == "https://github.com/kedro-org/kedro-plugins/issues"


# The hooks: one event for each command and each session

MEMORY = "kedro.io.memory_dataset.MemoryDataset"


def test_kedro_run_sends_all_that_README_lists_once(project, heap, known_user):
    known = known_user.read_bytes()
    done = run_python("-m", "kedro", "run", "--params", "a.b=2", CI="0")
    assert done.returncode == 0, done.stderr
    properties = {
        "command": "kedro run --params *****",
        "main_command": "run",
        "number_of_datasets": 1,
        "number_of_nodes": 3,
        "number_of_pipelines": 2,
        "username": IDENTITY,
        "project_id": SPACESHIPS,
        "project_version": kedro.__version__,
        "telemetry_version": kedro_telemetry.__version__,
        "python_version": sys.version,
        "os": sys.platform,
        "is_ci_env": False,
    }
    if KEDRO >= (0, 19):
        properties["tools"] = "Linting, Testing"
        properties["example_pipeline"] = "False"
    if KEDRO >= (1, 0):
        properties[f"dataset_type_count.{MEMORY}"] = 1
    assert heap.events == [
        {
            "app_id": "2388822444",
            "event": "Kedro Project Statistics",
            "timestamp": heap.events[0]["timestamp"],
            "identity": IDENTITY,
            "properties": properties,
        }
    ], "A new property belongs here and into README's table."
    assert known_user.read_bytes() == known
    assert heap.connections == ["heapanalytics.com:443"]
    assert heap.path == "/api/track"


def test_a_command_without_a_session_looks_as_it_did(project, heap):
    bare = run_python("-m", "kedro", "info", DO_NOT_TRACK="1")
    done = run_python("-m", "kedro", "info")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert (done.returncode, done.stderr) == (0, kedro_telemetry.NOTICE + "\n")
    clock = r"\d\d:\d\d:\d\d"
    assert re.sub(clock, "", done.stdout) == re.sub(clock, "", bare.stdout)
    assert heap.commands == ["kedro info"]
    assert heap.events[0]["event"] == "CLI command"


@pytest.mark.parametrize(
    ("line", "exit_code", "main_command"),
    [
        ("info", 0, "info"),
        ("run", 0, "run"),
        ("-V", 0, "-V"),
        ("nonsense", 2, "*****"),
    ],
)
def test_a_command_is_reported_once_and_ends_as_usual(
    line, exit_code, main_command, project, heap
):
    heap.mode = "500"  # an event that Heap refuses is not sent twice
    for _ in range(2):
        assert run(line).exit_code == exit_code
    words = [event["properties"]["main_command"] for event in heap.events]
    assert words == [main_command, main_command]


@since_kedro_0_19
def test_a_command_that_raises_is_reported(project, heap):
    assert run("run --pipeline nonsense").exit_code == 1
    assert heap.commands == ["kedro run --pipeline *****"]


def test_a_session_is_reported_once_for_its_project(project, user, heap, monkeypatch):
    monkeypatch.chdir(user)
    for _ in range(2):
        load_catalogs(project)
    assert heap.commands == [None, None]
    assert heap.project_ids == {SPACESHIPS}


TWO_SESSIONS = """
import click
from kedro.framework.session import KedroSession
@click.command()
def twice():
    for _ in range(2):
        assert KedroSession.create().load_context().catalog
cli = click.Group("spaceships", [twice])
"""


def test_a_command_with_two_sessions_is_reported_once(project, heap):
    write(project / "src/spaceships/cli.py", TWO_SESSIONS)
    assert run("twice").exit_code == 0
    assert heap.commands == ["kedro *****"]
    assert heap.events[0]["event"] == "Kedro Project Statistics"


def in_threads(function: Callable, *cases: object) -> None:
    """Call a function with each case, all at once."""
    threads = [threading.Thread(target=function, args=[case]) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_sessions_in_threads_are_each_reported_once(project, heap, known_user):
    bootstrap_project(project)

    def load_catalog(_: object) -> None:
        context = KedroSession.create(project_path=project).load_context()
        assert context.catalog is not context.catalog

    in_threads(load_catalog, *range(8))
    assert heap.commands == [None] * 8


def test_a_session_that_is_used_in_threads_is_reported_once(project, heap):
    """As `kedro server start` uses one for all requests."""
    session = create_session(project)
    session.load_context().catalog  # noqa: B018

    def load_catalog(_: object) -> None:
        assert session.load_context().catalog

    in_threads(load_catalog, *range(4))
    assert len(heap.events) == 1


def interleave(*projects: Path) -> None:
    """Let sessions of several projects take turns in all that they do."""
    sessions = [create_session(project) for project in projects]
    contexts = [session.load_context() for session in sessions]
    for _ in range(2):
        for context in contexts:
            assert context.catalog


def test_interleaved_sessions_are_each_reported_for_their_own_project(
    project, other_project, heap
):
    datasets = "a: {type: MemoryDataset}\nb: {type: MemoryDataset}\n"
    write(other_project / CATALOG, datasets)
    interleave(project, other_project)
    sent = [
        (event["properties"]["project_id"], event["properties"]["number_of_datasets"])
        for event in heap.events
    ]
    assert sent == [(SPACESHIPS, 1), (ROCKETS, 2)]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".telemetry", "consent: false\n"),
        ("src/rockets/settings.py", "KEDRO_DISABLE_TELEMETRY = True\n"),
        (
            "src/rockets/settings.py",
            'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n',
        ),
    ],
)
def test_of_interleaved_sessions_one_that_opted_out_is_not_reported(
    file, text, is_first, project, other_project, heap
):
    write(other_project / file, text)
    projects = [other_project, project] if is_first else [project, other_project]
    interleave(*projects)
    assert heap.project_ids == {SPACESHIPS}
    assert len(heap.events) == 1


def test_a_session_of_a_command_counts_for_the_commands_project(project, heap):
    """kedro-auto-catalog gives Kedro a package's name where it takes a path."""
    wrong = "create(project_path='spaceships', conf_source='conf')"
    code = TWO_SESSIONS.replace("create()", wrong)
    write(project / "src/spaceships/cli.py", code)
    assert run("twice").exit_code == 0
    assert heap.project_ids == {SPACESHIPS}


@posix
@since_kedro_0_19
def test_a_command_in_a_linked_folder_is_reported_once(project, tmp_path, heap):
    (tmp_path / "link").symlink_to(project)
    cli = kedro_cli.KedroCLI(tmp_path / "link")
    assert CliRunner().invoke(cli, ["run"]).exit_code == 0
    assert heap.commands == ["kedro run"]


def test_a_command_outside_of_projects_may_open_a_session_of_one(
    project, user, heap, monkeypatch
):
    monkeypatch.chdir(user)
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(project_metadata=None, command_args=["info"])
    load_catalogs(project)
    hook.after_command_run()
    assert heap.commands == ["kedro info"]
    assert heap.project_ids == {SPACESHIPS}


OTHER_SESSION = """
import click
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
@click.command()
@click.argument("path")
def other(path):
    bootstrap_project(path)
    assert KedroSession.create(project_path=path).load_context().catalog
cli = click.Group("spaceships", [other])
"""


@pytest.mark.parametrize("text", ["", "consent: false\n"], ids=["asked", "opted out"])
def test_a_session_of_another_project_is_not_taken_for_the_commands(
    text, project, other_project, heap
):
    write(project / "src/spaceships/cli.py", OTHER_SESSION)
    write(other_project / ".telemetry", text)
    assert run(f"other {other_project}").exit_code == 0
    sent = [
        (event["event"], event["properties"]["project_id"]) for event in heap.events
    ]
    expected = [("CLI command", SPACESHIPS)]
    if not text:
        expected.insert(0, ("Kedro Project Statistics", ROCKETS))
    assert sent == expected
    assert heap.commands[-1] == "kedro *****"


def test_a_command_that_kedro_never_ended_is_not_taken_for_another_projects(
    project, other_project, heap
):
    kedro_cli.KedroCLI(project).main(["info"], standalone_mode=False)
    load_catalogs(other_project)
    assert heap.commands == [None]
    assert heap.project_ids == {ROCKETS}


@pytest.mark.parametrize("line", ["telemetry", "info"])
def test_a_command_that_kedro_never_ended_is_over_with_the_next(line, project, heap):
    kedro_cli.KedroCLI(project).main(["info"], standalone_mode=False)
    assert run(line).exit_code == 0
    load_catalogs(project)
    assert heap.commands[-1] is None


def test_pipelines_of_another_project_are_not_counted(project, other_project, heap):
    session = create_session(project)
    context = session.load_context()
    bootstrap_project(other_project)
    assert len(kedro_project.pipelines) == 2
    assert context.catalog
    assert heap.project_ids == {SPACESHIPS}
    assert not {"number_of_pipelines", "number_of_nodes"} & set(heap.properties)


@since_kedro_0_19
def test_a_session_is_copied_as_without_telemetry(project, heap):
    context = create_session(project).load_context()
    copied = copy.deepcopy(context._hook_manager)
    assert copied.has_plugin("kedro-telemetry-session")


def test_where_a_variable_opts_out_nothing_is_registered(project, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    context = create_session(project).load_context()
    assert not context._hook_manager.has_plugin("kedro-telemetry-session")


@pytest.mark.parametrize(
    "end", ["", "        raise KeyError\n"], ids=["adds a dataset", "raises, too"]
)
def test_a_catalog_is_reported_as_kedro_made_it(end, project, heap):
    settings = f"""\
from kedro.framework.hooks import hook_impl
from kedro.io import MemoryDataset
class AddDataset:
    @hook_impl
    def after_catalog_created(self, catalog):
        if hasattr(catalog, "add"):
            catalog.add("added", MemoryDataset(1))
        else:
            catalog["added"] = MemoryDataset(1)
{end}HOOKS = (AddDataset(),)
"""
    write(project / SETTINGS, settings)
    with contextlib.suppress(KeyError):
        create_session(project).load_context().catalog  # noqa: B018
    assert heap.properties["number_of_datasets"] == 1


def test_a_session_that_is_over_is_freed(project, heap):
    session = create_session(project)
    assert session.load_context().catalog
    seen = weakref.ref(session)
    del session
    gc.collect()
    assert seen() is None


class Trap:
    """What raises whatever is done with it."""

    def spring(self, *_: object) -> object:
        raise RuntimeError

    __getattr__ = __str__ = __bool__ = spring


@pytest.mark.parametrize("thing", [None, 5, [None], Trap()], ids=lambda x: str(type(x)))
def test_no_hook_raises_whatever_it_is_given(thing, heap):
    hook = kedro_telemetry.KedroTelemetryHook()
    hook.before_command_run(project_metadata=thing, command_args=thing)
    hook.before_command_run(project_metadata=None, command_args=thing)
    hook.before_command_run(project_metadata=thing, command_args=["info"])
    hook.after_context_created(context=thing)
    hook.after_context_created(context=SimpleNamespace(_hook_manager=thing))
    hook.after_command_run()
    assert send_telemetry_event(thing, {"x": thing}, thing) in (True, False)
    assert send_telemetry_event("x", thing) in (True, False)


def broken_catalog() -> Mock:
    return Mock(spec=["get_type"], get_type=Mock(side_effect=RuntimeError))


@pytest.mark.parametrize(
    "catalog", [5, Trap(), broken_catalog()], ids=["number", "trap", "broken"]
)
def test_a_catalog_that_cannot_be_read_costs_its_numbers_only(
    catalog, project, heap, log
):
    bootstrap_project(project)
    sent = statistics(catalog, heap, project)
    assert sent["project_id"] == SPACESHIPS
    assert "number_of_datasets" not in sent
    assert any("Counting the datasets failed" in line for line in log.messages)


def test_a_kedro_without_its_private_flag_costs_the_numbers_of_pipelines(
    project, heap, log, monkeypatch
):
    bootstrap_project(project)
    renamed = SimpleNamespace(_content={}, is_data_loaded=True)
    with monkeypatch.context() as patch:
        patch.setattr(kedro_project, "pipelines", renamed)
        sent = statistics(SimpleNamespace(list=lambda: ["a"]), heap, project)
    assert sent["number_of_datasets"] == 1
    assert "number_of_pipelines" not in sent
    assert "Counting the pipelines failed: AttributeError" in log.messages


def test_a_kedro_without_hook_managers_costs_the_numbers_of_a_session(
    project, heap, log
):
    context = SimpleNamespace(project_path=project)
    kedro_telemetry.telemetry_hook.after_context_created(context=context)
    assert heap.events[0]["event"] == "Kedro Project Statistics"
    assert "number_of_datasets" not in heap.properties
    assert log.messages[0] == "The session has no hook manager"


@pytest.mark.parametrize(
    ("name", "value", "is_sent"),
    [
        ("_KEDRO_COMPLETE", "bash_complete", False),
        ("_KD_COMPLETE", "zsh_source", False),
        ("_MY_KEDRO_2_COMPLETE", "fish_complete", False),
        ("_KEDRO_COMPLETE", "", True),
        ("IS_COMPLETE", "1", True),
        ("_KEDRO_COMPLETED", "1", True),
    ],
)
def test_TAB_in_a_shell_sends_nothing(name, value, is_sent, heap, monkeypatch):
    """click names the variable after the program, which people rename."""
    monkeypatch.setenv(name, value)
    assert send_telemetry_event("x") is is_sent
    assert bool(heap.connections) is is_sent


# send_telemetry_event: for other plugins


def test_a_plugin_sends_an_event_of_its_own(project, heap):
    own = {
        "text": "a" * 2000,
        "number": 1.5,
        "large": 1e308,
        "too large": 10**309,
        "too large for a text": 10**10_000,
        "truth": True,
        "nothing": None,
        "nested": {"a": [1]},
        "endless": float("inf"),
        "not a number": float("nan"),
        "trap": Trap(),
        "k" * 2000: 1,
        7: 7,
        "username": "mine",
        "os": "mine",
        "project_id": "mine",
        "tools": "mine",
    }
    assert send_telemetry_event("e" * 2000, own, project) is True
    assert heap.events[0]["event"] == "e" * 1023
    sent = dict(heap.properties)
    added = {name: sent.pop(name) for name in base_properties(project)}
    assert sent == {
        "text": "a" * 1023,
        "number": 1.5,
        "large": 1e308,
        "too large": "1" + "0" * 309,
        "truth": True,
        "nested": "{'a': [1]}",
        "endless": "inf",
        "not a number": "nan",
        "k" * 1023: 1,
        "7": 7,
    }
    assert added["username"] == heap.events[0]["identity"]
    assert "mine" not in added.values()


def test_an_event_outside_of_projects_has_no_properties_of_one(heap):
    assert send_telemetry_event("outside", {"project_id": "x", "tools": "x"}) is True
    assert not {"project_id", "tools", "example_pipeline"} & set(heap.properties)


@posix
def test_pyproject_is_read_once_for_an_event(project, heap, monkeypatch):
    reads = []
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        reads.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    run("run")
    assert len(heap.events) == 1
    assert reads.count("pyproject.toml") == 1


# Consent: anyone can deny, and a denial outweighs any grant

GRANTS = [
    "consent: true",
    "consent:true",
    "consent = true",
    "consent=yes",
    "consent: on",
    "consent: y",
    "consent: 1",
    "CONSENT : True",
    "'consent': true",
    "consent:  'on'",
    '"consent": "true"',
    "consent\t:\tYES",
    "consent: true # I said",
    "consent: true\t#",
    "  consent: true",
    "\tconsent: true",
    "consent: true\r\n",
    "consent: true\r",
    "\ufeffconsent: true  \t\n\n",
    "# consent: false\nconsent: true",
    "  # consent: false\n  consent: true",
    "consent: true\n  \nconsent: yes\n",
]
SAY_NOTHING = ["", "\n", " \t\r\n", "# consent: no", "  # consent: no", "#", "\ufeff"]
NO_GRANTS = [
    "consent: false",
    "consent=false",
    "consent: n",
    "consent: 0",
    "Consent: No",
    "consent:",
    "consent",
    "consent: true false",
    "consent: true#no",
    "consent: tru\u0435",
    "con\u017fent: true",
    "{consent: true}",
    "- consent: true",
    "my_consent: true",
    "consent: 'true",
    "'consent\": true",
    "consent:: true",
    "consent 1",
    "consent: true;",
    "consent.given: true",
    "telemetry:\n  consent: true",
    "consent: true\nother: 1",
    "no",
    "---\nconsent: true",
    "{issue: TEAM#12, consent: false}",
    "KEDRO_DISABLE_TELEMETRY=1\nDO_NOT_TRACK=1\n",
    "<<<<<<< HEAD\nconsent: true\n=======\nconsent: false\n>>>>>>> other\n",
    "consent: true\nconsent: false",
    "consent: false\nconsent: true",
    "consent: true".encode("utf-16"),
    b"consent: true\n\xff",
    b"consent: true\n#" + b"#" * 2**20,
]


@pytest.mark.parametrize("text", GRANTS)
def test_a_file_that_plainly_says_so_grants_consent(text, user):
    write(user / ".telemetry", text.encode())
    assert consent() is True


@pytest.mark.parametrize("text", NO_GRANTS)
def test_a_file_that_says_anything_else_denies_consent(text, user):
    data = text if isinstance(text, bytes) else text.encode()
    write(user / ".telemetry", data)
    assert consent() is False


@pytest.mark.parametrize("text", SAY_NOTHING)
def test_a_file_that_says_nothing_decides_nothing(text, user):
    write(user / ".telemetry", text.encode())
    assert consent() is None


def test_a_file_of_the_largest_size_is_read(user):
    write(user / ".telemetry", b"consent: true\n".ljust(2**20, b"\n"))
    assert consent() is True


YES = "consent: true\n"
NO = "consent: false\n"


class Denial(NamedTuple):
    """What a user does to opt out, with the reason that they are shown.

    The files are written as a whole. In paths and reasons, {project} is the root of the
    project, in whose folder `notebooks` the user is, and {config} the configuration
    folder.
    """

    reason: str
    variables: Mapping[str, str] = MappingProxyType({})
    files: Mapping[str, str] = MappingProxyType({})


SETTINGS_FILE = "{project}/" + SETTINGS


def denial_in_settings(text: str, name: str) -> Denial:
    return Denial(
        f"this file names {name}:\n{SETTINGS_FILE}", files={SETTINGS_FILE: text}
    )


def denial_in_file(path: str) -> Denial:
    return Denial(f"this file denies consent:\n{path}", files={path: NO})


# The ways to opt out in README's table, by the code that it shows
README_DENIALS = {
    "DO_NOT_TRACK": Denial("DO_NOT_TRACK is set", {"DO_NOT_TRACK": "1"}),
    "KEDRO_DISABLE_TELEMETRY": Denial(
        "KEDRO_DISABLE_TELEMETRY is set", {"KEDRO_DISABLE_TELEMETRY": "1"}
    ),
    "kedro telemetry disable": denial_in_file("{config}/.telemetry"),
    "kedro new --telemetry=no": denial_in_file("{project}/.telemetry"),
    "consent: false": denial_in_file("{project}/notebooks/.telemetry"),
    'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)': denial_in_settings(
        'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n',
        "DISABLE_HOOKS_FOR_PLUGINS",
    ),
    "KEDRO_DISABLE_TELEMETRY = True": denial_in_settings(
        "KEDRO_DISABLE_TELEMETRY = True\n", "KEDRO_DISABLE_TELEMETRY"
    ),
}
DENIALS = README_DENIALS | {
    "a variable that is 0": Denial("DO_NOT_TRACK is set", {"DO_NOT_TRACK": "0"}),
    "an empty variable": Denial(
        "KEDRO_DISABLE_TELEMETRY is set", {"KEDRO_DISABLE_TELEMETRY": ""}
    ),
    "Kedro's own CI": Denial(
        "GITHUB_REPOSITORY_OWNER is kedro-org",
        {"GITHUB_REPOSITORY_OWNER": "kedro-org"},
    ),
    "the user, and not the project": Denial(
        "this file denies consent:\n{config}/.telemetry",
        files={"{config}/.telemetry": NO, "{project}/.telemetry": YES},
    ),
    "the project, and not the user": Denial(
        "this file denies consent:\n{project}/.telemetry",
        files={"{project}/.telemetry": NO, "{config}/.telemetry": YES},
    ),
    "a variable's name in settings, to any value": denial_in_settings(
        "DO_NOT_TRACK = False\n", "DO_NOT_TRACK"
    ),
    "settings that Kedro cannot import": denial_in_settings(
        "KEDRO_DISABLE_TELEMETRY = True\nimport gone\n", "KEDRO_DISABLE_TELEMETRY"
    ),
}


class Denied(NamedTuple):
    """A project in which somebody has opted out, and why."""

    project: Path
    reason: str


@pytest.fixture(params=DENIALS)
def denied(request, new_project, config, monkeypatch) -> Denied:
    """A project without an id, after each way to opt out."""
    denial = DENIALS[request.param]
    places = {"project": new_project, "config": config}
    for name, value in denial.variables.items():
        monkeypatch.setenv(name, value)
    for path, text in denial.files.items():
        write(Path(path.format(**places)), text)
    here = new_project / "notebooks"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    return Denied(new_project, denial.reason.format(**places))


def by_a_command(project: Path) -> None:
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(bootstrap_project(project), ["registry", "list"])
    hook.after_command_run()


def by_a_session(project: Path) -> None:
    with contextlib.suppress(ImportError):  # of settings that Kedro refuses
        load_catalogs(project)


# These three load no project.


def by_another_plugin(project: Path) -> None:
    assert send_telemetry_event("x", {"a": 1}, project) is False


def by_kedro_viz(project: Path) -> None:
    assert consent(project) is False


def by_the_extension_for_vs_code(project: Path) -> None:
    found = json.loads(json.dumps(base_properties(project)))
    assert "os" in found
    assert "project_id" not in found


@pytest.mark.parametrize(
    "way_out",
    [
        by_a_command,
        by_a_session,
        by_another_plugin,
        by_kedro_viz,
        by_the_extension_for_vs_code,
    ],
)
def test_after_a_denial_nothing_is_sent_created_changed_or_imported(
    way_out, denied, tmp_path, heap, monkeypatch
):
    for module in ("http.client", "urllib.request"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    before = files(tmp_path)
    way_out(denied.project)
    assert files(tmp_path) == before
    assert heap.connections == []
    assert not {"http.client", "urllib.request"} & set(sys.modules)


def test_after_a_denial_the_debug_mode_prints_the_reason(denied, monkeypatch, capfd):
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x", {}, denied.project) is False
    shown = f"kedro-telemetry sends nothing: {denied.reason}\n"
    assert capfd.readouterr() == ("", shown)


def test_after_a_denial_there_is_no_identity(monkeypatch, user):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    assert kedro_telemetry._get_or_create_uuid() == ""
    assert files(user) == {}


def test_after_a_denial_by_a_variable_no_file_is_looked_at(project, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    monkeypatch.setattr(kedro_telemetry, "_read", Mock(side_effect=AssertionError))
    assert consent(project) is False


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, ""),
        ({"GITHUB_REPOSITORY_OWNER": "acme"}, ""),
        ({}, 'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-viz", "telemetry")\n'),
        ({}, "DISABLE_HOOKS_FOR_PLUGINS = ()\n"),
    ],
    ids=["nothing", "GitHub Actions", "other plugins", "no plugin"],
)
def test_where_nobody_denies_all_is_sent(variables, text, project, heap, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write(project / SETTINGS, text)
    run("registry list")
    load_catalogs(project)
    assert heap.commands == ["kedro registry list", None]


def a_folder(path: Path) -> None:
    path.mkdir()


def a_dangling_symlink(path: Path) -> None:
    path.symlink_to("gone")


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_file_without_permission(path: Path) -> None:
    write(path, YES).chmod(0)


UNREADABLE = [
    a_folder,
    pytest.param(a_dangling_symlink, marks=posix),
    pytest.param(a_loop, marks=posix),
    pytest.param(a_pipe, marks=posix),
    pytest.param(a_file_without_permission, marks=not_root),
]


@pytest.mark.parametrize("make", UNREADABLE)
def test_what_cannot_be_read_denies_consent(make, config, heap, monkeypatch, capfd):
    config.mkdir(parents=True)
    make(config / ".telemetry")
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x") is False
    shown = f"this file cannot be read:\n{config / '.telemetry'}\n"
    assert capfd.readouterr().err.endswith(shown)


@pytest.mark.parametrize("file", ["pyproject.toml", SETTINGS])
@pytest.mark.parametrize("make", UNREADABLE)
def test_a_project_that_cannot_be_read_denies_consent(make, file, project, heap):
    (project / file).unlink()
    make(project / file)
    assert send_telemetry_event("x", {}, project) is False
    assert heap.connections == []


@pytest.mark.parametrize(
    ("place", "decision"),
    [
        ("home/.telemetry", None),
        ("work/.telemetry", None),
        (".telemetry", None),
        ("work/spaceships/conf/.telemetry", False),
        ("work/spaceships/.telemetry", False),
        ("home/kedro/.telemetry", False),
        ("work/spaceships/src/.telemetry", None),
    ],
)
def test_a_file_counts_in_three_places_and_in_no_folder_above(
    place, decision, project, tmp_path, monkeypatch
):
    monkeypatch.chdir(project / "conf")
    write(tmp_path / place, NO)
    assert consent(project) is decision


def test_each_place_is_looked_at_once(project, config, heap, monkeypatch):
    looks = []
    lstat = os.lstat

    def look(path: Path) -> os.stat_result:
        looks.append(path)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", look)
    assert send_telemetry_event("x", {}, project) is True
    looked_for = [Path(path) for path in looks if Path(path).name == ".telemetry"]
    assert looked_for == [config / ".telemetry", project / ".telemetry"]


@posix
def test_a_deleted_current_directory_denies_nothing(user, heap, monkeypatch):
    (user / "gone").mkdir()
    monkeypatch.chdir(user / "gone")
    (user / "gone").rmdir()
    assert kedro_telemetry._get_or_create_uuid() != ""
    assert send_telemetry_event("x") is True


def test_kedros_tests_can_replace_the_question_for_consent(project, heap, monkeypatch):
    check = Mock(return_value=None)
    monkeypatch.setattr("kedro_telemetry.plugin._check_for_telemetry_consent", check)
    run("run")
    check.assert_called_once_with(project)
    assert len(heap.events) == 1
    check.return_value = False
    run("run")
    assert (check.call_count, len(heap.events)) == (2, 1)


# Settings: names that Kedro has imported, or else the source, which is not run

IN_ANY_SETTINGS = [
    ("", None),
    ("# DO_NOT_TRACK, KEDRO_DISABLE_TELEMETRY\n", None),
    ("MY_DO_NOT_TRACK_SWITCH = 1", None),
    ("DO_NOT_TRACK = None", False),
    ("class KEDRO_DISABLE_TELEMETRY: ...", False),
    ("def DO_NOT_TRACK(): ...", False),
    ("import os as DO_NOT_TRACK", False),
    ("globals()['KEDRO_DISABLE_TELEMETRY'] = 1", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = ()", None),
    ("DISABLE_HOOKS_FOR_PLUGINS = ('kedro-viz', 'kedro-telemetry-extras')", None),
    ("DISABLE_HOOKS_FOR_PLUGINS = ('telemetry', 'my-kedro-telemetry')", None),
    ("DISABLE_HOOKS_FOR_PLUGINS = ('kedro-telemetry',)", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = 'kedro-viz'", None),
    ("DISABLE_HOOKS_FOR_PLUGINS = 'kedro-telemetry'", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = 'kedro-viz, kedro-telemetry'", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = 'kedro-viz kedro_telemetry'.split()", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = ['kedro-viz', 'Kedro_Telemetry']", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = {'kedro.telemetry'}", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = frozenset(['kedro--telemetry'])", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = (x for x in ['kedro-telemetry'])", False),
    ("NAME = 'kedro-telemetry'\nDISABLE_HOOKS_FOR_PLUGINS = (NAME,)", False),
]
IN_IMPORTED_SETTINGS = [
    ("DISABLE_HOOKS_FOR_PLUGINS = (x for x in ())", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = None", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = [5]", False),
    ("DISABLE_HOOKS_FOR_PLUGINS = ('kedro-' + 'telemetry',)", False),
    ("import os\nos.environ.pop('DO_NOT_TRACK', None)", None),
]
IN_SOURCE = [
    ("import gone", None),
    ("raise SystemExit", None),
    ("PATTERN = '\\d'", None),
    ("PATTERN = '\\\\d'", None),
    ("PATTERN = r'\\'DO_NOT_TRACK'", False),
    ("PATTERN = '\\\\'; DO_NOT_TRACK = 1", False),
    ("X = 1 + \\\n    2", None),
    ("X = 1 + \\\r\n    2", None),
    ("from .kedro_telemetry import x\nDISABLE_HOOKS_FOR_PLUGINS = ()", None),
    ("DISABLE = 'kedro-telemetry'", None),
    ("import os\nos.environ['DO_NOT_TRACK'] = '1'", False),
    ("import os\nos.environ.setdefault('DO_NOT_TRACK', '')", False),
    ("import os\nos.environ.update(DO_NOT_TRACK='1')", False),
    ("import gone\ngone.DO_NOT_TRACK = True", False),
    ("exec('KEDRO_DISABLE_TELEMETRY = True')", False),
    ("X = f'{1}DO_NOT_TRACK=1'", False),
    ("'''To opt out, set DO_NOT_TRACK.'''", False),
    ("def f(): global DO_NOT_TRACK", False),
    ("if False:\n    DO_NOT_TRACK = True", False),
    ("from gone import DO_NOT_TRACK", False),
    ("from gone import OFF as KEDRO_DISABLE_TELEMETRY", False),
    ("from gone import DO_NOT_TRACK as _", False),
    ("from gone import DISABLE_HOOKS_FOR_PLUGINS", False),
    ("from gone import OFF as DISABLE_HOOKS_FOR_PLUGINS", False),
    ("from gone import DISABLE_HOOKS_FOR_PLUGINS as X", False),
    ("from gone import *", False),
    ("this is no Python", False),
    ("X = " + "(" * 1000, False),
    (b"X = '\xff'", False),
    (b"X = '\0'", False),
    (b"# coding: latin-1\nX = '\xff'", None),
    (b"\xef\xbb\xbfX = 1", None),
    (b"#" * (2**20 + 1), False),
]


@pytest.mark.parametrize(("text", "decision"), IN_ANY_SETTINGS + IN_IMPORTED_SETTINGS)
def test_the_names_of_imported_settings_count(text, decision, project):
    write(project / SETTINGS, text)
    import_settings(project)
    assert consent(project) is decision


def import_settings(project: Path) -> ModuleType:
    """Import settings as Kedro does, which would refuse some of these."""
    sys.path.insert(0, str(project / "src"))
    return import_module(f"{project.name}.settings")


@pytest.mark.parametrize(("text", "decision"), IN_ANY_SETTINGS + IN_SOURCE)
def test_the_source_of_other_settings_counts(text, decision, project):
    write(project / SETTINGS, text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert consent(project) is decision
    assert caught == []
    assert "spaceships" not in sys.modules


@pytest.mark.parametrize(
    ("table", "place"),
    [
        ("", "src/spaceships/settings.py"),
        ("", "src/spaceships/settings/__init__.py"),
        ('source_dir = "lib/python"\n', "lib/python/spaceships/settings.py"),
        ('source_dir = "."\n', "spaceships/settings.py"),
        ('source_dir = "~/code"\n', "../../home/code/spaceships/settings.py"),
    ],
)
def test_settings_are_found_where_the_package_is(table, place, project):
    (project / SETTINGS).unlink()
    text = (project / "pyproject.toml").read_text()
    text = text.replace("[tool.kedro]\n", f"[tool.kedro]\n{table}")
    write(project / "pyproject.toml", text)
    write((project / place).resolve(), "KEDRO_DISABLE_TELEMETRY = True\n")
    assert consent(project) is False


def test_settings_of_a_package_in_a_package_are_found(project):
    text = KEDRO_TABLE.replace('package_name = "', 'package_name = "acme.')
    write(project / "pyproject.toml", text)
    write(project / "src/acme/spaceships/settings.py", "DO_NOT_TRACK = True\n")
    assert consent(project) is False
    kedro_project.PACKAGE_NAME = "acme.spaceships"
    sys.path.insert(0, str(project / "src"))
    assert consent(None) is False
    assert "acme" not in sys.modules


def test_a_project_without_settings_denies_nothing(project, heap):
    (project / SETTINGS).unlink()
    assert consent(project) is None
    run("info")
    assert heap.commands == ["kedro info"]


def test_settings_of_another_folder_do_not_stand_in_for_a_projects_own(
    project, tmp_path
):
    """Two checkouts of one project, of which one has opted out."""
    copied = shutil.copytree(project, tmp_path / "copy")
    write(copied / SETTINGS, "KEDRO_DISABLE_TELEMETRY = True\n")
    import_settings(project)
    assert consent(project) is None
    assert consent(copied) is False


def test_settings_of_an_installed_package_are_found_beside_its_project(
    project, tmp_path
):
    (project / "src").rename(tmp_path / "site")
    text = "KEDRO_DISABLE_TELEMETRY = True\n"
    write(tmp_path / "site/spaceships/settings.py", text)
    sys.path.insert(0, str(tmp_path / "site"))
    assert consent(project) is None
    import_module("spaceships")
    assert consent(project) is False


def test_settings_of_an_unknown_kind_deny_consent(project):
    import_settings(project)
    sys.modules["spaceships.settings"] = 5
    assert consent(project) is False


@posix
def test_imported_settings_may_be_a_link(project, tmp_path):
    (project / SETTINGS).unlink()
    text = "globals()['DO_NOT' + '_TRACK'] = 1\n"
    (project / SETTINGS).symlink_to(write(tmp_path / "shared.py", text))
    import_settings(project)
    assert consent(project) is False


def test_a_package_that_cannot_be_imported_is_not_run_again(project, heap, capfd):
    write(project / "src/spaceships/__init__.py", "print('run')\nimport gone\n")
    bootstrap_project(project)
    assert "run" in capfd.readouterr().out
    assert send_telemetry_event("x", {}, project) is True
    write(project / SETTINGS, "DO_NOT_TRACK = 1\n")
    assert send_telemetry_event("x", {}, project) is False
    assert send_telemetry_event("x") is False
    assert "run" not in capfd.readouterr().out


# A packaged project: it runs in any folder, also in that of another project


@pytest.fixture
def packaged(project, other_project, monkeypatch) -> Callable[[], None]:
    """The function that lets `rockets` run as a package in the folder `spaceships`."""
    monkeypatch.syspath_prepend(str(other_project / "src"))

    def run_packaged() -> None:
        kedro_project.configure_project("rockets")
        assert len(kedro_project.pipelines) == 2
        session = KedroSession.create(conf_source=str(other_project / "conf"))
        assert session.load_context().catalog

    return run_packaged


def test_a_packaged_project_is_not_taken_for_that_of_the_folder(
    packaged, new_project, heap
):
    before = files(new_project)
    packaged()
    assert heap.project_ids == {None}
    assert "tools" not in heap.properties
    assert heap.properties["number_of_pipelines"] == 2
    assert heap.properties["number_of_nodes"] == 3
    assert files(new_project) == before


def test_a_packaged_project_of_the_same_name_is_another_one(
    project, tmp_path, heap, monkeypatch
):
    shutil.copytree(project / "src", tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    kedro_project.configure_project("spaceships")
    assert KedroSession.create().load_context().catalog
    assert heap.project_ids == {None}


@pytest.mark.parametrize(
    "file",
    [
        "other/rockets/src/rockets/settings.py",
        "work/spaceships/src/spaceships/settings.py",
        "work/spaceships/.telemetry",
    ],
)
def test_both_projects_can_deny(file, packaged, tmp_path, heap):
    is_settings = file.endswith("settings.py")
    write(tmp_path / file, "DO_NOT_TRACK = True\n" if is_settings else NO)
    packaged()
    assert heap.connections == []


def test_an_event_of_another_plugin_belongs_to_the_path_that_it_gives(
    project, other_project, heap
):
    bootstrap_project(other_project)
    assert send_telemetry_event("x", {}, project) is True
    assert heap.project_ids == {SPACESHIPS}


def test_after_a_denial_of_the_loaded_project_no_plugin_sends(
    project, other_project, heap
):
    write(other_project / "src/rockets/settings.py", "DO_NOT_TRACK = True\n")
    bootstrap_project(other_project)
    assert send_telemetry_event("x", {}, project) is False
    assert send_telemetry_event("x") is False


# What is printed: the notice, and the debug mode


class Screen(io.StringIO):
    """Standard error that is shown in a terminal."""

    def isatty(self) -> bool:
        return True


class Cell(io.StringIO):
    """Standard error that is shown below a cell of a notebook."""


Cell.__module__ = "ipykernel.iostream"


@pytest.mark.parametrize("kind", [Screen, Cell])
def test_the_notice_is_shown_once_where_somebody_sees_it(
    kind, heap, config, monkeypatch
):
    for notices in (1, 0):
        stream = kind()
        monkeypatch.setattr(sys, "stderr", stream)
        assert send_telemetry_event("x") is True
        assert stream.getvalue() == (kedro_telemetry.NOTICE + "\n") * notices
    assert (config / "telemetry.notice").read_bytes() == b""


@posix
def test_the_notice_is_shown_once_in_a_real_terminal(heap, config):
    pty = pytest.importorskip("pty")
    command = [sys.executable, "-m", "kedro", "--version"]
    for is_shown in (True, False):
        try:
            screen, terminal = pty.openpty()
        except OSError:
            pytest.skip("this machine has no more terminals")
        subprocess.run(command, stderr=terminal, check=True, timeout=60)
        os.write(terminal, b"END\n")
        shown = os.read(screen, 9999).decode()
        os.close(terminal)
        os.close(screen)
        assert (kedro_telemetry.NOTICE.strip()[:40] in shown) is is_shown


def test_the_notice_is_shown_each_time_where_it_may_go_unseen(heap, config, capfd):
    """As after `kedro info 2> errors.log`."""
    for _ in range(2):
        assert send_telemetry_event("x") is True
        assert capfd.readouterr() == ("", kedro_telemetry.NOTICE + "\n")
    assert not (config / "telemetry.notice").exists()


def test_the_notice_is_short_and_says_how_to_opt_out():
    """It is read in terminals of 80 columns, set off from the output before it."""
    assert kedro_telemetry.NOTICE == (
        "\n"
        "Kedro collects anonymised usage data to improve the product.\n"
        "See whether it is on here, and why:  kedro telemetry\n"
        "Opt out:    kedro telemetry disable, or set DO_NOT_TRACK\n"
        "Read more:  https://docs.kedro.org/en/stable/about/telemetry/"
    )


def test_after_a_grant_there_is_no_notice(user, heap, capfd):
    write(user / ".telemetry", YES)
    assert send_telemetry_event("x") is True
    assert capfd.readouterr() == ("", "")


def test_without_standard_error_the_event_is_sent(heap, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as in pythonw
    assert send_telemetry_event("x") is True


def test_where_standard_error_is_closed_the_event_is_sent(heap, tmp_path, monkeypatch):
    with open(tmp_path / "errors", "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    assert send_telemetry_event("x") is True


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a full device")
def test_where_standard_error_is_full_the_event_is_sent(heap, monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert send_telemetry_event("x") is True


def test_the_debug_mode_prints_the_event_and_sends_nothing(
    project, config, heap, monkeypatch, capfd
):
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    write(config / "telemetry.backoff", "")
    assert send_telemetry_event("x", {"a": 1}, project) is False
    output, errors = capfd.readouterr()
    assert (output, heap.connections) == ("", [])
    head = f"{kedro_telemetry.NOTICE}\nkedro-telemetry would send:\n"
    assert errors.startswith(head + "{\n  ")
    event = json.loads(errors.removeprefix(head))
    assert (event["event"], event["properties"]["a"]) == ("x", 1)
    assert event["identity"] == stored_uuid(config)
    assert event["properties"]["project_id"]


def test_an_empty_variable_is_no_debug_mode(heap, monkeypatch):
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "")
    assert send_telemetry_event("x") is True


# Identity: one user, one UUID


def stored_uuid(config: Path) -> str:
    form = r'\[telemetry\]\nuuid = "([0-9a-f]{32})"\n'
    return re.fullmatch(form, (config / "telemetry.toml").read_text())[1]


def test_a_new_user_gets_a_random_identity_that_stays(config, heap):
    for _ in range(2):
        send_telemetry_event("x")
    identity = stored_uuid(config)
    assert uuid.UUID(identity).version == 4
    assert [event["identity"] for event in heap.events] == [identity, identity]
    assert heap.properties["username"] == identity
    assert kedro_telemetry._get_or_create_uuid() == identity


@pytest.mark.parametrize(
    "content",
    [
        "",
        "uuid = 5",
        "[telemetry]",
        "[telemetry]\nuuid = 5",
        "telemetry = 1",
        "[telemetry]\nuuid = 'x'",
        "no toml",
        b"\xff",
        pytest.param("a = " + 9999 * "[", id="nested too deeply"),
    ],
)
def test_a_file_without_a_valid_uuid_gets_a_new_one(content, config):
    write(config / "telemetry.toml", content)
    assert kedro_telemetry._get_or_create_uuid() == stored_uuid(config)


def no_configuration_folder(config: Path) -> None:
    write(config, "a file")


def a_folder_as_identity(config: Path) -> None:
    (config / "telemetry.toml").mkdir(parents=True)


def a_pipe_as_identity(config: Path) -> None:
    config.mkdir(parents=True)
    os.mkfifo(config / "telemetry.toml")


def a_read_only_identity(config: Path) -> None:
    write(config / "telemetry.toml", "").chmod(0o444)


@pytest.mark.parametrize(
    "trouble",
    [
        no_configuration_folder,
        a_folder_as_identity,
        a_read_only_identity,
        pytest.param(a_pipe_as_identity, marks=posix),
    ],
)
def test_events_go_without_an_identity_that_cannot_be_stored(
    trouble, user, config, heap
):
    trouble(config)
    before = files(user)
    assert send_telemetry_event("x") is True
    assert heap.events[0]["identity"] == "missing_user_identity"
    assert heap.properties["username"] == kedro_telemetry._get_or_create_uuid() == ""
    assert set(files(user)) - {config / "telemetry.notice"} == set(before)


@pytest.fixture
def no_home(monkeypatch) -> None:
    """The user has no home folder, as some services have none."""
    for name in HOME_VARIABLES:
        monkeypatch.setenv(name, "nowhere")


def test_without_a_home_folder_events_go_without_an_identity(no_home, user, heap):
    assert send_telemetry_event("x") is True
    assert heap.events[0]["identity"] == "missing_user_identity"
    assert files(user) == {}


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"XDG_CONFIG_HOME": "{home}/xdg"}, "xdg/kedro"),
        ("linux", {"XDG_CONFIG_HOME": ""}, ".config/kedro"),
        ("linux", {"XDG_CONFIG_HOME": "relative"}, ".config/kedro"),
        ("darwin", {}, "Library/Application Support/kedro"),
        (
            "win32",
            {"LOCALAPPDATA": "{home}/AppData/Local"},
            "AppData/Local/kedro/kedro",
        ),
    ],
)
def test_the_configuration_folder_is_where_each_platform_has_it(
    platform, variables, folder, user, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(home=user))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        identity = kedro_telemetry._get_or_create_uuid()
    assert stored_uuid(user / folder) == identity


def test_a_CI_machine_makes_no_id_and_shows_no_notice(
    new_project, heap, monkeypatch, capfd
):
    monkeypatch.setenv("CI", "1")
    before = files(new_project.parent)
    assert send_telemetry_event("x", {}, new_project) is True
    assert capfd.readouterr() == ("", "")
    assert heap.events[0]["identity"] == "missing_user_identity"
    assert "project_id" not in heap.properties
    assert heap.properties["is_ci_env"] is True
    assert files(new_project.parent) == before


def test_a_CI_machine_uses_stored_ids(project, known_user, heap, monkeypatch):
    monkeypatch.setenv("CI", "1")
    assert send_telemetry_event("x", {}, project) is True
    assert heap.events[0]["identity"] == IDENTITY
    assert "project_id" in heap.properties


# The project's id: a table at the end of pyproject.toml, or nothing

OPENED = '[tool.kedro]\na = "ü"\n'
ADDED = "\n[tool.kedro_telemetry]\nproject_id = 'ID'\n"


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize(
    ("text", "added"),
    [
        (OPENED, ADDED),
        (OPENED.rstrip(), "\n" + ADDED),
        ("[tool]\nkedro.a = 1\n", ADDED),
        (f'a = """\n[tool.kedro_telemetry]\n"""\n{OPENED}', ADDED),
        (f"[tool.kedro_telemetry]  # ours\nother = 1\n{OPENED}", ""),
        (f"{OPENED}[tool.kedro_telemetry]", ""),
        (f"[tool.kedro_telemetry.project_id]\n{OPENED}", ""),
        (f"[tool]\nkedro_telemetry = {{}}\n{OPENED}", ""),
        (f"[tool]\nkedro_telemetry = 5\n{OPENED}", ""),
        ("tool = {kedro = {a = 1}}\n", ""),
        ("[tool.black]\n", ""),
        ("tool = 5\n", ""),
        ("", ""),
        (f"{OPENED}broken\n", ""),
        (f"\ufeff{OPENED}", ""),
        ("[tool.kedro]\n# \udcff is not UTF-8\n", ""),
    ],
)
def test_an_id_is_added_to_pyproject_or_nothing(text, added, newline, tmp_path):
    def encoded(text: str) -> bytes:
        return text.replace("\n", newline).encode(errors="surrogateescape")

    path = write(tmp_path / "pyproject.toml", encoded(text))
    base_properties(tmp_path)
    written = re.sub(rb'"[0-9a-f]{32}"', b"'ID'", path.read_bytes())
    assert written == encoded(text + added)


@pytest.mark.parametrize(
    ("written", "hashed"),
    [('"mine"', "mine"), ('""', ""), ("5", "5"), (f'"{PROJECT_ID}"', PROJECT_ID)],
)
def test_an_id_is_taken_as_it_stands_in_a_kedro_project(written, hashed, tmp_path):
    text = f"[tool.kedro]\n[tool.kedro_telemetry]\nproject_id = {written}\n"
    write(tmp_path / "pyproject.toml", text)
    sent = base_properties(tmp_path)["project_id"]
    assert sent == hashed_id(hashed, "undefined_package_name")
    assert (tmp_path / "pyproject.toml").read_text() == text


def test_an_id_outside_of_a_kedro_project_is_not_sent(tmp_path):
    write(tmp_path / "pyproject.toml", ID_TABLE)
    assert "project_id" not in base_properties(tmp_path)


@pytest.mark.parametrize("declared", ['"spaceships"', "5"])
def test_an_id_is_hashed_with_the_package_that_kedro_has_loaded(declared, project):
    bootstrap_project(project)
    text = KEDRO_TABLE.replace('"spaceships"', declared) + ID_TABLE
    write(project / "pyproject.toml", text)
    assert base_properties(project)["project_id"] == SPACESHIPS


# Properties: those of every event, and those of a session


@pytest.mark.parametrize("name", kedro_telemetry.CI_VARIABLES)
@pytest.mark.parametrize(
    ("value", "is_ci"),
    [
        ("true", True),
        ("True", True),
        ("1", True),
        ("https://ci", True),
        ("", False),
        ("0", False),
        ("false", False),
        ("FALSE", False),
    ],
)
def test_a_CI_machine_is_known_by_its_variables(name, value, is_ci, monkeypatch):
    monkeypatch.setenv(name, value)
    assert base_properties(None)["is_ci_env"] is is_ci


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("\"['Linting', 'Testing']\"", "Linting, Testing"),
        ('["Linting", "Testing"]', "Linting, Testing"),
        ('["Custom Logging", "Documentation"]', "Custom Logging, Documentation"),
        ("\"['Data Structure','PySpark']\"", "Data Structure, PySpark"),
        ('"Kedro Viz"', "Kedro Viz"),
        ("\"['None']\"", "None"),
        ('["Linting", "/home/alice/acme"]', "Linting"),
        ('"Linting for Acme"', None),
        ('["linting"]', None),
        ("[]", None),
        ('"[]"', None),
        ('""', None),
        ("false", None),
    ],
)
def test_of_tools_only_kedros_own_are_sent(written, sent, tmp_path):
    write(tmp_path / "pyproject.toml", f"[tool.kedro]\ntools = {written}\n")
    assert base_properties(tmp_path).get("tools") == sent


@pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 has no tools")
def test_all_tools_that_kedro_offers_are_known():
    offered = set(starters.NUMBER_TO_TOOLS_NAME.values())
    missing = offered - set(kedro_telemetry.KEDRO_TOOLS)
    assert not missing, "Add what a new Kedro offers to KEDRO_TOOLS."


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ('"True"', "True"),
        ('"False"', "False"),
        ("true", True),
        ("false", False),
        ('"acme"', None),
        ("1", None),
        ("['True']", None),
    ],
)
def test_of_an_example_pipeline_only_whether_it_was_chosen_is_sent(
    written, sent, tmp_path
):
    write(tmp_path / "pyproject.toml", f"[tool.kedro]\nexample_pipeline = {written}\n")
    assert base_properties(tmp_path).get("example_pipeline") == sent


def test_an_event_has_the_time_in_UTC(heap):
    send_telemetry_event("x")
    sent = time.strptime(heap.events[0]["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert abs(time.mktime(sent) - time.mktime(time.gmtime())) < 60


def test_the_application_at_heap_can_be_another(heap, monkeypatch):
    monkeypatch.setenv("HEAP_APPID_DEV", "5")
    send_telemetry_event("x")
    assert heap.events[0]["app_id"] == kedro_telemetry._get_heap_app_id() == "5"


def test_a_kedro_that_cannot_be_imported_has_no_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "kedro", None)
    assert "project_version" not in base_properties(None)


OLD_NAMES = ["a", "parameters", "params:a", "params:a.b", "parameters_history"]


def test_datasets_are_counted_without_parameters(project, heap):
    catalog = SimpleNamespace(list=OLD_NAMES.copy)  # as Kedro had before 1.0
    assert statistics(catalog, heap, project)["number_of_datasets"] == 2


# Nothing of the user's is run: pipelines count where Kedro has loaded them


@pytest.mark.parametrize(
    ("registry", "expected"),
    [
        (REGISTRY, {"number_of_pipelines": 2, "number_of_nodes": 3}),
        (REGISTRY.replace("__default__", "first"), {"number_of_pipelines": 2}),
        ("def register_pipelines(): return None", {}),
    ],
)
def test_pipelines_that_kedro_has_loaded_are_counted(registry, expected, project, heap):
    write(project / PIPELINES, registry)
    bootstrap_project(project)
    with contextlib.suppress(TypeError):
        len(kedro_project.pipelines)
    sent = statistics(SimpleNamespace(list=list), heap, project)
    names = ("number_of_pipelines", "number_of_nodes")
    assert {name: sent[name] for name in names if name in sent} == expected


@pytest.mark.parametrize(
    "line",
    [
        "print('loaded')",
        "raise BaseException('loaded')",
    ],
)
def test_a_session_and_a_command_load_pipelines_as_without_telemetry(line, project):
    write(project / PIPELINES, f"{line}\n{REGISTRY}")
    code = """
    import contextlib, sys
    from pathlib import Path
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project
    bootstrap_project(Path.cwd())
    try:
        KedroSession.create(project_path=Path.cwd()).load_context().catalog
    except BaseException as error:
        print(repr(error))
    print("spaceships.pipeline_registry" in sys.modules)
    """
    for words in [("-c", code), ("-m", "kedro", "catalog", "list")]:
        bare = run_python(*words, DO_NOT_TRACK="1", KEDRO_LOGGING_CONFIG="quiet.yml")
        done = run_python(*words, CI="1", KEDRO_LOGGING_CONFIG="quiet.yml")
        assert (done.returncode, done.stdout) == (bare.returncode, bare.stdout)


@pytest.mark.skipif(KEDRO < (1, 5), reason="Kedro loads all pipelines before 1.5")
def test_pipelines_are_not_counted_where_kedro_loads_some_only(project, heap):
    assert run("run --pipelines other").exit_code == 0
    assert not {"number_of_pipelines", "number_of_nodes"} & set(heap.properties)


# Types of datasets: found in source files, without an import

CACHED = "kedro.io.cached_dataset.CachedDataset"
CSV = "kedro_datasets.pandas.csv_dataset.CSVDataset"
EXPERIMENTAL = "kedro_datasets_experimental.pandas.csv_dataset.CSVDataset"
NEVER = 'raise SystemExit("imported")\n'


@pytest.fixture
def datasets(tmp_path, monkeypatch) -> None:
    """kedro-datasets as it is laid out, none of which may be imported."""
    site = tmp_path / "site"
    for package in ("kedro_datasets", "kedro_datasets_experimental"):
        pandas = site / package / "pandas"
        write(site / package / "__init__.py", NEVER)
        write(pandas / "__init__.py", NEVER + "# class CSVDataset(")
        write(pandas / "csv_dataset.py", f"{NEVER}\nclass CSVDataset(X):\n")
        write(
            pandas / "other.py", f"{NEVER}\n# class CSVDataset(X):\nclass CSVDatasets("
        )
        write(pandas / "not_utf8.py", b"\xff")
    write(site / "kedro_datasets/broken/broken_dataset.py", b"\xff")
    write(site / "acme/pandas/csv_dataset.py", f"{NEVER}\nclass CSVDataset(X):\n")
    monkeypatch.syspath_prepend(str(site))


@since_kedro_1
@pytest.mark.parametrize(
    ("declared", "sent"),
    [
        ("MemoryDataset", MEMORY),
        ("kedro.io.MemoryDataset", MEMORY),
        (CACHED, CACHED),
        ("pandas.CSVDataset", CSV),
        ("kedro_datasets.pandas.CSVDataset", CSV),
        ("kedro_datasets_experimental.pandas.CSVDataset", EXPERIMENTAL),
        (EXPERIMENTAL, EXPERIMENTAL),
        ("kedro.io.Secret", "custom"),
        ("pandas.Secret", "custom"),
        ("pandas.csv_dataset.Secret", "custom"),
        ("broken.Secret", "custom"),
        ("acme.pandas.CSVDataset", "custom"),
        ("..", "custom"),
        ("/home/alice/pandas.CSVDataset", "custom"),
        ("pandas./home/alice.CSVDataset", "custom"),
        ("pandas/../pandas.CSVDataset", "custom"),
        (["pandas.CSVDataset"], "custom"),
        (None, "custom"),
        (CachedDataset, CACHED),
        (type("Secret", (MemoryDataset,), {}), "custom"),
    ],
)
def test_a_declared_type_is_sent_by_its_public_name(declared, sent, datasets, types_of):
    assert types_of(catalog_of({"a": {"type": declared}})) == {sent: 1}


def catalog_of(configs: dict) -> SimpleNamespace:
    """A catalog that declares datasets and must not be asked for their types."""
    return SimpleNamespace(
        keys=configs.keys,
        config_resolver=SimpleNamespace(config=configs),
        get_type=Mock(side_effect=SystemExit("imported")),
    )


@pytest.fixture
def types_of(project, heap) -> Callable[[object], dict[str, int]]:
    """The function that reports a catalog and returns its types as they arrive."""

    def types_of(catalog: object) -> dict[str, int]:
        return counts("dataset_type_count.", statistics(catalog, heap, project))

    return types_of


@since_kedro_1
def test_a_bad_entry_of_a_catalog_costs_its_own_name_only(datasets, types_of):
    configs = {"a": ["x"], "b": {}, 3: {"type": "MemoryDataset"}, "d": None}
    assert types_of(catalog_of(configs)) == {"custom": 3, MEMORY: 1}


@since_kedro_1
def test_datasets_that_are_added_by_code_have_types(types_of):
    catalog = DataCatalog.from_config({"a": {"type": "MemoryDataset"}})
    catalog["b"] = MemoryDataset(1)
    catalog["MemoryDataset"] = type("Secret", (MemoryDataset,), {})(1)
    catalog["params:d"] = 1
    assert types_of(catalog) == {MEMORY: 2, "custom": 1}


@since_kedro_1
def test_a_type_that_many_datasets_have_is_looked_up_once(
    datasets, types_of, monkeypatch
):
    configs = {str(number): {"type": "pandas.CSVDataset"} for number in range(9)}
    read_bytes = Path.read_bytes
    reads = []

    def read(path: Path) -> bytes:
        reads.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert types_of(catalog_of(configs)) == {CSV: 9}
    assert reads.count("csv_dataset.py") == 1


def test_a_catalog_of_the_users_own_kind_is_asked(types_of):
    types = {"a": "kedro.io.X", "b": None, "c": "acme.X"}
    catalog = SimpleNamespace(keys=types.keys, get_type=types.get)
    assert types_of(catalog) == {"kedro.io.X": 1, "custom": 2}


VALIDATED = {
    "a": "pandera.api.A",
    "b": "pandera.B",
    "c": "pydantic.C",
    "d": "great_expectations.D",
    "e": "kedro.E",
    "f": "kedro_datasets.F",
    "g": "spaceships.Secret",
    "h": "",
}


def test_validators_are_counted_by_public_library(project, heap):
    specs = {name: SimpleNamespace(class_path=path) for name, path in VALIDATED.items()}
    catalog = SimpleNamespace(list=list, validator_specs=specs)
    sent = statistics(catalog, heap, project)
    assert sent["number_of_validated_datasets"] == 8
    assert counts("validator_type_count.", sent) == {
        "pandera": 2,
        "pydantic": 1,
        "great_expectations": 1,
        "kedro": 1,
        "kedro_datasets": 1,
        "custom": 2,
    }


# Masking: public are the words that Kedro or an installed plugin defines

PLUGIN = """
import functools
import click
import plug_commands
@click.command()
@click.option("--fast/--slow", "-f")
def fly(**_): ...
@click.command()
@click.option("--level")
@click.pass_obj
def lift(*_, **__): ...
class Lazy(click.Group):
    def list_commands(self, ctx): raise SystemExit("listed")
    def get_command(self, ctx, name):
        if name == "fail": raise SystemExit("failed")
        return {"lift": lift}.get(name)
everywhere = click.Group("everywhere", [fly])
partial = click.Command("partial", callback=functools.partial(print))
deck = Lazy("deck", callback=plug_commands.deck)
renamed = click.Command("renamed", callback=plug_commands.renamed)
class Default(click.Group):  # as click-default-group has it
    def get_command(self, ctx, name): return renamed
inside = click.Group("inside", [deck, partial, renamed])
inside.add_command(Default("default", callback=plug_commands.deck))
"""
PLUGIN_COMMANDS = """
def deck(**_): ...
def renamed(**_): ...
renamed.__module__ = deck.__module__ = "run"
"""
ENTRY_POINTS = """\
[kedro.global_commands]
idle = idle:cli
gone = plug:gone
plug = plug:everywhere
[kedro.project_commands]
plug = plug:inside
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> SimpleNamespace:
    """A plugin that Kedro has loaded, beside one that it has not."""
    site = tmp_path / "plugins"
    write(site / "plug.py", PLUGIN)
    write(site / "plug_commands.py", PLUGIN_COMMANDS)
    write(site / "idle.py", "")
    write(site / "plug-1.0.dist-info/METADATA", "Name: plug\nVersion: 1.0\n")
    write(site / "plug-1.0.dist-info/entry_points.txt", ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    return import_module("plug")


MASKED = [
    ("", "kedro"),
    ("-h", "-h"),
    ("-V", "-V"),
    ("--help=x", "--help *****"),
    ("--help /home/alice", "--help *****"),
    ("--version 3", "--version *****"),
    ("x", "*****"),
    ("x --and y", "*****"),
    ("--x run", "*****"),
    ("--x=y", "*****"),
    ("info", "info"),
    ("run", "run"),
    ("run -h", "run -h"),
    ("run run", "run *****"),
    ("run --env x", "run --env *****"),
    ("run -e x y", "run -e ***** *****"),
    ("run -ex", "run *****"),
    ("run --params=a=b", "run --params *****"),
    ("run --x --y=z", "run ***** *****"),
    ("run --pipeline=x --env=", "run --pipeline ***** --env *****"),
    ("run --pipeline --env", "run --pipeline --env"),
    ("run -- -e x", "run ***** -e *****"),
    ("pipeline create x", "pipeline create *****"),
    ("pipeline x create", "pipeline ***** *****"),
    ("jupyter notebook --port 80", "jupyter notebook ***** *****"),
    ("new --starter=astro-airflow-iris", "new --starter astro-airflow-iris"),
    ("new -s astro-airflow-iris x", "new -s astro-airflow-iris *****"),
    ("new --checkout astro-airflow-iris", "new --checkout *****"),
    ("run --starter astro-airflow-iris", "run ***** *****"),
    ("new -s x", "new -s *****"),
    ("fly --slow -f x --y", "fly --slow -f ***** *****"),
    ("fly target", "fly *****"),
    ("deck lift --level=9 --help", "deck lift --level ***** --help"),
    ("deck x", "deck *****"),
    ("deck fail", "deck *****"),
    ("partial", "*****"),
    ("renamed", "renamed"),
    ("default renamed", "default renamed"),
    ("default /home/alice", "default *****"),
]


@pytest.mark.parametrize(("line", "sent"), MASKED)
def test_what_kedro_or_a_plugin_defines_is_clear_and_all_else_masked(
    line, sent, plugin, heap
):
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(project_metadata=None, command_args=line.split())
    hook.after_command_run()
    assert heap.commands == [f"kedro {sent}".removesuffix(" kedro")]
    assert heap.properties["main_command"] == sent.split()[0]
    assert "idle" not in sys.modules


def test_the_starter_of_a_plugin_is_not_an_official_one(monkeypatch, heap):
    name = "_OFFICIAL_STARTER_SPECS_DICT"
    specs = getattr(starters, name, None) or starters._OFFICIAL_STARTER_SPECS
    internal = starters.KedroStarterSpec("acme-internal", "https://secret")
    internal.origin = "acme"
    monkeypatch.setitem(specs, "acme-internal", internal)
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(None, ["new", "-s", "acme-internal"])
    hook.after_command_run()
    assert heap.commands == ["kedro new -s *****"]


@pytest.fixture
def kedros_groups(monkeypatch) -> None:
    """What a test adds to Kedro's groups of commands is gone after it."""
    for group in vars(kedro_cli).values():
        if isinstance(group, click.Group):
            monkeypatch.setattr(group, "commands", dict(group.commands))


PROJECT_COMMANDS = """
import functools
import click
import plug
from kedro.framework.cli import cli as kedro_cli
@click.command()
@click.option("--pipeline")
@click.option("--secret")
def run(**_): ...
@click.command()
def mine(): ...
def function(): ...
def decorated(function):
    @functools.wraps(function)
    def wrapped(): function()
    return wrapped
wrapped = click.Command("wrapped-in-plugin", callback=decorated(function))
partial = click.Command("partial-in-plugin", callback=functools.partial(function))
cli = click.Group("spaceships", [run, mine])
plug.inside.add_command(click.Command("added-to-plugin", callback=function))
plug.inside.add_command(wrapped)
plug.inside.add_command(partial)
plug.inside.add_command(click.Group("empty", invoke_without_command=True))
kedro_cli.cli.add_command(click.Command("added", callback=function))
kedro_cli.cli.add_command(click.Group("grouped", invoke_without_command=True))
kedro_cli.cli.add_command(click.Command("of-a-plugin", callback=plug.renamed.callback))
"""


@pytest.mark.parametrize(
    "line",
    [
        "mine",
        "added",
        "grouped",
        "of-a-plugin",
        "added-to-plugin",
        "wrapped-in-plugin",
        "partial-in-plugin",
        "empty",
    ],
)
def test_what_the_project_defines_is_masked(line, project, plugin, heap, kedros_groups):
    write(project / "src/spaceships/cli.py", PROJECT_COMMANDS)
    assert run(line).exit_code == 0
    assert heap.commands == ["kedro *****"]


@since_kedro_0_19
def test_a_command_that_the_project_overrides_keeps_kedros_words(
    project, plugin, heap, kedros_groups
):
    write(project / "src/spaceships/cli.py", PROJECT_COMMANDS)
    assert run("run --pipeline x --secret y").exit_code == 0
    assert heap.commands == ["kedro run --pipeline ***** ***** *****"]


# Post: one try, two seconds, TLS


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        ("200", "200"),
        ("302", "302"),
        ("500", "500"),
        ("big", "200"),
        ("garbage", "BadStatusLine"),
        ("reset", "(RemoteDisconnected|ConnectionResetError)"),
    ],
)
def test_an_event_is_posted_once_and_found_in_the_log(
    mode, outcome, heap, log, known_user, config
):
    heap.mode = mode
    assert send_telemetry_event("x") is (outcome == "200")
    (line,) = log.messages
    posted = re.fullmatch(rf"Post of (\{{.*\}}): {outcome}", line)
    assert json.loads(posted[1])["event"] == "x"
    assert len(heap.connections) == 1
    assert not (config / "telemetry.backoff").exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (None, "ConnectionRefusedError"),
        (socket.gaierror("no secret"), "gaierror"),
        (ValueError("no secret"), "ValueError"),
    ],
    ids=["refused", "unknown", "broken"],
)
def test_the_kind_of_a_failure_is_logged_and_no_password(error, kind, log, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://alice:secret@127.0.0.1:9")
    if error is not None:
        monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=error))
    assert send_telemetry_event("x") is False
    assert log.messages[0].endswith(f"}}: {kind}")
    assert "secret" not in log.text


def test_the_users_identity_is_masked_in_the_log(heap, log, known_user):
    assert send_telemetry_event("x") is True
    assert IDENTITY not in log.text
    assert '"identity": "*****"' in log.messages[0]
    assert '"username": "*****"' in log.messages[0]


def test_kedros_log_takes_an_event_with_brackets(heap, log, monkeypatch, capfd):
    monkeypatch.setattr(kedro_telemetry.logger, "handlers", [RichHandler()])
    monkeypatch.setattr(kedro_telemetry.logger, "propagate", False)
    assert send_telemetry_event("[/oops]") is True
    assert '"[/oops]"' in re.sub(r"\s+", "", capfd.readouterr().out)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_lost_event_is_logged_if_the_log_works(error, heap, log, monkeypatch):
    assert send_telemetry_event(Trap()) is False
    assert log.messages == ["An event was lost: RuntimeError"]
    monkeypatch.setattr(log.handler, "emit", Mock(side_effect=error))
    assert send_telemetry_event(Trap()) is False
    assert send_telemetry_event("x") is True


def test_where_no_thread_can_start_an_event_is_lost(heap, monkeypatch):
    error = RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=error))
    assert send_telemetry_event("x") is False
    assert heap.connections == []


# The request: its own headers, through the user's proxy

HEADERS = {"Host", "User-Agent", "Content-Type", "Content-Length"}


def test_only_the_headers_of_the_post_leave(heap, monkeypatch, capfd):
    """sentry-sdk adds `baggage` to each request, OpenTelemetry `traceparent`."""
    putrequest = http.client.HTTPConnection.putrequest
    open_url = urllib.request.OpenerDirector.open

    def as_sentry(connection, *args, **options):
        putrequest(connection, *args, **options)
        connection.putheader("baggage", "sentry-release=secret")

    def as_opentelemetry(opener, request, *args, **options):
        request.add_header("traceparent", "00-secret")
        return open_url(opener, request, *args, **options)

    monkeypatch.setattr(http.client.HTTPConnection, "putrequest", as_sentry)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", as_opentelemetry)
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    write(Path(".telemetry"), YES)
    assert send_telemetry_event("x") is True
    assert set(heap.headers) == HEADERS
    assert heap.headers["Host"] == "heapanalytics.com"
    assert heap.headers["Content-Type"] == "application/json"
    assert heap.headers["User-Agent"].startswith("kedro-telemetry/")
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def no_network(monkeypatch) -> Mock:
    """No name server and no address can be reached, and it is known who tried."""
    attempt = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(socket, "getaddrinfo", attempt)
    monkeypatch.setattr(socket.socket, "connect", attempt)
    return attempt


PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.mark.parametrize("name", PROXY_VARIABLES)
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_users_proxy_is_used(name, scheme, heap, monkeypatch):
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv(name, f"{scheme}alice:p%40ss@{heap.address}")
    assert send_telemetry_event("x") is True
    assert heap.connections == ["heapanalytics.com:443"]
    assert heap.proxy_headers["Proxy-Authorization"] == "Basic YWxpY2U6cEBzcw=="
    assert set(heap.headers) == HEADERS


def test_a_proxy_for_https_comes_before_one_for_all(heap, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert send_telemetry_event("x") is True


@pytest.mark.parametrize(
    ("proxy", "address"),
    [
        ("http://alice:#secret@proxy.example:3128", ("proxy.example", 3128)),
        ("http://alice:12/3@proxy.example:3128", ("proxy.example", 3128)),
        ("//proxy.example:3128", ("proxy.example", 3128)),
        ("https://proxy.example", ("proxy.example", 443)),
        ("http://", None),
        ("http://alice:secret@", None),
    ],
)
def test_a_proxy_is_found_as_urllib_finds_it(proxy, address, no_network, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    assert send_telemetry_event("x") is False
    called = [call.args[:2] for call in no_network.call_args_list]
    assert called == ([address] if address else [])


@pytest.mark.parametrize("name", PROXY_VARIABLES)
@pytest.mark.parametrize("scheme", ["socks5", "SOCKS5h", "socks4", "socks"])
def test_past_a_SOCKS_proxy_nothing_is_contacted(
    name, scheme, no_network, log, config, monkeypatch
):
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv(name, f"{scheme}://proxy.example:1080")
    assert send_telemetry_event("x") is False
    no_network.assert_not_called()
    assert log.messages[0].endswith("}: NotImplementedError")
    assert not (config / "telemetry.backoff").exists()


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_where_the_user_wants_no_proxy_the_host_is_asked(name, no_network, monkeypatch):
    monkeypatch.setenv(name, "localhost,.heapanalytics.com,heapanalytics.com")
    assert send_telemetry_event("x") is False
    assert no_network.call_args.args[:2] == ("heapanalytics.com", 443)


# The deadline, and the back-off after a post that takes long


@pytest.fixture
def short_deadline(monkeypatch) -> float:
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 0.3)
    return 0.3


@pytest.fixture
def hanging_certificates(tmp_path, monkeypatch) -> Iterator[Path]:
    """A bundle of certificates that nobody ever writes to."""
    pipe = tmp_path / "pipe.pem"
    os.mkfifo(pipe)
    monkeypatch.setenv("SSL_CERT_FILE", str(pipe))
    yield pipe
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize("mode", ["hang", "hang-tls", "hang-http", "drip"])
def test_after_the_deadline_a_post_is_given_up(
    mode, heap, config, log, short_deadline, monkeypatch
):
    monkeypatch.setenv("CI", "true")  # no other file makes the folder of the stamp
    heap.mode = mode
    start = time.monotonic()
    assert send_telemetry_event("x") is False
    assert short_deadline <= time.monotonic() - start < 2
    assert log.messages[0].endswith("}: no answer in time")
    assert (config / "telemetry.backoff").read_bytes() == b""
    assert send_telemetry_event("x") is False
    left_out = "An event was left out, as Heap did not answer the last one in time"
    assert log.messages[1:] == [left_out]
    assert len(heap.connections) == 1


def test_a_post_that_fails_slowly_is_not_tried_again(
    heap, config, log, known_user, monkeypatch
):
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 1.0)
    heap.mode = "slow reset"
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert (config / "telemetry.backoff").exists()
    assert len(heap.connections) == 1
    assert "no answer in time" not in log.text


def test_a_command_waits_two_seconds_and_remembers_half_a_second(heap, config):
    """The other tests wait longer, as a machine may be busy, or shorter."""
    code = "import kedro_telemetry; print(kedro_telemetry.DEADLINE)"
    failure = "README promises two seconds. Change its sentences, too, and this test."
    assert run_python("-c", code).stdout == "2.0\n", failure


def test_a_look_up_that_hangs_is_given_up(heap, config, short_deadline, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:80")

    def hang(*_: object, **__: object) -> None:
        heap.is_over.wait()

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    assert send_telemetry_event("x") is False
    assert (config / "telemetry.backoff").exists()


@posix
def test_certificates_that_hang_are_given_up(
    heap, config, short_deadline, hanging_certificates
):
    assert send_telemetry_event("x") is False
    assert (config / "telemetry.backoff").exists()


@pytest.mark.parametrize(
    ("age", "is_sent"),
    [
        (0, False),
        (HOUR - 60, False),
        (HOUR + 60, True),
        (60 - HOUR, False),
        (-HOUR - 60, True),
    ],
)
def test_a_back_off_lasts_an_hour(age, is_sent, heap, config):
    """A file server's clock may be ahead."""
    start = time.time() - age
    os.utime(write(config / "telemetry.backoff", ""), (start, start))
    assert send_telemetry_event("x") is is_sent
    assert bool(heap.connections) is is_sent


def test_an_old_stamp_is_renewed(heap, config, short_deadline):
    """Also one of root's, which nobody else may change."""
    stamp = write(config / "telemetry.backoff", "")
    os.utime(stamp, (1, 1))
    stamp.chmod(0o444)
    keep = config / "keep"
    os.link(stamp, keep)
    heap.mode = "hang"
    send_telemetry_event("x")
    assert abs(time.time() - stamp.stat().st_mtime) < 60
    assert keep.stat().st_mtime == 1


def a_file_as_folder(config: Path) -> None:
    write(config, "a file")


def a_folder_as_stamp(config: Path) -> None:
    (config / "telemetry.backoff").mkdir(parents=True)
    os.utime(config / "telemetry.backoff", (1, 1))


def no_folder_at_all(config: Path) -> None:
    for name in HOME_VARIABLES:
        os.environ[name] = "nowhere"


@pytest.mark.parametrize(
    "trouble", [a_file_as_folder, a_folder_as_stamp, no_folder_at_all]
)
def test_where_no_stamp_can_be_stored_each_process_waits_once(
    trouble, heap, config, short_deadline, monkeypatch
):
    heap.mode = "hang"
    trouble(config)
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1
    heap.mode = "200"
    hour_ago = kedro_telemetry._Post.back_off_start - HOUR - 60
    monkeypatch.setattr(kedro_telemetry._Post, "back_off_start", hour_ago)
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 20.0)
    assert send_telemetry_event("x") is True


def test_a_post_that_is_given_up_ends_by_itself(heap, monkeypatch):
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 0.2)
    heap.mode = "hang"
    before = set(threading.enumerate())
    assert send_telemetry_event("x") is False
    (left,) = [x for x in set(threading.enumerate()) - before if x.daemon]
    left.join(10)
    assert not left.is_alive()


def test_a_process_ends_while_its_post_still_hangs(heap):
    heap.mode = "drip"
    start = time.monotonic()
    done = run_python("-m", "kedro", "--version")
    assert (done.returncode, done.stderr) == (0, kedro_telemetry.NOTICE + "\n")
    assert 2 < time.monotonic() - start < 20


def test_the_thread_of_a_post_imports_nothing(heap):
    code = """
    import sys, threading
    from kedro_telemetry import send_telemetry_event
    class Watcher:
        def find_spec(name, *_):
            if threading.current_thread() is not threading.main_thread():
                print(name)
    sys.meta_path.insert(0, Watcher)
    print(send_telemetry_event("x"))
    """
    assert run_python("-c", code).stdout == "True\n"


# What the process does with signals comes first


@pytest.fixture
def on_signal() -> Iterator[Callable]:
    """The function that sets what a signal does, for this test."""
    before = {}

    def set_handler(number: int, handler: object) -> None:
        before[number] = signal.signal(number, handler)

    yield set_handler
    for number, handler in before.items():
        signal.signal(number, handler)


class TimedOut(Exception):
    """What a user's time-out raises."""


def time_out(*_: object) -> None:
    raise TimedOut


def end_process(*_: object) -> None:
    sys.exit(3)


SIGNALS = [
    ("SIGINT", signal.default_int_handler, KeyboardInterrupt),
    ("SIGALRM", time_out, TimedOut),
    ("SIGTERM", end_process, SystemExit),
]


@posix
@pytest.mark.parametrize(("name", "handler", "raised"), SIGNALS)
def test_what_a_signal_raises_ends_a_session_that_waits(
    name, handler, raised, project, heap, on_signal
):
    heap.signal = getattr(signal, name)
    heap.mode = "hang"
    on_signal(heap.signal, handler)
    with pytest.raises(raised):
        load_catalogs(project)
    assert len(heap.connections) == 1


@posix
def test_ctrl_c_after_a_command_ends_the_wait_only(project, heap, on_signal):
    heap.signal = signal.SIGINT
    heap.mode = "hang"
    on_signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    assert run("info").exit_code == 0
    assert len(heap.connections) == 1


@posix
@pytest.mark.parametrize(("deadline", "is_remembered"), [(20.0, False), (0.4, True)])
def test_a_wait_that_ctrl_c_ends_late_starts_the_back_off(
    deadline, is_remembered, heap, config, on_signal, monkeypatch
):
    """The signal comes after 0.2 seconds, and late is a quarter of the deadline."""
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", deadline)
    heap.signal = signal.SIGALRM
    heap.mode = "hang"
    on_signal(heap.signal, time_out)
    with contextlib.suppress(TimedOut):
        send_telemetry_event("x")
    assert (config / "telemetry.backoff").exists() is is_remembered


@posix
@pytest.mark.parametrize(("name", "handler", "raised"), SIGNALS[1:])
def test_another_signal_after_a_command_is_the_users(
    name, handler, raised, heap, on_signal
):
    heap.signal = getattr(signal, name)
    heap.mode = "hang"
    on_signal(heap.signal, handler)
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(None, ["info"])
    with pytest.raises(raised):
        hook.after_command_run()


@posix
def test_a_connection_that_is_closed_ends_no_process(heap):
    """A second write to a connection that FIN has ended raises SIGPIPE."""
    heap.mode = "close"
    code = """
    import signal
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    from kedro_telemetry import send_telemetry_event
    large = {f"key {i}": "x" * 1000 for i in range(200)}
    print({send_telemetry_event("x", large) for _ in range(30)})
    """
    done = run_python("-c", code)
    assert (done.returncode, done.stdout) == (0, "{False}\n")


@pytest.mark.parametrize("name", ["SIGPIPE", "pthread_sigmask"])
def test_windows_has_no_such_signal(name, heap, monkeypatch):
    monkeypatch.delattr(signal, name, raising=False)
    assert send_telemetry_event("x") is True


# Trust: all that the platform trusts

FOLDERS = {
    "nothing": {},
    "heap": {HASH_LINK: HEAP_CERTIFICATE},
    "another": {"00000000.0": ""},
    "broken": {HASH_LINK: "no certificate"},
    "names": {"heap.pem": HEAP_CERTIFICATE, "8bd8b012.pem": HEAP_CERTIFICATE},
    "bundle alone": {"ca-certificates.crt": HEAP_CERTIFICATE},
    "Debian": {
        HASH_LINK: HEAP_CERTIFICATE,
        "ca-certificates.crt": HEAP_CERTIFICATE,
    },
    # `cat company.pem >> ca-certificates.crt` beside the link of Debian's ssl-cert
    "appended": {"00000000.0": "", "ca-certificates.crt": HEAP_CERTIFICATE},
}


class Trust(NamedTuple):
    """SSL_CERT_FILE, SSL_CERT_DIR and the bundle of certifi, if it is installed."""

    file: str
    folder: str
    certifi: str | None = None


@pytest.fixture
def set_trust(tmp_path, monkeypatch) -> Callable[[Trust], None]:
    """The function that lays out certificates in folders and sets the variables."""
    write(tmp_path / "empty.pem", "")
    for folder, contents in FOLDERS.items():
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            write(tmp_path / folder / name, text)
    monkeypatch.chdir(tmp_path)

    def set_trust(trust: Trust) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", trust.file)
        monkeypatch.setenv("SSL_CERT_DIR", trust.folder)
        module = SimpleNamespace(
            where=Mock(return_value=trust.certifi), __spec__=Mock()
        )
        monkeypatch.setitem(sys.modules, "certifi", module if trust.certifi else None)

    return set_trust


@posix
@pytest.mark.parametrize(
    ("trust", "is_trusted", "connections"),
    [
        (Trust("heap.pem", "nothing"), True, 1),
        (Trust("heap.pem", "another"), True, 2),
        (Trust("heap.pem", "broken"), True, 2),
        (Trust("heap.pem", "gone"), True, 1),
        (Trust("heap.pem", "nothing:another"), True, 1),
        (Trust("empty.pem", "nothing"), False, 1),
        (Trust("empty.pem", "another"), False, 2),
        (Trust("empty.pem", "heap"), True, 1),
        (Trust("empty.pem", "names"), False, 1),
        (Trust("", "heap"), True, 1),
        (Trust("", "nothing"), False, 1),
        (Trust("", "nothing", "heap.pem"), True, 1),
        (Trust("", "names", "heap.pem"), True, 1),
        (Trust("", "another", "heap.pem"), False, 2),
        (Trust("empty.pem", "nothing", "heap.pem"), False, 1),
        (Trust("gone.pem", "nothing", "heap.pem"), False, 1),
        (Trust("Debian/ca-certificates.crt", "Debian"), True, 1),
        (Trust("bundle alone/ca-certificates.crt", "bundle alone"), True, 1),
        (Trust("appended/ca-certificates.crt", "appended"), True, 2),
    ],
    ids=str,
)
def test_whom_to_trust(trust, is_trusted, connections, set_trust, heap):
    set_trust(trust)
    assert send_telemetry_event("x") is is_trusted
    assert len(heap.connections) == connections
    assert len(heap.events) == is_trusted


@posix
def test_where_the_folder_is_enough_no_bundle_is_read(set_trust, heap, monkeypatch):
    set_trust(Trust("heap.pem", "Debian"))
    read = Mock(side_effect=AssertionError)
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", read)
    assert send_telemetry_event("x") is True


@posix
def test_where_truststore_asks_the_system_certifi_is_not_added(
    set_trust, heap, monkeypatch
):
    set_trust(Trust("", "nothing", "heap.pem"))
    monkeypatch.setattr(
        ssl.SSLContext, "cert_store_stats", Mock(side_effect=NotImplementedError)
    )
    assert send_telemetry_event("x") is False
    monkeypatch.setenv("SSL_CERT_FILE", "heap.pem")
    assert send_telemetry_event("x") is True


def test_a_folder_that_cannot_be_listed_is_none(heap, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setattr(os, "listdir", Mock(side_effect=PermissionError))
    assert send_telemetry_event("x") is True


def test_a_certificate_that_nobody_trusts_is_refused_and_logged(
    heap, log, tmp_path, monkeypatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(write(tmp_path / "empty.pem", "")))
    monkeypatch.setitem(sys.modules, "certifi", None)
    assert send_telemetry_event("x") is False
    assert log.messages[0].endswith("}: SSLCertVerificationError")
    assert heap.events == []


# Files: whole at any time, and only changed if they are still what was read


@posix
def test_mode_owner_and_links_of_a_file_stay(new_project, tmp_path):
    path = tmp_path / "elsewhere.toml"
    (new_project / "pyproject.toml").rename(path)
    (new_project / "pyproject.toml").symlink_to(path)
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 5678)
    before = path.stat()
    assert "project_id" in base_properties(new_project)
    assert (new_project / "pyproject.toml").is_symlink()
    assert "project_id" in path.read_text()
    for name in ("st_mode", "st_uid", "st_gid"):
        assert getattr(path.stat(), name) == getattr(before, name)


def test_the_time_of_the_last_change_is_now(new_project):
    path = new_project / "pyproject.toml"
    os.utime(path, (1, 1))
    assert "project_id" in base_properties(new_project)
    assert time.time() - path.stat().st_mtime < 60


@pytest.mark.skipif(not hasattr(os, "setxattr"), reason="Linux has extended attributes")
def test_extended_attributes_of_a_file_stay(new_project):
    path = new_project / "pyproject.toml"
    try:
        os.setxattr(path, "user.note", b"mine")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    assert "project_id" in base_properties(new_project)
    assert os.getxattr(path, "user.note") == b"mine"


REFUSED = Mock(side_effect=PermissionError(1, "Operation not permitted"))


def test_the_mode_of_a_file_stays_where_a_drive_refuses_a_time(
    new_project, monkeypatch
):
    path = new_project / "pyproject.toml"
    path.chmod(0o600)
    monkeypatch.setattr(os, "utime", REFUSED)
    assert "project_id" in base_properties(new_project)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["chown", "chmod", "utime"])
def test_a_mounted_drive_may_refuse_what_need_not_change(
    call, new_project, config, monkeypatch
):
    """WSL's and Azure Files' do."""
    write(config / ".telemetry", YES)
    monkeypatch.setattr(os, call, REFUSED, raising=False)
    assert "project_id" in base_properties(new_project)
    assert run("telemetry disable").exit_code == 0
    assert (config / ".telemetry").read_text() == NO


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can give files away"
)
def test_a_file_whose_owner_cannot_be_kept_stays_as_it_is(new_project, monkeypatch):
    path = new_project / "pyproject.toml"
    os.chown(path, 1234, 5678)
    before = files(new_project)
    monkeypatch.setattr(os, "chown", REFUSED)
    assert "project_id" not in base_properties(new_project)
    assert files(new_project) == before


# A file is read again when its copy is on the disk, just before it is replaced. So
# what these tests do in `os.fsync`, which writes the copy, happens in between.


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_cannot_be_replaced_stays_whole(call, new_project, heap, monkeypatch):
    """As on a full disk, or on Windows while another program has the file open."""
    monkeypatch.setattr(os, call, REFUSED)
    before = files(new_project)
    run("registry list")
    assert files(new_project) == before
    assert "project_id" not in heap.properties


def test_a_read_only_file_stays_as_it_is(new_project, heap):
    (new_project / "pyproject.toml").chmod(0o444)
    before = files(new_project)
    run("registry list")
    assert files(new_project) == before
    assert "project_id" not in heap.properties


@pytest.mark.parametrize("edit", ["", "# mine\n"], ids=["emptied", "edited"])
def test_an_edit_that_somebody_makes_meanwhile_stays(edit, new_project, monkeypatch):
    path = new_project / "pyproject.toml"
    before = set(files(new_project))

    def edit_meanwhile(_: int) -> None:
        path.write_text(edit)

    monkeypatch.setattr(os, "fsync", edit_meanwhile)
    base_properties(new_project)
    assert path.read_text() == edit
    assert set(files(new_project)) == before, "A temporary file is left."


def test_the_temporary_file_is_beside_the_file_and_hidden(new_project, monkeypatch):
    names = []

    def look_around(_: int) -> None:
        names.extend(os.listdir(new_project))

    monkeypatch.setattr(os, "fsync", look_around)
    base_properties(new_project)
    (name,) = set(names) - set(os.listdir(new_project))
    assert re.fullmatch(r"\.pyproject\.toml\.[0-9a-f]{16}", name)


def test_a_file_that_somebody_makes_meanwhile_stays(config, monkeypatch):
    path = config / "telemetry.toml"
    text = f'[telemetry]\nuuid = "{IDENTITY}"\n'

    def write_meanwhile(_: int) -> None:
        path.write_text(text)

    monkeypatch.setattr(os, "fsync", write_meanwhile)
    assert kedro_telemetry._get_or_create_uuid() == IDENTITY
    assert path.read_text() == text


# The commands: kedro telemetry


def test_status_shows_a_new_user_all_there_is(new_project, config, heap, capfd):
    before = files(new_project.parent)
    done = run("telemetry status")
    assert done.output == run("telemetry").output
    assert (done.exit_code, files(new_project.parent)) == (0, before)
    assert done.output.splitlines() == [
        "Telemetry:   on here",
        "Reason:      on by default: no opt-out and no opt-in found",
        "Identity:    none yet",
        f"             {config / 'telemetry.toml'}",
        "Project id:  none yet",
        f"             {new_project / 'pyproject.toml'}",
        "Endpoint:    https://heapanalytics.com/api/track",
        "",
        "See an event without sending it:  KEDRO_TELEMETRY_DEBUG=1 kedro info",
        "Opt out for all your projects:    kedro telemetry disable",
        "Opt out for this project alone:   write the line `consent: false`",
        "                                  into the file .telemetry in its root",
        f"Read more:  {kedro_telemetry.DOCUMENTATION}",
    ]
    assert (heap.connections, capfd.readouterr()) == ([], ("", ""))


def test_status_offers_to_opt_in_where_telemetry_is_off(project, monkeypatch):
    write(project / ".telemetry", NO)
    output = run("telemetry").output
    assert "Opt in for all your projects:     kedro telemetry enable\n" in output
    assert "Opt out for all" not in output
    assert "Opt out for this project alone:   write the line" in output


def test_status_shows_ids_and_how_long_posts_pause(project, config, known_user):
    stamp = write(config / "telemetry.backoff", "").stat().st_mtime
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp + HOUR))
    output = run("telemetry").output
    assert f"Identity:    {IDENTITY}\n" in output
    assert f"Project id:  {PROJECT_ID} (sent as a hash)\n" in output
    assert f"Paused:      until {end}, as Heap did not answer in time\n" in output


@pytest.mark.parametrize("line", ["telemetry", "telemetry enable", "telemetry disable"])
@pytest.mark.parametrize("is_denied", [True, False])
def test_messages_fit_into_80_columns_except_for_paths(
    line, is_denied, project, config, monkeypatch
):
    write(config / "telemetry.backoff", "")
    if is_denied:
        write(project / ".telemetry", NO)
    for make_it_fail in (False, True):
        if make_it_fail:
            monkeypatch.setattr(os, "replace", REFUSED)
        for text in run(line).output.splitlines():
            assert len(text) <= 80 or Path(text.strip()).is_absolute(), text


def test_status_on_a_CI_machine_promises_no_ids(new_project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    output = run("telemetry").output
    assert "Identity:    none\n" in output
    assert "Project id:  none\n" in output


def test_status_outside_of_projects_shows_no_project(config):
    (config / "pyproject.toml").mkdir(parents=True)  # which makes no project
    done = run("telemetry")
    assert (done.exit_code, "Project id" in done.output) == (0, False)


def test_status_loads_no_pipelines(project):
    write(project / PIPELINES, "raise SystemExit(5)")
    assert run("telemetry").exit_code == 0


def test_status_shows_why_telemetry_is_off(denied, monkeypatch):
    here = Path.cwd()
    monkeypatch.chdir(denied.project)  # where Kedro 0.18 finds the project
    cli = kedro_cli.KedroCLI(denied.project)
    monkeypatch.chdir(here)
    output = CliRunner().invoke(cli, ["telemetry"]).output
    reason = denied.reason.replace("\n", "\n             ")
    assert output.startswith(f"Telemetry:   off here\nReason:      {reason}\n")


@pytest.mark.parametrize("word", ["disable", "off"])
def test_disable_opts_out_for_all_projects(word, project, config, heap):
    file = config / ".telemetry"
    done = run(f"telemetry {word}")
    assert (done.exit_code, file.read_text()) == (0, "consent: false\n")
    assert done.output == (
        "You have opted out of telemetry for all your projects.\n"
        f"This is saved in\n{file}\n"
        "Versions of kedro-telemetry before 1.0 do not read this file.\n"
        "To opt out of those as well, set DO_NOT_TRACK=1 in your environment.\n"
    )
    run("info")
    assert heap.connections == []


@pytest.mark.parametrize("word", ["enable", "on"])
def test_enable_opts_in_for_all_projects(word, project, config, heap):
    file = write(config / ".telemetry", "consent: false\n")
    done = run(f"telemetry {word}")
    assert (done.exit_code, file.read_text()) == (0, "consent: true\n")
    assert done.output == (
        "You have opted in to telemetry for all your projects.\n"
        f"This is saved in\n{file}\n"
    )
    reason = f"Reason:      this file grants consent:\n             {file}\n"
    assert reason in run("telemetry").output
    assert kedro_telemetry.NOTICE not in run("info").output
    assert heap.commands == ["kedro info"]


def test_enable_says_where_telemetry_stays_off(project):
    write(project / ".telemetry", NO)
    shown = "Telemetry stays off here, as this file denies consent:\n"
    assert run("telemetry enable").output.endswith(f"{shown}{project}/.telemetry\n")


ADVICE = "\nTo opt out instead, set DO_NOT_TRACK=1 in your environment."


@pytest.mark.parametrize(("word", "advice"), [("enable", ""), ("disable", ADVICE)])
def test_without_a_home_folder_a_decision_cannot_be_saved(word, advice, no_home):
    done = run(f"telemetry {word}")
    shown = f"Nothing has changed\nReason: there is no home folder{advice}\n"
    assert (done.exit_code, done.output) == (1, f"Error: {shown}")


def a_read_only_decision(file: Path) -> None:
    write(file, YES).chmod(0o444)


def a_folder_as_decision(file: Path) -> None:
    file.mkdir(parents=True)


def a_file_as_its_folder(file: Path) -> None:
    write(file.parent, "")


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (a_read_only_decision, "read-only"),
        (a_folder_as_decision, "not a file, or too large"),
        pytest.param(a_file_as_its_folder, "File exists", marks=posix),
    ],
)
def test_a_decision_that_cannot_be_saved_changes_nothing(
    trouble, reason, config, tmp_path
):
    file = config / ".telemetry"
    trouble(file)
    before = set(files(tmp_path))
    done = run("telemetry disable")
    shown = f"Nothing has changed, as this file cannot be written:\n{file}\n"
    shown += f"Reason: {reason}{ADVICE}\n"
    assert (done.exit_code, done.output) == (1, f"Error: {shown}")
    assert set(files(tmp_path)) == before
    assert not file.is_file() or file.read_text() == YES


def test_an_error_names_the_file_that_the_user_knows(config, monkeypatch):
    error = PermissionError(13, "Permission denied", f"{config}/.temporary")
    monkeypatch.setattr(os, "replace", Mock(side_effect=error))
    shown = f"{config / '.telemetry'}\nReason: Permission denied\n"
    assert run("telemetry enable").output.endswith(shown)


def test_status_without_a_home_folder_names_no_file(no_home, user):
    done = run("telemetry")
    assert done.exit_code == 0
    assert "Identity:    none, as there is no home folder\nEndpoint" in done.output


@pytest.mark.parametrize("word", ["opt-out", "no", "stop", "status2", "disabel"])
def test_a_guess_leads_to_the_commands(word):
    done = run(f"telemetry {word}")
    assert done.exit_code == 2
    assert done.output.endswith(
        f"Error: kedro telemetry has no command '{word}'.\n"
        "To opt out, run: kedro telemetry disable\n"
        "To opt in, run:  kedro telemetry enable\n"
    )


def test_help_names_the_variables_and_the_documentation():
    output = run("telemetry --help").output
    documentation = kedro_telemetry.DOCUMENTATION
    for words in ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY", documentation):
        assert words in output
    listed = output.partition("Commands:")[2]
    commands = re.findall(r"^  ([a-z]+)", listed, re.MULTILINE)
    assert commands == ["disable", "enable", "status"]
    assert max(map(len, output.splitlines())) <= 80
    assert run("telemetry -h").output == output


def test_kedros_help_names_the_command(project, user, monkeypatch):
    line = r"^  telemetry +See whether telemetry is on"
    assert re.search(line, run("--help").output, re.MULTILINE)
    monkeypatch.chdir(user)
    assert re.search(line, run("--help").output, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "exit_code"),
    [("", 0), ("status", 0), ("enable", 0), ("--help", 0), ("nonsense", 2)],
)
def test_the_command_itself_is_not_reported(line, exit_code, project, heap):
    done = run(f"telemetry {line}")
    assert done.exit_code == exit_code
    assert kedro_telemetry.NOTICE not in done.output
    assert heap.connections == []


OWN_TELEMETRY = """
import click
@click.command()
def telemetry(): click.echo("a command of the same name")
cli = click.Group("mine", [telemetry])
"""


@since_kedro_0_19
def test_a_projects_own_command_telemetry_comes_first(project, heap):
    write(project / "src/spaceships/cli.py", OWN_TELEMETRY)
    done = run_python("-m", "kedro", "telemetry")
    assert done.stdout.endswith("a command of the same name\n")


@since_kedro_0_19
@pytest.mark.parametrize("group", ["global_commands", "project_commands"])
def test_a_plugins_own_command_telemetry_comes_first_in_a_project(
    group, project, tmp_path, heap
):
    site = tmp_path / "site"
    write(site / "plug.py", OWN_TELEMETRY)
    write(site / "plug-1.0.dist-info/METADATA", "Name: plug\nVersion: 1.0\n")
    points = f"[kedro.{group}]\nplug = plug:cli\n"
    write(site / "plug-1.0.dist-info/entry_points.txt", points)
    path = os.pathsep.join([str(site), os.environ["PYTHONPATH"]])
    done = run_python("-m", "kedro", "telemetry", PYTHONPATH=path)
    assert done.stdout.endswith("a command of the same name\n")


def test_where_the_command_cannot_be_added_the_others_work(monkeypatch, heap):
    hook = kedro_telemetry.telemetry_hook
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "kedro.framework.cli", None)
        hook.before_command_run(None, ["info"])
    hook.after_command_run()
    assert heap.commands == ["kedro info"]


# A vendored copy: it takes the place of an installed release

VENDORED_SETTINGS = """\
from .kedro_telemetry import telemetry_hook

HOOKS = (telemetry_hook,)
"""


@pytest.fixture
def vendored(project) -> Path:
    """A project with a copy of the module beside its settings."""
    shutil.copy(kedro_telemetry.__file__, project / "src/spaceships")
    write(project / SETTINGS, VENDORED_SETTINGS)
    return project


@pytest.fixture
def nothing_installed(monkeypatch) -> None:
    """A process that has imported no kedro-telemetry, and an environment without it."""
    for name in ("", ".plugin", ".api"):
        monkeypatch.delitem(sys.modules, f"kedro_telemetry{name}")
    monkeypatch.setattr(PluginManager, "load_setuptools_entrypoints", Mock())


@pytest.mark.parametrize(
    ("line", "command"), [("run --env local", "run --env *****"), ("info", "info")]
)
def test_a_vendored_copy_reports_in_place_of_an_installed_release(
    line, command, vendored, heap
):
    code = f"""
    import atexit, sys
    from kedro.framework.cli import main
    sys.argv = ["kedro", *{line.split()}]
    atexit.register(lambda: print(
        sys.modules["kedro_telemetry.plugin"].__file__,
        sys.modules["kedro_telemetry.api"] is sys.modules["kedro_telemetry"],
    ))
    main()
    """
    done = run_python("-c", code)
    assert heap.commands == [f"kedro {command}"]
    copied = vendored / "src/spaceships/kedro_telemetry.py"
    assert done.stdout.splitlines()[-1] == f"{copied} True"


def test_beside_a_vendored_copy_a_session_is_reported_once(vendored, heap):
    code = """
    from pathlib import Path
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project
    bootstrap_project(Path.cwd())
    assert KedroSession.create().load_context().catalog
    """
    assert run_python("-c", code).returncode == 0
    assert heap.commands == [None]
    assert heap.project_ids == {SPACESHIPS}


def test_a_vendored_copy_has_the_command(vendored):
    done = run_python("-m", "kedro", "telemetry")
    assert "Telemetry:   on here\n" in done.stdout
    write(vendored / SETTINGS, VENDORED_SETTINGS + "DO_NOT_TRACK = True\n")
    done = run_python("-m", "kedro", "telemetry")
    assert "Telemetry:   off here\nReason:      this file names DO_NOT" in done.stdout


def test_without_an_installed_release_a_copy_reports_sessions(
    vendored, heap, nothing_installed
):
    load_catalogs(vendored)
    assert heap.commands == [None]
    assert (
        sys.modules["kedro_telemetry.plugin"].__name__ == "spaceships.kedro_telemetry"
    )


def test_a_copy_leaves_an_installed_release_at_work_as_it_is(vendored, heap):
    load_catalogs(vendored)
    assert sys.modules["kedro_telemetry.plugin"] is kedro_telemetry
    assert heap.commands == [None]


def test_a_copy_logs_under_its_own_name(vendored, nothing_installed):
    bootstrap_project(vendored)
    copied = sys.modules["spaceships.kedro_telemetry"]
    assert copied.logger.name == "spaceships.kedro_telemetry"


# README: what it says is what happens

README_FILE = Path(__file__).with_name("README.md")
README = README_FILE.read_text(encoding="utf-8") if README_FILE.exists() else ""
needs_readme = pytest.mark.skipif(
    not README, reason="README.md is not beside the tests"
)

# Kedro's documentation links to those that are questions, and to the policy.
HEADINGS = [
    "What is kedro-telemetry?",
    "What data is being collected?",
    "See what is sent",
    "How is the data collected?",
    "How do I withdraw consent?",
    "What happens when I withdraw consent?",
    "Opt in, and hide the notice",
    "What licence do you use?",
    "Python version support policy",
    "What you can rely on",
    "Vendor it",
    "For plugin authors",
    "Work on it",
    "For the Kedro team: what changed from 0.9.0",
]


def readme_section(heading: str) -> str:
    return README.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def readme_block(language: str, text: str) -> str:
    """The one block of code in a part of README, without its indentation."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    return textwrap.dedent(blocks[0])


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the rows of the table below a heading."""
    lines = re.findall(r"^\| (.*) \|$", readme_section(heading), re.MULTILINE)
    return [line.split(" | ") for line in lines[2:]]


COLLECTED = "What data is being collected?"


@needs_readme
def test_links_from_kedros_documentation_find_their_headings():
    assert re.findall(r"^## (.*)", README, re.MULTILINE) == HEADINGS


@needs_readme
def test_links_inside_README_find_their_headings():
    headings = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", line).lower() for line in headings}
    links = re.findall(r"\]\(#(.*?)\)", README)
    assert links
    assert set(links) <= {anchor.replace(" ", "-") for anchor in anchors}


def kinds_of_property(when: str) -> set[str]:
    """The kinds of events that a row of README's table is about."""
    if when.startswith("always"):
        return {"command", "command in a project", "session"}
    if when.startswith("in a project"):
        return {"command in a project", "session"}
    if when.startswith("for a command"):
        return {"command", "command in a project"}
    assert when.startswith(("for a session", "where `number_of_pipelines`")), when
    return {"session"}


def is_in_this_kedro(when: str) -> bool:
    since = re.search(r"from Kedro (\d+)\.(\d+)", when)
    return since is None or (int(since[1]), int(since[2])) <= KEDRO


@needs_readme
@pytest.mark.parametrize("kind", ["command", "command in a project", "session"])
def test_the_table_has_every_property_with_its_condition(
    kind, project, user, heap, monkeypatch
):
    if KEDRO >= (1, 6):
        catalog = "v: {type: MemoryDataset, validator: pandera.A}\n"
        write(project / CATALOG, catalog)
    if kind == "command":
        monkeypatch.chdir(user)
    if kind == "session":
        bootstrap_project(project)
        len(kedro_project.pipelines)
        KedroSession.create(project_path=project).load_context().catalog  # noqa: B018
    else:
        run("info")
    sent = {re.sub(r"(_type_count)\..*", r"\1", name) for name in heap.properties}
    shown = {
        name.strip("`").partition(".<")[0]
        for name, when, *_ in table_rows(COLLECTED)
        if kind in kinds_of_property(when) and is_in_this_kedro(when)
    }
    assert shown - sent == set(), "README's table has what is not sent: change one."
    assert sent - shown == set(), "README's table lacks what is sent: add a row."


@needs_readme
@since_kedro_1
def test_the_example_of_an_event_is_one_of_kedro_run(project, heap):
    example = json.loads(readme_block("json", readme_section(COLLECTED)))
    assert run("run --env local").exit_code == 0
    assert list(heap.events[0]) == list(example)
    advice = "Add the property to the JSON example in README, in the module's order."
    assert list(heap.properties) == list(example["properties"]), advice
    assert example["properties"]["command"] == heap.properties["command"]
    assert example["properties"]["telemetry_version"] == kedro_telemetry.__version__
    for name, _, _, value in table_rows(COLLECTED):
        shown = example["properties"].get(name.strip("`"))
        shown = json.dumps(shown) if isinstance(shown, bool) else shown
        assert shown is None or str(shown)[:12] == value.strip("`")[:12], name


@needs_readme
def test_the_examples_in_README_are_of_one_project(project, config, heap):
    example = json.loads(readme_block("json", readme_section(COLLECTED)))
    shown = readme_block("", readme_section("What is kedro-telemetry?"))
    identity, project_id = re.findall(r"[0-9a-f]{32}", shown)
    hashed = hashed_id(project_id, "spaceflights")
    assert example["properties"]["project_id"] == hashed
    assert example["identity"] == example["properties"]["username"] == identity
    write(config / "telemetry.toml", f'[telemetry]\nuuid = "{identity}"\n')
    text = (project / "pyproject.toml").read_text()
    write(project / "pyproject.toml", text.replace(PROJECT_ID, project_id))
    output = run("telemetry").output
    output = output.replace(str(config), "/home/alice/.config/kedro")
    output = output.replace(str(project), "/home/alice/spaceflights")
    assert output.startswith(shown)


@needs_readme
@pytest.mark.parametrize(
    ("sentence", "constant"),
    [
        (r"CI machines are those.*?\. A fresh", "CI_VARIABLES"),
        (r"Tools are .*?\.", "KEDRO_TOOLS"),
        (r"Public libraries of validators are .*?\.", "PUBLIC_VALIDATORS"),
    ],
)
def test_a_list_in_README_is_that_of_the_module(sentence, constant):
    (text,) = re.findall(sentence, readme_section(COLLECTED), re.DOTALL)
    names = re.findall(r"`([^`]+)`", text)
    shown = tuple(name for name in names if name not in ("0", "false"))
    advice = f"README and {constant} disagree: change both."
    assert shown == getattr(kedro_telemetry, constant), advice


@needs_readme
def test_the_table_has_every_way_to_opt_out_that_is_tested():
    cells = [how for _, how in table_rows("How do I withdraw consent?")]
    shown = set(re.findall(r"`([^`]+)`", " ".join(cells)))
    shown -= {".telemetry", "settings.py"}
    tested = set(README_DENIALS)
    assert shown - tested == set(), "Try this code of README's table in README_DENIALS."
    assert tested - shown == set(), (
        "Show this way to opt out as code in README's table."
    )


def test_each_source_of_consent_has_a_denial_in_README(
    new_project, config, monkeypatch
):
    places = {"project": new_project, "config": config}
    (new_project / "notebooks").mkdir()
    monkeypatch.chdir(new_project / "notebooks")
    tried = set()
    for denial in README_DENIALS.values():
        paths = [Path(path.format(**places)) for path in denial.files]
        for path, text in zip(paths, denial.files.values(), strict=True):
            write(path, text)
        with monkeypatch.context() as patch:
            for name, value in denial.variables.items():
                patch.setenv(name, value)
            project = kedro_telemetry._Project(new_project)
            sources = list(kedro_telemetry._consent_sources(project))
        tried |= {i for i, source in enumerate(sources) if source.decision is False}
        for path in paths:
            write(path, "")
    advice = (
        "A source of consent has no denial that is tried. Add the way to opt out to "
        "README_DENIALS, with the reason that users are shown, and to README's table."
    )
    assert tried == set(range(len(sources))), advice


@pytest.fixture
def run_sh(tmp_path, monkeypatch) -> Callable[[str], subprocess.CompletedProcess]:
    """The function that runs a block of README in a shell, with this Python.

    Temporary folders that the block makes are below `tmp_path / "temporary"`.
    """
    if not os.path.exists("/bin/sh"):
        pytest.skip("the commands are for POSIX shells")
    for name, words in {"kedro": "-m kedro", "python3": ""}.items():
        script = f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n'
        write(tmp_path / "bin" / name, script).chmod(0o755)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")

    def run_sh(script: str) -> subprocess.CompletedProcess:
        return run_process(["/bin/sh", "-c", script])

    return run_sh


FAKE_VENV = """\
#!/bin/sh
# Makes the environment that README asks for out of the one in which the tests run.
[ "$*" = "-m venv .venv" ] || exit 9
mkdir -p .venv/bin
printf '#!/bin/sh\\n[ "$*" = "install {argument}" ]\\n' > .venv/bin/pip
printf '#!/bin/sh\\nexec {python} -m kedro "$@"\\n' > .venv/bin/kedro
printf '#!/bin/sh\\nexec {python} "$@"\\n' > .venv/bin/python
chmod +x .venv/bin/*
"""


@needs_readme
@pytest.mark.parametrize(
    ("index", "argument"), [(0, "."), (1, ".[test]")], ids=["see an event", "test"]
)
def test_the_two_commands_at_the_top_do_what_they_say(
    index, argument, run_sh, tmp_path, heap, monkeypatch
):
    block = readme_block("sh", README.partition("\n## ")[0])
    command = block.splitlines()[index]
    script = FAKE_VENV.format(python=sys.executable, argument=argument)
    write(tmp_path / "bin/python3", script).chmod(0o755)
    for file in (README_FILE, Path(__file__), Path(kedro_telemetry.__file__)):
        shutil.copy(file, Path.cwd())
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only -p no:cacheprovider")
    done = run_sh(command)
    assert done.returncode == 0, done.stdout + done.stderr
    if argument == ".":
        event = done.stderr.partition("would send:\n")[2]
        assert json.loads(event)["event"] == "CLI command"
    else:
        assert "test_kedro_run_sends_all_that_README_lists_once" in done.stdout
    assert heap.connections == []


class Proof(NamedTuple):
    """A promise in README, and a line of the module that breaks it by another one."""

    heading: str
    line: str
    broken: str


BODY = "    identity = _get_or_create_identity()\n"
IMPORTS = Proof(
    "None of your code is imported", BODY, '    __import__("spaceships.planted")\n'
)
FILES = Proof("What is stored, and where", BODY, '    Path("planted").touch()\n')
OUTPUT = Proof(
    "Exit status and standard output stay the same", BODY, '    print("planted")\n'
)
EXIT_STATUS = Proof(
    "Exit status and standard output stay the same", BODY, "    sys.exit(3)\n"
)
WAIT = Proof("A command waits two seconds at most", "DEADLINE = 2.0", "DEADLINE = 6\n#")


@pytest.fixture
def run_proof(run_sh, tmp_path, monkeypatch) -> Callable:
    """The function that runs the commands below a promise, which may be broken."""

    def run_proof(proof: Proof, is_broken: bool) -> subprocess.CompletedProcess:
        if is_broken:
            module = Path(kedro_telemetry.__file__).read_text(encoding="utf-8")
            assert proof.line in module, "The test is about a line that has changed."
            text = module.replace(proof.line, proof.broken + proof.line)
            write(tmp_path / "broken/kedro_telemetry.py", text)
            monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
        section = readme_section("What you can rely on")
        part = section.partition(f"### {proof.heading}\n")[2].partition("\n### ")[0]
        return run_sh(readme_block("sh", part))

    return run_proof


both_ways = pytest.mark.parametrize("is_broken", [False, True], ids=["kept", "broken"])


@needs_readme
@since_kedro_1
@both_ways
def test_the_proof_about_imports_shows_modules_of_python_only(
    is_broken, run_proof, project
):
    write(project / "src/spaceships/planted.py", "")
    done = run_proof(IMPORTS, is_broken)
    assert re.findall(r"Entries in the catalog: (\d+)", done.stderr) == ["4", "4"]
    lines = [line for line in done.stdout.splitlines() if line[0] in "<>"]
    imported = {line[1:].strip() for line in lines}
    assert "urllib.request" in imported
    roots = {name.partition(".")[0] for name in imported}
    known = roots <= set(sys.stdlib_module_names) | {"certifi"}
    assert known is not is_broken


@needs_readme
@since_kedro_1
@both_ways
def test_the_proof_about_files_shows_all_that_is_stored(
    is_broken, run_proof, new_project
):
    lines = run_proof(FILES, is_broken).stdout.splitlines()
    added = [line.removeprefix("> ") for line in lines if line.startswith(">")]
    names = {Path(line).name for line in added if line[:1] in (".", "/")}
    assert names - {"planted"} == {"pyproject.toml", "telemetry.toml"}
    assert ("planted" in names) is is_broken
    rest = [line for line in added if line[:1] not in (".", "/")]
    assert rest[:2] == ["", "[tool.kedro_telemetry]"]
    assert rest[2].startswith("project_id = ")
    assert len(rest) == 3


@needs_readme
@since_kedro_1
@pytest.mark.parametrize("proof", [OUTPUT, EXIT_STATUS], ids=["output", "exit status"])
@both_ways
def test_the_proof_about_exit_status_and_output_compares_them(
    is_broken, proof, run_proof, project
):
    done = run_proof(proof, is_broken)
    lines = done.stdout.splitlines()
    assert ("same" in lines) is not is_broken
    if not is_broken:
        statuses = ["exit status 0", "exit status 0", "exit status 1"]
        assert lines[:4] == ["same", *statuses]
        assert Path(lines[4]).name == "telemetry.toml"


@needs_readme
@both_ways
def test_the_proof_about_the_wait_measures_it(is_broken, run_proof, project, tmp_path):
    done = run_proof(WAIT, is_broken)
    seconds = [float(x) for x in re.findall(r"^([\d.]+) seconds$", done.stdout, re.M)]
    assert len(seconds) == 3
    assert seconds[1] >= (6 if is_broken else 2)
    assert is_broken or seconds[1] < 6
    assert len(list((tmp_path / "temporary").rglob("telemetry.backoff"))) == 1


@needs_readme
@pytest.mark.parametrize("command", ["run", "info"])
def test_the_logging_file_logs_what_is_sent(command, project, heap, known_user):
    section = readme_section("See what is sent")
    path = write(project / "conf/logging.yml", readme_block("yaml", section))
    done = run_python("-m", "kedro", command, KEDRO_LOGGING_CONFIG=str(path))
    assert done.returncode == 0
    assert len(heap.events) == 1
    log = (project / "telemetry.log").read_text()
    assert log.startswith("Post of {")
    assert log.endswith(": 200\n")
    assert "Post of" not in done.stdout


@needs_readme
def test_the_recipe_for_a_vendored_copy_reports_a_session(vendored, heap):
    recipe = readme_block("python", readme_section("Vendor it"))
    write(vendored / SETTINGS, recipe)
    code = "import atexit, sys; from kedro.framework.cli import main\n"
    code += "sys.argv = ['kedro', 'run']\n"
    code += "atexit.register(lambda: print(sys.modules['kedro_telemetry'].__name__))\n"
    done = run_python("-c", code + "main()")
    assert done.stdout.splitlines()[-1] == "spaceships.kedro_telemetry"
    assert heap.commands == ["kedro run"]


@needs_readme
def test_the_recipe_for_plugin_authors_sends_an_event(heap):
    recipe = readme_block("python", readme_section("For plugin authors"))
    assert run_python("-c", recipe).returncode == 0
    assert heap.events[0]["event"] == "my_plugin_did_it"
    assert heap.properties["how_often"] == 3


@needs_readme
def test_the_recipe_for_a_plugins_tests_shows_an_event(run_sh, heap):
    done = run_sh(readme_block("sh", readme_section("For plugin authors")))
    assert done.stderr.startswith("kedro-telemetry would send:\n{")
    assert heap.connections == []
