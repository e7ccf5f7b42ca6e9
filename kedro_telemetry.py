"""Anonymous usage telemetry for Kedro: one event per command or session.

The module follows the path of an event. Kedro calls the hooks, which pass the event to
`_send`, the only way to send one. The sections after it are the steps that `_send`
takes: consent, identity, properties, masking, post and files. The commands of
`kedro telemetry` come last.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pluggy import HookimplMarker

if TYPE_CHECKING:
    from ssl import SSLContext
    from urllib.request import OpenerDirector, Request

__version__ = "1.0.0"

ENDPOINT = "https://heapanalytics.com/api/track"
APP_ID = "2388822444"
DOCUMENTATION = "https://docs.kedro.org/en/stable/about/telemetry/"
DEADLINE = 2.0  # seconds to wait for a post
BACK_OFF = 3600.0  # seconds without posts after one that hit the deadline
LARGEST_FILE = 2**20  # bytes
LONGEST_TEXT = 1023  # characters that Heap accepts in a key or a value
LARGEST_NUMBER = 1e308  # leaves out inf and nan, which JSON cannot express

NOTICE = f"""\
Kedro collects anonymous usage data to improve the product.
Run `kedro telemetry` to see whether it is on here and what is collected.
To opt out, run `kedro telemetry disable` or set the variable DO_NOT_TRACK.
Read more: {DOCUMENTATION}"""
STATUS_HELP = f"""\
See the events of a command:  KEDRO_TELEMETRY_DEBUG=1 kedro run
Opt out for all projects:     kedro telemetry disable
Opt in for all projects:      kedro telemetry enable
What is collected, and other ways to opt out:
{DOCUMENTATION}"""

OPT_OUT_VARIABLES = ("DO_NOT_TRACK", "KEDRO_DISABLE_TELEMETRY")
CI_VARIABLES = (
    "GITLAB_CI",
    "GITHUB_ACTION",
    "BITBUCKET_BUILD_NUMBER",
    "JENKINS_URL",
    "CODEBUILD_BUILD_ID",
    "CIRCLECI",
    "TRAVIS",
    "BUILDKITE",
)
GRANT = r"""(["']?)consent\1[ \t]*[:=][ \t]*(["']?)(true|yes|on|y|1)\2"""

DATASET_PACKAGES = ("kedro_datasets.", "kedro_datasets_experimental.")
PUBLIC_DATASETS = ("kedro.io.", *DATASET_PACKAGES)
PUBLIC_VALIDATORS = (
    "pandera",
    "pydantic",
    "great_expectations",
    "kedro",
    "kedro_datasets",
)
CUSTOM = "custom"
CLASSES_OF_MODULE = r'"(\w+)": \[([^]]*)\]'  # such as "csv_dataset": ["CSVDataset"]

MASK = "*****"
HELP_OPTIONS = ("-h", "--help")
STARTER_OPTIONS = ("-s", "--starter")

Properties = dict[str, Any]
Collect = Callable[[], Properties]

logger = logging.getLogger("kedro_telemetry")
_cli_hook = HookimplMarker("kedro_cli")
_session_hook = HookimplMarker("kedro")


# The hooks, in the order in which Kedro calls them


class KedroTelemetryHook:
    """Reports each command and each session.

    It remembers the current command, or else the latest session. No hook raises an
    exception, whatever it is given: that would end the user's command.
    """

    def __init__(self) -> None:
        self._remember()

    def _remember(
        self, command: list[str] | None = None, project_path: Path | None = None
    ) -> None:
        """Forget the previous command or session, and remember `command` if given."""
        self._command = command
        self._project_path = project_path
        self._hook_manager: object = None
        self._is_reported = False

    @_cli_hook
    def before_command_run(self, project_metadata: Any, command_args: Any) -> None:
        """Remember the command, and its project if there is one."""
        self._remember()
        with suppress(Exception):
            words = [str(word) for word in command_args]
            path = project_metadata.project_path if project_metadata else None
            if words[:1] != ["telemetry"]:  # which is not reported
                self._remember(words, path)

    @_session_hook
    def after_context_created(self, context: Any) -> None:
        """Remember the session. All its contexts share the hook manager."""
        with suppress(Exception):
            hook_manager = getattr(context, "_hook_manager", context)
            if self._command is None and self._hook_manager is not hook_manager:
                self._remember()
                self._hook_manager = hook_manager
            self._project_path = context.project_path

    @_session_hook
    def after_catalog_created(self, catalog: Any) -> None:
        """Report the session, together with the command that created it."""
        self._report("Kedro Project Statistics", lambda: _project_statistics(catalog))

    @_cli_hook
    def after_command_run(self) -> None:
        """Report the command, unless a session of it has been reported."""
        if self._command is None:
            return
        with suppress(KeyboardInterrupt):  # the command has ended: stop waiting only
            self._report("CLI command", dict)
        self._remember()

    def _report(self, event_name: str, collect: Collect) -> None:
        """Send the event of a command or session once, whether it arrives or not."""
        if self._is_reported:
            return
        self._is_reported = True
        _send(
            event_name,
            lambda: _command_properties(self._command) | collect(),
            self._project_path,
        )


telemetry_hook = KedroTelemetryHook()


def send_telemetry_event(
    event_name: str,
    properties: Properties | None = None,
    project_path: Path | None = None,
) -> bool:
    """Send an event of another Kedro plugin, subject to the same consent. Never raises.

    Args:
        event_name: The name of the event, such as `kedro_skills_install`.
        properties: The event's own properties, which must not be personal. Those that
            every event has take precedence.
        project_path: The root of the project that the event belongs to, if any.

    Returns:
        True if Heap accepted the event, False otherwise.
    """
    return _send(event_name, lambda: dict(properties or {}), project_path)


# The one way to send an event


def _send(event_name: str, collect: Collect, project_path: Path | None) -> bool:
    """Send an event if consent is not denied; True if Heap accepted it. Never raises.

    `collect` returns the event's own properties. It is not called without consent.
    """
    try:
        if os.environ.get("_KEDRO_COMPLETE"):  # the user pressed TAB in a shell
            return False
        consent = _check_for_telemetry_consent(project_path)
        if consent is False:
            _explain_denial(project_path)
            return False
        if _back_off_end() and not _is_debug_mode():
            return False
        if consent is None:
            _show_notice()
        return _post(_make_event(event_name, collect(), project_path))
    except Exception as error:  # telemetry must never end a command
        _log("An event was lost: %s", type(error).__name__)
        return False


def _is_debug_mode() -> bool:
    return bool(os.environ.get("KEDRO_TELEMETRY_DEBUG"))


def _log(message: str, *args: object) -> None:
    """Log at DEBUG, for auditors; to Kedro's log handler, brackets would be markup."""
    with suppress(Exception, SystemExit):  # a log that fails must not lose an event
        logger.debug(message, *args, extra={"markup": False})


# Consent


class _Consent:
    """A decision (True for granted, False for denied, or None) and what it rests on."""

    def __init__(self, decision: bool | None, basis: str) -> None:
        self.decision = decision
        self.basis = basis


NO_DECISION = _Consent(None, "nobody has granted or denied consent")


def _check_for_telemetry_consent(project_path: Path | None) -> bool | None:
    """Return True if consent is granted, False if it is denied, and None otherwise.

    Without a project, the nearest `.telemetry` from the current directory upwards
    counts. Kedro's tests patch this function.
    """
    return _find_consent(project_path).decision


def _find_consent(project_path: Path | None) -> _Consent:
    """Return the first denial of all sources, or else the first grant."""
    grant = NO_DECISION
    for consent in _consent_sources(project_path):
        if consent.decision is False:
            return consent
        if grant is NO_DECISION:
            grant = consent
    return grant


def _consent_sources(project_path: Path | None) -> Iterator[_Consent]:
    """Yield what each source decides. Add a new way to opt out here."""
    yield _environment_consent()
    yield _settings_consent()
    yield _file_consent(_user_file(".telemetry"))
    yield _file_consent(_project_consent_file(project_path))


def _environment_consent() -> _Consent:
    for name in OPT_OUT_VARIABLES:
        if name in os.environ:  # to any value, even an empty one
            return _Consent(False, f"{name} is set")
    if os.environ.get("GITHUB_REPOSITORY_OWNER") == "kedro-org":  # Kedro's own CI
        return _Consent(False, "GITHUB_REPOSITORY_OWNER is kedro-org")
    return NO_DECISION


def _settings_consent() -> _Consent:
    """Kedro's own switch for plugins, in the settings of the project it has loaded."""
    from importlib.util import find_spec

    package = _loaded_package()
    if package is None:
        return NO_DECISION
    module = f"{package}.settings"
    try:
        # Kedro ignores settings that it cannot import.
        if module not in sys.modules and find_spec(module) is not None:
            return _Consent(False, f"{module} could not be imported")
        settings = sys.modules["kedro.framework.project"].settings
        if "kedro-telemetry" not in settings.DISABLE_HOOKS_FOR_PLUGINS:
            return NO_DECISION
    except Exception:  # settings that cannot be read may hold the switch
        return _Consent(False, f"{module} could not be read")
    return _Consent(False, f"DISABLE_HOOKS_FOR_PLUGINS is set in {module}")


def _loaded_package() -> str | None:
    """Return the name of the package of the project that Kedro has loaded, if any."""
    project = sys.modules.get("kedro.framework.project")
    return getattr(project, "PACKAGE_NAME", None)


def _project_consent_file(project_path: Path | None) -> Path:
    """Return `.telemetry` of a project, or else the nearest one from here upwards."""
    if project_path is not None:
        return Path(project_path, ".telemetry")
    files = [folder / ".telemetry" for folder in _folders_from_here()]
    return next(filter(os.path.lexists, files), Path(".telemetry"))


def _file_consent(path: Path) -> _Consent:
    """Return what a `.telemetry` file decides; one that cannot be read denies."""
    try:
        decision = _parse_consent((_read(path) or b"").decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        return _Consent(False, f"{path} cannot be read")
    if decision is None:
        return NO_DECISION
    return _Consent(decision, f"{path} {'grants' if decision else 'denies'} consent")


def _parse_consent(text: str) -> bool | None:
    """Return True if each line that mentions consent is `consent: true` alone.

    False if one of them is not, None if no line mentions consent.
    """
    if "\0" in text:  # UTF-16 without a byte order mark
        return False
    lines = [line.partition("#")[0].rstrip().lower() for line in text.splitlines()]
    mentions = [line for line in lines if "consent" in line]
    if not mentions:
        return None
    return all(re.fullmatch(GRANT, line) for line in mentions)


def _explain_denial(project_path: Path | None) -> None:
    """In debug mode, print why no event is sent."""
    if _is_debug_mode():
        basis = _find_consent(project_path).basis
        click.echo(f"kedro-telemetry sends nothing: {basis}", err=True)


def _show_notice() -> None:
    """Show the notice, once per user."""
    marker = _user_file("telemetry.notice")
    if _is_ci_env() or marker.exists():
        return
    click.echo(NOTICE, err=True)
    with suppress(OSError):  # the notice is shown again next time
        _write(marker, b"")


# Identity


def _get_or_create_uuid() -> str:
    """Return the user's UUID, or "" if consent is denied or it cannot be stored.

    Kedro-Viz and Kedro's extension for VS Code call this. It may create the UUID.
    """
    return "" if _check_for_telemetry_consent(None) is False else _user_uuid()


def _user_uuid() -> str:
    """Return the user's UUID, created if there is none; "" if it cannot be stored."""
    from uuid import uuid4

    stored = _stored_uuid()
    if stored or _is_ci_env():  # a throw-away machine is not a new user
        return stored
    path = _user_file("telemetry.toml")
    with suppress(OSError):  # no home folder, or one that is read-only or full
        _read(path)  # raises if the file may hold a UUID, but cannot be read
        _write(path, f'[telemetry]\nuuid = "{uuid4().hex}"\n'.encode())
    return _stored_uuid()  # of several commands at once, the last one decides


def _stored_uuid() -> str:
    """Return the UUID in telemetry.toml as 32 hex digits, or "" if none is valid."""
    from uuid import UUID

    table = _table(_read_toml(_user_file("telemetry.toml")), "telemetry")
    try:
        return UUID(str(table.get("uuid"))).hex
    except ValueError:
        return ""


def _project_id(pyproject: Path) -> Any:
    """Return the id in pyproject.toml, created if there is none, or else None."""
    from uuid import uuid4

    stored = _stored_project_id(pyproject)
    if stored is not None or _is_ci_env():  # a CI job must not change its checkout
        return stored
    with suppress(OSError):  # a file that cannot be read or written gets no id
        edited = _with_project_id(_read(pyproject) or b"", uuid4().hex)
        if edited is not None:
            _write(pyproject, edited)
    return _stored_project_id(pyproject)


def _stored_project_id(pyproject: Path) -> Any:
    """Return the id in a Kedro project's pyproject.toml, of any type, or None."""
    tool = _table(_read_toml(pyproject), "tool")
    if "kedro" not in tool:
        return None
    return _table(tool, "kedro_telemetry").get("project_id")


def _with_project_id(content: bytes, project_id: str) -> bytes | None:
    """Return pyproject.toml with an id added, or None if that is not possible.

    It tries a line below an existing header, then a table at the end. An edit counts
    if it results in the old document plus the id.
    """
    document = _parse_toml(content)
    tool = _table(document, "tool")
    if "kedro" not in tool:
        return None
    table = _table(tool, "kedro_telemetry") | {"project_id": project_id}
    wanted = document | {"tool": tool | {"kedro_telemetry": table}}

    text = content.decode()
    newline = "\r\n" if "\r\n" in text else "\n"
    line = f'project_id = "{project_id}"'
    header = r"(?m)^\[tool\.kedro_telemetry\][^\r\n]*"
    below_header = re.sub(header, rf"\g<0>{newline}{line}", text)
    gap = newline if text.endswith("\n") else newline * 2
    at_end = f"{text}{gap}[tool.kedro_telemetry]{newline}{line}{newline}"
    for edited in (below_header.encode(), at_end.encode()):
        if _parse_toml(edited) == wanted:
            return edited
    return None


# Properties


def _make_event(name: str, own: Properties, project_path: Path | None) -> Properties:
    """Return the body of a post. The base properties override the event's own."""
    from datetime import UTC, datetime

    identity = _user_uuid()
    base = _base_properties(identity, project_path)
    base["project_id"] = _hashed_project_id(project_path)
    return {
        "app_id": _get_heap_app_id(),
        "event": str(name)[:LONGEST_TEXT],
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "identity": identity or "missing_user_identity",
        "properties": _for_heap(own | base),
    }


def _get_heap_app_id() -> str:
    """Return the id of the application at Heap that receives the events."""
    return os.environ.get("HEAP_APPID_DEV", APP_ID)


def _for_heap(properties: Properties) -> Properties:
    """Convert values to what Heap accepts: short strings, numbers and booleans."""
    accepted: Properties = {}
    for key, value in properties.items():
        if isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER:
            accepted[str(key)[:LONGEST_TEXT]] = value
        elif value is not None:
            accepted[str(key)[:LONGEST_TEXT]] = str(value)[:LONGEST_TEXT]
    return accepted


def _get_project_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """Return the base properties, without `project_id` if consent is denied.

    Kedro's extension for VS Code calls this. It may create the project's id.
    """
    properties = _base_properties(user_uuid, project_path)
    if _check_for_telemetry_consent(project_path) is not False:
        properties["project_id"] = _hashed_project_id(project_path)
    return _for_heap(properties)


def _base_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """Return the properties that every event has, but for `project_id`.

    Add a new property of every event here.
    """
    kedro_table = _table(_read_toml(_pyproject(project_path)), "tool", "kedro")
    # `tools` is an array, or a string that holds a Python list.
    tools = re.sub(r"[]['\"]", "", str(kedro_table.get("tools") or ""))
    return {
        "username": user_uuid,
        "project_version": _kedro_version(),
        "telemetry_version": __version__,
        "python_version": sys.version,
        "os": sys.platform,
        "is_ci_env": _is_ci_env(),
        "tools": tools or None,
        "example_pipeline": kedro_table.get("example_pipeline"),
    }


def _kedro_version() -> str | None:
    with suppress(Exception):  # Kedro may raise a warning on a Python that is too new
        from kedro import __version__ as version

        return version
    return None


def _is_ci_env() -> bool:
    is_any_set = any(os.environ.get(name) for name in CI_VARIABLES)
    return is_any_set or os.environ.get("CI") == "true"


def _pyproject(project_path: Path | None) -> Path:
    """Return pyproject.toml of a project; without a project, a path with no file."""
    return Path(project_path or os.devnull, "pyproject.toml")


def _hashed_project_id(project_path: Path | None) -> str | None:
    """Return the hash of the project's id and package, or None if it has no id."""
    from hashlib import sha512

    project_id = _project_id(_pyproject(project_path))
    if project_id is None:
        return None
    package = _loaded_package() or "undefined_package_name"
    return sha512(f"{project_id}{package}".encode()).hexdigest()


def _project_statistics(catalog: Any) -> Properties:
    """Return the size of the project and the types of its datasets.

    Add a new property of sessions here.
    """
    names = catalog.keys() if hasattr(catalog, "keys") else catalog.list()  # Kedro < 1
    datasets = [x for x in names if not x.startswith(("parameters", "params:"))]
    return {
        "number_of_datasets": len(datasets),
        **_pipeline_statistics(),
        **_dataset_types(catalog, datasets),
        **_validator_types(catalog),
    }


def _pipeline_statistics() -> Properties:
    properties = {}
    with suppress(Exception, SystemExit):  # the user's code may raise anything
        from kedro.framework.project import pipelines

        properties["number_of_pipelines"] = len(pipelines)
        properties["number_of_nodes"] = len(pipelines["__default__"].nodes)
    return properties


def _dataset_types(catalog: Any, datasets: list[str]) -> Properties:
    """Count the datasets of each public type, which catalogs know since Kedro 1.0."""
    if not hasattr(catalog, "get_type"):
        return {}
    resolver = getattr(catalog, "config_resolver", None)
    configs = getattr(resolver, "config", {})
    types: dict[Any, str] = {}
    counts: Counter[str] = Counter()
    for name in datasets:
        declared = configs.get(name, {}).get("type", "")
        key = declared or (name,)  # a dataset added by code tells its own class
        if key not in types:
            types[key] = _public_type(catalog, name, declared)
        counts[f"dataset_type_count.{types[key]}"] += 1
    return dict(counts)


def _public_type(catalog: Any, name: str, declared: str | type) -> str:
    """Return the full name of a dataset's class, or CUSTOM if it is not public.

    The declared type tells it in most cases. Kedro would import the class, and with it
    pandas, Spark or TensorFlow, even for datasets that nobody uses.
    """
    with suppress(Exception, SystemExit):  # a type that cannot be found or imported
        found = (declared and _declared_class(declared)) or catalog.get_type(name)
        if found.startswith(PUBLIC_DATASETS):
            return str(found)
    return CUSTOM


def _declared_class(declared: str | type) -> str:
    """Return the full name of a declared class without importing it.

    CUSTOM if it is not public, "" if it may be, but cannot be told without an import.
    """
    if isinstance(declared, type):
        return _full_name(declared)
    # Kedro tries "kedro.io.", "kedro_datasets." and no prefix, in this order.
    path = f"kedro.io.{declared.removeprefix('kedro.io.')}"
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type):
        return _full_name(found)
    is_full = declared.startswith(DATASET_PACKAGES)
    return _datasets_class(declared if is_full else f"kedro_datasets.{declared}")


def _full_name(class_: type) -> str:
    return f"{class_.__module__}.{class_.__qualname__}"


def _datasets_class(path: str) -> str:
    """Find a class of kedro-datasets in the source of its group, such as `pandas`."""
    from importlib.util import find_spec

    package, group, *modules, name = path.split(".")
    spec: Any = find_spec(package)
    folder = Path(spec.origin).parent / group
    if not (folder / "__init__.py").is_file():
        return CUSTOM
    if modules:
        text = folder.joinpath(*modules).with_suffix(".py").read_text(encoding="utf-8")
        return path if f"\nclass {name}(" in text else ""
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    for module, classes in re.findall(CLASSES_OF_MODULE, text):
        if f'"{name}"' in classes:
            return f"{package}.{group}.{module}.{name}"
    return ""


def _validator_types(catalog: Any) -> Properties:
    """Count the validators of each public library, which Kedro has since 1.6."""
    specs = getattr(catalog, "validator_specs", None)
    if not specs:
        return {}
    counts: Counter[str] = Counter()
    for spec in specs.values():
        library = str(getattr(spec, "class_path", "")).partition(".")[0]
        name = library if library in PUBLIC_VALIDATORS else CUSTOM
        counts[f"validator_type_count.{name}"] += 1
    return {"number_of_validated_datasets": len(specs), **counts}


# Masking


def _command_properties(command: list[str] | None) -> Properties:
    """Return `command` and `main_command`, masked, or nothing outside of commands."""
    if command is None:
        return {}
    masked = _mask(command)
    main_command = masked[0] if masked else "kedro"
    return {"command": " ".join(["kedro", *masked]), "main_command": main_command}


def _mask(words: list[str]) -> list[str]:
    """Replace each word that neither Kedro nor an installed plugin defines by MASK.

    Commands, the names of the last command's options and official starters stay.
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
    """Return the commands that `words` begins with: a group, and what is below it."""
    commands: list[click.Command] = []
    groups = _kedro_groups()
    for word in words:
        command = _find_command(groups, word)
        if command is None and not commands and not word.startswith("-"):
            command = _find_command(_plugin_groups(), word)
        if command is None:
            break
        commands.append(command)
        groups = [command]
    return commands


def _kedro_groups() -> list[click.Command]:
    """Return Kedro's groups of commands, which are all names in its CLI module."""
    from kedro.framework.cli import cli as cli_module

    groups = vars(cli_module).values()
    return [group for group in groups if isinstance(group, click.Group)]


def _plugin_groups() -> list[click.Command]:
    """Return the groups of commands of the plugins that Kedro has loaded; slow."""
    from importlib.metadata import entry_points

    groups = []
    for name in ("kedro.global_commands", "kedro.project_commands"):
        for entry_point in entry_points(group=name):
            with suppress(Exception):  # the module has no such group
                if entry_point.module in sys.modules:
                    groups.append(entry_point.load())
    return groups


def _find_command(groups: Iterable[Any], name: str) -> click.Command | None:
    """Return the public command `name` of one of `groups`."""
    for group in groups:
        with suppress(Exception):  # not a group, or a command that does not load
            context = click.Context(group)
            if name in group.list_commands(context):
                command: click.Command = group.get_command(context, name)
                if _is_public(command, group):
                    return command
    return None


def _is_public(command: click.Command, group: click.Command) -> bool:
    """Whether Kedro or an installed plugin, and not the project, defines `command`.

    In a group of Kedro's, that is Kedro; in a plugin's, any package but the project's.
    """
    package = _package_of(command)
    if _package_of(group) == "kedro":
        return package == "kedro"
    return package != _loaded_package()


def _package_of(command: click.Command) -> str:
    """Return the package that defines the function behind a command."""
    return str(getattr(command.callback, "__module__", "")).partition(".")[0]


def _option_names(commands: list[click.Command]) -> set[str]:
    """Return the names of the options of the last command, or of `kedro` itself."""
    from kedro.framework.cli.cli import cli

    command = commands[-1] if commands else cli
    names = set(HELP_OPTIONS)
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
    """Whether `value` is a starter of Kedro's own, and not of a plugin."""
    if option not in STARTER_OPTIONS:
        return False
    starters = sys.modules.get("kedro.framework.cli.starters")
    specs = getattr(starters, "_OFFICIAL_STARTER_SPECS_DICT", None)
    specs = specs or getattr(starters, "_OFFICIAL_STARTER_SPECS", {})  # Kedro 0.18
    return value in specs and specs[value].origin == "kedro"


# Post


def _post(event: Properties) -> bool:
    """Post an event to Heap; True if Heap accepted it. In debug mode, print it."""
    if _is_debug_mode():
        click.echo(json.dumps(event, indent=2), err=True)
        return False
    body = json.dumps(event)
    with _garbage_collector_paused():
        opener = _opener()
        request = _request(body)
    outcomes: list[str] = []
    # A name look-up has no time-out: only a daemon thread can be left behind with it.
    thread = threading.Thread(
        target=lambda: outcomes.append(_deliver(opener, request)), daemon=True
    )
    thread.start()
    thread.join(DEADLINE)
    outcome = outcomes[0] if outcomes else None
    if outcome is None:
        _start_back_off()
    _log("Posted %s: %s", body, outcome or "no answer in time")
    return outcome == "200"


@contextmanager
def _garbage_collector_paused() -> Iterator[None]:
    """Keep imports from starting a collection, which takes up to 100 ms in Kedro."""
    import gc

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _opener() -> OpenerDirector:
    """Return an opener for proxies and HTTPS only: it has no handler for redirects."""
    from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler

    opener = OpenerDirector()
    opener.add_handler(ProxyHandler())
    opener.add_handler(HTTPSHandler(context=_tls_context()))
    return opener


def _tls_context() -> SSLContext:
    """Return a context with the authorities of the platform, or else of certifi."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    file = os.environ.get("SSL_CERT_FILE")
    folder = ssl.get_default_verify_paths().capath
    if not file and folder and _has_hashed_certificates(folder):
        # OpenSSL reads the one that it needs; to load a bundle takes 20 ms.
        context.load_verify_locations(capath=folder)
        return context
    context.load_default_certs()
    if not file and not context.cert_store_stats()["x509_ca"]:
        with suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
    return context


def _has_hashed_certificates(folder: str) -> bool:
    return any(re.fullmatch(r"[0-9a-f]{8}\.\d+", name) for name in os.listdir(folder))


def _request(body: str) -> Request:
    from urllib.request import Request

    agent = f"kedro-telemetry/{__version__}"
    headers = {"Content-Type": "application/json", "User-Agent": agent}
    return Request(ENDPOINT, body.encode(), headers)


def _deliver(opener: OpenerDirector, request: Request) -> str:
    """Send a request, however long it takes; return its status or an exception's name.

    Only the network belongs here: a thread that logs or writes while Python ends can
    abort it.
    """
    try:
        with opener.open(request, timeout=2 * DEADLINE) as response:
            return str(response.status)
    except Exception as error:  # there is no second try
        return type(error).__name__


_back_off_start = 0.0  # seconds since the epoch, if it cannot be stored in a file


def _start_back_off() -> None:
    """Stop posting for BACK_OFF seconds, in this process and in later ones."""
    global _back_off_start
    marker = _user_file("telemetry.backoff")
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        _back_off_start = time.time()


def _back_off_end() -> float:
    """Return when posting resumes, in seconds since the epoch; 0.0 if it may go on."""
    starts = [_back_off_start]
    with suppress(OSError):  # no post has hit the deadline
        starts.append(_user_file("telemetry.backoff").stat().st_mtime)
    now = time.time()
    ends = [start + BACK_OFF for start in starts if 0 <= now - start < BACK_OFF]
    return max(ends, default=0.0)


# Files


def _user_file(name: str) -> Path:
    """Return the path of a file in the user's configuration folder for Kedro."""
    if sys.platform == "win32":
        folder = os.path.join(os.environ.get("LOCALAPPDATA", ""), "kedro")
    elif sys.platform == "darwin":
        folder = os.path.expanduser("~/Library/Application Support")
    else:
        folder = os.environ.get("XDG_CONFIG_HOME", "")
        if not os.path.isabs(folder):  # counts as unset by the XDG specification
            folder = os.path.expanduser("~/.config")
    if not os.path.isabs(folder):  # without a home folder, a path with no file
        folder = os.devnull
    return Path(folder, "kedro", name)


def _folders_from_here() -> list[Path]:
    """Return the current directory and its parents, nearest first."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # it has been deleted
        return []
    return [here, *here.parents]


def _read(path: Path) -> bytes | None:
    """Return the content of a file, or None if there is none. OSError if unreadable."""
    try:
        os.lstat(path)  # which finds a link to nowhere, too
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # to read a pipe could block for ever
        raise OSError(f"{path} is not a file")
    if found.st_size > LARGEST_FILE:
        raise OSError(f"{path} is too large")
    return path.read_bytes()


def _read_toml(path: Path) -> Properties:
    """Return the document in a TOML file, or {} if it cannot be read."""
    try:
        return _parse_toml(_read(path) or b"")
    except OSError:
        return {}


def _parse_toml(content: bytes) -> Properties:
    """Return the TOML document in `content`, or {} if it is not one."""
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError):  # not UTF-8, not TOML, or nested too deeply
        return {}


def _table(document: Properties, *names: str) -> Properties:
    """Return the table at the path `names` in a TOML document, or {} for none."""
    found: Any = document
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that it is whole at any time. OSError on failure.

    Mode, owner and symbolic links stay. A read-only file stays as it is.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.stat() if target.exists() else None
    if old and not (old.st_mode & 0o222 and os.access(target, os.W_OK)):
        raise PermissionError(f"{path} is read-only")
    new = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        with open(new, "xb") as file:
            if old and hasattr(os, "chown"):  # not on Windows
                os.chown(new, old.st_uid, old.st_gid)
            if old:
                os.chmod(new, stat.S_IMODE(old.st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


# The commands


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": HELP_OPTIONS},
)
@click.pass_context
def telemetry(context: click.Context) -> None:
    """See whether telemetry is on, and opt out or in."""
    if context.invoked_subcommand is None:
        context.invoke(status)


@telemetry.command()
def status() -> None:
    """Show whether telemetry is on here, and why (the default)."""
    project_path = _load_nearest_project()
    consent = _find_consent(project_path)
    click.echo(f"Telemetry:   {'off' if consent.decision is False else 'on'} here")
    click.echo(f"Reason:      {consent.basis}")
    click.echo(f"Identity:    {_stored_uuid() or 'none yet'}")
    click.echo(f"             in {_user_file('telemetry.toml')}")
    if project_path is not None:
        pyproject = _pyproject(project_path)
        click.echo(f"Project id:  {_stored_project_id(pyproject) or 'none yet'}")
        click.echo(f"             in {pyproject}")
    click.echo(f"Endpoint:    {ENDPOINT}")
    click.echo(f"Back-off:    {_back_off_in_words(_back_off_end())}")
    click.echo(f"\n{STATUS_HELP}")


def _back_off_in_words(end: float) -> str:
    if not end:
        return "none"
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end))
    return f"until {until}, as a post had no answer in time"


@telemetry.command()
def enable() -> None:
    """Opt in for all your projects."""
    path = _write_decision("true")
    click.echo(
        f"You have opted in to telemetry for all your projects.\nSaved in {path}"
    )
    consent = _find_consent(_load_nearest_project())
    if consent.decision is False:
        click.echo(f"Telemetry stays off here: {consent.basis}")


@telemetry.command()
def disable() -> None:
    """Opt out for all your projects."""
    path = _write_decision("false")
    click.echo(
        f"You have opted out of telemetry for all your projects.\nSaved in {path}"
    )


def _write_decision(decision: str) -> Path:
    """Write `consent: decision` for all of the user's projects; return the file."""
    path = _user_file(".telemetry")
    try:
        _write(path, f"consent: {decision}\n".encode())
    except OSError as error:
        raise click.ClickException(f"Nothing has changed: {error}") from error
    return path


def _load_nearest_project() -> Path | None:
    """Find the Kedro project around the current directory, and load its settings.

    `kedro` has loaded them already; `python -m kedro_telemetry` has not.
    """
    for folder in _folders_from_here():
        with suppress(OSError):  # a file that cannot be read
            if b"[tool.kedro]" in (_read(_pyproject(folder)) or b""):
                _load_settings(folder)
                return folder
    return None


def _load_settings(project_path: Path) -> None:
    if _loaded_package() is None:
        with suppress(Exception):  # a project, or a Python, that Kedro does not support
            from kedro.framework.startup import bootstrap_project

            bootstrap_project(project_path)


def add_commands() -> None:
    """Add `kedro telemetry` to Kedro's commands. Kedro calls this when it starts.

    An entry point in `kedro.global_commands` would break two of Kedro's own tests,
    which compare all of its groups of commands.
    """
    with suppress(Exception):  # the other commands must work
        from kedro.framework.cli.cli import cli

        cli.add_command(telemetry)


# Other packages import from `kedro_telemetry.plugin` and `kedro_telemetry.api`.
plugin = api = sys.modules[__name__]
sys.modules[f"{__name__}.plugin"] = plugin
sys.modules[f"{__name__}.api"] = api

if __name__ == "__main__":
    telemetry()
