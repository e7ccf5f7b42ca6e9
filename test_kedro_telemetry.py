"""The specification of kedro-telemetry, in the order of the module.

Everything sent here goes through a proxy to a TLS server that stands in for Heap, both
on loopback. Commands run in click's CliRunner, or as processes where the process
matters.

The module and this file also work on their own. Tests that need README.md or this
release's metadata are then skipped.
"""

import calendar
import contextlib
import copy
import gc
import http.client
import inspect
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
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, copy_context
from functools import cache
from hashlib import sha512
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, MappingProxyType, SimpleNamespace
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
from kedro.framework.startup import bootstrap_project
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

# A self-signed certificate for heapanalytics.com, for these tests, valid until 2120
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
END = "-----END CERTIFICATE-----\n"
HEAP_CERTIFICATE = HEAP_PEM.partition(END)[0] + END
# What `openssl rehash` names the links to the files of two certificates
HASH_LINK = "8bd8b012.0"
EVIL_LINK = "28e4c041.0"

# A certificate for the same key, then that of the intermediate authority that signed it
CHAIN_CERTIFICATES = """\
-----BEGIN CERTIFICATE-----
MIIBjzCCATWgAwIBAgIBBDAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxpbnRlcm1lZGlhdGUwIBcN
MjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBwxGjAYBgNVBAMMEWhlYXBhbmFseXRpY3Mu
Y29tMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaM2SIHeUvNBUvIMXspwfWOdtHHfQGeqAgz2g
GOZV2EEwNIiXWhfgmGZ1BTUQCK5mb4iKijGRcquyASJEtFhfjqNrMGkwCQYDVR0TBAIwADAcBgNV
HREEFTATghFoZWFwYW5hbHl0aWNzLmNvbTAdBgNVHQ4EFgQUf0D+Hf47gdrlq6OcHVjAWIlnvoUw
HwYDVR0jBBgwFoAUbt5WRUnL+sIppU4aR6htxMQ3m34wCgYIKoZIzj0EAwIDSAAwRQIhAJ+q8nRi
9cw8rNsmZwawpddo2R8agyaGhyhTw5C8/3oZAiAhiSRNFtEKLMwAhZ+hwy94T/CIFvxiDOADHGks
Lu3HRA==
-----END CERTIFICATE-----
-----BEGIN CERTIFICATE-----
MIIBczCCARqgAwIBAgIBAjAKBggqhkjOPQQDAjAPMQ0wCwYDVQQDDARyb290MCAXDTIwMDEwMTAw
MDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAXMRUwEwYDVQQDDAxpbnRlcm1lZGlhdGUwWTATBgcqhkjO
PQIBBggqhkjOPQMBBwNCAATTY3Mftpk4EjnKSg6wiQoYKZszBDz9zbrusoO0/2g9o9sXAtwp8Df/
UQf+9LpBxIFZoiiCpbTNcHp0xfZyCoOvo10wWzAMBgNVHRMEBTADAQH/MAsGA1UdDwQEAwICBDAd
BgNVHQ4EFgQUbt5WRUnL+sIppU4aR6htxMQ3m34wHwYDVR0jBBgwFoAUIsTh6nCanh8A7OBpwwwa
vqj7StAwCgYIKoZIzj0EAwIDRwAwRAIgXi3w9tN1zIA4jsqP+yCU6qhUY6Rxip/gn93wdfS7zpMC
IDhU1aSlSZMB03aQ44gUAjKTr2h5848mrLMDR+e0hkA+
-----END CERTIFICATE-----
"""
INTERMEDIATE_CERTIFICATE = CHAIN_CERTIFICATES.partition(END)[2]

# A self-signed certificate for the same key, but for evil.example
EVIL_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBejCCASCgAwIBAgIBBTAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxldmlsLmV4YW1wbGUwIBcN
MjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBcxFTATBgNVBAMMDGV2aWwuZXhhbXBsZTBZ
MBMGByqGSM49AgEGCCqGSM49AwEHA0IABGjNkiB3lLzQVLyDF7KcH1jnbRx30BnqgIM9oBjmVdhB
MDSIl1oX4JhmdQU1EAiuZm+IiooxkXKrsgEiRLRYX46jWzBZMBcGA1UdEQQQMA6CDGV2aWwuZXhh
bXBsZTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQUf0D+Hf47gdrl
q6OcHVjAWIlnvoUwCgYIKoZIzj0EAwIDSAAwRQIhAOfMqJPt8oMh/lJ012s1pxXjiOd6yak1Lu0I
V+R/evBiAiB9EZYdll3MHIg7g/R8Z//T6mP7c9QSaKDKmeeQLrsz/w==
-----END CERTIFICATE-----
"""

# Tests start without any of these variables, even if the environment sets them.
OTHER_VARIABLES = """
GITHUB_REPOSITORY_OWNER HEAP_APPID_DEV KEDRO_TELEMETRY_DEBUG HTTP_PROXY HTTPS_PROXY
ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy KEDRO_ENV
KEDRO_LOGGING_CONFIG DYNACONF_DISABLE_HOOKS_FOR_PLUGINS _KEDRO_COMPLETE
"""
VARIABLES = (
    *kedro_telemetry.OPT_OUT_VARIABLES,
    *kedro_telemetry.CI_VARIABLES,
    *OTHER_VARIABLES.split(),
)
HOME_VARIABLES = ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CONFIG_HOME")
MODULES_OF_TESTS = ("spaceships", "rockets", "plug", "idle", "kedro_datasets")

# The fixture `user` changes DEADLINE, because a machine may be busy.
CONSTANTS = dict(vars(kedro_telemetry))

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such thing")
linux = pytest.mark.skipif(
    sys.platform in ("win32", "darwin"), reason="no XDG_CONFIG_HOME there"
)
is_root = os.name == "posix" and os.geteuid() == 0
root = pytest.mark.skipif(not is_root, reason="only root can mount or give files away")
not_root = pytest.mark.skipif(
    os.name != "posix" or is_root, reason="root may read and write everything"
)
since_kedro_0_19 = pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 does not")
since_kedro_1 = pytest.mark.skipif(KEDRO < (1, 0), reason="Kedro 0.19 does not")


# Shared helpers: a Heap, a user, projects


class Heap(socketserver.ThreadingTCPServer):
    """A proxy with Heap behind it. `mode` is Heap's status, or what goes wrong."""

    def __init__(self, pem: Path) -> None:
        super().__init__(("127.0.0.1", 0), ConnectionToHeap)
        self.mode = "200"
        self.delay = 0.0  # seconds before it answers
        self.answers = 0
        self.signal: int | None = None  # sent to this process when it connects
        self.signal_delay = 0.2  # seconds; by then, the main thread waits for Heap
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
        """The commands in the events received so far; None for other events."""
        return [event["properties"].get("command") for event in self.events]

    @property
    def names(self) -> list[str]:
        """The names of the events received so far."""
        return [event["event"] for event in self.events]

    @property
    def properties(self) -> dict:
        """The properties of the last event received."""
        return self.events[-1]["properties"]

    @property
    def project_ids(self) -> set[str | None]:
        """The project ids in all events received so far."""
        return {event["properties"].get("project_id") for event in self.events}

    def handle_error(self, *_: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # the client may disconnect at any time
            raise error

    def hangs_if(self, mode: str) -> bool:
        return self.mode == mode and self.is_over.wait()


class ConnectionToHeap(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_CONNECT(self) -> None:
        heap = self.server
        heap.connections.append(self.path)
        heap.proxy_headers = dict(self.headers.items())
        if heap.signal is not None:
            heap.is_over.wait(heap.signal_delay)
            signal.pthread_kill(threading.main_thread().ident, heap.signal)
        if heap.mode == "reset":
            heap.is_over.wait(heap.delay)
            return
        if heap.hangs_if("hang"):
            return
        self.send_response(200)
        self.end_headers()
        if heap.hangs_if("hang in TLS"):
            return
        with heap.tls.wrap_socket(self.connection, server_side=True) as stream:
            if heap.mode == "close":
                return  # closes the connection with FIN
            self.rfile = stream.makefile("rb")
            self.wfile = stream.makefile("wb", 0)
            self.handle_one_request()

    def do_POST(self) -> None:
        heap = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        heap.path = self.path
        heap.headers = dict(self.headers.items())
        heap.events.append(json.loads(body))
        heap.is_over.wait(heap.delay)
        heap.answers += 1
        if heap.mode == "garbage":
            self.wfile.write(b"\0\xff is not HTTP\r\n\r\n")
        if heap.mode == "garbage" or heap.hangs_if("hang in HTTP"):
            return
        self.send_response(int(heap.mode) if heap.mode.isdigit() else 200)
        self.send_header("Location", "https://heapanalytics.com/elsewhere")
        self.flush_headers()
        while heap.mode == "drip" and not heap.is_over.wait(0.1):
            self.wfile.write(b"X")
        self.end_headers()
        while heap.mode == "huge" and not heap.is_over.is_set():
            self.wfile.write(b"x" * 2**20)


@pytest.fixture
def patch(monkeypatch) -> pytest.MonkeyPatch:
    """Undoes its replacements when the test ends."""
    return monkeypatch


@pytest.fixture(scope="session", autouse=True)
def python_path(tmp_path_factory) -> str:
    """The path to the module and, if nothing is installed, to its entry points."""
    folders = [str(Path(__file__).parent)]
    if "kedro-telemetry" not in entry_points(group="kedro.hooks").names:
        site = tmp_path_factory.mktemp("site")
        info = site / "kedro_telemetry-0.dist-info"
        hook = "kedro-telemetry = kedro_telemetry.plugin:telemetry_hook"
        points = f"[kedro.hooks]\n{hook}\n[kedro.cli_hooks]\n{hook}\n"
        write(info / "METADATA", "Name: kedro-telemetry\nVersion: 0\n")
        write(info / "entry_points.txt", points)
        folders.append(str(site))
        sys.path.append(str(site))
    return os.pathsep.join(folders)


@pytest.fixture(autouse=True)
def user(tmp_path, patch, python_path) -> Iterator[Path]:
    """The home folder of a user who has made no decision and has no network."""
    for name in VARIABLES:
        patch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    write(tmp_path / "heap.pem", HEAP_PEM)
    for name in HOME_VARIABLES:
        patch.setenv(name, str(home))
    patch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    patch.setenv("SSL_CERT_FILE", str(tmp_path / "heap.pem"))
    patch.setenv("SSL_CERT_DIR", str(tmp_path / "no certificates"))
    patch.setenv("PYTHONPATH", python_path)
    patch.setattr(sys, "path", sys.path[:])
    patch.setattr(sys, "dont_write_bytecode", True)
    patch.setattr(kedro_telemetry, "DEADLINE", 20.0)  # a machine may be busy
    patch.setattr(kedro_telemetry._Post, "back_off_start", 0.0)
    patch.setattr(kedro_telemetry, "_unshown_notices", [NOTICE])
    patch.setattr(kedro_telemetry.telemetry_hook, "_command_report", None)
    patch.chdir(home)
    yield home
    kedro_project.PACKAGE_NAME = None
    kedro_project.pipelines.configure()
    for name in list(sys.modules):
        if name.split(".")[0] in MODULES_OF_TESTS:
            del sys.modules[name]


def config_in(home: Path) -> Path:
    """Where 0.9.0 has its files on this platform, for the fixture `user`."""
    if sys.platform == "win32":
        return home / "kedro/kedro"
    if sys.platform == "darwin":
        return home / "Library/Application Support/kedro"
    return home / "kedro"


@pytest.fixture
def config(user) -> Path:
    """The user's Kedro configuration folder, which does not exist yet."""
    return config_in(user)


DECISION = ".config/kedro/.telemetry"


@pytest.fixture
def decision(user) -> Path:
    """The file for the user's own decision, which does not exist yet."""
    return user / DECISION


@pytest.fixture
def known_user(config) -> Path:
    """The file of a user who has an identity, as 0.9.0 stored it."""
    text = f'other = 1\n[telemetry]\nuuid = "{uuid.UUID(IDENTITY)}"\n'
    return write(config / "telemetry.toml", text)


@contextlib.contextmanager
def serve(pem: Path) -> Iterator[Heap]:
    with Heap(pem) as heap:
        threading.Thread(target=heap.serve_forever, args=[0.002]).start()
        yield heap
        heap.is_over.set()
        heap.shutdown()


@pytest.fixture
def heap(tmp_path, patch) -> Iterator[Heap]:
    """A Heap that the network leads to."""
    with serve(tmp_path / "heap.pem") as heap:
        patch.setenv("HTTPS_PROXY", f"http://{heap.address}")
        yield heap


@pytest.fixture
def no_network(patch) -> Mock:
    """A network on which nothing can be reached, and which records each attempt."""
    attempt = Mock(side_effect=OSError("no network"))
    patch.setattr(socket, "getaddrinfo", attempt)
    patch.setattr(socket.socket, "connect", attempt)
    return attempt


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
YES = "consent: true\n"
NO = "consent: false\n"


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
def project(tmp_path, patch) -> Path:
    """A Kedro project whose root is the current directory."""
    root = write_project(
        tmp_path / "work/spaceships", "spaceships", KEDRO_TABLE + ID_TABLE
    )
    patch.chdir(root)
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
    """A project id as Heap sees it."""
    return sha512(f"{project_id}{package}".encode()).hexdigest()


SPACESHIPS = hashed_id(PROJECT_ID, "spaceships")
ROCKETS = hashed_id(OTHER_PROJECT_ID, "rockets")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else textwrap.dedent(content).encode()
    path.write_bytes(data)
    return path


def files(folder: Path) -> dict[Path, int]:
    """Everything below `folder`, with the time of its last change."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def run(line: str) -> Result:
    """Run `kedro LINE` in this process, in the current directory."""
    cli = kedro_cli.KedroCLI(Path.cwd())
    return CliRunner().invoke(cli, line.split(), prog_name="kedro")


def run_python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run another Python process until it ends."""
    env = os.environ | {"COLUMNS": "200"} | variables
    return run_process([sys.executable, *map(textwrap.dedent, words)], env)


def run_process(
    command: list[str], env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
        env=env,
        cwd=cwd,
    )


def create_session(project: Path) -> KedroSession:
    bootstrap_project(project)
    return KedroSession.create(project_path=project)


def load_catalogs(project: Path) -> None:
    """Load two contexts in a new session, each of which creates two catalogs."""
    with create_session(project) as session:
        for _ in range(2):
            context = session.load_context()
            assert context.catalog is not context.catalog


def base_properties(project_path: Path | None) -> dict:
    """The properties of every event, as Kedro's VS Code extension requests them."""
    return kedro_telemetry._get_project_properties("", project_path)


def consent(project_path: Path | None = None) -> bool | None:
    """The consent that Kedro-Viz sees."""
    return kedro_telemetry._check_for_telemetry_consent(project_path)


def report_session(catalog: object, project: Path) -> None:
    """Create a context and then this catalog, as Kedro does."""
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
    """The properties that begin with `prefix`, with the prefix removed."""
    return {
        name.removeprefix(prefix): count
        for name, count in properties.items()
        if name.startswith(prefix)
    }


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    """The module's log messages, including DEBUG."""
    # For a process's first project, Kedro removes all handlers, including pytest's.
    if KEDRO >= (0, 19):
        kedro_project.LOGGING.set_project_logging("spaceships")
    caplog.set_level(logging.DEBUG, "kedro_telemetry")
    return caplog


# The module: its import cost, its names and its constants


def test_after_a_denial_the_module_imports_nothing_that_kedro_does_not():
    code = """
    import sys, click, pluggy, json, logging, pathlib, signal
    before = set(sys.modules)
    import kedro_telemetry.api, kedro_telemetry.plugin
    kedro_telemetry.send_telemetry_event("x", {}, ".")
    print(*sorted(set(sys.modules) - before), sep="\\n")
    """
    done = run_python("-c", code, DO_NOT_TRACK="1")
    own = ["kedro_telemetry", "kedro_telemetry.api", "kedro_telemetry.plugin"]
    assert done.stdout.splitlines() == own, (
        "Each `kedro` pays for an import at the top of the module: import it in the "
        "function that needs it. And print nothing there."
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    "line",
    [
        "from kedro_telemetry import __version__, send_telemetry_event",
        "from kedro_telemetry.api import send_telemetry_event",
        "from kedro_telemetry.plugin import _check_for_telemetry_consent",
        "from kedro_telemetry.plugin import _get_heap_app_id, _get_or_create_uuid",
        "from kedro_telemetry.plugin import _get_project_properties, _is_valid_syntax",
        "from kedro_telemetry.plugin import ProjectMetadata",
    ],
)
def test_other_packages_find_the_names_that_they_import(line):
    exec(line, {})


NOTICE = """
Kedro collects anonymised usage data to improve the product.
See whether it is on here, and why:  kedro telemetry
Opt out:    kedro telemetry disable, or set DO_NOT_TRACK
Read more:  https://docs.kedro.org/en/stable/about/telemetry/"""


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ENDPOINT", "https://heapanalytics.com/api/track", "README names it"),
        ("APP_ID", "2388822444", "README's example has it"),
        ("LARGEST_FILE", 2**20, "a larger file denies consent"),
        ("LONGEST_TEXT", 1023, "README says where texts are cut"),
        ("ACCEPTED", 200, "README says what Heap's status means"),
        ("NOTICE", NOTICE, "people read it in terminals of 80 columns"),
    ],
)
def test_a_constant_is_what_readers_know(name, value, reason):
    assert CONSTANTS[name] == value, (
        f"{name} has changed, and {reason}. Change README and this table as well."
    )


