"""Compare what kedro-telemetry 0.9.0 and this package send for the same commands.

Each case runs with both, for a fresh user in a fresh project. What reaches Heap must be
the same, apart from DIFFERENCES.

PEER_PYTHON must have kedro-telemetry 0.9.0, and OURS_PYTHON this package, freshly
installed. Both need the same Kedro, kedro-docker and kedro-skills. Run this script with
OURS_PYTHON, which also needs pytest.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
with contextlib.redirect_stdout(io.StringIO()):  # Kedro logs its logging file
    import test_kedro_telemetry as tests
    from test_kedro_telemetry import CATALOG, ID_TABLE, KEDRO_TABLE, PIPELINES, SETTINGS

PATIENCE = 300  # seconds to wait for a process on a busy machine
# Python runs this when it starts, so that a busy machine does not lose an event.
# Otherwise, this package waits for two seconds, and 0.9.0 for ten at each step.
PATIENT = f"""\
    import socket
    import kedro_telemetry

    def set_timeout(self, seconds, original=socket.socket.settimeout):
        original(self, seconds and {PATIENCE})

    socket.socket.settimeout = set_timeout
    kedro_telemetry.DEADLINE = {PATIENCE}.0
"""
KNOWN_NUMBERS = {
    tests.IDENTITY: "<identity>",
    tests.hashed_id(tests.PROJECT_ID, "spaceships"): "<spaceships>",
    tests.hashed_id(tests.OTHER_PROJECT_ID, "rockets"): "<rockets>",
    tests.hashed_id(tests.PROJECT_ID, "rockets"): "<rockets in spaceships>",
}
RANDOM_1 = "<random number 1>"  # the first number in a case that is not known
RANDOM_2 = "<random number 2>"
ABSENT = "<absent>"  # stands for a property or an event that is not sent
COMMAND = "CLI command"
STATISTICS = "Kedro Project Statistics"
MEMORY = "dataset_type_count.kedro.io.memory_dataset.MemoryDataset"
NEW_STARTER = "kedro new -s support-agent-langgraph --help"

Row = tuple[object, ...]
Event = dict[str, Any]

# The permitted differences, by reason. Each has the name of a property (or `event`, or
# `exit status`), its value in 0.9.0 and in this package and, if the values are not
# enough, the only cases in which it may differ. Each must occur. A new property, whose
# value may depend on the machine, needs only: "the reason": [("my_property", ABSENT)],
DIFFERENCES: dict[str, list[Row]] = {
    "0.9.0 labels local time as UTC": [("timestamp", "UTC+9", "UTC+0")],
    "Heap does not accept null": [
        ("project_id", None, ABSENT),
        ("number_of_nodes", None, ABSENT),
    ],
    "shell completion is not a command": [("event", COMMAND, ABSENT, "TAB")],
    "0.9.0 has no `kedro telemetry`, which is not reported itself": [
        ("event", COMMAND, ABSENT, "kedro telemetry"),
        ("exit status", 2, 0, "kedro telemetry"),
    ],
    "0.9.0 reports only the first command in a process": [
        ("event", ABSENT, COMMAND, "two commands")
    ],
    "0.9.0 reports every catalog in a session": [
        ("event", STATISTICS, ABSENT, "two catalogs")
    ],
    "0.9.0 reports all sessions in a process for the first one's project": [
        ("project_id", "<spaceships>", "<rockets>")
    ],
    "a packaged project is not the one whose folder it runs in": [
        ("project_id", "<rockets in spaceships>", ABSENT),
        ("tools", "Linting, Testing", ABSENT, "a package elsewhere"),
        ("example_pipeline", "False", ABSENT, "a package elsewhere"),
    ],
    "every new container on a CI machine would count as a user and a project": [
        ("identity", RANDOM_1, "missing_user_identity", "a new CI machine"),
        ("username", RANDOM_1, "", "a new CI machine"),
        ("project_id", RANDOM_2, ABSENT, "a new CI machine"),
    ],
    "0.9.0 recognises only CI=true": [("is_ci_env", False, True, "CI=1")],
    "with a bad file, 0.9.0 never finds an identity": [
        ("identity", "missing_user_identity", RANDOM_1),
        ("username", "", RANDOM_1),
    ],
    "0.9.0 uses the current directory if XDG_CONFIG_HOME is empty": [
        ("identity", RANDOM_1, "<identity>"),
        ("username", RANDOM_1, "<identity>"),
    ],
    "0.9.0 does not mask what a project defines, or words after `--help`": [
        ("command", "kedro launch --rocket *****", "kedro *****"),
        ("main_command", "launch", "*****"),
        ("command", "kedro --help secret", "kedro --help *****"),
    ],
    "0.9.0 masks names that Kedro or plugins define": [
        ("command", "kedro *****", "kedro run"),
        ("main_command", "*****", "run"),
        ("command", "kedro new -s ***** --help", NEW_STARTER),
        ("command", "kedro docker dive *****", "kedro docker dive --no-ci"),
    ],
    "settings, variables and ambiguous files deny consent to all events": [
        ("event", COMMAND, ABSENT, "a hook switch", "a hook switch of dynaconf"),
        ("event", STATISTICS, ABSENT, "a setting", "DO_NOT_TRACK=", "consent=true"),
    ],
    "0.9.0 counts the pipelines that a run requests": [
        ("number_of_pipelines", 2, ABSENT, "some pipelines"),
        ("number_of_nodes", 3, ABSENT, "some pipelines"),
    ],
    "0.9.0 excludes all names that begin with `parameters`": [
        ("number_of_datasets", 1, 2),
        (MEMORY, 1, 2),
    ],
    "0.9.0 imports a class that a project re-exports, to learn its origin": [
        (MEMORY, 4, 3),
        ("dataset_type_count.custom", 1, 2),
    ],
    "0.9.0 imports every class, and ends a run if it cannot": [
        ("event", COMMAND, STATISTICS),
        ("exit status", 1, 0),
    ],
    "people add client names": [("tools", "Linting, Acme", "Linting")],
}


class Case(NamedTuple):
    """One run. Unless stated otherwise, both sides know the project and the user."""

    name: str
    line: str  # after `kedro`
    files: Mapping[str, str] = {}  # in addition to the project's
    variables: Mapping[str, str] = {}
    code: str = ""  # runs with the line as its arguments, instead of `kedro`
    identity: str = tests.IDENTITY  # in telemetry.toml; "" for a new user
    folder: str = "spaceships"  # the current directory
    events: int = 1  # that 0.9.0 sends, which shows that there is something to compare
    status: int | None = 0  # 0.9.0's, for the same reason; None if it varies


NEW_PROJECT = {"pyproject.toml": KEDRO_TABLE}
MADE_UP_TOOLS = 'tools = ["Linting", "Acme"]\nexample_pipeline = true\n'
TOOLS_PROJECT = KEDRO_TABLE.replace(tests.TOOLS, MADE_UP_TOOLS) + ID_TABLE
NO_DEFAULT_REGISTRY = tests.REGISTRY.replace("__default__", "another")
HOOKS = """\
from kedro.framework.hooks import hook_impl
class ProjectHooks:
    @hook_impl
    def after_context_created(self, context):
        context.catalog
    @hook_impl
    def after_catalog_created(self, catalog):
        catalog["added"] = 1
