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
from hashlib import sha512
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, entry_points
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
HASH_LINK = "8bd8b012.0"  # what `openssl rehash` names the link to its file

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
    sys.platform in ("win32", "darwin"), reason="one configuration folder there"
)
not_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="root may read and write everything"
)
since_kedro_0_19 = pytest.mark.skipif(KEDRO < (0, 19), reason="Kedro 0.18 does not")
since_kedro_1 = pytest.mark.skipif(KEDRO < (1, 0), reason="Kedro 0.19 does not")


# Shared helpers: a Heap, a user, projects


class Heap(socketserver.ThreadingTCPServer):
    """A proxy with Heap behind it. `mode` is Heap's status, or what goes wrong."""

    def __init__(self, pem: Path) -> None:
        super().__init__(("127.0.0.1", 0), ConnectionToHeap)
        self.mode = "200"
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
        if heap.mode == "slow reset":
            heap.is_over.wait(0.3)
        if heap.mode in ("reset", "slow reset") or heap.hangs_if("hang"):
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
    patch.setattr(kedro_telemetry.telemetry_hook, "_command_report", None)
    patch.chdir(home)
    yield home
    kedro_project.PACKAGE_NAME = None
    kedro_project.pipelines.configure()
    for name in list(sys.modules):
        if name.split(".")[0] in MODULES_OF_TESTS:
            del sys.modules[name]


@pytest.fixture
def config(user) -> Path:
    """The user's Kedro configuration folder, which does not exist yet."""
    if sys.platform == "win32":
        return user / "kedro/kedro"
    if sys.platform == "darwin":
        return user / "Library/Application Support/kedro"
    return user / "kedro"


@pytest.fixture
def decisions(config, user) -> list[Path]:
    """The files that hold a decision for all the user's projects; none exists yet.

    On Linux, one is for processes that have XDG_CONFIG_HOME, and one for the others.
    """
    folders = [config]
    if sys.platform not in ("win32", "darwin"):
        folders.append(user / ".config/kedro")
    return [folder / ".telemetry" for folder in folders]


@pytest.fixture
def known_user(config) -> Path:
    """The file of a user who has an identity, as 0.9.0 stored it."""
    text = f'other = 1\n[telemetry]\nuuid = "{uuid.UUID(IDENTITY)}"\n'
    return write(config / "telemetry.toml", text)


@pytest.fixture
def heap(tmp_path, patch) -> Iterator[Heap]:
    """A Heap that the network leads to."""
    with Heap(tmp_path / "heap.pem") as heap:
        threading.Thread(target=heap.serve_forever, args=[0.002]).start()
        patch.setenv("HTTPS_PROXY", f"http://{heap.address}")
        yield heap
        heap.is_over.set()
        heap.shutdown()


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
    return CliRunner().invoke(kedro_cli.KedroCLI(Path.cwd()), line.split())


def run_python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run another Python process until it ends."""
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


def test_the_module_imports_nothing_that_kedro_does_not_and_prints_nothing():
    code = """
    import sys, click, pluggy, json, logging, pathlib, signal
    before = set(sys.modules)
    import kedro_telemetry.api, kedro_telemetry.plugin
    print(*sorted(set(sys.modules) - before), sep="\\n")
    """
    done = run_python("-c", code)
    own = ["kedro_telemetry", "kedro_telemetry.api", "kedro_telemetry.plugin"]
    assert done.stdout.splitlines() == own, (
        "Each `kedro` pays for an import at the top of the module: import it in the "
        "function that needs it. And print nothing there."
    )
    assert done.stderr == ""


# The packages, certifi or from Python itself, of which an event may import parts
IMPORTED_BY_AN_EVENT = """
base64 binascii certifi encodings email hashlib http importlib quopri select selectors
socket ssl stringprep tempfile tomllib unicodedata urllib uuid
"""
# A process with one session
SESSION = """
from pathlib import Path
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
bootstrap_project(Path.cwd())
with KedroSession.create(project_path=Path.cwd()) as session:
    assert session.load_context().catalog
