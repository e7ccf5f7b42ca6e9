"""Anonymous usage telemetry for Kedro: one event per command or session.

The module reads as the life of an event. Kedro calls the hooks, which hand the event
to `_send`, the only way out. Behind it are the rooms that the event passes: consent,
identity, properties, masking, post and files. The commands of `kedro telemetry` come
last.
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
DEADLINE = 2.0  # seconds that a post may take
BACK_OFF = 3600.0  # seconds without a post after one that hit the deadline
LARGEST_FILE = 2**20  # bytes
LONGEST_TEXT = 1023  # characters that Heap takes in a key or a value
LARGEST_NUMBER = 1e308  # the largest that every reader of JSON takes

NOTICE = f"""\
Kedro collects anonymous usage data to improve the product.
`kedro telemetry` shows what is collected and whether telemetry is on.
To opt out, run `kedro telemetry disable` or set the variable DO_NOT_TRACK.
Read more: {DOCUMENTATION}"""
STATUS_HELP = f"""\
See the events of a command:  KEDRO_TELEMETRY_DEBUG=1 kedro run
Opt out in all your projects: kedro telemetry disable
Opt in again:                 kedro telemetry enable
What is sent, and other ways to opt out:
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

PUBLIC_DATASETS = ("kedro.io.", "kedro_datasets.", "kedro_datasets_experimental.")
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

logger = logging.getLogger("kedro_telemetry")
_cli_hook = HookimplMarker("kedro_cli")
_session_hook = HookimplMarker("kedro")


# The hooks, in the order in which Kedro calls them


class KedroTelemetryHook:
    """Reports each command and each session, by the hooks that Kedro calls in them.

    It remembers the command that is running, or else the last session. No hook raises,
    whatever it is handed, as an exception would end the user's command.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(
        self, command: list[str] | None = None, project_path: Path | None = None
    ) -> None:
        """Remember a command, or none, and nothing of what was before."""
        self._command = command
        self._project_path = project_path
        self._session: object = None
        self._is_reported = False

    @_cli_hook
    def before_command_run(self, project_metadata: Any, command_args: Any) -> None:
        """Remember the command, and its project if there is one."""
        self._begin()
        with suppress(Exception):
            words = [str(word) for word in command_args]
            path = project_metadata.project_path if project_metadata else None
            if words[:1] != ["telemetry"]:  # to ask about telemetry is not reported
                self._begin(words, path)

    @_session_hook
    def after_context_created(self, context: Any) -> None:
        """Remember the session, by the hook manager that all its contexts share."""
        with suppress(Exception):
            session = getattr(context, "_hook_manager", context)
            if self._command is None and self._session is not session:
                self._begin()
                self._session = session
            self._project_path = context.project_path

    @_session_hook
    def after_catalog_created(self, catalog: Any) -> None:
        """Report the session, and with it the command that created it."""
        self._report("Kedro Project Statistics", lambda: _project_statistics(catalog))

    @_cli_hook
    def after_command_run(self) -> None:
        """Report the command, unless a session has been reported for it."""
        if self._command is None:
            return
        with suppress(KeyboardInterrupt):  # the command is over: only the wait ends
            self._report("CLI command", dict)
        self._begin()

    def _report(self, event_name: str, collect: Callable[[], Properties]) -> None:
        """Send the one event of a command or session, whether it arrives or not."""
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
    """Send an event of another Kedro plugin, under the same consent. Never raises.

    Args:
        event_name: What has happened, such as `kedro_skills_install`.
        properties: What belongs to it; nothing personal may be in it. The properties
            that every event has win over those of the same name.
        project_path: The root of the project that the event is about, if any.

    Returns:
        True if Heap accepted the event, False otherwise.
    """
    return _send(event_name, lambda: dict(properties or {}), project_path)


# The one door


def _send(
    event_name: str, collect: Callable[[], Properties], project_path: Path | None
) -> bool:
    """Take an event through all rooms; True if Heap accepted it. Never raises.

    `collect` gives the event's own properties and is not called without consent.
    """
    try:
        if os.environ.get("_KEDRO_COMPLETE"):  # the user pressed TAB in a shell
            return False
        consent = _check_for_telemetry_consent(project_path)
        if consent is False:
            _explain_denial(project_path)
            return False
        if consent is None:
            _show_notice()
        return _post(_make_event(event_name, collect(), project_path))
    except (Exception, SystemExit) as error:  # no event is worth a user's command
        _log("An event was lost: %s", type(error).__name__)
        return False


def _is_debug_mode() -> bool:
    return bool(os.environ.get("KEDRO_TELEMETRY_DEBUG"))


def _log(message: str, *args: object) -> None:
    """Log at DEBUG, for auditors; Kedro's handler would take brackets for markup."""
    with suppress(Exception, SystemExit):  # a log that fails loses no event
        logger.debug(message, *args, extra={"markup": False})