HOOKS = (ProjectHooks(),)
"""
TYPED_CATALOG = """\
d0: {type: MemoryDataset, validator: pandera.Schema}
full: {type: kedro.io.MemoryDataset, validator: spaceships.checks.Own}
module: {type: kedro.io.memory_dataset.MemoryDataset}
cached: {type: CachedDataset, dataset: {type: MemoryDataset}}
"{name}_out": {type: MemoryDataset}
own: {type: spaceships.datasets.Own}
re_exported: {type: spaceships.datasets.MemoryDataset}
"""
OWN_DATASETS = "from kedro.io import MemoryDataset\nclass Own(MemoryDataset): pass\n"
D0 = "d0: {type: MemoryDataset, data: 1}\n"
OWN_CLI = """\
import click
@click.command()
@click.option("--rocket")
def launch(rocket):
    pass
cli = click.Group("spaceships", [launch])
"""
SWITCH = 'DISABLE_HOOKS_FOR_PLUGINS = ("kedro-telemetry",)\n'
DYNACONF = {"DYNACONF_DISABLE_HOOKS_FOR_PLUGINS": '@json ["kedro-telemetry"]'}
TAB = {"_KEDRO_COMPLETE": "bash_complete", "COMP_WORDS": "kedro ru", "COMP_CWORD": "1"}
SHELL = "import sys, kedro.framework.cli as k; sys.argv[0] = 'kedro'; k.main()"
PACKAGE = """\
import sys
from kedro.framework.cli.utils import find_run_command
from kedro.framework.project import configure_project
sys.path.append("../rockets/src")
configure_project(sys.argv[1])
find_run_command(sys.argv[1])([])
"""
INSTALLED = {
    "plugins/spaceships/__init__.py": "",
    "plugins/spaceships/settings.py": "",
    "plugins/spaceships/pipeline_registry.py": tests.REGISTRY,
}
TWO_PROJECTS = """\
from pathlib import Path
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
for project in (Path.cwd(), Path.cwd().parent / "rockets"):
    bootstrap_project(project)
    with KedroSession.create(project) as session:
        session.load_context().catalog
