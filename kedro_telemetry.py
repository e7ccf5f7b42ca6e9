# SPDX-License-Identifier: Apache-2.0
"""Anonymised usage telemetry for Kedro: one event per command or session.

The code follows an event from start to finish: first the hooks that Kedro calls and the
functions that other packages call, then `_send`, through which every event goes. Next
come helpers for files and the project, and each step: consent, the notice, ids,
properties, masking and posting. The commands come last.

To vendor the module, copy it into the folder that contains your project's
`settings.py`, and add to the settings:

    from .kedro_telemetry import telemetry_hook

    HOOKS = (telemetry_hook,)

It needs Python 3.11 and Kedro 0.18.14 or later. Keep any release of kedro-telemetry
installed: its entry points lead Kedro to the copy. Without them, the copy reports only
sessions and does not add `kedro telemetry`.
"""

# Modules that only an event needs are imported inside functions, which keeps Kedro's
# start-up fast. Their classes are annotated as Any, because beartype and typeguard
# resolve annotations at run time, when a name imported under TYPE_CHECKING is missing.
# click's classes are Any as well, because rich-click can replace them at any time.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from inspect import unwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from pluggy import HookimplMarker

__version__ = "1.0.0"

ENDPOINT = "https://heapanalytics.com/api/track"
APP_ID = "2388822444"
HEADERS = ("Host", "User-Agent", "Content-Type", "Content-Length")  # no others
DOCUMENTATION = "https://docs.kedro.org/en/stable/about/telemetry/"
DEADLINE = 2.0  # seconds that a command waits for Heap
BACK_OFF = 3600.0  # seconds without sending after Heap failed to answer in time
LARGEST_FILE = 2**20  # bytes; larger files are not read, or only up to here
LONGEST_TEXT = 1023  # characters that Heap accepts in a key or a value
ACCEPTED = 200  # Heap's status for an event that it has accepted

NOTICE = f"""
Kedro collects anonymised usage data to improve the product.
See whether it is on here, and why:  kedro telemetry
Opt out:    kedro telemetry disable, or set DO_NOT_TRACK
Read more:  {DOCUMENTATION}"""

OPT_OUT_VARIABLES = ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY")
# A line of a `.telemetry` that grants consent, in lower case
GRANT = r"""(["']?)consent\1[ \t]*:[ \t]*(["']?)(true|yes|on|y|1)\2"""
CI_VARIABLES = (
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
)
KEDRO_TOOLS = (
    "Linting",
    "Testing",
    "Custom Logging",
    "Documentation",
    "Data Structure",
    "PySpark",
    "Kedro Viz",
    "None",
)
# Dataset classes whose names may be sent, such as `kedro.io.MemoryDataset`,
# `kedro_datasets.pandas.CSVDataset` or `kedro_datasets.pandas.csv_dataset.CSVDataset`
PUBLIC_CLASS = r"""(?x)
    (kedro\.io | kedro_datasets(?:_experimental)?\.\w+)   # the package
    \. (?:(\w+)\.)?                                       # its module, often left out
    (\w+)                                                 # the class
"""
PUBLIC_VALIDATORS = (
    "pandera",
    "pydantic",
    "great_expectations",
    "kedro",
    "kedro_datasets",
)
CUSTOM = "custom"
MASK = "*****"
COMMAND_EVENT = "CLI command"
SESSION_EVENT = "Kedro Project Statistics"

HOOK_SWITCH = "DISABLE_HOOKS_FOR_PLUGINS"  # Kedro's, in `settings.py`
PLUGIN_NAME = "kedro-telemetry"  # also the name of the entry points
SESSION_PLUGIN_NAME = "kedro-telemetry-session"  # in a session's hook manager

Properties = dict[str, Any]  # `_for_heap` leaves out those that are None

logger = logging.getLogger(__name__)
_cli_hook = HookimplMarker("kedro_cli")
_session_hook = HookimplMarker("kedro")


# The hooks, in the order in which Kedro calls them


class KedroTelemetryHook:
    """Reports each command, and each session that no command's report covers.

    The hooks raise only what the user's signal handlers raise, such as Ctrl-C's
    KeyboardInterrupt. Any other exception would end the command with a traceback.
    """

    def __init__(self) -> None:
        # pluggy takes the plugin's name from here. Without it, sessions of a project
        # with a vendored copy would end in a ValueError: Kedro registers the copy from
        # HOOKS, and pluggy would then register it again from the entry point. It skips
        # an entry point whose name is taken.
        self.__name__ = PLUGIN_NAME
        # The command that is running. With click's `standalone_mode=False`, as in some
        # tests and services, Kedro does not say when it ends: it stays here, and later
        # sessions of its project count as its own.
        self._command_report: _Report | None = None

    @_cli_hook
    def before_command_run(self, project_metadata: Any, command_args: Any) -> None:
        """Remember the command, and add `kedro telemetry` before click looks it up."""
        self._command_report = None
        with _suppress_and_log("Reading the command"):
            words = [str(word) for word in command_args]
            if words[:1] != ["telemetry"]:  # `kedro telemetry` itself sends no event
                project_path = getattr(project_metadata, "project_path", None)
                self._command_report = _Report(words, project_path)
        with _suppress_and_log("Adding kedro telemetry"):
            _add_telemetry_command(is_in_project=project_metadata is not None)

    @_session_hook
    def after_context_created(self, context: Any) -> None:
        """Register a report with the session's own hook manager.

        Kedro does not say which session a catalog belongs to, and a web service may run
        sessions of several projects at once. Each hook manager belongs to one session
        and gets only that session's catalogs.
        """
        with _suppress_and_log("Reading the session"):
            hook_manager = context._hook_manager
            # `kedro server start` creates a context per request within a session.
            if hook_manager.has_plugin(SESSION_PLUGIN_NAME):
                return
            report = self._command_report
            if report is None or not report.may_have_opened(context.project_path):
                report = _Report(None, context.project_path)
            # A command that runs outside projects may open one that an option names.
            report.project_path = report.project_path or context.project_path
            hook_manager.register(report, SESSION_PLUGIN_NAME)

    @_cli_hook
    def after_command_run(self) -> None:
        """Report the command, unless one of its sessions has sent the report."""
        report = self._command_report
        self._command_report = None
        if report is None:
            return
        # The command itself has ended, and Ctrl-C must not change its exit status.
        with suppress(KeyboardInterrupt):
            report.send(COMMAND_EVENT)


class _Report:
    """Something to report once: a command with its sessions, or a session on its own.

    It has no lock, because a lock can be neither copied nor pickled, and people copy
    and pickle sessions along with their plugins.
    """

    def __init__(self, words: list[str] | None, project_path: Path | None) -> None:
        self.words = words  # None for a session on its own
        self.project_path = project_path  # None outside projects
        self._is_sent = False

    def may_have_opened(self, project_path: Path) -> bool:
        """Return whether this command may have opened a session at this path."""
        return (
            self.project_path is None
            or os.path.realpath(self.project_path) == os.path.realpath(project_path)
            # kedro-auto-catalog passes a package name as the path. A path without a
            # project cannot be that of another project.
            or not Path(project_path, "pyproject.toml").exists()
        )

    @_session_hook
    def after_catalog_created(self, catalog: Any) -> None:
        """Report the session, with the catalog as Kedro created it.

        pluggy calls the last registered hook first, so this one runs before those of
        the user and of other plugins, which may add datasets.
        """
        self.send(SESSION_EVENT, catalog)

    def send(self, event_name: str, catalog: Any = None) -> None:
        """Send an event on the first call only, whether or not Heap receives it."""
        if not self._is_sent:
            self._is_sent = True
            _send(_Event(event_name, self.project_path, {}, self.words, catalog))


