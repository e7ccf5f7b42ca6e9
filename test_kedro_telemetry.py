"""The tests, in the order of the module. What they send goes to a TLS server on loopback, through a proxy."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import runpy
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import threading
import time
import types
import uuid
from pathlib import Path

import kedro
import pytest
from click.testing import CliRunner
from kedro.framework.cli.cli import KedroCLI
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

import kedro_telemetry
from kedro_telemetry import KedroTelemetryHook, _check_for_telemetry_consent, main, send_telemetry_event

MODULE = Path(kedro_telemetry.__file__)
HERE = Path(__file__).parent
KEDRO = tuple(int(part) for part in kedro.__version__.split(".")[:2])

# For this test alone, made once and valid until 2120: an authority and a certificate for heapanalytics.com.
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
VARIABLES = (
    *("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY", "GITHUB_REPOSITORY_OWNER", "HEAP_APPID_DEV", "CI"),
    *("KEDRO_TELEMETRY_DEBUG", "_KEDRO_COMPLETE", "KEDRO_LOGGING_CONFIG", "KEDRO_ENV", "PYTHONPATH"),
    *("HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_DIR"),
    *kedro_telemetry.CI_VARIABLES.split(),
)


class Heap:
    """A proxy and, behind it, what answers for heapanalytics.com. `mode` is a status or what goes wrong."""

    def __init__(self, folder: Path, mode: str = "200") -> None:
        self.mode, self.connections, self.requests, self.bodies = mode, [], [], []
        (folder / "leaf.pem").write_text(CERTIFICATE_AND_KEY)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / "leaf.pem")
        self.is_over = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.proxy = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self) -> None:
        while (client := self.socket.accept()[0]) and not self.is_over.is_set():
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def close(self) -> None:
        """Wake and end the thread before its socket is gone, whose number the next server's may get."""
        self.is_over.set()
        with socket.socket() as waker:
            waker.connect(self.socket.getsockname())
            self.thread.join()
        self.socket.close()

    def serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            self.connections.append(self.head(client)[0])
            if self.mode == "hang":
                self.is_over.wait(60)
            if self.mode == "reset":
                return
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with self.tls.wrap_socket(client, server_side=True) as stream:
                head, body = self.head(stream)
                length = int(re.search(r"(?i)content-length: (\d+)", head)[1])
                while len(body) < length:
                    body += stream.recv(65536)
                self.requests.append(head)
                self.bodies.append(body)
                self.answer(stream)

    def head(self, stream: socket.socket) -> tuple[str, bytes]:
        data = b""
        while b"\r\n\r\n" not in data and (more := stream.recv(65536)):
            data += more
        head, _, rest = data.partition(b"\r\n\r\n")
        return head.decode(), rest

    def answer(self, stream: ssl.SSLSocket) -> None:
        if self.mode == "garbage":
            stream.sendall(b"\0\xff no HTTP\r\n\r\n")
        elif self.mode == "drip":
            for byte in b"HTTP/1.1 200 OK\r\n" + 100 * b"X-Padding: x\r\n":
                stream.sendall(bytes([byte]))
                if self.is_over.wait(0.1):
                    return
        elif self.mode == "big":
            stream.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not self.is_over.is_set():
                stream.sendall(2**20 * b"x")
        elif self.mode == "redirect":
            stream.sendall(f"HTTP/1.1 302 Found\r\nLocation: {self.proxy}/\r\nContent-Length: 0\r\n\r\n".encode())
        else:
            stream.sendall(f"HTTP/1.1 {self.mode} Whatever\r\nContent-Length: 2\r\n\r\n{{}}".encode())

    @property
    def events(self) -> list[dict]:
        return [json.loads(body) for body in self.bodies]

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    @property
    def commands(self) -> list[str | None]:
        return [event["properties"].get("command") for event in self.events]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user who has said nothing, has no files, and whose network is a closed port."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "authority.pem").write_text(AUTHORITY)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    monkeypatch.setenv("PYTHONPATH", str(MODULE.parent))
    monkeypatch.setattr(kedro_telemetry.telemetry_hook, "back_off_start", 0.0)
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 20.0)  # for machines that are busy
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(home)
    yield home
    kedro.framework.project.PACKAGE_NAME = None
    kedro.framework.project.pipelines.configure()
    for name in [name for name in sys.modules if name.split(".")[0] == "spaceships"]:
        del sys.modules[name]


@pytest.fixture
def config(home) -> Path:
    """The user's telemetry.toml, which is not there yet."""
    (home / "config" / "kedro").mkdir(parents=True)
    return home / "config" / "kedro" / "telemetry.toml"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start a Heap, and send there whatever this test and its processes send."""
    with contextlib.ExitStack() as stack:

        def start(mode: str = "200") -> Heap:
            heap = Heap(tmp_path, mode)
            stack.callback(heap.close)
            monkeypatch.setenv("HTTPS_PROXY", heap.proxy)
            return heap

        yield start


@pytest.fixture
def heap(serve) -> Heap:
    return serve()


TOOLS = """\
tools = "['Linting', 'Testing']"
example_pipeline = "False"
""" * (KEDRO >= (0, 19))  # before, Kedro refuses to run with them
PYPROJECT = f"""\
[project]
name = "spaceships"

[tool.kedro]
package_name = "spaceships"
project_name = "Spaceships"
kedro_init_version = "{kedro.__version__}"
source_dir = "src"
{TOOLS}
[tool.kedro_telemetry]
project_id = "{32 * "a"}"
"""
REGISTRY = """\
from kedro.pipeline import Pipeline, node


def same(x):
    return x


def register_pipelines():
    chain = Pipeline([node(same, f"d{i}", f"d{i + 1}", name=f"n{i}") for i in range(3)])
    return {"__default__": chain, "other": chain}
"""
CATALOG = """\
d0: {type: spaceships.datasets.Quiet}
d3: {type: kedro.io.MemoryDataset}
"""
DATASETS = """\
from kedro.io import AbstractDataset


class Quiet(AbstractDataset):
    def _load(self):
        return 1

    def _save(self, data): ...

    def _describe(self):
        return {}
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A Kedro project, in whose root the test is."""
    root = tmp_path / "spaceships"
    package = root / "src" / "spaceships"
    for folder in (package, root / "conf" / "base", root / "conf" / "local"):
        folder.mkdir(parents=True)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    (package / "settings.py").touch()
    (package / "pipeline_registry.py").write_text(REGISTRY)
    (package / "datasets.py").write_text(DATASETS)
    (root / "conf" / "base" / "catalog.yml").write_text(CATALOG)
    (root / "conf" / "base" / "parameters.yml").write_text("a: {b: 1}\n")
    monkeypatch.chdir(root)
    return root


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, **options)


def kedro_command(*words: object, **options: object) -> subprocess.CompletedProcess:
    """Run a real `kedro` command, in a wide terminal."""
    options["env"] = {**os.environ, "COLUMNS": "1000"} | options.get("env", {})
    program = "import sys; from kedro.framework.cli.cli import main; sys.argv[0] = 'kedro'; main()"
    return run(sys.executable, "-c", program, *words, **options)


def invoke(project: Path | None, *words: str) -> object:
    """Run a `kedro` command in this process."""
    return CliRunner().invoke(KedroCLI(project_path=project or Path.cwd()), list(words))


def session_run(project: Path, **options: object) -> None:
    bootstrap_project(project)
    with KedroSession.create(project_path=project) as session:
        session.run(**options)


def screen(done: subprocess.CompletedProcess) -> tuple[int, list[str], str]:
    """What a command leaves: its status, the lines on the terminal without their times, and its standard error."""
    lines = [re.sub(r"^\[[\d/: ]+\]|\s+", " ", line).strip() for line in done.stdout.splitlines()]
    return done.returncode, lines, done.stderr


def debug_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "kedro_telemetry"]


@pytest.fixture
def at_debug(caplog):
    with caplog.at_level(logging.DEBUG, "kedro_telemetry"):
        yield caplog


# The module ----------------------------------------------------------------------------------------------------------


def test_importing_the_module_loads_nothing_heavy():
    heavy = [
        "kedro",
        "click",
        "yaml",
        "ssl",
        "http.client",
        "urllib.request",
        "tomllib",
        "hashlib",
        "uuid",
        "importlib.metadata",
        "importlib.util",
        "asyncio",
    ]
    code = f"""
    import sys, pluggy
    before = set(sys.modules)
    import kedro_telemetry
    print(*set({heavy}) & (set(sys.modules) - before))
    """
    done = run(sys.executable, "-c", textwrap.dedent(code))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_the_names_that_other_packages_import_are_there():
    code = """
    from kedro_telemetry.plugin import _check_for_telemetry_consent, _get_heap_app_id, _get_or_create_uuid
    from kedro_telemetry.plugin import _get_project_properties, telemetry_hook
    from kedro_telemetry.api import send_telemetry_event
    import kedro_telemetry, kedro_telemetry.plugin, kedro_telemetry.api
    assert kedro_telemetry.plugin is kedro_telemetry.api is kedro_telemetry
    print(kedro_telemetry.__version__)
    """
    assert run(sys.executable, "-c", textwrap.dedent(code)).stdout == f"{kedro_telemetry.__version__}\n"


def test_without_pluggy_there_is_still_the_command_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pluggy", None)
    for name in ("bare.plugin", "bare.api"):
        monkeypatch.setitem(sys.modules, name, None)
    assert runpy.run_path(str(MODULE), run_name="bare")["main"](["--help"]) == 0
    assert kedro_telemetry.HELP in capsys.readouterr().out


def test_both_entry_points_lead_to_the_hook():
    from importlib.metadata import entry_points

    for group in ("kedro.hooks", "kedro.cli_hooks"):
        (point,) = entry_points(group=group, name="kedro-telemetry")
        assert point.value == "kedro_telemetry:telemetry_hook"


def test_the_logger_lets_info_through_and_no_debug_unless_its_level_is_set_already():
    code = """
    import logging, sys
    logging.getLogger("kedro_telemetry").setLevel(sys.argv[1])
    import kedro_telemetry
    print(kedro_telemetry.logger.level)
    """
    for level, kept in (("NOTSET", 20), ("DEBUG", 10), ("ERROR", 40)):
        assert run(sys.executable, "-c", textwrap.dedent(code), level).stdout == f"{kept}\n"


# The hooks -----------------------------------------------------------------------------------------------------------


def test_kedro_run_delivers_one_event_with_everything_in_it(project, heap):
    done = kedro_command("run", "--params", "a.b=2")
    assert done.returncode == 0, done.stderr
    (event,) = heap.events
    identity = event["identity"]
    assert uuid.UUID(identity).hex == identity
    assert (
        abs(
            time.time()
            - time.mktime(time.strptime(event["timestamp"] + "UTC", "%Y-%m-%dT%H:%M:%S.%fZ%Z"))
            + time.timezone
        )
        < 60
    )
    types = {"dataset_type_count.custom": 1, "dataset_type_count.kedro.io.memory_dataset.MemoryDataset": 1}
    assert event == {
        "app_id": "2388822444",
        "event": "Kedro Project Statistics",
        "timestamp": event["timestamp"],
        "identity": identity,
        "properties": {
            "command": "kedro run --params *****",
            "main_command": "run",
            "number_of_datasets": 2,
            "number_of_nodes": 3,
            "number_of_pipelines": 2,
            **(types if KEDRO >= (1, 0) else {}),
            "username": identity,
            "project_id": hashlib.sha512(f"{32 * 'a'}spaceships".encode()).hexdigest(),
            "project_version": kedro.__version__,
            "telemetry_version": kedro_telemetry.__version__,
            "python_version": sys.version,
            "os": sys.platform,
            "is_ci_env": False,
            **({"tools": "Linting, Testing", "example_pipeline": "False"} if TOOLS else {}),
        },
    }
    (head,) = heap.requests
    assert head.startswith("POST /api/track HTTP/1.1\r\n")
    assert "\r\nUser-Agent: kedro-telemetry/" + kedro_telemetry.__version__ in head
    assert "\r\nContent-Type: application/json" in head
    assert "\r\nHost: heapanalytics.com" in head


def test_a_command_without_a_session_is_reported_when_it_has_ended(home, heap):
    done = kedro_command("info")
    assert done.returncode == 0
    (event,) = heap.events
    assert event["event"] == "CLI command"
    names = "command main_command username project_version telemetry_version python_version os is_ci_env"
    assert sorted(event["properties"]) == sorted(names.split())


def test_a_command_that_fails_is_reported_and_fails_as_it_would(project, heap):
    done = kedro_command("run", "--pipeline", "nonsense")
    assert done.returncode == 1
    assert "nonsense" in done.stdout + done.stderr
    if KEDRO >= (0, 19):  # before, Kedro calls no hook after a command that raises
        assert heap.commands == ["kedro run --pipeline *****"]


def test_each_of_several_commands_in_one_process_is_reported(project, heap):
    for words in (["info"], ["run"], ["--version"], ["nonsense"], ["run"]):
        invoke(project, *words)
    assert heap.commands == ["kedro info", "kedro run", "kedro --version", "kedro *****", "kedro run"]
    assert heap.names[1] == heap.names[4] == "Kedro Project Statistics"
    assert "number_of_nodes" not in heap.events[2]["properties"]


def test_a_session_without_a_command_is_reported_once_however_often_its_catalog_is_made(project, heap):
    invoke(project, "run")
    bootstrap_project(project)
    for _ in range(2):
        with KedroSession.create(project_path=project) as session:
            context = session.load_context()
            assert context.catalog is not context.catalog
            session.run()
    assert heap.names == 3 * ["Kedro Project Statistics"]
    assert heap.commands == ["kedro run", None, None]


def test_a_command_that_makes_two_sessions_is_reported_once(project, heap):
    cli = """\
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
    (project / "src" / "spaceships" / "cli.py").write_text(textwrap.dedent(cli))
    assert kedro_command("twice").returncode == 0
    assert heap.commands == ["kedro *****"]