"""
TWO_COMMANDS = """\
from pathlib import Path
from click.testing import CliRunner
from kedro.framework.cli.cli import KedroCLI
for line in ("info", "--version"):
    assert CliRunner().invoke(KedroCLI(Path.cwd()), line).exit_code == 0
"""

CASES = [
    # Properties
    Case("a run", "run -r SequentialRunner --env=base --params a.b=2"),
    Case("HEAP_APPID_DEV", "run", variables={"HEAP_APPID_DEV": "1"}),
    Case("a new user and project", "run", NEW_PROJECT, identity=""),
    Case("a new CI machine", "run", NEW_PROJECT, {"GITLAB_CI": "true"}, identity=""),
    Case("CI=1", "run", variables={"CI": "1"}),
    Case("a bad UUID", "run", identity="1"),
    Case("XDG_CONFIG_HOME=", "run", variables={"XDG_CONFIG_HOME": ""}),
    Case("made-up tools", "run", {"pyproject.toml": TOOLS_PROJECT}),
    Case("some pipelines", "run --pipelines other"),
    Case("parameters_x", "run", {CATALOG: D0 + D0.replace("d0", "parameters_x")}),
    Case(
        "types, validators, and no __default__",
        "catalog describe-datasets",
        {
            CATALOG: TYPED_CATALOG,
            "src/spaceships/datasets.py": OWN_DATASETS,
            PIPELINES: NO_DEFAULT_REGISTRY,
        },
    ),
    # Events
    Case("no such type", "run", {CATALOG: D0 + "d9: {type: nowhere.D9}"}, status=1),
    Case("a registry that raises", "run", {PIPELINES: "1 / 0"}, status=1),
    Case("two catalogs", "run", {SETTINGS: HOOKS}, events=2),
    Case("two projects", "", code=TWO_PROJECTS, events=2),
    Case("two commands", "", code=TWO_COMMANDS),
    Case("a package in its own checkout", "spaceships", INSTALLED, code=PACKAGE),
    Case("a package elsewhere", "rockets", code=PACKAGE),
    Case("TAB", "", variables=TAB, code=SHELL),
    Case("kedro telemetry", "telemetry", status=2),
    Case("kedro-skills with its own event", "skills update --force", events=2),
    # Consent
    Case("consent: false", "run", {".telemetry": "consent: false"}, events=0),
    Case("consent=true", "run", {".telemetry": "consent=true"}),
    Case("DO_NOT_TRACK=", "run", variables={"DO_NOT_TRACK": ""}),
    Case("a hook switch", "run", {SETTINGS: SWITCH}),
    Case("a hook switch of dynaconf", "run", variables=DYNACONF),
    Case("a setting", "run", {SETTINGS: "KEDRO_DISABLE_TELEMETRY = True"}),
    # Masked commands
    Case("kedro", "", folder="elsewhere", status=None),  # depends on click
    Case("outside of projects", "run", folder="elsewhere", status=2),
    Case("a word after --help", "--help secret"),
    Case("an unknown option", "run --secret=x --env base", status=2),
    Case("an unknown command", "frobnicate secret", status=2),
    Case("an own command", "launch --rocket x", {"src/spaceships/cli.py": OWN_CLI}),
    Case("a starter", "new --starter databricks-iris --help"),
    Case("a new starter", "new -s support-agent-langgraph --help"),
    # Without Docker, its status is 1.
    Case("kedro-docker", "docker dive --no-ci", folder="spaceships/conf", status=None),
]


class Seen(NamedTuple):
    """What one side did in a case."""

    events: list[Event]
    status: int
    errors: str


def observe(python: str, case: Case) -> Seen:
    """Run a case for a fresh user, and return what arrives at Heap."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        variables = prepare(case, root)
        start = ["-c", case.code] if case.code else ["-m", "kedro"]
        with tests.Heap(root / "heap.pem") as heap:
            threading.Thread(target=heap.serve_forever, args=[0.02]).start()
            variables["HTTPS_PROXY"] = f"http://127.0.0.1:{heap.server_address[1]}"
            try:
                done = subprocess.run(
                    [python, *start, *case.line.split()],
                    check=False,
                    cwd=root / case.folder,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                )
            finally:
                heap.shutdown()
        # The Heap has closed, and everything sent to it has arrived.
        numbers = dict(KNOWN_NUMBERS)
        events = [comparable(event, numbers) for event in heap.events]
        return Seen(events, done.returncode, done.stderr)