def test_kedro_finds_the_hooks_where_0_9_0_has_them():
    """A leftover folder from 0.9.0 or a vendored copy does not break them."""
    with contextlib.suppress(PackageNotFoundError):
        found = distribution("kedro-telemetry")
        if found.version == kedro_telemetry.__version__:
            points = {(x.group, x.name, x.value) for x in found.entry_points}
            hook = ("kedro-telemetry", "kedro_telemetry.plugin:telemetry_hook")
            assert points == {("kedro.hooks", *hook), ("kedro.cli_hooks", *hook)}
            return
    pytest.skip("this release is not installed")


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
        properties |= {"tools": "Linting, Testing", "example_pipeline": "False"}
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
    ], "A new property belongs here and into README's table and example."
    assert known_user.read_bytes() == known
    assert heap.connections == ["heapanalytics.com:443"]
    assert heap.path == "/api/track"


@pytest.mark.parametrize(
    ("line", "exit_code", "word", "event"),
    [
        ("info", 0, "info", "CLI command"),
        ("run", 0, "run", "Kedro Project Statistics"),
        ("-V", 0, "-V", "CLI command"),
        ("nonsense", 2, "*****", "CLI command"),
    ],
)
def test_a_command_is_reported_once(line, exit_code, word, event, project, heap):
    heap.mode = "500"  # an event that Heap refuses is not sent twice
    for _ in range(2):
        assert run(line).exit_code == exit_code
    assert heap.names == [event, event]
    assert {x["properties"]["main_command"] for x in heap.events} == {word}


def test_a_session_is_reported_once_for_its_project(project, user, heap, patch):
    patch.chdir(user)
    for _ in range(2):
        load_catalogs(project)
    assert heap.names == ["Kedro Project Statistics"] * 2
    assert (heap.commands, heap.project_ids) == ([None, None], {SPACESHIPS})


# A project's own command that opens a session in each of the given folders
OPEN = """
import click
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
@click.command("open")
@click.argument("paths", nargs=-1)
def open_sessions(paths):
    for path in paths:
        bootstrap_project(path)
        assert KedroSession.create(project_path=path).load_context().catalog
cli = click.Group("spaceships", [open_sessions])
"""


def test_a_command_with_two_sessions_is_reported_once(project, heap):
    write(project / "src/spaceships/cli.py", OPEN)
    assert run(f"open {project} {project}").exit_code == 0
    assert heap.commands == ["kedro *****"]
    assert heap.names == ["Kedro Project Statistics"]


@pytest.mark.parametrize("text", ["", NO], ids=["asked", "opted out"])
def test_a_session_of_another_project_counts_apart(text, project, other_project, heap):
    write(project / "src/spaceships/cli.py", OPEN)
    write(other_project / ".telemetry", text)
    assert run(f"open {other_project}").exit_code == 0
    ids = [event["properties"]["project_id"] for event in heap.events]
    session = [] if text else [("Kedro Project Statistics", ROCKETS)]
    sent = list(zip(heap.names, ids, strict=True))
    assert sent == [*session, ("CLI command", SPACESHIPS)]
    assert heap.commands[-1] == "kedro *****"


@pytest.mark.parametrize("metadata", ["project", "none"])
def test_a_command_may_open_a_session_elsewhere(metadata, project, heap):
    """kedro-auto-catalog passes a package name where Kedro expects a path."""
    hook = kedro_telemetry.telemetry_hook
    found = bootstrap_project(project)
    path = "spaceships" if metadata == "project" else project
    hook.before_command_run(found if metadata == "project" else None, ["info"])
    session = KedroSession.create(project_path=path, conf_source=str(project / "conf"))
    assert session.load_context().catalog
    hook.after_command_run()
    assert (heap.commands, heap.project_ids) == (["kedro info"], {SPACESHIPS})


@posix
@since_kedro_0_19
def test_a_command_in_a_linked_folder_is_reported_once(project, tmp_path, heap):
    (tmp_path / "link").symlink_to(project)
    cli = kedro_cli.KedroCLI(tmp_path / "link")
    assert CliRunner().invoke(cli, ["run"]).exit_code == 0
    assert heap.commands == ["kedro run"]


def test_a_command_that_never_ended_takes_no_sessions(project, other_project, heap):
    kedro_cli.KedroCLI(project).main(["info"], standalone_mode=False)
    load_catalogs(other_project)
    assert (heap.commands, heap.project_ids) == ([None], {ROCKETS})
    assert run("telemetry").exit_code == 0
    load_catalogs(project)
    assert heap.commands == [None, None]


def interleave(*projects: Path) -> None:
    """Interleave every step of sessions in several projects."""
    sessions = [create_session(project) for project in projects]
    contexts = [session.load_context() for session in sessions]
    for _ in range(2):
        for context in contexts:
            assert context.catalog


def test_interleaved_sessions_count_apart(project, other_project, heap):
    datasets = "a: {type: MemoryDataset}\nb: {type: MemoryDataset}\n"
    write(other_project / CATALOG, datasets)
    interleave(project, other_project)
    sent = [event["properties"] for event in heap.events]
    found = [(x["project_id"], x["number_of_datasets"]) for x in sent]
    assert found == [(SPACESHIPS, 1), (ROCKETS, 2)]


def test_sessions_in_threads_are_each_reported_once(project, heap, known_user):
    bootstrap_project(project)

    def load_catalog() -> None:
        context = KedroSession.create(project_path=project).load_context()
        assert context.catalog is not context.catalog

    threads = [threading.Thread(target=load_catalog) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heap.commands == [None] * 4


@pytest.mark.parametrize("step", [1, -1], ids=["first", "second"])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".telemetry", NO),
        ("src/rockets/settings.py", "KEDRO_DISABLE_TELEMETRY = True\n"),
        ("src/rockets/settings.py", "DISABLE_HOOKS_FOR_PLUGINS = 'kedro-telemetry'\n"),
    ],
    ids=["file", "name", "switch"],
)
def test_an_interleaved_session_may_opt_out(
    file, text, step, project, other_project, heap
):
    """Settings of the project that was loaded last opt out the whole process."""
    write(other_project / file, text)
    interleave(*[other_project, project][::step])
    sent = [] if "settings" in file and step == -1 else [SPACESHIPS]
    assert [event["properties"]["project_id"] for event in heap.events] == sent


@since_kedro_0_19
def test_a_session_is_copied_as_without_telemetry(project, heap):
    context = create_session(project).load_context()
    copied = copy.deepcopy(context._hook_manager)
    assert copied.has_plugin("kedro-telemetry-session")


def test_a_session_that_is_over_is_freed(project, heap):
    session = create_session(project)
    assert session.load_context().catalog
    seen = weakref.ref(session)
    del session
    gc.collect()
    assert seen() is None


def test_a_catalog_is_reported_before_the_users_hooks_change_it(project, heap):
    settings = """\
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
    load_catalogs(project)
    assert heap.properties["number_of_datasets"] == 1


# The functions for other packages


def test_a_plugin_sends_an_event_of_its_own(project, heap):
    own = {
        "text": "a" * 2000,
        "too large": 10**309,
        "truth": True,
        "nothing": None,
        "nested": {"a": [1]},
        "endless": float("inf"),
        "not a number": float("nan"),
        "trap": Trap(),
        "k" * 2000: 1,
        7: 7,
    }
    taken = dict.fromkeys(("username", "os", "project_id", "tools"), "mine")
    assert send_telemetry_event("e" * 2000, own | taken, project) is True
    assert heap.names == ["e" * 1023]
    sent = dict(heap.properties)
    added = {name: sent.pop(name) for name in base_properties(project)}
    assert sent == {
        "text": "a" * 1023,
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


def test_an_event_of_a_plugin_belongs_to_its_path(project, other_project, heap):
    bootstrap_project(other_project)
    assert send_telemetry_event("x", {}, project) is True
    assert heap.project_ids == {SPACESHIPS}
    assert send_telemetry_event("outside", {"project_id": "x", "tools": "x"}) is True
    assert not {"project_id", "tools", "example_pipeline"} & set(heap.properties)


@pytest.mark.parametrize(
    ("parsed", "is_valid"),
    [
        ({"consent": False}, True),
        ({"consent": "yes"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_an_old_kedro_viz_learns_whether_a_file_decides(parsed, is_valid):
    assert kedro_telemetry.plugin._is_valid_syntax(parsed) is is_valid


def test_the_application_at_heap_can_be_another(heap, patch):
    patch.setenv("HEAP_APPID_DEV", "5")
    send_telemetry_event("x")
    assert heap.events[0]["app_id"] == kedro_telemetry._get_heap_app_id() == "5"


# Every moment: what a process prints, stores and imports because of the plugin

# A replacement for the module that does nothing
NO_TELEMETRY = """
import sys
sys.modules["kedro_telemetry.plugin"] = sys.modules[__name__]
telemetry_hook = object()
"""
QUIET = "{version: 1, disable_existing_loggers: false, loggers: {}}\n"
# A process with one session
SESSION = """
from pathlib import Path
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
bootstrap_project(Path.cwd())
with KedroSession.create(project_path=Path.cwd()) as session:
    assert session.load_context().catalog
"""
RECORD = """
import atexit, os, sys
import kedro_telemetry

def record():
    with open(os.environ["MODULES_FILE"], "w") as file:
        print(*sys.modules, file=file)