telemetry_hook = KedroTelemetryHook()


# The functions that other packages call. Kedro-Viz and Kedro's VS Code extension import
# the private ones; kedro-skills and other plugins import `send_telemetry_event`


def send_telemetry_event(
    event_name: str,
    properties: Properties | None = None,
    project_path: Path | None = None,
) -> bool:
    """Send another Kedro plugin's event, if the user's consent allows it.

    Args:
        event_name: The name of the event, such as `kedro_skills_install`.
        properties: The event's own properties, without personal data. Properties
            that every event has take precedence.
        project_path: The root of the project that the event belongs to, if any.

    Returns:
        True if Heap has accepted the event. The function waits at most two seconds.

    It may print the notice, and store an identity or a project id. It raises only what
    the user's signal handlers raise, such as Ctrl-C's KeyboardInterrupt.
    """
    own = {} if properties is None else properties
    return _send(_Event(event_name, project_path, own))


def _check_for_telemetry_consent(project_path: Path | None) -> bool | None:
    """Return True if consent is granted, False if denied, None if undecided."""
    return _find_consent(project_path).decision


def _get_or_create_uuid() -> str:
    """Return the user's identity, or "" if consent is denied or none can be stored."""
    if _check_for_telemetry_consent(None) is False:
        return ""
    _store_missing_identity()
    return _stored_identity()


def _get_heap_app_id() -> str:
    """Return Kedro's app id at Heap, or the one for tests of Kedro."""
    return os.environ.get("HEAP_APPID_DEV", APP_ID)


def _get_project_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """Return the properties that every event has, creating a missing project id.

    Kedro's VS Code extension adds them to its own events. After a denial, no project id
    is created and `project_id` is omitted.
    """
    with _suppress_and_log("Reading the project"):
        project = _Project(project_path)
        project_id = None
        if _check_for_telemetry_consent(project_path) is not False:
            _store_missing_project_id(project)
            # Read anew, because another process may have stored its id meanwhile.
            project_id = _hashed_project_id(_Project(project_path))
        return _for_heap(_base_properties(user_uuid, project, project_id))
    return {}


def _is_valid_syntax(telemetry: Any) -> bool:
    """Return whether a parsed `.telemetry` has a decision, for Kedro-Viz 7 to 9."""
    return isinstance(telemetry, dict) and isinstance(telemetry.get("consent"), bool)


def __getattr__(name: str) -> Any:
    """Return Kedro's `ProjectMetadata`, which kedro-databricks imports from here."""
    if name != "ProjectMetadata":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kedro.framework.startup import ProjectMetadata

    return ProjectMetadata


# The entry points of every release, and other packages, import the submodules `plugin`
# and `api`. A vendored copy takes their names. Otherwise Kedro would also load the
# installed release for its entry points, and a command with a session would be two
# events. Kedro imports a project's settings, and with them the copy, before any
# plugins. A release that was imported even earlier keeps the names, because other
# modules may use it.
plugin = api = sys.modules[__name__]  # `mock.patch` looks them up as attributes
if "kedro_telemetry.plugin" not in sys.modules:
    sys.modules["kedro_telemetry"] = plugin
    sys.modules["kedro_telemetry.plugin"] = plugin
    sys.modules["kedro_telemetry.api"] = plugin


# The function that every event goes through


class _Event:
    """What an event is made of."""

    def __init__(
        self,
        name: str,
        project_path: Path | None,
        properties: Properties,
        words: list[str] | None = None,
        catalog: Any = None,
    ) -> None:
        self.name = name
        self.project_path = project_path  # None outside projects
        self.properties = properties  # another plugin's
        self.words = words  # a command's arguments, if any
        self.catalog = catalog  # a session's, if any


def _send(event: _Event) -> bool:
    """Send an event if consent allows it; return True if Heap has accepted it.

    If something fails, the event is lost and the command never sees the error. The wait
    is outside the `try`, so whatever a signal handler raises then reaches the caller.
    """
    try:
        post = _start_post(event)
    except Exception as error:
        _log("An event was lost: %s", type(error).__name__)
        return False
    return post is not None and _wait_for(post)


def _start_post(event: _Event) -> _Post | None:
    """Start posting an event in the background; return None if it is not to be sent.

    It may also print the event or the notice, and store missing ids.
    """
    if _is_shell_completion():
        return None
    # Called by this name, which Kedro's own tests patch so that nothing is sent.
    decision = _check_for_telemetry_consent(event.project_path)
    if _is_debug_mode():
        _print_for_debugging(event, decision)
        return None
    if decision is False:
        return None
    if _back_off_end() is not None:
        _log("An event was skipped: Heap did not answer the last one in time")
        return None
    if decision is None:
        _show_notice()
    post = _Post(_create_body(event))
    post.start()
    return post


def _is_shell_completion() -> bool:
    """Return whether click is completing a command line in a shell, as after TAB.

    click names the variable after the program, such as `_KEDRO_COMPLETE`, or
    `_KD_COMPLETE` for a user's script named `kd`.
    """
    return any(
        value and name.startswith("_") and name.endswith("_COMPLETE")
        for name, value in os.environ.items()
    )


def _is_debug_mode() -> bool:
    return bool(os.environ.get("KEDRO_TELEMETRY_DEBUG"))


def _print_for_debugging(event: _Event, decision: bool | None) -> None:
    """Print an event, or why it is not sent. Store nothing."""
    if decision is False:
        text = f"sends nothing: {_find_consent(event.project_path).reason}"
    else:
        text = f"would send:\n{json.dumps(_create_body(event), indent=2)}"
    click.echo(_printable(f"kedro-telemetry {text}"), err=True)


def _log(message: str, *args: object) -> None:
    """Log at DEBUG level, which is shown only on request."""
    # Kedro's RichHandler reads brackets as markup unless `extra` turns that off, and
    # raises SystemExit if standard output is closed (`kedro run | head`).
    with suppress(Exception, SystemExit):
        logger.debug(message, *args, extra={"markup": False})