def prepare(case: Case, root: Path) -> dict[str, str]:
    """Write the files of a case, and return the variables of its user."""
    table = KEDRO_TABLE + ID_TABLE
    project = tests.write_project(root / "spaceships", "spaceships", table)
    table = table.replace("spaceships", "rockets")
    table = table.replace(tests.PROJECT_ID, tests.OTHER_PROJECT_ID)
    tests.write_project(root / "rockets", "rockets", table)
    for name, content in case.files.items():
        tests.write(project / name, content)
    for folder in ("elsewhere", "no-certificates"):
        (root / folder).mkdir()
    if case.identity:  # the folders with and without XDG_CONFIG_HOME
        text = f'[telemetry]\nuuid = "{case.identity}"\n'
        for folder in ("home/kedro", "home/.config/kedro"):
            tests.write(root / folder / "telemetry.toml", text)
    pem = tests.write(root / "heap.pem", tests.HEAP_PEM)
    patience = tests.write(root / "patience/sitecustomize.py", PATIENT).parent
    kept = {key: os.environ[key] for key in os.environ.keys() - {*tests.VARIABLES}}
    return {
        **kept,
        **dict.fromkeys(tests.HOME_VARIABLES, str(root / "home")),
        "PYTHONPATH": f"{patience}{os.pathsep}{project}/plugins",
        "SSL_CERT_FILE": str(pem),
        "SSL_CERT_DIR": str(root / "no-certificates"),
        "REQUESTS_CA_BUNDLE": str(pem),  # for 0.9.0
        "TZ": "JST-9",  # nine hours ahead of UTC
        **case.variables,
    }


def comparable(event: Event, numbers: dict[str, str]) -> Event:
    """Return an event as one flat table, with placeholders for what varies by run."""
    table = {**event, **event["properties"]}
    del table["properties"]
    with contextlib.suppress(ValueError):  # a time in another format stays
        table["timestamp"] = time_zone_of(table["timestamp"])
    if re.fullmatch(r"\d+\.\d+\.\d+", str(table.get("telemetry_version"))):
        table["telemetry_version"] = "<version>"
    for name in ("identity", "username", "project_id"):
        value = str(table.get(name))
        if re.fullmatch("[0-9a-f]{32}|[0-9a-f]{128}", value):
            word = f"<random number {len(numbers) - len(KNOWN_NUMBERS) + 1}>"
            table[name] = numbers.setdefault(value, word)
    return table


