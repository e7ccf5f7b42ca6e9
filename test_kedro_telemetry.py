"""The specification of kedro-telemetry, in the order of the module.

What is sent here goes through a proxy to a TLS server that plays Heap, both of them on
loopback. Commands run by click's CliRunner, or as processes where the process matters.
"""

import contextlib
import copy
import gc
import json
import logging
import os
import re
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from hashlib import sha512
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
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
README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
IDENTITY = "0123456789abcdef" * 2
PROJECT_ID = "a" * 32
OTHER_PROJECT_ID = "b" * 32

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
    "DO_NOT_TRACK",
    "KEDRO_DISABLE_TELEMETRY",
    "CI",
    "GITLAB_CI",
    "GITHUB_ACTION",
    "BITBUCKET_BUILD_NUMBER",
    "JENKINS_URL",
    "CODEBUILD_BUILD_ID",
    "CIRCLECI",
    "TRAVIS",
    "BUILDKITE",
    "TF_BUILD",
    "TEAMCITY_VERSION",
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
    "SSL_CERT_DIR",
    "KEDRO_ENV",
    "KEDRO_LOGGING_CONFIG",
    "_KEDRO_COMPLETE",
)
HOME_VARIABLES = ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CONFIG_HOME")
MODULES_OF_TESTS = ("spaceships", "rockets", "plug", "idle", "kedro_datasets")

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such thing")
since_kedro_1 = pytest.mark.skipif(KEDRO < (1, 0), reason="Kedro < 1.0 tells no types")


# What the tests stand on: a Heap, a user, projects


class Heap(socketserver.ThreadingTCPServer):
    """A proxy and, behind it, Heap. `mode` is its status, or what goes wrong."""

    def __init__(self, pem: Path) -> None:
        super().__init__(("127.0.0.1", 0), ConnectionToHeap)
        self.mode = "200"
        self.signal: int | None = None  # to send to this process, when it connects
        self.connections: list[str] = []
        self.events: list[dict] = []
        self.headers: dict[str, str] = {}
        self.path = ""
        self.is_over = threading.Event()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(pem)

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
        if not isinstance(sys.exc_info()[1], OSError):  # the client may leave any time
            raise

    def hangs_if(self, mode: str) -> bool:
        return self.mode == mode and self.is_over.wait()


class ConnectionToHeap(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_CONNECT(self) -> None:
        heap = self.server
        heap.connections.append(self.path)
        if heap.signal is not None:
            heap.is_over.wait(0.2)  # until the main thread waits for the answer
            signal.pthread_kill(threading.main_thread().ident, heap.signal)
        if heap.mode == "reset" or heap.hangs_if("hang"):
            return
        self.send_response(200)
        self.end_headers()
        if heap.hangs_if("hang-tls"):
            return
        with heap.tls.wrap_socket(self.connection, server_side=True) as stream:
            if heap.mode == "close":
                linger = struct.pack("ii", 1, 0)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                return
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
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 20.0)  # a machine may be busy
    monkeypatch.setattr(kedro_telemetry, "_back_off_start", 0.0)
    monkeypatch.setattr(kedro_telemetry.telemetry_hook, "_command", None)
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
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{heap.server_address[1]}")
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
    command = [sys.executable, *map(textwrap.dedent, words)]
    env = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


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
    """What every event tells, as Kedro's extension for VS Code asks for it."""
    return kedro_telemetry._get_project_properties("", project_path)


def statistics(catalog: object) -> dict:
    """What the event of a session tells of a catalog that has just been created."""
    return kedro_telemetry._project_statistics(catalog, None)


def dataset_types(catalog: object) -> dict[str, int]:
    """How many datasets of each type the event of a session tells."""
    prefix = "dataset_type_count."
    return {
        name.removeprefix(prefix): count
        for name, count in statistics(catalog).items()
        if name.startswith(prefix)
    }


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    """The logger of the module, down to DEBUG."""
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
        "from kedro_telemetry.plugin import _get_project_properties",
        "from kedro_telemetry.plugin import ProjectMetadata",
    ],
)
def test_other_packages_find_the_names_that_they_import(line):
    done = run_python("-W", "ignore", "-c", line)
    assert (done.returncode, done.stderr) == (0, "")


def test_kedro_finds_the_hooks_and_nothing_that_it_would_compare_or_run():
    points = distribution("kedro-telemetry").entry_points
    assert {(point.group, point.value) for point in points} == {
        ("kedro.hooks", "kedro_telemetry:telemetry_hook"),
        ("kedro.cli_hooks", "kedro_telemetry:telemetry_hook"),
    }


def test_the_page_in_a_registry_leads_to_kedro():
    urls = distribution("kedro-telemetry").metadata.get_all("Project-URL")
    assert urls == [
        f"Documentation, {DOCUMENTATION}",
        "Source, https://github.com/kedro-org/kedro-plugins/tree/main/kedro-telemetry",
    ]


def test_ProjectMetadata_is_kedros_and_no_other_name_is_made_up():
    assert kedro_telemetry.plugin.ProjectMetadata is ProjectMetadata
    with pytest.raises(AttributeError, match="has no attribute 'KedroCLI'"):
        kedro_telemetry.plugin.KedroCLI  # noqa: B018


DOCUMENTATION = "https://docs.kedro.org/en/stable/about/telemetry/"
WIRE = "It is what Heap knows; the Kedro team must agree to another value."
PROMISE = "README promises it: search for it there, and change the sentence, too."
MESSAGE = "People read it; try it in a terminal, and change README where it tells it."
PUBLIC = "It decides what leaves a machine; say so in README."
CONSTANTS = [
    ("ENDPOINT", "https://heapanalytics.com/api/track", WIRE),
    ("APP_ID", "2388822444", WIRE),
    ("DOCUMENTATION", DOCUMENTATION, MESSAGE),
    ("BACK_OFF", 3600.0, PROMISE),
    ("LARGEST_FILE", 1_048_576, "Configuration files are far smaller."),
    ("LONGEST_TEXT", 1023, WIRE),
    ("LARGEST_NUMBER", 1e308, WIRE),
    ("MODULE", "kedro_telemetry", "The name of an installed copy."),
    ("IS_VENDORED", False, "An installed copy is not vendored."),
    ("COMMAND", "kedro telemetry", MESSAGE),
    ("EXAMPLE_COMMAND", "kedro info", MESSAGE),
    (
        "NOTICE",
        "\n"
        "Kedro collects anonymised usage data to improve the product.\n"
        "See whether it is on here, and why:  kedro telemetry\n"
        "Opt out:    kedro telemetry disable, or set DO_NOT_TRACK\n"
        f"Read more:  {DOCUMENTATION}",
        MESSAGE,
    ),
    (
        "STATUS_HELP",
        "\n"
        "See an event; nothing is sent:  KEDRO_TELEMETRY_DEBUG=1 kedro info\n"
        "Opt out for all your projects:  kedro telemetry disable\n"
        "Opt in for all your projects:   kedro telemetry enable\n"
        "What is collected, and other ways to opt out:\n"
        f"{DOCUMENTATION}",
        MESSAGE,
    ),
    ("NO_HOME", "there is no home folder to save it in", MESSAGE),
    ("OPT_OUT_VARIABLES", ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY"), PROMISE),
    (
        "CI_VARIABLES",
        (
            "CI",
            "GITLAB_CI",
            "GITHUB_ACTION",
            "BITBUCKET_BUILD_NUMBER",
            "JENKINS_URL",
            "CODEBUILD_BUILD_ID",
            "CIRCLECI",
            "TRAVIS",
            "BUILDKITE",
            "TF_BUILD",
            "TEAMCITY_VERSION",
        ),
        PROMISE,
    ),
    (
        "KEDRO_TOOLS",
        (
            "Linting",
            "Testing",
            "Custom Logging",
            "Documentation",
            "Data Structure",
            "PySpark",
            "Kedro Viz",
            "None",
        ),
        PUBLIC,
    ),
    (
        "PUBLIC_DATASETS",
        ("kedro.io.", "kedro_datasets.", "kedro_datasets_experimental."),
        PUBLIC,
    ),
    (
        "PUBLIC_VALIDATORS",
        ("pandera", "pydantic", "great_expectations", "kedro", "kedro_datasets"),
        PUBLIC,
    ),
    ("CUSTOM", "custom", WIRE),
    ("MASK", "*****", WIRE),
    ("SESSION_PLUGIN", "kedro-telemetry-session", "Other copies use it, too."),
    ("NO_DECISION", (None, "on by default: nobody has opted in or out"), MESSAGE),
]


@pytest.mark.parametrize(
    ("name", "value", "advice"), CONSTANTS, ids=[name for name, *_ in CONSTANTS]
)
def test_a_constant_is_what_others_rely_on(name, value, advice):
    told = f"{name} has changed. {advice} Then change it in CONSTANTS."
    assert getattr(kedro_telemetry, name) == value, told


def test_a_command_waits_two_seconds_as_README_promises():
    """The other tests wait longer, as a machine may be busy."""
    code = "import kedro_telemetry; print(kedro_telemetry.DEADLINE)"
    told = f"DEADLINE has changed. {PROMISE} Then change it in this test."
    assert run_python("-c", code).stdout == "2.0\n", told
    assert "two seconds" in README


def test_all_constants_are_in_the_table():
    names = {name for name in vars(kedro_telemetry) if name.isupper()}
    untold = names - {name for name, *_ in CONSTANTS} - {"DEADLINE", "TYPE_CHECKING"}
    assert not untold, f"Add {untold} to CONSTANTS above, with who relies on it."


# The hooks: one event for each command and each session

MEMORY = "kedro.io.memory_dataset.MemoryDataset"
QUIET = "quiet.yml"


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
        "project_id": hashed_id(PROJECT_ID, "spaceships"),
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
    assert heap.headers["Content-Type"] == "application/json"
    assert heap.headers["User-Agent"].startswith("kedro-telemetry/")


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
        ("run --env local", 0, "run"),
    ],
)
def test_a_command_is_reported_once_and_ends_as_ever(
    line, exit_code, main_command, project, heap
):
    heap.mode = "500"  # an event that does not arrive is not sent twice
    for _ in range(2):
        assert run(line).exit_code == exit_code
    words = [event["properties"]["main_command"] for event in heap.events]
    assert words == [main_command, main_command]


@pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 calls no hook then")
def test_a_command_that_raises_is_reported(project, heap):
    assert run("run --pipeline nonsense").exit_code == 1
    assert heap.commands == ["kedro run --pipeline *****"]


def test_a_session_after_a_command_is_reported_on_its_own(project, heap):
    run("info")
    load_catalogs(project)
    assert heap.commands == ["kedro info", None]
    assert heap.events[1]["event"] == "Kedro Project Statistics"


def test_a_session_is_reported_once_for_its_project(project, user, heap, monkeypatch):
    monkeypatch.chdir(user)
    for _ in range(2):
        load_catalogs(project)
    assert heap.commands == [None, None]
    assert heap.project_ids == {hashed_id(PROJECT_ID, "spaceships")}


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


def in_threads(function, *cases: object) -> None:
    """Call a function with each case, all at once."""
    threads = [threading.Thread(target=function, args=[case]) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_sessions_in_threads_are_each_reported_once(project, heap, config):
    bootstrap_project(project)
    write(config / "telemetry.notice", "")

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


SPACESHIPS = hashed_id(PROJECT_ID, "spaceships")
ROCKETS = hashed_id(OTHER_PROJECT_ID, "rockets")


def test_interleaved_sessions_are_each_reported_for_their_own_project(
    project, other_project, heap
):
    write(
        other_project / CATALOG, "a: {type: MemoryDataset}\nb: {type: MemoryDataset}\n"
    )
    interleave(project, other_project)
    told = [
        (event["properties"]["project_id"], event["properties"]["number_of_datasets"])
        for event in heap.events
    ]
    assert told == [(SPACESHIPS, 1), (ROCKETS, 2)]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".telemetry", "consent: false\n"),
        ("src/rockets/settings.py", "KEDRO_DISABLE_TELEMETRY = True\n"),
        ("src/rockets/settings.py", "DISABLE_HOOKS_FOR_PLUGINS = 'kedro_telemetry'\n"),
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
    told = [
        (event["event"], event["properties"]["project_id"]) for event in heap.events
    ]
    expected = [("CLI command", SPACESHIPS)]
    if not text:
        expected.insert(0, ("Kedro Project Statistics", ROCKETS))
    assert told == expected
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


@pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 cannot be copied at all")
def test_a_session_is_copied_as_without_telemetry(project, heap):
    context = create_session(project).load_context()
    copied = copy.deepcopy(context._hook_manager)
    assert copied.has_plugin("kedro-telemetry-session")


def test_where_a_variable_opts_out_nothing_is_registered(project, monkeypatch):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    context = create_session(project).load_context()
    assert not context._hook_manager.has_plugin("kedro-telemetry-session")


def test_the_users_hooks_have_seen_the_catalog_before_it_is_reported(project, heap):
    settings = """
    from kedro.framework.hooks import hook_impl
    from kedro.io import MemoryDataset
    class AddDataset:
        @hook_impl
        def after_catalog_created(self, catalog):
            if hasattr(catalog, "add"):
                catalog.add("added", MemoryDataset(1))
            else:
                catalog["added"] = MemoryDataset(1)
    HOOKS = (AddDataset(),)
    """
    write(project / SETTINGS, settings)
    create_session(project).load_context().catalog  # noqa: B018
    assert heap.properties["number_of_datasets"] == 2


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


@pytest.mark.parametrize(
    "thing",
    [None, 5, "text", [None], Trap()],
    ids=["None", "number", "text", "list", "trap"],
)
def test_no_hook_raises_whatever_it_is_handed(thing, heap):
    hook = kedro_telemetry.KedroTelemetryHook()
    hook.before_command_run(project_metadata=thing, command_args=thing)
    hook.before_command_run(project_metadata=None, command_args=thing)
    hook.before_command_run(project_metadata=thing, command_args=["info"])
    hook.after_context_created(context=thing)
    hook.after_context_created(context=SimpleNamespace(_hook_manager=thing))
    hook.after_command_run()
    assert send_telemetry_event(thing, {"x": thing}, thing) in (True, False)
    assert send_telemetry_event("x", thing) in (True, False)


def test_no_catalog_ends_a_session(project, heap):
    manager = PluginManager("kedro")
    context = SimpleNamespace(_hook_manager=manager, project_path=project)
    for thing in (5, "text", Trap()):
        kedro_telemetry.telemetry_hook.after_context_created(context)
        manager.hook.after_catalog_created(catalog=thing)
        manager.unregister(name="kedro-telemetry-session")
    assert heap.events == []


def test_TAB_sends_nothing(heap, monkeypatch):
    monkeypatch.setenv("_KEDRO_COMPLETE", "bash_complete")
    assert send_telemetry_event("x") is False
    assert heap.connections == []


# send_telemetry_event: for other plugins


def test_a_plugin_sends_an_event_of_its_own(project, heap):
    own = {
        "text": "a" * 2000,
        "number": 1.5,
        "large": 9.9e307,
        "too_large": 1e308,
        "truth": True,
        "nothing": None,
        "nested": {"a": [1]},
        "endless": float("inf"),
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
        "large": 9.9e307,
        "too_large": "1e+308",
        "truth": True,
        "nested": "{'a': [1]}",
        "endless": "inf",
        "k" * 1023: 1,
        "7": 7,
    }
    assert added["username"] == heap.events[0]["identity"]
    assert "mine" not in added.values()


def test_an_event_outside_of_projects_tells_of_none(heap):
    assert send_telemetry_event("outside", {"project_id": "x", "tools": "x"}) is True
    assert not {"project_id", "tools", "example_pipeline"} & set(heap.properties)


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
    "consent : y",
    "consent: true\r\n",
    "consent: true\r",
    "\ufeffconsent: true  \t\n\n",
    "# consent: false\nconsent: true",
    "consent: true\n  \nconsent: yes\n",
]
SAY_NOTHING = ["", "\n", " \t\r\n", "# consent: no", "#", "\ufeff"]
NO_GRANTS = [
    "consent: false",
    "consent=false",
    "consent: n",
    "consent: 0",
    "Consent: No",
    "consent: maybe",
    "consent:",
    "consent",
    "consent: true false",
    "consent: true#no",
    "consent: 2",
    "consent: tru\u0435",
    "con\u017fent: true",
    "{consent: true}",
    "- consent: true",
    "my_consent: true",
    "consents: true",
    "noconsent",
    "consent: 'true",
    "'consent\": true",
    "consent:: true",
    "consent 1",
    "consent: true;",
    "consent: [true]",
    "consent: truer",
    "consent.given: true",
    " consent: true",
    "\tconsent: true",
    " # a comment starts a line\nconsent: true",
    "consent: true\nother: 1",
    "other: no",
    "no",
    "---\nconsent: true",
    "{issue: TEAM#12, consent: false}",
    "KEDRO_DISABLE_TELEMETRY=1\nDO_NOT_TRACK=1\n",
    "<<<<<<< HEAD\nconsent: true\n=======\nconsent: false\n>>>>>>> other\n",
    "consent: true\nconsent: false",
    "consent: false\nconsent: true",
    "consent: true".encode("utf-16"),
    "consent: true".encode("utf-16-le"),
    b"consent: true\n\xff",
    b"consent: true\n#" + b"#" * 2**20,
]