def _printable(text: str) -> str:
    """Return a text that can be printed anywhere: `Jos\\xe9` where output is ASCII.

    Paths that are not UTF-8 cannot be printed as they are. `click.format_filename` does
    not help: before click 8.1.4, it returns them unchanged. Standard error has the same
    encoding.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def _suppress_and_log(what: str) -> Iterator[None]:
    """Suppress an exception and log only its type: its text may name a path."""
    try:
        yield
    except Exception as error:
        _log("%s failed: %s", what, type(error).__name__)


# Files: helpers to read and write them


def _home() -> Path:
    """Return the user's home folder, such as `/home/alice`.

    Raises OSError if there is none, as with some services.
    """
    home = os.path.expanduser("~")
    # `expanduser` turns an empty HOME into "/", which is nobody's home.
    if os.environ.get("HOME") == "" or not os.path.isabs(home):
        raise OSError("there is no home folder")
    return Path(home)


def _decision_file() -> Path:
    """Return the path of the user's own decision, which counts for all projects.

    It ignores XDG_CONFIG_HOME: VS Code from Flatpak sets that variable, tox and cron
    unset it, and a denial would not count there. Raises OSError if there is no home
    folder.
    """
    return _home() / ".config/kedro/.telemetry"


def _user_file(name: str) -> Path:
    """Return the path of a file in the folder that kedro-telemetry 0.9.0 uses.

    Raises OSError if the user has no home folder.
    """
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", ""), "kedro", "kedro")
    elif sys.platform == "darwin":
        folder = _home() / "Library/Application Support/kedro"
    else:
        parent = os.environ.get("XDG_CONFIG_HOME", "")
        # According to the XDG specification, an empty or relative path counts as unset.
        folder = Path(parent if os.path.isabs(parent) else _home() / ".config", "kedro")
    if not folder.is_absolute():
        raise OSError("there is no home folder")
    return folder / name


def _read(path: Path) -> bytes | None:
    """Return the content of a file, or None if there is no file.

    Raises OSError if it cannot be read, or if it is a dangling link: the target may be
    on a drive that is not mounted.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # Reading a pipe might never return.
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
        raise OSError("not a file, or too large")
    return path.read_bytes()


def _parse_toml(content: bytes) -> dict[str, Any]:
    """Return a TOML document. Raises an exception if it is not valid TOML in UTF-8."""
    import tomllib

    return tomllib.loads(content.decode())