def test_a_catalog_whose_context_nobody_saw_is_reported(heap):
    hook = KedroTelemetryHook()
    assert hook.__name__ == "kedro-telemetry"
    hook.after_catalog_created(Catalog())
    assert heap.names == ["Kedro Project Statistics"]
    assert "command" not in heap.events[0]["properties"]


def test_the_hooks_need_nothing_of_kedros_to_be_loaded_before(project, heap):
    code = """
    import kedro_telemetry
    class Catalog:
        def list(self):
            return ["a"]
    hook = kedro_telemetry.KedroTelemetryHook()
    hook.before_command_run(None, ["--version"])
    hook.after_command_run()
    hook.after_catalog_created(Catalog())
    """
    assert run(sys.executable, "-c", textwrap.dedent(code)).returncode == 0
    assert heap.names == ["CLI command", "Kedro Project Statistics"]


def test_what_runs_after_a_command_that_never_ended_is_not_that_command(heap):
    hook = KedroTelemetryHook()
    hook.before_command_run(None, ["info"])
    hook.before_command_run(None, ["--version"])
    hook.after_command_run()
    hook.after_command_run()
    assert heap.commands == ["kedro --version"]


@pytest.mark.parametrize(
    ("words", "is_sent"),
    [
        (["new", "--telemetry=no"], False),
        (["new", "--name=x", "-tc", "N", "--tools=none"], False),
        (["new", "--telemetry", "NO"], False),
        (["new", "--telemetry=yes"], True),
        (["new", "--name=no"], True),
        (["run", "--telemetry=no"], True),
    ],
)
def test_a_new_project_without_telemetry_is_a_no_from_its_first_command_on(heap, monkeypatch, capsys, words, is_sent):
    hook = KedroTelemetryHook()
    for debug in ("", "1"):
        monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", debug)
        hook.before_command_run(None, words)
        hook.after_command_run()
    assert len(heap.events) == is_sent
    assert ("because of --telemetry\n" in capsys.readouterr().err) is not is_sent


def test_tab_in_the_shell_sends_nothing(project, heap, monkeypatch):
    monkeypatch.setenv("_KEDRO_COMPLETE", "bash_complete")
    assert send_telemetry_event("x") is False
    assert heap.connections == []
    kedro_command(env={"COMP_WORDS": "kedro ru", "COMP_CWORD": "1"})
    assert (heap.connections, os.listdir(os.environ["HOME"])) == ([], [])


def test_the_hook_works_from_settings_beside_the_installed_plugin(project, heap):
    settings = "from kedro_telemetry import telemetry_hook\n\nHOOKS = (telemetry_hook,)\n"
    (project / "src" / "spaceships" / "settings.py").write_text(settings)
    assert kedro_command("run").returncode == 0
    assert heap.commands == ["kedro run"]


def vendor(project: Path) -> None:
    """Take README's steps for a copy of the module in a project."""
    steps = (HERE / "README.md").read_text().partition("Where it may not be installed")[2]
    assert "Copy `kedro_telemetry.py` into the package of your project" in steps
    code = textwrap.dedent(re.search(r"```python\n(.*?)```", steps, re.DOTALL)[1])
    shutil.copy(MODULE, project / "src" / "spaceships")
    (project / "src" / "spaceships" / "settings.py").write_text(code)


def test_a_vendored_copy_beside_the_installed_plugin_sends_one_event(project, heap):
    vendor(project)
    assert kedro_command("run").returncode == 0
    assert heap.commands == ["kedro run"]


def test_a_vendored_copy_without_the_distribution_sends_one_event(project, heap):
    vendor(project)
    # An environment without the distribution: its metadata is hidden, and what finds its module.
    program = """
    import importlib.metadata as metadata
    import sys

    real = metadata.Distribution.discover.__func__
    metadata.Distribution.discover = classmethod(
        lambda cls, **options: (d for d in real(cls, **options) if d.metadata["Name"] != "kedro-telemetry")
    )
    from kedro.framework.cli.cli import main

    sys.modules["kedro_telemetry"] = None
    sys.argv[0] = "kedro"
    main()
    """
    done = run(sys.executable, "-c", textwrap.dedent(program), "run", env={**os.environ, "COLUMNS": "1000"})
    assert done.returncode == 0, done.stderr
    assert heap.names == ["Kedro Project Statistics"]
    assert heap.commands == [None]


def test_a_terminal_that_is_gone_changes_no_exit_status(home, heap):
    command = f"{sys.executable} -m kedro --version | grep -q 'kedro, version'; exit ${{PIPESTATUS[0]}}"
    plain = run("bash", "-c", command, env={**os.environ, "DO_NOT_TRACK": "1"})
    assert run("bash", "-c", command).returncode == plain.returncode


class Trap:
    """An object that raises whatever is asked of it."""

    def __getattr__(self, name: str) -> None:
        raise RuntimeError(name)


class Unspeakable:
    """An argument that can't be told."""

    def __str__(self) -> str:
        raise RuntimeError


def test_no_hook_raises_whatever_kedro_hands_it(heap):
    hook = KedroTelemetryHook()
    hook.before_command_run(Trap(), ["info"])
    hook.before_command_run(None, None)
    hook.before_command_run(None, [Unspeakable()])
    hook.after_command_run()
    hook.after_context_created(Trap())
    hook.after_context_created(types.SimpleNamespace(project_path=5))
    hook.after_catalog_created(Trap())
    assert heap.events == []


def test_a_logging_handler_that_raises_is_not_kedros_business(monkeypatch, at_debug):
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(kedro_telemetry.logger, "filters", [fail])
    assert send_telemetry_event("x") is False


# send_telemetry_event ------------------------------------------------------------------------------------------------


def test_a_plugin_sends_an_event_of_its_own(project, heap):
    own = {"skill": "x", "n": 3, "f": 1.5, "ok": True, "path": Path("p"), "none": None, "inf": float("inf"), 5: "five"}
    assert send_telemetry_event("my_event", own, project) is True
    (event,) = heap.events
    assert event["event"] == "my_event"
    assert event["properties"].items() >= {"skill": "x", "n": 3, "f": 1.5, "ok": True, "path": "p", "5": "five"}.items()
    assert event["properties"]["inf"] == "inf"
    assert "none" not in event["properties"]
    assert {"username", "project_id"} <= set(event["properties"])
    (head,) = heap.requests
    assert f"\r\nUser-Agent: kedro-telemetry/{kedro_telemetry.__version__}\r\n" in f"{head}\r\n".replace(
        "agent", "Agent"
    )
    assert "\r\nContent-Type: application/json\r\n" in f"{head}\r\n".replace("type", "Type")


def test_a_callers_properties_cant_pass_for_base_ones(heap):
    base = "username project_id project_version telemetry_version python_version os is_ci_env tools example_pipeline"
    assert send_telemetry_event("x", dict.fromkeys(base.split(), "fake"))
    assert "fake" not in heap.events[0]["properties"].values()


@pytest.mark.parametrize("text", [1022 * "x" + "yz", 5000 * "é"])
def test_texts_over_heaps_limit_are_cut(heap, text):
    assert send_telemetry_event(text, {text: text, "list": [text]})
    (event,) = heap.events
    assert event["event"] == text[:1023]
    assert event["properties"][text[:1023]] == text[:1023]
    assert len(event["properties"]["list"]) == 1023


@pytest.mark.parametrize("arguments", [("x", 5), ("x", {"a": Trap()}), ("x", {}, 5), (Trap(),), ("x", {"a": 10**5000})])
def test_strange_arguments_never_raise(heap, arguments):
    assert send_telemetry_event(*arguments) in (True, False)


def test_an_event_that_cant_be_made_is_one_line_at_debug(at_debug, config):
    config.write_text("[telemetry]\nconsent = true\n")
    assert send_telemetry_event("x", 5) is False
    assert debug_lines(at_debug) == ["An event was lost: TypeError"]


def test_a_no_a_refusal_and_a_lost_event_are_false(serve, monkeypatch):
    heap = serve("503")
    assert send_telemetry_event("x") is False
    monkeypatch.setenv("DO_NOT_TRACK", "")
    assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1


# The releases that are there, in an environment that has them.
if importlib.util.find_spec("kedro_viz"):

    def test_kedro_viz_finds_app_id_and_identity_with_consent_and_nothing_without(project, config, monkeypatch):
        from kedro_viz.integrations.kedro import telemetry

        (project / ".telemetry").write_text("consent: true")
        assert telemetry.get_heap_app_id(project) == kedro_telemetry.APP_ID
        assert telemetry.get_heap_identity() in config.read_text()
        (project / ".telemetry").write_text("consent: false")
        assert not telemetry.get_heap_app_id(project)
        assert not telemetry.get_heap_identity()


