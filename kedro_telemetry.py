# SPDX-License-Identifier: Apache-2.0
"""Anonymised usage telemetry for Kedro: one event per command or session.

The module follows the life of an event. Kedro calls the hooks, and other packages call
the functions after them. Every event passes through `_send`. Then come helpers for
files and the project, and the steps of an event: consent, the notice, identity,
properties, masking and the post. The commands come last.

To vendor the module, copy it beside your project's `settings.py` and write there:

    from .kedro_telemetry import telemetry_hook

    HOOKS = (telemetry_hook,)

Keep kedro-telemetry installed, in any release: its entry points lead Kedro to the copy.
Without it, the copy reports sessions only, and there is no `kedro telemetry`.
"""

# Imports inside functions keep Kedro's start fast: what only an event needs is imported
# when there is one.
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
from contextlib import closing, contextmanager, suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from pluggy import HookimplMarker

if TYPE_CHECKING:
    from http.client import HTTPSConnection
    from ssl import SSLContext

__version__ = "1.0.0"

ENDPOINT = "https://heapanalytics.com/api/track"
APP_ID = "2388822444"
DOCUMENTATION = "https://docs.kedro.org/en/stable/about/telemetry/"
DEADLINE = 2.0  # seconds that a command waits for a post
BACK_OFF = 3600.0  # seconds without posts after one that took long and had no answer
LARGEST_FILE = 2**20  # bytes
LONGEST_TEXT = 1023  # characters that Heap accepts in a key or a value
ACCEPTED = 200  # Heap's status for an event that it has taken

NOTICE = f"""
Kedro collects anonymised usage data to improve the product.
See whether it is on here, and why:  kedro telemetry
Opt out:    kedro telemetry disable, or set DO_NOT_TRACK
Read more:  {DOCUMENTATION}"""

OPT_OUT_VARIABLES = ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY")
# A line of a `.telemetry` file that grants consent, such as `consent: true`,
# `CONSENT = yes` or `"consent": 'on'  # I agree`
GRANT = r"""(?xia)            # verbose, any case, ASCII letters only
    (["']?) consent \1        # the word, in quotes or without
    \s* [:=] \s*              # as in YAML, or as in a .env file
    (["']?) (true|yes|on|y|1) \2
    (\s+ \#.*)?               # a comment
"""
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
# Classes may be sent by name if they are in these packages, which PUBLIC_CLASS repeats.
PUBLIC_DATASETS = ("kedro.io.", "kedro_datasets.", "kedro_datasets_experimental.")
# The class of a dataset in full, such as `kedro.io.MemoryDataset`,
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
PLUGIN_NAME = "kedro-telemetry"  # of this package and of its entry points
SESSION_PLUGIN_NAME = "kedro-telemetry-session"  # in the hook manager of a session

Properties = dict[str, Any]  # a property that is None is left out of the event

logger = logging.getLogger(__name__)
_cli_hook = HookimplMarker("kedro_cli")
_session_hook = HookimplMarker("kedro")


# The hooks, in the order in which Kedro calls them


class KedroTelemetryHook:
    """Reports each command, and each session that no command's report covers.

    The hooks raise only what signal handlers raise, such as KeyboardInterrupt. Any
    other exception would make Kedro end the command with a traceback.
    """

    def __init__(self) -> None:
        # pluggy takes a plugin's name from here. A session registers a project's HOOKS
        # first, and then skips an entry point of the same name, so that a vendored copy
        # is not registered twice. Commands have no HOOKS: they use the entry point.
        self.__name__ = PLUGIN_NAME
        # None between commands, and during `kedro telemetry`
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

        Kedro does not say which session a catalog belongs to, and a web service may
        have sessions of several projects at once. A hook manager belongs to one session
        and gets only that session's catalogs.
        """
        # CI jobs and clusters that opt out by a variable should pay for nothing else.
        if _environment_consent().decision is False:
            return
        unregistered = None
        with _suppress_and_log("Reading the session"):
            report = self._assign_report(context.project_path)
            hook_manager = getattr(context, "_hook_manager", None)
            if hook_manager is None:  # the name is private; a later Kedro may drop it
                _log("The session has no hook manager")
                unregistered = report
            elif not hook_manager.has_plugin(SESSION_PLUGIN_NAME):
                # `kedro server start` creates a context for each request of a session.
                hook_manager.register(report, SESSION_PLUGIN_NAME)
        if unregistered is not None:
            unregistered.send(SESSION_EVENT)

    @_cli_hook
    def after_command_run(self) -> None:
        """Report the command, unless a session of it has been reported."""
        report = self._command_report
        self._command_report = None
        if report is None:
            return
        try:
            report.send(COMMAND_EVENT)
        except KeyboardInterrupt:
            # The command itself has ended, and Kedro must keep its exit status.
            _log("Ctrl-C ended the wait for a post")

    def _assign_report(self, project_path: Path) -> _Report:
        """Return the report that covers a session: the command's, or else a new one.

        A plugin's command that runs outside projects may open one by an option. Its
        report then gets the project's path.
        """
        report = self._command_report
        if report is None or not report.may_have_opened(project_path):
            return _Report(None, project_path)
        report.project_path = report.project_path or project_path
        return report


class _Report:
    """What is reported once: a command with its sessions, or a session on its own.

    It has no lock: people copy and pickle sessions, and so the plugins in them.
    """

    def __init__(self, words: list[str] | None, project_path: Path | None) -> None:
        self.words = words  # None for a session on its own
        self.project_path = project_path  # None outside of projects
        self._is_sent = False

    def may_have_opened(self, project_path: Path) -> bool:
        """Return whether this command may have opened a session at this path."""
        return (
            self.project_path is None
            or os.path.realpath(self.project_path) == os.path.realpath(project_path)
            # kedro-auto-catalog passes a package's name where Kedro takes a path.
            or not Path(project_path, "pyproject.toml").exists()
        )

    @_session_hook
    def after_catalog_created(self, catalog: Any) -> None:
        """Report the session, with the catalog as Kedro made it.

        pluggy calls the last registered hook first, so this one runs before the user's
        hooks, which may add datasets.
        """
        self.send(SESSION_EVENT, catalog)

    def send(self, event_name: str, catalog: Any = None) -> None:
        """Send one event, the first time only, whether or not Heap receives it."""
        if not self._is_sent:
            self._is_sent = True
            _send(_Event(event_name, self.project_path, self.words, catalog))


telemetry_hook = KedroTelemetryHook()


# The functions for other packages. Kedro-Viz and Kedro's extension for VS Code import
# the private ones, kedro-skills and other plugins `send_telemetry_event`


def send_telemetry_event(
    event_name: str,
    properties: Properties | None = None,
    project_path: Path | None = None,
) -> bool:
    """Send an event of another Kedro plugin, subject to the same consent.

    Args:
        event_name: The name of the event, such as `kedro_skills_install`.
        properties: The event's own properties, which must not be personal. Those that
            every event has take precedence.
        project_path: The root of the project that the event belongs to, if any.

    Returns:
        True if Heap has accepted the event. The function waits at most two seconds.

    It may print the notice and store a missing UUID or project id. It raises only what
    signal handlers raise, such as KeyboardInterrupt.
    """
    own = {} if properties is None else properties  # None is for Kedro's own events
    return _send(_Event(event_name, project_path, properties=own))


def _check_for_telemetry_consent(project_path: Path | None) -> bool | None:
    """Return True for granted, False for denied, None if there is no decision."""
    return _find_consent(_Project(project_path)).decision


_original_check = _check_for_telemetry_consent  # Kedro's tests replace the function


def _get_or_create_uuid() -> str:
    """Return the user's UUID, or "" if consent is denied or there can be no UUID."""
    if _check_for_telemetry_consent(None) is False:
        return ""
    return _get_or_create_identity()