"""


def test_an_event_imports_nothing_but_modules_of_python(project, heap, known_user):
    code = SESSION + "\nimport sys\nprint('MODULES', *sys.modules)"
    write(project / "src/spaceships/unused.py", "")
    without, modules = (
        set(run_python("-c", code, **variables).stdout.partition("MODULES")[2].split())
        for variables in ({"DO_NOT_TRACK": "1"}, {})
    )
    assert len(heap.events) == 1
    roots = {name.lstrip("_").partition(".")[0] for name in modules - without}
    assert "http" in roots
    assert roots <= set(IMPORTED_BY_AN_EVENT.split()), (
        "An event imports more than README promises. If that is a small module of "
        "Python's own, add it to IMPORTED_BY_AN_EVENT."
    )


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
        (
            "HEADERS",
            ("Host", "User-Agent", "Content-Type", "Content-Length"),
            "README names these four",
        ),
        ("DEADLINE", 2.0, "README promises two seconds, and a quarter of them"),
        ("BACK_OFF", 3600.0, "README promises an hour"),
        ("LARGEST_FILE", 2**20, "a larger file denies consent"),
        ("LARGEST_BUNDLE", 2**24, "certificates after that are not trusted"),
        ("LONGEST_TEXT", 1023, "README says where texts are cut"),
        ("ACCEPTED", 200, "README says what Heap's status means"),
        ("GRANTS", ("true", "yes", "on", "y", "1"), "README lists them"),
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
    write(other_project / file, text)
    interleave(*[other_project, project][::step])
    assert (heap.commands, heap.project_ids) == ([None], {SPACESHIPS})


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


def test_a_kedro_without_hook_managers_costs_the_numbers_of_a_session(project, heap):
    context = SimpleNamespace(project_path=project)
    kedro_telemetry.telemetry_hook.after_context_created(context=context)
    assert heap.names == ["Kedro Project Statistics"]
    assert "number_of_datasets" not in heap.properties


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


# The path that every event takes: no failure escapes from it

# A replacement for the module that does nothing
NO_TELEMETRY = """
import sys
sys.modules["kedro_telemetry.plugin"] = sys.modules[__name__]
telemetry_hook = object()
"""
QUIET = "{version: 1, disable_existing_loggers: false, loggers: {}}\n"


@pytest.mark.parametrize(
    ("words", "exit_status"),
    [
        (("-m", "kedro", "run"), 0),
        (("-c", SESSION), 0),
        pytest.param(("-m", "kedro", "run", "--pipeline=x"), 1, marks=since_kedro_0_19),
    ],
    ids=["a command", "a session", "a command that fails"],
)
def test_exit_status_and_output_stay_the_same(
    words, exit_status, project, config, tmp_path, patch
):
    write(config / "telemetry.notice", "")
    write(tmp_path / "stub/kedro_telemetry.py", NO_TELEMETRY)
    logging_file = write(tmp_path / "logging.yml", QUIET)
    patch.setenv("KEDRO_LOGGING_CONFIG", str(logging_file))
    paths = os.pathsep.join([str(tmp_path / "stub"), os.environ["PYTHONPATH"]])
    bare = run_python(*words, PYTHONPATH=paths)
    assert not (config / "telemetry.toml").exists()
    done = run_python(*words)
    assert (config / "telemetry.toml").exists(), "no event was built"
    assert (bare.returncode, done.returncode) == (exit_status, exit_status)
    assert (without_times(done.stdout), without_times(done.stderr)) == (
        without_times(bare.stdout),
        without_times(bare.stderr),
    ), "A command or a session prints something else than without kedro-telemetry."


def without_times(text: str) -> str:
    """What Kedro prints, without dates, times or object addresses."""
    return re.sub(r"\d+[-:]\d+[-:]\d+|\d+\.\d+ ?s|0x[0-9a-f]+", "", text)


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
threading.Thread.start builtins.open io.open pathlib.Path.mkdir pathlib.Path.cwd
os.lstat os.listdir os.urandom os.path.realpath os.path.expanduser json.dumps
time.monotonic time.time uuid.uuid4 socket.getaddrinfo click.echo logging.Logger.debug
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
def test_a_lost_event_is_logged_if_the_log_works(error, heap, log, patch):
    assert send_telemetry_event(Trap()) is False
    assert log.messages == ["An event was lost: RuntimeError"]
    patch.setattr(log.handler, "emit", Mock(side_effect=error))
    assert send_telemetry_event(Trap()) is False
    assert send_telemetry_event("x") is True


def test_kedros_log_takes_an_event_with_brackets(heap, log, patch, capfd):
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


# Files: never half-written, and replaced only if unchanged since they were read


def test_only_this_is_stored(new_project, config, heap, tmp_path, patch):
    """A user's first events, in a terminal, from a folder inside the project."""
    (new_project / "notebooks").mkdir()
    patch.chdir(new_project / "notebooks")
    patch.setenv("TMPDIR", str(tmp_path))
    code = f"""
    import io, os, sys
    class Screen(io.StringIO):
        def isatty(self): return True
    sys.stderr = Screen()
    from pathlib import Path
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project
    from kedro_telemetry import send_telemetry_event, telemetry_hook
    project = Path({str(new_project)!r})
    metadata = bootstrap_project(project)
    telemetry_hook.before_command_run(metadata, ["info"])
    telemetry_hook.after_command_run()
    assert KedroSession.create(project_path=project).load_context().catalog
    send_telemetry_event("x", None, project)
    """
    assert run_python("-c", code, DO_NOT_TRACK="1").returncode == 0
    before = files(tmp_path)
    assert run_python("-c", code).returncode == 0
    assert len(heap.events) == 3
    after = files(tmp_path)
    changed = {
        path for path in {*before, *after} if before.get(path) != after.get(path)
    }
    assert {path for path in changed if not path.is_dir()} == {
        new_project / "pyproject.toml",
        config / "telemetry.toml",
        config / "telemetry.notice",
    }, "README lists all that is stored: change it together with this test."