@pytest.mark.parametrize("text", GRANTS)
def test_a_file_that_plainly_says_so_grants_consent(text, user):
    write(user / ".telemetry", text.encode())
    assert kedro_telemetry._check_for_telemetry_consent(None) is True


@pytest.mark.parametrize("text", NO_GRANTS)
def test_a_file_that_says_anything_else_denies_consent(text, user):
    data = text if isinstance(text, bytes) else text.encode()
    write(user / ".telemetry", data)
    assert kedro_telemetry._check_for_telemetry_consent(None) is False


@pytest.mark.parametrize("text", SAY_NOTHING)
def test_a_file_that_says_nothing_decides_nothing(text, user):
    write(user / ".telemetry", text.encode())
    assert kedro_telemetry._check_for_telemetry_consent(None) is None


def test_a_file_of_the_largest_size_is_read(user):
    write(user / ".telemetry", b"consent: true\n".ljust(2**20, b"\n"))
    assert kedro_telemetry._check_for_telemetry_consent(None) is True


YES = "consent: true\n"
NO = "consent: false\n"


class Denial(NamedTuple):
    """What a user does to opt out, with the reason that they are told.

    The files are written as a whole. In paths and reasons, {project} is the root of the
    project, in whose folder `notebooks` the user is, and {config} the configuration
    folder.
    """

    reason: str
    variables: Mapping[str, str] = MappingProxyType({})
    files: Mapping[str, str] = MappingProxyType({})


DISABLE_HOOKS = "DISABLE_HOOKS_FOR_PLUGINS is set in spaceships.settings"
SETTINGS_FILE = "{project}/" + SETTINGS


def denial_in_settings(text: str, reason: str) -> Denial:
    return Denial(reason, files={SETTINGS_FILE: text})


def denial_in_file(path: str) -> Denial:
    return Denial(f"{path} denies consent", files={path: NO})