# Consent


class _Consent:
    """Whether consent is granted, denied or (None) neither, and what that rests on."""

    def __init__(self, decision: bool | None, basis: str) -> None:
        self.decision = decision
        self.basis = basis


NO_DECISION = _Consent(None, "nobody has granted or denied consent")


def _check_for_telemetry_consent(project_path: Path | None) -> bool | None:
    """True if consent to events of a project is granted, False if denied, else None.

    Where no project is given, the current directory speaks for it.
    """
    return _find_consent(project_path).decision


def _find_consent(project_path: Path | None) -> _Consent:
    """The first denial of all sources, or else the first grant."""
    grant = NO_DECISION
    for consent in _each_consent(project_path):
        if consent.decision is False:
            return consent
        if grant is NO_DECISION:
            grant = consent
    return grant


def _each_consent(project_path: Path | None) -> Iterator[_Consent]:
    """What each source decides. A new way to opt out has its place here."""
    yield _environment_consent()
    yield _settings_consent()
    yield _file_consent(_user_file(".telemetry"))
    yield _file_consent(_project_consent_file(project_path))


def _environment_consent() -> _Consent:
    for name in OPT_OUT_VARIABLES:
        if name in os.environ:  # whatever it is set to, even to nothing
            return _Consent(False, f"{name} is set")
    if os.environ.get("GITHUB_REPOSITORY_OWNER") == "kedro-org":
        return _Consent(False, "GITHUB_REPOSITORY_OWNER is kedro-org")
    return NO_DECISION


def _settings_consent() -> _Consent:
    """Kedro's own switch, in the settings of the project that Kedro has loaded."""
    from importlib.util import find_spec

    package = _loaded_package()
    if package is None:
        return NO_DECISION
    module = f"{package}.settings"
    try:
        # Kedro goes on without settings that it could not import.
        if module not in sys.modules and find_spec(module) is not None:
            return _Consent(False, f"{module} could not be imported")
        settings = sys.modules["kedro.framework.project"].settings
        if "kedro-telemetry" not in settings.DISABLE_HOOKS_FOR_PLUGINS:
            return NO_DECISION
    except Exception:  # what cannot be read may hold the switch
        return _Consent(False, f"{module} could not be read")
    return _Consent(False, f"DISABLE_HOOKS_FOR_PLUGINS is set in {module}")


def _loaded_package() -> str | None:
    """The name of the package of the project that Kedro has loaded, if it has."""
    project = sys.modules.get("kedro.framework.project")
    return getattr(project, "PACKAGE_NAME", None)


def _project_consent_file(project_path: Path | None) -> Path:
    """`.telemetry` of a project, or else the nearest one from here upwards."""
    if project_path is not None:
        return Path(project_path, ".telemetry")
    files = [folder / ".telemetry" for folder in _folders_from_here()]
    return next(filter(os.path.lexists, files), files[0])