def _table(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a table from a TOML document or table, or an empty one if missing."""
    found = parent.get(name)
    return found if isinstance(found, dict) else {}


def _write_in_place(path: Path, old: bytes | None, new: bytes) -> None:
    """Change a file's content from `old` (None: if it is absent) to `new`.

    Its owner, mode and links stay as they are, and a file that Docker mounts or that a
    colleague owns can be changed too. If `new` begins with `old`, only the rest is
    written: processes that add a project id at the same moment, such as those of 0.9.0,
    write equally many bytes to the same place, so `pyproject.toml` stays valid.

    Raises OSError if the file is read-only or has changed meanwhile, or if the disk is
    full. If writing fails, the old content is put back; a new file may stay, empty.
    """
    if old is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        old = b""
    if not path.stat().st_mode & 0o222:  # root could write to it anyway
        raise PermissionError("read-only")
    start = len(old) if new.startswith(old) else 0
    with open(path, "r+b", buffering=0) as file:
        if file.read() != old:
            raise OSError("changed meanwhile")
        try:
            file.seek(start)
            if file.write(new[start:]) < len(new) - start:
                raise OSError("no space left")
            # An editor may just have saved more after an addition, which stays.
            if start < len(old):
                file.truncate()
        except BaseException:  # such as Ctrl-C
            with suppress(OSError):
                file.seek(start)
                file.write(old[start:])
                file.truncate(len(old))
            raise


def _write_empty(path: Path) -> None:
    """Put a new empty file at `path`, even if `sudo kedro` left one owned by root."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch()


# The project: what its `pyproject.toml` says, and where its package is


class _Project:
    """A project as its `pyproject.toml` describes it when this object is created."""

    def __init__(self, path: Path | None) -> None:
        self.path = path  # None outside projects
        self.file = Path(path or "", "pyproject.toml")  # not read outside projects
        self.content: bytes | None = None  # None if it is absent or unreadable
        self.tool: dict[str, Any] = {}  # its `[tool]` table
        self.is_broken = False  # whether the file cannot be read or parsed
        if path is None:
            return
        try:
            self.content = _read(self.file)
            self.tool = _table(_parse_toml(self.content or b""), "tool")
        except Exception as error:
            self.is_broken = True
            _log("Reading pyproject.toml failed: %s", type(error).__name__)

    @property
    def kedro_table(self) -> dict[str, Any]:
        """The table that Kedro itself reads."""
        return _table(self.tool, "kedro")

    @property
    def id(self) -> Any:
        """The Kedro project's id, of any type; None if it has none."""
        if "kedro" not in self.tool:
            return None
        return _table(self.tool, "kedro_telemetry").get("project_id")

    @property
    def package(self) -> str | None:
        """The name of the project's package; None if it declares none."""
        name = self.kedro_table.get("package_name")
        return name if isinstance(name, str) else None


def _loaded_package() -> str | None:
    """Return the package of the last project that Kedro loaded, if any."""
    project = sys.modules.get("kedro.framework.project")
    return getattr(project, "PACKAGE_NAME", None)


def _package_folders(package: str) -> list[str]:
    """Return a package's folders without importing it, and without resolving links.

    uv and Bazel can fill `site-packages` with links to files that each lie in a folder
    of their own.
    """
    from importlib.util import find_spec

    module = sys.modules.get(package)
    if module is not None:
        return list(getattr(module, "__path__", []))
    # `find_spec("a.b")` would import `a`, so the other names are joined as folders.
    top, *names = package.split(".")
    spec = find_spec(top)
    roots = spec.submodule_search_locations if spec else None
    return [os.path.join(root, *names) for root in roots or []]


# Consent: whether an event may be sent at all. Each source can deny it


class _Consent:
    """A decision (True: granted, False: denied, None: undecided) and its reason."""

    def __init__(self, decision: bool | None, reason: str) -> None:
        self.decision = decision
        self.reason = reason  # with a path on a line of its own, because it may be long


NO_DECISION = _Consent(None, "on by default: no opt-out and no opt-in found")


def _find_consent(project_path: Path | None) -> _Consent:
    """Return the first denial from any source, or else the first grant."""
    found = NO_DECISION
    try:
        for consent in _consent_sources(project_path):
            if consent.decision is False:
                return consent
            if found.decision is None:
                found = consent
    except Exception as error:  # any doubt is a denial
        return _Consent(False, f"consent cannot be read ({type(error).__name__})")
    return found


def _consent_sources(project_path: Path | None) -> Iterator[_Consent]:
    """Yield each source's decision, quickest first. Add a new source here."""
    yield _environment_consent()
    for path in _consent_files(project_path):
        yield _file_consent(path)
    project = _Project(project_path)
    if project.is_broken:  # its settings might deny consent but cannot be found
        yield _Consent(False, f"this file cannot be read:\n{project.file}")
    yield from _settings_consents(project)


def _environment_consent() -> _Consent:
    for name in OPT_OUT_VARIABLES:
        if name in os.environ:  # any value opts out, even "", "0" or "false"
            return _Consent(False, f"{name} is set")
    # Kedro reads this when it loads a project. Its extension for VS Code loads none.
    if _may_name_this_plugin(os.environ.get(f"DYNACONF_{HOOK_SWITCH}", "")):
        return _Consent(False, f"DYNACONF_{HOOK_SWITCH} names {PLUGIN_NAME}")
    if os.environ.get("GITHUB_REPOSITORY_OWNER") == "kedro-org":  # Kedro's own CI
        return _Consent(False, "GITHUB_REPOSITORY_OWNER is kedro-org")
    return NO_DECISION


def _consent_files(project_path: Path | None) -> Iterable[Path]:
    """Return the `.telemetry` files that count.

    The notice in kedro-telemetry 0.9.0 asked people to put one in the current
    directory. Parent folders are not read: below an automounter (`/home`, `/net`), that
    can take a minute.
    """
    files = []
    with suppress(OSError):  # there is no home folder
        files.append(_decision_file())
    with suppress(OSError):  # the current directory has been deleted
        files.append(Path.cwd() / ".telemetry")
    if project_path is not None:
        files.append(Path(project_path, ".telemetry"))
    # Most commands run in the project root, whose file is then read only once.
    return dict.fromkeys(files)


def _file_consent(path: Path) -> _Consent:
    """Return a `.telemetry` file's decision; an unreadable file denies consent."""
    try:
        # `Set-Content -Encoding utf8` of Windows PowerShell 5 writes a byte order mark.
        decision = _parse_consent((_read(path) or b"").decode("utf-8-sig"))
    except Exception:
        return _Consent(False, f"this file cannot be read:\n{path}")
    if decision is None:
        return NO_DECISION
    verb = "grants" if decision else "denies"
    return _Consent(decision, f"this file {verb} consent:\n{path}")


def _parse_consent(text: str) -> bool | None:
    """Return True if each line of a text says `consent: true`, None if it says nothing.

    Blank lines and comments say nothing. Anything else denies consent: somebody wrote
    `DO_NOT_TRACK=1` in a `.telemetry`, and a merge conflict contains both decisions.
    """
    statements = []
    for line in re.split("[\r\n]+", text.lower()):
        statement = re.sub(r"(^|[ \t])#.*", "", line).strip(" \t")
        if statement:
            statements.append(statement)
    if not statements:
        return None
    return all(re.fullmatch(GRANT, statement) for statement in statements)


def _settings_consents(project: _Project) -> Iterator[_Consent]:
    """Yield the decisions in the settings of this project and of the loaded one.

    They differ if a packaged project runs in the folder of another, or if a web service
    serves several projects. Either may deny consent.
    """
    for package in dict.fromkeys([project.package, _loaded_package()]):
        if package is None:
            continue
        yield _imported_settings_consent(package)
        for path in _other_settings_files(package, project):
            yield _source_consent(path)


def _imported_settings_consent(package: str) -> _Consent:
    """Return the decision in settings that this process has imported, if any."""
    names = _imported_settings(package)
    for variable in OPT_OUT_VARIABLES:
        if variable in names:  # people write `DO_NOT_TRACK = True` in their settings
            file = names.get("__file__")
            return _Consent(False, f"this file names {variable}:\n{file}")
    # Kedro's own object also has what dynaconf's files and variables set.
    if package == _loaded_package():
        switch = getattr(sys.modules["kedro.framework.project"].settings, HOOK_SWITCH)
    else:
        switch = names.get(HOOK_SWITCH, ())
    if _may_name_this_plugin(switch):
        return _Consent(False, f"Kedro's setting {HOOK_SWITCH} names {PLUGIN_NAME}")
    return NO_DECISION


def _imported_settings(package: str) -> dict[str, Any]:
    """Return the names in a package's imported settings, or none.

    `getattr` and `hasattr` would run a `__getattr__` that the user has written, which
    may do anything, or claim to have any name.
    """
    module = sys.modules.get(f"{package}.settings")
    return {} if module is None else vars(module)


def _may_name_this_plugin(switch: object) -> bool:
    """Return whether a value of Kedro's hook switch may name this plugin.

    People write a tuple, or `("kedro-telemetry")`, which is a string. Some use an
    underscore. Other types, such as generators, may hide their contents.
    """
    if not isinstance(switch, list | tuple | set | frozenset | str):
        return True
    return PLUGIN_NAME in re.sub("[-_.]+", "-", str(switch).lower())


def _other_settings_files(package: str, project: _Project) -> Iterator[Path]:
    """Yield a package's possible settings files that this process has not imported.

    Kedro's VS Code extension and kedro-skills check consent in processes that load no
    project.
    """
    imported = _imported_settings(package).get("__file__")
    folders = []
    if package == project.package:  # its checkout, which may not be what is imported
        source = os.path.expanduser(str(project.kedro_table.get("source_dir", "src")))
        folders.append(os.path.join(project.path or "", source, *package.split(".")))
    if package == _loaded_package() and imported is None:
        folders += _package_folders(package)  # Kedro could not import the settings
    for folder in folders:
        for name in ("settings.py", "settings/__init__.py"):
            path = Path(folder, name)
            if imported is None or os.path.realpath(path) != os.path.realpath(imported):
                yield path


def _source_consent(path: Path) -> _Consent:
    """Return the decision in the text of settings, which is not run.

    Any mention of one of three names may be meant as an opt-out, as in
    `os.environ["DO_NOT_TRACK"]`. Comment lines do not count, because Kedro's template
    has one. `import *` may import a name from a file that is not read.
    """
    try:
        lines = (_read(path) or b"").splitlines()
    except Exception:
        return _Consent(False, f"this file cannot be read:\n{path}")
    code = b"\n".join(line for line in lines if not line.lstrip().startswith(b"#"))
    for name in (*OPT_OUT_VARIABLES, HOOK_SWITCH):
        if re.search(rf"\b{name}\b".encode(), code):
            return _Consent(False, f"this file names {name}:\n{path}")
    if re.search(rb"\bimport[\s\\]*\*", code):
        return _Consent(False, f"this file imports *:\n{path}")
    return NO_DECISION


# The notice: for people who have made no decision yet


_unshown_notices = [NOTICE]  # what this process has not shown yet


def _show_notice() -> None:
    """Print the notice once in a process, unless somebody has already seen it.

    It is never printed on CI machines: Azure Pipelines may fail a job that writes to
    standard error. The log of a web service would get it for each session. (There is no
    lock, because Dask and Ray could not pickle a vendored copy with one.)
    """
    if _is_ci_env() or not _unshown_notices:
        return
    with _suppress_and_log("Finding out whether the notice was seen"):
        if _user_file("telemetry.notice").exists():
            return
    # Standard error may be full or closed; pythonw and services have none.
    with _suppress_and_log("Showing the notice"):
        click.echo(_unshown_notices.pop(), err=True)
        # With `2> /dev/null`, or in a scheduled job, nobody has seen it.
        is_notebook = type(sys.stderr).__module__.startswith("ipykernel.")
        if is_notebook or sys.stderr.isatty():
            _write_empty(_user_file("telemetry.notice"))


# Ids: random numbers that link the events of a user and of a project


def _may_create_ids() -> bool:
    """Return whether missing ids may be stored.

    Each new CI container would otherwise count as a user. CI checkouts must not change,
    and debug mode stores nothing.
    """
    return not (_is_ci_env() or _is_debug_mode())


def _store_missing_identity() -> None:
    """Store a new identity if the user has none and may get one."""
    from uuid import uuid4

    with _suppress_and_log("Storing the identity"):
        path = _user_file("telemetry.toml")
        content = _read(path)
        if not _identity_in(content) and _may_create_ids():
            # Only this plugin writes the file, so one without an identity is replaced.
            text = f'[telemetry]\nuuid = "{uuid4().hex}"\n'
            _write_in_place(path, content, text.encode())


def _stored_identity() -> str:
    """Return the user's identity, or "" if none is stored."""
    with _suppress_and_log("Reading the identity"):
        return _identity_in(_read(_user_file("telemetry.toml")))
    return ""


def _identity_in(content: bytes | None) -> str:
    """Return the UUID in `telemetry.toml` as 32 hex digits, or "" if none is valid."""
    from uuid import UUID

    try:
        document = _parse_toml(content or b"")
        return UUID(str(_table(document, "telemetry").get("uuid"))).hex
    except (ValueError, RecursionError):  # the latter if it is nested too deeply
        return ""


def _store_missing_project_id(project: _Project) -> None:
    """Add a table with a new id to the end of a Kedro project's `pyproject.toml`.

    A file that already has the table is left unchanged.
    """
    from uuid import uuid4

    content = project.content
    if content is None or "kedro" not in project.tool:
        return
    if "kedro_telemetry" in project.tool or not _may_create_ids():
        return
    newline = "\r\n" if b"\r\n" in content else "\n"
    lines = ("", "[tool.kedro_telemetry]", f'project_id = "{uuid4().hex}"', "")
    edited = content + newline.join(lines).encode()  # as 0.9.0 writes them
    with _suppress_and_log("Storing a project id"):
        _parse_toml(edited)  # raises if an inline `tool = {...}` allows no more tables
        _write_in_place(project.file, content, edited)


def _hashed_project_id(project: _Project) -> str | None:
    """Return the hash of a project's id and package; None if the project has no id."""
    from hashlib import sha512

    if project.id is None:
        return None
    # 0.9.0 hashes this text if Kedro has loaded no project. Otherwise, the declared
    # name comes first, because a web service may have loaded another project since.
    loaded = _loaded_package()
    package = (project.package or loaded) if loaded else "undefined_package_name"
    return sha512(f"{project.id}{package}".encode()).hexdigest()


# Properties: what an event reports


def _create_body(event: _Event) -> dict[str, Any]:
    """Return an event as Heap receives it, storing missing ids if that is allowed."""
    project = _event_project(event)
    _store_missing_identity()
    _store_missing_project_id(project)
    properties = dict(event.properties)
    if event.words is not None:
        with _suppress_and_log("Masking the command"):
            masked = _mask(event.words)
            properties["command"] = " ".join(["kedro", *masked])
            properties["main_command"] = masked[0] if masked else "kedro"
    if event.catalog is not None:
        properties |= _session_properties(event.catalog, project)
    # The ids are read last, because other processes may have stored theirs meanwhile.
    identity = _stored_identity()
    project_id = _hashed_project_id(_Project(project.path))
    properties |= _base_properties(identity, project, project_id)
    return {
        "app_id": _get_heap_app_id(),
        "event": str(event.name)[:LONGEST_TEXT],
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "identity": identity or "missing_user_identity",
        "properties": _for_heap(properties),
    }


def _event_project(event: _Event) -> _Project:
    """Return the project that an event is about.

    A packaged project may run in the folder of another project, which Kedro then gives
    as its path. Such an event must not have the id and tools of that other project.
    """
    project = _Project(event.project_path)
    if event.name not in (COMMAND_EVENT, SESSION_EVENT):
        return project  # other plugins name the project, and may not load it
    is_another_loaded = _loaded_package() not in (None, project.package)
    if is_another_loaded and project.package not in sys.modules:
        return _Project(None)
    return project


def _for_heap(properties: Properties) -> Properties:
    """Return properties as Heap accepts them, omitting those that are None.

    Other plugins may pass any value. What is not a number becomes text, and so do
    infinity, NaN and integers too large for a float.
    """
    accepted: Properties = {}
    for key, value in properties.items():
        if value is None:
            continue
        with _suppress_and_log("Converting a property"):  # `str()` of a huge int fails
            is_number = isinstance(value, int | float)
            is_kept = is_number and abs(value) <= sys.float_info.max
            text = str(value)[:LONGEST_TEXT]
            accepted[str(key)[:LONGEST_TEXT]] = value if is_kept else text
    return accepted


def _base_properties(
    user_uuid: str, project: _Project, project_id: str | None
) -> Properties:
    """Return the properties that every event has. Add a new one here."""
    example = project.kedro_table.get("example_pipeline")  # a boolean, or one as text
    return {
        "username": user_uuid,
        "project_version": _kedro_version(),
        "telemetry_version": __version__,
        "python_version": sys.version,
        "os": sys.platform,
        "is_ci_env": _is_ci_env(),
        "tools": _public_tools(project.kedro_table.get("tools", "")),
        "example_pipeline": example if str(example) in ("True", "False") else None,
        "project_id": project_id,
    }


def _kedro_version() -> str | None:
    """Return Kedro's version; None if Kedro cannot be imported."""
    # Kedro raises an exception on a Python that it does not support yet.
    with _suppress_and_log("Importing Kedro"):
        from kedro import __version__ as version

        return version
    return None


def _is_ci_env() -> bool:
    values = [os.environ.get(name, "") for name in CI_VARIABLES]
    return any(value.lower() not in ("", "0", "false") for value in values)


def _public_tools(written: object) -> str | None:
    """Return the Kedro tools that an array names; None if it names none.

    Kedro writes the array as a string: `"['Linting', 'Testing']"`. People add client
    names, which must not be sent.
    """
    names = [name.strip() for name in re.split(r"[\[\],'\"]", str(written))]
    return ", ".join(name for name in names if name in KEDRO_TOOLS) or None


def _session_properties(catalog: Any, project: _Project) -> Properties:
    """Return a session's properties. Add a new one here.

    A later Kedro version may drop a private name that one count uses. The other counts
    are still sent.
    """
    properties: Properties = {}
    with _suppress_and_log("Counting the datasets"):
        properties["number_of_datasets"] = len(_dataset_names(catalog))
    with _suppress_and_log("Counting the pipelines"):
        properties |= _pipeline_counts(project)
    with _suppress_and_log("Counting the types of datasets"):
        properties |= _dataset_type_counts(catalog)
    with _suppress_and_log("Counting the validators"):
        properties |= _validator_counts(catalog)
    return properties


def _dataset_names(catalog: Any) -> list[str]:
    """Return the names of a catalog's datasets, excluding parameters."""
    names = catalog.keys() if hasattr(catalog, "keys") else catalog.list()  # Kedro < 1
    return [n for n in names if n != "parameters" and not str(n).startswith("params:")]


def _pipeline_counts(project: _Project) -> Properties:
    """Count pipelines and nodes if Kedro has loaded all of them.

    Loading them runs the user's code, which may be slow, print or raise. Kedro keeps
    only the pipelines of the last project that it loaded.
    """
    from kedro.framework.project import pipelines

    # `project.package` is None for a packaged project: see `_event_project`.
    if project.package not in (None, _loaded_package()):
        return {}
    # Since Kedro 1.5, `kedro run --pipelines x` loads only x.
    requested = getattr(pipelines, "_requested_pipelines", None)
    if requested or not pipelines._is_data_loaded:
        return {}
    properties: Properties = {}
    # A registry may return anything. Without `__default__`, it still has a number.
    with _suppress_and_log("Counting the nodes"):
        properties["number_of_pipelines"] = len(pipelines._content)
        properties["number_of_nodes"] = len(pipelines._content["__default__"].nodes)
    return properties


def _dataset_type_counts(catalog: Any) -> Properties:
    """Count datasets by public type, which catalogs can report since Kedro 1.0."""
    if not hasattr(catalog, "get_type"):
        return {}
    configs = getattr(getattr(catalog, "config_resolver", None), "config", {})
    declared_type = cache(_declared_type)  # a catalog declares few types many times
    counts: Counter[str] = Counter()
    for name in _dataset_names(catalog):
        found = CUSTOM
        # An entry may be broken.
        with _suppress_and_log("Finding the type of a dataset"):
            if name in configs:
                found = declared_type(configs[name]["type"])
            else:  # the user's code added it, so its class is already imported
                found = _public_type(catalog.get_type(name))
        counts[f"dataset_type_count.{found}"] += 1
    return dict(counts)


def _public_type(class_name: object) -> str:
    """Return the full name of a Kedro or kedro-datasets class, or else CUSTOM."""
    name = str(class_name)
    return name if re.fullmatch(PUBLIC_CLASS, name) else CUSTOM


def _declared_type(declared: str | type) -> str:
    """Return the full name of a public class that a catalog declares, or else CUSTOM.

    `catalog.get_type` would import the class, and with it pandas, Spark or TensorFlow,
    even for a run that does not use it.
    """
    if isinstance(declared, type):
        return _public_type(f"{declared.__module__}.{declared.__qualname__}")
    for prefix in ("kedro.io.", "kedro_datasets.", ""):  # in Kedro's order
        found = _class_in_sources(prefix + declared)
        if found is not None:
            return found
    return CUSTOM


def _class_in_sources(dotted_name: str) -> str | None:
    """Return the full name of a public class in the source files; None if not found."""
    match = re.fullmatch(PUBLIC_CLASS, dotted_name)
    if match is None:
        return None
    package, module, name = match.groups()
    for folder in _package_folders(package):
        for file in Path(folder).glob(f"{module or '*'}.py"):
            if f"\nclass {name}(".encode() in file.read_bytes():
                return f"{package}.{file.stem}.{name}"
    return None


def _validator_counts(catalog: Any) -> Properties:
    """Count validators by public library; Kedro has had them since 1.6."""
    specs = getattr(catalog, "validator_specs", None) or {}
    counts: Counter[str] = Counter()
    for spec in specs.values():
        library = str(getattr(spec, "class_path", "")).partition(".")[0]
        name = library if library in PUBLIC_VALIDATORS else CUSTOM
        counts[f"validator_type_count.{name}"] += 1
    return {"number_of_validated_datasets": len(specs), **counts} if specs else {}


# Masking: which words of a command may be sent


def _mask(words: list[str]) -> list[str]:
    """Mask each word that neither Kedro nor an installed plugin defines.

    Commands, the last command's option names and Kedro's own starters stay readable:
    `run --env=local` becomes `run --env *****`.
    """
    commands = _known_commands(words)
    options = _option_names(commands)
    rest = _split_at_equals_sign(words[len(commands) :], options)
    if not commands and rest and rest[0] not in options:
        return [MASK]  # a project's own command, or a typo
    masked = words[: len(commands)]
    for previous, word in pairwise(["", *rest]):  # each word and the one before it
        is_starter = previous in options and _is_official_starter(previous, word)
        masked.append(word if word in options or is_starter else MASK)
    return masked


def _known_commands(words: list[str]) -> list[Any]:
    """Return the public commands that `words` begins with, outermost first."""
    commands: list[Any] = []
    groups: Iterable[Any] = _public_groups()
    for word in words:
        command = None if word.startswith("-") else _find_command(groups, word)
        if command is None:
            break
        commands.append(command)
        groups = [command] if _is_group(command) else []
    return commands


def _is_group(thing: object) -> bool:
    """Return whether an object is a group of commands.

    Its class does not tell: `rich_click.patch` can replace `click.Group` at any time.
    """
    return hasattr(thing, "get_command") and not isinstance(thing, type)


def _public_groups() -> Iterator[Any]:
    """Yield Kedro's command groups, then those of plugins that Kedro has loaded."""
    from importlib.metadata import entry_points

    from kedro.framework.cli import cli as cli_module

    # All of Kedro's groups are in this module. A look-up may import, and add a name.
    for variable in list(vars(cli_module).values()):
        if _is_group(variable):
            yield variable
    for name in ("kedro.global_commands", "kedro.project_commands"):
        for entry_point in entry_points(group=name):
            if entry_point.module not in sys.modules:
                continue  # Kedro could not import it
            with suppress(Exception):  # the module may lack the name
                yield entry_point.load()


def _find_command(groups: Iterable[Any], name: str) -> Any:
    """Return the public command `name` from one of `groups`; None if none has it."""
    for group in groups:
        try:
            command = group.get_command(click.Context(group), name)
            # click-default-group resolves any unknown word to its default command.
            if command and command.name == name and _is_public(command, group):
                return command
        except (Exception, SystemExit) as error:
            # A plugin may import its command only now, and call `sys.exit`.
            _log("Looking up a command failed: %s", type(error).__name__)
    return None


def _is_public(command: Any, group: Any) -> bool:
    """Return whether Kedro or a plugin, rather than the project, defines a command.

    A project may add commands to Kedro's groups from any module, and may reuse one of
    Kedro's functions as a callback. In a plugin's group, all commands are public except
    those of the project's package.
    """
    file = _source_file(command)
    if _is_in_package(_source_file(group), "kedro"):
        return _is_in_package(file, "kedro") and _is_named_in_its_module(command)
    return file is not None and not _is_in_package(file, _loaded_package())


def _is_named_in_its_module(command: Any) -> bool:
    """Return whether a command is a global name of its function's module."""
    module = sys.modules.get(unwrap(command.callback).__module__)
    return any(command is value for value in vars(module).values())


def _source_file(command: Any) -> Path | None:
    """Return the file that contains a command's code; None if there is none.

    `__module__` does not say who defines a command: kedro-databricks has modules named
    `run` and `init`.
    """
    code = getattr(unwrap(command.callback), "__code__", None)
    file = Path(getattr(code, "co_filename", ""))
    return file if file.is_file() else None


def _is_in_package(file: Path | None, package: str | None) -> bool:
    """Return whether a file belongs to a package."""
    if file is None or package is None:
        return False
    return any(file.is_relative_to(folder) for folder in _package_folders(package))


def _option_names(commands: list[Any]) -> set[str]:
    """Return the option names of the last command, or of `kedro` itself."""
    from kedro.framework.cli.cli import cli

    command = commands[-1] if commands else cli
    names = {"-h", "--help"}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            names.update(parameter.opts, parameter.secondary_opts)
    return names


def _split_at_equals_sign(words: list[str], options: set[str]) -> list[str]:
    """Split each `--option=value` into two words."""
    split = []
    for word in words:
        option, equals_sign, value = word.partition("=")
        split += [option, value] if equals_sign and option in options else [word]
    return split


def _is_official_starter(option: str, value: str) -> bool:
    """Return whether `value` is one of Kedro's own starters, not a plugin's."""
    if option not in ("-s", "--starter"):
        return False
    starters = sys.modules.get("kedro.framework.cli.starters")
    specs = getattr(starters, "_OFFICIAL_STARTER_SPECS_DICT", None)
    specs = specs or getattr(starters, "_OFFICIAL_STARTER_SPECS", {})  # Kedro 0.18
    return value in specs and specs[value].origin == "kedro"


# Posting: one event goes to Heap, and a command waits briefly for the answer


class _Post(threading.Thread):
    """Posts an event in a daemon thread, because any step of it can hang.

    Name look-ups and reading certificates have no timeout. The thread does not log or
    load modules, because either can abort the process while Python shuts down: its
    functions import only what `__init__` has loaded.
    """

    # When this process began its back-off, in seconds since the epoch. It applies if
    # `_write_back_off` cannot write its file, for example in a read-only home folder.
    back_off_start = 0.0

    def __init__(self, body: dict[str, Any]) -> None:
        from contextvars import Context
        from importlib import import_module

        super().__init__(daemon=True)
        # Without this, Sentry would add the request to the trace in the user's context.
        self.empty_context = Context()
        self.identity = body["properties"]["username"]  # "" if there is none
        self.content = json.dumps(body)
        self.status: int | None = None  # None until Heap has answered
        self.outcome = "no answer in time"
        # Modules for the functions below, and the codec of host names
        for name in ("encodings.idna", "http.client", "ssl", "urllib.request"):
            import_module(name)
        with suppress(ImportError):  # only Windows has it, for `getproxies`
            import_module("winreg")
        self.certifi_file = _find_certifi_file()
        self.start_time = time.monotonic()

    def run(self) -> None:
        try:
            # If the user has reset SIGPIPE to its default, for `| head`, a connection
            # that Heap closes would end the process. Otherwise Python ignores SIGPIPE,
            # and no mask is set: gevent would leave it in the main thread.
            with suppress(AttributeError):  # Windows has no such signal
                if signal.getsignal(signal.SIGPIPE) != signal.SIG_IGN:
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
            self.status = self.empty_context.run(_request_status, self)
        # In tests, a stand-in for the network may raise SystemExit or pytest's Failed.
        # If either left the thread, it would fail a suite that runs with `-W error`.
        except BaseException as error:
            from urllib.error import URLError

            # urllib wraps most errors. Their text may contain a proxy password.
            cause = error
            if isinstance(error, URLError) and isinstance(error.reason, Exception):
                cause = error.reason
            self.outcome = type(cause).__name__


def _wait_for(post: _Post) -> bool:
    """Wait for Heap until the deadline; return True if it has accepted the event.

    A firewall that drops packets must not delay every command. So a wait that ends
    without an answer after a quarter of the deadline (half a second), by a failure or
    Ctrl-C too, starts the back-off. A slow answer does not.
    """
    try:
        post.join(DEADLINE)
    finally:  # Ctrl-C and the user's own signal handlers can end the wait
        # Not `post.is_alive()`, which is wrong after Ctrl-C on CPython 3.11 and 3.12.
        # This is read once, because the thread may still set it.
        status = post.status
        with _suppress_and_log("Ending the wait for Heap"):
            if status is None and time.monotonic() - post.start_time > DEADLINE / 4:
                _write_back_off()
            # People publish their logs, which must not identify them.
            content = post.content
            if post.identity:
                content = content.replace(post.identity, MASK)
            _log("Post of %s: %s", content, status or post.outcome)
    return status == ACCEPTED


def _request_status(post: _Post) -> int:
    """Post an event and return the answer's status, without following redirects.

    `urlopen` would do the same in one call through an OpenerDirector, but OpenTelemetry
    wraps that, records a span and waits for the user's exporter. So this calls the same
    handlers itself: `ProxyHandler.proxy_open`, which applies a proxy to the request,
    and `HTTPSHandler.do_open`, which posts it.
    """
    from ssl import SSLCertVerificationError
    from urllib.error import URLError
    from urllib.request import HTTPSHandler

    request = _create_request(post.content.encode())
    connection_class = _create_connection_class()
    failure = URLError("")  # replaced below, because there is always a context
    for context in _ssl_contexts(post.certifi_file):
        # People set `HTTPConnection.debuglevel = 1`, which prints to standard output.
        handler = HTTPSHandler(debuglevel=0, context=context)
        try:
            with handler.do_open(connection_class, request, context=context) as answer:
                return answer.status
        except URLError as error:
            if not isinstance(error.reason, SSLCertVerificationError):
                raise
            failure = error
    raise failure


def _create_request(content: bytes) -> Any:
    """Return the request, routed through the proxy that urllib finds.

    `ALL_PROXY` also counts, as in the requests library. Raises NotImplementedError for
    a SOCKS proxy, because its users want no direct connections, not even name look-ups.
    """
    from urllib.request import ProxyHandler, Request, getproxies

    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"kedro-telemetry/{__version__}",
    }
    request = Request(ENDPOINT, content, headers)
    # The limit for each operation of a socket, so that the thread ends by itself soon.
    request.timeout = 2 * DEADLINE
    proxies = getproxies()
    proxy = proxies.get("https") or proxies.get("all") or ""
    if proxy:
        ProxyHandler({}).proxy_open(request, proxy, "https")
    is_proxied = request.host != request.origin_req_host  # False if NO_PROXY lists Heap
    if is_proxied and re.match(r"(?i)socks\w*://", proxy):
        raise NotImplementedError("a SOCKS proxy")
    return request