def _get_heap_app_id() -> str:
    """Return the id of Kedro's application at Heap, or of one for its development."""
    return os.environ.get("HEAP_APPID_DEV", APP_ID)


def _get_project_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """Return the properties of every event, and create a missing project id.

    Kedro's extension for VS Code adds them to its own events. After a denial, nothing
    is created, and `project_id` is left out.
    """
    project = _Project(project_path)
    is_denied = _event_consent(project).decision is False
    project_id = None if is_denied else _get_or_create_hashed_project_id(project)
    return _for_heap(_base_properties(user_uuid, project, project_id))


def _is_valid_syntax(telemetry: Any) -> bool:
    """Return whether a parsed `.telemetry` has a decision, for Kedro-Viz 7 to 9."""
    return isinstance(telemetry, dict) and isinstance(telemetry.get("consent"), bool)


def __getattr__(name: str) -> Any:
    """Return Kedro's `ProjectMetadata`, which kedro-databricks imports from here."""
    if name != "ProjectMetadata":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kedro.framework.startup import ProjectMetadata

    return ProjectMetadata


# The entry points of kedro-telemetry and other packages import `kedro_telemetry.plugin`
# and `.api`. A vendored copy registers itself under these names: Kedro imports the
# project's settings before its plugins, and so never imports the installed release. If
# that release has already been imported, it keeps the names. `mock.patch` looks them up
# as attributes, too.
plugin = api = sys.modules[__name__]
if "kedro_telemetry.plugin" not in sys.modules:
    sys.modules["kedro_telemetry"] = plugin
    sys.modules["kedro_telemetry.plugin"] = plugin
    sys.modules["kedro_telemetry.api"] = plugin


# The one function that every event passes


class _Event(NamedTuple):
    """What an event is made of."""

    name: str
    project_path: Path | None  # None outside of projects
    words: list[str] | None = None  # the arguments of a command; None without one
    catalog: Any = None  # of a session; None without one
    properties: Properties | None = None  # of another plugin; None for Kedro's events


def _send(event: _Event) -> bool:
    """Send an event if consent allows it; return True if Heap has accepted it.

    Nothing is sent after TAB, in the back-off or in debug mode. Debug mode still shows
    the notice and stores missing ids. A failure loses the event, and never the command.
    The wait is outside the `try`, so that what the user's signal handlers raise
    meanwhile reaches the caller.
    """
    try:
        if _is_shell_completion():
            return False
        project = _Project(event.project_path)
        consent = _event_consent(project)
        if consent.decision is False:
            if _is_debug_mode():
                click.echo(f"kedro-telemetry sends nothing: {consent.text}", err=True)
            return False
        if _back_off_end() is not None and not _is_debug_mode():
            _log("An event was left out, as Heap did not answer the last one in time")
            return False
        if consent.decision is None:
            _show_notice()
        body = _create_body(event, project)
        if _is_debug_mode():
            text = json.dumps(body, indent=2)
            click.echo(f"kedro-telemetry would send:\n{text}", err=True)
            return False
        post = _Post(body)
    except Exception as error:
        _log("An event was lost: %s", type(error).__name__)
        return False
    return _start_and_wait_for(post)


def _is_shell_completion() -> bool:
    """Return whether click runs to complete a line in a shell, such as after TAB.

    click names the variable after the program, such as `_KEDRO_COMPLETE`, or
    `_KD_COMPLETE` for a script `kd` of the user's.
    """
    return any(
        value and name.startswith("_") and name.endswith("_COMPLETE")
        for name, value in os.environ.items()
    )


def _is_debug_mode() -> bool:
    return bool(os.environ.get("KEDRO_TELEMETRY_DEBUG"))


def _log(message: str, *args: object) -> None:
    """Log at DEBUG, which people see only if they ask for it."""
    # Kedro's RichHandler reads brackets as markup unless `extra` turns that off, and
    # raises SystemExit if standard output is closed (`kedro run | head`).
    with suppress(Exception, SystemExit):
        logger.debug(message, *args, extra={"markup": False})


@contextmanager
def _suppress_and_log(what: str) -> Iterator[None]:
    """Suppress an exception and log only its type: its text may name a path."""
    try:
        yield
    except Exception as error:
        _log("%s failed: %s", what, type(error).__name__)


# Files: how the parts below read and write them


def _user_file(name: str) -> Path:
    """Return a path in the user's configuration folder for Kedro.

    Raises OSError if the user has no home folder, as some services have none.
    """
    if sys.platform == "win32":
        # kedro-telemetry 0.9.0 has its files in kedro\kedro.
        folder = os.path.join(os.environ.get("LOCALAPPDATA", ""), "kedro")
    elif sys.platform == "darwin":
        folder = os.path.expanduser("~/Library/Application Support")
    else:
        folder = os.environ.get("XDG_CONFIG_HOME", "")
        if not os.path.isabs(folder):  # counts as unset by the XDG specification
            folder = os.path.expanduser("~/.config")
    if not os.path.isabs(folder):
        raise OSError("there is no home folder")
    return Path(folder, "kedro", name)