atexit.register(record)
"""
PATIENT = "kedro_telemetry.DEADLINE = 20.0\n"  # a machine may be busy
TERMINAL = "sys.stderr.isatty = lambda: True\n"
# The packages of Python itself of which an event may import parts
IMPORTED_BY_AN_EVENT = """
base64 binascii encodings email hashlib http importlib quopri select selectors socket
ssl stringprep tempfile tomllib unicodedata urllib uuid
"""
NETWORK = {"http", "select", "selectors", "socket", "ssl"}
SHOWN_FOR_DEBUGGING = r"kedro-telemetry would send:\n\{\n.*\n\}\n"
ADDED_ID = r'\n\[tool\.kedro_telemetry\]\nproject_id = "[0-9a-f]{32}"\n'
NEW_IDS = {
    "project/pyproject.toml": re.escape(KEDRO_TABLE) + ADDED_ID,
    "{config}/telemetry.toml": r'\[telemetry\]\nuuid = "[0-9a-f]{32}"\n',
}


class Moment(NamedTuple):
    """A moment in which a process runs, and all that the plugin does in it.

    `files` are written before, and {config} is the user's Kedro configuration folder.
    """

    variables: Mapping[str, str] = MappingProxyType({})
    files: Mapping[str, str] = MappingProxyType({})
    mode: str = "200"  # Heap's
    start: str = PATIENT  # code that runs first
    printed: str = re.escape(NOTICE + "\n")  # a pattern for standard error
    stored: Mapping[str, str] = MappingProxyType(NEW_IDS)  # patterns for contents
    connections: int = 1


MOMENTS = {
    "a first event": Moment(),
    "a first event in a terminal": Moment(
        start=PATIENT + TERMINAL, stored=NEW_IDS | {"{config}/telemetry.notice": ""}
    ),
    "after an event": Moment(
        files={
            "{config}/telemetry.toml": f'[telemetry]\nuuid = "{IDENTITY}"\n',
            "project/pyproject.toml": KEDRO_TABLE + ID_TABLE,
        },
        stored={},
    ),
    "after opting in": Moment(files={f"home/{DECISION}": YES}, printed=""),
    "after a failure": Moment(mode="reset"),
    "after a status of 500": Moment(mode="500"),
    "after two seconds": Moment(
        mode="hang", start="", stored=NEW_IDS | {"{config}/telemetry.backoff": ""}
    ),
    "in a back-off": Moment(
        files={"{config}/telemetry.backoff": ""}, printed="", stored={}, connections=0
    ),
    "after a denial": Moment(
        files={f"home/{DECISION}": NO}, printed="", stored={}, connections=0
    ),
    "after a denial by a variable": Moment(
        variables={"DO_NOT_TRACK": "1"}, printed="", stored={}, connections=0
    ),
    "in debug mode": Moment(
        variables={"KEDRO_TELEMETRY_DEBUG": "1"},
        printed=SHOWN_FOR_DEBUGGING,
        stored={},
        connections=0,
    ),
    "on a CI machine": Moment(variables={"CI": "true"}, printed="", stored={}),
}
KEDRO_MAIN = "from kedro.framework.cli import main\nsys.argv = {}\nmain()\n"
# What runs, and its exit status
WAYS = {
    "kedro info": (KEDRO_MAIN.format(["kedro", "info"]), 0),
    "kedro run": (KEDRO_MAIN.format(["kedro", "run"]), 0),
    "a command that fails": (KEDRO_MAIN.format(["kedro", "run", "--pipeline=x"]), 1),
    "a session": (SESSION, 0),
}
every_moment = pytest.mark.parametrize(
    ("moment", "way"),
    [
        *((moment, "kedro info") for moment in MOMENTS),
        ("a first event", "kedro run"),
        pytest.param("a first event", "a command that fails", marks=since_kedro_0_19),
        ("a first event", "a session"),
        ("in a back-off", "a session"),
        ("after a denial", "a session"),
        ("in debug mode", "a session"),
    ],
)


class Seen(NamedTuple):
    """What can be seen of a process that has ended."""

    status: int
    output: str
    errors: str
    modules: set[str]
    connections: int
    changes: Mapping[str, str]  # the text of each file that is new or was written


@pytest.fixture(scope="session")
def observe(tmp_path_factory, python_path) -> Callable[[str | None, str], Seen]:
    """A function that runs a way in a moment, or without the plugin (None), once."""
    base = tmp_path_factory.mktemp("moments")
    pem = write(base / "heap.pem", HEAP_PEM)
    stub = write(base / "stub/kedro_telemetry.py", NO_TELEMETRY).parent

    @cache
    def observe(name: str | None, way: str) -> Seen:
        moment = MOMENTS[name or "a first event"]
        shutil.rmtree(base / "root", ignore_errors=True)
        project = write_project(base / "root/project", "spaceships", KEDRO_TABLE)
        home = base / "root/home"
        config = config_in(home).relative_to(base / "root").as_posix()
        for file, text in moment.files.items():
            write(base / "root" / file.format(config=config), text)
        (base / "root/tmp").mkdir()
        before = contents(base / "root")
        path = os.pathsep.join([*([str(stub)] if name is None else []), python_path])
        env = {
            **{key: os.environ[key] for key in os.environ.keys() - {*VARIABLES}},
            **dict.fromkeys(HOME_VARIABLES, str(home)),
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(base / "root/tmp")),
            "COLUMNS": "200",
            "KEDRO_LOGGING_CONFIG": str(write(base / "logging.yml", QUIET)),
            "MODULES_FILE": str(base / "modules"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": path,
            "SSL_CERT_DIR": str(base / "no certificates"),
            "SSL_CERT_FILE": str(pem),
            **moment.variables,
        }
        with serve(pem) as heap:
            heap.mode = moment.mode
            env["HTTPS_PROXY"] = f"http://{heap.address}"
            code = RECORD + moment.start + WAYS[way][0]
            done = run_process([sys.executable, "-c", code], env, cwd=project)
            connections = len(heap.connections)
        after = contents(base / "root")
        assert before.keys() <= after.keys(), "A file was deleted."
        return Seen(
            done.returncode,
            without_times(done.stdout),
            without_times(done.stderr),
            set((base / "modules").read_text().split()),
            connections,
            {name: after[name][0] for name in after if before.get(name) != after[name]},
        )

    return observe


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """The text of each file below a folder and the time of its last change.

    The names of folders end with a slash.
    """
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[f"{name}/"] = ("", 0)
        else:
            found[name] = (path.read_text(encoding="utf-8"), path.stat().st_mtime_ns)
    return found


def without_times(text: str) -> str:
    """What Kedro prints, without dates, times or object addresses."""
    return re.sub(r"\d+[-:]\d+[-:]\d+|\d+\.\d+ ?s|0x[0-9a-f]+", "", text)


@every_moment
def test_exit_status_and_output_stay_the_same(moment, way, observe):
    bare = observe(None, way)
    seen = observe(moment, way)
    assert bare.status == seen.status == WAYS[way][1]
    assert seen.output == bare.output
    pattern = re.compile(MOMENTS[moment].printed, re.DOTALL)
    assert pattern.subn("", seen.errors, count=1) == (bare.errors, 1), (
        "A command or session prints something different with the plugin installed."
    )
    assert seen.connections == MOMENTS[moment].connections


@every_moment
def test_only_what_README_lists_is_stored(moment, way, observe):
    config = config_in(Path("home")).as_posix()
    stored = MOMENTS[moment].stored.items()
    patterns = {name.format(config=config): pattern for name, pattern in stored}
    changes = observe(moment, way).changes
    folders = {name for name in changes if name.endswith("/")}
    assert changes.keys() - folders == patterns.keys(), (
        "README lists all that is stored: change it together with MOMENTS."
    )
    for name, pattern in patterns.items():
        assert re.fullmatch(pattern, changes[name]), f"{name} has another text."
    for folder in folders:
        assert any(name.startswith(folder) for name in patterns), f"{folder} is new."


@every_moment
def test_an_event_imports_nothing_but_modules_of_python(moment, way, observe):
    modules = observe(moment, way).modules
    found = modules - observe(None, way).modules
    roots = {name.lstrip("_").partition(".")[0] for name in found} - {"kedro_telemetry"}
    expected = set(IMPORTED_BY_AN_EVENT.split())
    if MOMENTS[moment].connections:
        assert "http.client" in modules
    else:
        expected -= NETWORK
    assert roots <= expected, (
        "An event imports more than README promises. If that is a small module of "
        "Python's own, add it to IMPORTED_BY_AN_EVENT."
    )


@pytest.mark.parametrize("moment", [name for name in MOMENTS if "denial" in name])
def test_after_a_denial_no_network_module_is_imported(moment, observe):
    found = observe(moment, "kedro info").modules - observe(None, "kedro info").modules
    assert not found & {"http.client", "urllib.request", *NETWORK}


# The path that every event takes: no failure escapes from it


class Trap:
    """An object that raises an exception, however it is used."""

    def spring(self, *_: object) -> object:
        raise RuntimeError

    __getattr__ = __str__ = __bool__ = spring


@pytest.mark.parametrize(
    ("thing", "is_accepted"),
    [(None, True), (5, False), ([None], False), (Trap(), False)],
    ids=["nothing", "number", "list", "trap"],
)
def test_exit_status_survives_whatever_is_given(thing, is_accepted, heap):
    hook = kedro_telemetry.KedroTelemetryHook()
    hook.before_command_run(project_metadata=thing, command_args=thing)
    hook.before_command_run(project_metadata=None, command_args=thing)
    hook.before_command_run(project_metadata=thing, command_args=["info"])
    hook.after_context_created(context=thing)
    hook.after_context_created(context=SimpleNamespace(_hook_manager=thing))
    hook.after_command_run()
    heap.events.clear()
    assert send_telemetry_event("properties", thing) is is_accepted
    assert send_telemetry_event("path", {}, thing) is is_accepted
    assert heap.names == ["properties", "path"] * is_accepted


class Odd(Exception):
    """A user's own exception, such as one that a test's stand-in raises."""


STAND_INS = """
threading.Thread.start builtins.open io.open pathlib.Path.mkdir pathlib.Path.touch
pathlib.Path.cwd pathlib.Path.stat os.lstat os.listdir os.path.realpath
os.path.expanduser json.dumps time.monotonic time.time uuid.uuid4 socket.getaddrinfo
importlib.util.find_spec click.echo logging.Logger.debug
"""


@pytest.mark.parametrize("name", STAND_INS.split())
def test_exit_status_survives_a_stand_in(
    name, new_project, heap, short_deadline, patch
):
    heap.mode = "hang"
    bootstrap_project(new_project)
    with patch.context() as inner:
        inner.setattr(name, Mock(side_effect=Odd))
        use_everything(new_project)


def use_everything(project: Path) -> None:
    """Use the module in every way that Kedro and other packages do."""
    hook = kedro_telemetry.telemetry_hook
    metadata = SimpleNamespace(project_path=project)
    hook.before_command_run(project_metadata=metadata, command_args=["info"])
    report_session(SimpleNamespace(list=lambda: ["a"]), project)
    hook.after_command_run()
    send_telemetry_event("x", {}, project)
    consent(project)
    kedro_telemetry._get_or_create_uuid()
    base_properties(project)


def test_exit_status_survives_a_plugin_that_exits(plugin, heap):
    """When the plugin imports its command only now, because the event names it."""
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(None, ["deck", "fail"])
    hook.after_command_run()
    assert heap.commands == ["kedro deck *****"]


@pytest.mark.parametrize("group", ["project_commands", "global_commands", "cli"])
def test_exit_status_survives_a_kedro_with_other_groups(group, heap, patch):
    patch.setattr(kedro_cli, group, Trap(), raising=False)
    hook = kedro_telemetry.telemetry_hook
    for metadata in (None, SimpleNamespace(project_path=None)):
        hook.before_command_run(metadata, ["info"])
        hook.after_command_run()
    assert len(heap.events) == 2


def test_exit_status_survives_a_clock_that_stops(heap, patch):
    clock = Mock(side_effect=[1.0, Odd, Odd, Odd])
    patch.setattr(
        kedro_telemetry, "time", SimpleNamespace(time=time.time, monotonic=clock)
    )
    heap.mode = "reset"
    assert send_telemetry_event("x") is False


def test_exit_status_and_output_do_not_depend_on_loggers():
    """0.9.0 sets one to DEBUG when it is imported."""
    code = """
    import logging
    def seen():
        for logger in (logging.root, logging.getLogger("kedro_telemetry")):
            yield logger.level, logger.handlers, logger.propagate, logger.disabled
    before = list(seen())
    import kedro_telemetry
    print(list(seen()) == before)
    """
    assert run_python("-c", code).stdout == "True\n"


@pytest.mark.parametrize("error", [SystemExit, pytest.fail.Exception])
def test_exit_status_survives_a_network_that_fails_a_test(error, log, patch):
    """Otherwise, pytest reports an exception in a thread, as an error with -W error."""
    reported = Mock()
    patch.setattr(threading, "excepthook", reported)
    patch.setattr(socket, "getaddrinfo", Mock(side_effect=error("no network here")))
    assert send_telemetry_event("x") is False
    assert log.messages[-1].endswith(f"}}: {error.__name__}")
    reported.assert_not_called()


def test_exit_status_survives_an_audit_hook_that_raises(new_project, heap):
    """Test frameworks use one to forbid files, threads or connections."""
    code = """
    import sys, traceback
    from pathlib import Path
    from test_kedro_telemetry import Odd, use_everything
    def forbid(event, arguments):
        if event == forbidden: raise Odd
    escaped = []
    forbidden = None
    sys.addaudithook(forbid)
    for event in ("import", "open", "_thread.start_new_thread", "socket.connect",
                  "socket.getaddrinfo", "os.listdir", "os.scandir", "os.mkdir"):
        forbidden = event
        try:
            use_everything(Path.cwd())
        except Odd as error:
            forbidden = None
            escaped.append((event, traceback.extract_tb(error.__traceback__)[1].name))
        forbidden = None
    print(escaped)
    """
    shown = run_python("-c", code, CI="1").stdout.splitlines()[-1:]
    assert shown == ["[]"], "Exceptions get out of the functions that are named here."


@pytest.mark.parametrize("error", [Odd, SystemExit])
def test_exit_status_survives_a_log_that_raises(error, heap, log, patch):
    assert send_telemetry_event(Trap()) is False
    assert log.messages == ["An event was lost: RuntimeError"]
    patch.setattr(log.handler, "emit", Mock(side_effect=error))
    assert send_telemetry_event(Trap()) is False
    assert send_telemetry_event("x") is True


def test_exit_status_survives_an_event_with_brackets_in_kedros_log(
    heap, log, patch, capfd
):
    patch.setattr(kedro_telemetry.logger, "handlers", [RichHandler()])
    patch.setattr(kedro_telemetry.logger, "propagate", False)
    assert send_telemetry_event("[/oops]") is True
    assert '"[/oops]"' in re.sub(r"\s+", "", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("name", "value", "is_sent"),
    [
        ("_KEDRO_COMPLETE", "bash_complete", False),
        ("_KD_COMPLETE", "zsh_source", False),
        ("_KEDRO_COMPLETE", "", True),
        ("IS_COMPLETE", "1", True),
        ("_KEDRO_COMPLETED", "1", True),
    ],
)
def test_TAB_in_a_shell_sends_nothing(name, value, is_sent, heap, patch):
    """click names the variable after the program, which people rename."""
    patch.setenv(name, value)
    assert send_telemetry_event("x") is bool(heap.connections) is is_sent


def test_kedros_tests_can_replace_the_question_for_consent(project, heap, patch):
    name = "kedro_telemetry.plugin._check_for_telemetry_consent"
    with patch.context() as inner:
        inner.setattr(name, Mock(return_value=False))
        run("run")
        run("info")
    assert heap.connections == []
    run("run")
    assert len(heap.events) == 1


def test_debug_mode_prints_and_changes_nothing(
    new_project, heap, tmp_path, patch, capfd
):
    patch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    before = files(tmp_path)
    assert send_telemetry_event("x", {"a": 1}, new_project) is False
    output, errors = capfd.readouterr()
    assert errors.startswith("kedro-telemetry would send:\n{\n  ")
    event = json.loads(errors.partition(":\n")[2])
    assert (event["event"], event["properties"]["a"]) == ("x", 1)
    assert event["identity"] == "missing_user_identity"
    assert "project_id" not in event["properties"]
    assert (output, heap.connections, files(tmp_path)) == ("", [], before)


def test_debug_mode_imports_and_stores_nothing(observe):
    seen = observe("in debug mode", "kedro info")
    imported = seen.modules - observe(None, "kedro info").modules
    assert not imported & {"http.client", "urllib.request", *NETWORK}
    assert seen.changes == {}


@pytest.mark.parametrize("text", ["", NO], ids=["on", "off"])
def test_debug_mode_shows_a_session_or_why_it_is_not_sent(
    text, project, heap, patch, capfd
):
    write(project / ".telemetry", text)
    patch.setenv("KEDRO_TELEMETRY_DEBUG", "0")  # not empty
    load_catalogs(project)
    errors = capfd.readouterr().err
    assert ('"event": "Kedro Project Statistics"' in errors) is (text == "")
    assert ("sends nothing: this file denies consent" in errors) is (text == NO)
    assert heap.connections == []


def test_debug_mode_shows_ids_in_a_back_off(project, known_user, config, patch, capfd):
    write(config / "telemetry.backoff", "")
    patch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    bootstrap_project(project)
    assert send_telemetry_event("x", {}, project) is False
    event = json.loads(capfd.readouterr().err.partition(":\n")[2])
    assert event["identity"] == event["properties"]["username"] == IDENTITY
    assert event["properties"]["project_id"] == SPACESHIPS


def test_debug_mode_is_off_where_the_variable_is_empty(heap, patch):
    patch.setenv("KEDRO_TELEMETRY_DEBUG", "")
    assert send_telemetry_event("x") is True


# Files: changed in place, and only if they are still what was read

OLD_DECISION = "consent: true  # and I said so on Friday"


@posix
def test_a_file_changed_in_place_stays_the_users(new_project, tmp_path):
    """Its links, mode, owner and extended attributes, but not its time."""
    path = tmp_path / "elsewhere.toml"
    (new_project / "pyproject.toml").rename(path)
    (new_project / "pyproject.toml").symlink_to(path)
    os.link(path, tmp_path / "other name.toml")
    path.chmod(0o640)
    os.utime(path, (1, 1))
    if is_root:
        os.chown(path, 1234, 5678)
    attributes = {}
    if hasattr(os, "setxattr"):
        with contextlib.suppress(OSError):  # some file systems have none
            os.setxattr(path, "user.note", b"mine")
            attributes = {"user.note": b"mine"}
    before = path.stat()
    assert "project_id" in base_properties(new_project)
    assert (new_project / "pyproject.toml").is_symlink()
    assert "project_id" in (tmp_path / "other name.toml").read_text()
    for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_nlink"):
        assert getattr(path.stat(), name) == getattr(before, name)
    assert {name: os.getxattr(path, name) for name in attributes} == attributes
    assert path.stat().st_mtime > before.st_mtime


@root
def test_a_file_of_a_colleague_is_changed_in_place(new_project, patch):
    """One that the group may write. Its new text must not need another owner."""
    base_properties(new_project)  # imports what it needs, which may be root's
    with TemporaryDirectory() as folder, patch.context() as inner:
        os.chmod(folder, 0o755)
        path = write(Path(folder, "pyproject.toml"), KEDRO_TABLE)
        path.chmod(0o664)
        os.chown(path, 1234, 5678)
        inner.setenv("HOME", folder)
        inner.chdir(folder)
        try:
            os.setegid(5678)
            os.seteuid(4321)
            assert "project_id" in base_properties(path.parent)
        finally:
            os.seteuid(0)
            os.setegid(0)
        assert path.stat().st_uid == 1234


@root
@pytest.mark.skipif(not shutil.which("unshare"), reason="only Linux has unshare")
def test_a_file_that_is_mounted_is_changed_in_place(new_project):
    """Docker can mount a single file, which cannot be replaced then."""
    path = new_project / "pyproject.toml"
    code = f"""
    import os, subprocess
    from pathlib import Path
    from kedro_telemetry import _get_project_properties
    path = {str(path)!r}
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        os.rename(path, path + ".old")
    except OSError:
        print("mounted")
    print("project_id" in _get_project_properties("", Path(path).parent))
    """
    words = ["unshare", "-m", sys.executable, "-c", textwrap.dedent(code)]
    done = run_process(words, os.environ)
    if "mounted" not in done.stdout:
        pytest.skip("nothing can be mounted here")
    assert done.stdout == "mounted\nTrue\n"
    assert re.fullmatch(NEW_IDS["project/pyproject.toml"], path.read_text())


def test_a_file_that_is_read_only_is_not_changed_in_place(new_project, decision):
    """Root could write to it, but somebody has made it read-only on purpose."""
    path = new_project / "pyproject.toml"
    path.chmod(0o444)
    assert "project_id" not in base_properties(new_project)
    assert path.read_text() == KEDRO_TABLE
    write(decision, OLD_DECISION).chmod(0o444)
    assert run("telemetry disable").exit_code == 1
    assert decision.read_text() == OLD_DECISION


@posix
@pytest.mark.parametrize("room", [0, 1, 30, 68])
def test_a_file_changed_in_place_is_whole_on_a_full_disk(room, new_project):
    """A limit to the size of files stands in for the disk."""
    path = new_project / "pyproject.toml"
    limit = path.stat().st_size + room
    code = f"""
    import resource
    from pathlib import Path
    from kedro_telemetry import _get_project_properties
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    print("project_id" in _get_project_properties("", Path({str(new_project)!r})))
    """
    assert run_python("-c", code).stdout == "False\n"
    assert path.read_text() == KEDRO_TABLE


@posix
def test_a_decision_changed_in_place_is_whole_on_a_full_disk(decision):
    write(decision, "consent: true")
    code = """
    import resource, sys
    from kedro.framework.cli import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (13, 13))
    sys.argv = ["kedro", "telemetry", "disable"]
    main()
    """
    done = run_python("-c", code)
    assert (done.returncode, decision.read_text()) == (1, "consent: true")
    assert "Reason: no space left" in done.stderr


def run_with(
    action: Callable[[], None], function: Callable[[], object], line: int
) -> bool:
    """Act before the module runs so many lines; return whether it ran so many."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        nonlocal left
        if frame.f_code.co_filename != kedro_telemetry.__file__:
            return None
        if event == "line":
            left -= 1
            if not left:
                action()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return left <= 0


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def opt_out(_: Path) -> None:
    command = kedro_telemetry._telemetry_command
    with click.Context(command):
        command.callback("disable")


@pytest.mark.parametrize(
    ("change", "file", "old", "new"),
    [
        (base_properties, "pyproject.toml", KEDRO_TABLE, KEDRO_TABLE + "{id}"),
        (opt_out, DECISION, OLD_DECISION, NO),
        (opt_out, DECISION, "#\n", NO),
    ],
    ids=["addition", "shorter", "longer"],
)
@pytest.mark.filterwarnings("ignore:.*FileIO")  # which is then closed later
def test_a_file_changed_in_place_is_whole_after_ctrl_c(change, file, old, new, user):
    """Whenever it comes, or whatever else a signal handler raises."""
    path = user / file
    pattern = re.escape(new).replace(re.escape("{id}"), ADDED_ID)
    was_interrupted = True
    for line in range(1, 1000):
        write(path, old)
        with contextlib.suppress(KeyboardInterrupt):
            was_interrupted = run_with(press_ctrl_c, lambda: change(user), line)
        text = path.read_text()
        assert text == old or re.fullmatch(pattern, text), f"before line {line}"
        if not was_interrupted:
            break
    assert re.fullmatch(pattern, text)