def time_zone_of(timestamp: str) -> str:
    """Return the time zone whose current time a timestamp shows, such as `UTC+9`."""
    shown = datetime.strptime(timestamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    return f"UTC{round((shown - datetime.now(UTC)) / timedelta(hours=1)):+}"


def changes_between(peer: Seen, ours: Seen) -> Iterator[Row]:
    """Yield each difference with both values, by event and property.

    If two events have different names, nothing else about them is compared.
    """
    if peer.status != ours.status:
        yield "exit status", peer.status, ours.status
    absent = {"event": ABSENT}
    for old, new in zip_longest(peer.events, ours.events, fillvalue=absent):
        names = {"event"} if old["event"] != new["event"] else old.keys() | new.keys()
        for name in sorted(names):
            values = old.get(name, ABSENT), new.get(name, ABSENT)
            if repr(values[0]) != repr(values[1]):  # True is not 1
                yield name, *values


class Judge:
    """Decides which differences are intended, and records where they occur."""

    def __init__(self) -> None:
        self.occurred: defaultdict[str, set[str]] = defaultdict(set)

    def faults_of(self, case: Case, peer: Seen, ours: Seen) -> Iterator[str]:
        """Yield each fault in a case, and what to do about it."""
        status = peer.status if case.status is None else case.status
        if (len(peer.events), peer.status) != (case.events, status):
            yield BAD_CASE.format(len(peer.events), peer.status, peer.errors[-2000:])
            return
        for change in changes_between(peer, ours):
            if self.is_meant(change, case.name):
                continue
            if change[0] in ("event", "exit status"):
                yield UNEXPECTED.format(*change) + CRASHED.format(ours.errors[-2000:])
            else:
                yield (ADDED if change[1] == ABSENT else UNEXPECTED).format(*change)

    def is_meant(self, change: Row, case: str) -> bool:
        """Return whether a difference is intended in a case, and record it if so."""
        for row in chain.from_iterable(DIFFERENCES.values()):
            is_same = repr(row[:3]) == repr(change[: len(row)])  # True is not 1
            if is_same and case in (row[3:] or [case]):
                self.occurred[repr(row)].add(case)
                return True
        return False

    def outdated(self) -> Iterator[str]:
        """Yield each expected difference that has not occurred, and what to do."""
        for why, rows in DIFFERENCES.items():
            for row in rows:
                found = self.occurred[repr(row)]
                missing = [str(name) for name in row[3:] if name not in found]
                if missing or not found:
                    yield OUTDATED.format(why, row, ", ".join(missing) or "any case")


BAD_CASE = """\
0.9.0 sends {} events and exits with {}. Fix the case. 0.9.0 printed these errors:
{}"""
UNEXPECTED = """\
`{0}`: 0.9.0 has {1!r}, and this package has {2!r}.
Fix kedro_telemetry.py. If the difference is intended, add it to DIFFERENCES with its
reason (and this case, if the values are not enough): ({0!r}, {1!r}, {2!r})"""
CRASHED = "\nThis package printed these errors:\n{}"
ADDED = """\
`{0}`: only this package has it.
If it is a new property, add it to DIFFERENCES with its reason: ({0!r}, ABSENT)
Otherwise, fix kedro_telemetry.py or, if intended, add ({0!r}, ABSENT, its value)."""
OUTDATED = """\
{1} does not occur in {2}.
Fix kedro_telemetry.py. If this is intended, remove it from DIFFERENCES, where it has
this reason: {0}."""


def compare(peer: str, ours: str, cases: list[Case]) -> int:
    """Run cases with both Pythons, print the results, and return an exit status."""
    judge = Judge()
    faults: defaultdict[str, list[str]] = defaultdict(list)  # the cases of each fault
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        theirs = pool.map(partial(observe, peer), cases)
        own = pool.map(partial(observe, ours), cases)
        for case, one, other in zip(cases, theirs, own, strict=True):
            found = list(judge.faults_of(case, one, other))
            print("FAILED:" if found else "as expected:", case.name, flush=True)
            for fault in found:
                faults[fault].append(case.name)
    if len(cases) == len(CASES):
        for fault in judge.outdated():
            faults[fault].append("all cases")
    for fault, names in faults.items():
        print(f"\n{'; '.join(names)}: {fault}")
    print(f"{len(cases)} cases compared, {len(faults)} faults found")
    return 1 if faults else 0


def main() -> int:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", metavar="PEER_PYTHON")
    parser.add_argument("ours", metavar="OURS_PYTHON")
    parser.add_argument(
        "cases", metavar="CASE", nargs="*", help="a case's name; default: all cases"
    )
    # argparse's "version" action prints a text and exits.
    text = "\n".join(names)
    parser.add_argument("--list", action="version", version=text, help="list the cases")
    given = parser.parse_args()
    for name in given.cases:
        if name not in names:
            parser.error(f"there is no case {name!r}; --list shows their names")
    chosen = [case for case in CASES if case.name in (given.cases or names)]
    # Not resolved, because a virtual environment's Python is a symbolic link.
    return compare(os.path.abspath(given.peer), os.path.abspath(given.ours), chosen)


if __name__ == "__main__":
    sys.exit(main())