def _read(path: Path) -> bytes | None:
    """Return the content of a file, or None if there is no file.

    Raises OSError if it cannot be read. A dangling symlink counts as unreadable.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    # Reading a pipe could block for ever.
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
        raise OSError("not a file, or too large")
    return path.read_bytes()


def _parse_toml(content: bytes) -> dict[str, Any]:
    """Return a TOML document. Raises ValueError if it is not one, or not UTF-8."""
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _table(document: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the table at the path `names` in a TOML document, or {} for none."""
    found: Any = document
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _replace(path: Path, old: bytes | None, new: bytes) -> None:
    """Replace a file in one step, if it still contains `old` (None: if there is none).

    The disk may be full, and an editor may save the file at the same moment. Symbolic
    links and the owner stay, and so do the mode, access lists and attributes where the
    drive allows it. Raises OSError if the file has changed or cannot be replaced.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        with open(temporary, "xb") as file:
            if old is not None:
                _copy_metadata(target, temporary)
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if _read(target) != old:
            raise OSError("changed meanwhile")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy_metadata(source: Path, target: Path) -> None:
    """Copy owner, mode and attributes to a new file.

    Raises OSError if `source` is read-only, or if its owner cannot be kept. Root could
    write to a read-only file, but somebody has made it read-only on purpose.
    """
    from shutil import copystat
    from stat import S_IMODE

    found = source.stat()
    made = target.stat()
    if not (found.st_mode & 0o222 and os.access(source, os.W_OK)):
        raise PermissionError("read-only")
    if (found.st_uid, found.st_gid) != (made.st_uid, made.st_gid):
        os.chown(target, found.st_uid, found.st_gid)
    # Mounted drives (WSL, Azure Files) may refuse each of these. `copystat` stops at
    # the first that is refused, and copies the mode late.
    if found.st_mode != made.st_mode:
        with _suppress_and_log("Copying the mode of a file"):
            target.chmod(S_IMODE(found.st_mode))
    with _suppress_and_log("Copying the attributes of a file"):
        copystat(source, target)


def _write_empty(path: Path) -> None:
    """Put a new empty file at `path`, even if `sudo kedro` has left root's there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch()


# The project: what consent, the project's id and the properties need to know of it


class _Pyproject:
    """The file `pyproject.toml` of a project, as it is when this is made."""

    def __init__(self, project_path: Path | None) -> None:
        self.path = Path(project_path or "", "pyproject.toml")
        self.content: bytes | None = None  # None if it is absent or unreadable
        self.document: dict[str, Any] = {}
        self.is_broken = False  # it cannot be read or parsed
        if project_path is None:
            return
        try:
            self.content = _read(self.path)
            self.document = _parse_toml(self.content or b"")
        except (OSError, ValueError) as error:
            self.is_broken = True
            _log("Reading pyproject.toml failed: %s", type(error).__name__)


class _Project:
    """A project, or a folder without one, as one event sees it.

    Its `pyproject.toml` is read once, when it is first needed. For an event that a
    variable or a `.telemetry` denies, it is not read at all.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path  # None outside of projects
        self._pyproject: _Pyproject | None = None  # None until it is needed

    @property
    def pyproject(self) -> _Pyproject:
        if self._pyproject is None:
            self._pyproject = _Pyproject(self.path)
        return self._pyproject

    @property
    def kedro_table(self) -> dict[str, Any]:
        """What Kedro itself reads of `pyproject.toml`."""
        return _table(self.pyproject.document, "tool", "kedro")

    @property
    def package(self) -> str | None:
        """The name of the project's package, None if it declares none."""
        name = self.kedro_table.get("package_name")
        return name if isinstance(name, str) else None

    @property
    def package_folder(self) -> Path:
        """Where the project has its package, such as `spaceships/src/spaceships`.

        Without a package, it ends in `None`, a folder from which nothing is imported.
        """
        source = os.path.expanduser(str(self.kedro_table.get("source_dir", "src")))
        return Path(self.path or "", source, *str(self.package).split("."))


def _loaded_package() -> str | None:
    """Return the package of the project that Kedro has loaded last, if any."""
    project = sys.modules.get("kedro.framework.project")
    return getattr(project, "PACKAGE_NAME", None)


def _imported_folders(package: str | None) -> list[str]:
    """Return where a package lies, in full; nothing unless it has been imported."""
    module = sys.modules.get(package or "")
    return [os.path.realpath(folder) for folder in getattr(module, "__path__", [])]


def _is_imported(project: _Project) -> bool:
    """Return whether this process has imported a project's package from its folder."""
    folders = _imported_folders(project.package)
    return os.path.realpath(project.package_folder) in folders


def _may_be_running(project: _Project) -> bool:
    """Return whether the running code may be this project's.

    A packaged project may run in the folder of another project, and Kedro takes the
    current directory for its root.
    """
    if project.package in sys.modules:
        return _is_imported(project)
    # True if Kedro has loaded nothing, or this package, whose import has then failed.
    return _loaded_package() in (None, project.package)


# Consent: whether an event may be sent at all. Each source can deny it


class _Consent(NamedTuple):
    """A decision (True for granted, False for denied, None for none) and its reason."""

    decision: bool | None
    reason: str
    path: Path | None = None  # the file that the reason is about; None for no file

    @property
    def text(self) -> str:
        """The reason, with the path on a separate line, as it may be long."""
        return self.reason if self.path is None else f"{self.reason}:\n{self.path}"


NO_DECISION = _Consent(None, "on by default: no opt-out and no opt-in found")


def _event_consent(project: _Project) -> _Consent:
    """Return the consent for an event.

    Kedro's own tests replace `_check_for_telemetry_consent` so that nothing is sent.
    """
    if _check_for_telemetry_consent is _original_check:
        return _find_consent(project)
    return _Consent(_check_for_telemetry_consent(project.path), "a test decides")


def _find_consent(project: _Project) -> _Consent:
    """Return the first denial of all sources, or else the first grant."""
    found = NO_DECISION
    try:
        for consent in _consent_sources(project):
            if consent.decision is False:
                return consent
            if found.decision is None:
                found = consent
    except Exception as error:  # consent that cannot be found out is denied
        return _Consent(False, f"consent cannot be read ({type(error).__name__})")
    return found


def _consent_sources(project: _Project) -> Iterator[_Consent]:
    """Yield what each source decides, the quickest first. Add a new source here."""
    yield _environment_consent()
    for path in _consent_files(project.path):
        yield _file_consent(path)
    if project.pyproject.is_broken:  # the settings that it leads to may deny
        yield _Consent(False, "this file cannot be read", project.pyproject.path)
    for package, folder in _settings_places(project):
        yield _settings_consent(package, folder)


