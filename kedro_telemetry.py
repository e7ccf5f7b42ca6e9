"""Anonymised usage telemetry for Kedro: one event per command or session.

The module follows the life of an event. Kedro calls the hooks, which pass the event to
`_send`, the only way to send one. The sections below it are the steps that an event
takes: consent, identity, properties, masking, post and files. The commands come last.
What only an event needs is imported where it is used, so that loading the plugin costs
next to nothing.
"""

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
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from pluggy import HookimplMarker

if TYPE_CHECKING:
    from ssl import DefaultVerifyPaths, SSLContext

__version__ = "1.0.0"

ENDPOINT = "https://heapanalytics.com/api/track"
APP_ID = "2388822444"
DOCUMENTATION = "https://docs.kedro.org/en/stable/about/telemetry/"
DEADLINE = 2.0  # seconds to wait for a post
BACK_OFF = 3600.0  # seconds without posts after one that had no answer in time
LARGEST_FILE = 2**20  # bytes
LONGEST_TEXT = 1023  # characters that Heap accepts in a key or a value
LARGEST_NUMBER = 1e308  # inf and nan, which JSON cannot express, go as text

MODULE = __spec__.name if __spec__ else __name__
IS_VENDORED = MODULE != "kedro_telemetry"  # such a copy reports sessions only
COMMAND = f"python -m {MODULE}" if IS_VENDORED else "kedro telemetry"
EXAMPLE_COMMAND = "kedro run" if IS_VENDORED else "kedro info"

NOTICE = f"""
Kedro collects anonymised usage data to improve the product.
See whether it is on here, and why:  {COMMAND}
Opt out:    {COMMAND} disable, or set DO_NOT_TRACK
Read more:  {DOCUMENTATION}"""
STATUS_HELP = f"""
See an event; nothing is sent:  KEDRO_TELEMETRY_DEBUG=1 {EXAMPLE_COMMAND}
Opt out for all your projects:  {COMMAND} disable
Opt in for all your projects:   {COMMAND} enable
What is collected, and other ways to opt out:
{DOCUMENTATION}"""
NO_HOME = "there is no home folder to save it in"

OPT_OUT_VARIABLES = ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY")
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
PUBLIC_DATASETS = ("kedro.io.", "kedro_datasets.", "kedro_datasets_experimental.")
PUBLIC_VALIDATORS = (
    "pandera",
    "pydantic",
    "great_expectations",
    "kedro",
    "kedro_datasets",
)
CUSTOM = "custom"
MASK = "*****"

SESSION_PLUGIN = "kedro-telemetry-session"  # in the hook manager of a session

Properties = dict[str, Any]

logger = logging.getLogger("kedro_telemetry")
_cli_hook = HookimplMarker("kedro_cli")
_session_hook = HookimplMarker("kedro")


# The hooks, in the order in which Kedro calls them


class KedroTelemetryHook:
    """Reports each command and each session; it knows the current command only.

    No hook raises an error of its own, whatever it is given: it would end the command.
    """

    def __init__(self) -> None:
        self._command: _Activity | None = None

    @_cli_hook
    def before_command_run(self, project_metadata: Any, command_args: Any) -> None:
        """Remember the command, and add `kedro telemetry` before click looks it up."""
        self._command = None
        with suppress(Exception):
            words = [str(word) for word in command_args]
            if words[:1] != ["telemetry"]:  # which is not itself reported
                project_path = getattr(project_metadata, "project_path", None)
                self._command = _Activity(words, project_path)
            elif _has_other_telemetry(project_metadata):
                _remove_command()
                return
            _add_command(project_metadata)

    @_session_hook
    def after_context_created(self, context: Any) -> None:
        """Register what reports the session with the session's own hook manager."""
        with suppress(Exception):
            if _environment_consent().decision is False:
                return  # whoever has opted out should not even notice the hook
            hook_manager = context._hook_manager
            if hook_manager.has_plugin(SESSION_PLUGIN):
                return  # the session has created a context before
            activity = self._command
            if activity is None or not activity.includes(context.project_path):
                activity = _Activity(None, None)
            reporter = _SessionReporter(activity, context.project_path)
            hook_manager.register(reporter, SESSION_PLUGIN)

    @_cli_hook
    def after_command_run(self) -> None:
        """Report the command, unless a session of it has been reported."""
        command = self._command
        self._command = None
        if command is not None:
            # The command has ended: Ctrl-C ends the wait alone.
            with suppress(KeyboardInterrupt):
                command.report("CLI command", None)


class _SessionReporter:
    """Reports one session, with whose hook manager it is registered."""

    def __init__(self, activity: _Activity, project_path: Path) -> None:
        self._activity = activity
        self._project_path = project_path

    @_session_hook(trylast=True)
    def after_catalog_created(self, catalog: Any) -> None:
        """Report the session when the user's own hooks have seen its catalog."""
        self._activity.report("Kedro Project Statistics", self._project_path, catalog)