if importlib.util.find_spec("kedro_skills"):

    def test_kedro_skills_delivers_its_own_event_and_the_commands(project, heap):
        done = kedro_command("skills", "install", "catalog-config", "--ide", "claude")
        assert done.returncode == 0, done.stdout + done.stderr
        own, command = heap.events
        assert (own["event"], own["properties"]["skill_id"]) == ("kedro_skills_install", "catalog-config")
        assert command["properties"]["command"] == "kedro skills install ***** --ide *****"
        assert own["identity"] == command["identity"]


# The one door --------------------------------------------------------------------------------------------------------


def test_in_debug_mode_events_are_printed_and_nothing_leaves_the_machine(project, heap, monkeypatch):
    plain = kedro_command("info", env={"DO_NOT_TRACK": "1"})
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    done = kedro_command("info")
    event = json.loads(done.stderr.removeprefix(plain.stderr))
    assert done.stderr == plain.stderr + json.dumps(event, indent=2) + "\n"
    assert screen(done)[:2] == screen(plain)[:2]
    assert event["properties"]["command"] == "kedro info"
    assert heap.connections == []
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "")
    kedro_command("info")
    assert {**heap.events[0], "timestamp": ""} == {**event, "timestamp": ""}


def test_in_debug_mode_a_back_off_neither_holds_back_nor_starts(config, heap, monkeypatch, capsys):
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    (config.parent / "telemetry.backoff").write_text(str(time.time()))
    assert send_telemetry_event("x") is False
    assert json.loads(capsys.readouterr().err)["event"] == "x"


def test_what_is_printed_in_debug_mode_is_the_body_indented(project, heap, monkeypatch, capsys):
    assert send_telemetry_event("x", {"a": 1}, project)
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "yes")
    capsys.readouterr()
    assert send_telemetry_event("x", {"a": 1}, project) is False
    out, err = capsys.readouterr()
    assert out == ""
    assert err == json.dumps({**heap.events[0], "timestamp": json.loads(err)["timestamp"]}, indent=2) + "\n"


@pytest.mark.parametrize("name", ["DO_NOT_TRACK", "GITHUB_REPOSITORY_OWNER", "file"])
def test_in_debug_mode_a_no_is_one_line_that_says_by_what(project, home, heap, monkeypatch, capsys, name):
    if name == "file":
        (project / ".telemetry").write_text("\nconsent: perhaps")
        name = f"{project / '.telemetry'}, line 2"
        monkeypatch.chdir(home)
    else:
        monkeypatch.setenv(name, "kedro-org")
    monkeypatch.setenv("KEDRO_TELEMETRY_DEBUG", "1")
    assert send_telemetry_event("x", {}, project) is False
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"kedro-telemetry sends nothing, because of .*{name}\n", err)
    assert heap.connections == []


# Consent -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["1", "0", "", "false"])
@pytest.mark.parametrize("name", ["DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY"])
def test_a_variable_that_is_set_is_a_no_whatever_it_holds(project, monkeypatch, name, value):
    (project / ".telemetry").write_text("consent: true")
    assert _check_for_telemetry_consent(project) is True
    monkeypatch.setenv(name, value)
    assert _check_for_telemetry_consent(project) is False


@pytest.mark.parametrize(("owner", "consent"), [("kedro-org", False), ("somebody", None), ("", None)])
def test_ci_of_the_kedro_organisation_is_a_no(monkeypatch, owner, consent):
    monkeypatch.setenv("GITHUB_REPOSITORY_OWNER", owner)
    assert _check_for_telemetry_consent(None) is consent


NOES = ["false", "False", "FALSE", "no", "No", "off", "n", "0", "'false'", '"no"', "fAlSe"]
YESES = ["true", "True", "TRUE", "yes", "YES", "on", "y", "1", "'true'", '"yes"']


@pytest.mark.parametrize(
    "shape",
    [
        *("consent: {}", "consent:{}", "consent={}", "consent = {}", "consent : {}", "Consent: {}", "CONSENT={}"),
        *(
            '"consent": {}',
            "'Consent': {}",
            "  consent: {}",
            "\ufeffconsent: {}\n",
            "{{consent: {}}}",
            "{{ 'consent': {} }}",
        ),
        *("# a comment\n\nconsent: {}\r\n", "consent: {} # why\r\n", "name: x\nconsent: {}\nurl: http://a.b/c#d\n"),
        *("name=x\nconsent={}\n", "--- \nconsent: {}\n", 'note: "a # b"\nconsent: {}', "{{name: x, consent: {}}} # c"),
        *("consent: {}\rname: x y z\r", "nothing:\nconsent: {}", "consent: {}\nconsent: {}"),
    ],
)
def test_what_people_write_is_understood(project, shape):
    for answer, words in ((False, NOES), (True, YESES)):
        for word in words:
            (project / ".telemetry").write_bytes(
                shape.replace("{}", word).replace("{{", "{").replace("}}", "}").encode()
            )
            assert kedro_telemetry._find_consent(project)[::2] == (answer, False), shape.format(word)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# consent: false",
        "name: x",
        "---",
        "{}",
        "{name: x}",
        "note: my consent",
        "consent_date: 2026",
        "- a",
    ],
)
def test_a_file_that_does_not_mention_consent_says_nothing(project, text):
    (project / ".telemetry").write_text(text)
    assert _check_for_telemetry_consent(project) is None


UNCLEAR = [
    *("consent:", "consent", "consent: maybe", "consent: null", "consent: 2", "consent: 'true", "consent: !!bool true"),
    *("parent:\n  consent: true", "consent: true\n  false", "note: |\n  consent: true", "x: &a true\nconsent: *a"),
    *("consent: true\nconsent: perhaps", "? consent\n: true", "- consent: true", "consent: true\n---\na: 1"),
    *(
        "note: 'a\nconsent: true\n'",
        "consent:\ttrue",
        "\tconsent: true",
        "consent: true\nname",
        "consent: true\n name: x",
    ),
    *("consent: true\nname=x", "consent: true\nurl:x", "{consent: true", "[consent, true]", '"con\\x73ent": false'),
    *("noconsent:yes", "{a: b, noconsent:yes}"),
    *(
        "{name: x, {consent: false}}",
        "{consent: false x, Consent: true}",
        "{'a':consent}",
        "telemetry:consent=maybe\nb: c",
        'consent: true"',
        '{a: x"y, consent: true"}',
        "consent: '\"true\"'",
        "{consent: true # }",
        "# x\x07\nconsent: true",
        "\0c\0o\0n\0s\0e\0n\0t\0:\0y\0e\0s",
        f"{1025 * 'k'}: 1\nconsent: true",
        '? "con\\\n  sent"\n: false',
        "consent: true\n# c\u2028consent: maybe",
        "consent: true #\x00",
        "consent: true\na: b: c",
        "x: consent: no",
    ),
    *(
        "consent: true\nc: [1\n",
        "consent:\n  false",
        "<<: {consent: false}",
        "consent: true#x",
        "note: 'x' consent: no",
    ),
]


@pytest.mark.parametrize("text", UNCLEAR)
def test_a_file_that_mentions_consent_in_any_other_way_is_a_no(project, text):
    (project / ".telemetry").write_text(text)
    answer, _, is_unclear = kedro_telemetry._find_consent(project)
    assert (answer, is_unclear) == (False, True)


def test_many_generated_files_mean_to_us_what_they_mean_to_yaml(project):
    import yaml

    keys = ("consent", '"consent"', "'consent'", "Consent", "consent ", "con sent", "a.consent", "? consent")
    values = (*NOES, *YESES, "null", "", "|", ">", "[no]", "{a: no}", "&a no", "!!bool no", "2", "no # x", "no#", "~")
    extras = (
        "",
        "a: 1\n",
        "# consent: true\n",
        "a: 'x\n",
        "---\n",
        "a:\n  b: 1\n",
        "- 1\n",
        "{\n",
        "a: b: c\n",
        "  \n",
    )
    ours_alone = re.compile(r"(?i)\bconsent['\"]? *: *['\"]?(true|yes|on|y|1)\b")  # more kinds of yes than YAML's
    for key, start, value, before, after in itertools.product(keys, (": ", ":"), values, extras, extras[:6]):
        text = f"{before}{key}{start}{value}\n{after}"
        try:
            data = yaml.safe_load(text)
            said = data.get("consent") if isinstance(data, dict) else None
        except yaml.YAMLError:
            said = None
        ours = kedro_telemetry._parse_consent(text)[0]
        if said is False:
            assert ours is False, text
        if ours is True and said is not True:
            assert ours_alone.search(text), text


def test_an_endless_line_does_not_hang(project):
    for line in (
        "a: x" + 50_000 * " " + ": ",
        "a:" + 50_000 * " " + ":",
        "a" + 50_000 * " " + "b",
        25_000 * "a ",
        "consent: " + 50_000 * "a:",
        "{" + 50_000 * "a,",
        '"' * 50_000,
    ):
        start = time.process_time()
        kedro_telemetry._parse_consent(line)
        assert time.process_time() - start < 5


KINDS = [
    "directory",
    "pipe",
    "link",
    "latin",
    "utf-16",
    "huge",
    *["forbidden"] * (os.getuid() != 0),
]  # root may read all


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cant_be_read_is_a_no_and_kedro_runs_on(project, heap, kind, capfd):
    path = project / ".telemetry"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(project / "nowhere")
    elif kind == "latin":
        path.write_bytes(b"\nconsent: true\n\xe9\n")
    elif kind == "utf-16":
        path.write_text("consent: true", encoding="utf-16")
    elif kind == "huge":
        path.write_bytes(2**21 * b"#")
    else:
        path.write_text("consent: true")
        path.chmod(0)
    assert invoke(project, "info").exit_code == 0
    assert (heap.connections, os.listdir(os.environ["HOME"])) == ([], [])
    answer, source, is_unclear = kedro_telemetry._find_consent(project)
    assert (answer, is_unclear) == (False, True)
    assert source == f"{path}{', line 3' if kind == 'latin' else ', line 1' if kind == 'utf-16' else ''}"


def test_an_unclear_no_is_one_warning_that_tells_the_file_and_the_line(project, heap):
    (project / ".telemetry").write_text("# what I think\nconsent: perhaps\n")
    done = kedro_command("run")
    lines = [line for line in done.stdout.splitlines() if "elemetry" in line and "logging" not in line]
    assert len(lines) == 1, done.stdout
    assert re.search(rf"WARNING +Telemetry stays off: .*{project}/.telemetry, line 2", lines[0])
    assert (done.returncode, heap.connections) == (0, [])


def test_the_warning_is_no_markup_that_a_path_could_break(project, heap, caplog):
    (project / ".telemetry").write_text("consent: perhaps\n")
    assert send_telemetry_event("x", {}, project) is False
    (record,) = caplog.records
    told = f"Telemetry stays off: no plain yes or no in {project / '.telemetry'}, line 1"
    assert (record.getMessage(), record.levelname, record.markup) == (told, "WARNING", False)


@pytest.mark.parametrize("where", ["file", "settings", "variable", "command"])
def test_a_plain_no_is_silent(project, heap, monkeypatch, capfd, caplog, where):
    command = ["info"]
    if where == "file":
        (project / ".telemetry").write_text("consent: false\n")
    elif where == "settings":
        (project / "src" / "spaceships" / "settings.py").write_text(SWITCH)
    elif where == "variable":
        monkeypatch.setenv("DO_NOT_TRACK", "1")
    else:
        command = ["new", "--telemetry=no", "--help"]
    is_unknown = where == "command" and KEDRO < (0, 19)
    assert invoke(project, *command).exit_code == (2 if is_unknown else 0)
    assert (heap.connections, debug_lines(caplog)) == ([], [])