def _environment_consent() -> _Consent:
    for name in OPT_OUT_VARIABLES:
        if name in os.environ:  # any value opts out, even "", "0" or "false"
            return _Consent(False, f"{name} is set")
    if os.environ.get("GITHUB_REPOSITORY_OWNER") == "kedro-org":  # Kedro's own CI
        return _Consent(False, "GITHUB_REPOSITORY_OWNER is kedro-org")
    return NO_DECISION


def _consent_files(project_path: Path | None) -> Iterable[Path]:
    """Return where a `.telemetry` counts.

    The notice of kedro-telemetry 0.9.0 asked people to put it into the current
    directory. No folder above is read: in a folder of an automounter (`/home`, `/net`)
    that can take a minute.
    """
    paths = []
    with _suppress_and_log("Finding the home folder"):
        paths.append(_user_file(".telemetry"))
    with _suppress_and_log("Finding the current directory"):  # it may have been deleted
        paths.append(Path.cwd() / ".telemetry")
    if project_path is not None:
        paths.append(Path(project_path, ".telemetry"))
    return dict.fromkeys(paths)  # most commands run in the project's root: read it once


def _file_consent(path: Path) -> _Consent:
    """Return what a `.telemetry` file decides; one that cannot be read denies."""
    try:
        # Windows PowerShell 5 writes a byte order mark.
        decision = _parse_consent((_read(path) or b"").decode("utf-8-sig"))
    except (OSError, ValueError):
        return _Consent(False, "this file cannot be read", path)
    if decision is None:
        return NO_DECISION
    verb = "grants" if decision else "denies"
    return _Consent(decision, f"this file {verb} consent", path)


def _parse_consent(text: str) -> bool | None:
    """Return True if all that a text says is `consent: true`, None if it says nothing.

    Anything else denies, such as a merge conflict, or the `DO_NOT_TRACK=1` that someone
    wrote into a `.telemetry`. Blank lines and comments say nothing.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        return None
    return all(re.fullmatch(GRANT, line) for line in lines)


def _settings_places(project: _Project) -> Iterable[tuple[str, str]]:
    """Return the packages whose settings count, each with its folder.

    A packaged project may run in the folder of another project, and then the settings
    of both count. A web service may have imported several projects, and then only those
    of the event's own project count.
    """
    places = []
    if project.package is not None:
        places.append((project.package, os.path.realpath(project.package_folder)))
        # An installed package is outside the project's folder.
        folders = _imported_folders(project.package)
        places += [(project.package, folder) for folder in folders]
    loaded = _loaded_package()
    if loaded is not None and not _is_imported(project):
        places += [(loaded, folder) for folder in _package_folders(loaded)]
    return dict.fromkeys(places)


def _package_folders(package: str) -> list[str]:
    """Return where a package lies, in full, without importing it."""
    from importlib.util import find_spec

    if package in sys.modules:
        return _imported_folders(package)
    # Kedro may have failed to import it. find_spec("a.b") would import `a`.
    top, *names = package.split(".")
    spec = find_spec(top)
    roots = spec.submodule_search_locations if spec else None
    return [os.path.realpath(Path(root, *names)) for root in roots or []]


def _settings_consent(package: str, folder: str) -> _Consent:
    """Return what `settings.py` decides, by its names or else by its source.

    Kedro's extension for VS Code and kedro-skills ask in processes that load no
    project. Kedro itself carries on without settings that it failed to import.
    """
    module = sys.modules.get(f"{package}.settings")
    if module is not None and folder in _imported_folders(package):
        return _consent_of_names(vars(module), Path(folder, "settings.py"))
    for path in (Path(folder, "settings.py"), Path(folder, "settings", "__init__.py")):
        consent = _consent_of_source(path)
        if consent.decision is False:
            return consent
    return NO_DECISION


def _consent_of_names(names: dict[str, Any], path: Path) -> _Consent:
    """Return what imported settings decide, from the names in them."""
    for variable in OPT_OUT_VARIABLES:
        if variable in names:  # people set the variable here, too
            return _Consent(False, f"this file names {variable}", path)
    entries = names.get(HOOK_SWITCH, ())
    if isinstance(entries, str):  # ("kedro-telemetry") without a comma
        entries = (entries,)
    # A generator is not read, as Kedro could not read it again.
    is_doubtful = not isinstance(entries, (list, tuple, set, frozenset))
    if is_doubtful or any(_may_name_this_plugin(entry) for entry in entries):
        return _Consent(False, f"this file names {HOOK_SWITCH}", path)
    return NO_DECISION


def _consent_of_source(path: Path) -> _Consent:
    """Return what the source of settings decides, without running it."""
    try:
        denial = _denial_in(_Source(_read(path) or b""))
    except Exception:  # it is unreadable, or written for another version of Python
        denial = "this file cannot be read"
    return NO_DECISION if denial is None else _Consent(False, denial, path)


def _denial_in(source: _Source) -> str | None:
    """Return why the source of settings denies, None if it does not.

    What it imports may deny. A value that it computes stays unknown.
    """
    for variable in OPT_OUT_VARIABLES:
        if variable in source.words:
            return f"this file names {variable}"
    is_named = any(_may_name_this_plugin(text) for text in source.constants)
    if HOOK_SWITCH in source.imports or (HOOK_SWITCH in source.words and is_named):
        return f"this file names {HOOK_SWITCH}"
    return "this file imports *" if "*" in source.imports else None


def _may_name_this_plugin(entry: object) -> bool:
    """Return whether an entry of HOOK_SWITCH may be this plugin.

    Names are compared as packaging normalises them: `kedro_telemetry` is this plugin,
    and `kedro-telemetry-extras` is another. A text may list several names.
    """
    if not isinstance(entry, str):
        return True
    names = re.findall(r"[\w.-]+", entry)
    return any(re.sub("[-_.]+", "-", name).lower() == PLUGIN_NAME for name in names)


class _Source:
    """What a file of Python names. Raises what `ast.parse` raises."""

    def __init__(self, content: bytes) -> None:
        import ast

        self.words: set[str] = set()  # all names, and all words in constants
        self.constants: set[str] = set()  # texts in quotes
        self.imports: set[str] = set()  # what is imported, before and after `as`
        # Python warns of an unknown escape such as "\d", and a filter for warnings
        # would act on the user's threads, too. So each becomes an escaped backslash.
        known = re.sub(rb"\\[^\r\n]", rb"\\\\", content)
        for node in ast.walk(ast.parse(known)):
            # The fields of a node that are text are names, or a text in quotes.
            fields = chain.from_iterable(
                field if isinstance(field, list) else [field]
                for field in vars(node).values()
            )
            names = [field for field in fields if isinstance(field, str)]
            self.words.update(re.findall(r"\w+", " ".join(names)))
            if isinstance(node, ast.alias):
                self.imports.update(names)
            if isinstance(node, ast.Constant):
                self.constants.update(names)


# The notice: for people who have not decided


def _show_notice() -> None:
    """Print the notice until somebody has seen it.

    Not on CI machines: Azure Pipelines may fail a job for text on standard error.
    """
    if _is_ci_env() or _was_notice_seen():
        return
    # Standard error may be full or closed.
    with _suppress_and_log("Showing the notice"):
        click.echo(NOTICE, err=True)
        if _is_seen_by_somebody():
            _write_empty(_user_file("telemetry.notice"))


def _was_notice_seen() -> bool:
    try:
        return _user_file("telemetry.notice").exists()
    except OSError:  # there is no home folder
        return False


def _is_seen_by_somebody() -> bool:
    """Return whether standard error is a terminal or a Jupyter notebook.

    After `2> /dev/null`, or in a scheduler's job, the notice goes unseen.
    """
    stream = sys.stderr
    if stream is None:  # pythonw and services have none
        return False
    return stream.isatty() or type(stream).__module__.startswith("ipykernel.")


# Identity: random numbers that link the events of a user and of a project


def _get_or_create_identity() -> str:
    """Return or create the user's UUID; "" if CI or the disk allows none to be made."""
    from uuid import uuid4

    with _suppress_and_log("Storing the identity"):
        path = _user_file("telemetry.toml")
        content = _read(path)
        identity = _uuid_in(content)
        if identity or _is_ci_env():  # each new CI container would count as a user
            return identity
        # Only this plugin writes the file, so one without a UUID is replaced whole.
        _replace(path, content, f'[telemetry]\nuuid = "{uuid4().hex}"\n'.encode())
    return _stored_identity()  # which may be another process's, if that was faster