class _Activity:
    """What is reported once: a command with its sessions, or a session on its own.

    It has no lock, as people copy and pickle sessions.
    """

    def __init__(self, words: list[str] | None, project_path: Path | None) -> None:
        self._words = words
        self._project_path = project_path
        self._is_reported = False

    def includes(self, project_path: Path) -> bool:
        """Return whether a session at a path can be of the command's own project.

        A path without a project is taken for a mistake, as some plugins pass one.
        """
        if self._project_path in (None, project_path):
            return True
        return not Path(project_path, "pyproject.toml").exists()

    def report(self, name: str, project_path: Path | None, catalog: Any = None) -> None:
        """Send one event for the command's project, or else for `project_path`."""
        if not self._is_reported:
            self._is_reported = True  # whether the event arrives or not
            path = self._project_path or project_path
            _send(_Event(name, path, self._words, catalog))


telemetry_hook = KedroTelemetryHook()


# The functions for other packages: Kedro-Viz, Kedro's extension for VS Code, plugins


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
        True if Heap accepted the event, and False otherwise. Nothing is raised, but
        for what a signal handler of the process raises meanwhile.
    """
    return _send(_Event(event_name, project_path, properties=properties))


def _check_for_telemetry_consent(project_path: Path | None) -> bool | None:
    """Return True for granted, False for denied, or None. Kedro's tests patch this."""
    return _find_consent(project_path).decision


def _get_or_create_uuid() -> str:
    """Return the user's UUID, or "" if consent is denied or it cannot be stored."""
    if _check_for_telemetry_consent(None) is False:
        return ""
    return _get_or_create_identity()


def _get_heap_app_id() -> str:
    """Return the id of the application at Heap that receives the events."""
    return os.environ.get("HEAP_APPID_DEV", APP_ID)


def _get_project_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """Return what every event tells, without `project_id` if consent is denied."""
    properties = _base_properties(user_uuid, project_path)
    if _check_for_telemetry_consent(project_path) is not False:
        properties["project_id"] = _get_or_create_hashed_project_id(project_path)
    return _for_heap(properties)


def __getattr__(name: str) -> Any:
    """Return Kedro's `ProjectMetadata`, which kedro-databricks imports from here."""
    if name != "ProjectMetadata":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kedro.framework.startup import ProjectMetadata

    return ProjectMetadata


# Other packages import from `kedro_telemetry.plugin` and `kedro_telemetry.api`.
plugin = api = sys.modules[__name__]
sys.modules[f"{__name__}.plugin"] = plugin
sys.modules[f"{__name__}.api"] = api


# The one way to send an event


class _Event(NamedTuple):
    """What an event is made of, once consent allows it."""

    name: str
    project_path: Path | None
    words: list[str] | None = None  # the arguments of the command, if there is one
    catalog: Any = None  # of the session, if there is one
    properties: Properties | None = None  # of another plugin


def _send(event: _Event) -> bool:
    """Send an event unless consent is denied; return True if Heap accepted it.

    A failure costs the event, never the command. The wait stands outside of the `try`:
    what a signal handler raises there belongs to the process.
    """
    try:
        if os.environ.get("_KEDRO_COMPLETE"):  # the user pressed TAB in a shell
            return False
        decision = _check_for_telemetry_consent(event.project_path)
        if not _may_send(decision, event.project_path):
            return False
        if decision is None:
            _show_notice_once()
        body = _create_body(event)
        if _is_debug_mode():
            text = json.dumps(body, indent=2)
            click.echo(f"kedro-telemetry would send:\n{text}", err=True)
            return False
        post = _Post(body)
    except Exception as error:
        _log("An event was lost: %s", type(error).__name__)
        return False
    return _wait_for(post)


def _may_send(decision: bool | None, project_path: Path | None) -> bool:
    """Return whether consent and the back-off allow an event; print or log why not."""
    if decision is False:
        if _is_debug_mode():
            # Looked up again, as Kedro's tests patch what tells the decision alone.
            reason = _find_consent(project_path).reason
            click.echo(f"kedro-telemetry sends nothing: {reason}", err=True)
        return False
    if _back_off_end() is None or _is_debug_mode():
        return True
    _log("A post was left out, as the last one had no answer in time")
    return False


def _is_debug_mode() -> bool:
    return bool(os.environ.get("KEDRO_TELEMETRY_DEBUG"))


def _show_notice_once() -> None:
    """Print the notice, and remember in a file that the user has seen it."""
    marker = _user_file("telemetry.notice")
    if _is_ci_env() or (marker is not None and marker.exists()):
        return
    # Standard error may be full or closed. The notice is shown again next time.
    with suppress(OSError, ValueError):
        click.echo(NOTICE, err=True)
        _write_empty(marker)