@posix
def test_a_file_that_is_replaced_keeps_what_is_the_users(new_project, tmp_path):
    """Its symbolic links, mode, owner and extended attributes, but not its time."""
    path = tmp_path / "elsewhere.toml"
    (new_project / "pyproject.toml").rename(path)
    (new_project / "pyproject.toml").symlink_to(path)
    path.chmod(0o640)
    os.utime(path, (1, 1))
    if os.geteuid() == 0:
        os.chown(path, 1234, 5678)
    attributes = {}
    if hasattr(os, "setxattr"):
        with contextlib.suppress(OSError):  # some file systems have none
            os.setxattr(path, "user.note", b"mine")
            attributes = {"user.note": b"mine"}
    before = path.stat()
    assert "project_id" in base_properties(new_project)
    assert (new_project / "pyproject.toml").is_symlink()
    assert "project_id" in path.read_text()
    for name in ("st_mode", "st_uid", "st_gid"):
        assert getattr(path.stat(), name) == getattr(before, name)
    assert {name: os.getxattr(path, name) for name in attributes} == attributes
    assert path.stat().st_mtime > before.st_mtime


REFUSED = Mock(side_effect=PermissionError(1, "Operation not permitted"))


@pytest.mark.parametrize("call", ["chown", "chmod", "utime", "setxattr"])
def test_a_file_is_replaced_on_a_drive_that_refuses(call, new_project, patch):
    """WSL's and Azure Files' do."""
    path = new_project / "pyproject.toml"
    path.chmod(0o600)
    patch.setattr(os, call, REFUSED, raising=False)
    assert "project_id" in base_properties(new_project)
    assert call == "chmod" or path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("trouble", ["fsync", "replace", "read-only", "chown"])
def test_what_cannot_be_replaced_stays_whole(trouble, new_project, patch):
    """The disk is full, Windows has the file open, or its owner cannot be kept."""
    path = new_project / "pyproject.toml"
    if trouble == "read-only":
        path.chmod(0o444)
    elif trouble == "chown" and os.name == "posix" and os.geteuid() == 0:
        os.chown(path, 1234, 5678)
    elif trouble == "chown":
        pytest.skip("only root can give files away")
    if trouble != "read-only":
        patch.setattr(os, trouble, REFUSED)
    before = set(files(new_project))
    assert "project_id" not in base_properties(new_project)
    assert (path.read_text(), set(files(new_project))) == (KEDRO_TABLE, before)