def _stored_identity() -> str:
    """Return the user's UUID, or "" if none is stored."""
    with _suppress_and_log("Reading the identity"):
        return _uuid_in(_read(_user_file("telemetry.toml")))
    return ""


def _uuid_in(content: bytes | None) -> str:
    """Return the UUID in `telemetry.toml` as 32 hex digits, or "" if none is valid."""
    from uuid import UUID

    try:
        document = _parse_toml(content or b"")
        return UUID(str(_table(document, "telemetry").get("uuid"))).hex
    except ValueError:
        return ""


def _get_or_create_hashed_project_id(project: _Project) -> str | None:
    """Return the hash of a project's id and package, None if the project has no id."""
    from hashlib import sha512

    pyproject = project.pyproject
    project_id = _project_id_in(pyproject)
    if project_id is None and not _is_ci_env():  # a CI checkout must not change
        with _suppress_and_log("Storing a project id"):
            _add_project_id(pyproject)
            # The id may be another process's, if that was faster.
            project_id = _project_id_in(_Pyproject(project.path))
    if project_id is None:
        return None
    # As in kedro-telemetry 0.9.0, so that the hash stays the same. The declared name
    # comes first, as a web service may have loaded another project meanwhile.
    loaded = _loaded_package()
    package = (project.package or loaded) if loaded else "undefined_package_name"
    return sha512(f"{project_id}{package}".encode()).hexdigest()


def _project_id_in(pyproject: _Pyproject) -> Any:
    """Return the id of a Kedro project, of any type; None if there is none."""
    tool = _table(pyproject.document, "tool")
    if "kedro" not in tool:
        return None
    return _table(tool, "kedro_telemetry").get("project_id")


def _add_project_id(pyproject: _Pyproject) -> None:
    """Write a new id into a table at the end of a Kedro project's `pyproject.toml`.

    A file that has such a table stays as it is. Raises ValueError if the file would not
    parse with it, and OSError if it cannot be replaced.
    """
    from uuid import uuid4

    tool = _table(pyproject.document, "tool")
    if pyproject.content is None or "kedro" not in tool or "kedro_telemetry" in tool:
        return
    newline = "\r\n" if b"\r\n" in pyproject.content else "\n"
    gap = newline if pyproject.content.endswith(b"\n") else newline * 2
    lines = ("[tool.kedro_telemetry]", f'project_id = "{uuid4().hex}"', "")
    edited = pyproject.content + (gap + newline.join(lines)).encode()
    _parse_toml(edited)  # raises where `tool = {...}` takes no more tables
    _replace(pyproject.path, pyproject.content, edited)


# Properties: what an event reports


def _create_body(event: _Event, project: _Project) -> dict[str, Any]:
    """Return an event as Heap receives it, and create the ids that are missing."""
    from datetime import UTC, datetime

    # Kedro's own events belong to the running code. A plugin names its project itself.
    if event.properties is None and not _may_be_running(project):
        project = _Project(None)
    identity = _get_or_create_identity()
    project_id = _get_or_create_hashed_project_id(project)
    properties = dict(event.properties or {})
    if event.words is not None:
        properties |= _command_properties(event.words)
    if event.catalog is not None:
        properties |= _session_properties(event.catalog, project)
    properties |= _base_properties(identity, project, project_id)
    return {
        "app_id": _get_heap_app_id(),
        "event": str(event.name)[:LONGEST_TEXT],
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "identity": identity or "missing_user_identity",
        "properties": _for_heap(properties),
    }


def _for_heap(properties: Properties) -> Properties:
    """Return properties with values that Heap takes, without those that have none."""
    accepted: Properties = {}
    for key, value in properties.items():
        if value is None:
            continue
        with _suppress_and_log("Converting a property"):  # `str()` of a huge int fails
            accepted[str(key)[:LONGEST_TEXT]] = _heap_value(value)
    return accepted


def _heap_value(value: object) -> str | float:
    """Return a number or a boolean as it is, and anything else as a short text."""
    if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
        return value
    return str(value)[:LONGEST_TEXT]  # inf and nan, too, which JSON does not have


def _base_properties(
    user_uuid: str, project: _Project, project_id: str | None
) -> Properties:
    """Return the properties of every event. Add a new one here."""
    example = project.kedro_table.get("example_pipeline")  # a boolean, or its text
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
    """Return the version of Kedro, None if Kedro cannot be imported."""
    # On a Python that Kedro does not support yet, it raises a warning as an exception.
    with _suppress_and_log("Importing Kedro"):
        from kedro import __version__ as version

        return version
    return None