def _log(message: str, *args: object) -> None:
    """Log at DEBUG, for auditors. RichHandler must not read brackets as markup."""
    # SystemExit: RichHandler raises it where standard output is closed.
    with suppress(Exception, SystemExit):
        logger.debug(message, *args, extra={"markup": False})


# Consent


class _Consent(NamedTuple):
    """A decision (True for granted, False for denied, or None) and its reason."""

    decision: bool | None
    reason: str


NO_DECISION = _Consent(None, "on by default: nobody has opted in or out")


def _find_consent(project_path: Path | None) -> _Consent:
    """Return the first denial of all sources, or else the first grant."""
    grant = NO_DECISION
    for consent in _consent_sources(project_path):
        if consent.decision is False:
            return consent
        if grant.decision is None:
            grant = consent
    return grant


def _consent_sources(project_path: Path | None) -> Iterator[_Consent]:
    """Yield what each source decides. Add a new way to opt out here."""
    yield _environment_consent()
    yield _settings_consent(project_path)
    yield _file_consent(_user_file(".telemetry"))
    with suppress(OSError):  # the current directory has been deleted
        yield from _folder_consents(Path.cwd())
    if project_path is not None:
        yield from _folder_consents(Path(project_path))


def _folder_consents(folder: Path) -> Iterator[_Consent]:
    for place in [folder, *folder.parents]:
        yield _file_consent(place / ".telemetry")


def _environment_consent() -> _Consent:
    for name in OPT_OUT_VARIABLES:
        if name in os.environ:  # to any value, even an empty one
            return _Consent(False, f"{name} is set")
    if os.environ.get("GITHUB_REPOSITORY_OWNER") == "kedro-org":  # Kedro's own CI
        return _Consent(False, "GITHUB_REPOSITORY_OWNER is kedro-org")
    return NO_DECISION


def _settings_consent(project_path: Path | None) -> _Consent:
    """Return what `settings.py` decides, in a project that Kedro has loaded."""
    package = _loaded_package(project_path)
    if package is None:
        return NO_DECISION
    module = f"{package}.settings"
    try:
        if module not in sys.modules:
            return _missing_settings_consent(package, module)
        settings = vars(sys.modules[module])
        for name in OPT_OUT_VARIABLES:
            if name in settings:
                return _Consent(False, f"{name} is set in {module}")
        plugins = settings.get("DISABLE_HOOKS_FOR_PLUGINS", ())
        names = [plugins] if isinstance(plugins, str) else plugins
        if any(re.search("kedro[-_. ]*telemetry", str(name), re.I) for name in names):
            return _Consent(False, f"DISABLE_HOOKS_FOR_PLUGINS is set in {module}")
    except Exception:  # settings that cannot be read may deny consent
        return _Consent(False, f"{module} could not be read")
    return NO_DECISION


def _missing_settings_consent(package: str, module: str) -> _Consent:
    """Deny where Kedro has ignored settings that it could not import."""
    from importlib.util import find_spec

    if package != _loaded_package(None):  # Kedro has not loaded this project
        return NO_DECISION
    # Where the package itself could not be imported, find_spec would try it again.
    if package in sys.modules and find_spec(module) is None:
        return NO_DECISION
    return _Consent(False, f"{module} could not be imported")