@pytest.fixture
def meanwhile(patch) -> Callable[[Callable], None]:
    """A function that makes another program act after a file has been read.

    It acts when the random number is created that is added to the file.
    """

    def set_action(action: Callable[[], object]) -> None:
        number = uuid.uuid4()
        patch.setattr(uuid, "uuid4", lambda: (action(), number)[1])

    return set_action


@pytest.mark.parametrize(
    "text",
    ["", KEDRO_TABLE + "# mine\n", "#" * len(KEDRO_TABLE), None],
    ids=["emptied", "added", "replaced", "deleted"],
)
def test_what_an_editor_has_saved_is_not_changed_in_place(text, new_project, meanwhile):
    path = new_project / "pyproject.toml"
    before = set(files(new_project)) - {path}

    def save() -> None:
        path.unlink()
        if text is not None:
            path.write_text(text)

    meanwhile(save)
    assert "project_id" not in base_properties(new_project)
    assert (path.read_text() if path.exists() else None) == text
    assert set(files(new_project)) - {path} == before, "Another file is left."


def test_what_an_editor_saves_while_an_id_is_added_in_place_stays(new_project):
    """An id is nothing but an addition, and what comes after it is not cut off."""
    path = new_project / "pyproject.toml"
    later = ""

    def save() -> None:
        nonlocal later
        text = path.read_text().replace("# mine", "# ours")
        later = "# later\n" if "project_id" in text else ""
        path.write_text(text + later)

    for line in range(1, 1000):
        write(path, "# mine\n" + KEDRO_TABLE)
        was_saved = run_with(save, lambda: base_properties(new_project), line)
        text = path.read_text()
        if not was_saved:
            break
        saved = "# ours\n" + re.escape(KEDRO_TABLE)
        assert re.fullmatch(f"{saved}({ADDED_ID})?{later}", text), f"at line {line}"
    assert re.fullmatch("# mine\n" + re.escape(KEDRO_TABLE) + ADDED_ID, text)


def test_an_id_that_another_process_has_stored_is_sent(new_project, meanwhile):
    winner = KEDRO_TABLE + ID_TABLE
    meanwhile(lambda: write(new_project / "pyproject.toml", winner))
    sent = base_properties(new_project)["project_id"]
    assert sent == hashed_id(PROJECT_ID, "undefined_package_name")
    assert (new_project / "pyproject.toml").read_text() == winner


def test_an_identity_that_another_process_has_stored_is_sent(config, meanwhile):
    winner = f'[telemetry]\nuuid = "{IDENTITY}"\n'
    meanwhile(lambda: write(config / "telemetry.toml", winner))
    assert kedro_telemetry._get_or_create_uuid() == IDENTITY
    assert (config / "telemetry.toml").read_text() == winner


@posix
def test_ten_processes_add_one_id_in_place(new_project, config):
    """As in a job array. Whichever id stays, each process has one to send."""
    code = f"""
    import os
    from pathlib import Path
    from kedro_telemetry import _get_or_create_uuid, _get_project_properties
    _get_project_properties("", None)
    start, go = os.pipe()
    for _ in range(10):
        if os.fork() == 0:
            os.close(go)
            os.read(start, 1)  # returns when the parent closes its end
            sent = _get_project_properties("", Path({str(new_project)!r}))
            os._exit(not ("project_id" in sent and _get_or_create_uuid()))
    os.close(go)
    print({{os.wait()[1] for _ in range(10)}})
    """
    assert run_python("-c", code).stdout == "{0}\n"
    text = (new_project / "pyproject.toml").read_text()
    assert re.fullmatch(NEW_IDS["project/pyproject.toml"], text)
    assert stored_uuid(config)


# Which project an event belongs to


@pytest.fixture
def packaged(project, other_project, patch) -> Callable[[], None]:
    """A function that runs `rockets` as a package in the `spaceships` folder."""
    patch.syspath_prepend(str(other_project / "src"))

    def run_packaged() -> None:
        kedro_project.configure_project("rockets")
        assert len(kedro_project.pipelines) == 2
        session = KedroSession.create(conf_source=str(other_project / "conf"))
        assert session.load_context().catalog

    return run_packaged


def test_a_packaged_project_is_not_that_of_the_folder(packaged, new_project, heap):
    before = files(new_project)
    packaged()
    assert heap.project_ids == {None}
    assert "tools" not in heap.properties
    assert heap.properties["number_of_pipelines"] == 2
    assert heap.properties["number_of_nodes"] == 3
    assert files(new_project) == before


def test_an_installed_package_is_its_checkouts_project(project, tmp_path, heap, patch):
    """Some images copy a project and then run `pip install .`."""
    shutil.copytree(project / "src", tmp_path / "site")
    patch.syspath_prepend(str(tmp_path / "site"))
    kedro_project.configure_project("spaceships")
    assert KedroSession.create().load_context().catalog
    assert heap.project_ids == {SPACESHIPS}
    assert ("tools" in heap.properties) is (KEDRO >= (0, 19))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("other/rockets/src/rockets/settings.py", "DO_NOT_TRACK = True\n"),
        ("work/spaceships/src/spaceships/settings.py", "DO_NOT_TRACK = True\n"),
        ("work/spaceships/.telemetry", NO),
    ],
)
def test_after_a_denial_by_a_package_or_its_folder_nothing_is_sent(
    file, text, packaged, tmp_path, heap
):
    write(tmp_path / file, text)
    packaged()
    assert heap.connections == []


# Consent: anyone can deny, and a denial outweighs any grant


class Denial(NamedTuple):
    """A way to opt out, with the reason that the user is shown.

    Each file is written in full. In paths and reasons, {project} is the project root,
    and {home} is the user's home folder. The current directory is the project's
    `notebooks` folder.
    """

    reason: str
    variables: Mapping[str, str] = MappingProxyType({})
    files: Mapping[str, str] = MappingProxyType({})
    reason_if_loaded: str | None = None  # where Kedro has loaded the project


def denial_by_variable(name: str, value: str = "1") -> Denial:
    return Denial(f"{name} is set", {name: value})


def denial_by_file(path: str, **others: str) -> Denial:
    return Denial(f"this file denies consent:\n{path}", {}, {path: NO} | others)


def denial_by_settings(name: str, text: str, if_loaded: str | None = None) -> Denial:
    file = "{project}/" + SETTINGS
    return Denial(f"this file names {name}:\n{file}", {}, {file: text}, if_loaded)


# The ways to opt out in README's table, keyed by the code that it shows
README_DENIALS = {
    "DO_NOT_TRACK": denial_by_variable("DO_NOT_TRACK"),
    "KEDRO_DISABLE_TELEMETRY": denial_by_variable("KEDRO_DISABLE_TELEMETRY"),
    "kedro telemetry disable": denial_by_file("{home}/.config/kedro/.telemetry"),
    "kedro new --telemetry=no": denial_by_file("{project}/.telemetry"),
    "consent: false": denial_by_file("{project}/notebooks/.telemetry"),
    'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)': denial_by_settings(
        "DISABLE_HOOKS_FOR_PLUGINS",
        'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n',
        "Kedro's setting DISABLE_HOOKS_FOR_PLUGINS names kedro-telemetry",
    ),
    "KEDRO_DISABLE_TELEMETRY = True": denial_by_settings(
        "KEDRO_DISABLE_TELEMETRY", "KEDRO_DISABLE_TELEMETRY = True\n"
    ),
}
DENIALS = README_DENIALS | {
    "an empty variable": denial_by_variable("KEDRO_DISABLE_TELEMETRY", ""),
    "Kedro's switch as a variable": Denial(
        "DYNACONF_DISABLE_HOOKS_FOR_PLUGINS names kedro-telemetry",
        {"DYNACONF_DISABLE_HOOKS_FOR_PLUGINS": '@json ["kedro-telemetry"]'},
    ),
    "Kedro's own CI": Denial(
        "GITHUB_REPOSITORY_OWNER is kedro-org",
        {"GITHUB_REPOSITORY_OWNER": "kedro-org"},
    ),
    "the user, and not the project": denial_by_file(
        "{home}/.config/kedro/.telemetry", **{"{project}/.telemetry": YES}
    ),
    "the project, and not the user": denial_by_file(
        "{project}/.telemetry", **{"{home}/.config/kedro/.telemetry": YES}
    ),
    "a project whose file is too large": Denial(
        "this file cannot be read:\n{project}/pyproject.toml",
        files={"{project}/pyproject.toml": KEDRO_TABLE + "#" * 2**20},
    ),
    "settings that Kedro cannot import": denial_by_settings(
        "DO_NOT_TRACK", "DO_NOT_TRACK = True\nimport gone\n"
    ),
    "settings that Kedro cannot import all of": Denial(
        "this file imports *:\n{project}/" + SETTINGS,
        files={"{project}/" + SETTINGS: "from gone import *\n"},
    ),
    "a file that cannot be read": Denial(
        "this file cannot be read:\n{project}/.telemetry",
        files={"{project}/.telemetry": YES + "#" * 2**20},
    ),
}
# The denial that tries each source in `_consent_sources`
SOURCES = {
    "_environment_consent": "DO_NOT_TRACK",
    "_file_consent": "kedro telemetry disable",
    "_Consent": "a project whose file is too large",
    "_settings_consents": "KEDRO_DISABLE_TELEMETRY = True",
}
HOW_TO_TRY = (
    "Add the way to opt out to README's table and to README_DENIALS in the tests, "
    "which try it with every way for an event to leave."
)


def test_each_source_of_consent_has_a_denial_that_is_tried():
    code = inspect.getsource(kedro_telemetry._consent_sources)
    sources = re.findall(r"\byield (?:from )?(\w+)", code)
    untried = [source for source in sources if SOURCES.get(source) not in DENIALS]
    assert not untried, (
        f"A source of consent has no denial that is tried: {', '.join(untried)}. "
        f"{HOW_TO_TRY} Name the denial in SOURCES."
    )


@pytest.mark.parametrize("name", kedro_telemetry.OPT_OUT_VARIABLES)
def test_each_variable_that_opts_out_has_a_denial_that_is_tried(name):
    tried = [name for denial in README_DENIALS.values() for name in denial.variables]
    assert name in tried, f"No denial tries the variable {name}. {HOW_TO_TRY}"


@pytest.fixture(params=DENIALS)
def denied(request, new_project, user, patch) -> SimpleNamespace:
    """A project without an id in which somebody has opted out, and the reasons."""
    denial = DENIALS[request.param]
    places = {"project": new_project, "home": user}
    for name, value in denial.variables.items():
        patch.setenv(name, value)
    for path, text in denial.files.items():
        write(Path(path.format(**places)), text)
    here = new_project / "notebooks"
    here.mkdir(exist_ok=True)
    patch.chdir(here)
    reason = denial.reason.format(**places)
    if_loaded = denial.reason_if_loaded or reason
    return SimpleNamespace(project=new_project, reason=reason, if_loaded=if_loaded)


def by_a_command(project: Path) -> None:
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(bootstrap_project(project), ["registry", "list"])
    hook.after_command_run()


def by_a_session(project: Path) -> None:
    with contextlib.suppress(ImportError):  # from settings that Kedro rejects
        load_catalogs(project)


def by_other_packages(project: Path) -> None:
    """In a process that loads no project."""
    assert send_telemetry_event("x", {"a": 1}, project) is False
    assert consent(project) is False
    found = json.loads(json.dumps(base_properties(project)))
    assert ("os" in found, "project_id" in found) == (True, False)


@pytest.mark.parametrize("way_out", [by_a_command, by_a_session, by_other_packages])
def test_after_a_denial_nothing_happens(way_out, denied, tmp_path, heap, patch, capfd):
    for module in ("http.client", "urllib.request"):
        patch.delitem(sys.modules, module, raising=False)
    before = files(tmp_path)
    way_out(denied.project)
    assert (files(tmp_path), heap.connections) == (before, [])
    assert not {"http.client", "urllib.request"} & set(sys.modules)
    assert capfd.readouterr().err == ""


def test_after_a_denial_debug_mode_prints_the_reason(denied, patch, capfd):
    patch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x", {}, denied.project) is False
    shown = f"kedro-telemetry sends nothing: {denied.reason}\n"
    assert capfd.readouterr() == ("", shown)


def test_after_a_denial_by_an_error_nothing_is_sent(heap, patch):
    """Any doubt is a denial."""
    patch.setattr(Path, "cwd", Mock(side_effect=Odd))
    assert send_telemetry_event("x") is False
    assert heap.connections == []


def test_after_a_denial_there_is_no_identity(patch, known_user):
    patch.setenv("DO_NOT_TRACK", "1")
    assert kedro_telemetry._get_or_create_uuid() == ""


def test_a_fork_of_kedro_on_GitHub_denies_nothing(heap, patch):
    patch.setenv("GITHUB_REPOSITORY_OWNER", "acme")
    assert send_telemetry_event("x") is True


# What a `.telemetry` says, and where it counts


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("consent: true", True),
        ("CONSENT\t:Yes \t", True),
        *((f"consent: {word}", True) for word in ("on", "y", "1")),
        ("\"consent\": 'true'", True),
        ("'consent' \t:\t\"1\"", True),
        ("consent: consent", False),
        ("consent: enabled", False),
        ("  consent: true # I said", True),
        ("\ufeffconsent: true\r\n\r\n", True),
        ("# consent: false\nconsent: true\nconsent: yes", True),
        ("consent: true".ljust(2**20), True),
        ("", None),
        ("\ufeff \t\r\n  # consent: false\n#", None),
        ("consent: false", False),
        ("consent:", False),
        ("consent = true", False),
        ("- consent: true", False),
        ("{consent: true}", False),
        ("consent: true#no", False),
        ("consent: 'true", False),
        ("consent: tru\u0435", False),
        ("consent: true\nother: 1", False),
        ("consent: true\nconsent: false", False),
        ("KEDRO_DISABLE_TELEMETRY=1\nDO_NOT_TRACK=1\n", False),
        ("<<<<<<< HEAD\nconsent: true\n=======\nconsent: true\n>>>>>>> x\n", False),
        ("consent: true".encode("utf-16"), False),
        (b"consent: true # \xff", False),
        ("consent: true".ljust(2**20 + 1), False),
    ],
    ids=lambda x: repr(x)[:50],
)
def test_a_file_that_plainly_says_so_grants_and_any_doubt_denies(text, decision, user):
    write(user / ".telemetry", text if isinstance(text, bytes) else text.encode())
    assert consent() is decision


def test_a_file_counts_where_README_says(project, user, config, tmp_path, patch):
    here = project / "notebooks"
    here.mkdir()
    patch.chdir(here)
    places = {user / ".config/kedro", here, project}
    found = {path.parent for path in kedro_telemetry._consent_files(project)}
    assert found == places, "README names these folders: change it with this test."
    for place in places:
        file = write(place / ".telemetry", NO)
        assert consent(project) is False
        file.unlink()
    for place in (tmp_path, project.parent, user, config, project / "src"):
        write(place / ".telemetry", NO)
    assert consent(project) is None


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("xdg", ["", "relative", "/nowhere", "{home}/xdg"])
def test_after_a_denial_by_the_user_XDG_CONFIG_HOME_is_the_same(
    xdg, platform, project, decision, heap, patch
):
    """VS Code from Flatpak sets it, tox and cron unset it."""
    patch.setenv("XDG_CONFIG_HOME", xdg.format(home=decision.parents[2]))
    with patch.context() as inner:
        inner.setattr(sys, "platform", platform)
        assert run("telemetry disable").exit_code == 0
    assert decision.read_text() == NO
    patch.delenv("XDG_CONFIG_HOME")
    run("info")
    assert heap.connections == []


@posix
@pytest.mark.parametrize("file", [".telemetry", "pyproject.toml", SETTINGS])
@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        lambda path: path.symlink_to("gone"),
        lambda path: path.symlink_to(path),
        pytest.param(lambda path: write(path, YES).chmod(0), marks=not_root),
    ],
    ids=["a folder", "a pipe", "a dangling link", "a loop", "no permission"],
)
def test_what_cannot_be_read_denies(make, file, project, patch, capfd):
    (project / file).unlink(missing_ok=True)
    make(project / file)
    patch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x", {}, project) is False
    shown = f"this file cannot be read:\n{project / file}\n"
    assert capfd.readouterr().err.endswith(shown)