def _create_connection_class() -> Any:
    """Return a connection class that sends only the plugin's own headers.

    Sentry and OpenTelemetry add headers that describe the user's project. Raises
    NotImplementedError if another library has replaced http.client's connections: vcrpy
    records what they send in the user's cassettes.
    """
    from http.client import HTTPSConnection

    if HTTPSConnection.__module__ != "http.client":
        raise NotImplementedError("another library's connections")

    class Connection(HTTPSConnection):
        def putheader(self, header: str | bytes, *values: Any) -> None:
            if header in HEADERS:
                super().putheader(header, *values)

    return Connection


def _ssl_contexts(certifi_file: str | None) -> Iterator[Any]:
    """Yield contexts for verifying Heap: a quick one, then a thorough one.

    The first trusts a folder of hashed certificates, such as Debian's, from which
    OpenSSL reads only the authority that it needs. Reading them all takes 20 ms or
    more. The folder may contain only a company's authority, so the second trusts
    everything that the platform trusts.
    """
    import ssl

    paths = ssl.get_default_verify_paths()
    folders = os.environ.get("SSL_CERT_DIR") or paths.openssl_capath
    hashed_file = _find_hashed_file(folders)
    if hashed_file is not None:
        # If the folder is on a share that hangs, the thread must hang here and not
        # inside OpenSSL: see `_trust_file`.
        _read_certificates(hashed_file)
        yield _create_context(folders)
    context = _create_context(folders)
    if sys.platform == "win32":  # it has its own certificate store
        context.load_default_certs()
    _trust_file(context, os.environ.get("SSL_CERT_FILE") or paths.openssl_cafile)
    if hashed_file is None and certifi_file and _needs_certifi(context):
        _trust_file(context, certifi_file)
    yield context