@pytest.fixture
def meanwhile(patch) -> Callable[[Callable], None]:
    """A function that makes another program act just before a file is replaced.

    It acts when the temporary copy is flushed to disk.
    """

    def set_action(action: Callable[[], object]) -> None:
        patch.setattr(os, "fsync", lambda _: action())

    return set_action


@pytest.mark.parametrize(
    "text", ["", KEDRO_TABLE + "# mine\n", None], ids=["emptied", "edited", "deleted"]
)
def test_what_an_editor_saves_meanwhile_stays(text, new_project, meanwhile):
    path = new_project / "pyproject.toml"
    before = set(files(new_project)) - {path}

    def save() -> None:
        path.unlink()
        if text is not None:
            path.write_text(text)

    meanwhile(save)
    assert "project_id" not in base_properties(new_project)
    assert (path.read_text() if path.exists() else None) == text
    assert set(files(new_project)) - {path} == before, "A temporary file is left."


def test_an_id_that_another_process_stores_meanwhile_is_sent(new_project, meanwhile):
    winner = KEDRO_TABLE + ID_TABLE
    meanwhile(lambda: write(new_project / "pyproject.toml", winner))
    sent = base_properties(new_project)["project_id"]
    assert sent == hashed_id(PROJECT_ID, "undefined_package_name")
    assert (new_project / "pyproject.toml").read_text() == winner


def test_an_identity_that_another_process_stores_meanwhile_is_sent(config, meanwhile):
    winner = f'[telemetry]\nuuid = "{IDENTITY}"\n'
    meanwhile(lambda: write(config / "telemetry.toml", winner))
    assert kedro_telemetry._get_or_create_uuid() == IDENTITY
    assert (config / "telemetry.toml").read_text() == winner


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
def test_the_package_and_the_folder_can_both_deny(file, text, packaged, tmp_path, heap):
    write(tmp_path / file, text)
    packaged()
    assert heap.connections == []


# Consent: anyone can deny, and a denial outweighs any grant