def _file_consent(path: Path) -> _Consent:
    """What a `.telemetry` file decides; one that cannot be read denies."""
    try:
        decision = _parse_consent((_read(path) or b"").decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        return _Consent(False, f"{path} cannot be read")
    if decision is None:
        return NO_DECISION
    return _Consent(decision, f"{path} {'grants' if decision else 'denies'} it")


def _parse_consent(text: str) -> bool | None:
    """True if `consent: true` is all that the lines of `text` say of consent.

    None if they do not mention it, False if they say anything else of it.
    """
    if "\0" in text:  # UTF-16 without its mark, as the Windows command prompt writes it
        return False
    lines = [line.partition("#")[0].rstrip().lower() for line in text.splitlines()]
    mentions = [line for line in lines if "consent" in line]
    if not mentions:
        return None
    return all(re.fullmatch(GRANT, line) for line in mentions)


def _explain_denial(project_path: Path | None) -> None:
    """Tell in debug mode why there is no event."""
    if _is_debug_mode():
        basis = _find_consent(project_path).basis
        click.echo(f"kedro-telemetry sends nothing: {basis}", err=True)


def _show_notice() -> None:
    """Tell users that events are sent, each of them once."""
    memory = _user_file("telemetry.notice")
    if _is_ci_env() or memory.exists():
        return
    click.echo(NOTICE, err=True)
    with suppress(OSError):  # then the notice comes again
        _write(memory, b"")


# Identity


def _get_or_create_uuid() -> str:
    """The user's UUID as 32 hex digits, "" if consent is denied or none can be stored.

    For Kedro-Viz and Kedro's extension for VS Code; events do not come this way.
    """
    return "" if _check_for_telemetry_consent(None) is False else _user_uuid()


def _user_uuid() -> str:
    """The user's UUID, made at the first event; "" where none can be stored."""
    from uuid import uuid4

    stored = _stored_uuid()
    if stored or _is_ci_env():  # a throw-away machine is no new user
        return stored
    content = f'[telemetry]\nuuid = "{uuid4().hex}"\n'
    with suppress(OSError):  # no home folder, or one that is read-only or full
        _write(_user_file("telemetry.toml"), content.encode())
    return _stored_uuid()  # which is another one if another command was faster


def _stored_uuid() -> str:
    """The UUID in telemetry.toml, "" where there is no valid one."""
    from uuid import UUID

    table = _table(_read_toml(_user_file("telemetry.toml")), "telemetry")
    try:
        return UUID(str(table.get("uuid"))).hex
    except ValueError:
        return ""


def _project_id(pyproject: Path) -> Any:
    """The id in pyproject.toml, made at the first event of a project; None for none."""
    from uuid import uuid4

    stored = _stored_project_id(pyproject)
    if stored is not None or _is_ci_env():  # a CI job must not change its checkout
        return stored
    with suppress(OSError):  # a file that cannot be read or written stays without
        edited = _with_project_id(_read(pyproject) or b"", uuid4().hex)
        if edited is not None:
            _write(pyproject, edited)
    return _stored_project_id(pyproject)


def _stored_project_id(pyproject: Path) -> Any:
    """The id in a Kedro project's pyproject.toml, whatever it is; None for none."""
    tool = _table(_read_toml(pyproject), "tool")
    if "kedro" not in tool:
        return None
    return _table(tool, "kedro_telemetry").get("project_id")


def _with_project_id(content: bytes, project_id: str) -> bytes | None:
    """The pyproject.toml `content` with an id added, None if that cannot be done.

    There are two edits. One will do if it gives the old document plus the id.
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


def _make_event(
    event_name: str, own: Properties, project_path: Path | None
) -> Properties:
    """The body of a post. The base properties win over the event's own."""
    from datetime import UTC, datetime

    identity = _user_uuid()
    base = _base_properties(identity, project_path)
    base["project_id"] = _hashed_project_id(project_path)
    return {
        "app_id": _get_heap_app_id(),
        "event": str(event_name)[:LONGEST_TEXT],
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "identity": identity or "missing_user_identity",
        "properties": _for_heap(own | base),
    }


def _get_heap_app_id() -> str:
    """The application at Heap that receives the events."""
    return os.environ.get("HEAP_APPID_DEV", APP_ID)


def _for_heap(properties: Properties) -> Properties:
    """`properties` as Heap takes them: short texts, numbers and booleans, no None."""
    taken: Properties = {}
    for key, value in properties.items():
        if isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER:
            taken[str(key)[:LONGEST_TEXT]] = value
        elif value is not None:
            taken[str(key)[:LONGEST_TEXT]] = str(value)[:LONGEST_TEXT]
    return taken


def _get_project_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """The base properties of an event; if consent is denied, without `project_id`.

    For Kedro's extension for VS Code; events do not come this way.
    """
    properties = _base_properties(user_uuid, project_path)
    if _check_for_telemetry_consent(project_path) is not False:
        properties["project_id"] = _hashed_project_id(project_path)
    return _for_heap(properties)


def _base_properties(user_uuid: str, project_path: Path | None) -> Properties:
    """The properties that every event has, but for `project_id`.

    A new property that belongs to every event has its place here.
    """
    kedro_table = _table(_read_toml(_pyproject(project_path)), "tool", "kedro")
    # `tools` is an array, or a text that holds a list as Python writes it.
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
    with suppress(Exception):  # Kedro may refuse a new Python by raising a warning
        from kedro import __version__ as version

        return version
    return None


def _is_ci_env() -> bool:
    is_any_set = any(os.environ.get(name) for name in CI_VARIABLES)
    return is_any_set or os.environ.get("CI") == "true"


def _pyproject(project_path: Path | None) -> Path:
    """pyproject.toml of a project; where there is none, a path at which no file is."""
    return Path(project_path or os.devnull, "pyproject.toml")


def _hashed_project_id(project_path: Path | None) -> str | None:
    """`project_id`, whose id is made at the first event of a project."""
    from hashlib import sha512

    project_id = _project_id(_pyproject(project_path))
    if project_id is None:
        return None
    package = _loaded_package() or "undefined_package_name"
    return sha512(f"{project_id}{package}".encode()).hexdigest()


def _project_statistics(catalog: Any) -> Properties:
    """How large the project is, and of what types its datasets are.

    A new property that belongs to a session has its place here.
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
    with suppress(Exception, SystemExit):  # the user's code, which may raise anything
        from kedro.framework.project import pipelines

        properties["number_of_pipelines"] = len(pipelines)
        properties["number_of_nodes"] = len(pipelines["__default__"].nodes)
    return properties


def _dataset_types(catalog: Any, datasets: list[str]) -> Properties:
    """How many datasets are of each public type; Kedro tells types since 1.0."""
    if not hasattr(catalog, "get_type"):
        return {}
    resolver = getattr(catalog, "config_resolver", None)
    configs = getattr(resolver, "config", {})  # without datasets that exist already
    types: dict[Any, str] = {}
    counts: Counter[str] = Counter()
    for name in datasets:
        declared = configs.get(name, {}).get("type", "")
        key = declared or (name,)
        if key not in types:
            types[key] = _public_type(catalog, name, declared)
        counts[f"dataset_type_count.{types[key]}"] += 1
    return dict(counts)


def _public_type(catalog: Any, name: str, declared: str | type) -> str:
    """The full name of the class of the dataset `name`; CUSTOM if it is not public.

    Kedro is asked only where the declared type does not tell, as it would import the
    class, and with it pandas, Spark or TensorFlow for datasets that nobody uses.
    """
    with suppress(Exception, SystemExit):  # a type that does not exist or import
        found = (declared and _declared_class(declared)) or catalog.get_type(name)
        if found.startswith(PUBLIC_DATASETS):
            return str(found)
    return CUSTOM


def _declared_class(declared: str | type) -> str:
    """The full name of a class as a catalog declares it, found without an import.

    CUSTOM if it is not public; "" if its package is, but does not tell of the class.
    """
    if isinstance(declared, type):
        return f"{declared.__module__}.{declared.__qualname__}"
    # Kedro, too, looks for a name in `kedro.io`, in `kedro_datasets` and by itself.
    path = f"kedro.io.{declared.removeprefix('kedro.io.')}"
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type):
        return f"{found.__module__}.{found.__qualname__}"
    is_full = declared.startswith(PUBLIC_DATASETS)
    return _datasets_class(declared if is_full else f"kedro_datasets.{declared}")


def _datasets_class(path: str) -> str:
    """The full name of a class of kedro-datasets, as the text of its group tells it."""
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
    """How many datasets have a validator of each public library, since Kedro 1.6."""
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
    """`command` and `main_command`, masked; neither where no command is running."""
    if command is None:
        return {}
    masked = _mask(command)
    main_command = masked[0] if masked else "kedro"
    return {"command": " ".join(["kedro", *masked]), "main_command": main_command}


def _mask(words: list[str]) -> list[str]:
    """`words`, with MASK for each that neither Kedro nor an installed plugin defines.

    Clear are the commands, the names of the last one's options and official starters.
    """
    path = _known_path(words)
    options = _option_names(path)
    rest = _split_at_equals_sign(words[len(path) :], options)
    if not path and rest and rest[0] not in options:
        return [MASK]
    masked = words[: len(path)]
    for previous, word in zip(["", *rest], rest, strict=False):
        is_starter = previous in options and _is_official_starter(previous, word)
        masked.append(word if word in options or is_starter else MASK)
    return masked


def _known_path(words: list[str]) -> list[click.Command]:
    """The commands that `words` begins with, a command a word, as far as known."""
    path: list[click.Command] = []
    groups = _kedro_groups()
    for word in words:
        command = _find_command(groups, word)
        if command is None and not path and not word.startswith("-"):
            command = _find_command(_plugin_groups(), word)
        if command is None:
            break
        path.append(command)
        groups = [command]
    return path


def _kedro_groups() -> list[click.Command]:
    """Kedro's groups of commands, all of which are names in the module of its CLI."""
    from kedro.framework.cli import cli

    return [group for group in vars(cli).values() if isinstance(group, click.Group)]


def _plugin_groups() -> list[click.Command]:
    """The groups of commands of installed plugins, which take a while to look up."""
    from importlib.metadata import entry_points

    groups = []
    for name in ("kedro.global_commands", "kedro.project_commands"):
        for entry_point in entry_points(group=name):
            with suppress(Exception):  # Kedro could not load it, either, and said so
                groups.append(entry_point.load())
    return groups


def _find_command(groups: Iterable[Any], name: str) -> click.Command | None:
    """The public command `name` of one of `groups`."""
    for group in groups:
        with suppress(Exception):  # not a group, or a command that cannot be loaded
            context = click.Context(group)
            if name in group.list_commands(context):
                command: click.Command = group.get_command(context, name)
                if _is_public(command, group):
                    return command
    return None


def _is_public(command: click.Command, group: click.Command) -> bool:
    """Whether Kedro or a plugin defines `command`, and not code of the project.

    In Kedro's groups only Kedro does; in a plugin's, anybody but the project.
    """
    owner = _owner(command)
    if _owner(group) == "kedro":
        return owner == "kedro"
    return owner != _loaded_package()


def _owner(command: click.Command) -> str:
    """The package that defines the function behind a command."""
    return str(getattr(command.callback, "__module__", "")).partition(".")[0]


def _option_names(path: list[click.Command]) -> set[str]:
    """The names of the options of the last command of `path`, or of `kedro` itself."""
    from kedro.framework.cli.cli import cli

    command = path[-1] if path else cli
    names = set(HELP_OPTIONS)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            names.update(parameter.opts, parameter.secondary_opts)
    return names


def _split_at_equals_sign(words: list[str], options: set[str]) -> list[str]:
    """`words`, in which `--option=value` has become two."""
    split = []
    for word in words:
        option, equals_sign, value = word.partition("=")
        split += [option, value] if equals_sign and option in options else [word]
    return split


def _is_official_starter(option: str, value: str) -> bool:
    """Whether `value` is a starter of Kedro's own; plugins add theirs to the same."""
    starters: Any = sys.modules.get("kedro.framework.cli.starters")
    if option not in STARTER_OPTIONS or starters is None:
        return False
    specs = getattr(starters, "_OFFICIAL_STARTER_SPECS_DICT", None)
    specs = specs or starters._OFFICIAL_STARTER_SPECS  # its name in Kedro 0.18
    return value in specs and specs[value].origin == "kedro"


# Post


def _post(event: Properties) -> bool:
    """Post an event to Heap; True if it is accepted before the deadline."""
    from queue import Empty, SimpleQueue

    if _is_debug_mode():
        click.echo(json.dumps(event, indent=2), err=True)
        return False
    if _back_off_end():
        return False
    body = json.dumps(event)
    with _garbage_collector_paused():
        opener = _opener()
        request = _request(body)
    outcomes: SimpleQueue[str] = SimpleQueue()
    # A name look-up can hang, and only a thread, which is a daemon, can be left alone.
    threading.Thread(
        target=lambda: outcomes.put(_deliver(opener, request)), daemon=True
    ).start()
    try:
        outcome = outcomes.get(timeout=DEADLINE)
    except Empty:
        outcome = "no answer in time"
        _start_back_off()
    _log("Posted %s: %s", body, outcome)
    return outcome == "200"


@contextmanager
def _garbage_collector_paused() -> Iterator[None]:
    """Import in peace: to collect all that Kedro has made takes longer than a post."""
    import gc

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _opener() -> OpenerDirector:
    """An opener that knows the user's proxies and HTTPS, and so follows no redirect."""
    from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler

    opener = OpenerDirector()
    opener.add_handler(ProxyHandler())
    opener.add_handler(HTTPSHandler(context=_tls_context()))
    return opener


def _tls_context() -> SSLContext:
    """A context that trusts whom the platform trusts; certifi where that is nobody."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    file = os.environ.get("SSL_CERT_FILE")
    folder = ssl.get_default_verify_paths().capath
    if not file and folder and _has_hashed_certificates(folder):
        # OpenSSL reads the one that it needs, where a bundle takes 20 ms to load.
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
    """Send a request, whatever time it takes: its status, or an exception's name.

    A thread that logs or writes while Python ends can abort it: nothing but the
    network belongs here.
    """
    try:
        with opener.open(request, timeout=2 * DEADLINE) as response:
            return str(response.status)
    except Exception as error:  # one try: the event is lost
        return type(error).__name__


_back_off_start = 0.0  # seconds since the epoch, where no file can remember it


def _start_back_off() -> None:
    """Post nothing for a while, in this process and in those to come."""
    global _back_off_start
    memory = _user_file("telemetry.backoff")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.touch()
    except OSError:
        _back_off_start = time.time()


def _back_off_end() -> float:
    """When a post may be tried again, in seconds since the epoch; 0.0 for at once."""
    starts = [_back_off_start]
    with suppress(OSError):  # no post has hit the deadline
        starts.append(_user_file("telemetry.backoff").stat().st_mtime)
    now = time.time()
    ends = [start + BACK_OFF for start in starts if 0 <= now - start < BACK_OFF]
    return max(ends, default=0.0)


# Files


def _user_file(name: str) -> Path:
    """A file in the user's configuration folder for Kedro."""
    if sys.platform == "win32":
        folder = os.path.join(os.environ.get("LOCALAPPDATA", ""), "kedro")
    elif sys.platform == "darwin":
        folder = os.path.expanduser("~/Library/Application Support")
    else:
        folder = os.environ.get("XDG_CONFIG_HOME", "")
        if not os.path.isabs(folder):  # which its specification calls unset
            folder = os.path.expanduser("~/.config")
    if not os.path.isabs(folder):  # there is no home folder, and so no file
        folder = os.devnull
    return Path(folder, "kedro", name)


def _folders_from_here() -> list[Path]:
    """The current directory and all above it, nearest first."""
    here = Path.cwd()
    return [here, *here.parents]


def _read(path: Path) -> bytes | None:
    """The content of a file, None where there is none. OSError if unreadable."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe could keep its reader for ever
        raise OSError(f"{path} is not a file")
    if found.st_size > LARGEST_FILE:
        raise OSError(f"{path} is too large")
    return path.read_bytes()


def _read_toml(path: Path) -> Properties:
    """The document in a TOML file, {} where none can be read."""
    try:
        return _parse_toml(_read(path) or b"")
    except OSError:
        return {}


def _parse_toml(content: bytes) -> Properties:
    """The document that `content` is, {} if it is not TOML."""
    import tomllib

    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError):  # not UTF-8, not TOML, or nested too deep
        return {}


def _table(document: Properties, *names: str) -> Properties:
    """The table `names` of a TOML document, {} where there is none."""
    found: Any = document
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that it is whole at any time. OSError if not done.

    Mode, owner and symbolic links stay; a read-only file stays as it is.
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
    """Show whether telemetry is on here, and why. (The default.)"""
    project_path = _find_project()
    consent = _find_consent(project_path)
    pyproject = _pyproject(project_path)
    click.echo(f"Telemetry:   {'off' if consent.decision is False else 'on'} here")
    click.echo(f"Reason:      {consent.basis}")
    _echo_id("Identity:", _stored_uuid() or None, _user_file("telemetry.toml"))
    if project_path is not None:
        _echo_id("Project id:", _stored_project_id(pyproject), pyproject)
    click.echo(f"Endpoint:    {ENDPOINT}")
    click.echo(f"Back-off:    {_back_off_in_words()}")
    click.echo(f"\n{STATUS_HELP}")


def _echo_id(label: str, stored: object, path: Path) -> None:
    click.echo(f"{label:12} {'none yet' if stored is None else stored}")
    click.echo(f"{'':12} in {path}")


def _back_off_in_words() -> str:
    if not _back_off_end():
        return "none"
    end = time.localtime(_back_off_end())
    return time.strftime(
        "until %Y-%m-%d %H:%M:%S, as a post had no answer in time", end
    )


@telemetry.command()
def enable() -> None:
    """Opt in in all your projects."""
    path = _write_decision("true")
    click.echo(f"You have opted in to telemetry in all your projects, in\n{path}")
    consent = _find_consent(_find_project())
    if consent.decision is False:
        click.echo(f"Telemetry stays off here: {consent.basis}")


@telemetry.command()
def disable() -> None:
    """Opt out in all your projects."""
    path = _write_decision("false")
    click.echo(f"You have opted out of telemetry in all your projects, in\n{path}")


def _write_decision(decision: str) -> Path:
    """Write `consent: decision` for all of the user's projects, and tell where."""
    path = _user_file(".telemetry")
    try:
        _write(path, f"consent: {decision}\n".encode())
    except OSError as error:
        raise click.ClickException(f"Nothing has changed: {error}") from error
    return path


def _find_project() -> Path | None:
    """The root of the Kedro project that the current directory is in, now loaded."""
    for folder in _folders_from_here():
        with suppress(OSError):  # a file that is not ours to read
            if b"[tool.kedro]" in (_read(folder / "pyproject.toml") or b""):
                _load_project(folder)
                return folder
    return None


def _load_project(project_path: Path) -> None:
    """Let Kedro load a project's settings, where no `kedro` command has done so."""
    if _loaded_package() is None:
        with suppress(Exception):  # a project, or a Python, that Kedro does not take
            from kedro.framework.startup import bootstrap_project

            bootstrap_project(project_path)


def add_commands() -> None:
    """Add `kedro telemetry` to Kedro's commands; Kedro calls this when it starts.

    An entry point in `kedro.global_commands` would be simpler, but two of Kedro's own
    tests compare its groups of commands, and would fail wherever this is installed.
    """
    with suppress(Exception):  # all other commands are worth more
        from kedro.framework.cli.cli import cli

        cli.add_command(telemetry)


# Kedro-Viz, kedro-skills and others import from these two.
plugin = api = sys.modules[__name__]
sys.modules[f"{__name__}.plugin"] = plugin
sys.modules[f"{__name__}.api"] = api

if __name__ == "__main__":
    telemetry()