def _find_hashed_file(folders: str) -> str | None:
    """Return a file with a name such as `1a2b3c4d.0`, which OpenSSL looks up.

    `dotnet dev-certs` asks people to set SSL_CERT_DIR to a list of folders.
    """
    for folder in folders.split(os.pathsep):
        with suppress(OSError):  # skip a folder that cannot be listed
            for name in os.listdir(folder):
                if re.fullmatch(r"[0-9a-f]{8}\.0", name):
                    return os.path.join(folder, name)
    return None


def _create_context(folders: str) -> Any:
    """Return a context that trusts the hashed certificates in the given folders.

    Companies may trust only an intermediate authority, which is enough with this flag,
    a default since 3.13. `ssl.create_default_context` would then also set
    VERIFY_X509_STRICT, which rejects Zscaler's certificates.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(capath=folders)
    return context


def _trust_file(context: Any, path: str) -> None:
    """Make a context trust the certificates in a file, up to a broken one.

    The process can crash if it ends while a thread is inside OpenSSL (CPython issue
    114653). With `cadata`, OpenSSL reads no file and Python keeps its lock (the GIL),
    so the process cannot end meanwhile.
    """
    # OSError includes SSLError, after a broken certificate; ValueError: there is none
    with suppress(OSError, ValueError):
        context.load_verify_locations(cadata=_read_certificates(path))


def _read_certificates(path: str) -> str:
    """Return a certificate file's text, or "" if it cannot be read.

    Reading may hang for ever. The process can end meanwhile, because the thread is
    inside Python's own `open` or `read`.
    """
    with suppress(OSError), open(path, "rb") as file:
        return file.read(LARGEST_FILE).decode("ascii", "ignore")
    return ""


def _find_certifi_file() -> str | None:
    """Return the path of certifi's certificates; None if it is not installed.

    `certifi.where()` would import `importlib.resources`.
    """
    with suppress(Exception):  # it is not installed, or has another form
        return os.path.join(_package_folders("certifi")[0], "cacert.pem")
    return None


def _needs_certifi(context: Any) -> bool:
    """Return whether a context trusts nothing, and no variable says what to trust.

    Python from python.org has no authorities on macOS until the user installs them.
    """
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return False
    try:
        return bool(context.cert_store_stats()["x509"] == 0)
    except NotImplementedError:  # from truststore, which asks the system
        return False


def _write_back_off() -> None:
    """Start the back-off for all the user's processes, or else for this one."""
    try:
        _write_empty(_user_file("telemetry.backoff"))
    except Exception as error:
        _Post.back_off_start = time.time()
        _log("Storing the back-off failed: %s", type(error).__name__)