@posix
def test_a_deleted_current_directory_denies_nothing(user, heap, patch):
    (user / "gone").mkdir()
    patch.chdir(user / "gone")
    (user / "gone").rmdir()
    assert send_telemetry_event("x") is True


# Settings: the names that Kedro has imported, or else the source, without running it


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("# DO_NOT_TRACK, KEDRO_DISABLE_TELEMETRY", None),
        ("MY_DO_NOT_TRACK_SWITCH = 1", None),
        ("DO_NOT_TRACK = None", False),
        ("globals()['KEDRO_' + 'DISABLE_TELEMETRY'] = 1", False),
        ("DISABLE_HOOKS_FOR_PLUGINS = ()", None),
        ("DISABLE_HOOKS_FOR_PLUGINS = ('kedro-viz', 'telemetry')", None),
        ("DISABLE_HOOKS_FOR_PLUGINS = ('kedro-' + 'telemetry',)", False),
        ("DISABLE_HOOKS_FOR_PLUGINS = 'kedro-viz, kedro-telemetry'", False),
        ("DISABLE_HOOKS_FOR_PLUGINS = ['kedro-viz', 'Kedro_Telemetry']", False),
        ("DISABLE_HOOKS_FOR_PLUGINS = {'kedro.telemetry'}", False),
        ("DISABLE_HOOKS_FOR_PLUGINS = frozenset(['kedro--telemetry'])", False),
        ("DISABLE_HOOKS_FOR_PLUGINS = (x for x in ())", False),
    ],
)
def test_the_names_of_imported_settings_count(text, decision, project):
    write(project / SETTINGS, text)
    bootstrap_project(project)
    assert consent(project) is decision


def test_reading_imported_settings_imports_nothing_and_calls_nothing(
    project, other_project
):
    """A module may have a `__getattr__` of the user's."""
    for root in (other_project, project):
        bootstrap_project(root)
        settings = sys.modules[f"{root.name}.settings"]
        settings.__getattr__ = Mock(side_effect=AttributeError)
        assert consent(root) is None
        assert send_telemetry_event("x", {}, other_project) is False
    settings.__getattr__.assert_not_called()


def test_kedros_switch_counts_wherever_dynaconf_finds_it(project):
    bootstrap_project(project)
    names = ("kedro-telemetry",)
    kedro_project.settings.set("DISABLE_HOOKS_FOR_PLUGINS", names)
    assert consent(project) is False


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("  # KEDRO_DISABLE_TELEMETRY, DISABLE_HOOKS_FOR_PLUGINS, import *", None),
        ("MY_DO_NOT_TRACK_SWITCH = 2 * 3", None),
        ("raise SystemExit", None),
        (b"this is no Python: '\xff\0'", None),
        ("DATA = r'D:\\\u00dcbung' + '\\N{EM DASH}'", None),
        ("import os\nos.environ.setdefault('DO_NOT_TRACK', '')", False),
        ("X = 1  # KEDRO_DISABLE_TELEMETRY", False),
        ("from gone import OFF as KEDRO_DISABLE_TELEMETRY", False),
        ("DISABLE_HOOKS_FOR_PLUGINS = ('kedro-viz',)", False),
        ("from gone import\\\n    *", False),
        ("#" * (2**20 + 1), False),
    ],
    ids=lambda x: repr(x)[:60],
)
def test_reading_other_settings_imports_nothing(text, decision, project, capfd):
    written = text if isinstance(text, bytes) else text.encode()
    write(project / SETTINGS, b"print('run')\n" + written)
    assert consent(project) is decision
    assert "spaceships" not in sys.modules
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("table", "place"),
    [
        ("", "src/spaceships/settings/__init__.py"),
        ('source_dir = "lib/python"\n', "lib/python/spaceships/settings.py"),
        ('source_dir = "~/code"\n', "../../home/code/spaceships/settings.py"),
    ],
)
def test_settings_are_found_where_the_package_is(table, place, project):
    (project / SETTINGS).unlink()
    assert consent(project) is None
    text = KEDRO_TABLE.replace("[tool.kedro]\n", f"[tool.kedro]\n{table}")
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


def test_each_checkout_of_a_project_has_settings_of_its_own(project, tmp_path):
    copied = shutil.copytree(project, tmp_path / "copy")
    write(copied / SETTINGS, "KEDRO_DISABLE_TELEMETRY = True\n")
    bootstrap_project(project)
    assert (consent(project), consent(copied)) == (None, False)


def test_an_event_imports_nothing_that_kedro_could_not(project, heap, capfd):
    write(project / "src/spaceships/__init__.py", "print('run')\nimport gone\n")
    bootstrap_project(project)
    assert "run" in capfd.readouterr().out
    assert send_telemetry_event("x", {}, project) is True
    write(project / SETTINGS, "DO_NOT_TRACK = 1\n")
    assert send_telemetry_event("x", {}, project) is False
    assert send_telemetry_event("x") is False
    assert "run" not in capfd.readouterr().out


# The notice


class Screen(io.StringIO):
    """Standard error that is shown in a terminal."""

    def isatty(self) -> bool:
        return True


class Cell(io.StringIO):
    """Standard error that is shown below a notebook cell."""


Cell.__module__ = "ipykernel.iostream"


@pytest.fixture
def new_process(patch) -> Callable[[], None]:
    """A function that forgets what this process has shown."""
    return lambda: patch.setattr(kedro_telemetry, "_unshown_notices", [NOTICE])


@pytest.mark.parametrize("kind", [Screen, Cell])
def test_the_notice_is_shown_once_to_somebody(kind, heap, config, new_process, patch):
    for shown in (NOTICE + "\n", ""):
        stream = kind()
        patch.setattr(sys, "stderr", stream)
        assert send_telemetry_event("x") is True
        assert stream.getvalue() == shown
        new_process()
    assert (config / "telemetry.notice").read_bytes() == b""


def test_the_notice_is_shown_until_a_grant_where_it_may_go_unseen(
    user, heap, new_process, capfd
):
    """As with `kedro info 2> errors.log`."""
    for shown in (NOTICE + "\n", NOTICE + "\n", ""):
        if not shown:
            write(user / ".telemetry", YES)
        new_process()
        assert send_telemetry_event("x") is True
        assert capfd.readouterr() == ("", shown)


def test_the_notice_is_shown_once_in_a_process(project, other_project, heap, capfd):
    """A web service opens sessions all day, and its log is no terminal."""
    interleave(project, other_project, project)
    assert len(heap.events) == 3
    assert capfd.readouterr().err.count(NOTICE) == 1


@pytest.mark.parametrize("path", [None, "/dev/full"])
def test_without_a_standard_error_the_event_is_sent(path, heap, patch):
    if path and not os.path.exists(path):
        pytest.skip("Linux has a full device")
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        errors = stack.enter_context(open(path, "w")) if path else None
        patch.setattr(sys, "stderr", errors)  # pythonw has none
        assert send_telemetry_event("x") is True


# Ids: one user, one UUID; one project, one table at the end of pyproject.toml


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
    ["", "telemetry = 1", "[telemetry]\nuuid = 'x'", "no toml", b"\xff", 9999 * "a=["],
    ids=["empty", "no table", "no UUID", "no TOML", "no UTF-8", "nested too deeply"],
)
def test_a_file_without_a_valid_uuid_gets_a_new_one(content, config):
    write(config / "telemetry.toml", content)
    assert kedro_telemetry._get_or_create_uuid() == stored_uuid(config)


def no_folder(config: Path) -> None:
    write(config, "a file")


def no_home(config: Path) -> None:
    """Some services have no home folder. The `user` fixture restores the variables."""
    os.environ.update(dict.fromkeys(HOME_VARIABLES, "nowhere"))


def empty_home(config: Path) -> None:
    os.environ.update(dict.fromkeys(HOME_VARIABLES, ""))


@posix
@pytest.mark.parametrize(
    "trouble",
    [
        no_folder,
        no_home,
        empty_home,
        lambda config: (config / "telemetry.toml").mkdir(parents=True),
        lambda config: write(config / "telemetry.toml", "").chmod(0o444),
        lambda config: config.mkdir() or os.mkfifo(config / "telemetry.toml"),
    ],
    ids=["no folder", "no home", "empty home", "a folder", "read-only", "a pipe"],
)
def test_an_identity_that_cannot_be_stored_is_missing(trouble, user, config, heap):
    trouble(config)
    before = set(files(user))
    assert send_telemetry_event("x") is True
    assert heap.events[0]["identity"] == "missing_user_identity"
    assert heap.properties["username"] == kedro_telemetry._get_or_create_uuid() == ""
    assert set(files(user)) == before


@pytest.mark.parametrize(
    ("platform", "name", "value", "folder"),
    [
        ("linux", "XDG_CONFIG_HOME", "{home}/xdg", "xdg/kedro"),
        ("linux", "XDG_CONFIG_HOME", "relative", ".config/kedro"),
        ("darwin", "HOME", "{home}", "Library/Application Support/kedro"),
        ("win32", "LOCALAPPDATA", "{home}/Local", "Local/kedro/kedro"),
    ],
)
def test_each_platform_has_its_folder(platform, name, value, folder, user, patch):
    patch.setenv(name, value.format(home=user))
    with patch.context() as inner:
        inner.setattr(sys, "platform", platform)
        identity = kedro_telemetry._get_or_create_uuid()
    assert stored_uuid(user / folder) == identity


def test_a_CI_machine_gets_no_id_or_notice(new_project, heap, log, tmp_path, patch):
    patch.setenv("CI", "1")
    before = files(tmp_path)
    screen = Screen()
    patch.setattr(sys, "stderr", screen)
    assert send_telemetry_event("x", {}, new_project) is True
    assert heap.events[0]["identity"] == "missing_user_identity"
    assert "project_id" not in heap.properties
    assert (screen.getvalue(), files(tmp_path)) == ("", before)
    assert '"identity": "missing_user_identity"' in log.messages[-1]


def test_a_CI_machine_uses_stored_ids(project, known_user, heap, patch):
    patch.setenv("CI", "1")
    assert send_telemetry_event("x", {}, project) is True
    assert heap.events[0]["identity"] == IDENTITY
    assert "project_id" in heap.properties


OPENED = '[tool.kedro]\na = "ü"\n'
ADDED = "\n[tool.kedro_telemetry]\nproject_id = 'ID'\n"


@pytest.mark.parametrize(
    ("text", "added"),
    [
        (OPENED, ADDED),
        (OPENED.replace("\n", "\r\n"), ADDED.replace("\n", "\r\n")),
        (OPENED.rstrip(), ADDED),
        (f'a = """\n[tool.kedro_telemetry]\n"""\n{OPENED}', ADDED),
        (f"[tool.kedro_telemetry]  # ours\nother = 1\n{OPENED}", ""),
        (f"[tool]\nkedro_telemetry = 5\n{OPENED}", ""),
        ("tool = {kedro = {a = 1}}\n", ""),
        ("[tool.black]\n", ""),
        (f"\ufeff{OPENED}", ""),
        ("[tool.kedro]\n# \udcff is not UTF-8\n", ""),
    ],
)
def test_an_id_is_added_in_place_or_nothing(text, added, tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    base_properties(tmp_path)
    written = re.sub(rb'"[0-9a-f]{32}"', b"'ID'", path.read_bytes())
    assert written == (text + added).encode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("written", "hashed"), [('"mine"', "mine"), ('""', ""), ("5", "5")]
)
def test_an_id_is_taken_as_it_stands_in_a_kedro_project(written, hashed, tmp_path):
    table = f"[tool.kedro_telemetry]\nproject_id = {written}\n"
    path = write(tmp_path / "pyproject.toml", table)
    assert "project_id" not in base_properties(tmp_path)
    write(path, "[tool.kedro]\n" + table)
    sent = base_properties(tmp_path)["project_id"]
    assert sent == hashed_id(hashed, "undefined_package_name")
    assert path.read_text() == "[tool.kedro]\n" + table


@pytest.mark.parametrize("declared", ['"spaceships"', "5"])
def test_an_id_is_hashed_with_the_package_that_kedro_has_loaded(declared, project):
    bootstrap_project(project)
    text = KEDRO_TABLE.replace('"spaceships"', declared) + ID_TABLE
    write(project / "pyproject.toml", text)
    assert base_properties(project)["project_id"] == SPACESHIPS


# Properties: those of every event, and those of a session


@pytest.mark.parametrize(
    ("name", "value", "is_ci"),
    [
        *((name, "true", True) for name in kedro_telemetry.CI_VARIABLES),
        ("JENKINS_URL", "https://ci", True),
        ("JENKINS_URL", "", False),
        ("JENKINS_URL", "0", False),
        ("JENKINS_URL", "False", False),
    ],
)
def test_a_CI_machine_is_known_by_its_variables(name, value, is_ci, patch):
    patch.setenv(name, value)
    assert base_properties(None)["is_ci_env"] is is_ci


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("\"['Linting', 'Testing']\"", "Linting, Testing"),
        ("\"['Data Structure','PySpark']\"", "Data Structure, PySpark"),
        ('"Kedro Viz"', "Kedro Viz"),
        ("\"['None']\"", "None"),
        ('["Linting", "/home/alice/acme"]', "Linting"),
        ('"Linting for Acme"', None),
        ('"[]"', None),
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
        ('"acme"', None),
    ],
)
def test_of_an_example_only_whether_it_was_chosen_is_sent(written, sent, tmp_path):
    write(tmp_path / "pyproject.toml", f"[tool.kedro]\nexample_pipeline = {written}\n")
    assert base_properties(tmp_path).get("example_pipeline") == sent