# The ways to opt out that README's table tells, by the code that it shows
README_DENIALS = {
    "DO_NOT_TRACK": Denial("DO_NOT_TRACK is set", {"DO_NOT_TRACK": "1"}),
    "KEDRO_DISABLE_TELEMETRY": Denial(
        "KEDRO_DISABLE_TELEMETRY is set", {"KEDRO_DISABLE_TELEMETRY": "1"}
    ),
    "kedro telemetry disable": denial_in_file("{config}/.telemetry"),
    "kedro new --telemetry=no": denial_in_file("{project}/.telemetry"),
    "consent: false": denial_in_file("{project}/notebooks/.telemetry"),
    'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)': denial_in_settings(
        'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n', DISABLE_HOOKS
    ),
    "KEDRO_DISABLE_TELEMETRY = True": denial_in_settings(
        "KEDRO_DISABLE_TELEMETRY = True\n",
        "KEDRO_DISABLE_TELEMETRY is set in spaceships.settings",
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
    "a file above the project": denial_in_file("{project}/../.telemetry"),
    "the user, and not the project": Denial(
        "{config}/.telemetry denies consent",
        files={"{config}/.telemetry": NO, "{project}/.telemetry": YES},
    ),
    "the project, and not the user": Denial(
        "{project}/.telemetry denies consent",
        files={"{project}/.telemetry": NO, "{config}/.telemetry": YES},
    ),
    "a plugin's name alone": denial_in_settings(
        'DISABLE_HOOKS_FOR_PLUGINS = "kedro-telemetry"\n', DISABLE_HOOKS
    ),
    "a plugin's name with an underscore": denial_in_settings(
        'DISABLE_HOOKS_FOR_PLUGINS = ["other", "kedro_telemetry"]\n', DISABLE_HOOKS
    ),
    "a plugin's name in capitals": denial_in_settings(
        'DISABLE_HOOKS_FOR_PLUGINS = {"Kedro-Telemetry"}\n', DISABLE_HOOKS
    ),
    "a plugin's name with a dot": denial_in_settings(
        'DISABLE_HOOKS_FOR_PLUGINS = ["kedro.telemetry"]\n', DISABLE_HOOKS
    ),
    "a plugin's name in one": denial_in_settings(
        'DISABLE_HOOKS_FOR_PLUGINS = ("KedroTelemetry",)\n', DISABLE_HOOKS
    ),
    "a variable's name in settings, to any value": denial_in_settings(
        "DO_NOT_TRACK = False\n", "DO_NOT_TRACK is set in spaceships.settings"
    ),
    "settings that cannot be imported": denial_in_settings(
        "import gone\n", "spaceships.settings could not be imported"
    ),
    "settings that make no sense": denial_in_settings(
        "DISABLE_HOOKS_FOR_PLUGINS = None\n", "spaceships.settings could not be read"
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
        write(Path(path.format(**places)).resolve(), text)
    here = new_project / "notebooks"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    reason = denial.reason.format(**places).replace(f"spaceships{os.sep}..{os.sep}", "")
    return Denied(new_project, reason)


def by_a_command(project: Path) -> None:
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(bootstrap_project(project), ["registry", "list"])
    hook.after_command_run()


def by_a_session(project: Path) -> None:
    with contextlib.suppress(ImportError, TypeError):  # of settings that Kedro refuses
        load_catalogs(project)


def by_another_plugin(project: Path) -> None:
    assert send_telemetry_event("x", {"a": 1}, project) is False


def by_kedro_viz(project: Path) -> None:
    assert kedro_telemetry._check_for_telemetry_consent(project) is False


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
    bootstrap_project(denied.project)
    for module in ("http.client", "urllib.request"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    before = files(tmp_path)
    way_out(denied.project)
    assert files(tmp_path) == before
    assert heap.connections == []
    assert not {"http.client", "urllib.request"} & set(sys.modules)


def test_after_a_denial_the_debug_mode_tells_the_reason(denied, monkeypatch, capfd):
    bootstrap_project(denied.project)
    capfd.readouterr()
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x", {}, denied.project) is False
    told = f"kedro-telemetry sends nothing: {denied.reason}\n"
    assert capfd.readouterr() == ("", told)


def test_after_a_denial_there_is_no_identity(monkeypatch, user):
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    assert kedro_telemetry._get_or_create_uuid() == ""
    assert files(user) == {}


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


def test_a_project_without_settings_denies_nothing(project, heap):
    (project / SETTINGS).unlink()
    run("info")
    assert heap.commands == ["kedro info"]


def test_settings_that_kedro_has_not_loaded_deny_nothing(project, other_project, heap):
    write(other_project / "src/rockets/settings.py", "import gone\n")
    bootstrap_project(project)
    assert send_telemetry_event("x", {}, other_project) is True


def test_a_package_that_cannot_be_imported_is_not_run_again(project, heap, capfd):
    write(project / "src/spaceships/__init__.py", "print('run')\nimport gone\n")
    bootstrap_project(project)
    assert "run" in capfd.readouterr().out
    assert send_telemetry_event("x", {}, project) is False
    assert "run" not in capfd.readouterr().out
    assert heap.connections == []


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


def a_folder_without_permission(path: Path) -> None:
    write(path, YES).parent.chmod(0)


not_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root may read everything"
)


@pytest.mark.parametrize(
    "make",
    [
        a_folder,
        pytest.param(a_dangling_symlink, marks=posix),
        pytest.param(a_loop, marks=posix),
        pytest.param(a_pipe, marks=posix),
        pytest.param(a_file_without_permission, marks=not_root),
        pytest.param(a_folder_without_permission, marks=not_root),
    ],
)
def test_what_cannot_be_read_denies_consent(make, config, heap, monkeypatch, capfd):
    config.mkdir(parents=True)
    make(config / ".telemetry")
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x") is False
    assert f"{config / '.telemetry'} cannot be read" in capfd.readouterr().err
    with contextlib.suppress(OSError):
        config.chmod(0o700)


@pytest.mark.parametrize(
    ("place", "is_sent"),
    [
        ("home/a/b/.telemetry", False),
        ("home/a/.telemetry", False),
        ("home/.telemetry", False),
        (".telemetry", False),
        ("home/a/b/c/.telemetry", True),
        ("home/a/x/.telemetry", True),
    ],
)
def test_a_file_counts_in_the_current_directory_and_above(
    place, is_sent, user, tmp_path, heap, monkeypatch
):
    here = user / "a/b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    write(tmp_path / place, NO)
    assert send_telemetry_event("x") is is_sent
    assert send_telemetry_event("x", project_path=tmp_path / "project") is is_sent


def test_a_file_in_the_current_directory_counts_for_a_packaged_project(
    project, user, heap, monkeypatch
):
    monkeypatch.syspath_prepend(str(project / "src"))
    kedro_project.configure_project("spaceships")
    monkeypatch.chdir(user)
    conf_source = str(project / "conf")
    for text in ("", NO):
        write(user / ".telemetry", text)
        session = KedroSession.create(conf_source=conf_source)
        assert session.load_context().catalog
    assert heap.commands == [None]


@pytest.mark.parametrize("place", [".telemetry", "../.telemetry"])
def test_a_file_in_the_projects_root_or_above_counts_from_anywhere(
    place, project, user, monkeypatch
):
    write(project / place, NO)
    monkeypatch.chdir(user)
    assert kedro_telemetry._check_for_telemetry_consent(project) is False
    assert kedro_telemetry._check_for_telemetry_consent(None) is None


@posix
def test_a_deleted_current_directory_denies_nothing(user, heap, monkeypatch):
    (user / "gone").mkdir()
    monkeypatch.chdir(user / "gone")
    (user / "gone").rmdir()
    assert kedro_telemetry._get_or_create_uuid() != ""
    assert send_telemetry_event("x") is True


def test_kedros_tests_can_patch_the_question_for_consent(project, heap, monkeypatch):
    check = Mock(return_value=None)
    monkeypatch.setattr("kedro_telemetry.plugin._check_for_telemetry_consent", check)
    run("run")
    check.assert_called_once_with(project)
    assert len(heap.events) == 1
    check.return_value = False
    run("run")
    assert (check.call_count, len(heap.events)) == (2, 1)


# What is printed: the notice, once, and the debug mode


def test_the_notice_is_shown_once_on_standard_error(heap, config, capfd):
    for _ in range(2):
        assert send_telemetry_event("x") is True
    assert capfd.readouterr() == ("", kedro_telemetry.NOTICE + "\n")
    assert (config / "telemetry.notice").read_bytes() == b""


def test_the_notice_is_remembered_where_there_is_no_folder_yet(user, heap, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setattr(sys, "platform", "linux")
    assert send_telemetry_event("x") is True
    assert (user / ".config/kedro/telemetry.notice").exists()


def test_the_notice_is_short():
    lines = kedro_telemetry.NOTICE.splitlines()
    assert lines[0] == "", "An empty line sets it off from the output before it."
    assert len(lines[1:]) <= 4
    assert max(map(len, lines)) <= 80, "It is read in terminals of 80 columns."


def test_after_a_grant_there_is_no_notice(user, heap, capfd):
    write(user / ".telemetry", YES)
    assert send_telemetry_event("x") is True
    assert capfd.readouterr() == ("", "")


def test_where_standard_error_is_closed_the_event_is_sent(heap, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert send_telemetry_event("x") is True


def test_where_standard_error_is_no_longer_open_the_event_is_sent(
    heap, tmp_path, monkeypatch
):
    with open(tmp_path / "errors", "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    assert send_telemetry_event("x") is True


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a full device")
def test_where_standard_error_is_full_the_event_is_sent(heap, config, monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert send_telemetry_event("x") is True
    assert not (config / "telemetry.notice").exists()


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
    assert "project_id" in event["properties"]


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


def test_commands_that_start_at_once_agree_on_their_ids(new_project, config):
    code = """
    from pathlib import Path
    import kedro_telemetry
    print(kedro_telemetry._get_project_properties("", Path.cwd())["project_id"])
    print(kedro_telemetry._get_or_create_uuid())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    crowd = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    told = {process.communicate(timeout=60)[0] for process in crowd}
    assert len(told) == 1, "The first id to be stored counts, for all of them."
    assert stored_uuid(config) in told.pop()
    text = (new_project / "pyproject.toml").read_text()
    assert text.startswith(KEDRO_TABLE)
    assert text.count("project_id") == 1


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
    told = base_properties(tmp_path)["project_id"]
    assert told == hashed_id(hashed, "undefined_package_name")
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


# Properties: what every event tells, and what a session does


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
def test_of_tools_only_kedros_own_are_told(written, sent, tmp_path):
    write(tmp_path / "pyproject.toml", f"[tool.kedro]\ntools = {written}\n")
    assert base_properties(tmp_path).get("tools") == sent


def test_a_project_without_tools_tells_of_none(tmp_path):
    write(tmp_path / "pyproject.toml", "[tool.kedro]\n")
    assert not {"tools", "example_pipeline"} & set(base_properties(tmp_path))


@pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 has no tools")
def test_all_tools_that_kedro_offers_are_told():
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
def test_of_an_example_pipeline_only_its_being_there_is_told(written, sent, tmp_path):
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


def test_datasets_are_counted_without_parameters():
    catalog = SimpleNamespace(list=OLD_NAMES.copy)  # as Kedro had before 1.0
    assert statistics(catalog)["number_of_datasets"] == 2


# Nothing of the user's is run: pipelines count where Kedro has loaded them


@pytest.mark.parametrize(
    ("registry", "told"),
    [
        (REGISTRY, {"number_of_pipelines": 2, "number_of_nodes": 3}),
        (REGISTRY.replace("__default__", "first"), {"number_of_pipelines": 2}),
        ("def register_pipelines(): return None", {}),
    ],
)
def test_pipelines_that_kedro_has_loaded_are_counted(registry, told, project):
    write(project / PIPELINES, registry)
    bootstrap_project(project)
    with contextlib.suppress(TypeError):
        len(kedro_project.pipelines)
    found = statistics(SimpleNamespace(list=list))
    names = ("number_of_pipelines", "number_of_nodes")
    assert {name: found[name] for name in names if name in found} == told


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
        bare = run_python(*words, DO_NOT_TRACK="1", KEDRO_LOGGING_CONFIG=QUIET)
        done = run_python(*words, CI="1", KEDRO_LOGGING_CONFIG=QUIET)
        assert (done.returncode, done.stdout) == (bare.returncode, bare.stdout)


@pytest.mark.skipif(KEDRO < (1, 5), reason="Kedro loads all pipelines before 1.5")
def test_pipelines_are_not_counted_where_kedro_loads_some_only(project, heap):
    assert run("run --pipelines other").exit_code == 0
    assert not {"number_of_pipelines", "number_of_nodes"} & set(heap.properties)


# Types of datasets: told by their source files, without an import

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
    ("declared", "told"),
    [
        ("MemoryDataset", MEMORY),
        ("kedro.io.MemoryDataset", MEMORY),
        (MEMORY, MEMORY),
        ("kedro.io.CachedDataset", CACHED),
        (CACHED, CACHED),
        ("pandas.CSVDataset", CSV),
        ("pandas.csv_dataset.CSVDataset", CSV),
        ("kedro_datasets.pandas.CSVDataset", CSV),
        (CSV, CSV),
        ("kedro_datasets_experimental.pandas.CSVDataset", EXPERIMENTAL),
        (EXPERIMENTAL, EXPERIMENTAL),
        ("kedro.io.Secret", "custom"),
        ("kedro.iox.Secret", "custom"),
        ("pandas.Secret", "custom"),
        ("pandas.csv_dataset.Secret", "custom"),
        ("pandas.secret.CSVDataset", "custom"),
        ("broken.Secret", "custom"),
        ("secret.CSVDataset", "custom"),
        ("kedro_datasets.Secret", "custom"),
        ("acme.pandas.CSVDataset", "custom"),
        ("acme", "custom"),
        ("..", "custom"),
        ("", "custom"),
        ("/home/alice/pandas.CSVDataset", "custom"),
        ("pandas./home/alice.CSVDataset", "custom"),
        ("pandas/../pandas.CSVDataset", "custom"),
        (["pandas.CSVDataset"], "custom"),
        (None, "custom"),
        (CachedDataset, CACHED),
        (type("Secret", (MemoryDataset,), {}), "custom"),
    ],
)
def test_a_declared_type_is_told_by_its_public_name(declared, told, datasets):
    assert dataset_types(catalog_of({"a": {"type": declared}})) == {told: 1}


def catalog_of(configs: dict) -> SimpleNamespace:
    """A catalog that declares datasets and is not to be asked for their types."""
    return SimpleNamespace(
        keys=configs.keys,
        config_resolver=SimpleNamespace(config=configs),
        get_type=Mock(side_effect=SystemExit("imported")),
    )


@since_kedro_1
def test_a_bad_entry_of_a_catalog_costs_its_own_name_only(datasets):
    configs = {"a": ["x"], "b": {}, 3: {"type": "MemoryDataset"}, "d": None}
    assert dataset_types(catalog_of(configs)) == {"custom": 3, MEMORY: 1}


@since_kedro_1
def test_a_session_with_a_bad_entry_is_reported(project, heap):
    write(
        project / CATALOG, "a: {type: [pandas.CSVDataset]}\nb: {type: MemoryDataset}\n"
    )
    load_catalogs(project)
    assert heap.properties["dataset_type_count.custom"] == 1
    assert heap.properties[f"dataset_type_count.{MEMORY}"] == 1


@since_kedro_1
def test_datasets_that_are_added_by_code_tell_their_types():
    catalog = DataCatalog.from_config({"a": {"type": "MemoryDataset"}})
    catalog["b"] = MemoryDataset(1)
    catalog["MemoryDataset"] = type("Secret", (MemoryDataset,), {})(1)
    catalog["params:d"] = 1
    assert dataset_types(catalog) == {MEMORY: 2, "custom": 1}


@since_kedro_1
def test_a_type_that_many_datasets_have_is_looked_up_once(datasets, monkeypatch):
    configs = {str(number): {"type": "pandas.CSVDataset"} for number in range(9)}
    look_up = Mock(wraps=kedro_telemetry._declared_class)
    monkeypatch.setattr(kedro_telemetry, "_declared_class", look_up)
    assert dataset_types(catalog_of(configs)) == {CSV: 9}
    look_up.assert_called_once_with("pandas.CSVDataset")


def test_a_catalog_of_the_users_own_kind_is_asked():
    types = {"a": "kedro.io.X", "b": None, "c": "acme.X"}
    catalog = SimpleNamespace(keys=types.keys, get_type=types.get)
    assert dataset_types(catalog) == {"kedro.io.X": 1, "custom": 2}


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


def test_validators_are_counted_by_public_library():
    specs = {name: SimpleNamespace(class_path=path) for name, path in VALIDATED.items()}
    catalog = SimpleNamespace(list=list, validator_specs=specs)
    found = statistics(catalog)
    assert found["number_of_validated_datasets"] == 8
    prefix = "validator_type_count."
    assert {name: found[name] for name in found if name.startswith(prefix)} == {
        "validator_type_count.pandera": 2,
        "validator_type_count.pydantic": 1,
        "validator_type_count.great_expectations": 1,
        "validator_type_count.kedro": 1,
        "validator_type_count.kedro_datasets": 1,
        "validator_type_count.custom": 2,
    }


@pytest.mark.skipif(KEDRO < (1, 6), reason="validators came with Kedro 1.6")
def test_validators_of_a_real_catalog_are_counted(project, heap):
    write(project / CATALOG, "a: {type: MemoryDataset, validator: pandera.api.A}\n")
    load_catalogs(project)
    assert heap.properties["number_of_validated_datasets"] == 1
    assert heap.properties["validator_type_count.pandera"] == 1


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
class Open(click.Group):
    def get_command(self, ctx, name): return click.Command(name)
everywhere = click.Group("everywhere", [fly])
partial = click.Command("partial", callback=functools.partial(print))
no_file = {}
exec("def f(): ...", no_file)
made_up = click.Command("made-up", callback=no_file["f"])
deck = Lazy("deck", callback=plug_commands.deck)
renamed = click.Command("renamed", callback=plug_commands.renamed)
class Default(click.Group):
    def get_command(self, ctx, name): return renamed
inside = click.Group("inside", [deck, Open("open"), partial, made_up, renamed])
inside.add_command(Default("default", callback=plug_commands.deck))
inside.add_command(renamed, "alias")
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
    ("open x", "*****"),
    ("partial", "*****"),
    ("made-up", "*****"),
    ("renamed", "renamed"),
    ("alias", "*****"),
    ("default renamed", "default renamed"),
    ("default /home/alice", "default *****"),
]


@pytest.mark.parametrize(("line", "told"), MASKED)
def test_what_kedro_or_a_plugin_defines_is_clear_and_all_else_masked(
    line, told, plugin, heap
):
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(project_metadata=None, command_args=line.split())
    hook.after_command_run()
    assert heap.commands == [f"kedro {told}".removesuffix(" kedro")]
    assert heap.properties["main_command"] == told.split()[0]
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


@pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 forgets its own command then")
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
    mode, outcome, heap, log, known_user
):
    heap.mode = mode
    assert send_telemetry_event("x") is (outcome == "200")
    (line,) = log.messages
    posted = re.fullmatch(rf"Post of (\{{.*\}}): {outcome}", line)
    assert json.loads(posted[1])["event"] == "x"
    assert len(heap.connections) == 1


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
    assert send_telemetry_event("x", {"a": Trap()}) is False
    assert log.messages == ["An event was lost: RuntimeError"]
    monkeypatch.setattr(log.handler, "emit", Mock(side_effect=error))
    assert send_telemetry_event("x", {"a": Trap()}) is False
    assert send_telemetry_event("x") is True


def test_where_no_thread_can_start_an_event_is_lost(heap, monkeypatch):
    error = RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=error))
    assert send_telemetry_event("x") is False
    assert heap.connections == []


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
    assert log.messages[1:] == [
        "A post was left out, as the last one had no answer in time"
    ]
    assert len(heap.connections) == 1


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


HOUR = 3600


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
def test_after_a_post_without_an_answer_none_is_made_for_an_hour(
    age, is_sent, heap, config
):
    start = time.time() - age
    os.utime(write(config / "telemetry.backoff", ""), (start, start))
    assert send_telemetry_event("x") is is_sent
    assert bool(heap.connections) is is_sent


def test_an_old_stamp_is_renewed(heap, config, short_deadline):
    """Also one of root's, which nobody else may change."""
    stamp = write(config / "telemetry.backoff", "")
    os.utime(stamp, (1, 1))
    stamp.chmod(0o444)
    old = stamp.stat().st_ino
    keep = config / "keep"
    os.link(stamp, keep)
    heap.mode = "hang"
    send_telemetry_event("x")
    assert abs(time.time() - stamp.stat().st_mtime) < 60
    assert keep.stat().st_ino == old
    assert keep.stat().st_mtime == 1


def test_where_no_stamp_can_be_stored_each_process_waits_once(
    heap, config, short_deadline, monkeypatch
):
    heap.mode = "hang"
    write(config, "a file")
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1
    heap.mode = "200"
    hour_ago = kedro_telemetry._back_off_start - HOUR - 60
    monkeypatch.setattr(kedro_telemetry, "_back_off_start", hour_ago)
    assert send_telemetry_event("x") is True


@not_root
def test_where_an_old_stamp_cannot_be_renewed_each_process_waits_once(
    heap, config, short_deadline
):
    os.utime(write(config / "telemetry.backoff", ""), (1, 1))
    config.chmod(0o500)
    heap.mode = "hang"
    for _ in range(2):
        assert send_telemetry_event("x") is False
    config.chmod(0o700)
    assert len(heap.connections) == 1


def test_where_the_stamp_is_a_folder_each_process_waits_once(
    heap, config, short_deadline
):
    (config / "telemetry.backoff").mkdir(parents=True)
    os.utime(config / "telemetry.backoff", (1, 1))
    heap.mode = "hang"
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1


def test_without_a_home_folder_each_process_waits_once(heap, no_home, short_deadline):
    heap.mode = "hang"
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1


def test_a_stamp_that_is_deleted_ends_the_back_off(heap, config, short_deadline):
    heap.mode = "hang"
    send_telemetry_event("x")
    (config / "telemetry.backoff").unlink()
    heap.mode = "200"
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
    assert 2 < time.monotonic() - start < 10


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
def on_signal() -> Iterator[object]:
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
    name, handler, raised, project, heap, config, on_signal
):
    heap.signal = getattr(signal, name)
    heap.mode = "hang"
    on_signal(heap.signal, handler)
    with pytest.raises(raised):
        load_catalogs(project)
    assert len(heap.connections) == 1
    assert (config / "telemetry.backoff").exists()


@posix
def test_ctrl_c_after_a_command_ends_the_wait_only(project, heap, config, on_signal):
    heap.signal = signal.SIGINT
    heap.mode = "hang"
    on_signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    assert run("info").exit_code == 0
    assert len(heap.connections) == 1
    assert (config / "telemetry.backoff").exists()


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
    heap.mode = "close"
    code = """
    import signal
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    from kedro_telemetry import send_telemetry_event
    print([send_telemetry_event("x") for _ in range(5)])
    """
    done = run_python("-c", code)
    assert (done.returncode, done.stdout) == (
        0,
        "[False, False, False, False, False]\n",
    )


@pytest.mark.parametrize("name", ["SIGPIPE", "pthread_sigmask"])
def test_windows_has_no_such_signal(name, heap, monkeypatch):
    monkeypatch.delattr(signal, name, raising=False)
    assert send_telemetry_event("x") is True


# Trust: all that the platform trusts

CERTIFICATE = "-----BEGIN CERTIFICATE-----\n"
FOLDERS = {
    "nothing": {},
    "heap": {HASH_LINK: HEAP_CERTIFICATE},
    "another": {"00000000.0": ""},
    "names": {"heap.pem": HEAP_CERTIFICATE, "8bd8b012.pem": HEAP_CERTIFICATE},
    "Debian": {
        HASH_LINK: HEAP_CERTIFICATE,
        "ca-certificates.crt": HEAP_CERTIFICATE,
    },
    "bundle alone": {"ca-certificates.crt": HEAP_CERTIFICATE},
    "empty bundle": {"ca-certificates.crt": "", "00000000.0": ""},
    "a company's": {"00000000.0": "", "ca-certificates.crt": HEAP_CERTIFICATE * 2},
    "dangling": {"ca-certificates.crt": HEAP_CERTIFICATE},
}


class Trust(NamedTuple):
    """SSL_CERT_FILE, SSL_CERT_DIR and the bundle of certifi, if it is installed."""

    file: str
    folder: str
    certifi: str | None = None


@pytest.fixture
def set_trust(tmp_path, monkeypatch):
    """The function that lays out certificates in folders and sets the variables."""
    write(tmp_path / "empty.pem", "")
    for folder, contents in FOLDERS.items():
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            write(tmp_path / folder / name, text)
    (tmp_path / "dangling" / HASH_LINK).symlink_to("gone.pem")
    (tmp_path / "link.pem").symlink_to(tmp_path / "Debian/ca-certificates.crt")
    monkeypatch.chdir(tmp_path)

    def set_trust(trust: Trust) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", trust.file)
        monkeypatch.setenv("SSL_CERT_DIR", trust.folder)
        module = SimpleNamespace(where=Mock(return_value=trust.certifi))
        monkeypatch.setitem(sys.modules, "certifi", module if trust.certifi else None)

    return set_trust


@posix
@pytest.mark.parametrize(
    ("trust", "is_trusted"),
    [
        (Trust("heap.pem", "nothing"), True),
        (Trust("heap.pem", "another"), True),
        (Trust("heap.pem", "gone"), True),
        (Trust("empty.pem", "nothing"), False),
        (Trust("empty.pem", "heap"), True),
        (Trust("empty.pem", "names"), False),
        (Trust("", "heap"), True),
        (Trust("", "another"), False),
        (Trust("", "nothing"), False),
        (Trust("", "nothing", "heap.pem"), True),
        (Trust("", "names", "heap.pem"), True),
        (Trust("", "another", "heap.pem"), False),
        (Trust("empty.pem", "nothing", "heap.pem"), False),
        (Trust("gone.pem", "nothing", "heap.pem"), False),
        (Trust("Debian/ca-certificates.crt", "Debian"), True),
        (Trust("link.pem", "Debian"), True),
        (Trust("bundle alone/ca-certificates.crt", "bundle alone"), True),
        (Trust("a company's/ca-certificates.crt", "a company's"), True),
        (Trust("dangling/ca-certificates.crt", "dangling"), True),
        (Trust("empty bundle/ca-certificates.crt", "empty bundle"), False),
        (Trust("Debian/ca-certificates.crt", "another"), True),
    ],
    ids=str,
)
def test_whom_to_trust(trust, is_trusted, set_trust, heap):
    set_trust(trust)
    assert send_telemetry_event("x") is is_trusted


@posix
@pytest.mark.parametrize(
    ("trust", "number"),
    [
        (Trust("Debian/ca-certificates.crt", "Debian"), 0),
        (Trust("link.pem", "Debian"), 0),
        (Trust("heap.pem", "Debian"), 1),
        (Trust("bundle alone/ca-certificates.crt", "bundle alone"), 1),
        (Trust("a company's/ca-certificates.crt", "a company's"), 1),
    ],
    ids=str,
)
def test_a_bundle_is_loaded_unless_the_folder_has_all_of_it(trust, number, set_trust):
    set_trust(trust)
    context = kedro_telemetry._tls_context()
    assert context.cert_store_stats()["x509"] == number


def test_a_certificate_of_nobody_known_is_refused_and_logged(
    heap, log, tmp_path, monkeypatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(write(tmp_path / "empty.pem", "")))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "gone"))
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


def test_the_time_of_the_last_change_is_told(new_project):
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


def test_without_chown_a_file_is_replaced_all_the_same(new_project, monkeypatch):
    monkeypatch.delattr(os, "chown", raising=False)  # as on Windows
    assert "project_id" in base_properties(new_project)


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_what_cannot_be_replaced_stays_whole(call, new_project, heap, monkeypatch):
    """As on a full disk, or on Windows while another program has the file open."""
    monkeypatch.setattr(call, Mock(side_effect=PermissionError))
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


def test_of_two_that_write_at_once_the_last_one_counts(config, monkeypatch):
    path = config / "telemetry.toml"
    replace = os.replace

    def replace_just_before_another(source: Path, target: Path) -> None:
        replace(source, target)
        text = f'[telemetry]\nuuid = "{IDENTITY}"\n'
        threading.Timer(0.001, path.write_text, [text]).start()

    monkeypatch.setattr(os, "replace", replace_just_before_another)
    assert kedro_telemetry._get_or_create_uuid() == IDENTITY


def test_a_file_that_somebody_makes_meanwhile_stays(config, monkeypatch):
    path = config / "telemetry.toml"
    text = f'[telemetry]\nuuid = "{IDENTITY}"\n'

    def write_meanwhile(_: int) -> None:
        path.write_text(text)

    monkeypatch.setattr(os, "fsync", write_meanwhile)
    assert kedro_telemetry._get_or_create_uuid() == IDENTITY
    assert path.read_text() == text


# The commands: kedro telemetry


def test_status_tells_a_new_user_all_there_is(new_project, user, config, heap, capfd):
    before = files(new_project.parent)
    done = run("telemetry status")
    assert done.output == run("telemetry").output
    assert (done.exit_code, files(new_project.parent)) == (0, before)
    assert done.output.splitlines() == [
        "Telemetry:   on here",
        "Reason:      on by default: nobody has opted in or out",
        "Identity:    none yet",
        f"             in {config / 'telemetry.toml'}",
        "Project id:  none yet",
        f"             in {new_project / 'pyproject.toml'}; sent as a hash",
        "Endpoint:    https://heapanalytics.com/api/track",
        *kedro_telemetry.STATUS_HELP.splitlines(),
    ]
    assert max(map(len, kedro_telemetry.STATUS_HELP.splitlines())) <= 80
    assert (heap.connections, capfd.readouterr()) == ([], ("", ""))


def test_status_tells_ids_and_how_long_posts_pause(project, config, known_user):
    stamp = write(config / "telemetry.backoff", "").stat().st_mtime
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp + HOUR))
    output = run("telemetry").output
    assert f"Identity:    {IDENTITY}\n" in output
    assert f"Project id:  {PROJECT_ID}\n" in output
    pause = f"Paused:      until {end}, as the last post had no answer in time\n"
    assert pause in output
    assert len(pause) <= 81


def test_status_on_a_CI_machine_promises_no_ids(new_project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    output = run("telemetry").output
    assert "Identity:    none\n" in output
    assert "Project id:  none\n" in output


def test_status_outside_of_projects_tells_of_no_project(config):
    (config / "pyproject.toml").mkdir(parents=True)  # which makes no project
    done = run("telemetry")
    assert (done.exit_code, "Project id" in done.output) == (0, False)


def test_status_loads_no_pipelines(project):
    write(project / PIPELINES, "raise SystemExit(5)")
    assert run("telemetry").exit_code == 0


def test_status_tells_why_telemetry_is_off(denied, monkeypatch):
    here = Path.cwd()
    monkeypatch.chdir(denied.project)  # where Kedro 0.18 finds the project
    cli = kedro_cli.KedroCLI(denied.project)
    monkeypatch.chdir(here)
    output = CliRunner().invoke(cli, ["telemetry"]).output
    told = f"Telemetry:   off here\nReason:      {denied.reason}\n"
    assert output.startswith(told)


def test_a_file_that_decides_nothing_is_not_a_reason(project):
    write(project / ".telemetry", "\n")
    assert "Reason:      on by default: nobody has" in run("telemetry").output


@pytest.mark.parametrize("word", ["disable", "off"])
def test_disable_opts_out_for_all_projects(word, project, config, heap):
    file = config / ".telemetry"
    done = run(f"telemetry {word}")
    assert (done.exit_code, file.read_text()) == (0, "consent: false\n")
    assert done.output == (
        f"You have opted out of telemetry for all your projects.\nSaved in {file}\n"
    )
    run("info")
    assert heap.connections == []


@pytest.mark.parametrize("word", ["enable", "on"])
def test_enable_opts_in_for_all_projects(word, project, config, heap):
    file = write(config / ".telemetry", "consent: false\n")
    done = run(f"telemetry {word}")
    assert (done.exit_code, file.read_text()) == (0, "consent: true\n")
    assert done.output == (
        f"You have opted in to telemetry for all your projects.\nSaved in {file}\n"
    )
    assert f"Reason:      {file} grants consent\n" in run("telemetry").output
    assert kedro_telemetry.NOTICE not in run("info").output
    assert heap.commands == ["kedro info"]


def test_enable_tells_where_telemetry_stays_off(project):
    write(project / ".telemetry", NO)
    told = f"Telemetry stays off here: {project / '.telemetry'} denies consent\n"
    assert run("telemetry enable").output.endswith(told)


@pytest.mark.parametrize("word", ["enable", "disable"])
def test_a_decision_that_cannot_be_saved_is_told_in_one_line(word, config):
    write(config, "a file")
    done = run(f"telemetry {word}")
    assert done.exit_code == 1
    assert re.fullmatch(r"Error: Nothing has changed: .+\n", done.output)
    assert str(config) in done.output


def test_a_decision_in_a_read_only_file_stays(config):
    file = write(config / ".telemetry", YES)
    file.chmod(0o444)
    done = run("telemetry disable")
    told = (
        f"Error: Nothing has changed: {file} is read-only; set DO_NOT_TRACK instead\n"
    )
    assert (done.exit_code, done.output, file.read_text()) == (1, told, YES)


@posix
def test_an_error_names_the_file_that_the_user_knows(config, monkeypatch):
    config.mkdir(parents=True)
    error = PermissionError(13, "Permission denied", f"{config}/.temporary")
    monkeypatch.setattr(os, "replace", Mock(side_effect=error))
    told = f"Error: Nothing has changed: {config / '.telemetry'}: Permission denied\n"
    assert run("telemetry enable").output == told


def test_a_decision_that_is_no_file_stays(config):
    file = config / ".telemetry"
    file.mkdir(parents=True)
    told = f"Error: Nothing has changed: {file} is not a file, or too large\n"
    assert run("telemetry enable").output == told


@pytest.mark.parametrize(
    ("word", "advice"), [("enable", ""), ("disable", "; set DO_NOT_TRACK instead")]
)
def test_without_a_home_folder_a_decision_cannot_be_saved(word, advice, no_home):
    done = run(f"telemetry {word}")
    assert done.exit_code == 1
    reason = "there is no home folder to save it in"
    assert done.output == f"Error: Nothing has changed: {reason}{advice}\n"


def test_status_without_a_home_folder_names_no_file(no_home, user):
    done = run("telemetry")
    assert done.exit_code == 0
    assert "Identity:    none yet\nEndpoint" in done.output


def test_help_names_the_variables_and_the_documentation():
    output = run("telemetry --help").output
    for words in ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY", DOCUMENTATION):
        assert words in output
    commands = re.findall(
        r"^  ([a-z]+)", output.partition("Commands:")[2], re.MULTILINE
    )
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
    [
        ("", 0),
        ("status", 0),
        ("enable", 0),
        ("disable", 0),
        ("on", 0),
        ("--help", 0),
        ("nonsense", 2),
        ("status x", 2),
        ("--x", 2),
        ("enable x", 2),
    ],
)
def test_asking_about_telemetry_is_not_reported(line, exit_code, project, heap):
    done = run(f"telemetry {line}")
    assert done.exit_code == exit_code
    assert kedro_telemetry.NOTICE not in done.output
    assert heap.connections == []


OWN_TELEMETRY = """
import click
@click.command()
def telemetry(): click.echo("of my own")
cli = click.Group("mine", [telemetry])
"""


def test_a_projects_own_command_telemetry_comes_first(project, heap, kedros_groups):
    write(project / "src/spaceships/cli.py", OWN_TELEMETRY)
    for _ in range(2):
        assert run("telemetry").output == "of my own\n"
    assert heap.connections == []


def test_outside_of_the_project_the_command_is_there_again(
    project, user, monkeypatch, kedros_groups
):
    write(project / "src/spaceships/cli.py", OWN_TELEMETRY)
    monkeypatch.chdir(user)
    assert "Telemetry:   on here" in run("telemetry").output
    monkeypatch.chdir(project)
    assert run("telemetry").output == "of my own\n"
    monkeypatch.chdir(user)
    kedro_project.PACKAGE_NAME = None
    assert "Telemetry:   on here" in run("telemetry").output


LAZY_TELEMETRY = """
import click
@click.command()
def telemetry(): click.echo("of my own")
class Lazy(click.Group):
    def list_commands(self, ctx): return ["telemetry"]
    def get_command(self, ctx, name): return {"telemetry": telemetry}.get(name)
cli = Lazy("mine")
"""


@pytest.mark.parametrize(
    ("group", "place"),
    [
        ("global_commands", "project"),
        ("global_commands", "home"),
        ("project_commands", "project"),
    ],
)
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(OWN_TELEMETRY, id="plain"),
        pytest.param(
            LAZY_TELEMETRY,
            id="lazy",
            marks=pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 has none"),
        ),
    ],
)
def test_a_plugins_own_command_telemetry_comes_first(
    code, group, place, project, user, tmp_path, heap, monkeypatch, kedros_groups
):
    site = tmp_path / "site"
    write(site / "plug.py", code)
    write(site / "plug-1.0.dist-info/METADATA", "Name: plug\nVersion: 1.0\n")
    points = f"[kedro.{group}]\nplug = plug:cli\n"
    write(site / "plug-1.0.dist-info/entry_points.txt", points)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(project if place == "project" else user)
    for _ in range(2):
        assert run("telemetry").output == "of my own\n"
    assert heap.connections == []