def test_the_consent_of_a_project_counts_wherever_its_events_come_from(project, home, heap, monkeypatch):
    (project / ".telemetry").write_text("\n\nconsent: true\n")
    (home / ".telemetry").write_text("consent: false\n")
    monkeypatch.chdir(home)
    assert send_telemetry_event("x", {}, project) is True
    assert kedro_telemetry._find_consent(project) == (True, f"{project / '.telemetry'}, line 3", False)
    assert send_telemetry_event("x") is False


def test_outside_of_projects_the_file_in_the_current_directory_counts(home, project, monkeypatch):
    (project / ".telemetry").write_text("consent: false")
    assert _check_for_telemetry_consent(None) is False
    monkeypatch.chdir(home)
    assert _check_for_telemetry_consent(None) is None
    (home / ".telemetry").write_text("consent: false")
    assert _check_for_telemetry_consent(project) is False
    (project / ".telemetry").unlink()
    assert _check_for_telemetry_consent(project) is None


def test_a_current_directory_that_is_gone_says_nothing(home, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert _check_for_telemetry_consent(None) is None
    assert main([]) == 0


@pytest.mark.parametrize(
    ("user", "file", "consent"),
    [
        ("false", "true", False),
        ("true", "false", False),
        ("true", None, True),
        (None, "true", True),
        ("true", "perhaps", False),
        (None, None, None),
        ("1", None, False),
        ("'true'", "true", False),
    ],
)
def test_any_no_outweighs_any_yes(project, config, user, file, consent):
    if user:
        config.write_text(f"# mine\n[telemetry]\nconsent = {user}\n")
    if file:
        (project / ".telemetry").write_text(f"consent: {file}")
    assert _check_for_telemetry_consent(project) is consent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[telemetry]\nuuid = 'x' # consent\n", (None, "nothing said", False)),
        ("[other]\nconsent = false\n", (None, "nothing said", False)),
        ("telemetry = 'consent'\n", (None, "nothing said", False)),
        ("# no consent\n[telemetry]\nconsent: false\n", (False, "line 3", True)),
        ("[telemetry]\nconsent = false\n", (False, "line 2", False)),
        ("telemetry = {note = '#1', consent = false}", (False, "line 1", False)),
        ('[telemetry]\n"con\\u0073ent" = false', (False, "line 2", False)),
        ('\n[telemetry]\n"con\\U00000073ent" = false', (False, "line 3", False)),
        ("\0c\0o\0n\0s\0e\0n\0t\0=\0n\0o", (False, "line 1", True)),
        ("[telemetry]\nconsent = true\n", (True, "line 2", False)),
        ("broken [", (None, "nothing said", False)),
    ],
)
def test_the_users_file_is_read_with_care(config, text, expected):
    config.write_text(text)
    answer, source, is_unclear = kedro_telemetry._find_consent(None)
    assert (answer, source.rpartition(", ")[2], is_unclear) == expected
    assert source == "nothing said" or source.startswith(str(config))


def test_a_users_file_that_cant_be_read_may_hold_a_no(config):
    config.write_bytes(b"[telemetry]\nconsent = false\n" + 2**20 * b"#")
    assert kedro_telemetry._user_consent() == (False, str(config), True)
    config.unlink()
    config.symlink_to("a disk that is not there")
    assert kedro_telemetry._user_consent() == (False, str(config), True)


SWITCH = 'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n'


@pytest.mark.parametrize("words", [["--version"], ["run"]])
def test_kedros_own_switch_is_a_no_for_commands_too(project, heap, words):
    (project / "src" / "spaceships" / "settings.py").write_text(SWITCH)
    assert kedro_command(*words).returncode == 0
    assert (heap.connections, os.listdir(os.environ["HOME"])) == ([], [])


@pytest.mark.parametrize(
    ("settings", "consent"),
    [(SWITCH, False), (SWITCH.replace("kedro-telemetry", "kedro-mlflow"), None), ("from .shared import *\n", False)],
)
def test_the_settings_that_kedro_has_loaded_are_asked(project, settings, consent):
    (project / "src" / "spaceships" / "shared.py").write_text(SWITCH)
    (project / "src" / "spaceships" / "settings.py").write_text(settings)
    assert _check_for_telemetry_consent(project) is None
    bootstrap_project(project)
    assert _check_for_telemetry_consent(project) is consent


def test_settings_that_kedro_could_not_import_may_hold_a_no(project, heap):
    (project / "src" / "spaceships" / "settings.py").write_text(SWITCH + "import nonsense\n")
    invoke(project, "info")
    assert heap.connections == []
    (project / "src" / "spaceships" / "settings.py").unlink()
    invoke(project, "info")
    assert heap.commands == ["kedro info"]


def test_settings_that_cant_be_read_are_a_no(project, monkeypatch):
    bootstrap_project(project)
    monkeypatch.setattr("kedro.framework.project.settings", None)
    assert _check_for_telemetry_consent(project) is False


def test_a_consent_that_is_withdrawn_counts_at_the_next_event(project, heap):
    assert send_telemetry_event("x", {}, project) is True
    (project / ".telemetry").write_text("consent: false")
    assert send_telemetry_event("x", {}, project) is False
    assert len(heap.events) == 1


def test_patching_the_consent_that_other_packages_import_steers_the_hooks(project, heap, monkeypatch):
    monkeypatch.setattr("kedro_telemetry.plugin._check_for_telemetry_consent", lambda path: False)
    invoke(project, "run")
    assert (heap.connections, os.listdir(os.environ["HOME"])) == ([], [])


@pytest.mark.parametrize(("file", "notices"), [(None, 1), ("consent: true", 0)])
def test_a_notice_goes_before_an_event_while_nobody_has_said_anything(project, heap, file, notices):
    if file:
        (project / ".telemetry").write_text(file)
    done = kedro_command("info")
    assert len(re.findall(r"INFO +" + re.escape(kedro_telemetry.NOTICE), done.stdout)) == notices, done.stdout
    assert len(heap.events) == 1
    for what in ("DO_NOT_TRACK", "consent: false", "python -m kedro_telemetry disable", "https://docs.kedro.org"):
        assert what in kedro_telemetry.NOTICE


WITNESS = """\
import os, sys
seen = []
def is_ours(frame):
    return frame is not None and (frame.f_code.co_filename.endswith("kedro_telemetry.py") or is_ours(frame.f_back))
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("import", "os.mkdir", "os.rename", "os.chmod") or event.startswith("socket."):
        if is_ours(sys._getframe(1)) and "__pycache__" not in str(arguments):
            seen.append((event, str(arguments[0])))
sys.addaudithook(watch)
from kedro.framework.cli.cli import main
sys.argv[0] = "kedro"
try:
    main()
finally:
    print("SEEN", seen)
"""


@pytest.mark.parametrize(
    "no",
    [
        "nobody",
        "DO_NOT_TRACK",
        "KEDRO_DISABLE_TELEMETRY",
        "GITHUB_REPOSITORY_OWNER",
        "user",
        "settings",
        "file",
        "unclear",
    ],
)
def test_after_a_no_there_is_no_socket_no_written_file_and_no_network_module(project, config, heap, monkeypatch, no):
    if no == "settings":
        (project / "src" / "spaceships" / "settings.py").write_text(SWITCH)
    elif no == "user":
        config.write_text("[telemetry]\nconsent = false\n")
    elif no in ("file", "unclear"):
        (project / ".telemetry").write_text("consent: false" if no == "file" else "consent: perhaps")
    elif no != "nobody":
        monkeypatch.setenv(no, "kedro-org")
    done = run(sys.executable, "-c", WITNESS, "--version")
    assert done.returncode == 0, done.stderr
    seen = eval(done.stdout.partition("SEEN ")[2])
    network = {("import", "ssl"), ("import", "http.client"), ("import", "urllib.request")} & set(seen)
    others = {event for event, _ in seen} - {"import"}
    if no == "nobody":
        assert ("import", "urllib.request") in network or KEDRO < (0, 19)  # which has imported it itself
        assert {"open", "os.rename", "socket.connect"} <= others
    else:
        assert (network, others) == (set(), set())


# Identity ------------------------------------------------------------------------------------------------------------


def test_the_first_event_makes_an_identity_and_the_next_ones_keep_it(home, heap):
    assert [send_telemetry_event(name) for name in "ab"] == [True, True]
    first, second = heap.events
    content = (home / "config" / "kedro" / "telemetry.toml").read_text()
    assert content == f'[telemetry]\nuuid = "{first["identity"]}"\n'
    assert first["identity"] == second["identity"] == first["properties"]["username"]
    assert os.listdir(home / "config" / "kedro") == ["telemetry.toml"]


UUID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("text", [UUID, UUID.upper(), str(uuid.UUID(UUID))])
def test_an_identity_that_is_there_stays(config, text):
    config.write_text(f'[telemetry]\nuuid = "{text}"\n')
    assert kedro_telemetry._get_or_create_uuid() == UUID
    assert text in config.read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", '[telemetry]\nuuid = "NEW"\n'),
        ("a = 1", 'a = 1\n\n[telemetry]\nuuid = "NEW"\n'),
        ("a = 1 # c\r\n", 'a = 1 # c\r\n\r\n[telemetry]\r\nuuid = "NEW"\r\n'),
        ("[telemetry] # mine\nb = 2\n", '[telemetry] # mine\nuuid = "NEW"\nb = 2\n'),
        ("[telemetry]", '[telemetry]\nuuid = "NEW"\n'),
        ('[telemetry]\nuuid = "bad" # c\nb = nan\n', '[telemetry]\nuuid = "NEW" # c\nb = nan\n'),
        ("[telemetry]\nuuid = 5\n", '[telemetry]\nuuid = "NEW"\n'),
        ("[telemetry]\nuuid = ['x']\n", '[telemetry]\nuuid = "NEW"\n'),
        ("[telemetry]\nuuid = {a = 1}\n", '[telemetry]\nuuid = "NEW"\n'),
        ("telemetry = {uuid = 'bad', b = 2}\n", 'telemetry = {uuid = "NEW", b = 2}\n'),
        (
            "x = '''\n[telemetry]\n'''\n[telemetry]\nb = 2",
            "x = '''\n[telemetry]\n'''\n[telemetry]\nuuid = \"NEW\"\nb = 2",
        ),
        ("uuid = 'other'\n[ 'telemetry' ]\n", "uuid = 'other'\n[ 'telemetry' ]\nuuid = \"NEW\"\n"),
        ("telemetry = {b = 2}\n", 'telemetry = {uuid = "NEW", b = 2}\n'),
        ("telemetry = { }\n", 'telemetry = { uuid = "NEW"}\n'),
        ("[telemetry]\nuuid = '''a'''\n", '[telemetry]\nuuid = "NEW"\n'),
        ('[telemetry]\nuuid = """a\nb"""\n', '[telemetry]\nuuid = "NEW"\n'),
        ('[telemetry]\nuuid = "a\\"b"\n', '[telemetry]\nuuid = "NEW"\n'),
        ("[telemetry]\nuuid = [\n1]\n", '[telemetry]\nuuid = "NEW"\n'),
        ("no TOML", '[telemetry]\nuuid = "NEW"\n'),
        ("not toml [", '[telemetry]\nuuid = "NEW"\n'),
        ("\udcff", '[telemetry]\nuuid = "NEW"\n'),
    ],
)
def test_what_else_the_users_file_holds_survives_a_new_identity(config, before, after):
    config.write_bytes(before.encode("utf-8", "surrogateescape"))
    made = kedro_telemetry._get_or_create_uuid()
    assert uuid.UUID(made).hex == made
    assert config.read_bytes().decode() == after.replace("NEW", made)
    assert kedro_telemetry._get_or_create_uuid() == made