def _back_off_end() -> float | None:
    """Return when the back-off ends, in seconds since the epoch; None if it is over."""
    start = _Post.back_off_start
    with suppress(OSError):  # there is no such file, or no home folder
        start = max(start, _user_file("telemetry.backoff").stat().st_mtime)
    # `abs`, because the clock of a file server may be ahead
    is_over = abs(time.time() - start) >= BACK_OFF
    return None if is_over else start + BACK_OFF


# The commands


TELEMETRY_HELP = """\
See whether telemetry is on, and opt out or in.

\b
status   Show whether telemetry is on here, and why (the default).
enable   Opt in for all your projects.
disable  Opt out for all your projects.

To opt out in an environment, set DO_NOT_TRACK or KEDRO_DISABLE_TELEMETRY."""

# Shown whether telemetry is on or off, so every line must suit both
STATUS_HELP = f"""
See an event without sending it:  KEDRO_TELEMETRY_DEBUG=1 kedro info
Opt out for all your projects:    kedro telemetry disable
Opt in for all your projects:     kedro telemetry enable
Opt out for one project:          write the line `consent: false`
                                  into the file .telemetry in its root
Read more:  {DOCUMENTATION}"""


def _run_telemetry_command(project_metadata: Any, action: str) -> None:
    """Run `kedro telemetry` with one of its three actions."""
    project_path = getattr(project_metadata, "project_path", None)
    if action == "enable":
        _opt_in(project_path)
    elif action == "disable":
        _opt_out()
    else:
        _print_status(project_path)