class Denial(NamedTuple):
    """A way to opt out, with the reason that the user is shown.

    Each file is written in full. In paths and reasons, {project} is the project root,
    and {config} and {home} are the user's folders. The current directory is the
    project's `notebooks` folder.
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
    "kedro telemetry disable": denial_by_file("{config}/.telemetry"),
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
        "{config}/.telemetry", **{"{project}/.telemetry": YES}
    ),
    "the project, and not the user": denial_by_file(
        "{project}/.telemetry", **{"{config}/.telemetry": YES}
    ),
    "a project whose file is too large": Denial(
        "this file cannot be read:\n{project}/pyproject.toml",
        files={"{project}/pyproject.toml": KEDRO_TABLE + "#" * 2**20},
    ),
    "settings that Kedro cannot import": denial_by_settings(
        "DO_NOT_TRACK", "DO_NOT_TRACK = True\nimport gone\n"
    ),
}
# The denial that tries each source in `_consent_sources`
SOURCES = {
    "_environment_consent": "DO_NOT_TRACK",
    "_file_consent": "kedro telemetry disable",
    "_Consent": "a project whose file is too large",
    "_imported_settings_consent": "KEDRO_DISABLE_TELEMETRY = True",
    "_source_consent": "settings that Kedro cannot import",
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
def denied(request, new_project, config, user, patch) -> SimpleNamespace:
    """A project without an id in which somebody has opted out, and the reasons."""
    denial = DENIALS[request.param]
    places = {"project": new_project, "config": config, "home": user}
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
def test_after_a_denial_nothing_happens(way_out, denied, tmp_path, heap, patch):
    for module in ("http.client", "urllib.request"):
        patch.delitem(sys.modules, module, raising=False)
    before = files(tmp_path)
    way_out(denied.project)
    assert (files(tmp_path), heap.connections) == (before, [])
    assert not {"http.client", "urllib.request"} & set(sys.modules)


def test_after_a_denial_debug_mode_prints_the_reason(denied, patch, capfd):
    patch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x", {}, denied.project) is False
    shown = f"kedro-telemetry sends nothing: {denied.reason}\n"
    assert capfd.readouterr() == ("", shown)


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


@linux
def test_a_file_counts_where_README_says(project, user, tmp_path, patch):
    here = project / "notebooks"
    here.mkdir()
    patch.chdir(here)
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    places = {user / ".config/kedro", tmp_path / "xdg/kedro", here, project}
    found = {path.parent for path in kedro_telemetry._consent_files(project)}
    assert found == places, "README names these folders: change it with this test."
    for place in places:
        file = write(place / ".telemetry", NO)
        assert consent(project) is False
        file.unlink()
    for place in (tmp_path, project.parent, user, user / ".config", project / "src"):
        write(place / ".telemetry", NO)
    assert consent(project) is None


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
def test_the_source_of_other_settings_counts(text, decision, project):
    write(project / SETTINGS, text)
    assert consent(project) is decision
    assert "spaceships" not in sys.modules


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


def test_a_package_that_cannot_be_imported_is_not_run_again(project, heap, capfd):
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


@pytest.mark.parametrize("kind", [Screen, Cell])
def test_the_notice_is_shown_once_to_somebody(kind, heap, config, patch):
    for shown in (NOTICE + "\n", ""):
        stream = kind()
        patch.setattr(sys, "stderr", stream)
        assert send_telemetry_event("x") is True
        assert stream.getvalue() == shown
    assert (config / "telemetry.notice").read_bytes() == b""


def test_the_notice_is_shown_until_a_grant_where_it_may_go_unseen(user, heap, capfd):
    """As with `kedro info 2> errors.log`."""
    for shown in (NOTICE + "\n", NOTICE + "\n", ""):
        if not shown:
            write(user / ".telemetry", YES)
        assert send_telemetry_event("x") is True
        assert capfd.readouterr() == ("", shown)


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


@posix
@pytest.mark.parametrize(
    "trouble",
    [
        no_folder,
        no_home,
        lambda config: (config / "telemetry.toml").mkdir(parents=True),
        lambda config: write(config / "telemetry.toml", "").chmod(0o444),
        lambda config: config.mkdir() or os.mkfifo(config / "telemetry.toml"),
    ],
    ids=["no folder", "no home", "a folder", "read-only", "a pipe"],
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
        (OPENED.rstrip(), "\n" + ADDED),
        (f'a = """\n[tool.kedro_telemetry]\n"""\n{OPENED}', ADDED),
        (f"[tool.kedro_telemetry]  # ours\nother = 1\n{OPENED}", ""),
        (f"[tool]\nkedro_telemetry = 5\n{OPENED}", ""),
        ("tool = {kedro = {a = 1}}\n", ""),
        ("[tool.black]\n", ""),
        (f"\ufeff{OPENED}", ""),
        ("[tool.kedro]\n# \udcff is not UTF-8\n", ""),
    ],
)
def test_an_id_is_added_to_pyproject_or_nothing(text, added, tmp_path):
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
NEVER = 'raise SystemExit("imported")\n'


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
def test_an_event_imports_nothing_to_find_a_type(declared, sent, datasets, types_of):
    configs = {"a": {"type": declared}, "b": ["x"], 3: {}, "d": None}
    catalog = SimpleNamespace(
        keys=configs.keys,
        config_resolver=SimpleNamespace(config=configs),
        get_type=Mock(side_effect=SystemExit("imported")),
    )
    assert types_of(catalog) == Counter(["custom", "custom", "custom", sent])


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
    assert "idle" not in sys.modules


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
"""


OF_THE_PROJECT = "mine added grouped of-a-plugin added-to-plugin wrapped partial empty"


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


def test_a_command_waits_two_seconds_for_a_heap_that_hangs(heap):
    """Other tests use a longer deadline, for busy machines, or a shorter one."""
    heap.mode = "drip"
    code = """
    import sys, time
    import kedro_telemetry
    from kedro.framework.cli import main
    send = kedro_telemetry._Report.send
    def timed_send(*arguments):
        start = time.monotonic()
        send(*arguments)
        print(time.monotonic() - start)
    kedro_telemetry._Report.send = timed_send
    sys.argv = ["kedro", "--version"]
    main()
    """
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, NOTICE + "\n")
    assert 2 <= float(done.stdout.splitlines()[-1]) < 20


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


def test_a_failure_late_in_two_seconds_is_the_last(heap, config, known_user, patch):
    patch.setattr(kedro_telemetry, "DEADLINE", 1.0)
    heap.mode = "slow reset"
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert (config / "telemetry.backoff").exists()
    assert len(heap.connections) == 1