@pytest.mark.parametrize(
    "text",
    ["telemetry = 5", "[[telemetry]]\na = 1\n", f"[telemetry]\nx = 0x{4000 * 'f'}\n", "telemetry.x = 1\n"],
)
def test_a_users_file_with_no_room_for_an_identity_is_not_touched(config, heap, text, capsys):
    config.write_text(text)
    assert send_telemetry_event("x") is True
    assert heap.events[0]["identity"] == "missing_user_identity"
    assert main(["disable"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert config.read_text() == text


def under_a_file(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "file"))


def a_directory(home, monkeypatch):
    (home / "config" / "kedro" / "telemetry.toml").mkdir(parents=True)


def a_pipe(home, monkeypatch):
    (home / "config" / "kedro").mkdir(parents=True)
    os.mkfifo(home / "config" / "kedro" / "telemetry.toml")


def no_home(home, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


@pytest.mark.parametrize("spoil", [under_a_file, a_directory, a_pipe, no_home])
def test_where_no_identity_can_be_kept_the_event_still_goes(home, heap, monkeypatch, spoil):
    spoil(home, monkeypatch)
    assert send_telemetry_event("x") is True
    (event,) = heap.events
    assert (event["identity"], event["properties"]["username"]) == ("missing_user_identity", "")
    assert not (Path.cwd() / "~").exists()


def test_the_configuration_folder_is_where_the_platform_has_it(home, monkeypatch):
    folder = kedro_telemetry._user_file("x").parent
    assert folder == home / "config" / "kedro"
    for value in ("", "."):  # no absolute path is none, as the specification says
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert kedro_telemetry._user_file("x").parent == home / ".config" / "kedro"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kedro_telemetry._user_file("x").parent == home / "Library" / "Application Support" / "kedro"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(home / "local"))
    assert kedro_telemetry._user_file("x").parent == home / "local" / "kedro" / "kedro"
    monkeypatch.delenv("LOCALAPPDATA")
    with pytest.raises(OSError, match="no home folder"):
        kedro_telemetry._user_file("x").mkdir(parents=True)


def test_after_a_no_other_packages_find_no_identity_and_make_none(home, config, monkeypatch):
    config.write_text(f'[telemetry]\nuuid = "{UUID}"\n')
    assert kedro_telemetry._get_or_create_uuid() == UUID
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    assert kedro_telemetry._get_or_create_uuid() == ""
    config.unlink()
    assert kedro_telemetry._get_or_create_uuid() == ""
    assert not config.exists()


def test_the_no_of_a_project_is_one_for_its_folders(project, config, monkeypatch, capsys):
    (project / ".telemetry").write_text("consent: false\n")
    monkeypatch.chdir(project / "conf")
    assert kedro_telemetry._get_or_create_uuid() == ""
    assert main([]) == 0
    assert f"Telemetry:  off here: {project / '.telemetry'}, line 1\n" in capsys.readouterr().out
    assert not config.exists()


def test_many_first_commands_at_once_agree_on_one_identity_and_one_project(project, home):
    pyproject = project / "pyproject.toml"
    before = pyproject.read_text().partition("\n[tool.kedro_telemetry]")[0]
    pyproject.write_text(before)
    code = """
    import pathlib, sys, time, kedro_telemetry
    time.sleep(float(sys.argv[1]) - time.time())
    event = kedro_telemetry._make_event("x", {}, pathlib.Path())
    print(event["identity"], event["properties"]["project_id"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(time.time() + 3)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(24)]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1, said
    identity, hashed = said.pop().split()
    made = re.fullmatch(
        re.escape(before) + r'\n\[tool.kedro_telemetry\]\nproject_id = "([0-9a-f]{32})"\n', pyproject.read_text()
    )[1]
    assert hashed == hashlib.sha512(f"{made}undefined_package_name".encode()).hexdigest()
    assert identity in (home / "config" / "kedro" / "telemetry.toml").read_text()
    assert (os.listdir(home / "config" / "kedro"), sorted(os.listdir(project))) == (
        ["telemetry.toml"],
        ["conf", "pyproject.toml", "src"],
    )


# The project's id ----------------------------------------------------------------------------------------------------

START = "[tool.kedro]\npackage_name = 'spaceships'\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (START, START + '\n[tool.kedro_telemetry]\nproject_id = "NEW"\n'),
        (START.rstrip(), START + '\n[tool.kedro_telemetry]\nproject_id = "NEW"\n'),
        (START.replace("\n", "\r\n"), (START + '\n[tool.kedro_telemetry]\nproject_id = "NEW"\n').replace("\n", "\r\n")),
        ("[tool.kedro_telemetry]\n\r\n" + START, '[tool.kedro_telemetry]\nproject_id = "NEW"\r\n\r\n' + START),
        ("[tool.kedro_telemetry]\nx = 1\n" + START, '[tool.kedro_telemetry]\nproject_id = "NEW"\nx = 1\n' + START),
        (
            START + "[ tool . 'kedro_telemetry' ] # c",
            START + "[ tool . 'kedro_telemetry' ] # c\nproject_id = \"NEW\"\n",
        ),
        (
            START + "y = '''\n[tool.kedro_telemetry]\n'''",
            START + "y = '''\n[tool.kedro_telemetry]\n'''" + '\n\n[tool.kedro_telemetry]\nproject_id = "NEW"\n',
        ),
        (
            START + "[tool.kedro_telemetry.x]\ny = 1\n",
            START + '[tool.kedro_telemetry.x]\ny = 1\n\n[tool.kedro_telemetry]\nproject_id = "NEW"\n',
        ),
        (
            START + "[x]\na = nan\nb = 1979-05-27\n",
            START + '[x]\na = nan\nb = 1979-05-27\n\n[tool.kedro_telemetry]\nproject_id = "NEW"\n',
        ),
        (
            START + "[x]\nproject_id = 'other'\n",
            START + "[x]\nproject_id = 'other'\n" + '\n[tool.kedro_telemetry]\nproject_id = "NEW"\n',
        ),
    ],
)
def test_a_new_project_id_changes_no_other_byte(project, before, after):
    path = project / "pyproject.toml"
    path.write_bytes(before.encode())
    hashed = kedro_telemetry._get_project_properties("", project)["project_id"]
    made = re.search(rb"[0-9a-f]{32}", path.read_bytes())[0].decode()
    assert path.read_bytes().decode() == after.replace("NEW", made)
    assert hashed == hashlib.sha512(f"{made}undefined_package_name".encode()).hexdigest()
    assert kedro_telemetry._get_project_properties("", project)["project_id"] == hashed


@pytest.mark.parametrize(
    "text",
    [
        START + "[tool.kedro_telemetry]\nproject_id = 'mine'\n",
        START + "[tool.kedro_telemetry]\nproject_id = ''\n",
        START + "[tool.kedro_telemetry]\nproject_id = 5\n",
        "[tool.other]\n",
        "[tool]\nkedro = 5\n",
        "no TOML",
        START + "[tool]\nkedro_telemetry = 5\n",
        "[tool]\nkedro_telemetry = 1 # no project_id = here\n[tool.kedro]\nx = 1\n",
        "tool = {kedro = {package_name = 'x'}}\n",
        "[tool]\nkedro_telemetry.x = 1\n[tool.kedro]\na = 1\n",
        "\udcff",
    ],
)
def test_a_file_that_has_an_id_or_no_room_for_one_is_not_touched(project, text):
    path = project / "pyproject.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = path.stat()
    properties = kedro_telemetry._get_project_properties("", project)
    assert path.read_bytes() == text.encode("utf-8", "surrogateescape")
    assert path.stat().st_ino == before.st_ino
    assert ("project_id" in properties) == ("\nproject_id" in text)


def test_the_users_file_keeps_its_mode_its_owner_and_its_links(project, tmp_path):
    real, path = tmp_path / "real.toml", project / "pyproject.toml"
    path.unlink()
    real.write_text(START)
    path.symlink_to(real)
    real.chmod(0o640)
    if os.getuid() == 0:
        os.chown(real, 1234, 4321)
    before = real.stat()
    assert "project_id" in kedro_telemetry._get_project_properties("", project)
    after = real.stat()
    assert path.is_symlink()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


@pytest.mark.parametrize("kind", ["read-only", "another name"])
def test_a_file_that_may_not_be_replaced_stays_as_it_is_without_a_word(project, tmp_path, heap, caplog, kind):
    path = project / "pyproject.toml"
    path.write_text(START)
    if kind == "read-only":
        path.chmod(0o444)
    else:
        os.link(path, tmp_path / "link")
    (project / ".telemetry").write_text("consent: true")
    assert send_telemetry_event("x", {}, project) is True
    assert "project_id" not in heap.events[0]["properties"]
    assert (path.read_text(), debug_lines(caplog)) == (START, [])


def test_a_full_disk_leaves_the_old_file_whole(project, config):
    pyproject = project / "pyproject.toml"
    pyproject.write_text(START + 4000 * "# a comment\n")
    config.write_text("# mine\n" + 4000 * "# a comment\n")
    before = pyproject.read_bytes(), config.read_bytes()
    code = """
    import pathlib, resource, kedro_telemetry
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    print(kedro_telemetry._make_event("x", {}, pathlib.Path())["identity"])
    """
    done = run(sys.executable, "-c", textwrap.dedent(code))
    assert done.stdout == "missing_user_identity\n", done.stderr
    assert (pyproject.read_bytes(), config.read_bytes()) == before
    assert (os.listdir(config.parent), sorted(os.listdir(project))) == (
        ["telemetry.toml"],
        ["conf", "pyproject.toml", "src"],
    )


def test_a_lock_that_somebody_holds_for_ever_is_waited_for_in_vain_but_not_for_ever(config, monkeypatch):
    import fcntl

    monkeypatch.setattr(kedro_telemetry, "LOCK_PATIENCE", 0.05)
    handle = os.open(config.parent, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert kedro_telemetry._get_or_create_uuid() in config.read_text()
    os.close(handle)


def test_an_identity_that_another_process_has_made_meanwhile_is_taken(config, monkeypatch):
    @contextlib.contextmanager
    def lock_after_another(folder: Path):
        config.write_text(f'[telemetry]\nuuid = "{UUID}"\n')
        yield

    monkeypatch.setattr(kedro_telemetry, "_locked", lock_after_another)
    assert kedro_telemetry._get_or_create_uuid() == UUID


@pytest.mark.parametrize("where", ["no fcntl", "no locks in the file system"])
def test_without_locks_there_is_an_identity_all_the_same(config, monkeypatch, where):
    if where == "no fcntl":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:

        def refuse(*_: int) -> None:
            raise OSError("no locks")

        monkeypatch.setattr("fcntl.flock", refuse)
    assert kedro_telemetry._get_or_create_uuid() in config.read_text()


# Properties ----------------------------------------------------------------------------------------------------------


def test_the_properties_that_other_packages_ask_for_are_json(project):
    (project / "pyproject.toml").write_text(START + "tools = 'a'\nexample_pipeline = 'b'\n")
    properties = json.loads(json.dumps(kedro_telemetry._get_project_properties(UUID, project)))
    names = "username project_version telemetry_version python_version os is_ci_env tools example_pipeline project_id"
    assert list(properties) == names.split()
    assert properties["username"] == UUID
    assert "project_id" not in kedro_telemetry._get_project_properties(UUID, None)


def test_the_project_id_is_of_the_package_that_runs(project, capsys):
    hashed = {
        name: hashlib.sha512(f"{32 * 'a'}{name}".encode()).hexdigest()
        for name in ("spaceships", "undefined_package_name")
    }
    assert kedro_telemetry._get_project_properties(UUID, project)["project_id"] == hashed["undefined_package_name"]
    assert main([]) == 0
    assert preview(capsys.readouterr().out)["properties"]["project_id"] == hashed["spaceships"]
    bootstrap_project(project)
    assert kedro_telemetry._get_project_properties(UUID, project)["project_id"] == hashed["spaceships"]


def test_asking_for_a_preview_makes_no_identity_and_no_project_id(project, config):
    (project / "pyproject.toml").write_text(START)
    event = kedro_telemetry._make_event("x", {}, project, create=False)
    assert event["identity"] == event["properties"]["project_id"] == "(made with the first event)"
    assert "tools" not in event["properties"]
    assert ((project / "pyproject.toml").read_text(), config.exists()) == (START, False)


def test_after_a_no_asking_for_properties_makes_no_project_id(project, monkeypatch):
    (project / "pyproject.toml").write_text(START)
    (project / ".telemetry").write_text("consent: false")
    monkeypatch.chdir(project / "conf")
    assert "project_id" not in kedro_telemetry._get_project_properties(UUID, project)
    assert (project / "pyproject.toml").read_text() == START


@pytest.mark.parametrize(
    ("variable", "value", "is_ci"),
    [("CI", "true", True), ("CI", "1", False), ("CI", "", False), ("BUILDKITE", "", False)]
    + [(name, "x", True) for name in kedro_telemetry.CI_VARIABLES.split()],
)
def test_ci_is_told_by_its_variables(monkeypatch, variable, value, is_ci):
    monkeypatch.setenv(variable, value)
    assert kedro_telemetry._get_project_properties("", None)["is_ci_env"] is is_ci


def test_the_application_at_heap_can_be_another(heap, monkeypatch):
    monkeypatch.setenv("HEAP_APPID_DEV", "5")
    assert kedro_telemetry._get_heap_app_id() == "5"
    assert send_telemetry_event("x")
    assert heap.events[0]["app_id"] == "5"
    monkeypatch.delenv("HEAP_APPID_DEV")
    assert kedro_telemetry._get_heap_app_id() == "2388822444"


def test_an_event_tells_its_time_in_utc(heap, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    monkeypatch.setattr(time, "time", lambda: 1795448331.040025)
    assert send_telemetry_event("x")
    monkeypatch.delenv("TZ")
    time.tzset()
    assert re.fullmatch(r"2026-11-23T15:38:51\.04002\dZ", heap.events[0]["timestamp"])


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("\"['Linting', 'Testing']\"", "Linting, Testing"),
        ("['Linting', 'Testing']", "Linting, Testing"),
        ("'Linting'", "Linting"),
        ("\" ('a', 1)\"", "a, 1"),
        ("'[oops'", "oops"),
        ('"[]"', None),
        ("'Kedro Viz,PySpark'", "Kedro Viz, PySpark"),
        ("5", "5"),
        ("[]", None),
        ("''", None),
        ("false", None),
    ],
)
def test_tools_are_sent_as_a_list_of_names(project, written, sent):
    (project / "pyproject.toml").write_text(START + f"tools = {written}\nexample_pipeline = true\n")
    properties = kedro_telemetry._get_project_properties("", project)
    assert (properties.get("tools"), properties["example_pipeline"]) == (sent, True)


@pytest.mark.skipif(KEDRO < (1, 6), reason="validators came with Kedro 1.6")
def test_validators_are_counted_by_public_library(project, heap):
    catalog = "v{}: {{type: kedro.io.MemoryDataset, validator: {}}}\n"
    paths = ("pandera.api.A", "pandera.B", "spaceships.C")
    text = CATALOG + "".join(catalog.format(i, path) for i, path in enumerate(paths))
    (project / "conf" / "base" / "catalog.yml").write_text(text)
    session_run(project)
    names = {name: value for name, value in heap.events[0]["properties"].items() if "valid" in name}
    assert names == {
        "number_of_validated_datasets": 3,
        "validator_type_count.pandera": 2,
        "validator_type_count.custom": 1,
    }


class Catalog:
    """A catalog of the kind before Kedro 1.0, of names alone."""

    def list(self) -> list[str]:
        return ["a", "b", "parameters", "params:a", "params:a.b"]


def statistics(catalog: object) -> dict[str, object]:
    return kedro_telemetry._for_heap(kedro_telemetry._project_statistics(catalog))


def test_parameters_are_no_datasets_and_old_catalogs_tell_no_types():
    assert statistics(Catalog()) == {"number_of_datasets": 2, "number_of_pipelines": 0}


def test_a_dataset_whose_type_cant_be_told_is_custom():
    kinds = {
        "a": "kedro.io.X",
        "b": None,
        "c": "kedro_datasets.Y",
        "d": "kedro.iox",
        "f": "kedro_datasets_experimental.Z",
    }

    class Types:
        keys = lambda self: [*kinds, "e", "params:x", "exit"]  # noqa: E731
        get_type = lambda self, name: sys.exit() if name == "exit" else kinds[name]  # noqa: E731

    counts = {key.partition(".")[2]: count for key, count in statistics(Types()).items() if "type" in key}
    assert counts == {"kedro.io.X": 1, "kedro_datasets.Y": 1, "kedro_datasets_experimental.Z": 1, "custom": 4}


@pytest.mark.skipif(KEDRO < (1, 0), reason="catalogs tell types since Kedro 1.0")
def test_a_large_catalog_is_asked_for_each_kind_of_dataset_once_and_none_is_made(monkeypatch):
    from kedro.io import DataCatalog

    kinds = ("kedro.io.MemoryDataset", "nonsense.Dataset", "kedro.io.CachedDataset", "spaceships.Dataset")
    monkeypatch.setattr("kedro.framework.project.PACKAGE_NAME", "spaceships")  # whose code this must not import
    catalog = DataCatalog.from_config({f"d{i}": {"type": kinds[i % 4]} for i in range(4000)})
    asked = []
    real = catalog.get_type
    catalog.get_type = lambda name: asked.append(name) or real(name)
    counts = statistics(catalog)
    assert counts["dataset_type_count.kedro.io.memory_dataset.MemoryDataset"] == 1000
    assert (counts["dataset_type_count.custom"], counts["number_of_datasets"]) == (2000, 4000)
    assert asked == ["d0", "d1", "d2"]
    assert not catalog._datasets


@pytest.mark.parametrize("trouble", ["1 / 0", "raise SystemExit(5)"])
def test_pipelines_that_cant_be_loaded_leave_their_numbers_out(project, heap, trouble):
    (project / "src" / "spaceships" / "pipeline_registry.py").write_text(trouble)
    bootstrap_project(project)
    hook = KedroTelemetryHook()
    hook.after_context_created(types.SimpleNamespace(project_path=project))
    hook.after_catalog_created(Catalog())
    (event,) = heap.events
    assert event["properties"]["number_of_datasets"] == 2
    assert not {"number_of_nodes", "number_of_pipelines"} & set(event["properties"])


def test_a_project_without_a_default_pipeline_leaves_its_nodes_out(project):
    registry = REGISTRY.replace('"__default__": chain, ', "")
    (project / "src" / "spaceships" / "pipeline_registry.py").write_text(registry)
    bootstrap_project(project)
    assert statistics(Catalog()) == {"number_of_datasets": 2, "number_of_pipelines": 1}


# Masking -------------------------------------------------------------------------------------------------------------


def masked(project: Path | None, line: str) -> str:
    words = kedro_telemetry._command_properties(line.split(), project)
    assert words["main_command"] == (words["command"].split()[1:] or ["kedro"])[0]
    return words["command"]


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("", "kedro"),
        ("--help info --x", "kedro --help ***** *****"),
        ("run --help=x --pipeline y", "kedro run --help ***** ***** *****"),
        ("info", "kedro info"),
        ("-h", "kedro -h"),
        ("--help /home/alice/secret", "kedro --help *****"),
        ("--version s3://acme run", "kedro --version ***** *****"),
        ("-V", "kedro -V"),
        ("--help=secret run", "kedro --help ***** *****"),
        ("-v", "kedro *****"),
        ("secret --and more", "kedro *****"),
        ("--secret run", "kedro *****"),
        ("run", "kedro run"),
        ("run --pipeline secret", "kedro run --pipeline *****"),
        ("run --pipeline=secret --env=x", "kedro run --pipeline ***** --env *****"),
        ("run -p secret -e x secret", "kedro run -p ***** -e ***** *****"),
        ("run -psecret --secret --secret=x", "kedro run ***** ***** *****"),
        ("run --async secret --pipeline x", "kedro run --async ***** --pipeline *****"),
        ("run --pipeline --env x", "kedro run --pipeline ***** *****"),
        ("run --help --pipeline x", "kedro run --help ***** *****"),
        ("run -h", "kedro run -h"),
        ("run -h a --pipeline", "kedro run -h ***** *****"),
        ("run -- --pipeline x", "kedro run ***** ***** *****"),
        ("run run", "kedro run *****"),
        ("pipeline create secret --skip-config", "kedro pipeline create ***** --skip-config"),
        ("pipeline secret --x", "kedro pipeline ***** *****"),
        ("jupyter notebook --port 80", "kedro jupyter notebook ***** *****"),
        ("new --starter=astro-airflow-iris --checkout x", "kedro new --starter astro-airflow-iris --checkout *****"),
        ("new -s astro-airflow-iris astro-airflow-iris", "kedro new -s astro-airflow-iris *****"),
        ("new --starter https://secret --checkout astro-airflow-iris", "kedro new --starter ***** --checkout *****"),
        ("new --checkout=astro-airflow-iris", "kedro new --checkout *****"),
        ("new --starter=secret", "kedro new --starter *****"),
    ],
)
def test_what_kedro_defines_is_clear_and_all_else_is_masked(project, line, command):
    if "starter" in line and KEDRO >= (0, 19):
        import kedro.framework.cli.starters  # noqa: F401
    assert masked(project, line) == command


def test_a_plugins_starter_is_not_an_official_one(project, monkeypatch):
    import kedro.framework.cli.starters as starters

    own = starters.KedroStarterSpec("acme-internal", "https://secret")
    own.origin = "acme"
    official = "_OFFICIAL_STARTER_SPECS_DICT" if KEDRO >= (0, 19) else "_OFFICIAL_STARTER_SPECS"
    monkeypatch.setitem(getattr(starters, official), "acme-internal", own)
    assert masked(project, "new -s acme-internal") == "kedro new -s *****"


def test_outside_of_projects_their_commands_are_unknown(home):
    assert masked(None, "run --pipeline x") == "kedro *****"
    assert masked(None, "new --checkout x") == "kedro new --checkout *****"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """An installed plugin with commands of its own, one that can't be loaded, and one that breaks."""
    metadata = tmp_path / "site" / "plug-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    points = (
        "[kedro.global_commands]\nplug = plug:everywhere\n"
        "[kedro.project_commands]\nmissing = plug:missing\nplug = plug:inside\nbad = bad:cli\n"
    )
    (metadata / "entry_points.txt").write_text(points)
    (tmp_path / "site" / "bad.py").write_text("1 / 0")
    code = """\
    import click


    @click.group()
    def everywhere(): ...


    @click.group()
    def inside(): ...


    @everywhere.command()
    @click.option("--fast/--slow", "-f/-s")
    @click.option("--two", nargs=2)
    @click.option("-v", count=True)
    def fly(**_): ...


    @inside.command("run")
    @click.option("--warp")
    def run(**_): ...


    class Broken(click.Group):
        def get_command(self, ctx, name):
            raise RuntimeError


    inside.add_command(Broken("broken"))


    class Open(click.Group):
        def get_command(self, ctx, name):
            return click.Command(name)


    inside.add_command(Open("open"))


    @inside.command()
    @click.option("--host", "-h")
    @click.option("--loud", is_flag=True)
    @click.option("--three", nargs=3)
    def serve(**_): ...


    class Lazy(click.Group):
        def list_commands(self, ctx):
            return [ctx.command.name + "-off"]

        def get_command(self, ctx, name):
            return serve if name == ctx.command.name + "-off" else None


    inside.add_command(Lazy("lift"))
    """
    (tmp_path / "site" / "plug.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", f"{MODULE.parent}{os.pathsep}{tmp_path / 'site'}")
    __import__("plug")
    yield
    del sys.modules["plug"]