def _is_ci_env() -> bool:
    values = [os.environ.get(name, "") for name in CI_VARIABLES]
    return any(value.lower() not in ("", "0", "false") for value in values)


def _public_tools(written: object) -> str | None:
    """Return the tools of Kedro that an array names; None if it names none.

    Kedro writes the array as text: `"['Linting', 'Testing']"`. People add the names of
    clients, which must not be sent.
    """
    names = [name.strip() for name in re.split(r"[][,'\"]", str(written))]
    return ", ".join(name for name in names if name in KEDRO_TOOLS) or None


def _command_properties(words: list[str]) -> Properties:
    """Return the properties of a command, whose words are masked."""
    with _suppress_and_log("Masking the command"):
        masked = _mask(words)
        command = " ".join(["kedro", *masked])
        return {"command": command, "main_command": masked[0] if masked else "kedro"}
    return {}


def _session_properties(catalog: Any, project: _Project) -> Properties:
    """Return the properties of a session. Add a new one here.

    A later Kedro may drop a private name that one part uses. The others stay.
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
    """Return the names of a catalog's entries, without parameters."""
    names = catalog.keys() if hasattr(catalog, "keys") else catalog.list()  # Kedro < 1
    return [n for n in names if n != "parameters" and not str(n).startswith("params:")]


def _pipeline_counts(project: _Project) -> Properties:
    """Count pipelines and nodes if Kedro has loaded all of them.

    To load them is to run the user's code, which may take long, print or raise. Kedro
    has only the pipelines of the project that it loaded last.
    """
    from kedro.framework.project import pipelines

    if project.package not in (None, _loaded_package()):
        return {}
    # Since Kedro 1.5, `kedro run --pipelines x` loads x alone.
    is_partial = getattr(pipelines, "_requested_pipelines", None)
    if is_partial or not pipelines._is_data_loaded:
        return {}
    properties: Properties = {}
    with _suppress_and_log("Counting the nodes"):  # a registry may return anything
        properties["number_of_pipelines"] = len(pipelines._content)
        properties["number_of_nodes"] = len(pipelines._content["__default__"].nodes)
    return properties


def _dataset_type_counts(catalog: Any) -> Properties:
    """Count the datasets of each public type; catalogs know types since Kedro 1.0."""
    from functools import cache

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
            else:  # a catalog class of the user's has added it, and imported its class
                found = _public_type(catalog.get_type(name))
        counts[f"dataset_type_count.{found}"] += 1
    return dict(counts)


def _public_type(class_name: object) -> str:
    """Return the full name of a class of Kedro or kedro-datasets, or else CUSTOM."""
    name = str(class_name)
    return name if name.startswith(PUBLIC_DATASETS) else CUSTOM


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
    """Find a public class in source files, and return its full name; None for none."""
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
    """Count the validators of each public library, which Kedro has since 1.6."""
    specs = getattr(catalog, "validator_specs", None) or {}
    counts: Counter[str] = Counter()
    for spec in specs.values():
        library = str(getattr(spec, "class_path", "")).partition(".")[0]
        name = library if library in PUBLIC_VALIDATORS else CUSTOM
        counts[f"validator_type_count.{name}"] += 1
    return {"number_of_validated_datasets": len(specs), **counts} if specs else {}


# Masking: which words of a command may be sent


def _mask(words: list[str]) -> list[str]:
    """Replace by MASK each word that neither Kedro nor an installed plugin defines.

    Commands, the names of the last command's options and Kedro's own starters stay.
    """
    commands = _known_commands(words)
    options = _option_names(commands)
    rest = _split_at_equals_sign(words[len(commands) :], options)
    if not commands and rest and rest[0] not in options:
        return [MASK]  # a project's own command, or a typo: not even a count is sent
    masked = words[: len(commands)]
    for previous, word in pairwise(["", *rest]):
        is_starter = previous in options and _is_official_starter(previous, word)
        masked.append(word if word in options or is_starter else MASK)
    return masked


def _known_commands(words: list[str]) -> list[click.Command]:
    """Return the public commands that `words` begins with, a group before its own."""
    commands: list[click.Command] = []
    groups: Iterable[Any] = chain(_kedro_groups(), _plugin_groups())
    for word in words:
        command = None if word.startswith("-") else _find_command(groups, word)
        if command is None:
            break
        commands.append(command)
        groups = [command]
    return commands


def _kedro_groups() -> list[click.Group]:
    """Return Kedro's groups of commands: each is a variable of its CLI module."""
    from kedro.framework.cli import cli as cli_module

    groups = vars(cli_module).values()
    return [group for group in groups if isinstance(group, click.Group)]


def _plugin_groups() -> Iterator[Any]:
    """Yield the groups of commands of the plugins that Kedro has loaded."""
    from importlib.metadata import entry_points

    for name in ("kedro.global_commands", "kedro.project_commands"):
        for entry_point in entry_points(group=name):
            if entry_point.module not in sys.modules:
                continue  # Kedro could not import it
            with _suppress_and_log("Loading a plugin's commands"):
                yield entry_point.load()


def _find_command(groups: Iterable[Any], name: str) -> click.Command | None:
    """Return the public command `name` of one of `groups`, None if none has it."""
    for group in groups:
        try:
            command: click.Command | None = group.get_command(
                click.Context(group), name
            )
            # click-default-group answers to any word with one of its commands.
            if command and command.name == name and _is_public(command, group):
                return command
        except (Exception, SystemExit) as error:
            # A plugin may import the command now, and exit. A command that is no group
            # has no `get_command`.
            _log("Looking up a command failed: %s", type(error).__name__)
    return None


def _is_public(command: click.Command, group: click.Command) -> bool:
    """Return whether Kedro or a plugin, and not the project, defines a command."""
    file = _source_file(command)
    # A project may add its own commands to Kedro's groups.
    if _is_in_package(_source_file(group), "kedro"):
        return _is_in_package(file, "kedro")
    return file is not None and not _is_in_package(file, _loaded_package())


def _source_file(command: click.Command) -> Path | None:
    """Return the file of the code behind a command, None if it has none.

    `__module__` does not say whose a command is: kedro-databricks has modules named
    `run` and `init`.
    """
    from inspect import unwrap

    function: Any = command.callback
    code = getattr(unwrap(function), "__code__", None)
    file = Path(getattr(code, "co_filename", ""))
    return file.resolve() if file.is_file() else None