@posix
def test_an_event_has_the_time_in_UTC_wherever_the_user_is(heap, patch):
    with patch.context() as inner:
        inner.setenv("TZ", "AHEAD-14")
        time.tzset()
        send_telemetry_event("x")
    time.tzset()
    sent = time.strptime(heap.events[0]["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert abs(calendar.timegm(sent) - time.time()) < HOUR, "This is no UTC."


def test_datasets_are_counted_without_parameters(project, heap):
    names = ["a", "parameters", "params:a", "params:a.b", "parameters_history"]
    catalog = SimpleNamespace(list=names.copy)  # as before Kedro 1.0
    assert statistics(catalog, heap, project)["number_of_datasets"] == 2


@pytest.mark.parametrize("catalog", [5, Trap()], ids=["number", "trap"])
def test_a_catalog_that_cannot_be_read_costs_its_numbers(catalog, project, heap, log):
    bootstrap_project(project)
    sent = statistics(catalog, heap, project)
    assert sent["project_id"] == SPACESHIPS
    assert "number_of_datasets" not in sent
    assert any("Counting the datasets failed" in line for line in log.messages)


# No user code runs: pipelines are counted only if Kedro has loaded them


@pytest.mark.parametrize(
    ("registry", "expected"),
    [
        (REGISTRY, {"number_of_pipelines": 2, "number_of_nodes": 3}),
        (REGISTRY.replace("__default__", "first"), {"number_of_pipelines": 2}),
        ("def register_pipelines(): return None", {}),
    ],
    ids=["all", "no default", "nothing"],
)
def test_pipelines_that_kedro_has_loaded_are_counted(registry, expected, project, heap):
    write(project / PIPELINES, registry)
    bootstrap_project(project)
    with contextlib.suppress(TypeError):
        len(kedro_project.pipelines)
    sent = statistics(SimpleNamespace(list=list), heap, project)
    names = ("number_of_pipelines", "number_of_nodes")
    assert {name: sent[name] for name in names if name in sent} == expected


def test_an_event_imports_nothing_of_a_registry_by_itself(project, heap):
    write(project / PIPELINES, "raise BaseException('loaded')")
    bootstrap_project(project)
    sent = statistics(SimpleNamespace(list=lambda: ["a"]), heap, project)
    assert sent["number_of_datasets"] == 1
    assert not {"number_of_pipelines", "number_of_nodes"} & set(sent)
    assert "spaceships.pipeline_registry" not in sys.modules


def test_pipelines_of_another_project_are_not_counted(project, other_project, heap):
    context = create_session(project).load_context()
    bootstrap_project(other_project)
    assert len(kedro_project.pipelines) == 2
    assert context.catalog
    assert heap.project_ids == {SPACESHIPS}
    assert not {"number_of_pipelines", "number_of_nodes"} & set(heap.properties)


@pytest.mark.skipif(KEDRO < (1, 5), reason="Kedro loads all pipelines before 1.5")
def test_pipelines_are_not_counted_where_kedro_loads_some_only(project, heap):
    assert run("run --pipelines other").exit_code == 0
    assert not {"number_of_pipelines", "number_of_nodes"} & set(heap.properties)


# Dataset types: found in source files, without importing them

CACHED = "kedro.io.cached_dataset.CachedDataset"
CSV = "kedro_datasets.pandas.csv_dataset.CSVDataset"
EXPERIMENTAL = "kedro_datasets_experimental.pandas.csv_dataset.CSVDataset"
NEVER = 'print("imported")\nraise SystemExit\n'


@pytest.fixture
def datasets(tmp_path, patch) -> None:
    """The layout of kedro-datasets, with modules that must not be imported."""
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
    write(site / "acme/pandas/csv_dataset.py", f"{NEVER}\nclass CSVDataset(X):\n")
    patch.syspath_prepend(str(site))


@since_kedro_1
@pytest.mark.parametrize(
    ("declared", "sent"),
    [
        ("MemoryDataset", MEMORY),
        ("kedro.io.MemoryDataset", MEMORY),
        (CACHED, CACHED),
        ("pandas.CSVDataset", CSV),
        ("kedro_datasets_experimental.pandas.CSVDataset", EXPERIMENTAL),
        ("kedro.io.Secret", "custom"),
        ("pandas.csv_dataset.Secret", "custom"),
        ("acme.pandas.CSVDataset", "custom"),
        ("pandas./home/alice.CSVDataset", "custom"),
        (["pandas.CSVDataset"], "custom"),
        (CachedDataset, CACHED),
        (type("Secret", (MemoryDataset,), {}), "custom"),
    ],
)
def test_an_event_imports_nothing_to_find_a_type(
    declared, sent, datasets, types_of, capfd
):
    configs = {"a": {"type": declared}, "b": ["x"], 3: {}, "d": None}
    catalog = SimpleNamespace(
        keys=configs.keys,
        config_resolver=SimpleNamespace(config=configs),
        get_type=Mock(side_effect=SystemExit("imported")),
    )
    assert types_of(catalog) == Counter(["custom", "custom", "custom", sent])
    assert capfd.readouterr().out == ""


@pytest.fixture
def types_of(project, heap) -> Callable[[object], dict[str, int]]:
    """A function that reports a catalog and returns the types that arrive."""

    def types_of(catalog: object) -> dict[str, int]:
        return counts("dataset_type_count.", statistics(catalog, heap, project))

    return types_of


@since_kedro_1
def test_datasets_that_are_added_by_code_have_types(types_of):
    catalog = DataCatalog.from_config({"a": {"type": "MemoryDataset"}})
    catalog["b"] = MemoryDataset(1)
    catalog["MemoryDataset"] = type("Secret", (MemoryDataset,), {})(1)
    catalog["params:d"] = 1
    assert types_of(catalog) == {MEMORY: 2, "custom": 1}


PUBLIC_NAMES = ["kedro.io.X", "kedro_datasets.x.y.Z", "kedro_datasets_experimental.x.Z"]
OTHER_NAMES = ["acme.X", "kedro.X", "kedro_datasets_acme.x.Z", "kedro.io.x.y.Z", "X"]


def test_a_catalog_of_the_users_own_kind_is_asked(types_of):
    types = dict(enumerate([*PUBLIC_NAMES, *OTHER_NAMES, None]))
    catalog = SimpleNamespace(keys=types.keys, get_type=types.get)
    assert types_of(catalog) == dict.fromkeys(PUBLIC_NAMES, 1) | {"custom": 6}


def test_validators_are_counted_by_public_library(project, heap):
    public = kedro_telemetry.PUBLIC_VALIDATORS
    paths = ["pandera.B", "spaceships.Secret", ""] + [
        f"{name}.api.A" for name in public
    ]
    specs = {n: SimpleNamespace(class_path=path) for n, path in enumerate(paths)}
    catalog = SimpleNamespace(list=list, validator_specs=specs)
    sent = statistics(catalog, heap, project)
    assert sent["number_of_validated_datasets"] == len(paths)
    expected = dict.fromkeys(public, 1) | {"pandera": 2, "custom": 2}
    assert counts("validator_type_count.", sent) == expected


# Masking: words that Kedro or an installed plugin defines are public

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
partial = click.Command("partially", callback=functools.partial(print))
deck = Lazy("deck", callback=plug_commands.deck)
renamed = click.Command("renamed", callback=plug_commands.renamed)
class Default(click.Group):  # as in click-default-group
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
def plugin(tmp_path, patch) -> SimpleNamespace:
    """A plugin that Kedro has loaded, and one that it has not."""
    site = tmp_path / "plugins"
    write(site / "plug.py", PLUGIN)
    write(site / "plug_commands.py", PLUGIN_COMMANDS)
    write(site / "idle.py", "")
    write(site / "plug-1.0.dist-info/METADATA", "Name: plug\nVersion: 1.0\n")
    write(site / "plug-1.0.dist-info/entry_points.txt", ENTRY_POINTS)
    patch.syspath_prepend(str(site))
    return import_module("plug")


MASKED = [
    ("", "kedro"),
    ("-V", "-V"),
    ("--help=x", "--help *****"),
    ("--help /home/alice", "--help *****"),
    ("x", "*****"),
    ("--x run", "*****"),
    ("run -h", "run -h"),
    ("run --env x", "run --env *****"),
    ("run -e x y", "run -e ***** *****"),
    ("run -ex", "run *****"),
    ("run --params=a=b", "run --params *****"),
    ("run --pipeline=x --env=", "run --pipeline ***** --env *****"),
    ("run -- -e x", "run ***** -e *****"),
    ("pipeline create x", "pipeline create *****"),
    ("jupyter notebook --port 80", "jupyter notebook ***** *****"),
    ("new --starter=astro-airflow-iris", "new --starter astro-airflow-iris"),
    ("new -s astro-airflow-iris x", "new -s astro-airflow-iris *****"),
    ("run --starter astro-airflow-iris", "run ***** *****"),
    ("run --env astro-airflow-iris", "run --env *****"),
    ("fly --slow -f x --y", "fly --slow -f ***** *****"),
    ("fly target", "fly *****"),
    ("deck lift --level=9 --help", "deck lift --level ***** --help"),
    ("deck fail", "deck *****"),
    ("partially", "*****"),
    ("renamed", "renamed"),
    ("default renamed", "default renamed"),
    ("default /home/alice", "default *****"),
]


@pytest.mark.parametrize(("line", "sent"), MASKED)
def test_all_but_what_kedro_or_a_plugin_defines_is_masked(line, sent, plugin, heap):
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(project_metadata=None, command_args=line.split())
    hook.after_command_run()
    assert heap.commands == [f"kedro {sent}".removesuffix(" kedro")]
    assert heap.properties["main_command"] == sent.split()[0]


def test_masking_imports_nothing_that_kedro_has_not(plugin, heap):
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(None, ["nonsense"])
    hook.after_command_run()
    assert heap.commands == ["kedro *****"]
    assert "plug" in sys.modules
    assert "idle" not in sys.modules


@posix
def test_a_command_is_masked_where_site_packages_is_a_farm_of_links(
    project, tmp_path, heap
):
    """As made by uv and Bazel. The project adds a command to Kedro's own group."""
    source = Path(kedro.__file__).parent
    farm = tmp_path / "farm/kedro"
    shutil.copytree(source, farm, copy_function=os.symlink)
    write(project / "src/outside.py", OUTSIDE)
    write(
        project / "src/spaceships/cli.py",
        "import outside, click\ncli = click.Group()\n",
    )
    path = os.pathsep.join([str(farm.parent), os.environ["PYTHONPATH"]])
    for line in ("secret", "--version"):
        done = run_python("-m", "kedro", line, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
    assert heap.commands == ["kedro *****", "kedro --version"]


def test_the_starter_of_a_plugin_is_masked(patch, heap):
    name = "_OFFICIAL_STARTER_SPECS_DICT"
    specs = getattr(starters, name, None) or starters._OFFICIAL_STARTER_SPECS
    internal = starters.KedroStarterSpec("acme-internal", "https://secret")
    internal.origin = "acme"
    patch.setitem(specs, "acme-internal", internal)
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(None, ["new", "-s", "acme-internal"])
    hook.after_command_run()
    assert heap.commands == ["kedro new -s *****"]


@pytest.fixture
def kedros_groups(patch) -> None:
    """Removes the commands that a test adds to Kedro's groups."""
    for group in vars(kedro_cli).values():
        if isinstance(group, click.Group):
            patch.setattr(group, "commands", dict(group.commands))


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
wrapped = click.Command("wrapped", callback=decorated(function))
partial = click.Command("partial", callback=functools.partial(function))
cli = click.Group("spaceships", [run, mine])
plug.inside.add_command(click.Command("added-to-plugin", callback=function))
plug.inside.add_command(wrapped)
plug.inside.add_command(partial)
plug.inside.add_command(click.Group("empty", invoke_without_command=True))
kedro_cli.cli.add_command(click.Command("added", callback=function))
kedro_cli.cli.add_command(click.Group("grouped", invoke_without_command=True))
kedro_cli.cli.add_command(click.Command("of-a-plugin", callback=plug.renamed.callback))
info = kedro_cli.cli.commands["info"].callback
kedro_cli.cli.add_command(click.Command("of-kedro", callback=info))
kedro_cli.cli.add_command(click.Command("like-kedro", callback=decorated(info)))
"""


OUTSIDE = """
from kedro.framework.cli.cli import cli
@cli.command()
def secret(): ...
"""
OF_THE_PROJECT = """
mine added grouped of-a-plugin of-kedro like-kedro added-to-plugin wrapped partial empty
"""


@pytest.mark.parametrize("line", OF_THE_PROJECT.split())
def test_what_the_project_defines_is_masked(line, project, plugin, heap, kedros_groups):
    write(project / "src/spaceships/cli.py", PROJECT_COMMANDS)
    assert run(line).exit_code == 0
    assert heap.commands == ["kedro *****"]


@since_kedro_0_19
def test_in_an_overridden_command_only_kedros_words_are_not_masked(
    project, plugin, heap, kedros_groups
):
    write(project / "src/spaceships/cli.py", PROJECT_COMMANDS)
    assert run("run --pipeline x --secret y").exit_code == 0
    assert heap.commands == ["kedro run --pipeline ***** ***** *****"]


# Posting: one attempt, with its outcome in the log


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        ("200", "200"),
        ("500", "500"),
        ("huge", "200"),
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
    event = json.loads(posted[1])
    assert (event["event"], event["identity"]) == ("x", "*****")
    assert IDENTITY not in log.text
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
def test_the_log_names_a_cause_and_no_password(error, kind, log, patch):
    patch.setenv("HTTPS_PROXY", "http://alice:secret@127.0.0.1:9")
    if error is not None:
        patch.setattr(socket, "getaddrinfo", Mock(side_effect=error))
    assert send_telemetry_event("x") is False
    assert log.messages[0].endswith(f"}}: {kind}")
    assert "secret" not in log.text


def test_the_log_has_nothing_to_say_of_a_words_look_up(heap, log, known_user):
    hook = kedro_telemetry.telemetry_hook
    hook.before_command_run(None, ["info", "extra"])
    hook.after_command_run()
    assert [line.partition(" ")[0] for line in log.messages] == ["Post"]


# The request: only its own headers, through the user's proxy


def test_only_the_headers_of_the_post_leave(heap, patch, capfd):
    """sentry-sdk adds `baggage` to each request; OpenTelemetry prints a span."""
    putrequest = http.client.HTTPConnection.putrequest
    open_url = urllib.request.OpenerDirector.open

    def as_sentry(connection, *args, **options):
        putrequest(connection, *args, **options)
        connection.putheader("baggage", "sentry-release=secret")

    def as_opentelemetry(opener, request, *args, **options):
        click.echo("span")
        return open_url(opener, request, *args, **options)

    patch.setattr(http.client.HTTPConnection, "putrequest", as_sentry)
    patch.setattr(urllib.request.OpenerDirector, "open", as_opentelemetry)
    patch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    write(Path(".telemetry"), YES)
    assert send_telemetry_event("x") is True
    assert heap.headers.pop("Content-Length").isdigit()
    assert heap.headers == {
        "Host": "heapanalytics.com",
        "Content-Type": "application/json",
        "User-Agent": f"kedro-telemetry/{kedro_telemetry.__version__}",
    }, "README lists the headers that leave: change it together with this test."
    assert set(heap.proxy_headers) <= {"Host"}
    assert capfd.readouterr() == ("", "")


def test_no_headers_leave_with_a_span_in_the_users_trace(heap, patch):
    """sentry-sdk lets threads continue the trace of the code that starts them."""
    trace: ContextVar[str] = ContextVar("trace")
    spans = []
    start = threading.Thread.start
    putrequest = http.client.HTTPConnection.putrequest

    def as_sentry_starts(thread):
        context = copy_context()
        run = thread.run
        thread.run = lambda: context.run(run)
        start(thread)

    def as_sentry_sends(connection, *args, **options):
        spans.append(trace.get(None))
        putrequest(connection, *args, **options)

    patch.setattr(threading.Thread, "start", as_sentry_starts)
    patch.setattr(http.client.HTTPConnection, "putrequest", as_sentry_sends)
    token = trace.set("the user's")
    assert send_telemetry_event("x") is True
    trace.reset(token)
    assert spans == [None]


def test_no_headers_leave_for_where_a_redirect_leads(heap):
    heap.mode = "302"
    assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1


def test_no_headers_leave_through_vcrpy(no_network, log, patch):
    """vcrpy replaces the connections, and records them in the user's cassettes."""
    recorder = type("VCRConnection", (http.client.HTTPSConnection,), {})
    patch.setattr(http.client, "HTTPSConnection", recorder)
    assert send_telemetry_event("x") is False
    no_network.assert_not_called()
    assert log.messages[0].endswith("}: NotImplementedError")


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_the_users_proxy_is_used(name, scheme, heap, patch):
    patch.delenv("HTTPS_PROXY")
    patch.setenv(name, f"{scheme}alice:p%40ss@{heap.address}")
    if name == "HTTPS_PROXY":  # it takes precedence
        patch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert send_telemetry_event("x") is True
    assert heap.connections == ["heapanalytics.com:443"]
    assert heap.proxy_headers["Proxy-Authorization"] == "Basic YWxpY2U6cEBzcw=="
    assert "Proxy-Authorization" not in heap.headers


def test_the_proxy_of_macOS_or_windows_is_used(heap, patch):
    """urllib finds it in the settings of these systems."""
    patch.delenv("HTTPS_PROXY")
    found = Mock(return_value={"https": f"http://{heap.address}"})
    patch.setattr(urllib.request, "getproxies", found)
    assert send_telemetry_event("x") is True
    assert heap.connections == ["heapanalytics.com:443"]


HEAP_ITSELF = ("heapanalytics.com", 443)


@pytest.mark.parametrize(
    ("proxy", "without", "address"),
    [
        ("http://alice:#secret@proxy.example:3128", "", ("proxy.example", 3128)),
        ("//proxy.example:3128", "localhost", ("proxy.example", 3128)),
        ("https://proxy.example", "", ("proxy.example", 443)),
        ("http://", "", None),
        ("http://proxy.example", "localhost,heapanalytics.com", HEAP_ITSELF),
        ("socks5://proxy.example:1080", "heapanalytics.com", HEAP_ITSELF),
    ],
)
def test_a_proxy_is_found_as_urllib_finds_it(
    proxy, without, address, no_network, patch
):
    patch.setenv("HTTPS_PROXY", proxy)
    patch.setenv("NO_PROXY", without)
    assert send_telemetry_event("x") is False
    called = [call.args[:2] for call in no_network.call_args_list]
    assert called == ([address] if address else [])


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["socks5", "SOCKS5h", "socks"])
def test_a_SOCKS_proxy_is_not_passed(name, scheme, no_network, log, config, patch):
    patch.delenv("HTTPS_PROXY")
    patch.setenv(name, f"{scheme}://proxy.example:1080")
    assert send_telemetry_event("x") is False
    no_network.assert_not_called()
    assert log.messages[0].endswith("}: NotImplementedError")
    assert not (config / "telemetry.backoff").exists()


# The deadline, and the back-off after a slow attempt


@pytest.fixture
def short_deadline(patch) -> None:
    patch.setattr(kedro_telemetry, "DEADLINE", 0.3)


def test_two_seconds_and_an_hour_are_what_README_says():
    """Other tests use longer deadlines, for busy machines, or shorter ones."""
    assert (CONSTANTS["DEADLINE"], CONSTANTS["BACK_OFF"]) == (2.0, 3600.0)


@pytest.mark.parametrize(("delay", "is_accepted"), [(0.5, True), (3.5, False)])
def test_an_answer_is_waited_for_two_seconds_and_not_twice(
    delay, is_accepted, project, heap, patch
):
    patch.setattr(kedro_telemetry, "DEADLINE", CONSTANTS["DEADLINE"])
    write(project / ".telemetry", YES)
    heap.delay = delay
    assert send_telemetry_event("x", {}, project) is is_accepted
    assert heap.answers == is_accepted


def test_after_two_seconds_a_command_goes_on(heap):
    heap.mode = "drip"
    done = run_python("-m", "kedro", "--version")
    assert (done.returncode, done.stderr) == (0, NOTICE + "\n")
    assert len(heap.connections) == 1


@pytest.mark.parametrize("mode", ["hang", "hang in TLS", "hang in HTTP", "drip"])
def test_after_two_seconds_a_post_ends(mode, heap, config, log, short_deadline, patch):
    patch.setenv("CI", "true")  # no other file creates the stamp's folder
    heap.mode = mode
    start = time.monotonic()
    assert send_telemetry_event("x") is False
    assert time.monotonic() - start < 10
    assert (config / "telemetry.backoff").read_bytes() == b""
    heap.mode = "200"
    heap.connections.clear()
    assert send_telemetry_event("x") is False
    assert "Heap did not answer" in log.messages[-1]
    assert heap.connections == []


@pytest.mark.parametrize(
    ("deadline", "mode", "delay", "starts"),
    [
        (20, "reset", 1.5, False),
        (4, "reset", 1.5, True),
        (4, "200", 1.5, False),
        (4, "500", 1.5, False),
    ],
    ids=["early failure", "late failure", "late answer", "late refusal"],
)
def test_two_seconds_of_which_a_quarter_brings_no_answer_start_a_back_off(
    deadline, mode, delay, starts, heap, config, known_user, patch
):
    patch.setattr(kedro_telemetry, "DEADLINE", deadline)
    heap.mode = mode
    heap.delay = delay
    assert send_telemetry_event("x") is (mode == "200")
    assert (config / "telemetry.backoff").exists() is starts
    heap.delay = 0.0
    send_telemetry_event("x")
    assert len(heap.connections) == 1 + (not starts)


def test_after_two_seconds_a_look_up_is_given_up(heap, config, short_deadline, patch):
    patch.setenv("HTTPS_PROXY", "http://proxy.invalid:80")
    patch.setattr(socket, "getaddrinfo", lambda *_, **__: heap.is_over.wait())
    assert send_telemetry_event("x") is False
    assert (config / "telemetry.backoff").exists()


@pytest.mark.parametrize("mode", ["hang", "hang in TLS", "hang in HTTP"])
def test_a_post_given_up_after_two_seconds_ends_a_few_seconds_later(mode, heap, patch):
    patch.setattr(kedro_telemetry, "DEADLINE", 0.2)
    heap.mode = mode
    before = set(threading.enumerate())
    assert send_telemetry_event("x") is False
    for thread in set(threading.enumerate()) - before:
        if thread.daemon:
            thread.join(15 * 0.2)  # six seconds after two
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("age", "is_sent"),
    [
        (0, False),
        (HOUR - 60, False),
        (HOUR + 60, True),
        (60 - HOUR, False),
        (-60 - HOUR, True),
    ],
)
def test_a_back_off_after_two_seconds_lasts_an_hour(age, is_sent, heap, config):
    """A file server's clock may be ahead."""
    start = time.time() - age
    os.utime(write(config / "telemetry.backoff", ""), (start, start))
    assert send_telemetry_event("x") is bool(heap.connections) is is_sent


def test_an_old_back_off_is_renewed_after_two_seconds(heap, config, short_deadline):
    """Even one owned by root, which nobody else may change."""
    stamp = write(config / "telemetry.backoff", "")
    os.utime(stamp, (1, 1))
    stamp.chmod(0o444)
    os.link(stamp, config / "keep")
    heap.mode = "hang"
    send_telemetry_event("x")
    assert time.time() - stamp.stat().st_mtime < HOUR
    assert (config / "keep").stat().st_mtime == 1


@pytest.mark.parametrize("trouble", [no_folder, no_home, id])
def test_after_two_seconds_a_process_backs_off_without_a_file(
    trouble, heap, config, patch
):
    patch.setattr(kedro_telemetry, "DEADLINE", 0.3)
    patch.setattr(Path, "touch", Mock(side_effect=Odd))
    heap.mode = "hang"
    trouble(config)
    assert send_telemetry_event("x") is False
    heap.mode = "200"
    patch.setattr(kedro_telemetry, "DEADLINE", 20.0)
    assert send_telemetry_event("x") is False
    hour_ago = kedro_telemetry._Post.back_off_start - HOUR - 60
    patch.setattr(kedro_telemetry._Post, "back_off_start", hour_ago)
    assert send_telemetry_event("x") is True


@pytest.mark.parametrize("trusted", ["a file", "certifi"])
def test_the_thread_of_a_post_imports_nothing(trusted, heap, tmp_path):
    """A module that it loads while Python shuts down can abort the process."""
    code = """
    import ssl, sys, threading
    from types import SimpleNamespace
    from kedro_telemetry import send_telemetry_event
    if sys.argv[1:] == ["certifi"]:
        paths = SimpleNamespace(openssl_cafile="gone", openssl_capath="gone")
        ssl.get_default_verify_paths = lambda: paths
    class Watcher:
        def find_spec(name, *_):
            if threading.current_thread() is not threading.main_thread():
                print(name)
    sys.meta_path.insert(0, Watcher)
    print(send_telemetry_event("x"), "certifi" in sys.modules)
    """
    write(tmp_path / "site/certifi/__init__.py", "raise SystemExit('imported')\n")
    write(tmp_path / "site/certifi/cacert.pem", HEAP_CERTIFICATE)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    variables = {"PYTHONPATH": path}
    if trusted == "certifi":
        variables |= {"SSL_CERT_FILE": "", "SSL_CERT_DIR": ""}
    done = run_python("-c", code, trusted, **variables)
    assert done.stdout == "True False\n"


# Signals: the process's own handling takes precedence


@pytest.fixture
def on_signal() -> Iterator[Callable]:
    """A function that sets how this test handles a signal."""
    before = {}

    def set_handler(number: int, handler: object) -> None:
        before[number] = signal.signal(number, handler)

    yield set_handler
    for number, handler in before.items():
        signal.signal(number, handler)


class TimedOut(Exception):
    """The exception that a user's timeout raises."""


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
@pytest.mark.parametrize("waiting", ["session", "command"])
def test_what_a_signal_raises_ends_the_wait(
    waiting, name, handler, raised, project, heap, on_signal
):
    """After a command, Ctrl-C ends only the wait: the command itself has ended."""
    heap.signal = getattr(signal, name)
    heap.mode = "hang"
    on_signal(heap.signal, handler)  # the shell may have set it to be ignored
    hook = kedro_telemetry.telemetry_hook
    found = None
    try:
        if waiting == "session":
            load_catalogs(project)
        else:
            hook.before_command_run(None, ["info"])
            hook.after_command_run()
    except (KeyboardInterrupt, TimedOut, SystemExit) as error:
        found = type(error)
    is_ctrl_c_after_a_command = (waiting, name) == ("command", "SIGINT")
    assert found is (None if is_ctrl_c_after_a_command else raised)
    assert len(heap.connections) == 1


@posix
@pytest.mark.parametrize(("deadline", "is_remembered"), [(20.0, False), (2.0, True)])
def test_a_wait_that_a_signal_ends_late_is_remembered(
    deadline, is_remembered, heap, config, on_signal, patch
):
    """Late means after a quarter of the deadline."""
    patch.setattr(kedro_telemetry, "DEADLINE", deadline)
    heap.signal_delay = 0.6
    heap.signal = signal.SIGALRM
    heap.mode = "hang"
    on_signal(heap.signal, time_out)
    with contextlib.suppress(TimedOut):
        send_telemetry_event("x")
    assert (config / "telemetry.backoff").exists() is is_remembered


@posix
def test_the_signal_of_a_closed_connection_ends_no_process(heap):
    """A second write to a connection closed with FIN raises SIGPIPE."""
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


@posix
def test_the_signal_of_a_closed_connection_stays_unmasked_where_it_is_ignored(
    heap, patch
):
    """gevent runs threads in the main thread, and children inherit its mask."""
    start = threading.Thread.start

    def start_as_gevent(thread: threading.Thread) -> None:
        if isinstance(thread, kedro_telemetry._Post):
            patch.setattr(thread, "join", Mock())
            thread.run()
        else:
            start(thread)

    patch.setattr(threading.Thread, "start", start_as_gevent)
    assert send_telemetry_event("x") is True
    assert signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# Certificates: everything that the platform trusts, and nothing else

FOLDERS = {
    "nothing": {},
    "heap": {HASH_LINK: HEAP_CERTIFICATE},
    "another": {"00000000.0": ""},
    "names": {"heap.pem": HEAP_CERTIFICATE, "8bd8b012.pem": HEAP_CERTIFICATE},
}
BROKEN_CERTIFICATE = HEAP_CERTIFICATE.replace("M", "N", 1)
COMMENT = "# Übung: a comment in a bundle\n"
FILES = {
    "empty.pem": "",
    "broken.pem": BROKEN_CERTIFICATE,
    "broken-at-the-end.pem": COMMENT + HEAP_CERTIFICATE + BROKEN_CERTIFICATE,
    "old.pem": HEAP_CERTIFICATE.replace("CERTIFICATE", "X509 CERTIFICATE"),
    "latin-1.pem": b"# \xdcbung\n" + HEAP_CERTIFICATE.encode(),
    "large.pem": HEAP_CERTIFICATE.ljust(2**20 + 1),
    "too-large.pem": "\n" * 2**20 + HEAP_CERTIFICATE,
    "intermediate.pem": INTERMEDIATE_CERTIFICATE,
    "evil.pem": EVIL_CERTIFICATE,
}


@pytest.fixture
def certificates(tmp_path, patch) -> Path:
    """The current directory, with files and folders of certificates."""
    for name, text in FILES.items():
        write(tmp_path / name, text)
    for folder, contents in FOLDERS.items():
        (tmp_path / folder).mkdir()
        for name, text in contents.items():
            write(tmp_path / folder / name, text)
    patch.chdir(tmp_path)
    return tmp_path


@posix
@pytest.mark.parametrize(
    ("file", "folder", "is_trusted", "connections"),
    [
        ("heap.pem", "nothing", True, 1),
        ("heap.pem", "gone", True, 1),
        ("broken-at-the-end.pem", "gone", True, 1),
        ("old.pem", "gone", True, 1),
        ("latin-1.pem", "gone", True, 1),
        ("large.pem", "gone", True, 1),
        ("heap.pem", "another", True, 2),
        ("empty.pem", "heap", True, 1),
        ("empty.pem", "another:heap", True, 1),
        ("", "heap", True, 1),
        ("empty.pem", "names", False, 1),
        ("empty.pem", "nothing", False, 1),
        ("empty.pem", "another", False, 2),
        ("gone.pem", "nothing", False, 1),
        ("broken.pem", "nothing", False, 1),
        ("too-large.pem", "nothing", False, 1),
        ("intermediate.pem", "nothing", False, 1),
    ],
)
def test_a_certificate_is_verified_by_all_that_is_trusted(
    file, folder, is_trusted, connections, certificates, heap, patch
):
    patch.setenv("SSL_CERT_FILE", file)
    patch.setenv("SSL_CERT_DIR", folder)
    assert send_telemetry_event("x") is is_trusted
    assert len(heap.connections) == connections
    assert len(heap.events) == is_trusted


@pytest.mark.parametrize(
    ("variable", "bundle", "folder", "asks_system", "is_trusted"),
    [
        (None, "gone.pem", "gone", False, True),
        (None, "gone.pem", "another", False, False),
        (None, "intermediate.pem", "gone", False, False),
        ("SSL_CERT_FILE", "gone.pem", "gone", False, False),
        ("SSL_CERT_DIR", "gone.pem", "gone", False, False),
        (None, "gone.pem", "gone", True, False),
        (None, "heap.pem", "gone", True, True),
    ],
)
def test_a_certificate_is_verified_by_certifi_in_need(
    variable, bundle, folder, asks_system, is_trusted, certificates, heap, patch
):
    """As with python.org's Python on macOS, until the user installs authorities.

    truststore asks the system, so it cannot say how many authorities it trusts.
    """
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        patch.delenv(name)
    if variable:
        patch.setenv(variable, "nothing")
    if asks_system:
        error = Mock(side_effect=NotImplementedError)
        patch.setattr(ssl.SSLContext, "cert_store_stats", error)
    paths = SimpleNamespace(openssl_cafile=bundle, openssl_capath=folder)
    patch.setattr(ssl, "get_default_verify_paths", Mock(return_value=paths))
    patch.delitem(sys.modules, "certifi", raising=False)
    write(certificates / "site/certifi/__init__.py", NEVER)
    write(certificates / "site/certifi/cacert.pem", HEAP_CERTIFICATE)
    patch.syspath_prepend(str(certificates / "site"))
    assert send_telemetry_event("x") is is_trusted
    assert "certifi" not in sys.modules


def test_a_certificate_of_certifi_may_be_missing(certificates, no_network, log, patch):
    """Debian's certifi has no file of its own."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        patch.delenv(name)
    paths = SimpleNamespace(openssl_cafile="gone.pem", openssl_capath="gone")
    patch.setattr(ssl, "get_default_verify_paths", Mock(return_value=paths))
    patch.delitem(sys.modules, "certifi", raising=False)
    write(certificates / "site/certifi/__init__.py", NEVER)
    patch.syspath_prepend(str(certificates / "site"))
    assert send_telemetry_event("x") is False
    assert log.messages[-1].endswith("}: OSError")


@posix
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_certificate_for_another_host_is_rejected(place, certificates, heap, patch):
    evil = EVIL_CERTIFICATE + HEAP_PEM.partition(END)[2]
    heap.tls.load_cert_chain(write(certificates / "evil-server.pem", evil))
    write(certificates / "evil" / EVIL_LINK, EVIL_CERTIFICATE)
    patch.setenv("SSL_CERT_FILE", "evil.pem" if place == "file" else "empty.pem")
    patch.setenv("SSL_CERT_DIR", "evil" if place == "folder" else "nothing")
    assert send_telemetry_event("x") is False
    assert heap.events == []


@posix
def test_a_certificate_is_not_tried_again_after_another_failure(
    certificates, heap, patch
):
    patch.setenv("SSL_CERT_DIR", "another")
    heap.mode = "reset"
    assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1


def test_a_certificate_needs_no_root_authority(certificates, heap, patch):
    """Python rejects it by default before 3.13, and one like Zscaler's from 3.13."""
    chain = CHAIN_CERTIFICATES + HEAP_PEM.partition(END)[2]
    heap.tls.load_cert_chain(write(certificates / "chain.pem", chain))
    patch.setenv("SSL_CERT_FILE", "intermediate.pem")
    assert send_telemetry_event("x") is True, (
        "An authority that is not a root, or not marked critical, must be enough: see "
        "VERIFY_X509_PARTIAL_CHAIN and VERIFY_X509_STRICT."
    )


@posix
@pytest.mark.parametrize("folder", ["heap", "another:heap"])
def test_a_certificate_in_the_folder_is_enough(folder, certificates, heap, patch):
    os.mkfifo("pipe.pem")  # reading it would block
    patch.setenv("SSL_CERT_DIR", folder)
    patch.setenv("SSL_CERT_FILE", "pipe.pem")
    assert send_telemetry_event("x") is True


@posix
@pytest.mark.parametrize(
    ("variable", "pipe"),
    [("SSL_CERT_FILE", "pipe.pem"), ("SSL_CERT_DIR", "slow/00000000.0")],
)
def test_a_certificate_on_slow_storage_waits_in_python(
    variable, pipe, certificates, heap, short_deadline, patch
):
    """A thread that is inside OpenSSL can crash a process as it ends.

    An office network drive may hang, and must not cost more than the deadline either.
    """
    loaded = []

    def load(_: object, cafile: object = None, **place: object) -> None:
        loaded.extend(place or ["cafile"])

    patch.setattr(ssl.SSLContext, "load_verify_locations", load)
    patch.setattr(ssl.SSLContext, "load_default_certs", load)
    (certificates / "slow").mkdir()
    os.mkfifo(pipe)
    patch.setenv(variable, pipe.removesuffix("/00000000.0"))
    before = set(threading.enumerate())
    results = []
    command = threading.Thread(
        target=lambda: results.append(send_telemetry_event("x")), daemon=True
    )
    command.start()
    command.join(10)
    assert results == [False], "A command waits for slow storage."
    assert loaded == (["capath"] if variable == "SSL_CERT_FILE" else [])
    storage = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    os.write(storage, HEAP_CERTIFICATE.encode())
    os.close(storage)
    for thread in set(threading.enumerate()) - before:
        if thread.daemon:
            thread.join(10)
    assert "cafile" not in loaded, "OpenSSL reads a file without Python's lock."


# The commands: kedro telemetry

STATUS_HELP = """
See an event without sending it:  KEDRO_TELEMETRY_DEBUG=1 kedro info
Opt out for all your projects:    kedro telemetry disable
Opt in for all your projects:     kedro telemetry enable
Opt out for one project:          write the line `consent: false`
                                  into the file .telemetry in its root
Read more:  https://docs.kedro.org/en/stable/about/telemetry/
"""


@pytest.mark.parametrize("line", ["telemetry", "telemetry status"])
def test_status_shows_a_new_user_all(line, new_project, config, heap, tmp_path):
    before = files(tmp_path)
    done = run(line)
    assert (done.exit_code, files(tmp_path), heap.connections) == (0, before, [])
    assert done.output == (
        "Telemetry:   on here\n"
        "Reason:      on by default: no opt-out and no opt-in found\n"
        "Identity:    none yet\n"
        f"             {config / 'telemetry.toml'}\n"
        "Project id:  none yet\n"
        f"             {new_project / 'pyproject.toml'}\n"
        f"Endpoint:    https://heapanalytics.com/api/track\n{STATUS_HELP}"
    )


def test_status_shows_ids_and_how_long_posts_pause(project, config, known_user):
    stamp = write(config / "telemetry.backoff", "").stat().st_mtime
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp + HOUR))
    output = run("telemetry").output
    assert f"Identity:    {IDENTITY}\n" in output
    assert f"Project id:  {PROJECT_ID} (sent as a hash)\n" in output
    pause = f"Paused:      until {end}, because Heap did not answer in time\n"
    assert output.endswith(pause + STATUS_HELP)