def test_after_two_seconds_a_look_up_is_given_up(heap, config, short_deadline, patch):
    patch.setenv("HTTPS_PROXY", "http://proxy.invalid:80")
    patch.setattr(socket, "getaddrinfo", lambda *_, **__: heap.is_over.wait())
    assert send_telemetry_event("x") is False
    assert (config / "telemetry.backoff").exists()


def test_a_post_that_was_given_up_after_two_seconds_ends_by_itself(heap, patch):
    patch.setattr(kedro_telemetry, "DEADLINE", 0.2)
    heap.mode = "hang"
    before = set(threading.enumerate())
    assert send_telemetry_event("x") is False
    for thread in set(threading.enumerate()) - before:
        if thread.daemon:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("age", "is_sent"),
    [(0, False), (HOUR - 60, False), (HOUR + 60, True), (60 - HOUR, False)],
)
def test_a_back_off_after_two_seconds_lasts_an_hour(age, is_sent, heap, config):
    """A file server's clock may be ahead."""
    start = time.time() - age
    os.utime(write(config / "telemetry.backoff", ""), (start, start))
    assert send_telemetry_event("x") is bool(heap.connections) is is_sent


def test_an_old_back_off_is_renewed(heap, config, short_deadline):
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
def test_without_a_file_a_process_backs_off(trouble, heap, config, patch):
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


def test_the_thread_of_a_post_imports_nothing(heap):
    """A module that it loads while Python shuts down can abort the process."""
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


# Certificates: everything that the platform trusts, and nothing else

FOLDERS = {
    "nothing": {},
    "heap": {HASH_LINK: HEAP_CERTIFICATE},
    "another": {"00000000.0": ""},
    "names": {"heap.pem": HEAP_CERTIFICATE, "8bd8b012.pem": HEAP_CERTIFICATE},
}
BROKEN_CERTIFICATE = HEAP_CERTIFICATE.replace("M", "N", 1)