def test_where_the_command_cannot_be_added_the_others_work(monkeypatch, heap):
    hook = kedro_telemetry.telemetry_hook
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "kedro.framework.cli", None)
        hook.before_command_run(None, ["info"])
    hook.after_command_run()
    assert heap.commands == ["kedro info"]


def test_python_m_runs_the_command(project):
    done = run_python("-m", "kedro_telemetry", "status")
    assert done.stdout.splitlines()[-1] == DOCUMENTATION
    usage = run_python("-m", "kedro_telemetry", "--help").stdout
    assert "Usage: kedro telemetry [OPTIONS]" in usage
    assert "Telemetry:   on here\n" in done.stdout


# One copy: vendored into a project


@pytest.fixture
def vendored(project) -> str:
    """The lines that README tells to add to the settings, beside a copy."""
    source = Path(kedro_telemetry.__file__).read_bytes()
    write(project / "src/spaceships/kedro_telemetry.py", source)
    section = README.partition("## Vendor it")[2].partition("\n## ")[0]
    (recipe,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    lines = textwrap.dedent(recipe)
    write(project / SETTINGS, lines)
    return lines


def test_a_vendored_copy_reports_sessions(vendored, project, heap, monkeypatch):
    monkeypatch.setattr(PluginManager, "load_setuptools_entrypoints", Mock())
    load_catalogs(project)
    assert heap.commands == [None]


def test_beside_an_installed_plugin_a_vendored_copy_reports_nothing_twice(
    vendored, project, heap
):
    load_catalogs(project)
    run("run")
    assert heap.commands == [None, "kedro run"]


def test_a_vendored_copy_tells_the_commands_that_work_there(vendored, project):
    command = ["-m", "spaceships.kedro_telemetry"]
    switch = 'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n'
    write(project / SETTINGS, vendored + switch)
    done = run_python(*command, PYTHONPATH="src")
    assert "DISABLE_HOOKS_FOR_PLUGINS is set in spaceships.settings" in done.stdout
    assert "KEDRO_TELEMETRY_DEBUG=1 kedro run" in done.stdout
    usage = "Usage: python -m spaceships.kedro_telemetry telemetry [OPTIONS]"
    assert usage in run_python(*command, "--help", PYTHONPATH="src").stdout
    done_in_full = run_python(*command, "telemetry", PYTHONPATH="src")
    assert done_in_full.stdout.splitlines()[-12:] == done.stdout.splitlines()[-12:]
    shown = re.findall(r"python -m (spaceships\.kedro_telemetry \w+)", done.stdout)
    assert [line.split()[-1] for line in shown] == ["disable", "enable"]
    for line in shown:
        assert run_python("-m", *line.split(), PYTHONPATH="src").returncode == 0


# README: what it says is what happens

HEADINGS = [
    "What is kedro-telemetry?",
    "What data is being collected?",
    "How is the data collected?",
    "How do I withdraw consent?",
    "What happens when I withdraw consent?",
    "Opt in, and hide the notice",
    "What licence do you use?",
    "Python version support policy",
    "See what is sent",
    "What you can rely on",
    "Vendor it",
    "For plugin authors",
    "For security reviewers",
    "For the Kedro team: what changed from 0.9.0",
    "Work on it",
]


def readme_section(heading: str) -> str:
    return README.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def readme_block(language: str, text: str) -> str:
    """The one block of code in a part of README, without its indentation."""
    (block,) = re.findall(
        rf"^ *```{language}\n(.*?)```", text, re.DOTALL | re.MULTILINE
    )
    return textwrap.dedent(block)


def test_links_from_kedros_documentation_find_their_headings():
    assert re.findall(r"^## (.*)", README, re.MULTILINE) == HEADINGS


def table_rows(heading: str) -> list[list[str]]:
    """The cells of the rows of the table below a heading."""
    lines = re.findall(r"^\| (.*) \|$", readme_section(heading), re.MULTILINE)
    return [line.split(" | ") for line in lines[2:]]


PROPERTIES = {
    name.strip("`"): when
    for name, when, *_ in table_rows("What data is being collected?")
}
COLLECTED = readme_section("What data is being collected?")


def kinds_of_property(when: str) -> set[str]:
    """The kinds of events that a row of README's table speaks of."""
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
    told = {
        name.partition(".<")[0]
        for name, when in PROPERTIES.items()
        if kind in kinds_of_property(when) and is_in_this_kedro(when)
    }
    assert sent == told, "README's table and the module disagree: change both."


@since_kedro_1
def test_the_example_of_an_event_is_one_of_kedro_run(project, heap):
    example = json.loads(readme_block("json", COLLECTED))
    assert run("run --env local").exit_code == 0
    assert list(heap.events[0]) == list(example)
    told = "Add the property to the JSON example in README, in the order of the module."
    assert list(heap.properties) == list(example["properties"]), told
    assert example["properties"]["telemetry_version"] == kedro_telemetry.__version__
    for name, _, _, value in table_rows("What data is being collected?"):
        shown = example["properties"].get(name.strip("`"))
        shown = json.dumps(shown) if isinstance(shown, bool) else shown
        assert shown is None or str(shown)[:12] == value.strip("`")[:12], name


@pytest.mark.parametrize(
    ("sentence", "constant"),
    [
        (r"CI machines are those.*?\. A fresh", "CI_VARIABLES"),
        (r"Tools are .*?\.", "KEDRO_TOOLS"),
        (r"Public libraries of validators are .*?\.", "PUBLIC_VALIDATORS"),
    ],
)
def test_a_list_in_README_is_that_of_the_module(sentence, constant):
    (text,) = re.findall(sentence, COLLECTED, re.DOTALL)
    names = re.findall(r"`([^`]+)`", text)
    told = tuple(name for name in names if name not in ("0", "false"))
    advice = f"README and {constant} disagree: change both."
    assert told == getattr(kedro_telemetry, constant), advice


def test_the_table_has_every_way_to_opt_out_that_is_tested():
    cells = [how for _, how in table_rows("How do I withdraw consent?")]
    shown = set(re.findall(r"`([^`]+)`", " ".join(cells)))
    advice = (
        "Show the code of a way to opt out in README's table, and try it by that code "
    )
    advice += (
        "in README_DENIALS: one of them lacks it, or shows something else as code."
    )
    assert shown - {".telemetry", "settings.py"} == set(README_DENIALS), advice


def test_each_source_of_consent_has_denials_that_are_tested(project):
    sources = list(kedro_telemetry._consent_sources(project))
    folders = [project, *project.parents]
    variables_settings_and_users_file = 3
    advice = (
        "A new way to opt out? Add it to README's table and to README_DENIALS, with "
    )
    advice += "the reason that users are told, and count it here."
    assert len(sources) == variables_settings_and_users_file + 2 * len(folders), advice


def test_README_names_both_variables():
    for name in kedro_telemetry.OPT_OUT_VARIABLES:
        assert f"`{name}`" in readme_section("How do I withdraw consent?")


def test_the_status_in_README_is_that_of_the_command(project, known_user):
    example = readme_block("", readme_section("What is kedro-telemetry?"))
    labels = [line.partition(":")[0] for line in example.splitlines()]
    output = run("telemetry").output.splitlines()
    assert [line.partition(":")[0] for line in output[: len(labels)]][::6] == labels[
        ::6
    ]
    assert output[:2] == example.splitlines()[:2]
    assert output[5].endswith("pyproject.toml; sent as a hash")


def test_the_first_command_shows_an_event_and_sends_none(heap):
    line = "python3 -m venv .venv && .venv/bin/pip install . && "
    line += "KEDRO_TELEMETRY_DEBUG=1 .venv/bin/kedro info\n"
    assert f"```sh\n{line}```" in README
    done = run_python("-m", "kedro", "info", KEDRO_TELEMETRY_DEBUG="1")
    event = done.stderr.partition("would send:\n")[2]
    assert json.loads(event)["event"] == "CLI command"
    assert heap.connections == []


def test_the_second_command_runs_these_tests():
    line = "python3 -m venv .venv && .venv/bin/pip install '.[test]' && "
    line += ".venv/bin/python -m pytest\n"
    assert f"```sh\n{line}```" in README


@pytest.fixture
def run_sh(tmp_path, monkeypatch):
    """The function that runs a block of README in a shell, with this Python."""
    if not os.path.exists("/bin/sh"):
        pytest.skip("the commands are for POSIX shells")
    for name, words in {"kedro": "-m kedro", "python3": ""}.items():
        script = f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n'
        write(tmp_path / "bin" / name, script).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")

    def run_sh(script: str) -> subprocess.CompletedProcess:
        command = ["/bin/sh", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run_sh


RELY_ON = readme_section("What you can rely on")


def rely_on(heading: str) -> str:
    """The commands that show one promise."""
    return readme_block("sh", RELY_ON.partition(heading)[2].partition("\n### ")[0])


def test_the_commands_about_the_deadline_show_it(run_sh, config, project):
    script = rely_on("A command waits at most two seconds")
    assert "127.0.0.1" in script
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done = run_sh(script.replace("9999", port) + "kill $!")
    (seconds,) = re.findall(r"^(\d+) seconds$", done.stdout, re.MULTILINE)
    assert 2 <= int(seconds) < 10
    assert (config / "telemetry.backoff").exists()


@since_kedro_1
def test_the_commands_about_imports_show_pythons_modules_only(run_sh, project):
    done = run_sh(rely_on("Nothing of yours is imported or run"))
    imported = {line[1:].strip() for line in done.stdout.splitlines() if line[0] == ">"}
    assert "urllib.response" in imported
    roots = {name.partition(".")[0] for name in imported}
    assert roots <= set(sys.stdlib_module_names) | {"certifi"}


def test_the_commands_about_the_exit_status_show_it(run_sh, project):
    done = run_sh(rely_on("Exit status and standard output stay"))
    lines = re.sub(r"\d\d:\d\d:\d\d", "", done.stdout).splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert lines[-1] == "0"


@pytest.mark.parametrize("command", ["run", "info"])
def test_the_logging_file_logs_what_is_sent(command, project, heap, known_user):
    see = readme_section("See what is sent")
    path = write(project / "conf/logging.yml", readme_block("yaml", see))
    done = run_python("-m", "kedro", command, KEDRO_LOGGING_CONFIG=str(path))
    assert done.returncode == 0
    assert len(heap.events) == 1
    log = (project / "telemetry.log").read_text()
    assert log.startswith("Post of {")
    assert log.endswith(": 200\n")
    assert "Post of" not in done.stdout


def test_the_recipe_for_plugin_authors_sends_an_event(heap):
    recipe = readme_block("python", readme_section("For plugin authors"))
    assert run_python("-c", recipe).returncode == 0
    assert heap.events[0]["event"] == "my_plugin_did_it"
    assert heap.properties["how_often"] == 3


def test_the_recipe_for_a_plugins_tests_shows_an_event(run_sh, heap, tmp_path):
    done = run_sh(readme_block("sh", readme_section("For plugin authors")))
    assert done.stderr.startswith("kedro-telemetry would send:\n{")
    assert heap.connections == []