def _is_in_package(file: Path | None, package: str | None) -> bool:
    """Return whether a file belongs to a package that has been imported."""
    folders = _imported_folders(package)
    return file is not None and any(file.is_relative_to(folder) for folder in folders)


def _option_names(commands: list[click.Command]) -> set[str]:
    """Return the names of the options of the last command, or of `kedro` itself."""
    from kedro.framework.cli.cli import cli

    command = commands[-1] if commands else cli
    names = {"-h", "--help"}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
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
    """Return whether `value` is a starter of Kedro's own, and not of a plugin."""
    if option not in ("-s", "--starter"):
        return False
    starters = sys.modules.get("kedro.framework.cli.starters")
    specs = getattr(starters, "_OFFICIAL_STARTER_SPECS_DICT", None)
    specs = specs or getattr(starters, "_OFFICIAL_STARTER_SPECS", {})  # Kedro 0.18
    return value in specs and specs[value].origin == "kedro"


# The post: one try, which a command waits for briefly


class _Post(threading.Thread):
    """A post in a daemon thread: a look-up or a read of certificates can hang for ever.

    The thread neither logs nor loads modules (`__init__` has loaded what it imports):
    while Python shuts down, either can abort it.
    """

    # When this process began its back-off, in seconds since the epoch. It counts where
    # `_write_back_off` cannot write its file, such as in a cluster's read-only home.
    back_off_start = 0.0

    def __init__(self, body: dict[str, Any]) -> None:
        from importlib import import_module
        from importlib.util import find_spec

        super().__init__(daemon=True)
        self.identity = body["identity"]
        self.content = json.dumps(body)
        self.status: int | None = None  # None until Heap has answered
        self.outcome = "no answer in time"
        # What the functions below import, and what Python itself needs for a host
        for name in ("encodings.idna", "http.client", "ssl", "urllib.request"):
            import_module(name)
        if find_spec("certifi"):
            import_module("certifi")

    def run(self) -> None:
        # If a user sets SIGPIPE to its default for `| head`, a connection that Heap
        # closes would end the process.
        with suppress(AttributeError):  # Windows has no such signal
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        try:
            self.status = _post(self.content.encode())
            self.outcome = str(self.status)
        except Exception as error:
            self.outcome = type(error).__name__  # its text may name a proxy's password


def _start_and_wait_for(post: _Post) -> bool:
    """Start a post and wait until the deadline; return True if Heap accepted it.

    A firewall that swallows packets must not delay each command. So a post that ends or
    is given up without an answer, after more than a quarter of the deadline (half a
    second), starts the back-off. A slow answer does not.
    """
    start = time.monotonic()
    try:
        post.start()
    except RuntimeError:  # the process may start no more threads
        _log("A post could not start")
        return False
    try:
        post.join(DEADLINE)
    finally:
        # Not `post.is_alive()`, which is wrong after Ctrl-C on CPython 3.11 and 3.12
        status = post.status
        if status is None and time.monotonic() - start > DEADLINE / 4:
            _write_back_off()
    # People publish their logs, which must not identify them.
    masked = post.content.replace(post.identity, MASK)
    _log("Post of %s: %s", masked, post.outcome)
    return status == ACCEPTED


def _post(content: bytes) -> int:
    """Post an event and return the status of the answer. No redirect is followed.

    Sentry and OpenTelemetry add headers to the requests of a process, which describe
    the user's project. So the request is written here, to the last byte.
    """
    from http.client import HTTPResponse
    from urllib.parse import urlsplit

    heap = urlsplit(ENDPOINT)
    head = (
        f"POST {heap.path} HTTP/1.1\r\n"
        f"Host: {heap.hostname}\r\n"
        f"User-Agent: kedro-telemetry/{__version__}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n"
        "\r\n"
    )
    with closing(_connect(heap.hostname or "")) as connection:
        connection.sock.sendall(head.encode() + content)
        with closing(HTTPResponse(connection.sock, method="POST")) as answer:
            answer.begin()
            return answer.status


def _connect(host: str) -> HTTPSConnection:
    """Connect to a host, and verify it by the authorities that the platform trusts."""
    import ssl

    folder = _certificate_folder()
    if folder is not None:
        # OpenSSL reads the one authority that it needs. A whole bundle takes 20 ms.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(capath=folder)
        # The folder may contain a company's authority alone. Then all are tried below.
        with suppress(ssl.SSLCertVerificationError):
            return _open_connection(host, context)
    return _open_connection(host, _platform_context())


def _certificate_folder() -> str | None:
    """Return the folder where OpenSSL looks for certificates, None if it finds none.

    It finds them by names such as `1a2b3c4d.0`.
    """
    import ssl

    folder = ssl.get_default_verify_paths().capath
    is_hash_link = re.compile(r"[0-9a-f]{8}\.\d+").fullmatch
    with suppress(OSError):  # a folder that cannot be listed is none
        if folder and any(is_hash_link(name) for name in os.listdir(folder)):
            return folder
    return None