@pytest.mark.parametrize("variable", ["CI", "KEDRO_TELEMETRY_DEBUG"])
def test_status_promises_no_ids_that_are_not_made(variable, new_project, patch):
    patch.setenv(variable, "true")
    output = run("telemetry").output
    assert "Identity:    none\n" in output
    assert "Project id:  none\n" in output


@pytest.mark.parametrize("trouble", [no_home, empty_home])
def test_status_without_a_project_or_a_home_folder_names_no_file(trouble, config):
    trouble(config)
    output = run("telemetry").output
    assert "Identity:    none, because there is no home folder\nEndpoint:" in output


def test_status_shows_why_telemetry_is_off(denied, patch):
    here = Path.cwd()
    patch.chdir(denied.project)  # where Kedro 0.18 finds the project
    cli = kedro_cli.KedroCLI(denied.project)
    patch.chdir(here)
    output = CliRunner().invoke(cli, ["telemetry"]).output
    reason = denied.if_loaded.replace("\n", "\n             ")
    assert output.startswith(f"Telemetry:   off here\nReason:      {reason}\n")


def lines(*parts: object) -> str:
    return "".join(f"{part}\n" for part in parts)


OPTED = {
    "enable": "You have opted in to telemetry for all your projects.",
    "disable": "You have opted out of telemetry for all your projects.",
}
# The output after opting out, and after failing to save a decision
OLD_RELEASES = (
    "Versions of kedro-telemetry before 1.0 ignore this decision.",
    "To opt out in those versions as well, set DO_NOT_TRACK=1 in your environment.",
)
ADVICE = "To opt out instead, set DO_NOT_TRACK=1 in your environment."