@pytest.fixture
def certificates(tmp_path, patch) -> Path:
    """The current directory, with files and folders of certificates."""
    write(tmp_path / "empty.pem", "")
    write(tmp_path / "broken.pem", BROKEN_CERTIFICATE + HEAP_CERTIFICATE)
    write(tmp_path / "intermediate.pem", INTERMEDIATE_CERTIFICATE)
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
        ("broken.pem", "gone", True, 1),
        ("heap.pem", "another", True, 2),
        ("empty.pem", "heap", True, 1),
        ("empty.pem", "another:heap", True, 1),
        ("", "heap", True, 1),
        ("empty.pem", "names", False, 1),
        ("empty.pem", "nothing", False, 1),
        ("empty.pem", "another", False, 2),
        ("gone.pem", "nothing", False, 1),
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
    ("variable", "bundle", "asks_system", "is_trusted"),
    [
        (None, "gone.pem", False, True),
        (None, "intermediate.pem", False, False),
        ("SSL_CERT_FILE", "gone.pem", False, False),
        ("SSL_CERT_DIR", "gone.pem", False, False),
        (None, "gone.pem", True, False),
        (None, "heap.pem", True, True),
    ],
)
def test_a_certificate_is_verified_by_certifi_in_need(
    variable, bundle, asks_system, is_trusted, certificates, heap, patch
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
    paths = SimpleNamespace(openssl_cafile=bundle, openssl_capath="gone")
    patch.setattr(ssl, "get_default_verify_paths", Mock(return_value=paths))
    certifi = SimpleNamespace(where=lambda: "heap.pem", __spec__=Mock())
    patch.setitem(sys.modules, "certifi", certifi)
    assert send_telemetry_event("x") is is_trusted


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
def test_a_certificate_in_the_folder_is_enough(certificates, heap, patch):
    os.mkfifo("pipe.pem")  # reading it would block
    patch.setenv("SSL_CERT_DIR", "heap")
    patch.setenv("SSL_CERT_FILE", "pipe.pem")
    assert send_telemetry_event("x") is True


@posix
@pytest.mark.parametrize(
    ("variable", "pipe", "loaded_before"),
    [
        ("SSL_CERT_FILE", "pipe.pem", ["capath"]),
        ("SSL_CERT_DIR", "slow/00000000.0", []),
    ],
)
def test_a_certificate_on_slow_storage_waits_in_python(
    variable, pipe, loaded_before, certificates, heap, short_deadline, patch
):
    """A thread that is still inside OpenSSL can crash a process as it ends."""
    loaded = []

    def load(_: object, cafile: object = None, **place: object) -> None:
        loaded.extend(place or ["cafile"])

    patch.setattr(ssl.SSLContext, "load_verify_locations", load)
    patch.setattr(ssl.SSLContext, "load_default_certs", load)
    (certificates / "slow").mkdir()
    os.mkfifo(pipe)
    patch.setenv(variable, pipe.removesuffix("/00000000.0"))
    before = set(threading.enumerate())
    assert send_telemetry_event("x") is False
    storage = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    os.write(storage, HEAP_CERTIFICATE.encode())  # when the wait is over
    os.close(storage)
    for thread in set(threading.enumerate()) - before:
        if thread.daemon:
            thread.join(10)
    assert loaded == loaded_before, (
        "OpenSSL reads certificates that Python has not read before, or after the wait."
    )


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


def test_status_without_a_project_or_a_home_folder_names_no_file(config):
    no_home(config)
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


@pytest.mark.parametrize("word", ["disable", "off"])
def test_disable_opts_out_for_all_projects(word, project, decisions, heap):
    done = run(f"telemetry {word}")
    assert (done.exit_code, {x.read_text() for x in decisions}) == (0, {NO})
    saved = (OPTED["disable"], "Saved to:", *decisions, *OLD_RELEASES)
    assert done.output == lines(*saved)
    run("info")
    assert heap.connections == []


@pytest.mark.parametrize("word", ["enable", "on"])
def test_enable_opts_in_for_all_projects(word, project, decisions, heap):
    for file in decisions:
        write(file, NO)
    done = run(f"telemetry {word}")
    assert (done.exit_code, {x.read_text() for x in decisions}) == (0, {YES})
    assert done.output == lines(OPTED["enable"], "Saved to:", *decisions)
    reason = f"Reason:      this file grants consent:\n             {decisions[0]}\n"
    assert reason in run("telemetry").output
    assert NOTICE not in run("info").output
    assert heap.commands == ["kedro info"]


def test_enable_says_where_telemetry_stays_off(project):
    file = write(project / ".telemetry", NO)
    shown = "Telemetry stays off here, because this file denies consent:"
    assert run("telemetry enable").output.endswith(lines(shown, file))


@linux
@pytest.mark.parametrize("variable", ["XDG_CONFIG_HOME", "HOME"])
def test_a_decision_survives_a_change_of_variables(variable, project, heap, patch):
    """tox, cron and VS Code from Flatpak change them."""
    run("telemetry disable")
    patch.setenv(variable, "/nowhere")
    run("info")
    assert heap.connections == []


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
    word, advice, trouble, reason, decisions, tmp_path
):
    failures = []
    for file in decisions:
        trouble(file)
        failures += [file, f"Reason: {reason}"]
    before = files(tmp_path)
    done = run(f"telemetry {word}")
    shown = "Error: Nothing has changed."
    assert (done.exit_code, done.output) == (
        1,
        lines(shown, "Could not save to:", *failures, *advice),
    )
    after = files(tmp_path)
    assert {x for x in after if x.is_file() and before.get(x) != after[x]} == set()


@pytest.mark.parametrize(("word", "advice"), [("enable", ()), ("disable", (ADVICE,))])
def test_without_a_home_folder_a_decision_cannot_be_saved(word, advice, config):
    no_home(config)
    done = run(f"telemetry {word}")
    shown = "Error: Nothing has changed, because there is no home folder."
    assert (done.exit_code, done.output) == (1, lines(shown, *advice))


@linux
@pytest.mark.parametrize("failing", [0, 1])
def test_a_decision_that_one_of_two_folders_takes_is_saved_there(failing, decisions):
    good, bad = decisions[1 - failing], decisions[failing]
    bad.mkdir(parents=True)
    done = run("telemetry disable")
    assert (done.exit_code, good.read_text()) == (0, NO)
    failed = ("Could not save to:", bad, "Reason: not a file, or too large")
    shown = (OPTED["disable"], "Saved to:", good, *failed, *OLD_RELEASES)
    assert done.output == lines(*shown)