@pytest.mark.parametrize(
    ("line", "inside", "outside"),
    [
        ("fly --slow -f secret --two a b c", "kedro fly --slow -f ***** --two ***** ***** *****", ...),
        ("fly -v --fast --two --slow x --slow", "kedro fly -v --fast --two ***** ***** --slow", ...),
        ("run --warp 9 --pipeline x", "kedro run --warp ***** --pipeline *****", "kedro *****"),
        ("broken secret", "kedro broken *****", "kedro *****"),
        ("open secret", "kedro open *****", "kedro *****"),
        ("serve -h x --loud --help --loud", "kedro serve -h ***** --loud --help *****", "kedro *****"),
        (
            "lift lift-off --three a --loud --loud -h x",
            "kedro lift lift-off --three ***** ***** ***** -h *****",
            "kedro *****",
        ),
    ],
)
def test_what_an_installed_plugin_defines_is_clear(project, plugin, line, inside, outside):
    assert masked(project, line) == inside
    assert masked(None, line) == (inside if outside is ... else outside)


def test_a_plugin_that_cant_be_loaded_is_told_of_by_kedro_alone(project, plugin, heap):
    (project / ".telemetry").write_text("consent: true")
    loud = kedro_command("info")
    (project / ".telemetry").write_text("consent: false")
    quiet = kedro_command("info")
    assert len(heap.events) == 1
    assert "bad" in quiet.stdout + quiet.stderr
    assert screen(loud) == screen(quiet)