def test_disable_opts_out_for_all_projects(project, decision, heap):
    done = run("telemetry disable")
    assert (done.exit_code, decision.read_text()) == (0, NO)
    assert done.output == lines(OPTED["disable"], "Saved to:", decision, *OLD_RELEASES)
    run("info")
    assert heap.connections == []


def test_enable_opts_in_for_all_projects(project, decision, heap):
    write(decision, NO)
    done = run("telemetry enable")
    assert (done.exit_code, decision.read_text()) == (0, YES)
    assert done.output == lines(OPTED["enable"], "Saved to:", decision)
    reason = f"Reason:      this file grants consent:\n             {decision}\n"
    assert reason in run("telemetry").output
    assert NOTICE not in run("info").output
    assert heap.commands == ["kedro info"]


def test_enable_says_where_telemetry_stays_off(project):
    file = write(project / ".telemetry", NO)
    shown = "Telemetry stays off here, because this file denies consent:"
    assert run("telemetry enable").output.endswith(lines(shown, file))


@pytest.mark.parametrize(("word", "advice"), [("enable", ()), ("disable", (ADVICE,))])
@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (lambda file: write(file, YES).chmod(0o444), "read-only"),
        (lambda file: file.mkdir(parents=True), "not a file, or too large"),
        pytest.param(lambda file: write(file.parent, ""), "File exists", marks=posix),
    ],
    ids=["read-only", "a folder", "no folder"],
)
def test_a_decision_that_cannot_be_saved_changes_nothing(
    word, advice, trouble, reason, decision, tmp_path
):
    trouble(decision)
    before = files(tmp_path)
    done = run(f"telemetry {word}")
    shown = ("Error: Nothing has changed.", "Could not save to:", decision)
    assert done.exit_code == 1
    assert done.output == lines(*shown, f"Reason: {reason}", *advice)
    after = files(tmp_path)
    assert {x for x in after if x.is_file() and before.get(x) != after[x]} == set()


@pytest.mark.parametrize(("word", "advice"), [("enable", ()), ("disable", (ADVICE,))])
@pytest.mark.parametrize("trouble", [no_home, empty_home])
def test_without_a_home_folder_a_decision_cannot_be_saved(
    word, advice, trouble, config
):
    trouble(config)
    done = run(f"telemetry {word}")
    shown = "Error: Nothing has changed, because there is no home folder."
    assert (done.exit_code, done.output) == (1, lines(shown, *advice))


ODD_NAME = "J\u00fcrgen \udcff"  # the second part is not UTF-8


@posix
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
@pytest.mark.parametrize("line", ["", "enable", "disable", "read-only"])
def test_a_home_folder_of_any_name_can_be_printed(line, encoding, tmp_path):
    home = tmp_path / ODD_NAME
    try:
        home.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    if line == "read-only":
        write(home / DECISION, YES).chmod(0o444)
        line = "disable"
    code = f"""
    import sys
    from kedro.framework.cli import main
    sys.argv = ["kedro", "telemetry", *{line.split()}]
    main()
    """
    variables = dict.fromkeys(HOME_VARIABLES, str(home))
    done = run_python("-c", code, PYTHONIOENCODING=encoding, **variables)
    assert "Traceback" not in done.stderr
    name = "J\u00fcrgen" if encoding.startswith("utf") else "J\\xfcrgen"
    assert f"{name} \\udcff/" in done.stdout + done.stderr


@pytest.mark.parametrize("word", ["opt-out", "on", "disabel"])
def test_a_guess_leads_to_the_choices(word):
    done = run(f"telemetry {word}")
    assert done.exit_code == 2
    first, *_, last = done.output.splitlines()
    assert first == "Usage: kedro telemetry [OPTIONS] [status|enable|disable]"
    assert last == (
        f"Error: Invalid value for '[status|enable|disable]': '{word}' is not one of "
        "'status', 'enable', 'disable'."
    )


def test_help_lists_three_choices_and_the_documentation(project):
    output = run("telemetry --help").output
    usage = "Usage: kedro telemetry [OPTIONS] [status|enable|disable]\n"
    assert output.startswith(usage)
    listed = re.findall(r"^  ([a-z]+)  +[A-Z]", output, re.MULTILINE)
    assert listed == ["status", "enable", "disable"]
    assert kedro_telemetry.DOCUMENTATION in output
    assert max(map(len, output.splitlines())) <= 80
    assert run("telemetry -h").output == output


@pytest.mark.parametrize("name", kedro_telemetry.OPT_OUT_VARIABLES)
def test_help_names_each_variable_that_opts_out(name):
    assert re.search(rf"\b{name}\b", run("telemetry --help").output), (
        f"`kedro telemetry --help` does not name {name}: add it to TELEMETRY_HELP."
    )


@pytest.mark.parametrize("place", ["project", "user"])
def test_kedros_help_names_the_command(place, request, patch):
    patch.chdir(request.getfixturevalue(place))
    line = r"^  telemetry +See whether telemetry is on"
    assert re.search(line, run("--help").output, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "exit_code"), [("", 0), ("enable", 0), ("--help", 0), ("nonsense", 2)]
)
def test_the_command_itself_is_not_reported(line, exit_code, project, heap):
    done = run(f"telemetry {line}")
    assert (done.exit_code, NOTICE in done.output) == (exit_code, False)
    assert heap.connections == []


OWN_TELEMETRY = """
import click
@click.command()
def telemetry(): click.echo("a command of the same name")
cli = click.Group("mine", [telemetry])
"""


@since_kedro_0_19
@pytest.mark.parametrize("owner", ["project", "project_commands"])
def test_another_command_telemetry_comes_first(owner, project, tmp_path):
    if owner == "project":
        write(project / "src/spaceships/cli.py", OWN_TELEMETRY)
    else:
        info = tmp_path / "site/plug-1.0.dist-info"
        write(tmp_path / "site/plug.py", OWN_TELEMETRY)
        write(info / "METADATA", "Name: plug\nVersion: 1.0\n")
        write(info / "entry_points.txt", f"[kedro.{owner}]\nplug = plug:cli\n")
    path = os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])
    done = run_python("-m", "kedro", "telemetry", PYTHONPATH=path)
    assert done.stdout.endswith("a command of the same name\n")


# A vendored copy: it replaces an installed release

VENDORED_SETTINGS = """\
from .kedro_telemetry import telemetry_hook

HOOKS = (telemetry_hook,)
"""


@pytest.fixture
def vendored(project) -> Path:
    """A project with a copy of the module next to its settings."""
    shutil.copy(kedro_telemetry.__file__, project / "src/spaceships")
    write(project / SETTINGS, VENDORED_SETTINGS)
    return project


@pytest.mark.parametrize(
    "words", [["kedro", "run"], []], ids=["a command", "a session"]
)
def test_a_vendored_copy_replaces_an_installed_release(words, vendored, heap):
    code = f"""
    import atexit, sys
    from kedro.framework.cli import main
    atexit.register(lambda: print(
        sys.modules["kedro_telemetry.plugin"].__file__,
        sys.modules["kedro_telemetry.api"] is sys.modules["kedro_telemetry"],
    ))
    sys.argv = {words}
    if sys.argv: main()
    """
    done = run_python("-c", textwrap.dedent(code) + ("" if words else SESSION))
    assert heap.commands == [" ".join(words) or None]
    assert heap.project_ids == {SPACESHIPS}
    copied = vendored / "src/spaceships/kedro_telemetry.py"
    assert done.stdout.splitlines()[-1] == f"{copied} True"


def test_a_vendored_copy_has_the_command(vendored):
    write(vendored / SETTINGS, VENDORED_SETTINGS + "DO_NOT_TRACK = True\n")
    done = run_python("-m", "kedro", "telemetry")
    assert "Telemetry:   off here\nReason:      this file names DO_NOT" in done.stdout


def test_a_copy_alone_reports_sessions(vendored, heap, patch):
    for name in ("", ".plugin", ".api"):
        patch.delitem(sys.modules, f"kedro_telemetry{name}")
    patch.setattr(PluginManager, "load_setuptools_entrypoints", Mock())
    load_catalogs(vendored)
    assert heap.commands == [None]
    copied = sys.modules["kedro_telemetry.plugin"]
    assert copied.__name__ == copied.logger.name == "spaceships.kedro_telemetry"


# README: its claims are true

README_FILE = Path(__file__).with_name("README.md")
README = README_FILE.read_text(encoding="utf-8") if README_FILE.exists() else ""
needs_readme = pytest.mark.skipif(
    not README, reason="README.md is not beside the tests"
)

# Kedro's documentation links to these.
HEADINGS = """
What is kedro-telemetry?
What data is being collected?
How is the data collected?
How do I withdraw consent?
What happens when I withdraw consent?
What licence do you use?
Python version support policy
"""
COLLECTED = "What data is being collected?"
WITHDRAW = "How do I withdraw consent?"


def readme_section(heading: str) -> str:
    return README.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def readme_block(language: str, text: str) -> str:
    """The only code block in a part of README, without its indentation."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    return textwrap.dedent(blocks[0])


def table_rows(heading: str) -> list[list[str]]:
    """The cells in each row of the table below a heading."""
    lines = re.findall(r"^\| (.*) \|$", readme_section(heading), re.MULTILINE)
    return [line.split(" | ") for line in lines[2:]]


@needs_readme
def test_links_from_kedros_documentation_find_their_headings():
    headings = re.findall(r"^## (.*)", README, re.MULTILINE)
    assert set(HEADINGS.strip().splitlines()) <= set(headings)


def kinds_of_property(when: str) -> set[str]:
    """The kinds of event that a row of README's table applies to."""
    if when.startswith("always"):
        return {"command", "command in a project", "session"}
    if when.startswith("in a project"):
        return {"command in a project", "session"}
    if when.startswith("for a command"):
        return {"command", "command in a project"}
    assert when.startswith("for a session"), when
    return {"session"}


def is_in_this_kedro(when: str) -> bool:
    since = re.search(r"from Kedro (\d+)\.(\d+)", when)
    return since is None or (int(since[1]), int(since[2])) <= KEDRO


@needs_readme
@pytest.mark.parametrize("kind", ["command", "command in a project", "session"])
def test_the_table_has_every_property_with_its_condition(
    kind, project, user, heap, patch
):
    if KEDRO >= (1, 6):
        catalog = "v: {type: MemoryDataset, validator: pandera.A}\n"
        write(project / CATALOG, catalog)
    if kind == "command":
        patch.chdir(user)
    if kind == "session":
        bootstrap_project(project)
        len(kedro_project.pipelines)
        KedroSession.create(project_path=project).load_context().catalog  # noqa: B018
    else:
        run("info")
    sent = {re.sub(r"(_type_count)\..*", r"\1", name) for name in heap.properties}
    shown = {
        name.partition(".<")[0]
        for names, when, _ in table_rows(COLLECTED)
        if kind in kinds_of_property(when) and is_in_this_kedro(when)
        for name in re.findall("`([^`]+)`", names)
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


@needs_readme
@pytest.mark.parametrize(
    ("sentence", "constant"),
    [
        (r"CI machines set .*?\. A fresh", "CI_VARIABLES"),
        (r"these validator\s+libraries: .*?\.", "PUBLIC_VALIDATORS"),
    ],
)
def test_a_list_in_README_is_that_of_the_module(sentence, constant):
    (text,) = re.findall(sentence, readme_section(COLLECTED), re.DOTALL)
    names = re.findall(r"`([^`]+)`", text)
    shown = tuple(name for name in names if name not in ("0", "false"))
    advice = f"README and {constant} disagree: change both."
    assert shown == getattr(kedro_telemetry, constant), advice


@needs_readme
def test_the_names_that_count_in_settings_are_those_of_the_module():
    sentence = r"names count in `settings.py`:(.*?) names this plugin"
    (text,) = re.findall(sentence, readme_section(WITHDRAW), re.DOTALL)
    variables = kedro_telemetry.OPT_OUT_VARIABLES
    assert re.findall(r"`([^`]+)`", text) == [
        *variables,
        kedro_telemetry.HOOK_SWITCH,
    ], "README's text below the table and OPT_OUT_VARIABLES disagree: change both."


@needs_readme
def test_the_table_has_every_way_to_opt_out_that_is_tried():
    cells = [how for _, how in table_rows(WITHDRAW)]
    shown = set(re.findall(r"`([^`]+)`", " ".join(cells)))
    shown -= {".telemetry", "settings.py"}
    tried = set(README_DENIALS)
    tried |= set(kedro_telemetry.OPT_OUT_VARIABLES)
    assert shown - tried == set(), "Try this code of README's table in README_DENIALS."
    assert tried - shown == set(), (
        "README's table of ways to opt out has no row with this code."
    )


@needs_readme
def test_the_logging_file_logs_what_is_sent(project, heap, known_user):
    section = readme_section("See what is sent")
    path = write(project / "conf/logging.yml", readme_block("yaml", section))
    done = run_python("-m", "kedro", "info", KEDRO_LOGGING_CONFIG=str(path))
    assert done.returncode == 0
    assert len(heap.events) == 1
    log = (project / "telemetry.log").read_text()
    assert log.startswith("Post of {")
    assert log.endswith(": 200\n")
    assert "Post of" not in done.stdout


@needs_readme
def test_the_recipe_for_a_vendored_copy_is_the_one_that_is_tried():
    recipe = readme_block("python", readme_section("Vendor it"))
    assert re.sub("  #.*", "", recipe) == VENDORED_SETTINGS


@needs_readme
def test_the_recipe_for_plugin_authors_sends_an_event(heap):
    section = readme_section("For plugin authors")
    assert run_python("-c", readme_block("python", section)).returncode == 0
    assert heap.names == ["my_plugin_did_it"]
    assert heap.properties["how_often"] == 3