def _platform_context() -> SSLContext:
    """Return a context with all authorities of the platform, or else those of certifi.

    A Python for macOS from python.org has none until its user installs them.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    certifi = sys.modules.get("certifi")
    if (
        certifi
        and not os.environ.get("SSL_CERT_FILE")
        and not _has_authorities(context)
    ):
        context.load_verify_locations(certifi.where())
    return context


def _has_authorities(context: SSLContext) -> bool:
    """Return whether a context trusts any authority."""
    try:
        is_bundle_loaded = context.cert_store_stats()["x509_ca"] > 0
    except NotImplementedError:  # truststore, which asks the system
        return True
    return is_bundle_loaded or _certificate_folder() is not None


def _open_connection(host: str, context: SSLContext) -> HTTPSConnection:
    """Return a connection to a host, after the handshake."""
    connection = _new_connection(host, context)
    # People set `HTTPConnection.debuglevel = 1`, which prints to standard output.
    connection.set_debuglevel(0)
    try:
        connection.connect()
    except BaseException:
        connection.close()
        raise
    return connection


def _new_connection(host: str, context: SSLContext) -> HTTPSConnection:
    """Return a connection to a host, through the user's proxy as urllib finds it.

    `ALL_PROXY` counts, too, as it does for requests. Raises NotImplementedError for a
    SOCKS proxy: its users want no direct connection, and no name server to learn of it.
    """
    from http.client import HTTPSConnection
    from urllib.request import ProxyHandler, Request, getproxies

    request = Request(ENDPOINT)
    proxies = getproxies()
    proxy = proxies.get("https") or proxies.get("all") or ""
    if proxy:  # replaces the host of the request, unless NO_PROXY lists it
        ProxyHandler({}).proxy_open(request, proxy, "https")
    is_proxied = request.host != host
    if is_proxied and re.match(r"(?i)(?!https?://)[^/]+://", proxy):
        raise NotImplementedError("a SOCKS proxy")
    if not request.host:
        raise ValueError("a proxy without a name")
    # Each operation has a time-out, so that a post that is given up ends, too.
    timeout = 2 * DEADLINE
    connection = HTTPSConnection(request.host, timeout=timeout, context=context)
    if is_proxied:  # the headers are for the proxy, with the user's password for it
        headers = {name.title(): value for name, value in request.header_items()}
        connection.set_tunnel(host, headers=headers)
    return connection


def _write_back_off() -> None:
    """Stop posts for BACK_OFF seconds, by a file for all processes of the user."""
    try:
        _write_empty(_user_file("telemetry.backoff"))
    except OSError as error:
        _Post.back_off_start = time.time()
        _log("Storing the back-off failed: %s", type(error).__name__)


def _back_off_end() -> float | None:
    """Return when posts resume, in seconds since the epoch; None if they may go on."""
    start = _Post.back_off_start
    with suppress(OSError):  # there is no such file, or no home folder
        start = max(start, _user_file("telemetry.backoff").stat().st_mtime)
    is_over = abs(time.time() - start) >= BACK_OFF  # a file server's clock may be ahead
    return None if is_over else start + BACK_OFF


# The commands


class _TelemetryGroup(click.Group):
    """A group that names its commands when a user guesses a wrong one."""

    def resolve_command(
        self, context: click.Context, words: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # The user may have typed `opt-out` or `stop`. After click's "No such command",
        # Kedro would add that it finds no project.
        if self.get_command(context, words[0]) is None:
            context.fail(
                f"kedro telemetry has no command '{words[0]}'.\n"
                "To opt out, run: kedro telemetry disable\n"
                "To opt in, run:  kedro telemetry enable"
            )
        return super().resolve_command(context, words)


@click.group(
    cls=_TelemetryGroup,
    invoke_without_command=True,
    epilog=f"Read more: {DOCUMENTATION}",
)
@click.pass_context
def telemetry(context: click.Context) -> None:
    """See whether telemetry is on, and opt out or in.

    To opt out in an environment, set DO_NOT_TRACK or KEDRO_DISABLE_TELEMETRY.
    """
    if context.invoked_subcommand is None:
        context.invoke(status)


@telemetry.command()
@click.pass_obj
def status(project_metadata: Any) -> None:
    """Show whether telemetry is on here, and why (the default command)."""
    project = _Project(getattr(project_metadata, "project_path", None))
    consent = _find_consent(project)
    is_on = consent.decision is not False
    _print_field("Telemetry", "on here" if is_on else "off here")
    _print_field("Reason", consent.text)
    no_id = "none" if _is_ci_env() or not is_on else "none yet"
    identity = _stored_identity() or no_id
    try:
        _print_field("Identity", f"{identity}\n{_user_file('telemetry.toml')}")
    except OSError as error:
        _print_field("Identity", f"none, as {error}")
    if project.path is not None:
        project_id = _project_id_in(project.pyproject)
        text = no_id if project_id is None else f"{project_id} (sent as a hash)"
        _print_field("Project id", f"{text}\n{project.pyproject.path}")
    _print_field("Endpoint", ENDPOINT)
    paused_until = _back_off_end()
    if paused_until is not None:
        end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(paused_until))
        _print_field("Paused", f"until {end}, as Heap did not answer in time")
    click.echo(_status_help(is_on))


def _print_field(label: str, text: str) -> None:
    """Print one value of the status, with further lines below its first one."""
    label += ":"
    click.echo(f"{label:13}" + text.replace("\n", "\n" + " " * 13))


def _status_help(is_on: bool) -> str:
    """Return what the user can do next."""
    opt = "Opt out for all your projects:" if is_on else "Opt in for all your projects:"
    command = "disable" if is_on else "enable"
    return f"""
See an event without sending it:  KEDRO_TELEMETRY_DEBUG=1 kedro info
{opt:34}kedro telemetry {command}
Opt out for this project alone:   write the line `consent: false`
                                  into the file .telemetry in its root
Read more:  {DOCUMENTATION}"""


@telemetry.command()
@click.pass_obj
def enable(project_metadata: Any) -> None:
    """Opt in for all your projects."""
    _write_decision("true")
    consent = _find_consent(_Project(getattr(project_metadata, "project_path", None)))
    if consent.decision is False:
        click.echo(f"Telemetry stays off here, as {consent.text}")


@telemetry.command()
def disable() -> None:
    """Opt out for all your projects."""
    advice = "set DO_NOT_TRACK=1 in your environment."
    _write_decision("false", f"\nTo opt out instead, {advice}")
    click.echo("Versions of kedro-telemetry before 1.0 do not read this file.")
    click.echo(f"To opt out of those as well, {advice}")


# Words that people try; the help does not list them
telemetry.add_command(click.Command("on", callback=enable.callback, hidden=True))
telemetry.add_command(click.Command("off", callback=disable.callback, hidden=True))


def _write_decision(decision: str, advice: str = "") -> None:
    """Save `consent: decision` for all of the user's projects, and say so."""
    failure = "Nothing has changed"
    try:
        path = _user_file(".telemetry")
        failure += f", as this file cannot be written:\n{path}"
        _replace(path, _read(path), f"consent: {decision}\n".encode())
    except OSError as error:
        reason = error.strerror or error  # its whole text may name a temporary file
        raise click.ClickException(f"{failure}\nReason: {reason}{advice}") from error
    opted = "opted in to" if decision == "true" else "opted out of"
    click.echo(f"You have {opted} telemetry for all your projects.")
    click.echo(f"This is saved in\n{path}")


def _add_telemetry_command(is_in_project: bool) -> None:
    """Add `kedro telemetry` to Kedro's own commands.

    In a project, a command of the same name of the project or a plugin takes precedence
    there. An entry point in `kedro.global_commands` would fail Kedro's own tests, which
    count the groups. It would not serve a vendored copy either: the installed release
    may be 0.9.0, whose entry points are hooks.
    """
    from kedro.framework.cli import cli as cli_module

    name = "project_commands" if is_in_project else "global_commands"
    group = getattr(cli_module, name, cli_module.cli)  # Kedro 0.18 has one group
    group.commands.setdefault("telemetry", telemetry)