def _file_consent(path: Path | None) -> _Consent:
    """Return what a `.telemetry` file decides; one that cannot be read denies."""
    try:
        decision = _parse_consent((_read(path) or b"").decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        return _Consent(False, f"{path} cannot be read")
    if decision is None:
        return NO_DECISION
    verb = "grants" if decision else "denies"
    return _Consent(decision, f"{path} {verb} consent")


def _parse_consent(text: str) -> bool | None:
    """Return True if all that a text says is `consent: true`, None if it says nothing.

    Anything else denies. Blank lines and lines that start with `#` say nothing.
    """
    lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
    if not lines:
        return None
    # Such as `consent: true`, `CONSENT = yes` or `"consent": 'on'  # I agree`
    grant = r"""(["']?)consent\1\s*[:=]\s*(["']?)(true|yes|on|y|1)\2(\s+#.*)?"""
    return all(re.fullmatch(grant, line.rstrip(), re.I | re.A) for line in lines)


# Identity


def _get_or_create_identity() -> str:
    """Return the user's UUID, created if there is none; "" if it cannot be stored."""
    from uuid import uuid4

    path = _user_file("telemetry.toml")
    with suppress(OSError):  # it cannot be read or written, or another was faster
        content = _read(path)
        # A throw-away machine is not a new user.
        if not _uuid_in(_parse_toml(content)) and not _is_ci_env():
            _replace(path, content, f'[telemetry]\nuuid = "{uuid4().hex}"\n'.encode())
    return _uuid_in(_read_toml(path))


def _uuid_in(document: Properties) -> str:
    """Return the UUID in `telemetry.toml` as 32 hex digits, or "" if none is valid."""
    from uuid import UUID

    try:
        return UUID(str(_table(document, "telemetry").get("uuid"))).hex
    except ValueError:
        return ""


def _get_or_create_hashed_project_id(project_path: Path | None) -> str | None:
    """Return the hash of the project's id and package, or None if it has no id."""
    from hashlib import sha512

    pyproject = _pyproject(project_path)
    with suppress(OSError):  # it cannot be read or written, or another was faster
        content = _read(pyproject)
        edited = _with_project_id(content or b"")
        if edited is not None and not _is_ci_env():  # whose checkout must not change
            _replace(pyproject, content, edited)
    project_id = _project_id_in(_read_toml(pyproject))
    if project_id is None:
        return None
    package = _loaded_package(project_path) or "undefined_package_name"
    return sha512(f"{project_id}{package}".encode()).hexdigest()


def _project_id_in(document: Properties) -> Any:
    """Return the id in a Kedro project's `pyproject.toml`, of any type, or None."""
    tool = _table(document, "tool")
    if "kedro" not in tool:
        return None
    return _table(tool, "kedro_telemetry").get("project_id")


def _with_project_id(content: bytes) -> bytes | None:
    """Return `pyproject.toml` with a new id in a table at its end.

    None if it has such a table, is not of a Kedro project or would not parse.
    """
    from uuid import uuid4

    if "kedro_telemetry" in _table(_parse_toml(content), "tool"):
        return None
    project_id = uuid4().hex
    newline = "\r\n" if b"\r\n" in content else "\n"
    gap = newline if content.endswith(b"\n") else newline * 2
    table = f'[tool.kedro_telemetry]{newline}project_id = "{project_id}"{newline}'
    edited = content + f"{gap}{table}".encode()
    return edited if _project_id_in(_parse_toml(edited)) == project_id else None


def _pyproject(project_path: Path | None) -> Path | None:
    return None if project_path is None else Path(project_path, "pyproject.toml")


def _loaded_package(project_path: Path | None) -> str | None:
    """Return the package of a project, or None if Kedro has loaded no project.

    Kedro keeps only the name of the project that it loaded last, but a process may have
    sessions of several, so what `pyproject.toml` declares comes first.
    """
    last = getattr(sys.modules.get("kedro.framework.project"), "PACKAGE_NAME", None)
    if last is None:
        return None
    declared = _kedro_table(project_path).get("package_name")
    return declared if isinstance(declared, str) else last


# Properties


def _create_body(event: _Event) -> Properties:
    """Return an event as Heap receives it, and create the ids that are missing."""
    from datetime import UTC, datetime

    identity = _get_or_create_identity()
    properties = dict(event.properties or {})
    if event.words is not None:
        masked = _mask(event.words)
        properties["command"] = " ".join(["kedro", *masked])
        properties["main_command"] = masked[0] if masked else "kedro"
    if event.catalog is not None:
        properties |= _project_statistics(event.catalog, event.project_path)
    properties |= _base_properties(identity, event.project_path)
    properties["project_id"] = _get_or_create_hashed_project_id(event.project_path)
    return {
        "app_id": _get_heap_app_id(),
        "event": str(event.name)[:LONGEST_TEXT],
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "identity": identity or "missing_user_identity",
        "properties": _for_heap(properties),
    }


def _for_heap(properties: Properties) -> Properties:
    """Convert values to what Heap accepts: short strings, numbers and booleans."""
    accepted: Properties = {}
    for key, value in properties.items():
        if isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER:
            accepted[str(key)[:LONGEST_TEXT]] = value
        elif value is not None:
            accepted[str(key)[:LONGEST_TEXT]] = str(value)[:LONGEST_TEXT]
    return accepted


def _base_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """Return what every event tells, but for `project_id`. Add a new property here."""
    kedro_table = _kedro_table(project_path)
    example = kedro_table.get("example_pipeline")  # a boolean, or its text
    return {
        "username": user_uuid,
        "project_version": _kedro_version(),
        "telemetry_version": __version__,
        "python_version": sys.version,
        "os": sys.platform,
        "is_ci_env": _is_ci_env(),
        "tools": _public_tools(kedro_table.get("tools", "")),
        "example_pipeline": example if str(example) in ("True", "False") else None,
    }


def _kedro_table(project_path: Path | None) -> Properties:
    return _table(_read_toml(_pyproject(project_path)), "tool", "kedro")


def _kedro_version() -> str | None:
    with suppress(Exception):  # Kedro may raise a warning on a Python that is too new
        from kedro import __version__ as version

        return version
    return None


def _is_ci_env() -> bool:
    values = [os.environ.get(name, "") for name in CI_VARIABLES]
    return any(value.lower() not in ("", "0", "false") for value in values)


def _public_tools(written: object) -> str | None:
    """Return which of Kedro's own tools an array, or its text, names."""
    names = [name.strip() for name in re.split(r"[][,'\"]", str(written))]
    return ", ".join(name for name in names if name in KEDRO_TOOLS) or None


def _project_statistics(catalog: Any, project_path: Path | None) -> Properties:
    """Return what the event of a session tells. Add a new property of sessions here."""
    names = catalog.keys() if hasattr(catalog, "keys") else catalog.list()  # Kedro < 1
    is_parameter = re.compile("parameters$|params:").match
    datasets = [name for name in names if not is_parameter(str(name))]
    return {
        "number_of_datasets": len(datasets),
        **_pipeline_statistics(project_path),
        **_dataset_types(catalog, datasets),
        **_validator_types(catalog),
    }


def _pipeline_statistics(project_path: Path | None) -> Properties:
    """Count pipelines and nodes if Kedro has loaded them all: loading runs user code.

    Kedro holds those of one project only, the one that it loaded last.
    """
    from kedro.framework.project import pipelines

    if _loaded_package(project_path) != _loaded_package(None):
        return {}
    requested = getattr(pipelines, "_requested_pipelines", None)  # since Kedro 1.5
    if requested or not pipelines._is_data_loaded:
        return {}
    properties: Properties = {}
    with suppress(Exception):  # a registry may return anything
        properties["number_of_pipelines"] = len(pipelines._content)
        properties["number_of_nodes"] = len(pipelines._content["__default__"].nodes)
    return properties


def _dataset_types(catalog: Any, datasets: Iterable[str]) -> Properties:
    """Count the datasets of each public type; catalogs tell types since Kedro 1.0."""
    from functools import cache

    if not hasattr(catalog, "get_type"):
        return {}
    configs = getattr(getattr(catalog, "config_resolver", None), "config", {})
    declared_class = cache(_declared_class)  # a catalog declares few types many times
    counts: Counter[str] = Counter()
    for name in datasets:
        class_name = None
        # A bad entry, or a class that cannot be imported, counts as custom.
        with suppress(Exception, SystemExit):
            if name in configs:
                class_name = declared_class(configs[name]["type"])
            else:
                class_name = catalog.get_type(name)  # of a dataset added by code
        is_public = str(class_name).startswith(PUBLIC_DATASETS)
        counts[f"dataset_type_count.{class_name if is_public else CUSTOM}"] += 1
    return dict(counts)


def _declared_class(declared: str | type) -> str | None:
    """Return the full name of a class that a catalog declares, or None if not public.

    Kedro would import it, and with it pandas or Spark, even where nobody uses it.
    """
    if isinstance(declared, type):
        return f"{declared.__module__}.{declared.__qualname__}"
    # In the order in which Kedro looks
    for prefix in ("kedro.io.", "kedro_datasets.", ""):
        found = _class_in_sources(prefix + declared)
        if found is not None:
            return found
    return None


def _class_in_sources(dotted_name: str) -> str | None:
    """Find a public class in source files, without an import; return its full name."""
    from importlib.util import find_spec

    # Such as kedro_datasets.pandas.CSVDataset, with or without the module csv_dataset
    public = r"(kedro\.io|kedro_datasets(?:_experimental)?\.\w+)\.(?:(\w+)\.)?(\w+)"
    match = re.fullmatch(public, dotted_name)
    if match is None:
        return None
    group, module, name = match.groups()
    package, _, folder = group.partition(".")
    roots = getattr(find_spec(package), "submodule_search_locations", None)
    for root in roots or []:
        for file in Path(root, folder).glob(f"{module or '*'}.py"):
            if f"\nclass {name}(".encode() in file.read_bytes():
                return f"{group}.{file.stem}.{name}"
    return None


def _validator_types(catalog: Any) -> Properties:
    """Count the validators of each public library, which Kedro has since 1.6."""
    specs = getattr(catalog, "validator_specs", None) or {}
    counts: Counter[str] = Counter()
    for spec in specs.values():
        library = str(getattr(spec, "class_path", "")).partition(".")[0]
        name = library if library in PUBLIC_VALIDATORS else CUSTOM
        counts[f"validator_type_count.{name}"] += 1
    return {"number_of_validated_datasets": len(specs), **counts} if specs else {}


# Masking


def _mask(words: list[str]) -> list[str]:
    """Replace by MASK each word that neither Kedro nor an installed plugin defines.

    Commands, the names of the last one's options and official starters stay.
    """
    commands = _known_commands(words)
    options = _option_names(commands)
    rest = _split_at_equals_sign(words[len(commands) :], options)
    if not commands and rest and rest[0] not in options:
        return [MASK]  # an unknown command, of which nothing is told
    masked = words[: len(commands)]
    for previous, word in zip(["", *rest], rest, strict=False):
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
    """Return Kedro's groups of commands, which are all names in its CLI module."""
    from kedro.framework.cli import cli as cli_module

    groups = vars(cli_module).values()
    return [group for group in groups if isinstance(group, click.Group)]


def _plugin_groups() -> Iterator[Any]:
    """Yield the groups of commands of the plugins that Kedro has loaded."""
    from importlib.metadata import entry_points

    for name in ("kedro.global_commands", "kedro.project_commands"):
        for entry_point in entry_points(group=name):
            with suppress(AttributeError):  # the module has no such group
                if entry_point.module in sys.modules:
                    yield entry_point.load()


def _find_command(groups: Iterable[Any], name: str) -> click.Command | None:
    """Return the public command `name` of one of `groups`."""
    for group in groups:
        # It may have no such command, fail to make it, or be no group at all.
        with suppress(Exception, SystemExit):
            command: click.Command = group.get_command(click.Context(group), name)
            # A group may answer to any word, or to an alias.
            if command.name == name and _is_public(command, group):
                return command
    return None


def _is_public(command: click.Command, group: click.Command) -> bool:
    """Return whether Kedro or a plugin, and not the project, defines a command."""
    file = _source_file(command)
    # What others add to Kedro's own groups is not public.
    if _is_in_package(_source_file(group), "kedro"):
        return _is_in_package(file, "kedro")
    return file is not None and not _is_in_package(file, _loaded_package(None))


def _source_file(command: click.Command) -> Path | None:
    """Return the file of the code behind a command, which may be in any module."""
    from inspect import unwrap

    function: Any = command.callback
    code = getattr(unwrap(function), "__code__", None)
    file = Path(getattr(code, "co_filename", ""))
    return file.resolve() if file.is_file() else None


def _is_in_package(file: Path | None, package: str | None) -> bool:
    """Return whether a file belongs to a package that has been imported."""
    folders = getattr(sys.modules.get(package or ""), "__path__", [])
    parents = file.parents if file else []
    return any(Path(folder).resolve() in parents for folder in folders)


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


# Post


class _Post(threading.Thread):
    """A post in a daemon thread: a look-up or a read of certificates can hang for ever.

    `outcome` is the status of the answer or the kind of the failure, None until then.
    The thread does nothing else: to log or import while Python ends can abort it.
    """

    def __init__(self, body: Properties) -> None:
        from importlib import import_module

        super().__init__(daemon=True)
        self.identity = body["identity"]
        self.content = json.dumps(body)
        self.outcome: int | str | None = None
        for name in ("encodings.idna", "ssl", "urllib.request"):
            import_module(name)
        with suppress(ImportError):  # it is used if it is there
            import_module("certifi")

    def run(self) -> None:
        # A connection that the server closes must not end the process by SIGPIPE.
        with suppress(AttributeError):  # Windows has no such signal
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        try:
            self.outcome = _status_of_post(self.content)
        except Exception as error:  # there is no second try
            reason = getattr(error, "reason", None)  # a URLError wraps the real error
            cause = reason if isinstance(reason, Exception) else error
            self.outcome = type(cause).__name__  # its text may hold a proxy's password


def _wait_for(post: _Post) -> bool:
    """Start a post and wait until the deadline; return True if Heap accepted it.

    A wait that ends without an answer starts the back-off, whatever has ended it.
    """
    try:
        post.start()
    except RuntimeError:  # the process may start no more threads
        return False
    try:
        post.join(DEADLINE)
    finally:
        outcome = post.outcome
        if outcome is None:
            _start_back_off()
    # People publish their logs, which must not tell who they are.
    masked = post.content.replace(post.identity, MASK)
    _log("Post of %s: %s", masked, outcome or "no answer in time")
    return outcome == 200


def _status_of_post(content: str) -> int:
    """Post an event and return the status of the answer. No redirect is followed."""
    from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler, Request

    opener = OpenerDirector()
    opener.add_handler(ProxyHandler())
    opener.add_handler(HTTPSHandler(context=_tls_context()))
    agent = f"kedro-telemetry/{__version__}"
    headers = {"Content-Type": "application/json", "User-Agent": agent}
    request = Request(ENDPOINT, content.encode(), headers)
    # Twice the deadline ends a thread that has been given up.
    with opener.open(request, timeout=2 * DEADLINE) as answer:
        return int(answer.status)


def _tls_context() -> SSLContext:
    """Return a context with the authorities of the platform, or else of certifi."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    paths = ssl.get_default_verify_paths()
    if _is_folder_enough(paths):
        # OpenSSL reads the one that it needs; to load the bundle takes 20 ms.
        context.load_verify_locations(capath=paths.capath)
        return context
    context.load_default_certs()
    is_anybody_trusted = context.cert_store_stats()["x509_ca"] or _hash_links(paths)
    certifi = sys.modules.get("certifi")
    if certifi and not is_anybody_trusted and not os.environ.get("SSL_CERT_FILE"):
        context.load_verify_locations(certifi.where())
    return context


def _is_folder_enough(paths: DefaultVerifyPaths) -> bool:
    """Return whether the folder alone holds every authority that the bundle holds.

    Elsewhere it may hold only a company's own. Debian, Ubuntu and Alpine keep the
    bundle in the folder, beside a file for each authority.
    """
    if paths.cafile is None or paths.capath is None:
        return False
    bundle = Path(paths.capath, "ca-certificates.crt")
    if not bundle.exists() or not bundle.samefile(paths.cafile):
        return False
    number = bundle.read_bytes().count(b"-----BEGIN ")
    return 0 < number <= len(_hash_links(paths))  # an empty bundle tells nothing


def _hash_links(paths: DefaultVerifyPaths) -> list[str]:
    """Return the names by which OpenSSL finds certificates in the folder."""
    if paths.capath is None:
        return []
    is_hash_link = re.compile(r"[0-9a-f]{8}\.\d+").fullmatch
    with os.scandir(paths.capath) as files:
        links = [file for file in files if is_hash_link(file.name)]
    return [link.name for link in links if link.is_file()]  # not a dangling symlink


_back_off_start = 0.0  # of this process, for where no file can be written


def _start_back_off() -> None:
    """Stop posts for BACK_OFF seconds: write a file for all processes of the user."""
    global _back_off_start
    try:
        _write_empty(_user_file("telemetry.backoff"))
    except OSError:
        _back_off_start = time.time()


def _back_off_end() -> float | None:
    """Return when posts resume, in seconds since the epoch; None if they may go on."""
    start = _back_off_start
    marker = _user_file("telemetry.backoff")
    if marker is not None:
        with suppress(OSError):  # there is no such file
            start = max(start, marker.stat().st_mtime)
    is_over = abs(time.time() - start) >= BACK_OFF  # a file server's clock may be ahead
    return None if is_over else start + BACK_OFF


# Files


def _user_file(name: str) -> Path | None:
    """Return a path in the user's configuration folder for Kedro, if there is one."""
    if sys.platform == "win32":
        folder = os.path.join(os.environ.get("LOCALAPPDATA", ""), "kedro")
    elif sys.platform == "darwin":
        folder = os.path.expanduser("~/Library/Application Support")
    else:
        folder = os.environ.get("XDG_CONFIG_HOME", "")
        if not os.path.isabs(folder):  # counts as unset by the XDG specification
            folder = os.path.expanduser("~/.config")
    return Path(folder, "kedro", name) if os.path.isabs(folder) else None


def _read(path: Path | None) -> bytes | None:
    """Return the content of a file, or None if there is none. OSError if unreadable."""
    if path is None:
        return None
    try:
        os.lstat(path)  # which finds a dangling symlink, too
    except (FileNotFoundError, NotADirectoryError):
        return None
    # To read a pipe could block for ever.
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
        raise OSError(f"{path} is not a file, or too large")
    return path.read_bytes()


def _read_toml(path: Path | None) -> Properties:
    """Return the document in a TOML file, or {} if it cannot be read."""
    try:
        return _parse_toml(_read(path))
    except OSError:
        return {}


def _parse_toml(content: bytes | None) -> Properties:
    """Return the TOML document in `content`, or {} if it is not one."""
    import tomllib

    try:
        return tomllib.loads((content or b"").decode())
    except (ValueError, RecursionError):  # not UTF-8, not TOML, or nested too deeply
        return {}


def _table(document: Properties, *names: str) -> Properties:
    """Return the table at the path `names` in a TOML document, or {} for none."""
    found: Any = document
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _write_empty(path: Path | None) -> None:
    """Put an empty file at `path`, even in place of one that root has left there."""
    if path is None:
        raise OSError(NO_HOME)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch()


def _replace(path: Path | None, old: bytes | None, new: bytes) -> None:
    """Replace a file in one step, if it still holds `old` (None: if there is none).

    Mode, owner, access lists, attributes and symbolic links stay. OSError if that is
    not possible, or the file is read-only.
    """
    from shutil import copystat

    if path is None:
        raise OSError(NO_HOME)
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        with open(temporary, "xb") as file:
            if old is not None:
                found = target.stat()
                if not (found.st_mode & 0o222 and os.access(target, os.W_OK)):
                    raise PermissionError(f"{path} is read-only")
                if hasattr(os, "chown"):  # not on Windows
                    os.chown(temporary, found.st_uid, found.st_gid)
                copystat(target, temporary)
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if _read(target) != old:
            raise OSError(f"{path} has been changed meanwhile")
        os.replace(temporary, target)
        # A process that compared at the same moment may replace it once more. The
        # caller reads it again after this wait, so that both use what stays.
        time.sleep(0.005)
    finally:
        temporary.unlink(missing_ok=True)


# The commands


@click.group(invoke_without_command=True, epilog=f"Read more: {DOCUMENTATION}")
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
    """Show whether telemetry is on here, and why (the default)."""
    project_path = getattr(project_metadata, "project_path", None)
    consent = _find_consent(project_path)
    identity_file = _user_file("telemetry.toml")
    paused_until = _back_off_end()
    no_id = "none" if _is_ci_env() else "none yet"  # CI machines are given no ids
    click.echo(f"Telemetry:   {'off' if consent.decision is False else 'on'} here")
    click.echo(f"Reason:      {consent.reason}")
    click.echo(f"Identity:    {_uuid_in(_read_toml(identity_file)) or no_id}")
    if identity_file is not None:
        click.echo(f"             in {identity_file}")
    if project_path is not None:
        pyproject = _pyproject(project_path)
        click.echo(f"Project id:  {_project_id_in(_read_toml(pyproject)) or no_id}")
        click.echo(f"             in {pyproject}; sent as a hash")
    click.echo(f"Endpoint:    {ENDPOINT}")
    if paused_until is not None:
        end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(paused_until))
        click.echo(f"Paused:      until {end}, as the last post had no answer in time")
    click.echo(STATUS_HELP)