@pytest.mark.parametrize("word", ["opt-out", "stop", "disabel"])
def test_a_guess_leads_to_the_commands(word):
    done = run(f"telemetry {word}")
    assert done.exit_code == 2
    assert done.output.endswith(
        f"Error: kedro telemetry has no command '{word}'.\n"
        "To opt out, run: kedro telemetry disable\n"
        "To opt in, run:  kedro telemetry enable\n"
    )


def test_help_lists_three_commands_and_the_documentation(project):
    output = run("telemetry --help").output
    listed = re.findall(r"^  ([a-z]+)", output.partition("Commands:")[2], re.MULTILINE)
    assert listed == ["disable", "enable", "status"]
    assert kedro_telemetry.DOCUMENTATION in output
    assert max(map(len, output.splitlines())) <= 80
    assert run("telemetry -h").output == output


@pytest.mark.parametrize("name", kedro_telemetry.OPT_OUT_VARIABLES)
def test_help_names_each_variable_that_opts_out(name):
    assert re.search(rf"\b{name}\b", run("telemetry --help").output), (
        f"`kedro telemetry --help` does not name {name}: add it to the text of "
        "`_telemetry` in the module."
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
@pytest.mark.parametrize(
    ("sentence", "constant"),
    [
        (r"CI machines are those.*?\. A fresh", "CI_VARIABLES"),
        (r"Tools are .*?\.", "KEDRO_TOOLS"),
        (r"Public validator libraries are .*?\.", "PUBLIC_VALIDATORS"),
    ],
)
def test_a_list_in_README_is_that_of_the_module(sentence, constant):
    (text,) = re.findall(sentence, readme_section(COLLECTED), re.DOTALL)
    names = re.findall(r"`([^`]+)`", text)
    shown = tuple(name for name in names if name not in ("0", "false"))
    advice = f"README and {constant} disagree: change both."
    assert shown == getattr(kedro_telemetry, constant), advice


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


@pytest.fixture
def run_sh(tmp_path, patch) -> Callable[[str], subprocess.CompletedProcess]:
    """A function that runs a code block from README in a shell, with this Python."""
    if not os.path.exists("/bin/sh"):
        pytest.skip("the commands are for POSIX shells")
    for name, words in {"kedro": "-m kedro", "python3": ""}.items():
        script = f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n'
        write(tmp_path / "bin" / name, script).chmod(0o755)
    (tmp_path / "temporary").mkdir()
    patch.setenv("TMPDIR", str(tmp_path / "temporary"))
    patch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")

    def run_sh(script: str) -> subprocess.CompletedProcess:
        return run_process(["/bin/sh", "-c", script])

    return run_sh


RELY_ON = "What you can rely on"


@needs_readme
@since_kedro_1
def test_the_proof_of_exit_status_says_same(run_sh, new_project):
    done = run_sh(readme_block("sh", readme_section(RELY_ON)))
    lines = done.stdout.splitlines()
    statuses = ["exit status 0", "exit status 0", "exit status 1"]
    assert lines == ["Telemetry:   on here", "same", *statuses], done.stderr
    assert (new_project / "pyproject.toml").read_text() == KEDRO_TABLE


@needs_readme
def test_the_proof_of_exit_status_says_that_telemetry_is_off(run_sh, project):
    write(project / ".telemetry", NO)
    done = run_sh(readme_block("sh", readme_section(RELY_ON)))
    assert "same" not in done.stdout.splitlines()
    assert "Nothing to compare" in done.stdout
    assert done.returncode != 0


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
def test_the_recipes_for_plugin_authors_send_and_show_an_event(run_sh, heap):
    section = readme_section("For plugin authors")
    assert run_python("-c", readme_block("python", section)).returncode == 0
    assert heap.names == ["my_plugin_did_it"]
    assert heap.properties["how_often"] == 3
    done = run_sh(readme_block("sh", section))
    assert done.stderr.startswith("kedro-telemetry would send:\n{")
    assert len(heap.events) == 1
