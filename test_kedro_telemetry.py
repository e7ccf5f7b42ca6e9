"""The specification of kedro-telemetry, in the order of the module.

What is sent here goes through a proxy to a TLS server that plays Heap, both of them on
loopback. Commands run by click's CliRunner, or as processes where the process matters.
"""

import contextlib
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
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha512
from http.server import BaseHTTPRequestHandler
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import kedro
import pytest
from click.testing import CliRunner, Result
from kedro.framework import project as kedro_project
from kedro.framework.cli import starters
from kedro.framework.cli.cli import KedroCLI
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.io import CachedDataset, DataCatalog, MemoryDataset
from kedro.logging import RichHandler
from pluggy import PluginManager

import kedro_telemetry
from kedro_telemetry import KedroTelemetryHook, send_telemetry_event

KEDRO = tuple(int(number) for number in kedro.__version__.split(".")[:2])
IDENTITY = "0123456789abcdef" * 2
PROJECT_ID = "a" * 32

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
HASHED_NAME = "8bd8b012.0"  # of its file, as `openssl rehash` gives it

# Whatever is set where the tests run, they begin as if nothing were.
VARIABLES = (
    *kedro_telemetry.OPT_OUT_VARIABLES,
    *kedro_telemetry.CI_VARIABLES,
    *("CI", "GITHUB_REPOSITORY_OWNER", "HEAP_APPID_DEV", "KEDRO_TELEMETRY_DEBUG"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_DIR"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("KEDRO_ENV", "KEDRO_LOGGING_CONFIG", "_KEDRO_COMPLETE"),
)
HOME_VARIABLES = ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CONFIG_HOME")

base_properties = partial(kedro_telemetry._get_project_properties, "")
statistics = kedro_telemetry._project_statistics
user_file = kedro_telemetry._user_file
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such thing")
since_kedro_1 = pytest.mark.skipif(KEDRO < (1, 0), reason="Kedro < 1.0 tells no types")


# What the tests stand on: a Heap, a user, a project


class Heap(socketserver.ThreadingTCPServer):
    """A proxy and, behind it, Heap; `mode` is its status, or what goes wrong."""

    def __init__(self, pem: Path) -> None:
        super().__init__(("127.0.0.1", 0), ConnectionToHeap)
        self.mode = "200"
        self.connections: list[str] = []
        self.events: list[dict] = []
        self.commands: list[str | None] = []
        self.is_over = threading.Event()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(pem)

    def handle_error(self, *_: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # the client may leave any time
            raise

    def hangs(self, mode: str) -> bool:
        return self.mode == mode and self.is_over.wait()


class ConnectionToHeap(BaseHTTPRequestHandler):
    log_message = Mock()  # says nothing

    def do_CONNECT(self) -> None:
        heap = self.server
        heap.connections.append(self.path)
        if heap.mode == "ctrl-c":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if heap.mode == "reset" or heap.hangs("hang"):
            return
        self.send_response(200)
        self.end_headers()
        if heap.hangs("hang-tls"):
            return
        with heap.tls.wrap_socket(self.connection, server_side=True) as stream:
            self.rfile = stream.makefile("rb")
            self.wfile = stream.makefile("wb", 0)
            self.handle_one_request()

    def do_POST(self) -> None:
        heap = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        heap.request = (self.path, self.headers["Content-Type"])
        heap.event = json.loads(body)
        heap.properties = heap.event["properties"]
        heap.events.append(heap.event)
        heap.commands.append(heap.properties.get("command"))
        if heap.mode == "garbage":
            self.wfile.write(b"\0\xff is not HTTP\r\n\r\n")
        if heap.mode == "garbage" or heap.hangs("hang-http"):
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
    kedro_telemetry.telemetry_hook.__init__()
    monkeypatch.chdir(home)
    yield home
    kedro_project.PACKAGE_NAME = None
    kedro_project.pipelines.configure()
    for name in list(sys.modules):
        if name.split(".")[0] in ("spaceships", "plug", "idle", "kedro_datasets"):
            del sys.modules[name]


@pytest.fixture
def config() -> Path:
    """The user's configuration folder for Kedro, which is not there yet."""
    return user_file("x").parent


@pytest.fixture
def known_user(config) -> Path:
    """The file of a user who has an identity, as 0.9.0 stored it."""
    text = f'other = 1\n[telemetry]\nuuid = "{uuid.UUID(IDENTITY)}"\n'
    return write(config / "telemetry.toml", text)


@pytest.fixture
def heap(tmp_path, monkeypatch) -> Iterator[Heap]:
    """The network leads to a Heap."""
    with Heap(tmp_path / "heap.pem") as heap:
        threading.Thread(target=heap.serve_forever, args=[0.01]).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{heap.server_address[1]}")
        yield heap
        heap.is_over.set()
        heap.shutdown()


TOOLS = """tools = "['Linting', 'Testing']"\nexample_pipeline = "False"\n"""
KEDRO_TABLE = f"""\
[tool.kedro]
package_name = "spaceships"
project_name = "Spaceships"
kedro_init_version = "{kedro.__version__}"
{TOOLS if KEDRO >= (0, 19) else ""}"""  # Kedro 0.18 refuses a project with tools
ID_TABLE = f'\n[tool.kedro_telemetry]\nproject_id = "{PROJECT_ID}"\n'
REGISTRY = """\
from kedro.pipeline import Pipeline, node
def register_pipelines():
    chain = Pipeline([node(repr, f"d{i}", f"d{i + 1}", name=f"n{i}") for i in range(3)])
    return {"__default__": chain, "other": chain}
"""
SETTINGS = "src/spaceships/settings.py"
PIPELINES = "src/spaceships/pipeline_registry.py"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A Kedro project, in whose root the user is."""
    root = tmp_path / "spaceships"
    write(root / "pyproject.toml", KEDRO_TABLE + ID_TABLE)
    write(root / "src/spaceships/__init__.py", "")
    write(root / SETTINGS, "")
    write(root / PIPELINES, REGISTRY)
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
    return CliRunner().invoke(KedroCLI(Path.cwd()), line.split())


def python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run another Python to its end."""
    command = [sys.executable, *map(textwrap.dedent, words)]
    env = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)


def load_catalogs(project: Path) -> None:
    """Let a new session load two contexts, each of which creates two catalogs."""
    bootstrap_project(project)
    with KedroSession.create(project_path=project) as session:
        for _ in range(2):
            context = session.load_context()
            assert context.catalog is not context.catalog


@pytest.fixture
def log(caplog) -> pytest.LogCaptureFixture:
    """The logger of the module, down to DEBUG."""
    caplog.set_level(logging.DEBUG, "kedro_telemetry")
    return caplog


# The module: what it costs to import, and the names that others know


def test_importing_the_module_by_any_name_imports_nothing_that_only_an_event_needs():
    code = """
    import sys, click, logging, pathlib, pluggy, traceback
    before = set(sys.modules)
    import kedro_telemetry.api, kedro_telemetry.plugin
    print(*sorted(set(sys.modules) - before))
    """
    done = python("-c", code)
    imported = {name.split(".")[0] for name in done.stdout.split()}
    heavy = "kedro yaml ssl http urllib tomllib hashlib uuid importlib certifi requests"
    assert (done.stderr, imported & set(heavy.split())) == ("", set())
    assert "kedro_telemetry" in imported


# The hooks: one event for each command and each session


def test_kedro_run_sends_all_that_README_lists_once(project, heap, known_user):
    known = known_user.read_bytes()
    done = python("-m", "kedro", "run", "--params", "a.b=2", CI="1")
    assert done.returncode == 0, done.stderr
    tools = {"tools": "Linting, Testing", "example_pipeline": "False"}
    assert heap.events == [
        {
            "app_id": "2388822444",
            "event": "Kedro Project Statistics",
            "timestamp": heap.event["timestamp"],
            "identity": IDENTITY,
            "properties": {
                **{"command": "kedro run --params *****", "main_command": "run"},
                **{"number_of_datasets": 1, "number_of_nodes": 3},
                **({f"dataset_type_count.{MEMORY}": 1} if KEDRO >= (1, 0) else {}),
                **{"number_of_pipelines": 2, "username": IDENTITY},
                "project_id": sha512(f"{PROJECT_ID}spaceships".encode()).hexdigest(),
                "project_version": kedro.__version__,
                "telemetry_version": kedro_telemetry.__version__,
                **{"python_version": sys.version, "os": sys.platform},
                **{"is_ci_env": False, **(tools if KEDRO >= (0, 19) else {})},
            },
        }
    ]
    assert known_user.read_bytes() == known
    assert heap.connections == ["heapanalytics.com:443"]
    assert heap.request == ("/api/track", "application/json")


def test_a_command_without_a_session_looks_as_it_did(project, heap):
    bare = python("-m", "kedro", "--help", DO_NOT_TRACK="1")
    done = python("-m", "kedro", "--help")
    assert (bare.returncode, bare.stderr) == (0, "")
    assert (done.returncode, done.stderr) == (0, kedro_telemetry.NOTICE + "\n")
    clock = r"\d\d:\d\d:\d\d"
    assert re.sub(clock, "", done.stdout) == re.sub(clock, "", bare.stdout)
    assert re.search(r"^  telemetry +See whether telemetry is on.*$", done.stdout, re.M)
    assert heap.commands == ["kedro --help"]
    assert heap.event["event"] == "CLI command"


def test_each_command_is_reported_once_and_ends_as_ever(project, heap):
    heap.mode = "500"  # an event that does not arrive is not sent twice
    exit_codes = {"info": 0, "run": 0, "-V": 0, "nonsense": 2, "run --env local": 0}
    for line, exit_code in exit_codes.items():
        assert run(line).exit_code == exit_code
    load_catalogs(project)
    words = [event["properties"].get("main_command") for event in heap.events]
    assert words == ["info", "run", "-V", "*****", "run", None]
    if KEDRO >= (0, 19):  # where a command raises, Kedro 0.18 calls no hook
        assert run("run --pipeline nonsense").exit_code == 1
        assert heap.properties["command"] == "kedro run --pipeline *****"


def test_a_session_is_reported_once_for_its_project(project, user, heap, monkeypatch):
    monkeypatch.chdir(user)
    for _ in range(2):
        load_catalogs(project)
        assert heap.event["event"] == "Kedro Project Statistics"
        assert "project_id" in heap.properties
    assert heap.commands == [None, None]


def test_a_command_with_two_sessions_is_reported_once(project, heap):
    code = """
    import click
    from kedro.framework.session import KedroSession
    @click.command()
    def twice():
        for _ in range(2):
            assert KedroSession.create().load_context().catalog
    cli = click.Group("spaceships", [twice])
    """
    write(project / "src/spaceships/cli.py", code)
    assert run("twice").exit_code == 0
    assert heap.commands == ["kedro *****"]
    assert heap.event["event"] == "Kedro Project Statistics"


class Trap:
    """What raises whatever is done with it."""

    def spring(self, *_: object) -> object:
        raise RuntimeError

    __getattr__ = __str__ = __bool__ = spring


@pytest.mark.parametrize("thing", [None, 5, "text", [None], Trap])
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


@pytest.fixture
def on_ctrl_c() -> Iterator[Callable]:
    """The function that sets what Ctrl-C does, for this test."""
    before = signal.getsignal(signal.SIGINT)
    yield partial(signal.signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@posix
def test_ctrl_c_ends_the_wait_after_a_command_but_stops_a_session(
    project, heap, on_ctrl_c
):
    on_ctrl_c(signal.default_int_handler)  # a shell may ignore it
    heap.mode = "ctrl-c"
    done = run("info")
    assert (done.exit_code, len(heap.connections)) == (0, 1)
    with pytest.raises(KeyboardInterrupt):
        load_catalogs(project)
    assert len(heap.connections) == 2


@posix
def test_a_signal_that_ends_the_process_ends_it_in_a_post(heap, on_ctrl_c):
    on_ctrl_c(lambda *_: sys.exit(3))
    heap.mode = "ctrl-c"
    with pytest.raises(SystemExit):
        send_telemetry_event("x")


def test_TAB_sends_nothing(heap, monkeypatch):
    monkeypatch.setenv("_KEDRO_COMPLETE", "bash_complete")
    assert send_telemetry_event("x") is False
    assert heap.connections == []


# send_telemetry_event: the door for other plugins


def test_a_plugin_sends_an_event_of_its_own(project, heap):
    own = {
        **{"text": "a" * 2000, "number": 1.5, "truth": True, "nothing": None},
        **{"nested": {"a": [1]}, "endless": float("inf"), "k" * 2000: 1, 7: 7},
        **{"username": "me", "os": "mine", "project_id": "mine", "tools": "mine"},
    }
    sent = {
        **{"text": "a" * 1023, "number": 1.5, "truth": True, "nested": "{'a': [1]}"},
        **{"endless": "inf", "k" * 1023: 1, "7": 7, "os": sys.platform},
    }
    assert send_telemetry_event("my_event", own, project) is True
    assert heap.event["event"] == "my_event"
    assert sent.items() <= heap.properties.items()
    assert heap.properties["username"] == heap.event["identity"]
    assert "nothing" not in heap.properties
    assert "mine" not in heap.properties.values()
    assert send_telemetry_event("outside", own) is True
    assert not {"project_id", "tools"} & set(heap.properties)


# Consent: anyone can deny, and a denial outweighs any grant


def variants(lines: str) -> list[str]:
    """The texts between the bars of a table."""
    return [case for line in lines.splitlines() for case in line.strip().split(" | ")]


YES = "consent: true\n"
GRANTS = [
    *variants("""\
    consent: true | consent:true | consent = true | consent=yes | consent: on
    consent: y | consent: 1 | CONSENT : True | 'consent': true | consent:  'on'
    "consent": "true" | consent\t:\tYES | consent: true # I said | consent : y"""),
    *("consent: true\r\n", "consent: true\r", "\ufeffconsent: true  \t\n\n"),
    *("# consent: false\nconsent: true", "consent: true\n\nconsent: yes"),
    "other: {a: [b\nconsent: true\n",
]
NO_MENTIONS = ["", "\n", "# consent: no", "other: no", "{", "\ufeff"]
NO_GRANTS = [
    *variants("""\
    consent: false | consent=false | consent: n | consent: 0 | Consent: No
    consent: maybe | consent: | consent | consent: true false | consent: 2
    {consent: true} | - consent: true | my_consent: true | consents: true
    noconsent | consent: 'true | 'consent": true | consent:: true | consent 1
    consent: true; | consent: [true] | consent: truer | consent.given: true"""),
    *(b" consent: true", b"\tconsent: true", "consent: true\nno consent"),
    *("consent: true\nconsent: false", "consent: false\nconsent: true"),
    *("consent: true".encode("utf-16"), "consent: true".encode("utf-16-le")),
    *(b"consent: true\n\xff", b"consent: true\n" + b"#" * 2**20),
]


@pytest.mark.parametrize(
    ("decision", "texts"), [(True, GRANTS), (False, NO_GRANTS), (None, NO_MENTIONS)]
)
def test_only_a_plain_yes_grants_and_anything_else_that_is_said_denies(decision, texts):
    for text in texts:
        write(Path("project/.telemetry"), text)
        found = kedro_telemetry._check_for_telemetry_consent(Path("project"))
        assert (text, found) == (text, decision)


def deny(file: Path, granting_file: Path | None = None) -> None:
    write(file, "consent: false\n")
    if granting_file:
        write(granting_file, YES)


ODD_SWITCH = "DISABLE_HOOKS_FOR_PLUGINS = None\n"
SWITCH = 'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n'

# Each is given the root of a project, and the user's file.
DENIALS: dict[str, Callable] = {
    "settings": lambda root, _: write(root / SETTINGS, SWITCH),
    "broken settings": lambda root, _: write(root / SETTINGS, f"import gone\n{SWITCH}"),
    "odd settings": lambda root, _: write(root / SETTINGS, ODD_SWITCH),
    "project": lambda root, _: deny(root / ".telemetry"),
    "no plain yes": lambda root, _: write(root / ".telemetry", "{consent: true}"),
    "user": lambda _, users: deny(users),
    "user, not project": lambda root, users: deny(users, root / ".telemetry"),
    "project, not user": lambda root, users: deny(root / ".telemetry", users),
    "a folder": lambda root, _: (root / ".telemetry").mkdir(),
}
if os.name == "posix":
    DENIALS |= {
        "a link to nowhere": lambda root, _: (root / ".telemetry").symlink_to("gone"),
        "a loop": lambda root, _: (root / ".telemetry").symlink_to(".telemetry"),
        "a pipe": lambda root, _: os.mkfifo(root / ".telemetry"),
    }
if os.name == "posix" and os.geteuid() != 0:  # root may read everything
    DENIALS |= {
        "no permission": lambda root, _: write(root / ".telemetry", YES).chmod(0),
        "a locked folder": lambda _, users: write(users, YES).parent.chmod(0),
    }
OPT_OUTS = variants("""\
    DO_NOT_TRACK=1 | DO_NOT_TRACK=0 | DO_NOT_TRACK= | KEDRO_DISABLE_TELEMETRY=
    GITHUB_REPOSITORY_OWNER=kedro-org""")


def make(denial: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "=" in denial:
        monkeypatch.setenv(*denial.split("="))
    else:
        DENIALS[denial](root, user_file(".telemetry"))


def by_a_command(project: Path) -> None:
    assert run("registry list").exit_code == 0


def by_a_session(project: Path) -> None:
    with contextlib.suppress(ImportError, TypeError):  # of settings that Kedro refuses
        load_catalogs(project)


def by_another_plugin(project: Path) -> None:
    assert send_telemetry_event("x", {"a": 1}, project) is False


def by_kedro_viz(project: Path) -> None:
    assert kedro_telemetry._check_for_telemetry_consent(project) is False
    assert kedro_telemetry._get_or_create_uuid() == ""


def by_the_extension_for_vs_code(project: Path) -> None:
    found = json.loads(json.dumps(base_properties(project)))
    assert "os" in found
    assert "project_id" not in found


WAYS_OUT = [
    *(by_a_command, by_a_session, by_another_plugin, by_kedro_viz),
    by_the_extension_for_vs_code,
]


@pytest.mark.parametrize("way_out", WAYS_OUT)
@pytest.mark.parametrize("denial", [*OPT_OUTS, *DENIALS])
def test_after_a_denial_nothing_is_sent_created_changed_or_imported(
    denial, way_out, new_project, tmp_path, heap, monkeypatch
):
    make(denial, new_project, monkeypatch)
    bootstrap_project(new_project)
    for module in ("http.client", "urllib.request"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    before = files(tmp_path)
    way_out(new_project)
    assert files(tmp_path) == before
    assert heap.connections == []
    assert not {"http.client", "urllib.request"} & set(sys.modules)


def test_where_nobody_denies_both_are_sent_even_without_settings(project, heap):
    (project / SETTINGS).unlink()
    run("registry list")
    load_catalogs(project)
    assert heap.commands == ["kedro registry list", None]


def test_outside_of_projects_the_nearest_file_counts(user, heap, monkeypatch):
    deny(user / ".telemetry", granting_file=user / "a/b/.telemetry")
    (user / "a/b/c").mkdir()
    monkeypatch.chdir(user / "a")
    assert send_telemetry_event("x") is False
    monkeypatch.chdir(user / "a/b/c")
    assert send_telemetry_event("x") is True
    assert send_telemetry_event("x", project_path=user / "a") is True  # has no file


@posix
def test_a_deleted_current_directory_denies_nothing(user, heap, monkeypatch):
    (user / "gone").mkdir()
    monkeypatch.chdir(user / "gone")
    (user / "gone").rmdir()
    assert kedro_telemetry._get_or_create_uuid() != ""
    assert send_telemetry_event("x") is True


def test_kedro_can_patch_the_question_for_consent(project, heap, monkeypatch):
    check = Mock(return_value=None)
    monkeypatch.setattr("kedro_telemetry.plugin._check_for_telemetry_consent", check)
    run("run")
    check.assert_called_once_with(project)
    assert len(heap.events) == 1
    check.return_value = False
    run("run")
    assert (check.call_count, len(heap.events)) == (2, 1)


# The notice: seen once


def test_the_notice_is_short_and_shown_once(heap, config, monkeypatch, capfd):
    for _ in range(2):
        assert send_telemetry_event("x") is True
    output, notice = capfd.readouterr()
    assert (output, notice) == ("", kedro_telemetry.NOTICE + "\n")
    for words in ("anonymous", "kedro telemetry disable", "DO_NOT_TRACK", "https://"):
        assert words in notice
    assert len(notice.splitlines()) <= 4
    assert max(map(len, notice.splitlines())) <= 80
    (config / "telemetry.notice").unlink()
    monkeypatch.setattr(sys, "stderr", None)  # where it is closed, it is not shown
    assert send_telemetry_event("x") is True
    assert capfd.readouterr() == ("", "")


# Identity: one user, one UUID


def stored_uuid(config: Path) -> str:
    form = r'\[telemetry\]\nuuid = "([0-9a-f]{32})"\n'
    return re.fullmatch(form, (config / "telemetry.toml").read_text())[1]


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


# Each is given the configuration folder, and the function that sets a variable.
TROUBLES: dict[str, Callable] = {
    "no folder": lambda config, _: write(config, "a file"),
    "a folder": lambda config, _: (config / "telemetry.toml").mkdir(parents=True),
    "read-only": lambda config, _: write(config / "telemetry.toml", "").chmod(0o444),
    "no home": lambda _, setenv: [setenv(name, "nowhere") for name in HOME_VARIABLES],
}
if os.name == "posix":
    TROUBLES["a pipe"] = lambda config, _: (
        config.mkdir(parents=True),
        os.mkfifo(config / "telemetry.toml"),
    )


@pytest.mark.parametrize("trouble", TROUBLES)
def test_events_go_without_an_identity_after(trouble, user, config, heap, monkeypatch):
    TROUBLES[trouble](config, monkeypatch.setenv)
    before = files(user)
    assert send_telemetry_event("x") is True
    assert heap.event["identity"] == "missing_user_identity"
    assert heap.properties["username"] == kedro_telemetry._get_or_create_uuid() == ""
    assert set(files(user)) - {config / "telemetry.notice"} == set(before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other folders")
def test_the_configuration_folder_is_where_XDG_says(user, monkeypatch):
    assert user_file("x") == user / "kedro/x"
    for not_absolute in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", not_absolute)
        assert user_file("x") == user / ".config/kedro/x"


def test_a_CI_machine_makes_no_id(new_project, config, heap, monkeypatch):
    monkeypatch.setenv("CI", "true")
    before = files(new_project.parent)
    assert kedro_telemetry.NOTICE not in run("registry list").output
    assert heap.event["identity"] == "missing_user_identity"
    assert "project_id" not in heap.properties
    assert files(new_project.parent) == before
    write(config / "telemetry.toml", f'[telemetry]\nuuid = "{IDENTITY}"\n')
    write(new_project / "pyproject.toml", KEDRO_TABLE + ID_TABLE)
    run("registry list")
    assert heap.event["identity"] == IDENTITY
    assert "project_id" in heap.properties


def test_first_commands_that_run_at_once_agree_afterwards(new_project, config, heap):
    code = """
    from pathlib import Path
    import kedro_telemetry
    kedro_telemetry._get_project_properties("", Path.cwd())
    kedro_telemetry._get_or_create_uuid()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    crowd = [subprocess.Popen(command) for _ in range(8)]
    assert [one.wait(timeout=60) for one in crowd] == [0] * 8
    for _ in range(2):
        run("registry list")
    identity = stored_uuid(config)
    assert uuid.UUID(identity).version == 4
    for event in heap.events:
        assert event["identity"] == event["properties"]["username"] == identity
    assert len({event["properties"]["project_id"] for event in heap.events}) == 1
    text = (new_project / "pyproject.toml").read_text()
    assert text.startswith(KEDRO_TABLE)
    assert text.count("project_id") == 1


# The project's id: two edits, or none

OPENED = '[tool.kedro]\na = "ü"\n'
TABLE = "[tool.kedro_telemetry]"
ID = "project_id = 'ID'\n"
BOTH = f"\n{TABLE}\n{ID}"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("head", "added", "tail"),
    [
        *((OPENED, BOTH, ""), (OPENED.rstrip(), f"\n{BOTH}", "")),
        ("[tool]\nkedro.a = 1\n", BOTH, ""),
        (f'a = """\n{TABLE}\n"""\n{OPENED}', BOTH, ""),
        (f"{TABLE}  # ours\n", ID, f"other = 1\n{OPENED}"),
        (f"{OPENED}{TABLE}", f"\n{ID.rstrip()}", ""),
        (f"[tool.kedro_telemetry.project_id]\n{OPENED}", "", ""),
        (f"[tool]\nkedro_telemetry = {{}}\n{OPENED}", "", ""),
        (f"[tool]\nkedro_telemetry = 5\n{OPENED}", "", ""),
        (f"[ tool . kedro_telemetry ]\n{OPENED}", "", ""),
        *(("[tool.black]\n", "", ""), ("tool = 5\n", "", ""), ("", "", "")),
        *((f"{OPENED}broken\n", "", ""), (f"\ufeff{OPENED}", "", "")),
        ("[tool.kedro]\n# \udcff\n", "", ""),  # is not UTF-8
    ],
)
def test_an_id_is_added_to_pyproject_or_nothing(head, added, tail, newline, tmp_path):
    def encoded(text: str) -> bytes:
        return text.replace("\n", newline).encode(errors="surrogateescape")

    path = write(tmp_path / "pyproject.toml", encoded(head + tail))
    base_properties(tmp_path)
    written = re.sub(rb'"[0-9a-f]{32}"', b"'ID'", path.read_bytes())
    assert written == encoded(head + added + tail)


@pytest.mark.parametrize(
    ("written", "hashed"),
    [('"mine"', "mine"), ('""', ""), ("5", "5"), (f'"{PROJECT_ID}"', PROJECT_ID)],
)
def test_an_id_is_taken_as_it_stands_in_a_kedro_project(written, hashed, tmp_path):
    pyproject = tmp_path / "pyproject.toml"
    text = f"[tool.kedro_telemetry]\nproject_id = {written}\n"
    write(pyproject, text)
    assert "project_id" not in base_properties(tmp_path)
    write(pyproject, f"[tool.kedro]\n{text}")
    told = sha512(f"{hashed}undefined_package_name".encode()).hexdigest()
    assert base_properties(tmp_path)["project_id"] == told
    assert pyproject.read_text() == f"[tool.kedro]\n{text}"


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
    for name in ("st_mode", "st_uid", "st_gid"):
        assert getattr(path.stat(), name) == getattr(before, name)


@pytest.mark.parametrize("trouble", ["read-only", "os.fsync", "os.replace"])
def test_what_cannot_be_replaced_stays_whole(trouble, new_project, heap, monkeypatch):
    if trouble == "read-only":
        (new_project / "pyproject.toml").chmod(0o444)
    else:
        monkeypatch.setattr(trouble, Mock(side_effect=OSError("no space left")))
    before = files(new_project)
    run("registry list")
    assert files(new_project) == before
    assert "project_id" not in heap.properties


# Properties: what every event tells, and what a session does


@pytest.mark.parametrize(
    "variable",
    variants("""\
    CI=true | GITLAB_CI=x | GITHUB_ACTION=1 | TRAVIS=1 | BITBUCKET_BUILD_NUMBER=7
    JENKINS_URL=http | CODEBUILD_BUILD_ID=7 | CIRCLECI=false | BUILDKITE=true"""),
)
def test_a_CI_machine_is_known_by_its_variables(variable, monkeypatch):
    name, value = variable.split("=")
    monkeypatch.setenv(name, value)
    assert base_properties(None)["is_ci_env"] is True
    monkeypatch.setenv(name, "")
    assert base_properties(None)["is_ci_env"] is False


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("\"['Linting', 'Testing']\"", "Linting, Testing"),
        ('["Linting", "Testing"]', "Linting, Testing"),
        *(('"Linting & more"', "Linting & more"), ("[]", None)),
        *(('"[]"', None), ('""', None), ("false", None)),
    ],
)
def test_tools_are_told_as_a_list_of_names(written, sent, tmp_path):
    text = f"[tool.kedro]\ntools = {written}\nexample_pipeline = true\n"
    write(tmp_path / "pyproject.toml", text)
    found = base_properties(tmp_path)
    assert (found.get("tools"), found["example_pipeline"]) == (sent, True)


def test_an_event_has_the_time_in_UTC_and_an_application_at_heap(heap, monkeypatch):
    monkeypatch.setenv("HEAP_APPID_DEV", "5")
    send_telemetry_event("x")
    sent = time.strptime(heap.event["timestamp"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert abs(time.mktime(sent) - time.mktime(time.gmtime())) < 60
    assert heap.event["app_id"] == kedro_telemetry._get_heap_app_id() == "5"


def test_a_kedro_that_cannot_be_imported_has_no_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "kedro", None)
    assert "project_version" not in base_properties(None)


@pytest.mark.parametrize(
    ("registry", "told"),
    [
        (REGISTRY, {"number_of_pipelines": 2, "number_of_nodes": 3}),
        (REGISTRY.replace("__default__", "first"), {"number_of_pipelines": 2}),
        *(("1 / 0", {}), ("raise SystemExit(5)", {})),
    ],
)
def test_parameters_and_what_does_not_load_are_not_counted(registry, told, project):
    write(project / PIPELINES, registry)
    bootstrap_project(project)
    names = ["a", "b", "parameters", "params:a", "params:a.b"]
    catalog = SimpleNamespace(list=lambda: names)  # as Kedro had before 1.0
    assert statistics(catalog) == {"number_of_datasets": 2, **told}


# Types of datasets: told without an import

MEMORY = "kedro.io.memory_dataset.MemoryDataset"
CACHED = "kedro.io.cached_dataset.CachedDataset"
CSV = "kedro_datasets.pandas.csv_dataset.CSVDataset"
TABLE_OF_GBQ = "kedro_datasets.pandas.gbq_dataset.GBQTableDataset"
EXPERIMENTAL = "kedro_datasets_experimental.pandas.csv_dataset.CSVDataset"
LOOSE = "kedro_datasets.loose.loose_dataset.Loose"
NEVER = 'raise SystemExit("imported")\n'
GROUP = f"""{NEVER}submod_attrs={{
    "csv_dataset": ["CSVDataset"],
    "gbq_dataset": [
        "GBQTableDataset",
    ],
}}"""


@pytest.fixture
def datasets(tmp_path, monkeypatch) -> None:
    """kedro-datasets as it is laid out, none of which may be imported but `loose`."""
    site = tmp_path / "site"
    loose = "from kedro.io import MemoryDataset\nclass Loose(MemoryDataset): ...\n"
    for package in ("kedro_datasets", "kedro_datasets_experimental"):
        pandas = site / package / "pandas"
        write(site / package / "__init__.py", "")
        write(pandas / "__init__.py", GROUP)
        write(pandas / "csv_dataset.py", f"{NEVER}\nclass CSVDataset(X):")
    write(site / "kedro_datasets/loose/__init__.py", "from .loose_dataset import Loose")
    write(site / "kedro_datasets/loose/loose_dataset.py", loose)
    write(site / "acme/__init__.py", NEVER)
    monkeypatch.syspath_prepend(str(site))


@since_kedro_1
@pytest.mark.parametrize(
    ("told", "declared"),
    [
        *((MEMORY, "MemoryDataset"), (MEMORY, "kedro.io.MemoryDataset")),
        *((MEMORY, MEMORY), (CACHED, "kedro.io.CachedDataset"), (CACHED, CACHED)),
        *((CSV, "pandas.CSVDataset"), (CSV, "kedro_datasets.pandas.CSVDataset")),
        *((CSV, "pandas.csv_dataset.CSVDataset"), (CSV, CSV)),
        *((TABLE_OF_GBQ, "pandas.GBQTableDataset"), (LOOSE, "loose.Loose")),
        (EXPERIMENTAL, "kedro_datasets_experimental.pandas.CSVDataset"),
        *(("custom", "kedro.io.Secret"), ("custom", "kedro.iox.Secret")),
        *(("custom", "pandas.Secret"), ("custom", "pandas.csv_dataset.Secret")),
        *(("custom", "loose.Secret"), ("custom", "kedro_datasets.secret.Secret")),
        *(("custom", "kedro_datasets.Secret"), ("custom", "acme.Secret")),
        *(("custom", "acme"), ("custom", "..")),
    ],
)
def test_a_declared_type_is_told_by_its_public_name(told, declared, datasets):
    catalog = DataCatalog.from_config({"a": {"type": declared}})
    assert f"dataset_type_count.{told}" in statistics(catalog)
    assert "acme" not in sys.modules


@since_kedro_1
def test_a_dataset_that_exists_and_a_class_in_a_catalog_tell_their_types():
    cached = {"type": CachedDataset, "dataset": "MemoryDataset"}
    config = {"a": cached, "b": {"type": "MemoryDataset"}}
    catalog = DataCatalog.from_config(config)
    catalog["c"] = MemoryDataset(1)
    catalog["MemoryDataset"] = type("Secret", (MemoryDataset,), {})(1)
    catalog["params:d"] = 1
    assert statistics(catalog) == {
        **{"number_of_datasets": 4, "number_of_pipelines": 0},
        f"dataset_type_count.{CACHED}": 1,
        f"dataset_type_count.{MEMORY}": 2,
        "dataset_type_count.custom": 1,
    }


@since_kedro_1
def test_each_declared_type_is_looked_up_once(monkeypatch, datasets):
    config = {name: {"type": "loose.Secret"} for name in ("a", "b", "c")}
    catalog = DataCatalog.from_config(config)
    monkeypatch.setattr(catalog, "get_type", Mock(return_value="acme.Secret"))
    assert statistics(catalog)["dataset_type_count.custom"] == 3
    catalog.get_type.assert_called_once_with("a")


def test_a_catalog_of_the_users_own_kind_is_asked():
    types = {"a": "kedro.io.X", "b": None}
    counts = statistics(SimpleNamespace(keys=types.keys, get_type=types.get))
    assert counts["dataset_type_count.kedro.io.X"] == 1
    assert counts["dataset_type_count.custom"] == 1


@pytest.mark.skipif(KEDRO < (1, 6), reason="validators came with Kedro 1.6")
def test_validators_are_counted_by_public_library(project, heap):
    catalog = """
    a: {type: MemoryDataset, validator: pandera.api.A}
    b: {type: MemoryDataset, validator: pandera.B}
    c: {type: MemoryDataset, validator: spaceships.Secret}
    """
    write(project / "conf/base/catalog.yml", catalog)
    load_catalogs(project)
    assert heap.properties["number_of_validated_datasets"] == 3
    assert heap.properties["validator_type_count.pandera"] == 2
    assert heap.properties["validator_type_count.custom"] == 1


# Masking: public are the words that Kedro or an installed plugin defines

PLUGIN = """
import click
@click.command()
@click.option("--fast/--slow", "-f")
def fly(**_): ...
@click.command()
@click.option("--level")
def lift(**_): ...
class Broken(click.Group):
    def get_command(self, ctx, name): raise RuntimeError
class Open(click.Group):
    def get_command(self, ctx, name): return click.Command(name)
everywhere = click.Group("everywhere", [fly])
groups = [click.Group("deck", [lift]), Broken("broken"), Open("open")]
inside = click.Group("inside", groups)
"""
ENTRY_POINTS = (
    "[kedro.global_commands]\nidle = idle:cli\nplug = plug:everywhere\n"
    "[kedro.project_commands]\nplug = plug:inside\n"
)


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> None:
    """A plugin that Kedro has loaded, and one that it has not."""
    site = tmp_path / "plugins"
    write(site / "plug.py", PLUGIN)
    write(site / "idle.py", "")
    write(site / "plug-1.0.dist-info/METADATA", "Name: plug\nVersion: 1.0\n")
    write(site / "plug-1.0.dist-info/entry_points.txt", ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    __import__("plug")


MASKED = """\
-h -> -h | -V -> -V | --help=x -> --help ***** | --help /home/alice -> --help *****
--version 3 -> --version ***** | x -> ***** | x --and y -> ***** | --x run -> *****
--x=y -> ***** | info -> info | run -> run | run -h -> run -h | run run -> run *****
run --env x -> run --env ***** | run -e x y -> run -e ***** ***** | run -ex -> run *****
run --params=a=b -> run --params ***** | run --x --y=z -> run ***** *****
run --pipeline=x --env= -> run --pipeline ***** --env *****
run --pipeline --env -> run --pipeline --env | run -- -e x -> run ***** -e *****
pipeline create x -> pipeline create ***** | pipeline x create -> pipeline ***** *****
jupyter notebook --port 80 -> jupyter notebook ***** ***** | open x -> open *****
new --starter=astro-airflow-iris -> new --starter astro-airflow-iris
new -s astro-airflow-iris x -> new -s astro-airflow-iris *****
new --checkout astro-airflow-iris -> new --checkout *****
run --starter astro-airflow-iris -> run ***** ***** | new -s x -> new -s *****
fly --slow -f x --y -> fly --slow -f ***** ***** | fly target -> fly *****
deck lift --level=9 --help -> deck lift --level ***** --help | deck x -> deck *****
broken x -> broken *****"""


@pytest.mark.parametrize("case", variants(MASKED))
def test_what_kedro_or_a_plugin_defines_is_clear_and_all_else_masked(case, plugin):
    line, told = case.split(" -> ")
    assert kedro_telemetry._mask(line.split()) == told.split()
    assert "idle" not in sys.modules


def test_the_command_without_a_word_is_kedro():
    told = {"command": "kedro", "main_command": "kedro"}
    assert kedro_telemetry._command_properties([]) == told


def test_the_starter_of_a_plugin_is_not_an_official_one(monkeypatch):
    name = "_OFFICIAL_STARTER_SPECS_DICT"
    specs = getattr(starters, name, None) or starters._OFFICIAL_STARTER_SPECS
    internal = starters.KedroStarterSpec("acme-internal", "https://secret")
    internal.origin = "acme"
    monkeypatch.setitem(specs, "acme-internal", internal)
    assert "acme-internal" not in kedro_telemetry._mask(["new", "-s", "acme-internal"])


def test_what_the_project_defines_is_masked(project, plugin, heap, monkeypatch):
    code = """
    import click
    import plug
    from kedro.framework.cli import cli as kedro_cli
    @click.command()
    @click.option("--pipeline")
    @click.option("--secret")
    def run(**_): ...
    @click.command()
    def mine(): ...
    cli = click.Group("spaceships", [run, mine])
    plug.inside.add_command(mine, "added-to-plugin")
    kedro_cli.cli.add_command(mine, "added")
    kedro_cli.cli.add_command(click.Group("grouped", invoke_without_command=True))
    """
    write(project / "src/spaceships/cli.py", code)
    for group in kedro_telemetry._kedro_groups():
        monkeypatch.setattr(group, "commands", dict(group.commands))
    assert run("run --pipeline x --secret y").exit_code == 0
    if KEDRO >= (0, 19):  # Kedro 0.18 forgets its own command of that name
        assert heap.commands == ["kedro run --pipeline ***** ***** *****"]
    for line in ("mine", "added", "grouped", "added-to-plugin"):
        assert run(line).exit_code == 0
        assert heap.properties["command"] == "kedro *****"


# Post: one try, two seconds, TLS


@pytest.mark.parametrize(
    ("mode", "outcome"),
    [
        *(("200", "200"), ("302", "302"), ("500", "500"), ("big", "200")),
        *(("garbage", "BadStatusLine"), ("reset", "[A-Z][A-Za-z]+")),
    ],
)
def test_an_event_is_posted_once_and_found_in_the_log(mode, outcome, heap, log):
    heap.mode = mode
    assert send_telemetry_event("x") is (outcome == "200")
    (line,) = log.messages
    posted = re.fullmatch(rf"Posted (\{{.*\}}): {outcome}", line)
    assert json.loads(posted[1])["event"] == "x"
    assert len(heap.connections) == 1


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


@pytest.mark.parametrize("mode", ["hang", "hang-tls", "hang-http", "drip", "look-up"])
def test_after_the_deadline_a_post_is_given_up(mode, heap, config, log, monkeypatch):
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 0.8)
    monkeypatch.setenv("CI", "true")  # no other file makes the folder of the stamp
    heap.mode = mode
    if mode == "look-up":
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:80")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: heap.is_over.wait())
    start = time.monotonic()
    assert send_telemetry_event("x") is False
    assert 0.8 <= time.monotonic() - start < 1.6
    assert log.messages[0].endswith("}: no answer in time")
    assert (config / "telemetry.backoff").read_bytes() == b""
    assert send_telemetry_event("x") is False
    assert len(log.messages) == 1


@pytest.mark.parametrize(("age", "is_sent"), [(3500, False), (3700, True), (-9, True)])
def test_after_the_deadline_nothing_is_posted_for_an_hour(age, is_sent, heap, config):
    start = time.time() - age
    os.utime(write(config / "telemetry.backoff", ""), (start, start))
    assert send_telemetry_event("x") is is_sent
    assert len(heap.connections) == is_sent


def test_where_no_stamp_can_be_stored_it_is_remembered(heap, config, monkeypatch):
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 0.5)
    heap.mode = "hang"
    write(config, "a file")
    for _ in range(2):
        assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1
    heap.mode = "200"
    hour_ago = kedro_telemetry._back_off_start - 3700
    monkeypatch.setattr(kedro_telemetry, "_back_off_start", hour_ago)
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
    done = python("-m", "kedro", "--version")
    assert (done.returncode, done.stderr) == (0, kedro_telemetry.NOTICE + "\n")
    assert 2 < time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("file", "folder", "certifi", "is_trusted"),
    [
        *(("heap.pem", "none", None, True), ("heap.pem", "other", None, True)),
        *(("empty.pem", "none", None, False), ("empty.pem", "hashed", None, True)),
        *(("", "hashed", None, True), ("", "other", "heap.pem", False)),
        *(("", "none", None, False), ("", "none", "heap.pem", True)),
        ("empty.pem", "none", "heap.pem", False),
    ],
)
def test_whom_to_trust(file, folder, certifi, is_trusted, heap, tmp_path, monkeypatch):
    write(tmp_path / "empty.pem", "")
    write(tmp_path / "hashed" / HASHED_NAME, HEAP_PEM)
    write(tmp_path / "other/00000000.0", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", file)
    monkeypatch.setenv("SSL_CERT_DIR", folder)
    module = Mock(where=Mock(return_value=certifi))
    monkeypatch.setitem(sys.modules, "certifi", module if certifi else None)
    assert send_telemetry_event("x") is is_trusted
    if folder == "hashed" and not file:  # each is looked up, and none is loaded
        assert kedro_telemetry._tls_context().cert_store_stats()["x509"] == 0


def test_the_imports_of_a_post_set_off_no_garbage_collection(heap):
    code = """
    import gc, sys
    from kedro_telemetry import send_telemetry_event
    class Watcher:
        def find_spec(name, *_):
            if name == "urllib.request":
                print(gc.isenabled())
    sys.meta_path.insert(0, Watcher)
    print(send_telemetry_event("x"), gc.isenabled())
    gc.disable()
    print(send_telemetry_event("x"), gc.isenabled())
    """
    assert python("-c", code).stdout == "False\nTrue True\nTrue False\n"


# The debug mode: all happens, but nothing is posted


def test_the_debug_mode_prints_the_event(project, config, heap, monkeypatch, capfd):
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    write(config / "telemetry.backoff", "")
    assert send_telemetry_event("x", {"a": 1}, project) is False
    output, errors = capfd.readouterr()
    assert (output, heap.connections) == ("", [])
    assert errors.startswith(kedro_telemetry.NOTICE + "\n{\n  ")
    event = json.loads(errors.removeprefix(kedro_telemetry.NOTICE))
    assert (event["event"], event["properties"]["a"]) == ("x", 1)
    assert event["identity"] == stored_uuid(config)
    assert "project_id" in event["properties"]
    (config / "telemetry.backoff").unlink()
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "")
    assert send_telemetry_event("x") is True


# The commands: kedro telemetry


def ours(line: str = "") -> Result:
    """Run `kedro telemetry LINE` as `kedro` does, once its plugins are initialised."""
    (point,) = entry_points(group="kedro.init", name="kedro-telemetry")
    point.load()()
    return run(f"telemetry {line}")


def test_status_tells_a_new_user_all_there_is(new_project, user, config, heap, capfd):
    before = files(new_project.parent)
    done = ours("status")
    assert done.output == ours().output
    assert (done.exit_code, files(new_project.parent)) == (0, before)
    assert done.output.splitlines()[:8] == [
        "Telemetry:   on here",
        "Reason:      nobody has granted or denied consent",
        "Identity:    none yet",
        f"             in {config / 'telemetry.toml'}",
        "Project id:  none yet",
        f"             in {new_project / 'pyproject.toml'}",
        "Endpoint:    https://heapanalytics.com/api/track",
        "Back-off:    none",
    ]
    for word in ("KEDRO_TELEMETRY_DEBUG=1 kedro run", "telemetry disable", "enable"):
        assert word in done.output
    assert max(map(len, kedro_telemetry.STATUS_HELP.splitlines())) <= 80
    assert (heap.connections, capfd.readouterr()) == ([], ("", ""))


def test_status_tells_ids_and_the_back_off(project, config, known_user, monkeypatch):
    stamp = write(config / "telemetry.backoff", "").stat().st_mtime
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp + 3600))
    write(project / PIPELINES, "raise SystemExit(5)")
    monkeypatch.chdir(project / "conf/base")
    for text in (IDENTITY, PROJECT_ID, f"Back-off:    until {end}"):
        assert text in ours().output
    monkeypatch.chdir(config)
    (config / "pyproject.toml").mkdir()  # which makes no project
    done = ours()
    assert (done.exit_code, "Project id" in done.output) == (0, False)


def test_status_works_in_a_project_that_kedro_refuses(project, monkeypatch):
    write(project / "pyproject.toml", "[tool.kedro]\n")
    monkeypatch.chdir(project / "conf")
    done = ours()
    assert (done.exit_code, "Project id" in done.output) == (0, True)


@pytest.mark.parametrize(
    ("denial", "reason"),
    [
        ("DO_NOT_TRACK=", "DO_NOT_TRACK is set"),
        ("GITHUB_REPOSITORY_OWNER=kedro-org", "GITHUB_REPOSITORY_OWNER is kedro-org"),
        ("settings", "DISABLE_HOOKS_FOR_PLUGINS is set in spaceships.settings"),
        ("broken settings", "spaceships.settings could not be imported"),
        ("odd settings", "spaceships.settings could not be read"),
        *(("project", "{project} denies consent"), ("user", "{user} denies consent")),
        ("a folder", "{project} cannot be read"),
    ],
)
def test_a_denial_is_told_with_its_basis(denial, reason, project, monkeypatch, capfd):
    make(denial, project, monkeypatch)
    monkeypatch.chdir(project / "conf")  # where Kedro 0.18 finds no project
    told = reason.format(project=project / ".telemetry", user=user_file(".telemetry"))
    assert ours().output.startswith(f"Telemetry:   off here\nReason:      {told}\n")
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x", {}, project) is False
    assert capfd.readouterr() == ("", f"kedro-telemetry sends nothing: {told}\n")


def test_disable_and_enable_speak_for_all_projects(project, heap):
    file = user_file(".telemetry")
    done = ours("disable")
    assert (done.exit_code, file.read_text()) == (0, "consent: false\n")
    assert f"out of telemetry for all your projects.\nSaved in {file}\n" in done.output
    done = ours("enable")
    assert (done.exit_code, file.read_text()) == (0, "consent: true\n")
    assert f"in to telemetry for all your projects.\nSaved in {file}\n" in done.output
    assert f"Reason:      {file} grants consent\n" in ours().output
    assert kedro_telemetry.NOTICE not in run("info").output
    assert heap.commands == ["kedro info"]
    deny(project / ".telemetry")
    told = f"Telemetry stays off here: {project / '.telemetry'} denies consent\n"
    assert ours("enable").output.endswith(told)


@pytest.mark.parametrize("word", ["enable", "disable"])
@pytest.mark.parametrize("trouble", ["no folder", "no home"])
def test_what_cannot_be_written_is_one_line(trouble, word, config, monkeypatch):
    TROUBLES[trouble](config, monkeypatch.setenv)
    done = ours(word)
    assert done.exit_code == 1
    assert re.fullmatch(r"Error: Nothing has changed: .+\n", done.output)


@pytest.mark.parametrize(
    ("line", "exit_code"),
    [
        *(("", 0), ("status", 0), ("enable", 0), ("disable", 0), ("--help", 0)),
        *(("nonsense", 2), ("status x", 2), ("--x", 2), ("enable x", 2)),
    ],
)
def test_asking_about_telemetry_is_not_reported(line, exit_code, project, heap):
    done = ours(line)
    assert done.exit_code == exit_code
    assert kedro_telemetry.NOTICE not in done.output
    assert heap.connections == []


def test_adding_the_command_never_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "kedro.framework.cli.cli", None)
    kedro_telemetry.add_commands()


# One copy: vendored into a project


def test_a_vendored_copy_reports_and_has_the_commands(project, heap, monkeypatch):
    source = Path(kedro_telemetry.__file__).read_bytes()
    write(project / "src/spaceships/kedro_telemetry.py", source)
    hooks = "from .kedro_telemetry import telemetry_hook\nHOOKS = (telemetry_hook,)\n"
    write(project / SETTINGS, hooks)
    monkeypatch.setattr(PluginManager, "load_setuptools_entrypoints", Mock())
    load_catalogs(project)
    assert len(heap.events) == 1
    write(project / SETTINGS, hooks + SWITCH)
    status = python("-m", "spaceships.kedro_telemetry", PYTHONPATH="src")
    assert "DISABLE_HOOKS_FOR_PLUGINS is set in spaceships.settings" in status.stdout


# README: what it says is what happens

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


HEADINGS = variants("""\
    What is kedro-telemetry? | What data is being collected?
    How is the data collected? | How do I withdraw consent?
    What happens when I withdraw consent? | What licence do you use?
    Python version support policy | See what is sent | What you can rely on
    Vendor it | For plugin authors | For the Kedro team: what changed from 0.9.0
    For security reviewers | Work on it""")


def test_links_from_kedros_documentation_find_their_headings():
    assert re.findall(r"^## (.*)", README, re.MULTILINE) == HEADINGS


def test_the_table_has_every_property_that_is_sent_and_no_other(project, heap):
    rows = dict(re.findall(r"^\| `([\w.<>]+)` \| ([^|]*) \|", README, re.MULTILINE))
    if KEDRO >= (1, 6):
        catalog = "v: {type: MemoryDataset, validator: pandera.A}\n"
        write(project / "conf/base/catalog.yml", catalog)
    run("run")
    sent = {re.sub(r"(_type_count)\..*", r"\1.<>", name) for name in heap.properties}
    listed = {re.sub("<.*>", "<>", name): when for name, when in rows.items()}
    assert sent <= set(listed)
    for name in set(listed) - sent:
        since = re.search(r"from Kedro (\d+)\.(\d+)", listed[name])
        assert (int(since[1]), int(since[2])) > KEDRO, name


def test_the_command_to_try_shows_an_event_and_sends_none(heap):
    assert "KEDRO_TELEMETRY_DEBUG=1 .venv/bin/kedro info\n" in README
    done = python("-m", "kedro", "info", KEDRO_TELEMETRY_DEBUG="1")
    event = done.stderr.removeprefix(kedro_telemetry.NOTICE)
    assert json.loads(event)["event"] == "CLI command"
    assert heap.connections == []


@pytest.mark.skipif(not shutil.which("bash"), reason="the commands are for bash")
def test_the_commands_about_the_deadline_show_it(config, tmp_path, monkeypatch):
    (lines,) = re.findall(r"```sh\n +(python3 -c .*\n +time .*)\n", README)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    write(tmp_path / "bin/kedro", f'#!/bin/sh\nexec {sys.executable} -m kedro "$@"\n')
    (tmp_path / "bin/kedro").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    script = lines.replace("9999", port) + "\nkill %1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    (seconds,) = re.findall(r"real\t0m(\d+)[.,]\d+s", done.stderr)
    assert 2 <= int(seconds) < 10
    assert (config / "telemetry.backoff").exists()