@telemetry.command()
@click.pass_obj
def enable(project_metadata: Any) -> None:
    """Opt in for all your projects."""
    _write_decision("true", "opted in to")
    consent = _find_consent(getattr(project_metadata, "project_path", None))
    if consent.decision is False:
        click.echo(f"Telemetry stays off here: {consent.reason}")


@telemetry.command()
def disable() -> None:
    """Opt out for all your projects."""
    _write_decision("false", "opted out of", instead="; set DO_NOT_TRACK instead")


# Aliases that people type, and that the help does not list
telemetry.add_command(click.Command("on", callback=enable.callback, hidden=True))
telemetry.add_command(click.Command("off", callback=disable.callback, hidden=True))


def _write_decision(decision: str, done: str, instead: str = "") -> None:
    """Write `consent: decision` for all of the user's projects, and say so."""
    path = _user_file(".telemetry")
    try:
        _replace(path, _read(path), f"consent: {decision}\n".encode())
    except OSError as error:  # which may name a temporary file
        reason = f"{path}: {error.strerror}" if error.strerror else error
        raise click.ClickException(f"Nothing has changed: {reason}{instead}") from error
    click.echo(f"You have {done} telemetry for all your projects.\nSaved in {path}")


def _add_command(project_metadata: Any) -> None:
    """Add `kedro telemetry` to Kedro's commands inside or outside of projects."""
    from kedro.framework.cli import cli as cli_module

    name = "global_commands" if project_metadata is None else "project_commands"
    group = getattr(cli_module, name, cli_module.cli)  # Kedro 0.18 has one group
    group.commands.setdefault("telemetry", telemetry)


def _remove_command() -> None:
    """Remove `kedro telemetry` where click would find it before another one.

    Kedro 0.18 looks in its own group first, and later releases in that of a command
    that ran outside of projects before.
    """
    for group in _kedro_groups():
        if group.commands.get("telemetry") is telemetry:
            del group.commands["telemetry"]


def _has_other_telemetry(project_metadata: Any) -> bool:
    """Return whether a plugin or the project has a command of this name."""
    package = getattr(project_metadata, "package_name", None)
    project_cli = getattr(sys.modules.get(f"{package}.cli"), "cli", None)
    for group in [*_plugin_groups(), project_cli]:
        with suppress(Exception, SystemExit):  # not a group, or a command that fails
            if group.get_command(click.Context(group), "telemetry") is not None:
                return True
    return False


if __name__ == "__main__":
    from kedro.framework.cli import main
    from kedro.framework.cli.hooks import get_cli_hook_manager

    # A vendored copy has no entry point, so Kedro does not know its hook.
    get_cli_hook_manager().register(telemetry_hook)
    if not IS_VENDORED:
        sys.argv[0] = "kedro"  # for click's usage
    if sys.argv[1:2] != ["telemetry"]:
        sys.argv.insert(1, "telemetry")
    main()