def test_what_only_the_projects_own_cli_defines_is_masked(project, heap):
    cli = """\
    import click
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


    kedro_cli.cli.add_command(click.Group("grouped", invoke_without_command=True))
    """
    (project / "src" / "spaceships" / "cli.py").write_text(textwrap.dedent(cli))
    for line in ("run --pipeline x --secret y", "mine", "added", "grouped"):
        assert invoke(project, *line.split()).exit_code == 0
    for name in ("added", "grouped"):
        del sys.modules["kedro.framework.cli.cli"].cli.commands[name]
    # Kedro 0.18 forgets its own command where a project has one of that name.
    run_is_known = KEDRO >= (0, 19)
    overridden = "kedro run --pipeline ***** ***** *****" if run_is_known else "kedro *****"
    assert heap.commands == [overridden, "kedro *****", "kedro *****", "kedro *****"]


# The post ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "line"),
    [
        ("500", "An event was lost: 500"),
        ("204", "An event was lost: 204"),
        ("redirect", "An event was lost: 302"),
        ("reset", "An event was lost: OSError"),
        ("garbage", "An event was lost: BadStatusLine"),
    ],
)
def test_what_goes_wrong_is_one_line_at_debug_that_names_no_address(serve, config, at_debug, mode, line):
    config.write_text("[telemetry]\nconsent = true\n")
    heap = serve(mode)
    assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1
    assert [re.sub("URLError|RemoteDisconnected", "OSError", text) for text in debug_lines(at_debug)] == [line]
    assert os.listdir(config.parent) == ["telemetry.toml"]
    assert send_telemetry_event("x") is False
    assert len(heap.connections) == 2


def test_a_huge_answer_is_not_read(serve, config):
    heap = serve("big")
    assert send_telemetry_event("x") is True
    assert len(heap.events) == 1


def test_a_certificate_of_an_unknown_authority_gets_no_event(heap, tmp_path, monkeypatch, at_debug):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "empty" / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "empty"))
    assert send_telemetry_event("x") is False
    assert (len(heap.connections), heap.bodies) == (1, [])
    assert debug_lines(at_debug)[-1] == "An event was lost: URLError"


def test_a_directory_of_hashed_certificates_is_looked_up_and_not_loaded(heap, tmp_path, monkeypatch):
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs" / "f20e0b1e.0").write_text(AUTHORITY)
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "certs"))
    assert kedro_telemetry._tls_context().cert_store_stats()["x509_ca"] == 0
    assert send_telemetry_event("x") is True


def test_a_certificate_file_that_the_user_has_set_is_honored_beside_hashed_ones(heap, tmp_path, monkeypatch):
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs" / "00000000.0").touch()
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "certs"))
    assert send_telemetry_event("x") is True