# Not built with click's decorators: beartype before 0.20 adds its own to their result,
# and then every command of the project fails.
_telemetry_command = click.Command(
    "telemetry",
    callback=click.pass_obj(_run_telemetry_command),
    params=[
        click.Argument(
            ["action"],
            type=click.Choice(["status", "enable", "disable"]),
            default="status",
            # Most releases of click 8 double the brackets of a choice.
            metavar="[status|enable|disable]",
        )
    ],
    help=TELEMETRY_HELP,
    epilog=f"Read more: {DOCUMENTATION}",
)


def _print_status(project_path: Path | None) -> None:
    """Print whether telemetry is on here, why, and with which ids."""
    consent = _find_consent(project_path)
    is_on = consent.decision is not False
    _print_field("Telemetry", "on here" if is_on else "off here")
    _print_field("Reason", consent.reason)
    no_id = "none yet" if is_on and _may_create_ids() else "none"
    try:
        file = _user_file("telemetry.toml")
        _print_field("Identity", f"{_stored_identity() or no_id}\n{file}")
    except OSError as error:
        _print_field("Identity", f"none, because {error}")
    if project_path is not None:
        project = _Project(project_path)
        text = no_id if project.id is None else f"{project.id} (sent as a hash)"
        _print_field("Project id", f"{text}\n{project.file}")
    _print_field("Endpoint", ENDPOINT)
    back_off_end = _back_off_end()
    if back_off_end is not None:
        end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(back_off_end))
        _print_field("Paused", f"until {end}, because Heap did not answer in time")
    click.echo(STATUS_HELP)


def _print_field(label: str, text: str) -> None:
    """Print one status field, with any further lines aligned below the first."""
    label += ":"
    click.echo(_printable(f"{label:13}" + text.replace("\n", "\n" + " " * 13)))


def _opt_in(project_path: Path | None) -> None:
    """Save the user's consent, and print what still denies it here."""
    _save_decision("true")
    consent = _find_consent(project_path)
    if consent.decision is False:
        click.echo(_printable(f"Telemetry stays off here, because {consent.reason}"))


def _opt_out() -> None:
    """Save the user's denial, and print which versions ignore it."""
    advice = "set DO_NOT_TRACK=1 in your environment."
    _save_decision("false", f"\nTo opt out instead, {advice}")
    click.echo("Versions of kedro-telemetry before 1.0 ignore this decision.")
    click.echo(f"To opt out in those versions as well, {advice}")


def _save_decision(decision: str, advice: str = "") -> None:
    """Save `consent: decision` for all the user's projects, and print where.

    Raises ClickException, whose message ends with `advice`, if it cannot be saved.
    """
    try:
        path = _decision_file()
    except OSError as error:
        message = f"Nothing has changed, because {error}.{advice}"
        raise click.ClickException(message) from error
    try:
        _write_in_place(path, _read(path), f"consent: {decision}\n".encode())
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        message = f"Nothing has changed.\nCould not save to:\n{path}\nReason: {reason}"
        raise click.ClickException(_printable(message + advice)) from error
    opted = "opted in to" if decision == "true" else "opted out of"
    click.echo(f"You have {opted} telemetry for all your projects.")
    click.echo(_printable(f"Saved to:\n{path}"))


def _add_telemetry_command(is_in_project: bool) -> None:
    """Add `kedro telemetry` to Kedro's own commands.

    In a project, a command of the same name from the project or a plugin takes
    precedence. An entry point in `kedro.global_commands` would make Kedro's own tests
    fail, because they count the groups.
    """
    from kedro.framework.cli import cli as cli_module

    name = "project_commands" if is_in_project else "global_commands"
    group = getattr(cli_module, name, cli_module.cli)  # Kedro 0.18 has one group
    group.commands.setdefault("telemetry", _telemetry_command)