def test_where_the_platform_trusts_nobody_certifi_is_asked(heap, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", "")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "certifi", None)
    assert send_telemetry_event("x") is False
    (tmp_path / "certifi.py").write_text(f"def where():\n    return {str(tmp_path / 'authority.pem')!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "certifi")
    assert send_telemetry_event("x") is True


@pytest.mark.parametrize("module", ["ssl", "urllib.request"])
def test_a_python_without_a_module_sends_nothing_and_says_nothing(heap, monkeypatch, module, caplog):
    monkeypatch.setitem(sys.modules, module, None)
    assert send_telemetry_event("x") is False
    assert [text for text in debug_lines(caplog) if text != kedro_telemetry.NOTICE] == []


@pytest.fixture
def short_deadline(monkeypatch):
    monkeypatch.setattr(kedro_telemetry, "DEADLINE", 0.3)


@pytest.mark.parametrize("mode", ["hang", "drip", "look-up"])
def test_a_post_that_hangs_is_given_up_and_for_an_hour_none_is_tried(
    serve, config, short_deadline, monkeypatch, at_debug, mode
):
    config.write_text("[telemetry]\nconsent = true\n")
    heap = serve(mode)
    if mode == "look-up":
        monkeypatch.delenv("HTTPS_PROXY")
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: heap.is_over.wait(60))
    start = time.monotonic()
    assert send_telemetry_event("x") is False
    assert time.monotonic() - start < 10
    assert debug_lines(at_debug) == ["An event was lost: TimeoutError"]
    left = [thread for thread in threading.enumerate() if thread.name == "kedro-telemetry"]
    assert left
    assert all(thread.daemon for thread in left)
    assert sorted(os.listdir(config.parent)) == ["telemetry.backoff", "telemetry.toml"]
    assert send_telemetry_event("x") is False
    assert len(heap.connections) == (mode != "look-up")
    assert len(debug_lines(at_debug)) == 1


def test_the_stamp_waits_for_no_lock(serve, config, short_deadline, monkeypatch):
    import fcntl

    monkeypatch.setattr(kedro_telemetry, "LOCK_PATIENCE", 60.0)
    config.write_text(f'[telemetry]\nuuid = "{UUID}"\nconsent = true\n')
    serve("hang")
    handle = os.open(config.parent, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    start = time.monotonic()
    assert send_telemetry_event("x") is False
    assert time.monotonic() - start < 30
    assert (config.parent / "telemetry.backoff").exists()
    os.close(handle)


@pytest.mark.parametrize(
    ("seconds", "text", "is_held_back"),
    [
        *((0, None, True), (3590, None, True), (3610, None, False), (-60, None, False)),
        *((0, "", False), (0, "nonsense", False), (0, "nan", False), (0, "1e999", False), (0, "1.0", False)),
        *((0, "99999999999", False), (0, "\udcff", False)),
    ],
)
def test_only_a_stamp_of_the_last_hour_counts(config, heap, seconds, text, is_held_back):
    stamp, then = config.parent / "telemetry.backoff", time.time() - seconds
    stamp.write_bytes((text if text is not None else str(then)).encode("utf-8", "surrogateescape"))
    os.utime(stamp, (then, then))
    assert send_telemetry_event("x") is not is_held_back
    assert (len(heap.events), stamp.exists()) == (not is_held_back, True)


def test_a_first_post_that_hangs_leaves_its_stamp_in_a_new_folder(home, serve, short_deadline):
    serve("hang")
    assert kedro_telemetry._post({}) is False
    assert os.listdir(home / "config" / "kedro") == ["telemetry.backoff"]


def test_a_stamp_that_is_no_file_does_not_count(config, heap, at_debug):
    (config.parent / "telemetry.backoff").mkdir()
    config.write_text("[telemetry]\nconsent = true\n")
    assert send_telemetry_event("x") is True
    assert debug_lines(at_debug) == []


@pytest.mark.parametrize("seconds", [-60, 3610])
def test_a_stamp_that_was_put_back_or_made_up_does_not_count(config, heap, seconds):
    stamp = config.parent / "telemetry.backoff"
    stamp.write_text(str(time.time()))
    os.utime(stamp, (time.time() - seconds, time.time() - seconds))
    assert send_telemetry_event("x") is True


@pytest.mark.parametrize("where", ["no folder", "an old stamp that is read-only"])
def test_where_no_stamp_can_be_kept_the_process_remembers(serve, home, short_deadline, monkeypatch, where):
    if where == "no folder":
        under_a_file(home, monkeypatch)
    else:
        stamp = kedro_telemetry._user_file("telemetry.backoff")
        stamp.parent.mkdir(parents=True)
        stamp.write_text("1.0")
        stamp.chmod(0o444)
    heap = serve("hang")
    for _ in range(3):
        assert send_telemetry_event("x") is False
    assert len(heap.connections) == 1
    monkeypatch.setattr(kedro_telemetry.telemetry_hook, "back_off_start", time.time() - 3610)
    assert send_telemetry_event("x") is False
    assert len(heap.connections) == 2


def test_behind_a_firewall_a_command_ends_as_ever_and_only_the_first_one_waits(project, serve, config):
    config.write_text("[telemetry]\nconsent = true\n")
    plain = kedro_command("info", env={"DO_NOT_TRACK": "1"})
    heap = serve("hang")
    start = time.monotonic()
    first = kedro_command("info")
    second = kedro_command("info")
    assert time.monotonic() - start < 10
    assert screen(first) == screen(second) == screen(plain)
    assert len(heap.connections) == 1


def test_ctrl_c_ends_the_wait_and_not_the_command(home, serve):
    heap = serve("hang")
    code = """
    import sys, kedro_telemetry
    from kedro.framework.cli.cli import main
    kedro_telemetry.DEADLINE = 30
    sys.argv = ["kedro", "info"]
    main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not heap.connections and process.poll() is None:
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, "Traceback" in errors) == (0, False)
    assert time.monotonic() - start < 10


def test_ctrl_c_in_a_session_is_for_the_session(project, monkeypatch):
    def interrupt(event: dict) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kedro_telemetry, "_post", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session_run(project)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="modes are of POSIX")
def test_a_new_file_has_the_mode_that_the_user_wants(home):
    old = os.umask(0o077)
    try:
        assert kedro_telemetry._get_or_create_uuid() != ""
    finally:
        os.umask(old)
    assert stat.S_IMODE((home / "config" / "kedro" / "telemetry.toml").stat().st_mode) == 0o600


# The command line ----------------------------------------------------------------------------------------------------


def preview(text: str) -> dict:
    return json.loads(text[text.index("{") :])


def test_status_shows_where_the_user_stands_and_the_event_of_a_run(project, config, heap, capsys):
    config.write_text(f'[telemetry]\nuuid = "{UUID}"\nconsent = true\n')
    assert main([]) == 0
    out = capsys.readouterr().out
    assert main(["status"]) == 0
    for what in (
        f"on here: {config}, line 3",
        f"{UUID} in {config}",
        f"{32 * 'a'} in {project / 'pyproject.toml'}",
    ):
        assert what in out
    for what in (kedro_telemetry.ENDPOINT, "DISABLE_HOOKS_FOR_PLUGINS", "statistics", "Back-off:   none"):
        assert what in out
    session = kedro_command("run")
    assert session.returncode == 0
    (event,) = heap.events
    shown = preview(out)
    assert shown.pop("timestamp") <= event.pop("timestamp")
    kept = {k: v for k, v in event["properties"].items() if not k.startswith(("number_of", "dataset_type"))}
    assert shown == {**event, "properties": kept}


def test_status_word_for_word(project, config, capsys, monkeypatch):
    (project / "pyproject.toml").write_text(START)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    now = time.time()
    (config.parent / "telemetry.backoff").write_text(str(now))
    (project / ".telemetry").write_text("consent: false")
    assert main([]) == 0
    text = capsys.readouterr().out
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now + 3600))
    assert text.partition("{")[0] == textwrap.dedent(
        f"""\
        Telemetry:  off here: {project}/.telemetry, line 1
        Identity:   (made with the first event) in {config}
        Project:    {project}
        Project id: (made with the first event) in {project}/pyproject.toml
        Not looked at, as only the project's code can tell: DISABLE_HOOKS_FOR_PLUGINS, the statistics
        Endpoint:   https://heapanalytics.com/api/track
        Back-off:   nothing is sent until {until}

        A `kedro run` here sends nothing; with telemetry on it would send:
        """
    )
    shown = preview(text)
    assert (shown["event"], shown["identity"]) == ("Kedro Project Statistics", "(made with the first event)")
    assert shown["properties"]["project_id"] == shown["properties"]["username"] == "(made with the first event)"
    assert (shown["properties"]["command"], shown["properties"]["main_command"]) == ("kedro run", "run")
    assert ((project / "pyproject.toml").read_text(), config.exists()) == (START, False)


def test_status_writes_nothing_sends_nothing_and_runs_no_code_of_the_project(project, home, heap, monkeypatch):
    (project / "pyproject.toml").write_text(START)
    for path in (project / "src").rglob("*.py"):
        path.write_text("1 / 0")
    monkeypatch.setenv("PYTHONPATH", f"{project / 'src'}")
    done = run(sys.executable, MODULE, cwd=project / "conf")
    assert (done.returncode, done.stderr) == (0, "")
    shown = preview(done.stdout)
    assert shown["identity"] == shown["properties"]["project_id"] == "(made with the first event)"
    assert (project / "pyproject.toml").read_text() == START
    assert (os.listdir(home), heap.connections) == ([], [])
    assert f"Project:    {project}\n" in done.stdout


def test_status_outside_of_projects_shows_what_an_unknown_command_sends(home, capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    config = home / "config" / "kedro" / "telemetry.toml"
    assert out.partition("{")[0] == textwrap.dedent(
        f"""\
        Telemetry:  on here: nothing said
        Identity:   (made with the first event) in {config}
        Project:    none here
        Endpoint:   https://heapanalytics.com/api/track
        Back-off:   none

        A `kedro run` here would send:
        """
    )
    shown = preview(out)
    assert (shown["event"], shown["properties"]["command"]) == ("CLI command", "kedro *****")
    assert (shown["properties"]["main_command"], "project_id" in shown["properties"]) == ("*****", False)


def test_status_tells_of_a_no_and_of_a_back_off(home, config, monkeypatch, capsys):
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    now = time.time()
    (config.parent / "telemetry.backoff").write_text(str(now))
    main([])
    out = capsys.readouterr().out
    assert "Telemetry:  off here: the environment variable DO_NOT_TRACK" in out
    assert f"nothing is sent until {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now + 3600))}" in out
    no_home(home, monkeypatch)
    main([])
    assert "(made with the first event) in /dev/null/no home folder/kedro/telemetry.toml\n" in capsys.readouterr().out


def test_the_command_line_works_on_a_bare_python(home, tmp_path):
    vendored = shutil.copy(MODULE, tmp_path / "kedro_telemetry.py")
    for words, status in ((["status"], 0), (["disable"], 0), (["enable"], 0), (["nonsense"], 2)):
        done = run(sys.executable, "-I", "-S", vendored, *words)
        assert done.returncode == status, done.stderr
    assert "project_version" not in preview(run(sys.executable, "-I", "-S", vendored).stdout)["properties"]


def test_the_file_itself_is_a_program(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(MODULE), "--help"])
    for name in ("__main__.plugin", "__main__.api"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(MODULE), run_name="__main__")
    assert ended.value.code == 0
    assert kedro_telemetry.HELP in capsys.readouterr().out


def test_disable_is_a_no_for_every_project_and_enable_a_yes(project, config, heap, capsys):
    config.write_text("# mine\n[telemetry] # c\nother = 1")
    assert main(["disable"]) == 0
    assert config.read_text() == "# mine\n[telemetry] # c\nconsent = false\nother = 1"
    assert _check_for_telemetry_consent(project) is False
    assert main(["disable"]) == 0
    assert main(["enable"]) == 0
    assert config.read_text() == "# mine\n[telemetry] # c\nconsent = true\nother = 1"
    said = "You said {} to telemetry, in every project of yours: {}\n"
    assert capsys.readouterr() == ("".join(said.format(word, config) for word in ("no", "no", "yes")), "")
    assert kedro_telemetry.NOTICE not in kedro_command("info").stdout
    assert len(heap.events) == 1


def test_after_enable_a_no_elsewhere_is_told(project, config, monkeypatch, capsys):
    (project / ".telemetry").write_text("consent: false")
    assert main(["enable"]) == 0
    told = f"A no is still a no, and here telemetry is off because of {project / '.telemetry'}, line 1\n"
    assert capsys.readouterr().out.endswith(told)
    monkeypatch.chdir(project / "conf")
    assert main(["enable"]) == 0
    assert capsys.readouterr().out.endswith(told)
    monkeypatch.setenv("DO_NOT_TRACK", "")
    assert main(["enable"]) == 0
    assert "DO_NOT_TRACK" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["nonsense"], ["status", "more"], ["enable", "disable"], ["-x"], [""]])
def test_anything_else_is_a_usage_line(words, capsys):
    assert main(words) == 2
    assert capsys.readouterr() == ("", kedro_telemetry.HELP.splitlines()[0] + "\n")


def test_help_tells_the_commands(capsys):
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("status", "enable", "disable"):
        assert re.search(rf"^  {word}  ", out, re.MULTILINE)


@pytest.mark.parametrize("spoil", [under_a_file, a_directory, a_pipe, no_home])
def test_a_choice_that_cant_be_kept_is_one_line_and_a_failure(home, monkeypatch, capsys, spoil):
    spoil(home, monkeypatch)
    assert main(["disable"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"Nothing has changed: .*(file|File exists|home folder).*\n", err)


# README --------------------------------------------------------------------------------------------------------------


README = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""


def table() -> dict[str, str]:
    """README's property table: name, with <…> for any text, and when it is sent."""
    rows = re.findall(r"^\| `([\w.<>]+)` \| ([^|]*) \| [^|]* \| [^|]* \|$", README, re.MULTILINE)
    assert len(rows) == len(dict(rows)) > 10
    return dict(rows)


def newer(when: str) -> bool:
    """Whether what is sent `when` is, needs a newer Kedro than there is."""
    version = re.search(r"from Kedro (\d+)\.(\d+)", when)
    return version is not None and (int(version[1]), int(version[2])) > KEDRO


def test_the_table_has_every_property_that_commands_send_and_no_other(project, heap):
    catalog = project / "conf" / "base" / "catalog.yml"
    if KEDRO >= (1, 6):
        catalog.write_text(CATALOG + "v: {type: kedro.io.MemoryDataset, validator: pandera.A}\n")
    invoke(None, "info")
    invoke(project, "run")
    session_run(project)
    sent = {name for event in heap.events for name in event["properties"]}
    patterns = {name: re.compile(re.sub("<.*?>", ".+", re.escape(name))) for name in table()}
    assert [name for name in sent if not any(p.fullmatch(name) for p in patterns.values())] == []
    missing = [name for name, pattern in patterns.items() if not any(map(pattern.fullmatch, sent))]
    assert [name for name in missing if not newer(table()[name])] == []


def test_readmes_event_is_one_that_a_run_sends(project, heap):
    (event,) = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", README, re.DOTALL))
    kedro_command("run", "--pipeline", "__default__")
    (sent,) = heap.events
    assert list(event) == list(sent)
    typeless = {name for name in event["properties"] if not newer(table().get(name, "from Kedro 1.0"))}
    assert typeless == set(sent["properties"])
    for name in ["command", "main_command", "number_of_datasets", "number_of_nodes", "number_of_pipelines"]:
        assert event["properties"][name] == sent["properties"][name]
    assert event["properties"]["telemetry_version"] == kedro_telemetry.__version__
    for name in typeless:
        assert type(event["properties"][name]) is type(sent["properties"][name])
        assert len(str(event["properties"][name])) == len(str(sent["properties"][name])) or "version" in name


def test_readmes_commands_are_the_ones_that_work(home, heap):
    show, test = re.findall(r"```sh\npython3 -m venv .venv && (.*?)\n```", README)
    assert show == ".venv/bin/pip install . && KEDRO_TELEMETRY_DEBUG=1 .venv/bin/kedro info"
    assert test == ".venv/bin/pip install '.[test]' && .venv/bin/python -m pytest"
    done = kedro_command("info", env={"KEDRO_TELEMETRY_DEBUG": "1"})
    assert json.loads(done.stderr)["event"] == "CLI command"


def test_readmes_proxy_that_never_answers_shows_the_deadline(home):
    (code,) = re.findall(r"`python3 -c '(import socket.*?)'`", README)
    code = code.replace('["kedro", "info"]', f'["{sys.executable}", "-m", "kedro", "info"]')
    done = run(sys.executable, "-c", code)
    assert 2 <= float(done.stdout.split()[-1]) < 20
    again = run(sys.executable, "-c", code)
    assert float(again.stdout.split()[-1]) < float(done.stdout.split()[-1])
